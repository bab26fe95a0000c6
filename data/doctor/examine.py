"""The doctor's work: rows checked by worker processes in chunks, folded here in their order.

The result does not depend on the number of workers. Memory grows by 32 bytes a row and 32 a picture, whatever they
hold. No torch here.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data.doctor.checks import ERROR, KINDS, Problem, RowChecker, row_hash
from data.doctor.places import FirstPlaces
from data.doctor.report import UNITS, Example, Histogram, QuarantineFile
from data.messages.rows import Row, RowError
from data.mixture.order import Source, load_mixture
from data.mixture.quarantine import named
from data.mixture.wording import Worded
from data.notices import Notices
from data.quotes import shortened, without_pictures
from data.records.converters import AUTO
from data.records.reading import Record, Records
from data.shapes.dataset import mapping
from nexus_gen.pictures.images import StoredImage
from nexus_gen.specs.errors import UserError

ROWS_PER_CHUNK = 256
INDEX_BITS = 40  # a place is the number of a dataset above this many bits of a row's index
EXAMPLES = 8  # kept per kind of problem
EXCERPT = 120  # characters of a conversation
ROLES = ("heldout", "train")  # in reading order: leaks are found when training rows come


class Chunk(NamedTuple):
    """The rows [first, last) of the number-th dataset."""

    number: int
    first: int
    last: int


class About(NamedTuple):
    """What names a row with problems; `named`: to a quarantine file."""

    where: str
    id: str
    words: str
    named: dict[str, Any]


@dataclass
class ChunkReport:
    """What a worker found. rows: index and hash (n, 2) of the rows that can be read. pictures: theirs, (n, 4).

    The columns of pictures: index of the row, number within it, identity, hash of the name. problems: by index.
    """

    num_rows: int
    left_out: int
    rows: np.ndarray
    pictures: np.ndarray
    problems: dict[int, list[Problem]]
    about: dict[int, About]
    tasks: Counter[str]
    languages: Counter[str]
    labels: set[str]
    notices: Notices
    histograms: dict[str, Histogram]


@dataclass(frozen=True)
class Dataset:
    """A file or folder of rows. sources: the entries of a mixture that draw from it, or one that takes all as they are.

    beside: of the folder that it is in, what was passed over.
    """

    role: str
    records: Records
    sources: tuple[Source, ...]
    beside: dict[Path, Notices] = field(default_factory=dict)

    def parse(self, record: Record) -> Row | RowError:
        """A row, or what is wrong with its form."""
        try:
            return self.sources[0].parse(record)
        except RowError as error:
            return error

    def takes(self, row: Row) -> bool:
        return any(source.takes(row) for source in self.sources)

    def load(self, index: int) -> tuple[Record, Row | RowError]:
        """A row again, to name it and to show it."""
        record = self.records[index]
        return record, self.parse(record)

    def chunks(self, number: int) -> Iterator[Chunk]:
        """Its rows in equal pieces, or in those that are read as a whole, so that one worker reads each."""
        whole = self.records.chunks
        starts = whole if len(whole) > 1 else range(0, len(self.records), ROWS_PER_CHUNK)
        for first, last in pairwise([*starts, len(self.records)]):
            yield Chunk(number, first, last)


def open_datasets(
    datasets: Iterable[tuple[str, Path]], row_format: str = AUTO, picture_root: Path | None = None
) -> list[Dataset]:
    """Every file once of datasets and mixtures, given as (role, path); held-out ones first.

    row_format: of files that no mixture names. picture_root: what picture paths are relative to, unless a mixture says
    so; the file unless given. Raises UserError for one that cannot be opened or holds no rows.
    """
    opened: dict[tuple[str, Path, Path | None], Dataset] = {}
    for role, path in sorted(datasets, key=lambda dataset: ROLES.index(dataset[0])):
        spec = load_mixture(path, picture_root)
        if spec.is_mixture and row_format != AUTO:
            raise UserError(f"--format {row_format} has no effect on {path}; give the format of each source there")
        for source in spec.sources:
            for file in source.files:
                same = opened.get((role, file, source.root))
                taken = source if spec.is_mixture else replace(source, format=row_format)
                records = same.records if same else source.open(file)
                sources = (*(same.sources if same else ()), taken)
                beside = dict(source.notices) if file == source.files[0] else {}
                opened[role, file, source.root] = Dataset(role, records, sources, beside)
    for dataset in opened.values():
        if not len(dataset.records):
            raise UserError(f"{dataset.records.path} holds no rows; each is one JSON object with images and messages")
    return list(opened.values())


@dataclass
class DatasetReport:
    """rows = good + quarantined + left_out.

    A row with an error is quarantined; one of tasks or languages that its mixture does not take is left out.
    """

    path: Path
    role: str
    rows: int = 0
    good: int = 0
    quarantined: int = 0
    left_out: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    labels: set[str] = field(default_factory=set)


@dataclass
class Report:
    """What the doctor found. rows_with: kind -> number of rows. num_distinct: pictures to train on.

    notices: of each file or folder. errors: warnings that are to be errors here. stopped: before the end, at as many
    broken rows as were allowed. mistakes: of mixtures. wording: of the rows to train on, by task and language.
    """

    datasets: list[DatasetReport] = field(default_factory=list)
    rows_with: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram(name) for name in UNITS})
    notices: dict[Path, Notices] = field(default_factory=dict)
    num_distinct: int = 0
    errors: frozenset[str] = frozenset()
    settings: str = ""
    stopped: bool = False
    mistakes: list[str] = field(default_factory=list)
    wording: Mapping[tuple[str, str], Worded] = field(default_factory=dict)

    def severity(self, kind: str) -> str:
        """Of a kind of problem; one that is not known is an error."""
        return ERROR if kind in self.errors else KINDS.get(kind, (ERROR, ""))[0]

    @property
    def left_out(self) -> int:
        return sum(dataset.left_out for dataset in self.datasets)

    @property
    def num_quarantined(self) -> int:
        return sum(dataset.quarantined for dataset in self.datasets)


# Set before workers are forked, which share the tokenizer and the places of rows.
_checker: RowChecker
_datasets: list[Dataset]


def about(record: Record, row: Row | RowError) -> About:
    if isinstance(row, RowError):
        values = record.values or {}
        words = json.dumps(without_pictures(values), ensure_ascii=False) if values else ""
        return About(record.where, shortened(str(values.get("id", ""))), words[:EXCERPT], named(record))
    words = " / ".join(message["content"] for message in row.messages)[:EXCERPT]
    return About(record.where, row.id, words, named(record))


def check_chunk(chunk: Chunk) -> ChunkReport:
    """All checks of the rows of a chunk that need no other chunk."""
    dataset = _datasets[chunk.number]
    loaded = [(record, dataset.parse(record)) for record in dataset.records.span(chunk.first, chunk.last)]
    read = [(index, row) for index, (_, row) in enumerate(loaded, start=chunk.first) if isinstance(row, Row)]
    good = [(index, row) for index, row in read if dataset.takes(row)]
    pictures = [_checker.pictures(row) for _, row in good]
    lengths = _checker.measure([row for _, row in good], pictures)
    hashes = [(index, row_hash(row, of_row)) for (index, row), of_row in zip(good, pictures, strict=True)]
    problems = {
        index: [Problem(row.kind, row.problem)]
        for index, (_, row) in enumerate(loaded, start=chunk.first)
        if isinstance(row, RowError)
    }
    histograms = {name: Histogram(name) for name in UNITS}
    for (index, row), of_row, length in zip(good, pictures, lengths, strict=True):
        if found := _checker.problems(row, of_row, length):
            problems[index] = found
        histograms["characters"].add(sum(len(message["content"]) for message in row.messages))
        if length is not None:
            histograms["tokens"].add(length.total)
        for picture in of_row:
            if picture.size is not None:
                histograms["resolution"].add(math.sqrt(math.prod(picture.size)))
                histograms["aspect"].add(picture.size[0] / picture.size[1])
    return ChunkReport(
        num_rows=len(loaded),
        left_out=len(read) - len(good),
        rows=np.array(hashes, dtype=np.uint64).reshape(-1, 2),
        pictures=np.array(
            [
                (index, number, picture.identity, picture.name_hash)
                for (index, _), of_row in zip(good, pictures, strict=True)
                for number, picture in enumerate(of_row)
            ],
            dtype=np.uint64,
        ).reshape(-1, 4),
        problems=problems,
        about={index: about(*loaded[index - chunk.first]) for index in problems},
        tasks=Counter(row.task for _, row in good),
        languages=Counter(row.language for _, row in good),
        labels={label for _, row in good for label in row.labels},
        notices=Notices(notice for _, row in good for notice in row.notices),
        histograms=histograms,
    )


class Doctor:
    """Folds the reports of chunks in their order, and finds what only the whole shows: duplicates and leaks."""

    def __init__(self, report: Report, quarantine: QuarantineFile | None) -> None:
        self.report, self._quarantine = report, quarantine
        self._rows = {role: FirstPlaces() for role in ROLES}
        self._contents = {role: FirstPlaces() for role in ROLES}
        self._names = {role: FirstPlaces() for role in ROLES}

    def fold(self, number: int, chunk: ChunkReport) -> None:
        """Take in the next chunk of the number-th dataset."""
        dataset = self.report.datasets[number]
        self._compare_rows(number, chunk)
        self._compare_pictures(number, chunk)
        dataset.tasks += chunk.tasks
        dataset.languages += chunk.languages
        dataset.labels |= chunk.labels
        if chunk.notices:
            self.report.notices.setdefault(dataset.path, Notices()).update(chunk.notices)
        for name, histogram in chunk.histograms.items():
            self.report.histograms[name].counts += histogram.counts
        quarantined = 0
        for index in sorted(chunk.problems):
            problems = chunk.problems[index]
            where, row_id, words, names = chunk.about.get(index) or about(*_datasets[number].load(index))
            for kind, of_kind in groupby(sorted(problems, key=attrgetter("kind")), key=attrgetter("kind")):
                self.report.rows_with[kind] += 1
                examples = self.report.examples.setdefault(kind, [])
                if len(examples) < EXAMPLES:
                    problem = next(of_kind)
                    picture = self._picture(number, index, problem.picture)
                    examples.append(Example(where, row_id, problem.reason, picture, words))
            if errors := [problem for problem in problems if self.report.severity(problem.kind) == ERROR]:
                quarantined += 1
                if self._quarantine:
                    self._quarantine.add(names, row_id, errors)
        dataset.rows += chunk.num_rows
        dataset.quarantined += quarantined
        dataset.left_out += chunk.left_out
        dataset.good += chunk.num_rows - quarantined - chunk.left_out

    def _picture(self, number: int, index: int, picture: int) -> StoredImage | None:
        """A picture of a row, or its first for a problem of the row as a whole."""
        row = _datasets[number].load(index)[1]
        return row.images[max(picture, 0)] if isinstance(row, Row) and row.images else None

    def _where(self, place: np.uint64) -> str:
        number, index = divmod(int(place), 1 << INDEX_BITS)
        return _datasets[number].records[index].where

    def _compare_rows(self, number: int, chunk: ChunkReport) -> None:
        role = self.report.datasets[number].role
        indices, hashes = chunk.rows.T
        places = indices | np.uint64(number << INDEX_BITS)
        first = self._rows[role].add(hashes, places)
        for n in np.flatnonzero(first != places).tolist():
            problem = Problem("duplicate_row", f"the same as {self._where(first[n])}")
            chunk.problems.setdefault(int(indices[n]), []).append(problem)
        if role == "train":
            known, at = self._rows["heldout"].find(hashes)
            for n in np.flatnonzero(known).tolist():
                problem = Problem("leaked_row", f"the same as the held-out {self._where(at[n])}")
                chunk.problems.setdefault(int(indices[n]), []).append(problem)

    def _compare_pictures(self, number: int, chunk: ChunkReport) -> None:
        role = self.report.datasets[number].role
        indices, _, identities, names = chunk.pictures.T
        places = indices | np.uint64(number << INDEX_BITS)
        first = self._contents[role].add(identities, places)
        new_name = self._names[role].add(names, places) == places
        for n in np.flatnonzero(new_name & (first != places)).tolist():
            self._blame(number, chunk, n, "duplicate_picture", f"has the content of one of {self._where(first[n])}")
        if role == "train":
            known, at = self._contents["heldout"].find(identities)
            for n in np.flatnonzero(known).tolist():
                self._blame(number, chunk, n, "leaked_picture", f"is one of the held-out {self._where(at[n])}")

    def _blame(self, number: int, chunk: ChunkReport, n: int, kind: str, words: str) -> None:
        """A problem of the n-th picture of a chunk."""
        index, picture = chunk.pictures[n, :2].tolist()
        problem = Problem(kind, f"picture {self._picture(number, index, picture)} {words}", picture)
        chunk.problems.setdefault(index, []).append(problem)

    def close(self, stopped: bool) -> Report:
        self.report.stopped = stopped
        self.report.num_distinct = len(self._contents["train"])
        return self.report


def examine(
    datasets: list[Dataset],
    checker: RowChecker,
    *,
    errors: frozenset[str] = frozenset(),
    quarantine: QuarantineFile | None = None,
    max_errors: int | None = None,
    num_workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Check what `open_datasets` opened.

    errors: kinds of warnings that are to be errors. max_errors: stop when so many rows are broken. num_workers:
    processes, one for each core unless given. Raises UserError when one of them is ended from outside.
    """
    global _checker, _datasets
    _checker, _datasets = checker, datasets
    report = Report([DatasetReport(dataset.records.path, dataset.role) for dataset in datasets], errors=errors)
    for dataset in datasets:
        for path, notices in [(dataset.records.path, dataset.records.notices), *dataset.beside.items()]:
            if notices:
                report.notices.setdefault(path, Notices()).update(notices)
    doctor, stopped = Doctor(report, quarantine), False
    chunks = [chunk for number, dataset in enumerate(datasets) for chunk in dataset.chunks(number)]
    num_rows = sum(len(dataset.records) for dataset in datasets)
    with ExitStack() as stack:
        map_chunks = stack.enter_context(mapping(num_workers or len(os.sched_getaffinity(0))))
        reports = map_chunks(check_chunk, chunks)  # workers start here, before the bar's thread does
        bar = stack.enter_context(
            tqdm(total=num_rows, unit=" rows", unit_scale=True, disable=None if progress else True)
        )
        for chunk, found in zip(chunks, reports, strict=True):
            doctor.fold(chunk.number, found)
            bar.update(found.num_rows)
            stopped = max_errors is not None and report.num_quarantined >= max_errors
            if stopped:
                break
    return doctor.close(stopped)
