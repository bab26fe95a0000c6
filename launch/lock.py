"""One start at a time per stage of a run: two would write the same checkpoints."""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

import psutil

from nexus_gen.specs.errors import UserError

SUFFIX = ".lock"  # log/<host>.lock; empty but for who holds it


class Lock:
    """A held lock: its file, for children to inherit. It is free again when all who have the file open are gone."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self.file = file
        self.name_holders(os.getpid())

    def name_holders(self, *pids: int) -> None:
        """Write down which processes a later start should name."""
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps({"host": gethostname(), "pids": pids}).encode(), 0)


@contextmanager
def locked(stage_dir: Path, among_others: bool) -> Iterator[Lock]:
    """Hold a stage's directory; UserError naming the process that already does.

    A lock belongs to a host, since every machine of launch=torchrun starts the same command on the same directory;
    otherwise (not among_others) no other host may hold one either.
    """
    log = stage_dir / "log"
    log.mkdir(parents=True, exist_ok=True)
    own = log / f"{gethostname()}{SUFFIX}"
    for path in () if among_others else sorted(log.glob(f"*{SUFFIX}")):
        if path != own:
            os.close(take(path, stage_dir))
    file = take(own, stage_dir)
    try:
        yield Lock(own, file)
    finally:
        os.close(file)


def take(path: Path, stage_dir: Path) -> int:
    """Lock a file without waiting; returns its descriptor."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = describe_holder(os.pread(file, 4096, 0).decode())
        os.close(file)
        raise UserError(
            f"{stage_dir} is in use by {holder}; wait for it or end it (SIGTERM lets it save), or give another name=..."
        ) from error
    except OSError as error:  # some cluster file systems are mounted without locks
        print(f"note: {path} cannot be locked ({error.strerror}); do not start this stage twice", file=sys.stderr)
    return file


def describe_holder(text: str) -> str:
    try:
        holder = json.loads(text)
    except ValueError:  # it has just been taken
        return "another process"
    host, pids = holder["host"], holder["pids"]
    # A launcher that was killed is outlived by torchrun until the workers have saved.
    alive = [pid for pid in pids if host != gethostname() or psutil.pid_exists(pid)]
    return f"process {(alive or pids)[0]} on {host}" if pids else host
