"""Scores of mixed outcomes counted by hand, and what of a picture each fact of an outcome is read from."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from data.messages.rows import Row
from data.shapes.detector import Detection, Found
from data.shapes.scenes import Scene, Thing, draw
from nexus_gen.specs.errors import UserError
from train.scores.outcomes import (
    judge_answer,
    judge_editing,
    judge_generation,
    judge_reconstruction,
    order,
    outcome_of,
    pixels_like,
    require_truth,
    scores_of,
)
from train.scores.own_scores import own_scores
from train.scores.scoring import edited_region, geneval_metadata, judge_edit, relations, same_scene, unmet

RED, BLUE = Thing("circle", "red", "large", 3), Thing("square", "blue", "large", 5)


def said(category: str, language: str, right: bool) -> dict[str, Any]:
    return {"phase": "understanding", "category": category, "language": language, "right": right}


# Of colour 3 of 4 are right, of count 1 of 1, of yes_no 0 of 2; in English 1 of 2, 1 of 1 and 0 of 1.
ANSWERS = [
    said("yes_no", "zh", False),
    said("colour", "en", True),
    said("colour", "en", False),
    said("colour", "zh", True),
    said("colour", "zh", True),
    said("count", "en", True),
    said("yes_no", "en", False),
]


def test_overall_weighs_categories_alike_however_many_rows_they_have() -> None:
    values = {name: (score.value, score.count) for name, score in scores_of(ANSWERS).items()}
    assert values == {
        "understanding/overall": (pytest.approx((3 / 4 + 1 + 0) / 3), 7),  # all rows together: 4 / 7
        "understanding/colour": (3 / 4, 4),
        "understanding/count": (1.0, 1),
        "understanding/yes_no": (0.0, 2),
        "understanding/en/overall": (pytest.approx((1 / 2 + 1 + 0) / 3), 4),
        "understanding/en/colour": (1 / 2, 2),
        "understanding/en/count": (1.0, 1),
        "understanding/en/yes_no": (0.0, 1),
        "understanding/zh/overall": (pytest.approx((1 + 0) / 2), 3),
        "understanding/zh/colour": (1.0, 2),
        "understanding/zh/yes_no": (0.0, 1),
    }
    assert list(values)[1:4] == ["understanding/colour", "understanding/count", "understanding/yes_no"]


def test_intervals_of_overall_come_from_those_of_its_categories() -> None:
    """Wilson's limits written out: of 3 of 4, 1 of 1 and 0 of 2."""
    z2 = 1.959964**2

    def wilson(right: int, count: int, sign: int) -> float:
        share = right / count
        root = (z2 * count * (share * (1 - share) + z2 / (4 * count))) ** 0.5
        return (count * share + z2 / 2 + sign * root) / (count + z2)

    parts = [(3, 4), (1, 1), (0, 2)]
    score = scores_of(ANSWERS)["understanding/overall"]
    for sign, limit in ((-1, score.low), (1, score.high)):
        squares = sum((r / n - min(1, max(0, wilson(r, n, sign)))) ** 2 for r, n in parts)
        assert limit == pytest.approx(score.value + sign * squares**0.5 / 3, abs=1e-6)


def painted(right: bool, **facts: bool) -> dict[str, Any]:
    return {"phase": "generation", "category": "colours", "language": "en", "right": right, **facts}


def test_facts_of_pictures_are_counted_one_by_one() -> None:
    outcomes = [
        painted(True, exact_scene=True, ground=True, texture=False),
        painted(True, exact_scene=False, ground=True, texture=False),
        painted(False, exact_scene=False, ground=True, texture=True),
        painted(False, exact_scene=False, ground=False, texture=False),
    ]
    scores = scores_of(outcomes)
    assert scores["generation/overall"].value == scores["generation/colours"].value == 2 / 4
    facts = {name: scores[f"generation/{name}"].value for name in ("exact_scene", "ground", "texture")}
    assert facts == {"exact_scene": 1 / 4, "ground": 3 / 4, "texture": 1 / 4}


def edit(right: bool, kept: bool, psnr: float | None) -> dict[str, Any]:
    measures = {"psnr": psnr, "l1": psnr and psnr / 100, "ssim": psnr and psnr / 50}
    return {"phase": "editing", "category": "move", "language": "zh", "right": right, "kept": kept, **measures}


def test_edits_are_averaged_where_something_is_left_beside_them() -> None:
    scores = scores_of(
        [edit(True, False, 20.0), edit(True, True, 30.0), edit(False, True, None), edit(False, True, 0.0)]
    )
    assert (scores["editing/overall"].value, scores["editing/kept"].value) == (2 / 4, 3 / 4)
    assert scores["editing/right_and_kept"].value == 1 / 4
    averages = {name: (scores[f"editing/outside_{name}"]) for name in ("psnr", "l1", "ssim")}
    assert {name: (score.value, score.count) for name, score in averages.items()} == {
        "psnr": (pytest.approx(50 / 3), 3),
        "l1": (pytest.approx(0.5 / 3), 3),
        "ssim": (pytest.approx(1 / 3), 3),
    }
    assert not [name for name in scores_of([edit(True, True, None)]) if "outside" in name]


