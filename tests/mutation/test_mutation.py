"""The mutation run itself: its operators change what they say, and it tells what tests notice from what they do not."""

from pathlib import Path

import pytest
from cosmic_ray.mutating import mutate_code
from operators import OWN, SwapArguments, operators
from run import lines_of, mutants, survivors_of

SOURCE = '''"""A module."""

LIMIT = 3


def kept(values: list[int] | None, limit: int = LIMIT) -> int:
    """The sum of what is below 3 | 4."""
    return sum(value for value in values or [] if value < limit)


def unseen(value: int) -> int:
    return value + 1
'''
TEST = """from module import kept


def test_kept() -> None:
    assert kept([1, 2, 3, 4]) == 3
"""


@pytest.mark.parametrize("kind", OWN)
def test_operators_do_as_their_examples(kind) -> None:
    for example in kind.examples():
        assert mutate_code(example.pre_mutation_code, kind(), 0) == example.post_mutation_code
    assert mutate_code("hypot(a, b)\n", SwapArguments(), 0) is None


def test_changes_are_of_code_alone_and_the_same_ones_elsewhere_in_a_file() -> None:
    everything = mutants(SOURCE, (), 100)
    assert {one.after for one in everything} >= {
        "LIMIT = 4",
        "LIMIT = 2",
        "return sum(value for value in values or [] if value <= limit)",
        "return sum(value for value in values and [] if value < limit)",
        "return value - 1",
    }
    assert {one.line for one in everything} == {3, 8, 12}  # neither annotations nor docstrings
    assert len({one.source for one in everything}) == len(everything) and all(
        one.source != SOURCE for one in everything
    )
    few = mutants(SOURCE, (), 3)
    moved = mutants(SOURCE.replace("LIMIT = 3", "# A comment.\n\nLIMIT = 3"), (), 3)
    assert [(one.line + 2, one.before, one.after) for one in few] == [
        (one.line, one.before, one.after) for one in moved
    ]
    assert {one.line for one in mutants(SOURCE, ("unseen",), 100)} == {12}
    assert lines_of("class A:\n    def b(self): ...\n    def c(self): ...\n", ["A.c"]) == {3}
    assert len(operators()) > 30


def test_what_no_test_notices_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "test_module.py").write_text(TEST, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    number, survived = survivors_of(tmp_path, "module.py", {"tests": ["test_module.py"], "only": ["unseen"]}, 100)
    assert number == len(survived) > 0 and {one.before for one in survived} == {"return value + 1"}
    number, survived = survivors_of(tmp_path, "module.py", {"tests": ["test_module.py"], "only": ["kept"]}, 2)
    assert number == 2 and survived == []
    assert (tmp_path / "module.py").read_text(encoding="utf-8") == SOURCE
    (tmp_path / "test_module.py").write_text(TEST.replace("== 3", "== 4"), encoding="utf-8")
    with pytest.raises(SystemExit, match="fail without any change"):
        survivors_of(tmp_path, "module.py", {"tests": ["test_module.py"]}, 1)
