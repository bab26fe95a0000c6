"""What training changed: the scores of an evaluation against those of another one on the same rows. No torch here."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_gen.artifacts.artifact import MANIFEST, Manifest
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.scores import in_unit, is_detail
from train.scores.measures import Score, difference

SAME = ("num", "tasks", "seed", "editor", "num_inference_steps", "cfg_scale")  # of two evaluations that compare


@dataclass(frozen=True)
class Gain:
    """One score before and after, and the difference; each as (value, 95% interval) in words. rows: how many."""

    name: str
    before: tuple[str, str]
    after: tuple[str, str]
    gain: tuple[str, str]
    rows: int


def gains_of(run: Path, against: Path, stale: Collection[Path] = ()) -> list[Gain]:
    """The scores of the run's evaluation on the rows of the evaluation `against`.

    stale: directories of evaluations that are of other weights by now. Raises UserError when there is no other that
    asks the same.
    """
    before = Manifest.load(against).require("evaluation", against)
    found: list[tuple[list[str], Path, Manifest]] = []
    for file in sorted(run.glob(f"evaluation/*/{MANIFEST}")):
        after = Manifest.load(file.parent)
        if after.kind == "evaluation" and after.inputs.get("rows") == before.inputs.get("rows"):
            unlike = [key for key in SAME if after.config.get(key) != before.config.get(key)]
            found.append((unlike, file.parent, after))
    if not found:
        raise UserError(f"{run} has no evaluation on the rows of {against}; nexus-gen evaluate {run} --rows ... first")
    unlike, where, after = min(found, key=lambda one: (one[1] in stale, len(one[0])))
    if where in stale:
        raise UserError(f"{where} is of other weights than {run} holds now; nexus-gen evaluate {run} --rows ... again")
    if unlike:
        raise UserError(f"{where} and {against} differ in {', '.join(unlike)}; evaluate both alike")
    scores = before.details["scores"]
    if after.inputs.get("probe") != before.inputs.get("probe"):  # other readers of prompts and labels
        scores = {name: score for name, score in scores.items() if not name.endswith(("class_top1", "label_top1"))}
    return gains(scores, after.details["scores"])


def gains(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[Gain]:
    """Every score that both have, without the categories of one language."""
    return [
        Gain(
            name,
            in_unit(name, before[name]),
            in_unit(name, score),
            gained(name, difference(Score(**score), Score(**before[name]))),
            score["count"],
        )
        for name, score in after.items()
        if name in before and not is_detail(name)
    ]


def gained(name: str, change: Score) -> tuple[str, str]:
    """A difference in words: of shares in points of a percent."""
    value, interval = in_unit(name, vars(change))
    return ("+" if change.value > 0 else "") + value.replace("%", " points"), interval


def summary(found: list[Gain]) -> str:
    """For the terminal: the overall scores alone."""
    lines = [("score", "before", "after", "gain", "95% interval")]
    lines += [(g.name, g.before[0], g.after[0], *g.gain) for g in found if g.name.endswith(("/overall", "psnr"))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)