def test_reconstructions_are_averaged_for_each_decoder() -> None:
    outcomes = [
        {"phase": f"reconstruction/{decoder}", "psnr": psnr, "ssim": psnr / 100}
        for decoder, psnr in (("generation_decoder", 20.0), ("editing_decoder", 30.0), ("generation_decoder", 24.0))
    ]
    assert {name: (score.value, score.count) for name, score in scores_of(outcomes).items()} == {
        "reconstruction/generation_decoder/psnr": (22.0, 2),
        "reconstruction/generation_decoder/ssim": (pytest.approx(0.22), 2),
        "reconstruction/editing_decoder/psnr": (30.0, 1),
        "reconstruction/editing_decoder/ssim": (pytest.approx(0.3), 1),
    }


def test_categories_are_in_the_order_of_the_dataset() -> None:
    assert order(["yes_no", "count", "yes_no", "shape", "colour"]) == ["colour", "shape", "count", "yes_no"]


TRUTH = {"category": "counting", "language": "en"}


def row_of(task: str, scenes: list[Scene], category: str, path: Path, size: int = 64) -> Row:
    """A row about scenes, whose pictures are written."""
    images = [path / f"{number}.png" for number in range(len(scenes))]
    for scene, image in zip(scenes, images, strict=True):
        draw(scene, size).save(image)
    truth = {"category": category, "language": "en", "scenes": [scene.truth() for scene in scenes]}
    messages = [{"role": "user", "content": "words"}, {"role": "assistant", "content": "red"}]
    return Row("7", "test", images, messages, task, "test:1", [], truth)


def test_ground_and_texture_are_facts_of_their_own(tmp_path: Path) -> None:
    asked = Scene((RED,), "white", "striped", 0)
    row = row_of("generation", [asked], "colours", tmp_path)

    def facts(scene: Scene) -> tuple[bool, ...]:
        outcome = judge_generation(row, draw(scene, 64))
        assert outcome["seen"]["ground"] == scene.ground and outcome["seen"]["texture"] == scene.texture
        return outcome["right"], outcome["exact_scene"], outcome["ground"], outcome["texture"]

    assert facts(asked) == (True, True, True, True)
    assert facts(dataclasses.replace(asked, ground="grey")) == (True, True, False, True)
    assert facts(dataclasses.replace(asked, texture="checked")) == (True, True, True, False)
    assert facts(dataclasses.replace(asked, things=(dataclasses.replace(RED, cell=8),))) == (True, False, True, True)
    assert facts(dataclasses.replace(asked, things=(BLUE,))) == (False, False, True, True)


@pytest.mark.parametrize(
    ("made", "right"), [("black", True), ("white", False), ("grey", False), ("beige", False)], ids=str
)
def test_a_new_ground_is_the_one_that_was_asked_for(made: str, right: bool, tmp_path: Path) -> None:
    """From white to black: neither the old ground nor a third one will do."""
    before, after = (Scene((RED, BLUE), ground, "plain", 0) for ground in ("white", "black"))
    row = row_of("editing", [before, after], "background", tmp_path)
    outcome = judge_editing(row, draw(dataclasses.replace(before, ground=made), 64))
    assert outcome["right"] is right and outcome["kept"]
    assert outcome["problems"] == ([] if right else [f"{made} ground, not black"])
    assert outcome["psnr"] == 100.0  # of the objects' insides: all else was to change


def test_an_edit_that_changes_the_ground_too_keeps_nothing(tmp_path: Path) -> None:
    before, after = (Scene(things, "white", "plain", 0) for things in ((RED, BLUE), (RED,)))
    row = row_of("editing", [before, after], "remove", tmp_path)
    for made, facts in ((after, (True, True)), (dataclasses.replace(after, ground="grey"), (True, False))):
        outcome = judge_editing(row, draw(made, 64))
        assert (outcome["right"], outcome["kept"]) == facts
    smaller = dataclasses.replace(after, things=(dataclasses.replace(RED, size="small"),))
    assert judge_editing(row, draw(smaller, 64))["kept"] is False
    assert judge_editing(row, draw(before, 64))["problems"] == ["blue square where nothing should be"]
    assert judge_editing(row, draw(dataclasses.replace(after, things=()), 64))["problems"] == ["no object at all"]


