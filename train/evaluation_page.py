"""The scores of an evaluation as a table for the terminal, and as one self-contained HTML page with rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.messages import Row
from nexus_gen.specs.images import open_image
from nexus_gen.specs.scores import chance_of, in_unit, is_detail
from train.limits import limits
from train.outcomes import Outcome
from train.report import template

Scores = dict[str, dict[str, Any]]


def table(scores: Scores) -> str:
    """Name, value, 95% interval, chance and number of samples of every score, without the details by language.

    Chance has a column where any score has it.
    """
    lines = [("score", "value", "95% interval", "chance", "rows")]
    for name, score in scores.items():
        if not is_detail(name):
            lines.append((name, *in_unit(name, score), chance_of(name, score), str(score["count"])))
    if not any(chance for *_, chance, _ in lines[1:]):
        lines = [(*line[:3], line[4]) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]) for name, *cells in lines)


@dataclass
class Line:
    """A line of the page's table: what, its chance level or nothing, and per column (value, interval, rows) or None."""

    label: str
    chance: str
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
        Line(
            label.replace("_", " "),
            chance_of(label, scores.get(f"{phase}/{label}", {})),
            [cell(label), *(cell(f"{language}/{label}") for language in languages)],
        )
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

    def nearest(outcome: Outcome) -> Image.Image:
        """The held-out picture that is nearest to what was painted."""
        found = outcome["painted"]["nearest"] or {"id": outcome["id"], "place": -1}
        return open_image(rows[found["id"]].images[found["place"]])

    phases = list(dict.fromkeys(outcome["phase"] for outcome in outcomes))
    judged = {phase: [r for r in outcomes if r["phase"] == phase and "category" in r] for phase in phases}
    own = {phase: [r for r in outcomes if r["phase"] == phase and "category" not in r] for phase in phases}
    wrong = {phase: [r for r in of_phase if not r.get("right", True)] for phase, of_phase in judged.items() if of_phase}
    reconstructed = {
        phase: sorted((r for r in outcomes if r["phase"] == phase), key=lambda outcome: outcome["psnr"])
        for phase in phases
        if phase.startswith("reconstruction")
    }
    tables = [name for phase in phases for name in (phase, f"imagined/{phase}")]
    return template("evaluation.html.j2").render(
        title=title,
        tables={name: lines for name in tables if (lines := lines_of(name, scores))[1]},
        limits=[limit.sentence for limit in limits(scores)],
        own=own,
        wrong=wrong,
        reconstructed=reconstructed,
        num_shown=num_shown,
        made=made,
        images=images,
        nearest=nearest,
    )
