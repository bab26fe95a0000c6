"""The scores of an evaluation as a table for the terminal and as one self-contained HTML page with the failures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.messages import Row
from nexus_gen.specs.images import open_image
from nexus_gen.specs.scores import in_unit, is_detail
from train.outcomes import Outcome
from train.report import template

Scores = dict[str, dict[str, Any]]


def table(scores: Scores) -> str:
    """Name, value, 95% interval and number of samples of every score, without the details by language."""
    lines = [("score", "value", "95% interval", "rows")]
    for name, score in scores.items():
        if not is_detail(name):
            lines.append((name, *in_unit(name, score), str(score["count"])))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {interval:>{widths[2]}}  {count:>{widths[3]}}"
        for name, value, interval, count in lines
    )


@dataclass
class Line:
    """A line of the page's table: what, and per column (value, interval, rows) or None."""

    label: str
    cells: list[tuple[str, str, int] | None]


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
        Line(label.replace("_", " "), [cell(label), *(cell(f"{language}/{label}") for language in languages)])
        for label in labels
    ]


def render(
    title: str, scores: Scores, outcomes: list[Outcome], rows: dict[str, Row], directory: Path, num_shown: int
) -> str:
    """The page. rows: of the dataset by id. directory: where the outcomes' pictures are."""

    def made(outcome: Outcome) -> Image.Image:
        return open_image(directory / outcome["picture"])

    def images(outcome: Outcome) -> list[Image.Image]:
        return [open_image(path) for path in rows[outcome["id"]].images]

    phases = list(dict.fromkeys(outcome["phase"] for outcome in outcomes))
    wrong = {phase: [r for r in outcomes if r["phase"] == phase and not r.get("right", True)] for phase in phases}
    reconstructed = {
        phase: sorted((r for r in outcomes if r["phase"] == phase), key=lambda outcome: outcome["psnr"])
        for phase in phases
        if phase.startswith("reconstruction")
    }
    return template("evaluation.html.j2").render(
        title=title,
        tables={phase: lines_of(phase, scores) for phase in phases},
        wrong=wrong,
        reconstructed=reconstructed,
        num_shown=num_shown,
        made=made,
        images=images,
    )
