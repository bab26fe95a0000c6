"""What people type for a text or a path is what a stage gets, all the way through its recorded config."""

import random
import subprocess
from pathlib import Path

import pytest

from launch.ablate import compose_arms
from launch.compose import compose_stage
from launch.overrides import Override
from launch.run import compose_pipeline
from nexus_gen.parts.models import SHIPPED_RUN
from nexus_gen.specs.errors import UserError
from train.preflight.inputs import inputs_of, require_inputs
from train.runs.directory import load_config, prepare
from train.schemas.stage import StageConfig

NAMES = (
    *("中文", "my run", "a=b", "a,b", "c#d", "(x)", "[y]", "[x, y]", "{z}", "{a: 1}", "it's", '"', "a$b", "$$"),
    *("${name}", "a${b", "${", "a\\", "\\${x}", "\\\\${x}", "~", "~x", "a~b", "!", "a!b", "what?", "50%", "%j"),
    *("a&b", "a;b", "a@b", "*", "a|b", "a>b", "`a`", "x:y", " a", "a ", "a 'b'", "😀"),
    *(".hidden", "trailing.", "...", "-x", "--dry-run", "2024_11_27", "1.50", "1e5", "true", "null", "007", "1_000"),
    *("nan", ".inf", "0x10", "2024-11-27", "12:30:00", "no"),
)


def stage(*texts: str) -> StageConfig:
    return compose_stage([Override.parse(text) for text in texts])


@pytest.mark.parametrize("name", NAMES)
def test_names_and_paths_are_taken_as_typed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somebody")
    (tmp_path / name).mkdir()
    for file in ("rows.jsonl", "heldout.jsonl"):
        (tmp_path / name / file).touch()
    paths = [f"data.train=./{name}/rows.jsonl", f"data.heldout={tmp_path}/{name}/heldout.jsonl"]
    config = stage("stage=pretrain", f"name={name}", *paths)
    assert config.name == name
    assert config.run_dir == tmp_path / "runs" / name / "pretrain"
    assert inputs_of(config) == {
        "model.qwen": tmp_path / "runs" / name / "standins" / "artifact" / "Qwen2.5-VL-Instruct",
        "data.train": tmp_path / name / "rows.jsonl",
        "data.heldout": tmp_path / name / "heldout.jsonl",
    }
    prepare(config, {})
    assert load_config(config.run_dir) == config
    moved = config.run_dir.parent.rename(tmp_path / "runs" / "moved") / "pretrain"
    assert inputs_of(load_config(moved))["model.qwen"] == moved.parent / "standins" / "artifact" / "Qwen2.5-VL-Instruct"


def test_any_text_is_taken_as_typed() -> None:
    dice = random.Random(0)
    for _ in range(20):
        text = "".join(dice.choices("\\\\$${}}x'\",[]=~#&中.:? ", k=dice.randint(1, 9)))
        if text[0] == text[-1] and text[0] in "'\"":
            continue  # quoted in Hydra's grammar
        config = stage("stage=shapes", f"name=n{text}", f"runs_dir=/runs/{text}")
        assert (config.name, config.run_dir) == (f"n{text}", Path("/runs") / text / f"n{text}" / "shapes")


@pytest.mark.parametrize(
    ("value", "name"), [("'a,b'", "a,b"), ('"1.50"', "1.50"), (r"'it\'s'", "it's"), ("'${x}'", "${x}"), ("'", "'")]
)
def test_quotes_of_the_grammar_are_taken_off(value: str, name: str) -> None:
    assert stage("stage=shapes", f"name={value}").name == name


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/tmp/x", "a/../../b", "../x", "a\nb", "'..'"])
def test_a_name_does_not_leave_its_place(name: str) -> None:
    with pytest.raises(UserError, match="name is "):
        stage("stage=shapes", f"name={name}")


