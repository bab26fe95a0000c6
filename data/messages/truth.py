"""What `truth` of a row may hold, to score its answer or its picture by; docs/datasets.md has the table. No torch here.

Two forms: the scenes that `nexus-gen data shapes` writes down, and the short one of people who have classes,
{"answer": "cat"} of a question and {"label": "cat"} of a picture that is made.
"""

from typing import Any

from data.messages.rows import Row
from data.quotes import brief
from data.shapes.contents import CATEGORIES
from nexus_gen.specs.numbers import not_finite
from nexus_gen.specs.prompts import LANGUAGES

SCENE = ("objects", "ground", "texture")  # what is known of a picture
NEEDED = ("category", "language", "scenes")  # by rows with scenes
KNOWN = ("split", "task", *NEEDED, "answer", "label")
OBJECT = ("shape", "colour", "size", "cell", "position", "centre", "bbox")


def has_scenes(row: Row) -> bool:
    """Whether a row says what its pictures show, so that a detector can judge what the models paint."""
    return row.truth is not None and not {"scenes", "category"}.isdisjoint(row.truth)


def truth_problem(row: Row) -> str | None:
    """What keeps a row's `truth` from being used: the key, what is wrong with it and the remedy; or None."""
    truth = row.truth
    if truth is None:
        return None
    if not truth:
        return "truth is empty; give answer, label or scenes, or leave it out"
    for key, value in not_finite(truth, "truth"):
        return f"{key} is {value}; it must be a finite number"
    unknown = [key for key in truth if key not in KNOWN]
    if unknown:
        return f"truth has an unknown key {brief(unknown[0])}; {', '.join(KNOWN)} are known"
    for key in ("split", "task", "category", "language", "answer", "label"):
        if key in truth and not isinstance(truth[key], str):
            return f"truth.{key} is {brief(truth[key])}; it must be a text"
    if has_scenes(row):
        return _scenes_problem(row, truth)
    makes, asks = row.task in ("generation", "editing"), row.task in ("understanding", "text")
    for key, belongs, others in (("label", makes, "a row that asks"), ("answer", asks, "a row that makes a picture")):
        if key in truth and not belongs:
            return f"truth.{key} has no effect on {others}; take it out"
        if key in truth and not truth[key].strip():
            return f"truth.{key} is empty; write it, or leave it out"
    if "answer" not in truth and "label" not in truth:
        return f"truth holds nothing that a {row.task} row is scored by; give {'label' if makes else 'answer'}"
    return None


def _scenes_problem(row: Row, truth: dict[str, Any]) -> str | None:
    missing = [key for key in NEEDED if key not in truth]
    if missing:
        return f"truth lacks {missing[0]}; rows with scenes need {', '.join(NEEDED)}"
    if truth["category"] not in (known := CATEGORIES.get(row.task, ())):
        listed = ", ".join(known) or "none to score"
        return f"truth.category is {truth['category']!r}; of {row.task} rows there are {listed}"
    if truth["language"] not in LANGUAGES:
        return f"truth.language is {truth['language']!r}; it must be {' or '.join(LANGUAGES)}"
    scenes = truth["scenes"]
    if not isinstance(scenes, list) or not all(_has(scene, SCENE) for scene in scenes):
        return f"truth.scenes must be a list of {{{', '.join(sorted(SCENE))}}}"
    if len(scenes) != len(row.images):
        return f"truth has {len(scenes)} scenes for {len(row.images)} pictures; give one each"
    for number, scene in enumerate(scenes):
        objects = scene["objects"]
        if not isinstance(objects, list) or not all(_has(thing, OBJECT) for thing in objects):
            return f"truth.scenes[{number}].objects must be a list of {{{', '.join(OBJECT)}}}"
    return None


def _has(value: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(value, dict) and value.keys() >= set(keys)
