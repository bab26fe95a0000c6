"""Options of all commands: finite numbers, any order, one sentence for a mistake."""

from pathlib import Path
from typing import Any

import pytest

from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.numbers import read_number, read_whole


def parsed(*words: str) -> Any:
    parser = Parser(prog="nexus-gen try")
    parser.add_argument("run", type=Path, nargs="?", default=Path("shipped"), help="default: %(default)s")
    parser.add_argument("words", nargs="*")
    group = parser.add_argument_group("group")
    group.add_argument("--share", type=float)
    group.add_argument("--count", type=int)
    group.add_argument("--flag", action="store_true")
    group.add_argument("--where", type=Path)
    return parser.parse_args(words)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "Infinity", "1e999", "many", ""])
@pytest.mark.parametrize("option", ["--share", "--count"])
def test_numbers_are_finite(option: str, text: str) -> None:
    with pytest.raises(UserError, match=f"^{option} is .*; it must be a (finite )?number; `nexus-gen try --help`"):
        parsed(f"{option}={text}")


def test_numbers_as_people_write_them() -> None:
    assert (parsed("--share", "1e-1").share, parsed("--count", "2e3").count) == (0.1, 2000)
    assert (read_whole("1_000"), read_whole(str(2**63)), read_whole(2.0)) == (1000, 2**63, 2)
    for value in (True, None, [1], "1,5", 10**400):
        with pytest.raises(ValueError, match="it must be a number"):
            read_number(value)
    with pytest.raises(UserError, match=r"--count is 2\.5; it must be a whole number"):
        parsed("--count", "2.5")


@pytest.mark.parametrize(
    "words",
    [
        ("--flag", "a", "b", "c", "--count", "3"),
        ("a", "--flag", "b", "--count", "3", "c"),
        ("--count=3", "a", "b", "--flag", "c"),
    ],
)
def test_options_stand_anywhere(words: tuple[str, ...]) -> None:
    found = parsed(*words)
    assert (found.run, found.words, found.flag, found.count) == (Path("a"), ["b", "c"], True, 3)


def test_what_stands_behind_two_dashes_is_no_option() -> None:
    found = parsed("--count", "3", "--", "-odd.jsonl", "--flag", "--help")
    assert (found.run, found.words, found.flag, found.count) == (Path("-odd.jsonl"), ["--flag", "--help"], False, 3)


def test_defaults_stay_where_nothing_is_given() -> None:
    found = parsed("--flag")
    assert (found.run, found.words) == (Path("shipped"), [])


def test_home_is_expanded_where_the_shell_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    assert parsed("--where=~/runs").where == Path("/somebody/runs")
    assert parsed("--where=~nobody-of-that-name/a~b").where == Path("~nobody-of-that-name/a~b")


def test_what_argparse_finds_wrong_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^unrecognized arguments: --flog; `nexus-gen try --help` says more$"):
        parsed("--flog")
    with pytest.raises(UserError, match=r"^--count: expected one argument, and "):
        parsed("--count")
    with pytest.raises(UserError, match="begins with a dash is given as --where=-value; "):
        parsed("--where", "-odd")
    assert parsed("--where=-odd").where == Path("-odd")


@pytest.mark.parametrize("words", [("--help",), ("a", "-h"), ("a", "--flag", "b", "--help")])
def test_help_names_positional_arguments(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(*words)
    assert caught.value.code == 0
    assert "usage: nexus-gen try [-h]" in (shown := capsys.readouterr().out) and "default: shipped" in shown


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "nan", True, [1]])
def test_fields_of_the_page_take_finite_numbers(value: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gradio

    from nexus_gen.ui.parts import Number, Slider

    for field in (Number(label="Seed", precision=0, minimum=0), Slider(label="Steps", minimum=1, maximum=200, step=1)):
        with pytest.raises(gradio.Error, match=f"{field.label} is .*; it must be a (finite )?number"):
            field.preprocess(value)
        assert field.preprocess(7) == 7
    assert Number(label="Seed").preprocess(None) is None
