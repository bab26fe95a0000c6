"""The doctor of message datasets: everything that would break or bend a training run, found before one starts.

nexus-gen data check train.jsonl --heldout heldout.jsonl --report check.html --quarantine quarantine.jsonl
nexus-gen data check --config runs/mine/pretrain/config.yaml

Rows are checked by worker processes in chunks and folded here in their order, so the result does not depend on the
number of workers. Memory grows by 32 bytes a row and 32 a picture, whatever they hold. No torch here.
"""

import argparse
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from data.checks import ERROR, KINDS, LEVELS, WARNING, Problem, RowChecker, row_hash
from data.converters import AUTO, CONVERTERS
from data.doctor_report import UNITS, Example, Histogram, QuarantineFile, print_table, write_page
from data.messages import Row, RowError, parse_record
from data.places import FirstPlaces
from data.records import Record, Records, open_records
from data.shapes import mapping
from data.token_lengths import TokenLengths
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.images import StoredImage

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
    """What names a row with problems."""

    where: str
    id: str
    words: str


@dataclass
class ChunkReport:
    """What a worker found. rows: index and hash (n, 2) of the rows that can be read. pictures: theirs, (n, 4).

    The columns of pictures: index of the row, number within it, identity, hash of the name. problems: by index.
    """

    num_rows: int
    rows: np.ndarray
    pictures: np.ndarray
    problems: dict[int, list[Problem]]
    about: dict[int, About]
    tasks: Counter[str]
    languages: Counter[str]
    histograms: dict[str, Histogram]


@dataclass
class DatasetReport:
    """rows = good + quarantined; a row with an error is quarantined."""

    path: Path
    role: str
    rows: int = 0
    good: int = 0
    quarantined: int = 0
    tasks: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)


@dataclass
class Report:
    """What the doctor found. rows_with: kind -> number of rows. errors: warnings that are to be errors here.

    stopped: --max-errors was reached.
    """

    datasets: list[DatasetReport] = field(default_factory=list)
    rows_with: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram(name) for name in UNITS})
    num_distinct: int = 0
    errors: frozenset[str] = frozenset()
    settings: str = ""
    stopped: bool = False

    def severity(self, kind: str) -> str:
        """Of a kind of problem; one that is not known is an error."""
        return ERROR if kind in self.errors else KINDS.get(kind, (ERROR, ""))[0]

    @property
    def num_quarantined(self) -> int:
        return sum(dataset.quarantined for dataset in self.datasets)


# Set before workers are forked, which share the tokenizer and the places of rows.
_checker: RowChecker
_datasets: list[Records]


def chunks_of(number: int, records: Records) -> Iterator[Chunk]:
    """The rows of a dataset in equal pieces, or in those that are read as a whole, so that one worker reads each."""
    starts = records.chunks if len(records.chunks) > 1 else range(0, len(records), ROWS_PER_CHUNK)
    for first, last in pairwise([*starts, len(records)]):
        yield Chunk(number, first, last)


def parse(record: Record) -> Row | RowError:
    """A row, or what is wrong with its form."""
    try:
        return parse_record(record, _checker.row_format)
    except RowError as error:
        return error


def load(number: int, index: int) -> tuple[Record, Row | RowError]:
    """A row of a dataset again, to name it and to show it."""
    record = _datasets[number][index]
    return record, parse(record)


def about(record: Record, row: Row | RowError) -> About:
    if isinstance(row, RowError):
        return About(record.where, str((record.values or {}).get("id", "")), "")
    return About(record.where, row.id, " / ".join(message["content"] for message in row.messages)[:EXCERPT])


def check_chunk(chunk: Chunk) -> ChunkReport:
    """All checks of the rows of a chunk that need no other chunk."""
    loaded = [(record, parse(record)) for record in _datasets[chunk.number].span(chunk.first, chunk.last)]
    good = [(index, row) for index, (_, row) in enumerate(loaded, start=chunk.first) if isinstance(row, Row)]
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
        for name, histogram in chunk.histograms.items():
            self.report.histograms[name].counts += histogram.counts
        quarantined = 0
        for index in sorted(chunk.problems):
            problems = chunk.problems[index]
            where, row_id, words = chunk.about.get(index) or about(*load(number, index))
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
                    self._quarantine.add(where, dataset.path, row_id, errors)
        dataset.rows += chunk.num_rows
        dataset.quarantined += quarantined
        dataset.good += chunk.num_rows - quarantined

    def _picture(self, number: int, index: int, picture: int) -> StoredImage | None:
        row = load(number, index)[1]
        return row.images[picture] if isinstance(row, Row) and picture >= 0 else None

    def _where(self, place: np.uint64) -> str:
        number, index = divmod(int(place), 1 << INDEX_BITS)
        return _datasets[number][index].where

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
        self.report.num_distinct = sum(len(places) for places in self._contents.values())
        return self.report