def test_home_is_expanded_at_the_start_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    config = stage("stage=pretrain", "runs_dir=~/runs", "data.train=~/a~b", "data.heldout=~nobody-of-that-name")
    assert config.run_dir == Path("/somebody/runs/tiny/pretrain")
    assert inputs_of(config)["data.train"] == Path("/somebody/a~b")
    assert inputs_of(config)["data.heldout"] == Path.cwd() / "~nobody-of-that-name"


@pytest.mark.parametrize(
    ("value", "paths"),
    [
        ("[]", []),
        ("[ ]", []),
        ("[a]", ["a"]),
        ("[1.50, 2024_11_27,true]", ["1.50", "2024_11_27", "true"]),
        ("[数据/a=b, (x) ,[y]/${z},it's]", ["数据/a=b", "(x)", "[y]/${z}", "it's"]),
        ("['a,b',\"c, d\",'e]']", ["a,b", "c, d", "e]"]),
        ("[~/x]", ["/somebody/x"]),
    ],
)
def test_lists_of_paths(value: str, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    config = stage("stage=pretrain", f"data.quarantine={value}")
    assert config.data.quarantine == [str(Path.cwd() / path) for path in paths]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "path", ["a.jsonl", "my rows", "a,b", "[y],z", "it's", '$HOME"`x`', "!a\\", " a", "中文", "a,${b}"]
)
def test_what_an_error_says_to_type_can_be_pasted(path: str) -> None:
    with pytest.raises(UserError) as caught:
        stage("stage=pretrain", f"data.quarantine={path}")
    pasted = str(caught.value).removeprefix("data.quarantine takes a list: data.quarantine=[A,B], here ")
    (word,) = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {pasted}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    assert stage("stage=pretrain", word).data.quarantine == [str(Path.cwd() / path)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data.quarantine=[a,,b]", "has a comma with nothing in front of it"),
        ("trainer.max_steps=a b(", r"cannot be read; trainer\.max_steps must be a whole number"),
        ("trainer.max_steps=1,2", "is a sweep"),
        ("pretrain.optim.betas=0.9,0.95", r"^optim\.betas takes a list: pretrain\.optim\.betas=\[0\.9,0\.95\]$"),
        ("trainer.max_steps=2.5", r"^trainer\.max_steps: Value '2\.5'"),
        ("trainer.max_steps=true", r"^trainer\.max_steps: Value 'True'"),
        ("trainer.max_steps=nan", r"^trainer\.max_steps: Value 'nan'"),
        ("optim.learning_rate=inf", r"^optim\.learning_rate is inf; it must be a finite number$"),
        ("optim.learning_rate='nan'", r"^optim\.learning_rate is nan; it must be a finite number$"),
        ("optim.betas=[0.9,nan]", r"^optim\.betas is nan; it must be a finite number$"),
        ("data.trian=/数据/(x)", r"no key 'data\.trian'; did you mean 'data\.train'\?"),
        ("(x)=3", r"no key '\(x\)'"),
        ("=3", "'=3' is not key=value"),
        ("数据", "'数据' is not key=value"),
        ("optim=中文", "there is no optim=中文; valid: adamw, "),
        ("pretrian.trainer.max_steps=3", r"'pretrian\.trainer\.max_steps=3': there is no stage pretrian here"),
        ("pretrain.trainer.max_step=3", r"no key 'trainer\.max_step'; did you mean 'trainer\.max_steps'\?"),
        ("embed_editing.seed=3", "is for stage=embed_editing, and this is stage=pretrain"),
    ],
)
def test_what_cannot_be_taken_is_told_by_its_key(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        stage("stage=pretrain", text)


def test_numbers_as_people_write_them() -> None:
    texts = ("trainer.max_steps=2e3", "optim.warmup_steps=1_0", "optim.learning_rate=1e-1", "pretrain.seed=7")
    values = stage("stage=pretrain", *texts).__dict__
    assert (values["trainer"].max_steps, type(values["trainer"].max_steps)) == (2000, int)
    assert (values["optim"].warmup_steps, values["optim"].learning_rate, values["seed"]) == (10, 0.1, 7)


def test_a_pipeline_takes_them_for_all_stages_and_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("c,d", "[y]", "${e}"):
        (tmp_path / file).touch()
    typed = [f"name={NAMES[14]}", "runs_dir=/a=b", "data.train=c,d", "data.heldout=[y]", "pretrain.data.train=${e}"]
    configs = {config.stage: config for config in compose_pipeline("tiny_messages", list(map(Override.parse, typed)))}
    assert inputs_of(configs["pretrain"])["data.train"] == tmp_path / "${e}"
    assert inputs_of(configs["embed_editing"])["data.train"] == tmp_path / "c,d"
    where = inputs_of(configs["editing_decoder"])["init.transformer"]  # ${runs_dir} and ${name} of configs/ are meant
    assert where == Path("/a=b") / NAMES[14] / "generation_decoder" / "artifact"


@pytest.mark.parametrize("name", ["x [1]", "[a-b]", "what?", "*", "**", "[0-9]*.jsonl"])
def test_a_pipeline_begins_under_a_name_that_looks_like_a_pattern(name: str, tmp_path: Path) -> None:
    """What its later stages read is not there yet; it is no pattern without files either."""
    given = [Override.parse(text) for text in (f"name={name}", f"runs_dir={tmp_path}")]
    inputs = [inputs_of(config) for config in compose_pipeline("tiny", given)]
    rows = {where for stage in inputs for role, where in stage.items() if role == "data.train"}
    assert rows == {tmp_path / name / "shapes" / "artifact" / "train.jsonl"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("pretrian.trainer.max_steps=3", "there is no stage pretrian here; did you mean 'pretrain'"),
        ("shapes.shapes.num_train=3", "there is no stage shapes here; valid: "),
        ("pretrain.trainer.max_step=3", r"stage=pretrain has no key 'trainer\.max_step'; did you mean"),
        ("trainer.max_step=3", r"no stage of pipeline=finetune has the key 'trainer\.max_step'; did you mean"),
    ],
)
def test_a_pipeline_knows_its_stages(text: str, sentence: str) -> None:
    given = [Override.parse(word) for word in ("data.train=a", "data.heldout=b", text)]
    with pytest.raises(UserError, match=sentence):
        compose_pipeline("finetune", given)


