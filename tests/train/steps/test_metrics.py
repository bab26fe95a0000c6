"""What a stage records goes on where it was, in its file and in wandb."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nexus_gen.specs.errors import UserError
from train.schemas.common import LoggerConfig
from train.steps.metrics import MetricsLogger, latest, read_metrics

OFFLINE = LoggerConfig(tensorboard=False, wandb_mode="offline", wandb_project="shapes")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = tmp_path / "mine" / "generation_decoder"
    (directory / "log").mkdir(parents=True)
    (directory / "config.yaml").write_text("optim: {learning_rate: 0.002}\n", encoding="utf-8")
    yield directory


def record(run_dir: Path, first: int, last: int) -> None:
    logger = MetricsLogger(run_dir, OFFLINE, 0, first - 1)
    for step in range(first, last + 1):
        logger.log(step, {"train/loss": 1 / step})
    logger.log_picture(last, "samples", Image.new("RGB", (4, 4)))
    logger.close()


def test_a_resumed_stage_goes_on_in_its_run_of_wandb(run_dir: Path) -> None:
    record(run_dir, 1, 4)
    record(run_dir, 3, 5)  # from a checkpoint at step 2
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3, 4, 5]
    name = (run_dir / "log" / "wandb_id").read_text(encoding="utf-8")
    first, second = sorted((run_dir / "log" / "wandb").glob(f"offline-run-*-{name}*/run-{name}.wandb"))
    words = {b"mine-generation_decoder", b"learning_rate", b"train/loss", b"media/images/samples"}
    for file in (first, second):
        until = time.monotonic() + 60  # wandb's own process writes the file, a little later
        while missing := {word for word in words if word not in file.read_bytes()}:
            assert time.monotonic() < until, missing
            time.sleep(0.05)
    record(run_dir, 1, 2)  # over again
    assert (run_dir / "log" / "wandb_id").read_text(encoding="utf-8") != name


def test_without_an_account_the_remedy_is_named(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(run_dir))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    online = LoggerConfig(tensorboard=False, wandb_mode="online", wandb_project="shapes")
    with pytest.raises(UserError, match="wandb login"):
        MetricsLogger(run_dir, online, 0)
    MetricsLogger(run_dir, online, rank=1).close()


def test_the_latest_value_of_each_name_that_begins_so(tmp_path: Path) -> None:
    quiet = LoggerConfig(tensorboard=False, wandb_mode="disabled", wandb_project="")
    logger, other = MetricsLogger(tmp_path, quiet, rank=0), MetricsLogger(tmp_path, quiet, rank=1)
    before = time.time()
    for step, values in (
        (2, {"train/loss": 3.0}),
        (2, {"heldout/loss": 5.0}),
        (4, {"train/loss": 1.0, "train/lr": 2.0}),
    ):
        logger.log(step, values)
        other.log(step, {"train/loss": 77.0})
    logger.close()
    other.close()
    assert latest(tmp_path, "train/") == {"train/loss": 1.0, "train/lr": 2.0}
    assert latest(tmp_path, "heldout/") == {"heldout/loss": 5.0}
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "train/lo')  # cut short by a crash
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [2, 2, 4] and before <= rows[0]["time"] <= rows[2]["time"] <= time.time()


def test_tensorboard_shows_what_the_file_holds_and_forgets_what_is_repeated(run_dir: Path) -> None:
    config = LoggerConfig(tensorboard=True, wandb_mode="disabled", wandb_project="shapes")
    picture = Image.new("RGB", (6, 2), (200, 0, 0))

    def recorded(first: int, last: int, offset: float) -> None:
        logger = MetricsLogger(run_dir, config, 0, first - 1)
        for step in range(first, last + 1):
            logger.log(step, {"train/loss": step + offset, "train/lr": 0.5})
            assert read_metrics(run_dir)[-1]["train/loss"] == step + offset  # at once, not when the stage ends
        logger.log_picture(last, "samples", picture)
        logger.close()

    recorded(1, 4, 0.0)
    recorded(3, 5, 0.25)  # from a checkpoint at step 2
    events = EventAccumulator(str(run_dir / "log" / "tensorboard"), size_guidance={"images": 0}).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], row["train/loss"]) for row in read_metrics(run_dir)]
    assert losses == [(1, 1.0), (2, 2.0), (3, 3.25), (4, 4.25), (5, 5.25)]
    assert {event.value for event in events.Scalars("train/lr")} == {0.5}
    shown = Image.open(io.BytesIO(events.Images("samples")[-1].encoded_image_string))
    assert shown.size == (6, 2) and shown.convert("RGB").getpixel((5, 1)) == (200, 0, 0)
