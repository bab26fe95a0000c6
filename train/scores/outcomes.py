"""One outcome for each row that a model was evaluated on, and the scores of many. No torch here."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data.messages.rows import Row
from data.messages.truth import has_scenes, truth_problem
from data.shapes.contents import CATEGORIES
from data.shapes.detector import Detection, detect
from nexus_gen.pictures.images import StoredImage, cover_crop, open_image
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.prompts import words_of
from train.scores.measures import Score, average, mean_of, proportion, psnr, ssim
from train.scores.own_scores import own_scores
from train.scores.scoring import geneval_metadata, is_right, judge_edit, same_scene, unmet

Outcome = dict[str, Any]  # one row of `outcomes.jsonl`
MAX_ANSWER_TOKENS = 24  # that a model may answer a question with


def require_truth(row: Row) -> dict[str, Any]:
    """A row's ground truth; UserError unless it is one that a detector can judge pictures by."""
    if row.truth is None or not has_scenes(row):
        raise UserError(f"{row.where}: no ground truth to score by; nexus-gen data shapes draws rows with it")
    if problem := truth_problem(row):
        raise UserError(f"{row.where}: {problem}")
    return row.truth


def outcome_of(row: Row, phase: str) -> Outcome:
    """What every outcome says about its row, of one without scenes no category. phase: what was asked of the model."""
    outcome: Outcome = {"phase": phase, "id": row.id}
    if row.truth is not None and has_scenes(row):
        outcome |= {"category": row.truth["category"], "language": row.truth["language"]}
    else:
        outcome["language"] = row.language
    return {**outcome, "prompt": prompt_of(row)}


def prompt_of(row: Row) -> str:
    """The user's words without image tags and without the template around a caption."""
    return words_of(row.messages[0]["content"])


def judge_answer(row: Row, answer: str) -> Outcome:
    """An understanding row and what the model replied."""
    truth = row.messages[-1]["content"]
    return {**outcome_of(row, "understanding"), "right": is_right(answer, truth), "answer": answer, "truth": truth}


def seen_facts(seen: Detection) -> Outcome:
    return {"objects": [vars(thing) for thing in seen.objects], "ground": seen.ground, "texture": seen.texture}


def judge_generation(row: Row, picture: Image.Image) -> Outcome:
    """A generation row and the picture that the model made from its caption."""
    assert row.truth is not None
    outcome, seen, (scene,) = outcome_of(row, "generation"), detect(picture), row.truth["scenes"]
    problems = unmet(geneval_metadata(row.truth, outcome["prompt"]), seen)
    return {
        **outcome,
        "right": not problems,
        "problems": problems,
        "exact_scene": same_scene(scene, seen),
        "ground": seen.ground == scene["ground"],
        "texture": seen.texture == scene["texture"],
        "seen": seen_facts(seen),
    }


def judge_editing(row: Row, picture: Image.Image) -> Outcome:
    """An editing row and the picture that the model made of its source."""
    assert row.truth is not None
    seen = detect(picture)
    source, target = (pixels_like(picture, image) for image in row.images)
    edit = judge_edit(row.truth, seen, np.asarray(picture.convert("RGB")), source, target)
    return {
        **outcome_of(row, "editing"),
        "right": not edit.problems,
        **vars(edit),
        "seen": seen_facts(seen),
    }


def judge_reconstruction(row: Row, picture: Image.Image, decoder: str) -> Outcome:
    """The last picture of a row, and what a decoder painted from its true embeddings."""
    made, truth = np.asarray(picture.convert("RGB")), pixels_like(picture, row.images[-1])
    return {**outcome_of(row, f"reconstruction/{decoder}"), "psnr": psnr(made, truth), "ssim": ssim(made, truth)}


def pixels_like(picture: Image.Image, truth: StoredImage) -> np.ndarray:
    """A picture of the dataset at the size of a made one, cut as decoders are trained: (H, W, 3) of 8 bits."""
    return np.asarray(cover_crop(open_image(truth), *picture.size))


def scores_of(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """Every score by name, such as generation/counting; values of `overall` are means over the categories.

    editing/outside_* and reconstruction/* are averages in dB, of 1 and of 1, over all rows. All else is a share of the
    rows with scenes; `train.scores.own_scores` has the scores of the others.
    """
    scores: dict[str, Score] = {}
    for phase in dict.fromkeys(outcome["phase"] for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome["phase"] == phase]
        if phase.startswith("reconstruction"):
            for measure in ("psnr", "ssim"):
                scores[f"{phase}/{measure}"] = average([row[measure] for row in rows])
        else:
            scores |= scene_scores(phase, [row for row in rows if "category" in row])
        if phase == "editing":
            for measure in ("psnr", "l1", "ssim"):
                values = [row[measure] for row in rows if row[measure] is not None]
                if values:
                    scores[f"{phase}/outside_{measure}"] = average(values)
        scores |= own_scores(phase, [row for row in rows if "category" not in row])
    return scores


def scene_scores(phase: str, rows: Sequence[Outcome]) -> dict[str, Score]:
    """Of outcomes of one phase, of rows with scenes: shares of what is right, by category and language."""
    scores: dict[str, Score] = {}
    if not rows:
        return scores
    scores[f"{phase}/overall"] = over_categories(rows)
    for category in order(row["category"] for row in rows):
        of_category = [row for row in rows if row["category"] == category]
        scores[f"{phase}/{category}"] = proportion([row["right"] for row in of_category])
    for language in sorted({row["language"] for row in rows}):
        spoken = [row for row in rows if row["language"] == language]
        scores[f"{phase}/{language}/overall"] = over_categories(spoken)
        for category in order(row["category"] for row in spoken):
            scores[f"{phase}/{language}/{category}"] = proportion(
                [row["right"] for row in spoken if row["category"] == category]
            )
    if phase == "generation":
        for fact in ("exact_scene", "ground", "texture"):
            scores[f"{phase}/{fact}"] = proportion([row[fact] for row in rows])
    if phase == "editing":
        scores[f"{phase}/kept"] = proportion([row["kept"] for row in rows])
        scores[f"{phase}/right_and_kept"] = proportion([row["right"] and row["kept"] for row in rows])
    return scores


def order(categories: Iterable[str]) -> list[str]:
    """Categories as the dataset lists them."""
    known = [category for kinds in CATEGORIES.values() for category in kinds]
    return sorted(set(categories), key=known.index)


def over_categories(outcomes: Sequence[Outcome]) -> Score:
    """The unweighted mean over categories of the share that is right."""
    return mean_of(
        [
            proportion([outcome["right"] for outcome in outcomes if outcome["category"] == category])
            for category in order(outcome["category"] for outcome in outcomes)
        ]
    )
