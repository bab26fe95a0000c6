"""What the doctor writes: a table on the terminal, an HTML page with thumbnails, and the quarantine file."""

import base64
import io
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import ImageFile

from data.doctor.checks import ERROR, KINDS, NOTICE, WARNING, Problem
from data.doctor.wording import wording_lines, wording_warnings
from data.notices import sentences
from nexus_gen.artifacts.artifact import write_text_atomic
from nexus_gen.pictures.images import StoredImage, open_image
from nexus_gen.specs.errors import UserError

if TYPE_CHECKING:
    from data.doctor.examine import Report

THUMBNAIL = 112  # pixels
BASE = math.sqrt(2)  # bins grow by this factor
UNITS = {
    "resolution": ("Resolution", "pixels, square root of the area"),
    "aspect": ("Aspect ratio", "width : height"),
    "tokens": ("Row length", "tokens, pictures after resizing included"),
    "characters": ("Text length", "characters of a row"),
}


class Example(NamedTuple):
    """One offender. picture: the one that the problem is about, if any. words: the beginning of its conversation."""

    where: str
    id: str
    reason: str
    picture: StoredImage | None
    words: str


@dataclass
class Histogram:
    """Counts of positive values in bins that grow by sqrt(2): bin n holds [2^(n/2), 2^((n+1)/2))."""

    name: str
    counts: Counter[int] = field(default_factory=Counter)

    def add(self, value: float) -> None:
        self.counts[math.floor(math.log(max(value, 1e-9), BASE) + 1e-9)] += 1

    @property
    def total(self) -> int:
        return self.counts.total()

    def bars(self) -> list[tuple[str, int, float]]:
        """Label, count, and share of the highest bar, for every bin between the lowest and the highest."""
        highest = max(self.counts.values())
        bins = range(min(self.counts), max(self.counts) + 1)
        return [(self._label(n), self.counts[n], self.counts[n] / highest) for n in bins]

    def _label(self, n: int) -> str:
        if self.name != "aspect":
            return f"{BASE**n:.0f}"
        return f"{BASE**n:.1f}:1" if n >= 0 else f"1:{BASE**-n:.1f}"


class QuarantineFile:
    """JSON lines of rows that training should leave out; it appears whole, when `keep` was called, or not at all.

    A line holds what `data.quarantine` names a row by, then id, severity, the kind of the first error, all reasons.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> "QuarantineFile":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._aside, "w", encoding="utf-8", errors="backslashreplace")
        return self

    def add(self, names: dict[str, Any], row_id: str, errors: Sequence[Problem]) -> None:
        values = {
            **names,
            "id": row_id,
            "severity": ERROR,
            "kind": errors[0].kind,
            "reason": "; ".join(dict.fromkeys(problem.reason for problem in errors)),
        }
        self._file.write(json.dumps(values, ensure_ascii=False) + "\n")

    def keep(self) -> None:
        self._file.close()
        os.replace(self._aside, self._path)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._aside.unlink(missing_ok=True)


def kinds_found(report: "Report") -> list[str]:
    """Errors before warnings, the most frequent first."""
    return sorted(report.rows_with, key=lambda kind: (report.severity(kind) != ERROR, -report.rows_with[kind], kind))


def notice_lines(report: "Report") -> Iterator[tuple[Path, str, int, str]]:
    """File or folder, kind, number of rows or files, and sentence of every notice."""
    for path, notices in report.notices.items():
        yield from ((path, *line) for line in sentences(notices))


def shares(counts: Counter[str]) -> str:
    return ", ".join(
        f"{number:,} {name}" for name, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )


def printable(text: str) -> str:
    """Halves of surrogate pairs, which broken rows and names in tars may hold, are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shortener(report: "Report") -> Callable[[str], str]:
    """A filter that leaves the directories of the datasets out of a sentence; their list says them once."""
    directories = {f"{dataset.path.parent}{os.sep}" for dataset in report.datasets} - {f".{os.sep}"}
    pattern = re.compile("|".join(map(re.escape, sorted(directories, key=len, reverse=True))) or "(?!)")
    return lambda text: pattern.sub("", text)


