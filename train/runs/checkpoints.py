"""Checkpoints of a training stage on disk, by their names: the launcher looks at them without loading anything.

Decoders write `step_00000100`, renamed when complete; pretraining writes `checkpoint-100` in place, and marks it then.
"""

import json
import re
from pathlib import Path
from typing import Any

LISTING = "files.json"
COMPLETE = "complete"  # an empty file in a checkpoint of swift's trainer, written when all ranks are done with it
PREFIX = "checkpoint-"  # as swift's trainer names them
TOKENS_SEEN = "tokens_seen"  # of a run, in pretraining's checkpoints
STEP_METRICS = "StepMetrics"  # the callback whose state they are in


def checkpoint_step(path: Path) -> int:
    """The optimizer steps done before this checkpoint."""
    return int(re.split("[_-]", path.name)[-1])


def begun_checkpoints(directory: Path) -> list[Path]:
    """All that is there, complete or not, oldest first; what people call `checkpoint-100-copy` is theirs."""
    found = (path for path in directory.glob("*") if re.fullmatch(rf"step_\d{{8,}}|{PREFIX}\d+", path.name))
    return sorted(found, key=checkpoint_step)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that were written to the end, oldest first; those of earlier versions are marked COMPLETE alone."""
    return [
        path
        for path in begun_checkpoints(directory)
        if not path.name.startswith(PREFIX) or any((path / mark).exists() for mark in (COMPLETE, LISTING))
    ]


def last_step(directory: Path) -> int:
    """The step of the newest complete checkpoint; 0 where there is none."""
    return max(map(checkpoint_step, complete_checkpoints(directory)), default=0)


def tokens_seen(checkpoint: Path) -> int:
    """The tokens that pretraining was done with before this checkpoint, all ranks together."""
    state: Any = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["stateful_callbacks"][STEP_METRICS]["attributes"][TOKENS_SEEN])