def examine(
    datasets: list[tuple[str, Path]],
    checker: RowChecker,
    *,
    errors: frozenset[str] = frozenset(),
    quarantine: QuarantineFile | None = None,
    max_errors: int | None = None,
    num_workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Check datasets, given as (role, path) with role train or heldout; held-out ones are read first.

    errors: kinds of warnings that are to be errors. max_errors: stop when so many rows are broken. num_workers:
    processes, one for each core unless given. Raises UserError for a dataset that cannot be opened or holds no rows.
    """
    global _checker, _datasets
    _checker = checker
    datasets = sorted(datasets, key=lambda dataset: ROLES.index(dataset[0]))
    _datasets = [open_records(path) for _, path in datasets]
    for records in _datasets:
        if not len(records):
            raise UserError(f"{records.path} holds no rows; each is one JSON object with images and messages")
    report = Report([DatasetReport(path, role) for role, path in datasets], errors=errors)
    doctor, stopped = Doctor(report, quarantine), False
    chunks = [chunk for number, records in enumerate(_datasets) for chunk in chunks_of(number, records)]
    with ExitStack() as stack:
        map_chunks = stack.enter_context(mapping(num_workers or len(os.sched_getaffinity(0))))
        bar = stack.enter_context(
            tqdm(total=sum(map(len, _datasets)), unit=" rows", unit_scale=True, disable=None if progress else True)
        )
        for chunk, found in zip(chunks, map_chunks(check_chunk, chunks), strict=True):
            doctor.fold(chunk.number, found)
            bar.update(found.num_rows)
            stopped = max_errors is not None and report.num_quarantined >= max_errors
            if stopped:
                break
    return doctor.close(stopped)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="nexus-gen data check",
        description="Find what would break or bend a training run in message datasets, before one starts.",
        epilog="Exit status: 0 when no row has an error, 1 when --strict is given and there are warnings, 2 when rows "
        "have errors or the command could not run. Rows with errors are what --quarantine lists.",
    )
    result.add_argument("dataset", nargs="*", type=Path, help="training rows (default: data.train of --config)")
    result.add_argument(
        "--heldout", nargs="+", type=Path, default=[], help="held-out rows: checked too, and leaks into training found"
    )
    result.add_argument(
        "--format", choices=(AUTO, *CONVERTERS), default=AUTO, help="of the rows (default: %(default)s)"
    )
    result.add_argument(
        "--images",
        choices=LEVELS,
        default="decode",
        help="how closely pictures are looked at: not at all, whether the file exists, its size, all of it. Contents "
        "are compared with decode, or with header and --heldout; paths otherwise (default: %(default)s)",
    )
    lengths = result.add_argument_group("token lengths after resizing, as the stage will count them")
    lengths.add_argument("--config", type=Path, help="config.yaml of a stage, or what `nexus-gen run ... --cfg` prints")
    lengths.add_argument("--model", type=Path, help="Qwen2.5-VL directory (default: model.qwen of --config)")
    lengths.add_argument("--max-pixels", type=int, help="bound of context pictures (default: data.max_pixels)")
    lengths.add_argument("--max-length", type=int, help="tokens a row may have (default: data.max_length)")
    output = result.add_argument_group("output")
    output.add_argument("--report", type=Path, help="an HTML page with histograms and thumbnails of the offenders")
    output.add_argument("--quarantine", type=Path, help="JSON lines naming each row with an error, and the reason")
    output.add_argument("--strict", action="store_true", help="warnings give exit status 1")
    output.add_argument(
        "--as-error",
        nargs="+",
        default=[],
        metavar="KIND",
        choices=[kind for kind, (severity, _) in KINDS.items() if severity == WARNING],
        help="warnings that are to count as errors: %(choices)s",
    )
    output.add_argument("--max-errors", type=int, help="stop after about so many broken rows")
    output.add_argument("--num-workers", type=int, help="processes (default: one for each core)")
    return result


def read_config(path: Path) -> dict[str, Any]:
    """What the doctor takes from a stage's config: model, max_pixels, max_length, train, heldout; absent ones None."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        data = values["data"]
        model = values["model"].get("qwen") or values.get("embed", {}).get("autoregressive")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--config {path} is not the config of a stage that reads messages ({error}); give the config.yaml of its "
            "run directory, or what `nexus-gen run stage=pretrain ... --cfg` prints"
        ) from error
    return {"model": model, **{key: data.get(key) for key in ("max_pixels", "max_length", "train", "heldout")}}


