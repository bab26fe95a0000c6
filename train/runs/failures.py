"""Why a stage failed: each failing rank leaves a note, and the first cause is reported once.

Ranks fail together: one for a reason, the others because it is gone. Whoever started them reads the notes, in the run
directory or, where its disk is full, among the machine's temporary files.
"""

import errno
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import gethostname

from nexus_gen.artifacts.artifact import digest, write_text_atomic
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


def places(log: Path) -> Iterator[Path]:
    """Directories of the notes, the second for when the first cannot be written."""
    yield log / DIRECTORY
    yield Path(tempfile.gettempdir()) / f"nexus-gen-failures-{os.getuid()}-{digest(str(log.absolute()))}"


def note_failure(log: Path, rank: int, error: BaseException) -> None:
    """Leave a rank's reason in a stage's log directory; where nothing can be written, on standard error."""
    trace = "".join(traceback.format_exception(error))
    failure = Failure(rank, gethostname(), time.time(), sentence_of(error, log.parent), trace)
    for place in places(log):
        try:
            write_text_atomic(place / f"rank{rank}.json", json.dumps(asdict(failure), indent=1))
            return
        except OSError:
            continue
    print(failure, file=sys.stderr)


def sentence_of(error: BaseException, stage_dir: Path) -> str:
    """What a user can do something about, in a sentence; empty for a crash."""
    if isinstance(error, UserError):
        # What a loader process raises arrives as the text of its traceback.
        return str(error).rsplit("UserError: ", 1)[-1].strip()
    if is_of_disk(error):
        where = getattr(error, "filename", None) or being_written(stage_dir)
        why = error.strerror if isinstance(error, OSError) and error.strerror else "No space left on device"
        free = shutil.disk_usage(stage_dir).free
        return (
            f"{where} could not be written ({why}; its disk has {free / 1e6:.1f} MB free); make room, and the same "
            "command resumes from the last whole checkpoint"
        )
    if killed := re.search(r"DataLoader worker \(pid(?:\(s\))?:? ?([\d, ]+)\)", str(error)):
        return after_death(f"a loader process ({killed[1].strip()}) was killed")
    return ""


def after_death(death: str, saved_step: int = 0) -> str:
    """The sentence about a killed loader process. saved_step: that of the checkpoint written after it, if any."""
    saved = f"; step {saved_step} is saved" if saved_step else ""
    return (
        f"{death}, perhaps for want of memory (dmesg says){saved}: lower num_workers or give it more memory, and the "
        "same command resumes where it was"
    )


def is_of_disk(error: BaseException) -> bool:
    """Whether a write failed for want of room. torch and safetensors say so in words of their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = r"No space left|StorageFull|file write failed|failed writing|unexpected pos|Disk quota exceeded"
    chain = [error, error.__cause__, error.__context__]
    return any(re.search(words, str(one)) or (one is not error and is_of_disk(one)) for one in chain if one is not None)


def being_written(stage_dir: Path) -> Path:
    """The file that was changed last among what a stage makes: errors of a full disk name none."""
    made = [stage_dir / "checkpoints", stage_dir / "artifact.partial"]
    files = [path for directory in made for path in directory.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime, default=stage_dir)


def first_failure(log: Path) -> Failure | None:
    """The cause: what a user can fix before crashes, which follow from it, and the earliest of those."""
    found = [path for place in places(log) for path in place.glob("rank*.json")]
    notes = [Failure(**json.loads(path.read_text(encoding="utf-8"))) for path in found]
    return min(notes, key=lambda failure: (not failure.sentence, failure.time), default=None)


def forget_failures(log: Path) -> None:
    """Drop the notes of an earlier try."""
    for place in places(log):
        if place.is_dir():
            shutil.rmtree(place)
