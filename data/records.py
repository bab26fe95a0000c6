"""Raw rows of message datasets in JSONL, JSON arrays, Parquet and webdataset tars, by iteration and by index.

A row that cannot be read is a Record with its problem: nothing is raised for it and nothing is passed over, so that
whoever reads can count. Only a file that cannot be opened at all raises. No torch here.
"""

import hashlib
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.images import ImageMember

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".jp2")
ROW_GROUPS_KEPT = 4  # of Parquet files, decoded, in each process


@dataclass(frozen=True)
class Record:
    """One raw row.

    where: what errors name it by: `file:line`, `file:row` (both from 1) or `tar:member`. name: what tells it from the
    other rows of its file. values: the row as it stands there, or None; then `problem` says why, and `kind` is what
    such problems are counted under. Picture paths are relative to the directory of `file`. members: the pictures that
    a tar holds beside the row, by file name, in the order of their numbers. raw: what stands in place of a row.
    """

    where: str
    name: str
    file: Path
    values: dict[str, Any] | None
    kind: str = ""
    problem: str | None = None
    members: Mapping[str, ImageMember] = field(default_factory=lambda: MappingProxyType({}))
    raw: bytes = field(default=b"", repr=False)

    @property
    def line(self) -> int | str:
        """Its place as quarantine files have it: the number of the line or row, the name in a tar."""
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
    """The rows of one file. Indexing and iterating give the same records; objects can be sent to other processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

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

    def _record(self, place: object, values: Any, kind: str = "", problem: str | None = None, **more: Any) -> Record:
        """A record, broken too when its values are no object."""
        if problem is None and not isinstance(values, dict):
            kind, more["raw"] = "json", json.dumps(values).encode()
            problem = f"a {type(values).__name__} where a JSON object with images and messages is needed"
        where = f"{self.path}:{place}"
        return Record(where, str(place), self.path, None if problem else values, kind, problem, **more)

    def _decoded(self, place: object, data: bytes, **more: Any) -> Record:
        """The record of a row that stands as JSON text."""
        try:
            values = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique)
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 ({error.reason} at byte {error.start} of the row); save it as UTF-8"
            return self._record(place, None, "encoding", problem, raw=data, **more)
        except (ValueError, RecursionError) as error:
            return self._record(place, None, "json", f"not JSON ({error}); a row is one JSON object", raw=data, **more)
        return self._record(place, values, **more)


class JsonLines(Records):
    """A JSON object on each line; blank lines are no rows. Only the places of the lines stay in memory."""

    @cached_property
    def _places(self) -> tuple[array, array]:
        offsets, lines = array("q"), array("q")
        with open(self.path, "rb") as file:
            offset = 0
            for line, content in enumerate(file, start=1):
                if not content.isspace():
                    offsets.append(offset)
                    lines.append(line)
                offset += len(content)
        return offsets, lines

    def __len__(self) -> int:
        return len(self._places[0])

    def find(self, line: int | str) -> int | None:
        lines = self._places[1]
        index = bisect_left(lines, line) if isinstance(line, int) else len(lines)
        return index if index < len(lines) and lines[index] == line else None

    def __getitem__(self, index: int) -> Record:
        offsets, lines = self._places
        with open(self.path, "rb") as file:  # a file of its own: loader processes would share one file's position
            file.seek(offsets[index])
            return self._decoded(lines[index], file.readline())

    def span(self, first: int, last: int) -> list[Record]:
        offsets, lines = self._places
        with open(self.path, "rb") as file:  # once: opening takes long on the file systems of clusters
            records = []
            for index in range(first, last):
                file.seek(offsets[index])
                records.append(self._decoded(lines[index], file.readline()))
        return records

    def __iter__(self) -> Iterator[Record]:
        with open(self.path, "rb") as file:
            for line, content in enumerate(file, start=1):
                if not content.isspace():
                    yield self._decoded(line, content)


class JsonArray(Records):
    """A JSON array of objects. The whole file is held in memory; above a gigabyte JSONL serves better."""

    @cached_property
    def _rows(self) -> list[Any] | str:
        """The rows, or why there are none."""
        try:
            rows = json.loads(self.path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            return f"not JSON ({error}); give an array of objects, or JSON lines"
        return rows if isinstance(rows, list) else f"a {type(rows).__name__} where an array of objects is needed"

    def __len__(self) -> int:
        return 1 if isinstance(self._rows, str) else len(self._rows)

    def __getitem__(self, index: int) -> Record:
        if isinstance(self._rows, str):  # the file as a whole is one broken row
            return self._record(1, None, "json", self._rows)
        return self._record(index + 1, self._rows[index])


class Parquet(Records):
    """Rows of a Parquet file; pictures may be paths, bytes, or the {bytes, path} of Hugging Face's datasets.

    A row group is read as a whole and the last few are kept, so an order that stays within a few groups reads fast.
    """

    @cached_property
    def _starts(self) -> list[int]:
        """Index of the first row of each row group, and the number of rows."""
        import pyarrow
        from pyarrow import parquet

        try:
            metadata = parquet.read_metadata(self.path)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path} is no Parquet file ({' '.join(str(error).split())}); write it again"
            ) from error
        starts = [0]
        for group in range(metadata.num_row_groups):
            starts.append(starts[-1] + metadata.row_group(group).num_rows)
        return starts

    @property
    def chunks(self) -> list[int]:
        return self._starts[:-1] or [0]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Record:
        group = bisect_right(self._starts, index) - 1
        rows = _row_group(self.path, group)
        if isinstance(rows, str):
            return self._record(index + 1, None, "parquet", rows)
        values = {name: value for name, value in rows[index - self._starts[group]].items() if value is not None}
        return self._record(index + 1, values)


class MessageTar(Records):
    """A webdataset tar: `key.json` is a row, the pictures `key.0.png`, `key.1.jpg`, ... beside it are its images.

    Where its members are stays in memory as text: a tenth of the size of objects, sent to other processes as it is, and
    not copied by forked ones, which write to the reference counts of objects that they look at.
    """

    @cached_property
    def _places(self) -> tuple[bytes, array]:
        """[key, {file name: [offset, size]}, what is wrong] of each sample as JSON, and where these begin and end.

        A last sample says where a damaged tar breaks off.
        """
        samples: dict[str, tuple[dict[str, tuple[int, int]], list[str]]] = {}
        damage = None
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all, as webdataset knows
                    if member.isdir():
                        continue
                    directory, name = os.path.split(member.name)
                    key = os.path.join(directory, name.partition(".")[0])
                    members, problems = samples.setdefault(key, ({}, []))
                    if name in members:
                        problems.append(f"{name} is there twice; keep one")
                    elif not member.isreg():
                        problems.append(f"{name} is a link or a device; store the file itself")
                    else:
                        members[name] = (member.offset_data, member.size)
                damage = tar_damage(self.path, tar.offset)
        except (tarfile.TarError, OSError, ValueError) as error:
            damage = f"the tar is damaged here ({error})"
        text, bounds = bytearray(), array("q", [0])

        def keep(key: str, members: dict[str, tuple[int, int]], problem: str | None) -> None:
            text.extend(json.dumps([key, members, problem]).encode("ascii"))
            bounds.append(len(text))

        for key, (members, problems) in samples.items():
            if not problems and f"{os.path.basename(key)}.json" not in members:
                problems.append(f"no {os.path.basename(key)}.json beside {', '.join(members)}; add it or take them out")
            keep(key, members, "; ".join(problems) or None)
        if damage:
            last = list(samples)[-1] if samples else "its first block"
            keep(f"after {last}", {}, f"{damage}; what follows is lost, write the tar again")
        return bytes(text), bounds

    def _sample(self, index: int) -> tuple[str, dict[str, tuple[int, int]], str | None]:
        text, bounds = self._places
        key, members, problem = json.loads(text[bounds[index] : bounds[index + 1]])
        return key, members, problem

    def __len__(self) -> int:
        return len(self._places[1]) - 1

    @cached_property
    def _indices(self) -> dict[str, int]:
        samples = map(self._sample, range(len(self)))
        return {key if problem else f"{key}.json": index for index, (key, _, problem) in enumerate(samples)}

    def find(self, line: int | str) -> int | None:
        return self._indices.get(str(line))

    def __getitem__(self, index: int) -> Record:
        return self.span(index, index + 1)[0]

    def span(self, first: int, last: int) -> list[Record]:
        with open(self.path, "rb") as file:
            return [self._read(file, index) for index in range(first, last)]

    def __iter__(self) -> Iterator[Record]:
        with open(self.path, "rb") as file:
            for index in range(len(self)):
                yield self._read(file, index)

    def _read(self, file: BinaryIO, index: int) -> Record:
        key, places, problem = self._sample(index)
        if problem:
            return self._record(key, None, "tar", problem)
        directory, name = os.path.split(key)
        pictures = sorted((other for other in places if other.lower().endswith(IMAGE_SUFFIXES)), key=_by_number)
        members = {
            picture: ImageMember(f"{self.path}:{os.path.join(directory, picture)}", self.path, *places[picture])
            for picture in pictures
        }
        offset, size = places[f"{name}.json"]
        file.seek(offset)
        return self._decoded(f"{key}.json", file.read(size), members=members)


FORMATS: dict[str, type[Records]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".json": JsonArray,
    ".parquet": Parquet,
    ".tar": MessageTar,
}


def open_records(path: str | os.PathLike[str]) -> Records:
    """The rows of a dataset file, its format told by its name; a `.json` that does not begin with `[` is JSON lines.

    Raises UserError when the file cannot be opened or its format is none of FORMATS.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        endings = f"{', '.join(FORMATS)}, a mixture of several in .yaml"
        raise UserError(f"{path} is no dataset of messages; a file ends in one of {endings}")
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file of message rows") from error
    if kind is JsonArray and not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        kind = JsonLines
    return kind(path)


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The rows of a dataset file in order; raises as `open_records` does, never for a row."""
    yield from open_records(path)


def tar_damage(path: Path, offset: int, end_blocks: int = 1) -> str | None:
    """What is wrong where tarfile stopped reading: it does so without a word at a header that it cannot read.

    offset: of that place. end_blocks: of zeros that an end has there; tar writes two, and one is enough to be sure.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        end = file.read(end_blocks * tarfile.BLOCKSIZE)
    if any(end):
        return "the tar is cut short" if len(end) < tarfile.BLOCKSIZE else "the tar is damaged here"
    return "the tar is cut short" if len(end) < end_blocks * tarfile.BLOCKSIZE else None


def _as_text(value: Any) -> str:
    """A value that column formats have and JSON does not."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json itself would keep the last of two values of a key and lose the first."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return values


@lru_cache(maxsize=ROW_GROUPS_KEPT)
def _row_group(path: Path, group: int) -> list[dict[str, Any]] | str:
    """The rows of a row group, or why it cannot be read."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path).read_row_group(group).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        return f"row group {group} cannot be read ({' '.join(str(error).split())}); write the file again"


def _by_number(name: str) -> list[tuple[str, int]]:
    """A sort key in which 10 follows 9."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
