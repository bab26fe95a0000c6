"""Rows of webdataset tars."""

import os
import re
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from data.notices import Notice, Notices
from data.records.packed import Packed
from data.records.record import Record, Records
from data.records.samples import TEXT_SUFFIXES, UNREAD_TEXT, caption_values, has_words, is_hidden, is_picture
from nexus_gen.pictures.images import ImageMember


class MessageTar(Records):
    """A webdataset tar: `key.json` is a row, the pictures `key.0.png`, `key.1.jpg`, ... beside it are its images.

    Where no JSON says more, `key.txt` is the caption of the picture beside it.
    """

    @cached_property
    def _places(self) -> tuple[Packed, Notices]:
        """[key, {file name: [offset, size]}, what is wrong] of each sample, and what was passed over.

        A last sample says where a damaged tar breaks off.
        """
        samples: dict[str, tuple[dict[str, tuple[int, int]], list[str]]] = {}
        damage, hidden = None, []
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all, as webdataset knows
                    if member.isdir():
                        continue
                    if is_hidden(member.name):
                        hidden.append(member.name)
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
        packed = Packed()
        for key, (members, problems) in samples.items():
            if not problems and (problem := _incomplete(os.path.basename(key), members)):
                problems.append(problem)
            packed.append([key, members, "; ".join(problems) or None])
        if damage:
            last = list(samples)[-1] if samples else "its first block"
            packed.append([f"after {last}", {}, f"{damage}; what follows is lost, write the tar again"])
        return packed, Notices({Notice("hidden_file", hidden[0]): len(hidden)} if hidden else {})

    @property
    def notices(self) -> Notices:
        return self._places[1]

    def __len__(self) -> int:
        return len(self._places[0])

    @cached_property
    def _indices(self) -> dict[str, int]:
        indices = {}
        for index in range(len(self)):
            key, members, problem = self._places[0][index]
            name = _row_name(os.path.basename(key), members)
            indices[key if problem or name is None else os.path.join(os.path.dirname(key), name)] = index
        return indices

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
        key, places, problem = self._places[0][index]
        if problem:
            return self._record(key, None, "tar", problem)
        directory, base = os.path.split(key)
        members = {
            picture: ImageMember(f"{self.path}:{os.path.join(directory, picture)}", self.path, *places[picture])
            for picture in sorted(filter(is_picture, places), key=_by_number)
        }

        def content(name: str) -> bytes:
            offset, size = places[name]
            file.seek(offset)
            return file.read(size)

        name, text = _row_name(base, places), _text_name(base, places)
        assert name is not None  # or there was a problem
        place, data = os.path.join(directory, name), content(name)
        if name == text:
            return self._captioned(place, {}, data, members)
        record = self._decoded(place, data, members=members)
        if text is None or record.values is None:
            return record
        if has_words(record.values):
            return self._record(place, record.values, members=members, notices=UNREAD_TEXT)
        return self._captioned(place, record.values, content(text), members)

    def _captioned(self, place: str, facts: dict[str, Any], text: bytes, members: dict[str, ImageMember]) -> Record:
        """facts: what JSON beside the picture says of the file."""
        try:
            return self._record(place, {**facts, **caption_values(text)}, members=members)
        except ValueError as error:
            return self._record(place, None, "encoding", f"the caption is {error}", raw=text, members=members)


def _named(base: str, suffix: str, places: Any) -> str | None:
    """The file of a sample with this suffix, in capitals too."""
    if (usual := f"{base}{suffix}") in places:
        return usual
    return next((name for name in places if name.startswith(base) and name[len(base) :].lower() == suffix), None)


def _text_name(base: str, places: Any) -> str | None:
    return next((name for suffix in TEXT_SUFFIXES if (name := _named(base, suffix, places))), None)


def _row_name(base: str, places: Any) -> str | None:
    """The file that makes a sample a row."""
    return _named(base, ".json", places) or _text_name(base, places)


def _incomplete(base: str, places: Any) -> str | None:
    """What a sample lacks to be a row."""
    row = _row_name(base, places)
    if row is None:
        return f"no {base}.json beside {', '.join(places)}; add it, or a caption as {base}.txt, or take them out"
    if row == _text_name(base, places) and not any(map(is_picture, places)):
        return f"no picture beside {', '.join(places)}; add it or take them out"
    return None


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


def _by_number(name: str) -> list[tuple[str, int]]:
    """A sort key in which 10 follows 9."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
