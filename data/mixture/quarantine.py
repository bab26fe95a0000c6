"""Rows that a run leaves out: quarantine files of the doctor and of training, read and held against a dataset.

A file of JSON lines names each row by `file`, `line` (of a tar: the name) and `digest` (of its content); `reason` says
what is wrong with it. Datasets may have moved since: a file is known by the longest end of its path. No torch here.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from data.records.reading import Record, open_records
from nexus_gen.specs.errors import UserError

REMEDY = "write it again with `nexus-gen data check --quarantine`"


@dataclass(frozen=True)
class LeftOut:
    """rows: dataset file -> index of a row there -> why it is left out.

    elsewhere: file that a quarantine file names and the dataset does not have -> number of its rows.
    """

    rows: Mapping[Path, Mapping[int, str]] = field(default_factory=dict)
    elsewhere: Mapping[str, int] = field(default_factory=dict)

    def of(self, file: Path) -> Mapping[int, str]:
        """Those of one file."""
        return self.rows.get(file, {})

    @property
    def key(self) -> list[Any]:
        """What tells it from others, as JSON."""
        return sorted([str(file), sorted(reasons.items())] for file, reasons in self.rows.items())

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))


NOTHING = LeftOut()


def named(record: Record) -> dict[str, Any]:
    """What a line of a quarantine file names a row by."""
    return {
        "where": record.where,
        "file": os.path.abspath(record.file),
        "line": record.line,
        "digest": record.digest,
    }


class _Entry(NamedTuple):
    line: int | str
    digest: str
    reason: str


def read_left_out(quarantine: Iterable[str | os.PathLike[str]], files: Sequence[Path]) -> LeftOut:
    """The rows of dataset files that quarantine files name; a directory stands for the `.jsonl` files inside it.

    Raises UserError for what is no quarantine file, for a row that is not the one that was checked, and for a file
    that may be either of two.
    """
    rows: dict[Path, dict[int, str]] = {}
    elsewhere: Counter[str] = Counter()
    for path in _quarantine_files(quarantine):
        entries = _read(path)
        known = _matched(path, list(entries), files)
        for name, of_file in entries.items():
            if name in known:
                rows.setdefault(known[name], {}).update(_found(path, known[name], of_file))
            else:
                elsewhere[name] += len(of_file)
    return LeftOut(rows, elsewhere)


def _quarantine_files(quarantine: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    for path in map(Path, quarantine):
        inside = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"{path} holds no quarantine file (*.jsonl); give one")
        yield from inside


def _read(path: Path) -> dict[str, list[_Entry]]:
    """The entries of a quarantine file by the file that they name."""
    entries: dict[str, list[_Entry]] = {}
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # not at U+2028, as splitlines does
    except (OSError, ValueError) as error:
        raise UserError(f"quarantine {path} cannot be read ({error}); {REMEDY}") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = json.loads(line)
            entry = _Entry(values["line"], values["digest"], values["reason"] or "quarantined")
            entries.setdefault(os.path.normpath(values["file"]), []).append(entry)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}:{number} names no row by file, line, digest and reason; {REMEDY}") from error
    return entries


def _matched(path: Path, names: Sequence[str], files: Sequence[Path]) -> dict[str, Path]:
    """Named file -> dataset file, one to one: by the longest common end of their paths, at least the file's name."""
    of_name: dict[str, list[tuple[Path, tuple[str, ...]]]] = {}
    for file in files:
        parts = Path(os.path.abspath(file)).parts
        of_name.setdefault(parts[-1], []).append((file, parts))
    pairs: dict[int, list[tuple[str, Path]]] = {}  # by the length of their common end
    for name in names:
        named_parts = Path(name).parts
        for file, parts in of_name.get(named_parts[-1], []):
            ends = zip(reversed(named_parts), reversed(parts), strict=False)
            length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], ends))
            pairs.setdefault(length, []).append((name, file))
    matched: dict[str, Path] = {}
    for _, alike in sorted(pairs.items(), reverse=True):
        taken = set(matched.values())
        left = [(name, file) for name, file in alike if name not in matched and file not in taken]
        of_name_left, of_file_left = Counter(name for name, _ in left), Counter(file for _, file in left)
        for name, file in left:
            if of_name_left[name] > 1 or of_file_left[file] > 1:
                raise UserError(f"{path} names {name}, which may be {file} or not, others end alike; {REMEDY}")
        matched.update(left)
    return matched


def _found(path: Path, file: Path, entries: Sequence[_Entry]) -> dict[int, str]:
    """Index -> reason of the rows that a quarantine file names in a dataset file."""
    records = open_records(file)
    found, changed = {}, []
    for entry in entries:
        index = records.find(entry.line)
        if index is None or records[index].digest != entry.digest:
            changed.append(entry)
        else:
            found[index] = entry.reason
    if changed:
        raise UserError(
            f"{file}:{changed[0].line} is not the row that {path} names ({len(changed)} of {len(entries)} differ); "
            f"the dataset was changed since, {REMEDY}"
        )
    return found
