"""A training stage whose length alone has changed, and `more=2x`: where it resumes, and what it reports."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch import run
from launch.completion import candidates
from launch.compose import compose_stage
from launch.longer import (
    base_of,
    forget_fulfilled,
    lengthened,
    read_more,
    record_request,
    recorded_stage,
    with_length,
)
from launch.overrides import Override
from nexus_gen.artifacts.artifact import Manifest, seal
from nexus_gen.specs.errors import UserError
from train.runs.directory import beginning, identity, prepare, request_another
from train.runs.lengths import length, read_history
from train.schemas.stage import StageConfig

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for split in ("train", "heldout"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return tmp_path


def given(place: Path, *texts: str) -> list[str]:
    paths = [f"data.train={place / 'train.jsonl'}", f"data.heldout={place / 'heldout.jsonl'}"]
    return [f"runs_dir={place / 'runs'}", "name=mine", *paths, f"model.qwen={place / 'qwen'}", *texts]


def pretrain(place: Path, *texts: str) -> StageConfig:
    return compose_stage(list(map(Override.parse, ["stage=pretrain", *given(place), *texts])))


def shards_of(place: Path, model: str, num_samples: int = 20, rows: str = "rows") -> None:
    """Shards as an embedding stage writes them, but for the shards."""
    details = {"splits": {"train": [{"file": "train/000000.tar", "samples": num_samples}]}}
    directory = place / "runs" / "mine" / "embed_generation" / "artifact"
    directory.mkdir(parents=True, exist_ok=True)
    inputs = {"embed.autoregressive": model, "data.train": rows, "pictures.train": "pictures"}
    seal(directory, Manifest("embedding_shards", "embed_generation", {"seed": 1}, inputs, {}, details))


def decoder(place: Path, *texts: str) -> StageConfig:
    (place / "flux").mkdir(exist_ok=True)
    own = [f"runs_dir={place / 'runs'}", "name=mine", f"model.flux={place / 'flux'}", *texts]
    return compose_stage(list(map(Override.parse, ["stage=generation_decoder", *own])))


def train(config: StageConfig, step: int, finished: bool = True, tokens: int = 0, more: bool = False) -> Path:
    """Do as a stage does up to a step; returns its checkpoint."""
    prepare(config, identity(config), more)
    name = f"checkpoint-{step}" if config.stage == "pretrain" else f"step_{step:08d}"
    checkpoint = config.run_dir / "checkpoints" / name
    checkpoint.mkdir()
    (checkpoint / "complete").touch()
    state = {"stateful_callbacks": {"StepMetrics": {"attributes": {"tokens_seen": tokens}}}}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    if finished:
        config.artifact_dir.mkdir(exist_ok=True)
        seal(config.artifact_dir, Manifest(config.kind, config.stage, **identity(config), code={}))
    return checkpoint


def said(config: StageConfig, more: bool = False) -> tuple[bool, str]:
    begins = beginning(config, identity(config), more)
    return begins.resumes, begins.said


# ---- the length alone has changed -------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_a_longer_stage_goes_on_from_its_last_checkpoint(place: Path, finished: bool) -> None:
    checkpoint = train(pretrain(place, "trainer.max_steps=700"), 700 if finished else 300, finished)
    longer = pretrain(place, "trainer.max_steps=1400")
    step = 700 if finished else 300
    sentence = f"pretrain: continues from step {step} of 700 to 1400; learning rate re-planned"
    assert said(longer) == (True, sentence)
    prepare(longer, identity(longer))
    assert checkpoint.exists()
    assert read_history(checkpoint.parent) == {"continued": [{"step": step, "was": {"trainer.max_steps": 700}}]}
    assert said(longer) == (True, "")  # after an interruption it is a try like any other
    prepare(longer, identity(longer))
    assert len(read_history(checkpoint.parent)["continued"]) == 1


def test_a_rate_that_does_not_follow_the_length_is_not_planned_anew(place: Path) -> None:
    train(pretrain(place, "trainer.max_steps=7", "optim.schedule=constant"), 7)
    assert said(pretrain(place, "trainer.max_steps=9", "optim.schedule=constant")) == (
        True,
        "pretrain: continues from step 7 of 7 to 9",
    )


def test_epochs_and_tokens_are_lengths_too(place: Path) -> None:
    by_epochs = ("trainer.max_steps=0", "data.num_epochs=2")
    train(pretrain(place, *by_epochs), 50)
    assert "from step 50 of 2 epochs to 3.5 epochs" in said(pretrain(place, by_epochs[0], "data.num_epochs=3.5"))[1]
    assert "from step 50 of 2 epochs to 80; learning" in said(pretrain(place, "trainer.max_steps=80"))[1]
    shutil.rmtree(place / "runs")
    by_tokens = ("trainer.max_steps=0", "data.token_budget=1000")
    train(pretrain(place, *by_tokens), 50, tokens=1020)
    assert "of 1000 tokens to 2000 tokens" in said(pretrain(place, by_tokens[0], "data.token_budget=2000"))[1]
    with pytest.raises(UserError, match=r"pretrain: data.token_budget is 900 and 1020 tokens are done; give more"):
        said(pretrain(place, by_tokens[0], "data.token_budget=900"))


def test_an_unfinished_stage_may_become_shorter_but_not_than_what_is_done(place: Path) -> None:
    train(pretrain(place, "trainer.max_steps=700"), 300, finished=False)
    assert "continues from step 300 of 700 to 500" in said(pretrain(place, "trainer.max_steps=500"))[1]
    assert "continues from step 300 of 700 to 300" in said(pretrain(place, "trainer.max_steps=300"))[1]
    with pytest.raises(UserError, match=r"trainer.max_steps is 299 and 300 steps are done; .*resume=false to start"):
        said(pretrain(place, "trainer.max_steps=299"))
    assert said(pretrain(place, "trainer.max_steps=299", "resume=false")) == (False, "")


def test_what_was_deleted_is_not_gone_on_from_and_that_is_said_first(place: Path) -> None:
    checkpoint = train(pretrain(place, "trainer.max_steps=700"), 700)
    shutil.rmtree(checkpoint)
    longer = pretrain(place, "trainer.max_steps=1400")
    sentence = "pretrain: starts over with 1400 steps, because its checkpoints are gone"
    assert said(longer) == (False, sentence)
    shutil.rmtree(checkpoint.parent)
    assert said(longer) == (False, sentence)
    with pytest.raises(UserError, match=r"trainer.max_steps is 300 and 700 steps are done"):
        said(pretrain(place, "trainer.max_steps=300"))
    assert said(pretrain(place, "trainer.max_steps=300", "resume=false")) == (False, "")


def test_a_finished_stage_starts_over_when_more_than_its_length_has_changed(place: Path) -> None:
    checkpoint = train(pretrain(place, "trainer.max_steps=700"), 700)
    other = pretrain(place, "trainer.max_steps=1400", "optim.learning_rate=0.1")
    assert said(other) == (False, "pretrain: starts over with 1400 steps, because optim.learning_rate changed")
    with pytest.raises(UserError, match=r"more=\.\.\. continues what was trained, and there optim.* differed"):
        said(other, more=True)
    prepare(other, identity(other))
    assert not checkpoint.exists()


def test_from_makes_a_longer_artifact_from_the_start(place: Path) -> None:
    checkpoint = train(pretrain(place, "trainer.max_steps=700"), 700)
    longer = pretrain(place, "trainer.max_steps=1400")
    request_another(longer)
    assert not checkpoint.exists() and said(longer) == (True, "")


def test_a_decoder_goes_on_where_its_rows_are_the_same_and_more_is_asked_for(place: Path) -> None:
    shards_of(place, "before")
    checkpoint = train(decoder(place, "trainer.max_steps=60"), 60)
    shards_of(place, "after")
    longer = decoder(place, "trainer.max_steps=120")
    over = "generation_decoder: starts over with 120 steps, because inputs.shards changed"
    assert said(longer) == (False, over)
    sentence = "continues from step 60 of 60 to 120 on new embeddings of the same rows; learning rate re-planned"
    assert said(longer, more=True) == (True, f"generation_decoder: {sentence}")
    for changed in ({"num_samples": 21}, {"rows": "other rows"}):
        shards_of(place, "after", **changed)  # type: ignore[arg-type]
        assert said(longer, more=True) == (False, over)
    shards_of(place, "after")
    before = beginning(longer, identity(longer), more=True).was["inputs.shards"]
    prepare(longer, identity(longer), more=True)
    (entry,) = read_history(checkpoint.parent)["continued"]
    assert entry == {"step": 60, "was": {"trainer.max_steps": 60, "inputs.shards": before}}
    assert said(longer) == said(longer, more=True) == (True, "")


# ---- more=2x ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "factors"),
    [
        (["more=2x"], {"pretrain": 2.0, "generation_decoder": 2.0}),
        (["generation_decoder.more=1.5x"], {"generation_decoder": 1.5}),
        (["more=2x", "pretrain.more=3x"], {"pretrain": 3.0, "generation_decoder": 2.0}),
        ([], {}),
    ],
)
def test_a_factor_is_for_all_training_stages_or_for_one(texts: list[str], factors: dict[str, float]) -> None:
    assert read_more(texts, ["shapes", "pretrain", "embed_generation", "generation_decoder"]) == factors


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("more=2", "more is how many times as long, above 1, as in more=2x"),
        ("more=1x", "above 1"),
        ("more=0.5x", "above 1"),
        ("more=infx", "as in more=2x or more=1.5x"),
        ("more=twice", "as in more=2x or more=1.5x"),
        ("pretrian.more=2x", "there is no training stage pretrian here; did you mean 'pretrain'"),
        ("embed_generation.more=2x", "there is no training stage embed_generation here"),
    ],
)
def test_what_is_no_factor_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_more([text], ["pretrain", "embed_generation"])


def test_a_stage_that_does_not_train_has_no_length() -> None:
    with pytest.raises(UserError, match="is for stages that train: pretrain, generation_decoder, editing_decoder"):
        read_more(["more=2x"], ["shapes"])


def test_steps_and_tokens_are_rounded_up_and_epochs_are_not(place: Path) -> None:
    for key, before, factor, after in (
        ("trainer.max_steps", 25, 1.5, 38),
        ("trainer.max_steps", 700, 2, 1400),
        ("data.token_budget", 1001, 1.5, 1502),
        ("data.num_epochs", 2.5, 1.5, 3.75),
    ):
        rest = [f"{other}=0" for other in ("trainer.max_steps", "data.num_epochs", "data.token_budget") if other != key]
        config = lengthened(pretrain(place, *rest, f"{key}={before}"), factor)
        assert length(dataclasses.asdict(config)) == (key, after)


def recorded(place: Path, texts: list[str], factor: float = 2) -> Any:
    own = [f"runs_dir={place / 'runs'}", "name=mine", *texts]
    overrides = list(map(Override.parse, ["stage=pretrain", *own]))
    return recorded_stage(overrides, overrides[1:], {"pretrain": factor} if factor else {})


def test_the_recorded_config_is_what_trains_on_whatever_the_command_says(place: Path) -> None:
    train(pretrain(place, "trainer.max_steps=7", "optim.learning_rate=0.25", "resume=false"), 7)
    assert recorded(place, []) == pretrain(place, "trainer.max_steps=14", "optim.learning_rate=0.25")
    assert recorded(place, [], factor=0).trainer.max_steps == 7
    one_process = ["launch.num_nodes=1", "launch.processes_per_node=1"]
    typed = recorded(place, [*one_process, "launch=slurm", "launch.partition=a,b", "trainer.num_workers=3"])
    assert (typed.launch.kind, typed.launch.num_nodes, typed.trainer.num_workers) == ("slurm", 1, 3)
    assert (typed.launch.partition, typed.launch.timeout_minutes) == ("a,b", 2880)
    moved = (place / "heldout.jsonl").rename(place / "held ${out}.jsonl")
    assert recorded(place, [f"data.heldout={moved}"]).data.heldout == str(moved)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "trainer.max_steps=100",
            "'trainer.max_steps=100' says how long pretrain trains, .* give one of them",
        ),
        ("data.num_epochs=3", "says how long pretrain trains"),
        ("resume=false", "resume=false starts pretrain over, and more=... trains on"),
        ("optim=adamw", "'optim=adamw' chooses a file of configs/, .* give the keys that should differ"),
        ("shards=x", "stage=pretrain has no key 'shards'"),
    ],
)
def test_what_contradicts_it_is_refused(place: Path, text: str, sentence: str) -> None:
    train(pretrain(place, "trainer.max_steps=7"), 7)
    with pytest.raises(UserError, match=sentence):
        recorded(place, [text])


def test_a_run_that_has_recorded_nothing_cannot_train_on(place: Path) -> None:
    with pytest.raises(UserError, match=r"mine/pretrain is not the directory of a stage .* without more=... first"):
        recorded(place, [])


def test_an_interrupted_request_is_not_multiplied_again_and_a_fulfilled_one_is(place: Path) -> None:
    train(pretrain(place, "trainer.max_steps=7"), 7)
    directory = place / "runs" / "mine"

    def ask(factor: float = 2) -> StageConfig:
        config = recorded(place, [], factor)
        record_request([config], {"pretrain": factor})
        return config

    first = ask()
    assert ask().trainer.max_steps == 14  # type: ignore[attr-defined]  # killed before it began
    train(first, 9, finished=False)
    assert first.trainer.max_steps == ask().trainer.max_steps == 14  # type: ignore[attr-defined]
    assert ask(3).trainer.max_steps == 21  # type: ignore[attr-defined]  # of the 7, too
    train(ask(), 14)
    forget_fulfilled(directory)
    assert not (directory / "more.json").exists()
    assert ask().trainer.max_steps == 28  # type: ignore[attr-defined]


def test_a_request_for_several_stages_is_under_way_until_the_last_is_there(place: Path) -> None:
    shards_of(place, "before")
    configs = [pretrain(place, "trainer.max_steps=7"), decoder(place, "trainer.max_steps=5")]
    for config, step in zip(configs, (7, 5), strict=True):
        train(config, step)
    longer = [lengthened(config, 2) for config in configs]
    record_request(longer, {"pretrain": 2, "generation_decoder": 2})
    train(longer[0], 14)
    forget_fulfilled(place / "runs" / "mine")
    assert recorded(place, []).trainer.max_steps == 14  # it has them
    train(longer[1], 10)
    assert recorded(place, []).trainer.max_steps == 28


def test_a_request_that_was_overtaken_by_another_length_counts_no_more(place: Path) -> None:
    train(pretrain(place, "trainer.max_steps=7"), 7)
    record_request([recorded(place, [])], {"pretrain": 2})
    train(pretrain(place, "trainer.max_steps=10"), 10)
    assert length(dataclasses.asdict(base_of(pretrain(place, "trainer.max_steps=10")))) == ("trainer.max_steps", 10)
    assert recorded(place, []).trainer.max_steps == 20


def test_a_dry_run_tells_the_length_and_changes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(pretrain(place, "trainer.max_steps=7"), 7)
    words = ["run", "stage=pretrain", f"runs_dir={place / 'runs'}", "name=mine", "more=2x"]
    before = sorted(path.name for path in (place / "runs" / "mine").rglob("*"))
    assert run.main([*words, "--dry-run"]) == 0
    assert "  training: 14 steps, of which the first 7 steps are done, ZeRO-" in capsys.readouterr().out
    assert run.main([*words, "--cfg"]) == 0
    assert "max_steps: 14" in capsys.readouterr().out
    assert sorted(path.name for path in (place / "runs" / "mine").rglob("*")) == before


def test_a_pipeline_takes_it_without_the_rows_that_it_was_started_with(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"runs_dir={place / 'runs'}", "name=mine"]
    pictures = {"generation": (["a.png"], "Draw."), "editing": (["a.png", "a.png"], "<image> Again.")}
    for images, user in pictures.values():
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": "<image>"}]
        with open(place / "train.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"source": "own", "images": images, "messages": messages}) + "\n")
    (place / "a.png").write_bytes(b"")  # named, and not opened here
    configs = run.compose_pipeline("finetune", list(map(Override.parse, [*given(place)[:4]])))
    for config in configs:
        config.run_dir.mkdir(parents=True)
        prepare(config, {"config": {}, "inputs": {}}) if not config.trains else train_nothing(config)
    assert run.main(["run", "pipeline=finetune", *words, "generation_decoder.more=1.5x", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    lengths = [line.split()[1] for line in printed.splitlines() if line.startswith("  training: ")]
    assert lengths == ["700", "90", "40"]
    rows = (place / "train.jsonl").read_text().splitlines()
    (place / "train.jsonl").write_text("\n".join(rows[:-1]) + "\n")  # the one of an edit is gone
    assert run.main(["run", "pipeline=finetune", *words, "generation_decoder.more=1.5x", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "train.jsonl holds no editing rows: left out are embed_editing, editing_decoder" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("  training: ")] == ["700", "90"]
    with pytest.raises(UserError, match=r"from=\.\.\. makes an artifact again, and more=\.\.\. trains on from it"):
        run.main(["run", "pipeline=finetune", *words, "more=2x", "from=pretrain"])


def train_nothing(config: StageConfig) -> None:
    from train.schemas.fields import as_yaml

    (config.run_dir / "config.yaml").write_text(as_yaml(config), encoding="utf-8")


def test_the_length_of_any_key_can_be_set(place: Path) -> None:
    config = with_length(pretrain(place, "trainer.max_steps=7"), "trainer.max_steps", 9)
    assert config == pretrain(place, "trainer.max_steps=9")


def test_completion_knows_it() -> None:
    assert "more=" in candidates("nexus-gen run pipeline=finetune mo")
    assert candidates("nexus-gen run pipeline=finetune generation_decoder.mor") == ["generation_decoder.more="]
    assert candidates("nexus-gen run pipeline=finetune pretrain.more=") == ["pretrain.more=2x "]
    assert "embed_generation.more=" not in candidates("nexus-gen run pipeline=finetune embed_generation.mo")
