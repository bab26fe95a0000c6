"""What a run trains on: one dataset file, or a mixture of several, in an order that depends on nothing but the seed.

A mixture is a YAML (or JSON) file:

    epoch_rows: 100000           # optional, with weights: draws that make an epoch; as many as all sources have rows
    sources:
      - path: photos/*.parquet   # a file, a pattern or a folder, relative to this file: `data.records.dataset_files`
        weight: 3                # share of the draws, relative to the other sources
        tasks: [generation]      # only these rows; so are languages: [en, zh]
        captions: {long: 2, short: 1}
      - path: llava.json
        weight: 1
        format: llava            # a key of `data.records.converters.CONVERTERS`; detected unless given
        system: You are helpful. # for rows that have no system message
        picture_root: /pictures  # what picture paths are relative to, the file with the rows unless given

Instead of weights, `count: 5000` gives the rows per epoch; without either a source gives all its rows once per epoch.
The k-th draw out of a source is row k of an endless order in which every pass holds every row once, whatever the epochs
are, so no row is left out for good. The draw at a position is a function of (seed, position): any number of processes,
and a resumed run, see the same. No torch here.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.messages.rows import TASKS, Row, RowError, Summary, count_rows
from data.mixture.memory import folder_files
from data.mixture.quarantine import NOTHING, LeftOut
from data.mixture.rehearsal import num_rehearsed
from data.mixture.spec import Dataset, MixtureSpec, Source, load_mixture
from data.notices import Notices, sentences
from data.records.converters import AUTO
from data.records.reading import ROW_GROUPS_KEPT, Record
from nexus_gen.artifacts.content import file_facts
from nexus_gen.specs.errors import UserError, nearest

log = logging.getLogger(__name__)


Place = tuple[int, int, int]  # of a row: its source, the file there, its number in that file, all from 0


def read_places(
    path: Dataset, left_out: LeftOut = NOTHING, picture_root: str | os.PathLike[str] | None = None
) -> Iterator[tuple[Place, Row | RowError, str]]:
    """Every row of a dataset or a mixture once, in the order of its files, whatever its weights and counts are.

    The text says why a row is left out; it is empty for one that is not.
    """
    spec = load_mixture(path, picture_root)
    seen: set[str] = set()
    repeats = sum(len(source.files) for source in spec.sources) > len(spec.files)
    for source_number, source in enumerate(spec.sources):
        for file_number, file in enumerate(source.files):
            reasons = left_out.of(file)
            for number, record in enumerate(source.open(file)):
                row: Row | RowError
                try:
                    row = source.parse(record)
                except RowError as error:
                    row = error
                if (isinstance(row, Row) and not source.takes(row)) or row.where in seen:
                    continue
                if repeats:
                    seen.add(row.where)
                yield (source_number, file_number, number), row, reasons.get(number, "")


class RowsByPlace:
    """Random access to the rows that `read_places` finds.

    Their files are read through for it here, and not again in processes that this object is sent to.
    """

    def __init__(self, path: Dataset, picture_root: str | os.PathLike[str] | None = None) -> None:
        self._sources = load_mixture(path, picture_root).sources
        self._records = [[source.open(file) for file in source.files] for source in self._sources]
        for records in chain.from_iterable(self._records):
            len(records)

    def __getitem__(self, place: Place) -> Row:
        source, file, number = place
        return self._sources[source].parse(self._records[source][file][number])


def read_dataset(
    path: Dataset, left_out: LeftOut = NOTHING, picture_root: str | os.PathLike[str] | None = None
) -> Iterator[Row]:
    """The rows of `read_places` that are not left out. Raises UserError as `read_rows` does."""
    for _, row, reason in read_places(path, left_out, picture_root):
        if reason:
            continue
        if isinstance(row, RowError):
            raise row
        yield row


def check_dataset(
    path: Dataset,
    max_bad_fraction: float = 0.0,
    left_out: LeftOut = NOTHING,
    picture_root: str | os.PathLike[str] | None = None,
) -> dict[str, int]:
    """Read every row of a dataset or a mixture and ask whether its pictures exist; returns the rows of each task.

    A file that did not change is read once by a process, and again where too many rows were broken: their pictures may
    have come since. Rows that are left out do not count. Raises UserError when a file has more broken rows than that
    fraction (below it, they are left to the trainer), and for what a mixture asks for in vain. Notices of a file are
    logged when it is read first.
    """
    spec = load_mixture(path, picture_root)
    ways = dict.fromkeys((file, source.format, source.root) for source in spec.sources for file in source.files)
    tasks = dict.fromkeys(TASKS, 0)
    found: list[Summary] = []
    for source in spec.sources:
        for folder, notices in source.notices.items():
            _log_once(folder, notices)
    for file, row_format, root in ways:
        out = frozenset(left_out.of(file))
        facts = tuple((inside, *file_facts(inside)) for inside in folder_files(file))
        read = (file, hash(facts), row_format, root, out)
        if read not in _counted or not _counted[read].is_good(max_bad_fraction):
            _counted[read] = count_rows(file, "exists", row_format, out, root)
            _log_once(file, _counted[read].notices)
        found.append(_counted[read].check(max_bad_fraction))
        for task, count in found[-1].tasks.items():
            tasks[task] += count
    for mistake in asked_in_vain(spec, found):
        raise UserError(mistake)
    return {task: count for task, count in tasks.items() if count}


_counted: dict[tuple[Any, ...], Summary] = {}  # by file, its size and times, format, root and rows that are left out
_logged: set[str] = set()


def _log_once(path: Path, notices: Notices) -> None:
    """Say what is not read of a file; checks before a stage and before its pipeline say the same."""
    for _, _, sentence in sentences(notices):
        line = f"notice: {path}: {sentence}"
        if line not in _logged:
            _logged.add(line)
            log.warning("%s", line)


class Found(Protocol):
    """What reading a file found in it."""

    path: Path
    tasks: Counter[str]
    labels: set[str]


def asked_in_vain(spec: MixtureSpec, found: Iterable[Found]) -> Iterator[str]:
    """What the sources of a mixture say of tasks and labels that none of their rows have."""
    of_path: dict[Path, list[Found]] = {}
    for of_file in found:
        of_path.setdefault(of_file.path, []).append(of_file)
    for number, source in enumerate(spec.sources, start=1):
        own = [of_file for file in source.files for of_file in of_path[file]]
        if source.tasks and not any(of_file.tasks[task] for of_file in own for task in source.tasks):
            yield f"{spec.path}, source {number}: {source.path} holds no {' '.join(source.tasks)} rows; take it out"
            continue
        labels = {label for of_file in own for label in of_file.labels if label}
        for label in source.captions:
            if label not in labels:
                hint = nearest(label, labels) or "; they have none"
                yield f"{spec.path}, source {number}: captions weighs {label!r}, no label of its texts{hint}"


@dataclass(frozen=True)
class Draw:
    """One sample of the training order: which row, and in which pass over its source."""

    source: int
    place: int
    turn: int


class Mixture:
    """The endless training order over a dataset's rows, but for those that are left out.

    own_rows, rehearsal_rows: rows to draw from. num_left_out: of those that the dataset's own sources would take.
    counts: rows of an epoch by source; epoch_rows: of all, and epoch_rehearsal of them are the rehearsal's.
    row_format: of files that no mixture names. Raises UserError for a source that has no rows then.
    The files are read through here, and not again in processes that this object is sent to.
    """

    def __init__(
        self,
        path: Dataset,
        seed: int,
        left_out: LeftOut = NOTHING,
        picture_root: str | os.PathLike[str] | None = None,
        row_format: str = AUTO,
    ) -> None:
        self.spec = load_mixture(path, picture_root)
        if row_format != AUTO and not self.spec.is_mixture:
            self.spec = replace(self.spec, sources=tuple(replace(one, format=row_format) for one in self.spec.sources))
        self.seed = seed
        self._rows = [_SourceRows(source, left_out) for source in self.spec.sources]
        own = self._rows[: self.spec.num_own]
        self.num_left_out = sum(rows.num_left_out for rows in own)
        self.own_rows = sum(len(rows) for rows in own)
        self.rehearsal_rows = len(self) - self.own_rows
        self.counts = _counts(self.spec, [len(rows) for rows in self._rows])
        self.epoch_rows = sum(self.counts)
        self.epoch_rehearsal = sum(self.counts[self.spec.num_own :])
        self._remember_orders()

    def _remember_orders(self) -> None:
        self._order = lru_cache(maxsize=2 * len(self._rows))(self._order_of)
        self._epoch = lru_cache(maxsize=2)(self._epoch_of)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_order", "_epoch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember_orders()

    def __len__(self) -> int:
        """Rows to draw from, of all sources together."""
        return sum(len(rows) for rows in self._rows)

    def draw(self, position: int) -> Draw:
        """What stands at a position of the training order, from 0 on."""
        epoch, place = divmod(position, self.epoch_rows)
        sources, ranks = self._epoch(epoch)
        source = int(sources[place])
        turn, place = divmod(epoch * self.counts[source] + int(ranks[place]), len(self._rows[source]))
        return Draw(source, int(self._order(source, turn)[place]), turn)

    def replacement(self, position: int, attempt: int) -> Draw:
        """What takes the place of a bad sample: any row of the same source. attempt: from 1, for bad ones in turn."""
        drawn = self.draw(position)
        generator = np.random.default_rng((self.seed, position, attempt))
        return replace(drawn, place=int(generator.integers(len(self._rows[drawn.source]))))

    def record(self, draw: Draw) -> Record:
        """The raw row of a draw."""
        return self._rows[draw.source].record(draw.place)

    def row(self, draw: Draw) -> Row:
        """The row of a draw, with one of its texts where it offers several. Raises RowError."""
        source = self.spec.sources[draw.source]
        row = source.parse(self.record(draw))
        return row.drawn(np.random.default_rng((self.seed, draw.source, draw.turn, draw.place)), source.captions)

    def _order_of(self, source: int, turn: int) -> np.ndarray:
        return self._rows[source].order(np.random.default_rng((self.seed, source, turn)))

    def _epoch_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Per place of an epoch its source, and how many draws of that source come before it."""
        sources = np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)
        sources = np.random.default_rng((self.seed, epoch)).permutation(sources)
        ranks = np.empty(len(sources), dtype=np.int64)
        for source in range(len(self.counts)):
            places = np.flatnonzero(sources == source)
            ranks[places] = np.arange(len(places))
        return sources, ranks


