"""What was read of a dataset, kept in a file for as long as the dataset's files do not change."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.records.samples import files_below
from nexus_gen.artifacts.content import SETTLED_NS, file_facts, ns_since_change
from nexus_gen.artifacts.results import aside


def folder_files(path: Path) -> Iterator[Path]:
    """A file, or all that a folder holds: some datasets are one."""
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (path / name for name in files_below(path))


def remembered(memory: Path, key: Any, files: Sequence[Path], read: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """The values of `read`, which are JSON and follow from `key` and the content of `files`.

    They come out of the file `memory` where an earlier call for the same key and unchanged files left them; else they
    are read, and left there once all were taken, if that place can be written.
    """
    now = time.time_ns()
    facts = {str(file): file_facts(file) for path in files for file in folder_files(path)}
    head = json.dumps([key, facts]) + "\n"
    if memory.is_file():
        with open(memory, encoding="ascii") as lines:
            if lines.readline() == head:
                yield from map(json.loads, lines)
                return
    if not all(ns_since_change(of_file, now) >= SETTLED_NS for of_file in facts.values()) or not _can_write(
        memory.parent
    ):
        yield from read()
        return
    with aside(memory) as partial, open(partial, "w", encoding="ascii") as lines:
        lines.write(head)
        for value in read():
            lines.write(json.dumps(value) + "\n")
            yield value


def _can_write(directory: Path) -> bool:
    """Whether files can be made there, as they cannot in a run that is read-only."""
    trial = directory / f".{os.getpid()}.tmp"
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
        return True
    return False