def test_the_edited_region_ends_a_thirtysecond_of_the_picture_beyond_what_changes() -> None:
    source = np.zeros((64, 96, 3), dtype=np.uint8)
    target = source.copy()
    target[20, 30] = (0, 1, 0)
    by_hand = np.zeros((64, 96), dtype=bool)
    by_hand[18:23, 28:33] = True
    assert np.array_equal(edited_region(source, target), by_hand)
    small = edited_region(source[:16], np.maximum(source[:16], 0))
    assert not small.any()
    assert edited_region(source[16:32], target[16:32]).sum() == 9  # at least one pixel


def seen(*things: Thing, ground: str = "white") -> Detection:
    found = tuple(
        Found(thing.shape, thing.colour, thing.size, thing.cell, thing.centre, tuple(thing.truth()["bbox"]), 0.9)  # type: ignore[arg-type]
        for thing in things
    )
    return Detection(found, ground, "plain", 0)


def test_what_lies_outside_of_an_edit_is_compared_with_the_truth() -> None:
    truth = {"scenes": [Scene((RED,), "white", "plain", 0).truth(), Scene((BLUE,), "white", "plain", 0).truth()]}
    source = np.full((16, 16, 3), 100, dtype=np.uint8)
    target, result = source.copy(), source.copy()
    target[:, :8] = 150  # the edit and its rim are nine columns
    result[:, :9] = 0
    result[3, 12] = (100 + 51, 100, 100)
    outcome = judge_edit(truth, seen(BLUE), result, source, target)
    # One value of 7 x 16 x 3 is off by 51 = 255 / 5.
    assert outcome.l1 == pytest.approx(0.2 / (7 * 16 * 3))
    assert outcome.psnr == pytest.approx(10 * np.log10(1 / (0.04 / (7 * 16 * 3))))
    options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    likeness = structural_similarity(result, target, full=True, **options)[1]  # its windows reach into the edit
    assert outcome.ssim == pytest.approx(likeness[:, 9:].mean(), abs=1e-6)
    # Columns 0 to 11 and their rim leave 3 x 16 = 48 pixels, of 64 that are needed.
    target[:, :12] = 150
    left = judge_edit(truth, seen(BLUE), result, source, target)
    assert (left.psnr, left.l1, left.ssim) == (None, None, None)
    target = source.copy()
    target[:, :11] = 150
    assert judge_edit(truth, seen(BLUE), result, source, target).psnr is not None


def test_exactly_the_counted_objects_and_no_more() -> None:
    two = [RED, dataclasses.replace(RED, cell=5)]
    truth = {"category": "counting", "scenes": [{"objects": [thing.truth() for thing in two]}]}
    metadata = geneval_metadata(truth, "words")
    assert unmet(metadata, seen(*two)) == [] and unmet(metadata, seen(*two, BLUE)) == []
    assert unmet(metadata, seen(two[0])) == ["1 of 2 circle"]
    assert unmet(metadata, seen(*two, dataclasses.replace(RED, cell=8))) == ["3 circle, not below 3"]


def test_a_stated_place_is_that_of_the_object() -> None:
    metadata = geneval_metadata({"category": "position", "scenes": [{"objects": [RED.truth()]}]}, "words")
    assert unmet(metadata, seen(RED)) == []
    assert unmet(metadata, seen(dataclasses.replace(RED, cell=4))) == ["circle at centre, not left"]
    pair = {"category": "position", "scenes": [{"objects": [RED.truth(), BLUE.truth()]}]}
    assert unmet(geneval_metadata(pair, "words"), seen(RED)) == ["0 of 1 square", "circle not left of square"]


def test_a_scene_is_the_same_when_all_of_its_objects_are() -> None:
    scene = Scene((RED, BLUE), "white", "plain", 0).truth()
    assert same_scene(scene, seen(BLUE, RED, ground="black"))
    for change in ({"shape": "ring"}, {"colour": "green"}, {"size": "small"}, {"cell": 4}):
        assert not same_scene(scene, seen(RED, dataclasses.replace(BLUE, **change)))
    assert not same_scene(scene, seen(RED)) and not same_scene(scene, seen(RED, BLUE, Thing("star", "red", "small", 0)))


def test_sides_count_from_half_the_way_and_beyond_the_slack() -> None:
    """Boxes of 0.2: slack is 0.04 along each axis. Between 30 and 60 degrees an object is on two sides."""

    def box(x: float, y: float) -> list[float]:
        return [x - 0.1, y - 0.1, x + 0.1, y + 0.1]

    centre = box(0.5, 0.5)
    assert relations(box(0.541, 0.5), centre) == set()  # 0.001 of 0.041 beyond the slack
    assert relations(box(0.585, 0.5), centre) == {"right of"}  # 0.045 of 0.085: more than half
    assert relations(box(0.575, 0.5), centre) == set()  # 0.035 of 0.075: less
    assert relations(box(0.5, 0.2), centre) == {"above"} and relations(box(0.2, 0.75), centre) == {"left of", "below"}


