"""Embedding by content: kills, resumes and changes on tiny real models; equal bit for bit to a run from nothing."""

import json
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import embed_runs as runs
import pytest

from train.schemas.stages import EmbedStageConfig

pytestmark = pytest.mark.slow

NUM_TRAIN, NUM_HELDOUT = 16, 4  # in shards of three


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for task in ("generation", "editing"):
        runs.write_rows(directory / task, "train", NUM_TRAIN, task == "editing")
        runs.write_rows(directory / task, "heldout", NUM_HELDOUT, task == "editing")
    return directory


@pytest.fixture(scope="module", params=["generation", "editing"])
def whole(request: pytest.FixtureRequest, inputs: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stage of a task, run once from nothing on one process, and the seconds that it took."""
    stage = runs.config(inputs, data / request.param, tmp_path_factory.mktemp(request.param), f"embed_{request.param}")
    runs.run(stage)  # the first run of a session also waits for the fork server's imports
    shutil.rmtree(stage.run_dir)
    began = time.monotonic()
    assert to_embed(runs.run(stage)) == (NUM_TRAIN + NUM_HELDOUT, 0, 0)
    return stage, time.monotonic() - began


def to_embed(said: str) -> tuple[int, int, int]:
    """(to embed, kept, removed) of what a stage said at its start."""
    found = re.search(r"(\d+|nothing) to embed.*?(\d+) kept, (\d+) removed", said)
    assert found, said
    return int(found[1]) if found[1] != "nothing" else 0, int(found[2]), int(found[3])


def elsewhere(stage: EmbedStageConfig, runs_dir: Path, **embed: Any) -> EmbedStageConfig:
    """The same stage in another directory of runs, or with other settings."""
    checkpoint, data = Path(stage.embed.autoregressive), Path(stage.data.train).parent
    return runs.config(checkpoint.parent, data, runs_dir, stage.stage, **embed)


def test_kills_at_random_leave_no_trace(whole: Any, tmp_path: Path) -> None:
    """Twelve of each stage, on one to three processes: another number after each kill."""
    reference, seconds = whole
    chance = random.Random(7)
    kills = finished = 0
    stage = elsewhere(reference, tmp_path)
    while kills < 12 or not finished:
        # Before, while and after the first shards of this start are written.
        num_shards = chance.choice((0, 1, 1, 2, 3))
        delay_s = chance.uniform(0, seconds if num_shards == 0 else 0.05)
        if kills < 12 and runs.kill(stage, chance.choice((1, 1, 2, 3)), num_shards, delay_s):
            kills += 1
            continue
        if kills == 12:
            runs.run(stage, chance.choice((1, 2, 3)))
        assert runs.contents(stage) == runs.contents(reference)
        shutil.rmtree(stage.run_dir)
        finished += 1
    keys = [
        f"{split}/{facts['index']}"
        for split in ("train", "heldout")
        for path in sorted((reference.artifact_dir / split).glob("*.json"))
        for facts in json.loads(path.read_text(encoding="utf-8"))["samples"]
    ]
    assert keys == [*(f"train/{i}" for i in range(NUM_TRAIN)), *(f"heldout/{i}" for i in range(NUM_HELDOUT))]
