"""Rows of folders: pictures with a caption file beside each, and the metadata files of Hugging Face's imagefolder."""

import csv
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from data.notices import Notice, Notices, notices_of
from data.records.converters import PICTURE_KEYS, with_pictures
from data.records.jsonl import JsonLines
from data.records.packed import Packed
from data.records.parquet import Parquet
from data.records.record import Record, Records
from data.records.samples import (
    TEXT_SUFFIXES,
    UNREAD_TEXT,
    caption_values,
    files_below,
    has_words,
    is_hidden,
    is_picture,
)

METADATA = "metadata"  # the stem of files that describe the pictures of a folder


class CaptionFolder(Records):
    """Pictures in a folder and those inside it, `NAME.txt` beside each `NAME.jpg`: one caption, whatever its lines.

    `NAME.json` serves as well, when it has a caption or is a row by itself. Pictures are relative to where they are.
    """

    @cached_property
    def _places(self) -> tuple[Packed, Notices]:
        """[picture, caption file, JSON file, what is wrong] of each row, and what was passed over."""
        hidden, others = [], []
        stems: dict[str, tuple[list[str], dict[str, str]]] = {}
        for name in files_below(self.path):
            if is_hidden(name):
                hidden.append(name)
                continue
            stem, suffix = os.path.splitext(name)
            suffix = suffix.lower()
            if is_picture(name):
                stems.setdefault(stem, ([], {}))[0].append(name)
            elif suffix == ".json" or suffix in TEXT_SUFFIXES:
                texts = stems.setdefault(stem, ([], {}))[1]
                if suffix in texts:
                    others.append(name)
                texts.setdefault(suffix, name)
            else:
                others.append(name)
        packed = Packed()
        for stem, (pictures, texts) in stems.items():
            if not pictures:
                others += texts.values()
                continue
            text = next((texts[suffix] for suffix in TEXT_SUFFIXES if suffix in texts), None)
            others += [name for name in texts.values() if name not in (text, texts.get(".json"))]
            problem = None
            if len(pictures) > 1:
                problem = f"{' and '.join(pictures)} would have one caption; give each a name of its own"
            elif not texts:
                problem = f"no caption beside it; write {os.path.basename(stem)}.txt, or take the picture out"
            packed.append([pictures[0], text, texts.get(".json"), problem])
        notices = Notices()
        for kind, names in (("hidden_file", hidden), ("unused_file", others)):
            if names:
                notices[Notice(kind, min(names))] = len(names)
        return packed, notices

    @property
    def notices(self) -> Notices:
        return self._places[1]

    def __len__(self) -> int:
        return len(self._places[0])

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {self._places[0][index][0]: index for index in range(len(self))}

    def find(self, line: int | str) -> int | None:
        return self._indices.get(str(line))

    def __getitem__(self, index: int) -> Record:
        picture, text, beside, problem = self._places[0][index]
        directory, name = os.path.split(picture)
        where: dict[str, Any] = {"root": self.path / directory}
        values: dict[str, Any] = {}
        if problem:
            return self._place(picture, None, "caption", problem, **where)
        try:
            if beside is not None:
                record = self._decoded(picture, (self.path / beside).read_bytes(), **where)
                if record.values is None:
                    return self._place(picture, None, record.kind, f"{beside} is {record.problem}", raw=record.raw)
                values = record.values
                if has_words(values):
                    if not PICTURE_KEYS & values.keys():
                        values = {"image": name, **values}
                    return self._place(picture, values, notices=() if text is None else UNREAD_TEXT, **where)
                if text is None:
                    problem = f"{beside} has no caption; give it one, or write it into {Path(name).stem}.txt"
                    return self._place(picture, None, "caption", problem, **where)
            data = (self.path / text).read_bytes()
        except OSError as error:
            problem = f"its caption cannot be read ({error.strerror}); check {text or beside}"
            return self._place(picture, None, "caption", problem, **where)
        try:
            return self._place(picture, {**values, "image": name, **caption_values(data)}, **where)
        except ValueError as error:
            return self._place(picture, None, "encoding", f"{text} is {error}", raw=data, **where)

    def _place(self, picture: str, values: Any, kind: str = "", problem: str | None = None, **more: Any) -> Record:
        """A record, named by the path of its picture."""
        where = f"{self.path / picture}"
        return Record(where, picture, self.path, None if problem else values, kind, problem, **more)


class _Imagefolder(Records):
    """Rows whose `file_name` and the like are pictures, as Hugging Face's imagefolder takes them."""

    def _record(self, place: object, values: Any, kind: str = "", problem: str | None = None, **more: Any) -> Record:
        if isinstance(values, dict):
            values = with_pictures(values)
        return super()._record(place, values, kind, problem, **more)


class MetadataLines(_Imagefolder, JsonLines):
    """metadata.jsonl."""


class MetadataParquet(_Imagefolder, Parquet):
    """metadata.parquet."""


class MetadataTable(_Imagefolder):
    """metadata.csv. Rows are named by the line that they begin on; the whole file is held in memory."""

    @cached_property
    def _table(self) -> tuple[list[str], list[tuple[int, dict[str, Any], str | None]]]:
        """The names of the columns; line, values and what is wrong of each row."""
        csv.field_size_limit(sys.maxsize)  # a cell may hold a picture
        rows: list[tuple[int, dict[str, Any], str | None]] = []
        header: list[str] = []
        begins = 1
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                for cells in reader:
                    if not header:
                        header = cells
                    elif cells:
                        problem = None
                        if len(cells) != len(header):
                            problem = f"{len(cells)} cells where the first line names {len(header)} columns"
                        values = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
                        rows.append((begins, values, problem))
                    begins = reader.line_num + 1
            except csv.Error as error:
                rows.append((begins, {}, f"not CSV ({error}); what follows is lost, write the file again"))
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason}); what follows is lost, save the file as UTF-8"
                rows.append((begins, {}, problem))
        return header, rows

    def __len__(self) -> int:
        return len(self._table[1])

    @cached_property
    def _indices(self) -> dict[int, int]:
        return {line: index for index, (line, _, _) in enumerate(self._table[1])}

    def find(self, line: int | str) -> int | None:
        return self._indices.get(line) if isinstance(line, int) else None

    def __getitem__(self, index: int) -> Record:
        header, rows = self._table
        line, values, problem = rows[index]
        if problem:
            return self._record(line, None, "csv", problem, raw=repr(values).encode())
        empty = frozenset(header).difference(values)
        return self._record(line, values, notices=notices_of("empty_value", empty))
