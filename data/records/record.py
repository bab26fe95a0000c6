"""One raw row, and the rows of a dataset file or folder: what its formats have in common.

A row that cannot be read is a Record with its problem: nothing is raised for it and nothing is passed over, so that
whoever reads can count. No torch here.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from data.notices import Notice, Notices
from data.quotes import brief
from data.records.encodings import not_utf8
from nexus_gen.pictures.images import ImageMember
from nexus_gen.specs.errors import UserError


class RowError(UserError):
    """A row that cannot be trained on. kind: the name that problems of its sort are counted under."""

    def __init__(self, where: str, kind: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where, self.kind, self.problem = where, kind, problem


@dataclass(frozen=True)
class Record:
    """One raw row.

    where: what errors name it by: `file:line`, `file:row` (both from 1), `tar:member` or the picture of a folder.
    name: what tells it from the other rows of its file. values: the row as it stands there, or None; then `problem`
    says why, and `kind` is what such problems are counted under. members: the pictures that a tar holds beside the
    row, by file name, in the order of their numbers. raw: what stands in place of a row. root: the directory that
    picture paths are relative to, that of `file` unless given. notices: what reading passed over.
    """

    where: str
    name: str
    file: Path
    values: dict[str, Any] | None = field(repr=False)  # may hold whole pictures
    kind: str = ""
    problem: str | None = None
    members: Mapping[str, ImageMember] = field(default_factory=lambda: MappingProxyType({}))
    raw: bytes = field(default=b"", repr=False)
    root: Path | None = None
    notices: tuple[Notice, ...] = ()

    @property
    def line(self) -> int | str:
        """Its place as quarantine files have it: the number of the line or row, the name in a tar or folder."""
        return int(self.name) if self.name.isdecimal() and str(int(self.name)) == self.name else self.name

    @property
    def digest(self) -> str:
        """Of what the row holds, pictures inside its file included: 16 hex digits. Files that it names do not enter."""
        if self.values is None:
            content = self.kind.encode() + b":" + self.raw.strip()
        else:
            content = json.dumps(self.values, sort_keys=True, default=_as_text).encode()
        hasher = hashlib.sha256(content)
        for name, member in self.members.items():
            hasher.update(name.encode("utf-8", "surrogatepass") + member.read())
        return hasher.hexdigest()[:16]


class Records(ABC):
    """The rows of one file. Indexing and iterating give the same records; objects can be sent to other processes.

    picture_root: the directory that picture paths are relative to, that of the file unless given.
    """

    def __init__(self, path: Path, picture_root: Path | None = None) -> None:
        self.path, self.picture_root = path, picture_root

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def find(self, line: int | str) -> int | None:
        """The index of the record of that `line`; None where there is none."""
        return line - 1 if isinstance(line, int) and 0 < line <= len(self) else None

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def span(self, first: int, last: int) -> list[Record]:
        """The rows [first, last)."""
        return [self[index] for index in range(first, last)]

    @property
    def chunks(self) -> list[int]:
        """Where the pieces start that are read as a whole; one piece where every row is read alone."""
        return [0]

    @property
    def notices(self) -> Notices:
        """What finding the rows passed over, beside what each row says itself."""
        return Notices()

    def _record(self, place: object, values: Any, kind: str = "", problem: str | None = None, **more: Any) -> Record:
        """A record, broken too when its values are no object."""
        if problem is None and not isinstance(values, dict):
            kind, more["raw"] = "json", json.dumps(values).encode()
            problem = f"a {type(values).__name__} where a JSON object with images and messages is needed"
        more.setdefault("root", self.picture_root)
        where = f"{self.path}:{place}"
        return Record(where, str(place), self.path, None if problem else values, kind, problem, **more)

    def _decoded(self, place: object, data: bytes, **more: Any) -> Record:
        """The record of a row that stands as JSON text."""
        try:
            values = _DECODER.decode(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            return self._record(place, None, "encoding", not_utf8(data, error), raw=data, **more)
        except (ValueError, RecursionError) as error:
            return self._record(place, None, "json", f"not JSON ({error}); a row is one JSON object", raw=data, **more)
        return self._record(place, values, **more)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself would keep the last of two values of a key and lose the first."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {brief(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)  # `json.loads` would make one for each row


def _as_text(value: Any) -> str:
    """A value that column formats have and JSON does not."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