def print_table(report: "Report") -> None:
    short, width = shortener(report), shutil.get_terminal_size((160, 24)).columns
    for dataset in report.datasets:
        counts = f"{dataset.rows:,} rows = {dataset.good:,} good + {dataset.quarantined:,} quarantined"
        left_out = f" + {dataset.left_out:,} left out by the mixture" if dataset.left_out else ""
        print(f"{dataset.path} ({dataset.role}): {counts}{left_out}")
        if dataset.tasks:
            print(f"  {shares(dataset.tasks)}; {shares(dataset.languages)}")
    print(f"{report.num_distinct:,} distinct pictures to train on; {report.settings}")
    notices = list(notice_lines(report))
    if report.rows_with or notices:
        column = max(len(kind) for kind in ("problem", *report.rows_with, *(kind for _, kind, _, _ in notices)))
        print(f"\n{'':7}  {'problem':<{column}}  {'rows':>9}  first")
        for kind in kinds_found(report):
            first = f"{report.examples[kind][0].where}: {report.examples[kind][0].reason}"
            line = f"{report.severity(kind):7}  {kind:<{column}}  {report.rows_with[kind]:>9,}  {short(first)}"
            print(printable(line if len(line) <= width else f"{line[: width - 1]}…"))
        for path, kind, count, sentence in notices:
            line = f"{NOTICE:7}  {kind:<{column}}  {count:>9,}  {short(str(path))}: {sentence}"
            print(printable(line if len(line) <= width else f"{line[: width - 1]}…"))
        print()
    warnings = list(wording_warnings(report.wording))
    print_wording(report, warnings)
    if report.stopped:
        print(f"stopped at {report.num_quarantined:,} broken rows (--max-errors); the counts are of what was read")
    elif not report.rows_with and not report.mistakes and not warnings:
        print("nothing is wrong")
    for mistake in report.mistakes:
        print(printable(f"error    {mistake}"))


def print_wording(report: "Report", warnings: Sequence[str]) -> None:
    """How rows are worded: a line for each task and language, what says the same to a command, and the warnings."""
    lines = list(wording_lines(report.wording))
    if lines:
        print("\nwording of the rows, which generate, edit and understand will take over from the checkpoint")
    name_width = max((len(line.name) for line in lines), default=0)
    for line in lines:
        reply = f"; reply {line.reply}" if line.reply else ""
        print(printable(f"  {line.name:<{name_width}}  {line.share} {line.worded}, such as {line.message}{reply}"))
        if line.option:
            print(printable(f"  {'':{name_width}}  for a checkpoint without this record: {line.option}"))
    for warning in warnings:
        print(printable(f"{WARNING:7}  wording: {warning}"))
    if lines:
        print()


def thumbnail(source: StoredImage) -> str:
    """A data URL of a picture, made small, of a damaged one as far as it goes; empty where nothing can be shown."""
    strict, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        image = open_image(source)
    except UserError:
        return ""
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = strict
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(report: "Report", output: Path) -> None:
    """Fill the template and write the page in one piece."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["thumbnail"] = thumbnail
    environment.filters["shares"] = shares
    environment.filters["short"] = shortener(report)
    problems = [
        {
            "kind": kind,
            "severity": report.severity(kind),
            "meaning": KINDS.get(kind, (ERROR, ""))[1],
            "rows": report.rows_with[kind],
            "examples": report.examples[kind],
        }
        for kind in kinds_found(report)
    ]
    histograms = [
        {"title": UNITS[name][0], "unit": UNITS[name][1], "total": histogram.total, "bars": histogram.bars()}
        for name, histogram in report.histograms.items()
        if histogram.counts
    ]
    page = environment.get_template("doctor.html.j2").render(
        report=report,
        problems=problems,
        notices=list(notice_lines(report)),
        histograms=histograms,
        wording=[line._asdict() for line in wording_lines(report.wording)],
        warnings=list(wording_warnings(report.wording)),
    )
    write_text_atomic(output, printable(page))
