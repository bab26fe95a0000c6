"""Which rows become which samples of which shards, under which content address, and why a sample is not there yet.

A plan is a function of the dataset and of the recipe (how embeddings are made): never of what was embedded before, by
how many processes or in which order. What was embedded before is looked up in it by address. No torch here: launchers
ask whether a stage has anything to do.
"""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from data.memory import file_facts, remembered, settled
from data.messages import RowError
from data.mixture import Place, load_mixture, read_places
from data.quarantine import LeftOut
from data.shards import Listing, checksum, index_shard, read_member
from nexus_gen.specs.artifact import digest, write_text_atomic
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.images import EncodedImage, ImageMember, StoredImage, read_image_bytes
from nexus_gen.specs.prompts import IMAGE_TAG

log = logging.getLogger(__name__)

HASHES = "picture_hashes.jsonl"
ROWS = "rows_{split}.jsonl"  # what was read of a split
READING = 1  # raise it when `_read` says something else of the same rows
UNREADABLE = ""  # the hash of a picture that cannot be read; embedding its row says why
ROWS_AT_ONCE = 256  # in memory, with the pictures that some formats keep in their rows
HASHING_THREADS = 8  # hashing releases the interpreter's lock; reading waits for disks

PicturePlace = str | list[Any]  # a path; a tar with offset and size; or the hash alone of one that came with its row


class PictureHashes:
    """SHA-256 of pictures, remembered in a file by path, size and times, so that an unchanged one is read only once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[list[int], str]] = {}
        self._used: dict[str, tuple[list[int], str]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            name, facts, sha256 = json.loads(line)
            self._known[name] = (facts, sha256)

    def of(self, place: PicturePlace) -> str:
        """The hash of a picture's file, UNREADABLE where it cannot be read. Threads may ask at once."""
        try:
            file, *member = [place] if isinstance(place, str) else place
            if isinstance(place, list) and not member:
                return file
            name = ":".join(map(str, [file, *member]))
            facts = file_facts(file)
            known, sha256 = self._known.get(name, ([], ""))
            if facts != known:
                now = time.time_ns()
                sha256 = hash_picture(ImageMember(name, Path(file), *member) if member else Path(file))
                if not settled(facts, now):
                    return sha256
            self._used[name] = (facts, sha256)
            return sha256
        except (OSError, UserError):
            return UNREADABLE

    def save(self) -> None:
        """Write what was asked for since the start; the rest is forgotten."""
        if self._used != self._known:
            lines = (json.dumps([name, *facts], ensure_ascii=False) + "\n" for name, facts in self._used.items())
            write_text_atomic(self._path, "".join(lines))


def hash_picture(picture: StoredImage) -> str:
    return hashlib.sha256(read_image_bytes(picture)).hexdigest()


@dataclass(frozen=True)
class RowFacts:
    """What a plan needs of a row; its pictures and messages stay where they are.

    place: where `RowsByPlace` finds it. where: file and line, without the directory: artifacts can be moved.
    pictures: hashes of those that enter its embeddings. words: hash of all its messages.
    """

    place: Place
    where: str
    id: str
    source: str
    caption: str
    pictures: list[str]
    words: str


@dataclass(frozen=True)
class PlannedSample:
    """facts: what its JSON says before it is embedded: id, source, caption, index, address, pictures, words."""

    split: str
    row: RowFacts
    facts: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.facts['index']:09d}"

    @property
    def address(self) -> str:
        return self.facts["address"]


