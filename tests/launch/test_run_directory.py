"""What of an earlier try a stage keeps."""

from pathlib import Path

import pytest

from launch.compose import Override, compose_stage
from nexus_gen.specs.artifact import Manifest, seal
from nexus_gen.specs.errors import UserError
from train.schemas.fields import fingerprint_values, input_fingerprints
from train.schemas.run_directory import prepare, unchanged
from train.schemas.stages import StageConfig


def stage(runs: Path, *overrides: str) -> StageConfig:
    """A stage that reads rows.jsonl."""
    texts = ["stage=standins", f"runs_dir={runs}", f"data.train={runs / 'rows.jsonl'}", *overrides]
    return compose_stage([Override.parse(text) for text in texts])


def attempt(config: StageConfig) -> Path:
    """Start the stage and leave a checkpoint behind; returns its path."""
    prepare(config, again=False)
    checkpoint = config.run_dir / "checkpoints" / "step_1"
    checkpoint.touch()
    return checkpoint


def finish(config: StageConfig) -> None:
    config.artifact_dir.mkdir(exist_ok=True)
    inputs = input_fingerprints(config)
    seal(config.artifact_dir, Manifest(config.kind, config.stage, fingerprint_values(config), inputs, code={}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("one\n")
    return tmp_path


def test_checkpoints_of_an_unfinished_try_are_kept(runs: Path) -> None:
    checkpoint = attempt(stage(runs))
    prepare(stage(runs), again=False)
    assert checkpoint.exists()
    prepare(stage(runs, "resume=false"), again=False)
    assert not checkpoint.exists()


def test_checkpoints_of_a_finished_try_are_dropped(runs: Path) -> None:
    checkpoint = attempt(stage(runs))
    finish(stage(runs))
    assert unchanged(stage(runs))
    prepare(stage(runs, "seed=1"), again=False)
    assert not checkpoint.exists()


def test_an_unfinished_try_on_changed_inputs_is_kept_beside_the_artifact_of_the_former_ones(runs: Path) -> None:
    attempt(stage(runs))
    finish(stage(runs))
    (runs / "rows.jsonl").write_text("two\n")
    assert not unchanged(stage(runs))
    checkpoint = attempt(stage(runs))
    prepare(stage(runs), again=False)
    assert checkpoint.exists()


def test_an_unfinished_try_with_other_values_is_not_gone_on_from(runs: Path) -> None:
    attempt(stage(runs))
    with pytest.raises(UserError, match=r"belong to an unfinished try with another seed; .* resume=false"):
        prepare(stage(runs, "seed=1"), again=False)
