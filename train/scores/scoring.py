"""What counts as right: answers by their words, generated and edited pictures by what the detector sees in them.

Captions are turned into GenEval's metadata and judged by GenEval's rules, so that a category here asks what it asks
there. Edits compare what is seen with the ground truth of the two scenes. No torch here.
Source: Ghosh et al. 2023 (GenEval), for the six categories and their rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from data.shapes.detector import Detection, Found
from train.scores.answer_reader import NO, YES, says_number, says_yes, settled
from train.scores.measures import l1, psnr, ssim
from train.scores.plain_words import bare, whole_number, without_markup

# category of a caption -> GenEval's tag
TAGS = {
    "single_object": "single_object",
    "two_objects": "two_object",
    "counting": "counting",
    "colours": "colors",
    "position": "position",
    "colour_attribution": "color_attr",
}
POSITION_SLACK = 0.1  # of the sizes of two objects: nearer than this along an axis, neither is beyond the other
EDGE = 1 / 32  # of the picture: how far an edited region reaches beyond the pixels that differ
MIN_REST = 64  # pixels outside the edited region, fewer of which are not compared

Metadata = dict[str, Any]


def is_right(answer: str, truth: str) -> bool:
    """Whether an answer says the truth and nothing besides, as a person would read both.

    Case, width, markup, articles, number words and a sentence around the answer make no difference. Yes and no are read
    from how an answer begins, and may not be taken back; a number must be the only one.
    """
    said, true = without_markup(answer), bare(without_markup(truth))
    if bare(said) == true:
        return True
    if true in YES + NO:
        return says_yes(bare(said)) is (true in YES)
    if (number := whole_number(true)) is not None:
        return says_number(bare(said)) == number
    return settled(said) == settled(true)


def geneval_metadata(truth: dict[str, Any], prompt: str) -> Metadata:
    """What a caption's category asks of the picture, as a row of GenEval's metadata file.

    `place`, the cell of one object, is ours; everything else is GenEval's. Colours count in `colors` and `color_attr`
    only, as there.
    """
    things, tag = truth["scenes"][0]["objects"], TAGS[truth["category"]]
    clauses: list[Metadata] = [{"class": thing["shape"], "count": 1} for thing in things]
    metadata: Metadata = {"tag": tag, "include": clauses}
    if tag == "counting":
        metadata["include"] = [{"class": things[0]["shape"], "count": len(things)}]
        metadata["exclude"] = [{"class": things[0]["shape"], "count": len(things) + 1}]
    elif tag in ("colors", "color_attr"):
        for clause, thing in zip(clauses, things, strict=True):
            clause["color"] = thing["colour"]
    elif tag == "position" and len(things) == 1:
        clauses[0]["place"] = things[0]["position"]
    elif tag == "position":
        (side,) = relations(*(thing["bbox"] for thing in things))
        metadata["include"] = [clauses[1], {**clauses[0], "position": [side, 0]}]
    return {**metadata, "prompt": prompt}


def relations(bbox: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where one object is beside another: of left of, right of, above and below, those that hold."""
    boxes = np.array([bbox, other]).reshape(2, 2, 2)
    offset = np.subtract(*boxes.mean(axis=1))
    sizes = (boxes[:, 1] - boxes[:, 0]).sum(axis=0)
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_SLACK * sizes, 0)
    if not beyond.any():
        return set()
    across, down = beyond / np.linalg.norm(offset)
    holding = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {side for side, holds in holding.items() if holds}


def unmet(metadata: Metadata, seen: Detection) -> list[str]:
    """The clauses of GenEval's metadata that a picture does not meet, in words; none if it is right.

    A clause looks at the surest `count` objects of its class.
    """
    problems: list[str] = []
    groups: list[list[Found]] = []
    for clause in metadata["include"]:
        shape, count = clause["class"], clause["count"]
        group = [thing for thing in seen.objects if thing.shape == shape][:count]
        groups.append(group)
        if len(group) < count:
            problems.append(f"{len(group)} of {count} {shape}")
            continue
        for thing in group:
            if thing.colour != clause.get("color", thing.colour):
                problems.append(f"{thing.colour} {shape}, not {clause['color']}")
            if thing.position != clause.get("place", thing.position):
                problems.append(f"{shape} at {thing.position}, not {clause['place']}")
            if "position" in clause:
                side, target = clause["position"]
                held = [relations(thing.bbox, other.bbox) for other in groups[target]]
                if not held or not all(side in sides for sides in held):
                    problems.append(f"{shape} not {side} {metadata['include'][target]['class']}")
    for clause in metadata.get("exclude", []):
        count = sum(thing.shape == clause["class"] for thing in seen.objects)
        if count >= clause["count"]:
            problems.append(f"{count} {clause['class']}, not below {clause['count']}")
    return problems