def token_lengths(given: argparse.Namespace, config: dict[str, Any]) -> TokenLengths | None:
    """How rows are measured, or None when neither --model nor --config asks for it."""
    model = given.model or config.get("model")
    if given.images in ("none", "exists"):
        for name in ("model", "max_pixels", "max_length"):
            if getattr(given, name):
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with --images {given.images}, which does not learn the "
                    "sizes of pictures; use --images header or decode"
                )
        return None
    if model is None:
        for name in ("max_pixels", "max_length"):
            if getattr(given, name):
                raise UserError(f"--{name.replace('_', '-')} needs --model, whose tokenizer counts")
        return None
    max_pixels = given.max_pixels or config.get("max_pixels")
    if max_pixels is None:
        raise UserError("--model needs --max-pixels, the bound of context pictures; or give --config")
    return TokenLengths(model, max_pixels)


def main(argv: list[str]) -> int:
    """`nexus-gen data check`; argv[0] is the command word."""
    given = parser().parse_args(argv[1:])
    config = read_config(given.config) if given.config else {}
    for name in ("max_pixels", "max_length", "max_errors", "num_workers"):
        if getattr(given, name) is not None and getattr(given, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be above 0")
    train = given.dataset or [Path(config[key]) for key in ("train",) if config.get(key)]
    heldout = given.heldout or [Path(config[key]) for key in ("heldout",) if config.get(key) and not given.dataset]
    if not train:
        raise UserError("no dataset is given; name one, or a --config whose data.train is to be checked")
    lengths = token_lengths(given, config)
    max_length = given.max_length or config.get("max_length")
    by_content = given.images == "decode" or (given.images == "header" and bool(heldout))
    checker = RowChecker(given.images, by_content, lengths, max_length if lengths else None, row_format=given.format)
    with ExitStack() as stack:
        quarantine = stack.enter_context(QuarantineFile(given.quarantine)) if given.quarantine else None
        report = examine(
            labelled(heldout, train),
            checker,
            errors=frozenset(given.as_error),
            quarantine=quarantine,
            max_errors=given.max_errors,
            num_workers=given.num_workers,
            progress=True,
        )
        if quarantine and not report.stopped:
            quarantine.keep()
    report.settings = settings_line(given.images, lengths, checker.max_length)
    print_table(report)
    if given.report:
        write_page(report, given.report)
        print(f"page: {given.report}")
    if given.quarantine:
        print(
            f"quarantine: not written, because reading stopped after {given.max_errors} broken rows"
            if report.stopped
            else f"quarantine: {given.quarantine}"
        )
    if report.num_quarantined:
        return 2
    return int(given.strict and bool(report.rows_with))


def labelled(heldout: Iterable[Path], train: Iterable[Path]) -> list[tuple[str, Path]]:
    return [*(("heldout", path) for path in heldout), *(("train", path) for path in train)]


def settings_line(level: str, lengths: TokenLengths | None, max_length: int | None) -> str:
    looked = {"none": "not looked at", "exists": "looked for", "header": "measured", "decode": "decoded"}[level]
    if lengths is None:
        return f"pictures {looked}; token lengths not measured (--model or --config, with --images header or decode)"
    bound = f"{max_length} tokens allowed" if max_length else "any length allowed"
    return f"pictures {looked}; context pictures bounded by {lengths.max_pixels} pixels, {bound}"
