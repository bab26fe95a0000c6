"""Which stage limits a result, by the scores of rows without ground truth. No torch here.

The rule. A share is taken as skill, (share - chance) / (best - chance), so that chance is 0 and perfection 1. The best
is 1, and of labels and prompts what is read of the true pictures themselves. Pictures are followed through three
measurements of one kind: of labels where rows have them, else of prompts where most rows share theirs with others,
else of pictures found again.

    true embeddings -> decoder       reconstruction/DECODER/...   R
    words -> imagined embeddings     imagined/TASK/...            I
    words -> imagined -> decoder     TASK/...                     P

With P at GOOD or above nothing limits. Otherwise the largest of three losses names the stage: 1 - R the decoder by
itself, 1 - I the imagined embeddings, min(R, I) - P the decoder on imagined embeddings, which differ from the true ones
that it learned from. Answers limit understanding where their skill is below GOOD: that of exact answers or of
similarity, whichever is higher, because long replies are never exact.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GOOD = 0.9
MIN_READABLE = 0.2  # above chance: where a probe reads less of the true pictures, it tells nothing of others
DECODERS = {"generation": "generation_decoder", "editing": "editing_decoder"}
PICTURES = {
    "label_top1": "labels are read",
    "class_top1": "prompts are read",
    "retrieval_top1": "pictures are found again",
}
Scores = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Limit:
    """What limits one task. stage: whose training would raise it. loss: of skill, in [0, 1]. sentence: for people."""

    task: str
    stage: str
    loss: float
    sentence: str


def limits(scores: Scores) -> list[Limit]:
    """What limits each task that the scores tell enough about, the greatest loss first; none where all is good."""
    found = [answers_limit(scores), *(pictures_limit(scores, task) for task in DECODERS)]
    return sorted((limit for limit in found if limit is not None), key=lambda limit: -limit.loss)


def skill(score: Mapping[str, Any], best: float = 1.0) -> float:
    """A share as what is above chance, of what is between chance and the best: from 0 to 1."""
    chance = score["chance"]
    return min(1.0, max(0.0, (score["value"] - chance) / (best - chance))) if chance < best else 1.0


def answers_limit(scores: Scores) -> Limit | None:
    names = [f"understanding/{name}" for name in ("right", "exact", "similarity")]
    given = {name: scores[name] for name in names if "chance" in scores.get(name, {})}
    if not given:
        return None
    best = max(given, key=lambda name: skill(given[name]))
    reached = skill(given[best])
    if reached >= GOOD:
        return None
    score = given[best]
    kind = "similarity to the true answers" if best.endswith("similarity") else "are right"
    said = f"{score['value']:.0%} {kind}, where always the commonest answer gives {_share(score['chance'])}"
    return _limit("understanding", "pretrain", 1 - reached, "the answers", said)


def pictures_limit(scores: Scores, task: str) -> Limit | None:
    decoder = DECODERS[task]
    names = (f"reconstruction/{decoder}", f"imagined/{task}", task)
    measure = _measure(scores, names)
    if measure is None:
        return None
    best = scores.get(f"{task}/true_{measure}", {}).get("value", 1.0)
    true, imagined, painted = (scores[f"{name}/{measure}"] for name in names)
    of_true, of_imagined, of_painted = (skill(score, best) for score in (true, imagined, painted))
    if of_painted >= GOOD:
        return None
    losses = {"decoder": 1 - of_true, "imagined": 1 - of_imagined, "between": min(of_true, of_imagined) - of_painted}
    worst = max(losses, key=lambda name: losses[name])
    kind = PICTURES[measure]
    chance = _share(painted["chance"])
    said = (
        f"{true['value']:.0%} of {kind} when painted from true embeddings, {painted['value']:.0%} when painted from "
        f"imagined ones, {imagined['value']:.0%} by the imagined embeddings themselves (chance {chance})"
    )
    what, stage = {
        "decoder": (f"the {task} decoder", decoder),
        "imagined": ("the imagined embeddings", "pretrain"),
        "between": (f"the {task} decoder on imagined embeddings", decoder),
    }[worst]
    return _limit(task, stage, losses[worst], what, said)


def _measure(scores: Scores, names: tuple[str, ...]) -> str | None:
    """What can be followed through all three measurements."""
    for measure in PICTURES:
        of_measure = [scores.get(f"{name}/{measure}") for name in names]
        best = scores.get(f"{names[-1]}/true_{measure}")
        if not all(of_measure) or (best is not None and best["value"] - best["chance"] < MIN_READABLE):
            continue
        asked = scores.get(f"{names[-1]}/similarity", {}).get("count", 0)
        if measure != "class_top1" or 2 * of_measure[-1]["count"] >= asked:  # type: ignore[index]
            return measure
    return None


def _share(chance: float) -> str:
    return "below 1%" if 0 < chance < 0.01 else f"{chance:.0%}"


def _limit(task: str, stage: str, loss: float, what: str, said: str) -> Limit:
    return Limit(task, stage, loss, f"what limits {task}: {what}; {said}; train longer: {stage}.more=2x")
