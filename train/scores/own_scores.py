"""The scores of rows that come without ground truth, each with what chance gives. No torch here.

docs/evaluation.md, "Rows without ground truth", defines each. Outcomes are what `train.evaluate.own_rows` makes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from train.scores.answer_match import Asked, commonest_replies, is_exact, likeness
from train.scores.measures import Score, average, proportion
from train.scores.scoring import is_right

Outcome = dict[str, Any]  # one row of `outcomes.jsonl`
TOP = (1, 5)  # a picture is found again when it is among so many nearest
READINGS = ("class", "label")  # of a probe


def own_scores(phase: str, outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Of outcomes of one phase, of rows without scenes: every score by name."""
    if not outcomes:
        return {}
    if phase == "understanding":
        return answer_scores(outcomes)
    scores: dict[str, Score] = {}
    painted = [outcome["painted"] for outcome in outcomes if "painted" in outcome]
    if painted:
        scores[f"{phase}/similarity"] = with_chance(
            average([1 - found["cosine_distance"] for found in painted]),
            [1 - found["chance_cosine_distance"] for found in painted],
        )
        scores |= found_again(phase, painted)
        if not phase.startswith("reconstruction"):
            scores |= true_scores(phase, painted)
    if phase == "editing":
        scores |= change_scores(outcomes)
    imagined = [outcome["imagined"] for outcome in outcomes if "imagined" in outcome]
    for error in ("cosine_distance", "mse"):
        if imagined:
            scores[f"imagined/{phase}/{error}"] = with_chance(
                average([found[error] for found in imagined]), [found[f"chance_{error}"] for found in imagined]
            )
    return scores | found_again(f"imagined/{phase}", imagined)


def with_chance(score: Score, chances: Sequence[float]) -> Score:
    """A score beside the mean of what chance gives for each of its rows."""
    return replace(score, chance=sum(chances) / len(chances))


def answer_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """How answers compare with the rows' replies; chance is the commonest reply to the same question, always given."""
    asked = [Asked(outcome["prompt"], outcome["replies"]) for outcome in outcomes]
    guesses = list(zip(commonest_replies(asked), (row.replies for row in asked), strict=True))
    scores = {
        "understanding/exact": with_chance(
            proportion([outcome["exact"] for outcome in outcomes]), [is_exact(*guess) for guess in guesses]
        ),
        "understanding/similarity": with_chance(
            average([outcome["similarity"] for outcome in outcomes]), [likeness(*guess) for guess in guesses]
        ),
    }
    judged = [outcome for outcome in outcomes if "true_answer" in outcome]
    if judged:
        answers = [Asked(outcome["prompt"], [outcome["true_answer"]]) for outcome in judged]
        scores["understanding/right"] = with_chance(
            proportion([outcome["right"] for outcome in judged]),
            [is_right(guess, row.replies[0]) for guess, row in zip(commonest_replies(answers), answers, strict=True)],
        )
    return scores


def found_again(name: str, found: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """How often embedded pictures are nearest to their own true one, and read as what that one is."""
    scores: dict[str, Score] = {}
    for top in TOP:
        among = [one for one in found if one["among"] > top]  # of fewer, every picture is found
        if among:
            scores[f"{name}/retrieval_top{top}"] = with_chance(
                proportion([one["rank"] <= top for one in among]), [top / one["among"] for one in among]
            )
    return scores | read_scores(f"{name}/", found, "right")


def true_scores(phase: str, found: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """How often the probes read the true pictures themselves right: what perfect ones could expect."""
    return read_scores(f"{phase}/true_", found, "true_right")


def read_scores(prefix: str, found: Sequence[dict[str, Any]], right: str) -> dict[str, Score]:
    """PREFIX{reading}_top1 for each reading that pictures have; right: the key that says whether it was right."""
    readings = {reading: [one[reading] for one in found if reading in one] for reading in READINGS}
    return {
        f"{prefix}{reading}_top1": with_chance(
            proportion([one[right] for one in read]), [one["chance"] for one in read]
        )
        for reading, read in readings.items()
        if read
    }


def change_scores(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """What happened where an edit is to change something; chance is the source, left as it is."""
    inside = [outcome for outcome in outcomes if outcome["inside_psnr"] is not None]
    if not inside:
        return {}
    return {
        "editing/changed": replace(proportion([outcome["changed"] for outcome in inside]), chance=0.0),
        "editing/inside_psnr": with_chance(
            average([outcome["inside_psnr"] for outcome in inside]), [outcome["unchanged_psnr"] for outcome in inside]
        ),
    }