def test_half_of_the_way_is_not_more_than_half() -> None:
    """Sizes of 1.25 together have a slack of 0.125, half of a distance of 0.25."""
    box = np.array([0.0, 0.0, 0.625, 0.625])
    for side, shift in {"right of": (1, 0), "left of": (-1, 0), "below": (0, 1), "above": (0, -1)}.items():
        assert relations(box + 0.25 * np.array([*shift, *shift]), box) == set()
        assert relations(box + 0.26 * np.array([*shift, *shift]), box) == {side}


def test_the_slack_of_an_axis_is_that_of_the_sizes_along_it() -> None:
    """Widths of 0.6 and heights of 0.2 together: beyond 0.12 across, and beyond 0.04 down."""
    low, wide = np.array([0.4, 0.45, 0.6, 0.55]), np.array([0.3, 0.45, 0.7, 0.55])
    for side, (across, down) in {"right of": (0.13, 0), "below": (0, 0.05)}.items():
        assert relations(wide + np.array([across, down, across, down]), low) == {side}
    for across, down in ((0.11, 0), (0, 0.03)):
        assert relations(wide + np.array([across, down, across, down]), low) == set()


def test_pictures_are_compared_at_the_size_that_was_painted(tmp_path: Path) -> None:
    """A truth of another size and aspect is cut at its middle, as decoders are trained."""
    values = np.zeros((40, 80, 3), dtype=np.uint8)
    values[:, 20:60] = 200
    Image.fromarray(values).save(tmp_path / "wide.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "source.png")
    row = Row(
        "7",
        "",
        [tmp_path / "source.png", tmp_path / "wide.png"],
        [{"role": "user", "content": "a"}],
        "generation",
        "",
        [],
        TRUTH,
    )
    assert (pixels_like(Image.new("RGB", (40, 40)), row.images[1]) == 200).all()
    outcome = judge_reconstruction(row, Image.new("RGB", (40, 40), (200, 200, 251)), "editing_decoder")
    assert (outcome["phase"], outcome["id"]) == ("reconstruction/editing_decoder", "7")
    assert outcome["psnr"] == pytest.approx(10 * np.log10(3 / 0.04))
    # Pictures of one colour differ in brightness alone, here in one channel of three.
    c1 = 2.55**2
    blue = (2 * 200 * 251 + c1) / (200**2 + 251**2 + c1)
    assert outcome["ssim"] == pytest.approx((1 + 1 + blue) / 3)


def test_an_outcome_says_what_was_asked(tmp_path: Path) -> None:
    row = row_of("understanding", [Scene((RED,), "white", "plain", 0)], "colour", tmp_path)
    assert judge_answer(row, "It is red.") == {
        "phase": "understanding",
        "id": "7",
        "category": "colour",
        "language": "en",
        "prompt": "words",
        "right": True,
        "answer": "It is red.",
        "truth": "red",
    }
    assert judge_answer(row, "blue")["right"] is False


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"category": "counting"}, "truth.category is 'counting'; of understanding rows there are colour"),
        ({"scenes": []}, "truth has 0 scenes for 1 pictures"),
        ({"scenes": [{"objects": []}]}, "truth.scenes must be a list of {ground, objects, texture}"),
        ({"scenes": [{"objects": [], "ground": float("nan"), "texture": ""}]}, "ground is nan; it must be a finite"),
    ],
)
def test_rows_whose_truth_is_not_one_are_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    row = row_of("understanding", [Scene((RED,), "white", "plain", 0)], "colour", tmp_path)
    assert require_truth(row) is row.truth
    with pytest.raises(UserError, match=sentence):
        require_truth(dataclasses.replace(row, truth={**(row.truth or {}), **change}))
    with pytest.raises(UserError, match="truth lacks language; rows with scenes need category, language, scenes"):
        require_truth(dataclasses.replace(row, truth={"category": "colour"}))


def test_truth_that_names_no_scenes_is_none_for_a_detector(tmp_path: Path) -> None:
    """A row with an answer of its own: no category, its own language, and scores of rows without scenes."""
    row = dataclasses.replace(
        row_of("understanding", [Scene((RED,), "white", "plain", 0)], "colour", tmp_path),
        truth={"answers": ["red"]},
    )
    with pytest.raises(UserError, match="no ground truth to score by"):
        require_truth(row)
    outcome = outcome_of(row, "understanding")
    assert "category" not in outcome and outcome["language"] == row.language
    answers = [
        {"phase": "understanding", "prompt": "?", "exact": n == 0, "similarity": n / 2, "replies": ["a"]}
        for n in (0, 1)
    ]
    assert scores_of(answers) == own_scores("understanding", answers) != {}