@pytest.mark.parametrize("name", ["a=b, [c]", "${run}", "it's"])
def test_arms_start_from_a_run_of_any_name(name: str, tmp_path: Path) -> None:
    arms = compose_arms("reference", tmp_path / name, tmp_path / "a,b", [42], [])
    assert {inputs_of(arm.configs[0])["shards"] for arm in arms} == {tmp_path / name / "embed_editing" / "artifact"}
    assert [arm.configs[0].run_dir.parents[1] for arm in arms] == [
        tmp_path / "a,b" / "reference" / arm.name for arm in arms
    ]


def test_weights_that_ship_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [Override.parse(text) for text in ("data.train=rows.jsonl", "data.heldout=../h.jsonl")]
    configs = {config.stage: inputs_of(config) for config in compose_pipeline("finetune", given)}
    assert configs["pretrain"]["model.qwen"] == SHIPPED_RUN / "pretrain" / "artifact"
    assert configs["editing_decoder"]["init.decoder"] == SHIPPED_RUN / "editing_decoder" / "artifact"
    assert configs["embed_editing"]["model.flux"] == SHIPPED_RUN / "standins" / "artifact" / "FLUX.1-dev"
    assert configs["pretrain"]["data.train"] == tmp_path / "rows.jsonl"
    full = compose_stage([Override.parse(text) for text in ("stage=pretrain", "model=nexus_gen_7b")])
    assert inputs_of(full)["model.qwen"] == tmp_path / "models" / "Qwen2.5-VL-7B-Instruct"
    with pytest.raises(UserError, match=rf"{tmp_path}/models.* which begins where the command was started"):
        require_inputs(full, inputs_of(full))
