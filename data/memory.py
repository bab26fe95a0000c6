"""What was read of a dataset, kept in a file for as long as the dataset's files do not change."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data.samples import files_below
from nexus_gen.specs.results import aside

SETTLED_NS = 2_000_000_000  # a file changed so shortly before it was read may change again without a new time

Facts = list[int]  # of a file: size, and times of its last changes in nanoseconds


def file_facts(path: str | os.PathLike[str]) -> Facts:
    """What differs when a file was changed. Raises OSError."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def folder_files(path: Path) -> Iterator[Path]:
    """A file, or all that a folder holds: some datasets are one."""
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (path / name for name in files_below(path))


def settled(facts: Facts, now: int) -> bool:
    """Whether a file with these facts has a new time after its next change. now: before it was read."""
    return now - max(facts[1:]) >= SETTLED_NS


def remembered(memory: Path, key: Any, files: Sequence[Path], read: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """The values of `read`, which are JSON and follow from `key` and the content of `files`.

    They come out of the file `memory` where an earlier call for the same key and unchanged files left them; else they
    are read, and left there once all were taken.
    """
    now = time.time_ns()
    facts = {str(file): file_facts(file) for path in files for file in folder_files(path)}
    head = json.dumps([key, facts]) + "\n"
    if memory.is_file():
        with open(memory, encoding="ascii") as lines:
            if lines.readline() == head:
                yield from map(json.loads, lines)
                return
    if not all(settled(of_file, now) for of_file in facts.values()):
        yield from read()
        return
    with aside(memory) as partial, open(partial, "w", encoding="ascii") as lines:
        lines.write(head)
        for value in read():
            lines.write(json.dumps(value) + "\n")
            yield value
