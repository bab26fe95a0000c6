"""Why a stage failed: each failing rank leaves a note in the run directory, and the first cause is told once.

Ranks fail together: one for a reason, the others because it is gone. Whoever started them reads the notes.
"""

import json
import os
import shutil
import signal
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import gethostname

from nexus_gen.specs.artifact import write_text_atomic
from nexus_gen.specs.errors import UserError

DIRECTORY = "failures"  # of a stage's log directory
STOPPED = 128 + signal.SIGTERM  # exit status of processes that ended because they were asked to


@dataclass(frozen=True)
class Failure:
    """time: seconds since 1970. sentence: of a UserError, empty for a crash. trace: the traceback of either."""

    rank: int
    host: str
    time: float
    sentence: str
    trace: str

    @property
    def status(self) -> int:
        """What a command exits with: 2 for something that the user can mend."""
        return 2 if self.sentence else 1

    def __str__(self) -> str:
        if self.sentence:
            return f"error: {self.sentence}"
        return f"{self.trace.rstrip()}\nerror: rank {self.rank} on {self.host} failed as above"


def note_failure(log: Path, rank: int, error: BaseException) -> None:
    """Leave a rank's reason in a stage's log directory."""
    # What a loader process raises arrives as the text of its traceback.
    sentence = str(error).rsplit("UserError: ", 1)[-1].strip() if isinstance(error, UserError) else ""
    trace = "".join(traceback.format_exception(error))
    failure = Failure(rank, gethostname(), time.time(), sentence, trace)
    write_text_atomic(log / DIRECTORY / f"rank{rank}.json", json.dumps(asdict(failure), indent=1))


def first_failure(log: Path) -> Failure | None:
    """The cause: what a user can mend before crashes, which follow from it, and the earliest of those."""
    notes = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in (log / DIRECTORY).glob("rank*.json")]
    return min(notes, key=lambda failure: (not failure.sentence, failure.time), default=None)


def forget_failures(log: Path) -> None:
    """Drop the notes of an earlier try."""
    if os.path.isdir(log / DIRECTORY):
        shutil.rmtree(log / DIRECTORY)
