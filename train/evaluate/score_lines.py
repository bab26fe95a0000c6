"""The scores of an evaluation as a table for the terminal, and as the lines of tables on pages. No torch here."""

from dataclasses import dataclass
from typing import Any

from nexus_gen.specs.scores import chance_of, in_unit, is_detail

Scores = dict[str, dict[str, Any]]


def table(scores: Scores) -> str:
    """Name, value, 95% interval, chance and number of samples of every score, without the details by language.

    Chance has a column where any score has it.
    """
    lines: list[tuple[str, ...]] = [("score", "value", "95% interval", "chance", "rows")]
    for name, score in scores.items():
        if not is_detail(name):
            lines.append((name, *in_unit(name, score), chance_of(name, score), str(score["count"])))
    if not any(line[3] for line in lines[1:]):
        lines = [(*line[:3], line[4]) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in lines)


@dataclass
class Line:
    """A line of the page's table: what, its chance level or nothing, and per column (value, interval, rows) or None."""

    label: str
    chance: str
    cells: list[tuple[str, str, int] | None]


def tables_of(scores: Scores) -> dict[str, tuple[list[str], list[Line]]]:
    """Phase -> `lines_of` it: understanding, generation, reconstruction/editing_decoder and the like."""
    phases = dict.fromkeys(phase_of(name) for name in scores)
    return {phase: lines_of(phase, scores) for phase in phases}


def phase_of(name: str) -> str:
    """What a score is of: the first word of its name, and of reconstruction and imagination the second too."""
    first, second, *_ = name.split("/")
    return f"{first}/{second}" if first in ("reconstruction", "imagined") else first


def lines_of(phase: str, scores: Scores) -> tuple[list[str], list[Line]]:
    """(columns, lines) of one phase: everything, then each language."""
    names = [name.removeprefix(f"{phase}/") for name in scores if name.startswith(f"{phase}/")]
    languages = [name.removesuffix("/overall") for name in names if name.endswith("/overall")]
    labels = [name for name in names if name.split("/")[0] not in languages]

    def cell(name: str) -> tuple[str, str, int] | None:
        score = scores.get(f"{phase}/{name}")
        return None if score is None else (*in_unit(name, score), score["count"])

    columns = ["all", *languages]
    return columns, [
        Line(
            label.replace("_", " "),
            chance_of(label, scores.get(f"{phase}/{label}", {})),
            [cell(label), *(cell(f"{language}/{label}") for language in languages)],
        )
        for label in labels
    ]
