"""What of an earlier try a stage keeps."""

import json
from pathlib import Path

import pytest

from data.doctor.command import main as check
from launch.compose import Override, compose_stage
from nexus_gen.artifacts.artifact import Manifest, seal
from nexus_gen.specs.errors import UserError
from train.preflight.inputs import inputs_of
from train.preflight.stage import preflight
from train.runs import directory as run_directory
from train.runs.directory import identity, load_config, made_by, request_another, timing_of, with_added
from train.schemas.stage import StageConfig


def stage(runs: Path, *overrides: str) -> StageConfig:
    """A stage that reads rows.jsonl."""
    texts = ["stage=standins", f"runs_dir={runs}", f"data.train={runs / 'rows.jsonl'}", *overrides]
    return compose_stage([Override.parse(text) for text in texts])


def prepare(config: StageConfig) -> Path:
    return run_directory.prepare(config, identity(config))


def unchanged(config: StageConfig) -> bool:
    return made_by(config, identity(config))


def attempt(config: StageConfig) -> Path:
    """Start the stage and leave a checkpoint behind; returns its path."""
    prepare(config)
    checkpoint = config.run_dir / "checkpoints" / "step_1"
    checkpoint.touch()
    return checkpoint


def finish(config: StageConfig) -> None:
    config.artifact_dir.mkdir(exist_ok=True)
    seal(config.artifact_dir, Manifest(config.kind, config.stage, **identity(config), code={}))


def test_a_mixture_changes_with_the_files_that_it_names(runs: Path) -> None:
    (runs / "mixture.yaml").write_text("sources: [{path: rows.jsonl}]\n")
    config = stage(runs, f"data.train={runs / 'mixture.yaml'}")
    attempt(config)
    finish(config)
    assert unchanged(config)
    (runs / "rows.jsonl").write_text("two\n")
    assert not unchanged(config)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("one\n")
    return tmp_path


def test_what_an_earlier_version_made_is_unchanged_by_keys_that_it_lacked(runs: Path) -> None:
    def forget_the_key(recorded: Path) -> None:
        values = json.loads(recorded.read_text(encoding="utf-8"))
        del values["config"]["model"]["num_target_tokens"]
        recorded.write_text(json.dumps(values), encoding="utf-8")

    config = stage(runs)
    checkpoint = attempt(config)
    forget_the_key(config.run_dir / "checkpoints" / "identity.json")
    prepare(config)
    assert checkpoint.exists()
    finish(config)
    forget_the_key(config.artifact_dir / "manifest.json")
    assert unchanged(config) and not unchanged(stage(runs, "model.num_target_tokens=49"))


def test_a_section_of_an_earlier_version_may_be_empty() -> None:
    completed = with_added({"model": {}, "data": None}, {"model.num_target_tokens", "data.token_budget"})
    assert completed == {"model": {"num_target_tokens": 81}, "data": None}


def test_checkpoints_of_an_unfinished_try_are_kept(runs: Path) -> None:
    checkpoint = attempt(stage(runs))
    prepare(stage(runs))
    assert checkpoint.exists()
    prepare(stage(runs, "resume=false"))
    assert not checkpoint.exists()


@pytest.mark.parametrize("content", ["", '{"config": ', "[]", "{}", '{"config": 3}', "\0" * 40, None])
def test_checkpoints_of_which_nobody_knows_what_they_belong_to_are_kept_and_not_used(
    runs: Path, content: str | None
) -> None:
    checkpoint = attempt(stage(runs))
    identity = checkpoint.parent / "identity.json"
    identity.unlink() if content is None else identity.write_text(content)
    with pytest.raises(UserError, match=r"identity\.json is missing or damaged.*resume=false"):
        prepare(stage(runs))
    assert checkpoint.exists()
    prepare(stage(runs, "resume=false"))
    assert not checkpoint.exists()


def test_a_record_of_times_that_a_full_disk_cut_short_is_read_without_its_end(tmp_path: Path) -> None:
    (tmp_path / "timing.jsonl").write_text('{"seconds": 2.0, "processes": 1}\n{"seconds": 3.0, "proc')
    assert timing_of(tmp_path) == (2.0, 1)


def test_checkpoints_of_a_finished_try_are_dropped(runs: Path) -> None:
    checkpoint = attempt(stage(runs))
    finish(stage(runs))
    assert unchanged(stage(runs))
    prepare(stage(runs, "seed=1"))
    assert not checkpoint.exists()


def test_an_unfinished_try_on_changed_inputs_is_kept_beside_the_artifact_of_the_former_ones(runs: Path) -> None:
    attempt(stage(runs))
    finish(stage(runs))
    (runs / "rows.jsonl").write_text("two\n")
    assert not unchanged(stage(runs))
    checkpoint = attempt(stage(runs))
    prepare(stage(runs))
    assert checkpoint.exists()


