"""Which rows become which samples of which shards, under which content address, and why a sample is not there yet.

A plan is a function of the dataset and of the recipe (how embeddings are made): never of what was embedded before, by
how many processes or in which order. What was embedded before is looked up in it by address. No torch here: launchers
ask whether a stage has anything to do.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data.messages.rows import RowError
from data.mixture.memory import remembered
from data.mixture.order import Place, read_places
from data.mixture.pictures import PictureHashes, place_of
from data.mixture.quarantine import LeftOut
from data.mixture.rehearsal import chosen, num_rehearsed
from data.mixture.spec import Dataset, MixtureSpec, load_mixture
from data.shards.files import Listing, checksum, index_shard, read_member
from nexus_gen.artifacts.artifact import digest
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import IMAGE_TAG

log = logging.getLogger(__name__)

ROWS = "rows_{split}.jsonl"  # what was read of a split
READING = 1  # raise it when `_read` says something else of the same rows


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
    num_rehearsed: how many of `rows`, the last, are of the rehearsal; num_wanted: as many as its share asks for.
    """

    split: str
    rows: list[RowFacts]
    unusable: list[dict[str, str]]
    num_rehearsed: int = 0
    num_wanted: int = 0

    @staticmethod
    def read(
        split: str,
        dataset: Dataset,
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
        spec = load_mixture(dataset, picture_root)
        rows: list[RowFacts] = []
        unusable = []
        key = [READING, task, all_pictures, left_out.key, *([picture_root] if picture_root else [])]
        found = remembered(memory, key, spec.read_files, lambda: _read(spec, task, all_pictures, left_out))
        kept = _Rehearsed(spec)
        hashed = hashes.of_rows(kept.of(found), lambda row: row[-1])
        for (place, where, row_id, source, caption, words, reason, _), pictures in hashed:
            if reason:
                unusable.append({"where": where, "id": row_id, "reason": reason})
            else:
                rows.append(RowFacts(tuple(place), where, row_id, source, caption, pictures, words))
        return SplitRows(split, rows, unusable, kept.num_rehearsed, kept.num_wanted)

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


class _Rehearsed:
    """Of the rows of a dataset, its own and as many of its rehearsal as the share of that asks for."""

    def __init__(self, spec: MixtureSpec) -> None:
        self._spec = spec
        self.num_rehearsed = self.num_wanted = 0

    def of(self, rows: Iterable[list[Any]]) -> Iterator[list[Any]]:
        """Rows as `_read` gives them, those of the rehearsal last; of these, unusable ones are passed over."""
        num_own, rehearsal = 0, []
        for row in rows:
            (source, *_), reason = row[0], row[-2]
            if source < self._spec.num_own:
                num_own += not reason
                yield row
            elif not reason:
                rehearsal.append(row)
        self.num_wanted = num_rehearsed(num_own, self._spec.rehearsal_share)
        places = chosen(len(rehearsal), self.num_wanted)
        self.num_rehearsed = len(places)
        yield from (rehearsal[place] for place in places)


def _read(spec: MixtureSpec, task: str, all_pictures: bool, left_out: LeftOut) -> Iterator[list[Any]]:
    """Of every row of the task: place, where, id, source, caption, hash of its words, why it is unusable, pictures."""
    for place, row, reason in read_places(spec, left_out):
        where = row.where.removeprefix(f"{spec.path.parent}/")
        if isinstance(row, RowError):
            yield [place, where, "", "", "", "", reason or row.problem, []]
        elif row.task == task:
            if not reason and row.messages[-1]["content"].count(IMAGE_TAG) != 1:
                reason = "its last reply does not hold exactly one picture"
            caption, words = row.messages[-2]["content"], digest(row.messages)
            pictures = [] if reason else row.images[0 if all_pictures else -1 :]
            yield [place, where, row.id, row.source, caption, words, reason, [*map(place_of, pictures)]]


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