class _SourceRows:
    """The rows of a source's files that are of its tasks and languages, by index. A broken row counts: it has to be
    named when its turn comes, unless it is left out."""

    def __init__(self, source: Source, left_out: LeftOut) -> None:
        self._files = [source.open(file) for file in source.files]
        self._starts = np.cumsum([0, *(len(records) for records in self._files)])
        self._chunks = np.concatenate(
            [np.array(records.chunks) + start for records, start in zip(self._files, self._starts[:-1], strict=True)]
        )
        self._selected = np.arange(self._starts[-1])
        if source.tasks or source.languages:
            self._selected = np.array([n for n in self._selected if self._is_taken(source, n)], dtype=np.int64)
        indices = [
            start + index
            for file, start in zip(source.files, self._starts[:-1], strict=True)
            for index in left_out.of(file)
        ]
        num_selected = len(self._selected)
        if indices:
            self._selected = self._selected[~np.isin(self._selected, indices)]
        self.num_left_out = num_selected - len(self._selected)
        if not len(self._selected):
            wanted = " ".join([*source.tasks, *source.languages, "rows"])
            quarantined = f" but the {self.num_left_out} that are quarantined" if self.num_left_out else ""
            raise UserError(f"{source.path} holds no {wanted}{quarantined}; take the source out")

    def _is_taken(self, source: Source, index: int) -> bool:
        try:
            return source.takes(source.parse(self._at(index)))
        except RowError:
            return True

    def _at(self, index: int) -> Record:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._files[file][int(index - self._starts[file])]

    def __len__(self) -> int:
        return len(self._selected)

    def record(self, place: int) -> Record:
        return self._at(self._selected[place])

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """A permutation of the rows. Rows of files that are read piece by piece (Parquet) are shuffled within windows
        of a few pieces, in an order of windows that is shuffled too: a piece is then read once and not for each row."""
        if len(self._chunks) == len(self._files):
            return generator.permutation(len(self))
        window_of_chunk = generator.permutation(len(self._chunks)) // ROW_GROUPS_KEPT
        windows = window_of_chunk[np.searchsorted(self._chunks, self._selected, side="right") - 1]
        return np.lexsort((generator.random(len(self)), windows))