def test_an_unfinished_try_with_other_values_is_not_gone_on_from(runs: Path) -> None:
    attempt(stage(runs))
    with pytest.raises(UserError, match=r"belong to an unfinished try with another seed; .* resume=false"):
        prepare(stage(runs, "seed=1"))


def test_a_requested_try_is_gone_on_from_until_its_artifact_is_there(runs: Path) -> None:
    finished = attempt(stage(runs))
    finish(stage(runs))
    timing = stage(runs).run_dir / "timing.jsonl"
    timing.write_text('{"seconds": 2.5, "processes": 1}\n{"seconds": 1.5, "processes": 2}\n', encoding="utf-8")
    assert timing_of(timing.parent) == (4, 2)
    request_another(stage(runs))
    assert not unchanged(stage(runs)) and not finished.exists()
    assert timing_of(timing.parent) == (0, 0)
    checkpoint = attempt(stage(runs))
    prepare(stage(runs))
    assert checkpoint.exists()
    finish(stage(runs))
    assert unchanged(stage(runs))
    prepare(stage(runs, "seed=1"))
    assert not checkpoint.exists()


def test_a_request_keeps_the_checkpoints_of_an_unfinished_try(runs: Path) -> None:
    checkpoint = attempt(stage(runs))
    request_another(stage(runs))
    prepare(stage(runs))
    assert checkpoint.exists()


def test_quarantine_files_count_by_content_and_follow_their_run(runs: Path) -> None:
    inside, outside = runs / "tiny" / "pretrain" / "quarantine" / "rank0.jsonl", runs / "quarantine.jsonl"
    for path in (inside, outside):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    config = stage(runs, f"data.quarantine=[{inside.parent},{outside}]")
    assert "quarantine" not in str(identity(stage(runs))) and not unchanged(config)
    attempt(config)
    finish(config)
    assert unchanged(config)
    inside.write_text("\n")
    assert not unchanged(config)
    (runs / "tiny").rename(runs / "moved")
    moved = inputs_of(load_config(runs / "moved" / "standins"))
    assert moved["data.quarantine[0]"] == runs / "moved" / "pretrain" / "quarantine"
    assert moved["data.quarantine[1]"] == outside


def test_quarantine_files_are_held_against_the_dataset_first(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    (runs / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name in ("rows", "heldout"):
        (runs / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n{\n")
    quarantine, own = runs / "quarantine.jsonl", runs / "tiny" / "pretrain" / "quarantine"
    (runs / "other.jsonl").write_text("{\n")
    files = [*(str(runs / f"{name}.jsonl") for name in ("rows", "heldout", "other")), "--quarantine", str(quarantine)]
    assert check(["check", *files, "--num-workers", "1"]) == 2

    def pretrain(*quarantine: Path) -> StageConfig:
        paths = [f"data.heldout={runs / 'heldout.jsonl'}", f"model.qwen={runs}"]
        files = ",".join(map(str, quarantine))
        return stage(runs, "stage=pretrain", *paths, "data.max_bad_fraction=0", f"data.quarantine=[{files}]")

    with pytest.raises(UserError, match=r"rows\.jsonl:2: not JSON"):
        preflight(pretrain())
    preflight(pretrain(quarantine))
    assert [record.getMessage() for record in caplog.records] == [
        f"data.quarantine names {runs / 'other.jsonl'}, which is in neither data.train nor data.heldout (rows: 1)"
    ]
    own.mkdir(parents=True)
    with pytest.raises(UserError, match="is written by this stage itself; give a copy"):
        preflight(pretrain(own))
    quarantine.write_text(quarantine.read_text().replace("rows.jsonl", "a.jsonl").replace("heldout.jsonl", "b.jsonl"))
    with pytest.raises(UserError, match=r"names rows of .*a\.jsonl, .*, and of no file of data.train and data.heldout"):
        preflight(pretrain(quarantine))


def test_what_is_no_recorded_config_is_refused(runs: Path) -> None:
    for text in ("", "a: [1\n b", "stage: [1]", "{stage: pretrian, name: tiny, runs_dir: runs}"):
        (runs / "config.yaml").write_text(text)
        with pytest.raises(UserError, match="is not the config of a stage; run the stage again"):
            load_config(runs)


def test_a_recorded_config_follows_its_run(runs: Path) -> None:
    inside = stage(runs).run_dir.parent / "shapes" / "artifact" / "train.jsonl"
    inside.parent.mkdir(parents=True)
    inside.touch()
    path = prepare(stage(runs, f"data.train={inside}"))
    (runs / "tiny").rename(runs / "moved")
    config = load_config(runs / "moved" / path.parent.name)
    assert inputs_of(config) == {"data.train": runs / "moved" / "shapes" / "artifact" / "train.jsonl"}
    assert config.run_dir == runs / "moved" / "standins"
    outside = prepare(stage(runs))
    assert inputs_of(load_config(outside.parent)) == {"data.train": runs / "rows.jsonl"}
