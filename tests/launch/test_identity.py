"""What is unchanged is unchanged in content: all that a stage reads counts, and what earlier versions recorded too."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.compose import Override, compose_stage
from launch.run import run_stage
from nexus_gen.artifacts.artifact import Manifest, digest, hash_file, seal
from nexus_gen.parts.models import SHIPPED_RUN
from nexus_gen.specs.errors import UserError
from train.preflight.inputs import inputs_of
from train.preflight.rehearsal import knows_shipped_rows
from train.preflight.rows import preflight_rows
from train.preflight.stage import preflight
from train.runs.directory import identity, made_by, prepare
from train.schemas.stage import StageConfig

BIG = 5 << 20  # bytes; earlier versions looked at 1 MiB of either end


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Rows with a picture each, and a model of one large file."""
    for split in ("train", "heldout"):
        rows = []
        for number in range(3):
            write_picture(tmp_path / f"{split}{number}.png", number)
            turns = [{"role": "user", "content": "<image> What is it?"}, {"role": "assistant", "content": "A square."}]
            rows.append({"images": [f"{split}{number}.png"], "messages": turns})
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "weights.bin").write_bytes(bytes(BIG))
    (tmp_path / "qwen" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    return tmp_path


def write_picture(path: Path, number: int) -> None:
    """What no decoder has to understand: nobody may decode pictures to ask whether they changed."""
    path.write_bytes(b"picture" + bytes([number]) * 100)


def stage(place: Path, name: str = "pretrain", *overrides: str) -> StageConfig:
    paths = [f"data.train={place / 'train.jsonl'}"]
    if name == "pretrain":
        paths += [f"data.heldout={place / 'heldout.jsonl'}", f"model.qwen={place / 'qwen'}"]
    texts = [f"stage={name}", f"runs_dir={place / 'runs'}", *paths, *overrides]
    return compose_stage([Override.parse(text) for text in texts])


def attempt(config: StageConfig) -> Path:
    prepare(config, identity(config))
    checkpoint = config.run_dir / "checkpoints" / "step_1"
    checkpoint.touch()
    return checkpoint


def finish(config: StageConfig, recorded: dict[str, Any] | None = None) -> None:
    config.artifact_dir.mkdir(parents=True, exist_ok=True)
    (config.artifact_dir / "weights").write_text("trained")
    seal(config.artifact_dir, Manifest(config.kind, config.stage, **(recorded or identity(config)), code={}))


def unchanged(config: StageConfig) -> bool:
    return made_by(config, identity(config))


def repaint(path: Path) -> None:
    """Other pixels, with size and time as they were."""
    facts = path.stat()
    write_picture(path.with_suffix(".new"), 99)
    os.utime(path.with_suffix(".new"), ns=(facts.st_atime_ns, facts.st_mtime_ns))
    os.replace(path.with_suffix(".new"), path)
    assert path.stat().st_mtime_ns == facts.st_mtime_ns and path.stat().st_size == facts.st_size


@pytest.mark.parametrize(
    ("name", "picture"), [("pretrain", "train1.png"), ("pretrain", "heldout2.png"), ("standins", "train0.png")]
)
def test_another_picture_under_the_same_name_is_a_change(name: str, picture: str, place: Path) -> None:
    attempt(stage(place, name))
    finish(stage(place, name))
    os.utime(place / picture)  # touched
    assert unchanged(stage(place, name))
    repaint(place / picture)
    assert not unchanged(stage(place, name))


def test_a_try_is_not_resumed_with_other_pictures(place: Path) -> None:
    checkpoint = attempt(stage(place))
    repaint(place / "train1.png")
    with pytest.raises(UserError, match=r"another inputs\.pictures\.train \(pictures that changed: 1, .*train1\.png\)"):
        attempt(stage(place))
    write_picture(place / "train1.png", 1)
    attempt(stage(place))
    assert checkpoint.exists()


def test_pictures_of_rows_that_are_left_out_do_not_count(place: Path) -> None:
    from data.doctor.command import main as check

    (place / "train.jsonl").write_text((place / "train.jsonl").read_text().replace("A square.", "<image>", 1))
    quarantine = place / "quarantine.jsonl"
    files = [str(place / "train.jsonl"), "--images", "exists", "--quarantine", str(quarantine), "--num-workers", "1"]
    assert check(["check", *files]) == 2
    before = identity(stage(place, "pretrain", f"data.quarantine=[{quarantine}]"))
    repaint(place / "train0.png")
    assert identity(stage(place, "pretrain", f"data.quarantine=[{quarantine}]")) == before
    repaint(place / "train1.png")
    assert identity(stage(place, "pretrain", f"data.quarantine=[{quarantine}]")) != before


def test_the_middle_of_a_large_file_counts(place: Path) -> None:
    before = identity(stage(place))
    with open(place / "qwen" / "weights.bin", "r+b") as file:
        file.seek(BIG // 2)
        file.write(b"x")
    after = identity(stage(place))
    assert [role for role in before["inputs"] if before["inputs"][role] != after["inputs"][role]] == ["model.qwen"]


def test_a_second_look_reads_no_picture_and_no_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus_gen.artifacts.content.SETTLED_NS", 0)
    monkeypatch.setattr("data.mixture.memory.SETTLED_NS", 0)
    first = identity(stage(place))
    monkeypatch.setattr("nexus_gen.artifacts.content.hash_file", lambda path: pytest.fail(f"{path} was read"))
    other = identity(stage(place, "standins"))["inputs"]  # shares the memory
    assert other == {role: first["inputs"][role] for role in ("data.train", "pictures.train")}
    monkeypatch.setattr("data.mixture.pictures.read_places", lambda *_: pytest.fail("rows were parsed"))
    assert identity(stage(place)) == first


def test_what_a_stage_reads_out_of_an_artifact_is_what_that_stage_made(place: Path) -> None:
    artifact = place / "shapes" / "artifact"
    artifact.mkdir(parents=True)
    for file in [*place.glob("*.png"), *place.glob("*.jsonl")]:
        shutil.move(file, artifact)
    seal(artifact, Manifest("messages", "shapes", {}, {}, {}))
    paths = [f"data.{split}={artifact / split}.jsonl" for split in ("train", "heldout")]
    attempt(stage(place, "pretrain", *paths))
    repaint(artifact / "train2.png")
    with pytest.raises(UserError, match=r"train2\.png differs from its manifest; .* run stage=shapes again"):
        identity(stage(place, "pretrain", *paths))
    write_picture(artifact / "train2.png", 2)
    identity(stage(place, "pretrain", *paths))
    (artifact / "heldout.jsonl").write_text((artifact / "train.jsonl").read_text())
    with pytest.raises(UserError, match=r"heldout\.jsonl differs from its manifest"):
        identity(stage(place, "pretrain", *paths))


def test_a_stage_is_not_skipped_with_another_artifact_than_it_made(place: Path) -> None:
    config = stage(place)
    attempt(config)
    finish(config)
    (config.artifact_dir / "weights").write_text("Trained")
    with pytest.raises(UserError, match=r"artifact/weights differs from its manifest; .* run stage=pretrain again"):
        run_stage(config, None, again=False)  # type: ignore[arg-type]  # no processes are started
    (config.artifact_dir / "weights").write_text("trained")
    assert run_stage(config, None, again=False) == 0  # type: ignore[arg-type]


def test_a_raised_version_makes_a_stage_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stage(place)
    attempt(config)
    finish(config)
    monkeypatch.setattr(type(config), "numerics", 2)
    assert not unchanged(config)
    attempt(config)
    finish(config)
    assert unchanged(config) and Manifest.load(config.artifact_dir).numerics == 2
    attempt(stage(place, "pretrain", "seed=7"))
    monkeypatch.setattr(type(config), "numerics", 3)
    with pytest.raises(UserError, match="with another numerics; restore that"):
        attempt(stage(place, "pretrain", "seed=7"))


# ---- what earlier versions recorded ----


def earlier_identity(config: StageConfig) -> dict[str, Any]:
    """As a version recorded it that looked at no pictures, and at the ends of large files."""
    qwen, now = inputs_of(config)["model.qwen"], identity(config)
    weights = (qwen / "weights.bin").read_bytes()
    ends = digest([len(weights), weights[: 1 << 20].hex(), weights[-(1 << 20) :].hex()])
    files = [["config.json", hash_file(qwen / "config.json")], ["weights.bin", ends]]
    rows = {role: now["inputs"][role] for role in ("data.train", "data.heldout")}
    return {"config": now["config"], "inputs": {"model.qwen": digest(files), **rows}}


@pytest.mark.parametrize("change", ["train1.png", "qwen/weights.bin"])
def test_an_artifact_of_an_earlier_version_is_accepted_once_as_it_is_now(
    change: str, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = stage(place)
    finish(config, earlier_identity(config))
    fingerprint = Manifest.load(config.artifact_dir).fingerprint
    assert unchanged(config)
    assert len(caplog.records) == 1 and "recorded by an earlier version" in caplog.text
    assert all(role in caplog.text for role in ("model.qwen", "pictures.train", "pictures.heldout", "from=pretrain"))
    assert unchanged(config) and len(caplog.records) == 1
    assert Manifest.load(config.artifact_dir).fingerprint == fingerprint  # what was made from it stays as it is
    with open(place / change, "r+b") as file:
        file.seek((place / change).stat().st_size // 2)
        file.write(b"x")
    assert not unchanged(config)


def test_what_an_earlier_version_did_look_at_is_compared(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = stage(place)
    finish(config, earlier_identity(config))
    with open(place / "qwen" / "weights.bin", "r+b") as file:
        file.write(b"x")
    assert not unchanged(config) and not caplog.records
    assert not unchanged(stage(place, "pretrain", "seed=7"))


def test_a_try_of_an_earlier_version_is_resumed(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = stage(place)
    recorded = config.run_dir / "checkpoints" / "identity.json"
    checkpoint = attempt(config)
    recorded.write_text(json.dumps(earlier_identity(config)), encoding="utf-8")
    attempt(config)
    assert checkpoint.exists() and len(caplog.records) == 1 and "recorded by an earlier version" in caplog.text
    attempt(config)
    assert len(caplog.records) == 1
    repaint(place / "train0.png")
    with pytest.raises(UserError, match=r"another inputs\.pictures\.train"):
        attempt(config)
    # An artifact of that version beside checkpoints that it was made from: a finished try, whatever is accepted.
    finished = earlier_identity(config)
    recorded.write_text(json.dumps(finished), encoding="utf-8")
    finish(config, finished)
    attempt(stage(place, "pretrain", "seed=7"))


# ---- rehearsal ----


def write_old_rows(place: Path, answer: str = "A circle.") -> Path:
    write_picture(place / "old.png", 50)
    turns = [{"role": "user", "content": "<image> What is it?"}, {"role": "assistant", "content": answer}]
    (place / "old.jsonl").write_text(json.dumps({"images": ["old.png"], "messages": turns}) + "\n")
    return place / "old.jsonl"


def test_what_was_made_before_there_was_rehearsal_is_unchanged_without_it(place: Path) -> None:
    config = stage(place)
    now = identity(config)
    recorded = {**now, "config": {**now["config"], "data": dict(now["config"]["data"])}}
    assert recorded["config"]["data"].pop("rehearsal") == 0.0
    assert "rehearsal_rows" not in recorded["config"]["data"] and not any("rehearsal" in role for role in now["inputs"])
    finish(config, recorded)
    assert unchanged(config)
    old = write_old_rows(place)
    assert not unchanged(stage(place, "pretrain", "data.rehearsal=0.2", f"data.rehearsal_rows={old}"))


def test_rows_of_the_rehearsal_their_pictures_and_their_share_count(place: Path) -> None:
    old = write_old_rows(place)
    rehearsing = ["data.rehearsal=0.2", f"data.rehearsal_rows={old}"]
    config = stage(place, "pretrain", *rehearsing)
    finish(config)
    assert unchanged(config) and inputs_of(config)["data.rehearsal_rows"] == old
    assert not unchanged(stage(place, "pretrain", "data.rehearsal=0.3", rehearsing[1]))
    old.rename(place / "moved.jsonl")
    assert unchanged(stage(place, "pretrain", rehearsing[0], f"data.rehearsal_rows={place / 'moved.jsonl'}"))
    repaint(place / "old.png")
    assert not unchanged(stage(place, "pretrain", rehearsing[0], f"data.rehearsal_rows={place / 'moved.jsonl'}"))
    write_old_rows(place, answer="A ring.")
    assert not unchanged(config)


def test_rows_to_rehearse_are_asked_for_where_none_are_known(place: Path) -> None:
    with pytest.raises(UserError, match=r"model\.qwen .*qwen was trained on.*data\.rehearsal_rows=PATH.*rehearsal=0"):
        preflight_rows(stage(place, "pretrain", "data.rehearsal=0.2"))
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        preflight(stage(place, "pretrain", "data.rehearsal=0.2", f"data.rehearsal_rows={place / 'gone.jsonl'}"))
    preflight_rows(stage(place, "pretrain", "data.rehearsal=0.2", f"data.rehearsal_rows={write_old_rows(place)}"))
    shipped = SHIPPED_RUN / "pretrain" / "artifact"
    preflight_rows(stage(place, "pretrain", "data.rehearsal=0.2", f"model.qwen={shipped}"))
    # What was finetuned from it, which the embedding stages read, rehearses the same rows.
    finish(stage(place, "pretrain", f"model.qwen={shipped}"))
    finetuned = stage(place, "pretrain", f"model.qwen={shipped}").artifact_dir
    assert knows_shipped_rows(finetuned) and not knows_shipped_rows(place / "qwen")
    with pytest.raises(UserError, match=r"model\.qwen .*artifact was trained on"):
        finish(stage(place, "pretrain", "name=other"))
        other = stage(place, "pretrain", "name=other").artifact_dir
        preflight_rows(stage(place, "pretrain", "data.rehearsal=0.2", f"model.qwen={other}"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["data.rehearsal=1.0"], "data.rehearsal is 1.0; it is a share from 0 to below 1"),
        (["data.rehearsal=-0.1"], "data.rehearsal is -0.1; it is a share from 0 to below 1"),
        (["data.rehearsal_rows=old.jsonl"], "data.rehearsal_rows has no effect with data.rehearsal 0"),
    ],
)
@pytest.mark.parametrize("name", ["pretrain", "embed_editing"])
def test_a_share_that_means_nothing_is_refused(name: str, given: list[str], message: str, place: Path) -> None:
    texts = [f"stage={name}", f"data.train={place / 'train.jsonl'}", f"data.heldout={place / 'heldout.jsonl'}", *given]
    with pytest.raises(UserError, match=message):
        compose_stage([Override.parse(text) for text in texts])