def _counts(spec: MixtureSpec, sizes: Sequence[int]) -> list[int]:
    """Rows of an epoch that come from each source; those of the rehearsal come on top of a dataset's own."""
    if spec.rehearsal:
        own = _counts(replace(spec, sources=spec.sources[: spec.num_own], rehearsal=None), sizes[: spec.num_own])
        shares = _counts(spec.rehearsal, sizes[spec.num_own :])
        return own + apportioned(shares, num_rehearsed(sum(own), spec.rehearsal_share))
    weights = [source.weight for source in spec.sources if source.weight is not None]
    if not weights:
        return [source.count or size for source, size in zip(spec.sources, sizes, strict=True)]
    total = spec.epoch_rows or sum(sizes)
    counts = apportioned(weights, total)
    if not all(counts):
        raise UserError(
            f"{spec.path}: source {int(np.argmin(counts)) + 1} has weight {weights[int(np.argmin(counts))]} of "
            f"{sum(weights)}, less than one of {total} rows; raise it, or epoch_rows"
        )
    return counts


def apportioned(shares: Sequence[float], total: int) -> list[int]:
    """`total` whole rows in these proportions, by the largest remainders."""
    exact = np.array(shares, dtype=float) / sum(shares) * total
    counts = np.floor(exact).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[place] += 1
    return counts.tolist()
