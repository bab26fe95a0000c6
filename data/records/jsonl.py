"""Rows of JSON lines and JSON arrays."""

import json
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from data.records.record import Record, Records, unique_keys


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
            rows = json.loads(self.path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            return f"not JSON ({error}); give an array of objects, or JSON lines"
        return rows if isinstance(rows, list) else f"a {type(rows).__name__} where an array of objects is needed"

    def __len__(self) -> int:
        return 1 if isinstance(self._rows, str) else len(self._rows)

    def __getitem__(self, index: int) -> Record:
        if isinstance(self._rows, str):  # the file as a whole is one broken row
            return self._record(1, None, "json", self._rows)
        return self._record(index + 1, self._rows[index])
