"""The scores of an evaluation as one self-contained HTML page, with rows and failures."""

from pathlib import Path

from PIL import Image

from data.messages.rows import Row
from nexus_gen.pictures.images import open_image
from train.evaluate.score_lines import Scores, tables_of
from train.pages.pages import template
from train.scores.limits import limits
from train.scores.outcomes import Outcome


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
    return template("evaluation.html.j2").render(
        title=title,
        tables=tables_of(scores),
        limits=[limit.sentence for limit in limits(scores)],
        own=own,
        wrong=wrong,
        reconstructed=reconstructed,
        num_shown=num_shown,
        made=made,
        images=images,
        nearest=nearest,
    )