@dataclass(frozen=True)
class PlannedShard:
    split: str
    number: int
    samples: list[PlannedSample]

    @property
    def file(self) -> str:
        return f"{self.split}/{self.number:06d}.tar"

    def is_held_by(self, listing: Listing | None) -> bool:
        """Whether a shard's listing says exactly what is planned, quarantined rows included."""
        if listing is None:
            return False
        set_aside = {entry["index"]: entry["address"] for entry in listing.quarantined}
        wanted = [s.facts for s in self.samples if set_aside.get(s.facts["index"]) != s.address]
        held = [{name: facts.get(name) for name in wanted[0]} for facts in listing.samples] if wanted else []
        return held == wanted and len(listing.samples) == len(wanted)


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split that a stage embeds, and those it cannot use: where, id, reason.

    A row that cannot be read counts as one of the stage's task. Rows that are quarantined are among the second.
    """

    split: str
    rows: list[RowFacts]
    unusable: list[dict[str, str]]

    @staticmethod
    def read(
        split: str,
        path: Path,
        task: str,
        all_pictures: bool,
        hashes: PictureHashes,
        left_out: LeftOut,
        memory: Path,
        picture_root: str = "",
    ) -> "SplitRows":
        """all_pictures: every picture of a row enters its embeddings; else its last one alone.

        memory: a file for what was read, so that a dataset that did not change is parsed only once. Its pictures are
        looked at each time. picture_root: what their paths are relative to, the file that names them unless given.
        """
        rows: list[RowFacts] = []
        unusable = []
        files = list(dict.fromkeys([path, *load_mixture(path).files]))
        out = sorted((str(file), sorted(reasons.items())) for file, reasons in left_out.rows.items())
        found = remembered(
            memory,
            [READING, task, all_pictures, out, *([picture_root] if picture_root else [])],
            files,
            lambda: _read(path, task, all_pictures, left_out, picture_root),
        )
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            while group := list(islice(found, ROWS_AT_ONCE)):
                hashed = pool.map(lambda row: [hashes.of(picture) for picture in row[-1]], group)
                for (place, where, row_id, source, caption, words, reason, _), pictures in zip(
                    group, hashed, strict=True
                ):
                    if reason:
                        unusable.append({"where": where, "id": row_id, "reason": reason})
                    else:
                        rows.append(RowFacts(tuple(place), where, row_id, source, caption, pictures, words))
        return SplitRows(split, rows, unusable)

    @property
    def fingerprint(self) -> str:
        """Of the pictures; the file of rows has its own."""
        return digest([row.pictures for row in self.rows])

    def plan(self, recipe: dict[str, Any], words_enter: bool, samples_per_shard: int) -> list[PlannedShard]:
        """words_enter: the embeddings depend on what the messages say."""
        samples = []
        for index, row in enumerate(self.rows):
            words = row.words if words_enter else ""
            facts = {
                "id": row.id,
                "source": row.source,
                "caption": row.caption,
                "index": index,
                "pictures": row.pictures,
                "words": words,
                "address": address(recipe, row.pictures, words),
            }
            samples.append(PlannedSample(self.split, row, facts))
        return [
            PlannedShard(self.split, first // samples_per_shard, samples[first : first + samples_per_shard])
            for first in range(0, len(samples), samples_per_shard)
        ]


def _read(path: Path, task: str, all_pictures: bool, left_out: LeftOut, picture_root: str) -> Iterator[list[Any]]:
    """Of every row of the task: place, where, id, source, caption, hash of its words, why it is unusable, pictures."""
    for place, row, reason in read_places(path, left_out, picture_root):
        where = row.where.removeprefix(f"{path.parent}/")
        if isinstance(row, RowError):
            yield [place, where, "", "", "", "", reason or row.problem, []]
        elif row.task == task:
            if not reason and row.messages[-1]["content"].count(IMAGE_TAG) != 1:
                reason = "its last reply does not hold exactly one picture"
            caption, words = row.messages[-2]["content"], digest(row.messages)
            pictures = [] if reason else row.images[0 if all_pictures else -1 :]
            yield [place, where, row.id, row.source, caption, words, reason, [*map(_place_of, pictures)]]


def _place_of(picture: StoredImage) -> PicturePlace:
    if isinstance(picture, EncodedImage):
        return [hash_picture(picture)]
    return [str(picture.tar), picture.offset, picture.size] if isinstance(picture, ImageMember) else str(picture)


def address(recipe: dict[str, Any], pictures: list[str], words: str) -> str:
    """Of everything that a sample's tensors follow from: 32 hex digits."""
    text = json.dumps([recipe, pictures, words], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class EarlierSamples:
    """What earlier starts embedded, by address: in the artifact to be replaced and in what unfinished tries left."""

    def __init__(self, directories: Iterable[Path]) -> None:
        self.listings: list[Listing] = []
        self._places: dict[str, tuple[Path, int]] = {}
        for directory in directories:
            for path in sorted(directory.glob("*/*.tar")):
                listing = Listing.read(path)
                if listing is None:
                    continue
                self.listings.append(listing)
                for number, facts in enumerate(listing.samples):
                    self._places.setdefault(facts["address"], (path, number))

    def __contains__(self, wanted: str) -> bool:
        return wanted in self._places

    def read(self, wanted: str) -> tuple[bytes, dict[str, Any]] | None:
        """The safetensors of a sample and its facts; None when there is none whose bytes have their checksum."""
        place = self._places.get(wanted)
        if place is None:
            return None
        path, number = place
        try:
            members = _index_shard(path)[number]
            facts = json.loads(read_member(path, members["json"]))
            data = read_member(path, members["safetensors"])
            whole = facts["address"] == wanted and facts["checksum"] == checksum(data)
        except (UserError, OSError, ValueError, KeyError, IndexError):
            whole = False
        if not whole:
            log.warning("sample %d of %s is damaged and will be embedded again", number, path)
            del self._places[wanted]
            return None
        return data, facts


_index_shard = lru_cache(maxsize=64)(index_shard)


@dataclass
class Changes:
    """What a start has to do beside what earlier ones left. reasons: why samples are embedded -> how many of them."""

    kept: int
    removed: int
    reasons: Counter[str]

    @staticmethod
    def between(earlier: EarlierSamples, plan: list[PlannedShard], recipe: dict[str, Any]) -> "Changes":
        known: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
        for listing in earlier.listings:
            for facts in (*listing.samples, *listing.quarantined):
                known.setdefault((facts["source"], facts["id"]), []).append((facts, listing.recipe))
        changes = Changes(kept=0, removed=0, reasons=Counter())
        for sample in (sample for shard in plan for sample in shard.samples):
            if sample.address in earlier:
                changes.kept += 1
            else:
                changes.reasons[_reason(sample, recipe, known.get((sample.row.source, sample.row.id), []))] += 1
        planned = {(sample.row.source, sample.row.id) for shard in plan for sample in shard.samples}
        changes.removed = len(known.keys() - planned)
        return changes

    def __str__(self) -> str:
        why = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.reasons.items()))
        to_do = f"{self.reasons.total()} to embed ({why})" if self.reasons else "nothing to embed"
        return f"{to_do}, {self.kept} kept, {self.removed} removed"


def _reason(sample: PlannedSample, recipe: dict[str, Any], known: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Why none of the earlier samples of a row, (facts, recipe) each, is the planned one."""
    if not known:
        return "rows new"

    def differences(facts: dict[str, Any], made_by: dict[str, Any]) -> list[str]:
        inputs = [name for name in ("pictures", "words") if facts[name] != sample.facts[name]]
        return inputs or [name for name in {**made_by, **recipe} if made_by.get(name) != recipe.get(name)]

    fewest = min((differences(facts, made_by) for facts, made_by in known), key=len)
    return f"{' and '.join(fewest)} changed" if fewest else "damaged or quarantined before"