def by_cell(objects: Sequence[dict[str, Any]], *keys: str) -> dict[int, list[tuple[str, ...]]]:
    """The facts of objects by the cell in which they are, sorted."""
    cells: dict[int, list[tuple[str, ...]]] = {}
    for thing in objects:
        cells.setdefault(thing["cell"], []).append(tuple(thing[key] for key in keys))
    return {cell: sorted(facts) for cell, facts in cells.items()}


def same_scene(scene: dict[str, Any], seen: Detection) -> bool:
    """Whether a picture shows the objects of a scene and no others: shapes, colours, sizes and cells."""
    facts = ("shape", "colour", "size")
    return by_cell(scene["objects"], *facts) == by_cell([vars(thing) for thing in seen.objects], *facts)


@dataclass(frozen=True)
class EditOutcome:
    """problems: what of the asked change did not happen, in words. kept: whether all else is as it was.

    psnr (dB), l1 (of 1), ssim: outside the edited region; None where it leaves too little.
    """

    problems: list[str]
    kept: bool
    psnr: float | None
    l1: float | None
    ssim: float | None


def judge_edit(
    truth: dict[str, Any], seen: Detection, result: np.ndarray, source: np.ndarray, target: np.ndarray
) -> EditOutcome:
    """An edited picture against its ground truth; result, source and target are (H, W, 3) pictures of 8 bits.

    The change happened when every cell that differs between the scenes shows what the target has there, by shape and
    colour, and nothing else; a changed ground is the target's; and some object is left. The rest is kept when every
    other cell shows what it showed, by shape, colour and size, and an unchanged ground is seen.
    """
    before, after = truth["scenes"]
    facts = ("shape", "colour", "size")
    old, new = by_cell(before["objects"], *facts), by_cell(after["objects"], *facts)
    found = by_cell([vars(thing) for thing in seen.objects], *facts)
    kept = True
    # An empty picture lacks what was to be removed, too.
    problems = ["no object at all"] if new and not found else []
    for cell in sorted({*old, *new, *found}):
        there, wanted = found.get(cell, []), new.get(cell, [])
        if old.get(cell) == new.get(cell):
            kept &= there == wanted
        elif [thing[:2] for thing in there] != [thing[:2] for thing in wanted]:
            problems.append(f"{in_words(there)} where {in_words(wanted)} should be")
    if before["ground"] != after["ground"]:
        if seen.ground != after["ground"]:
            problems.append(f"{seen.ground or 'no known'} ground, not {after['ground']}")
    else:
        kept &= seen.ground == after["ground"]
    return EditOutcome(problems, kept, *outside(result, target, edited_region(source, target)))


def outside(
    result: np.ndarray, target: np.ndarray, region: np.ndarray
) -> tuple[float | None, float | None, float | None]:
    """(PSNR in dB, L1, SSIM) of a result against the true one outside a region; None where that leaves too little."""
    rest = ~region
    if rest.sum() < MIN_REST:
        return None, None, None
    return psnr(result, target, rest), l1(result, target, rest), ssim(result, target, rest)


def in_words(things: list[tuple[str, ...]]) -> str:
    return " and ".join(f"{colour} {shape}" for shape, colour, *_ in things) or "nothing"


def edited_region(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(H, W): the pixels that an edit changes in the ground truth, and a rim around them."""
    changed = np.abs(source.astype(int) - target).max(axis=-1) > 0
    reach = max(1, round(EDGE * len(changed)))
    return ndimage.binary_dilation(changed, np.ones((2 * reach + 1, 2 * reach + 1), dtype=bool))
