"""What counts as right: the true picture in every category, never a wrong one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.detector import Detection, Found, detect
from data.messages import Row, read_rows
from data.scenes import Scene, Thing, draw
from data.shape_contents import CAPTIONS, EDITS, QUESTIONS
from data.shapes import DEFAULTS, draw_rows
from nexus_gen.specs.images import open_image
from train.outcomes import judge_answer, judge_editing, judge_generation, judge_reconstruction, scores_of
from train.scoring import geneval_metadata, is_right, relations, unmet

CONFIG = dataclasses.replace(
    DEFAULTS, num_train=1, num_heldout=90, num_compositional=90, image_size=64, num_colours=8, num_shapes=6
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    directory = tmp_path_factory.mktemp("shapes")
    draw_rows(directory, CONFIG, seed=3, num_workers=1)
    return [row for split in ("heldout", "compositional") for row in read_rows(directory / f"{split}.jsonl")]


def of_task(rows: list[Row], task: str) -> list[Row]:
    return [row for row in rows if row.task == task]


def test_true_pictures_and_answers_score_everything(rows: list[Row]) -> None:
    outcomes = [judge_answer(row, row.messages[-1]["content"]) for row in of_task(rows, "understanding")]
    outcomes += [judge_generation(row, open_image(row.images[0])) for row in of_task(rows, "generation")]
    outcomes += [judge_editing(row, open_image(row.images[1])) for row in of_task(rows, "editing")]
    outcomes += [judge_reconstruction(row, open_image(row.images[-1]), "generation_decoder") for row in rows[:5]]
    scores = scores_of(outcomes)
    for task, kinds in {"understanding": QUESTIONS, "generation": CAPTIONS, "editing": EDITS}.items():
        for kind in (*kinds, "overall", "en/overall", "zh/overall"):
            assert scores[f"{task}/{kind}"].value == 1.0, (task, kind)
    for name in ("generation/exact_scene", "generation/ground", "generation/texture", "editing/kept"):
        assert scores[name].value == 1.0, name
    assert scores["editing/right_and_kept"].value == 1.0
    assert (scores["editing/outside_psnr"].value, scores["editing/outside_l1"].value) == (100.0, 0.0)
    assert scores["reconstruction/generation_decoder/psnr"].value == 100.0


def test_blank_pictures_and_wrong_answers_score_nothing(rows: list[Row]) -> None:
    blank = draw(Scene((), "white", "plain", 0), 64)
    outcomes = [judge_answer(row, "a horse") for row in of_task(rows, "understanding")]
    outcomes += [judge_generation(row, blank) for row in of_task(rows, "generation")]
    outcomes += [judge_editing(row, blank) for row in of_task(rows, "editing")]
    scores = scores_of(outcomes)
    for task in ("understanding", "generation", "editing"):
        assert scores[f"{task}/overall"].value == 0.0
    assert scores["generation/exact_scene"].value == scores["editing/right_and_kept"].value == 0.0


def test_an_untouched_source_is_no_edit_but_keeps_the_rest(rows: list[Row]) -> None:
    scores = scores_of([judge_editing(row, open_image(row.images[0])) for row in of_task(rows, "editing")])
    assert scores["editing/overall"].value == 0.0
    assert scores["editing/kept"].value == 1.0
    assert scores["editing/outside_psnr"].value == 100.0


def test_damage_outside_the_edited_region_is_measured_there_alone(rows: list[Row]) -> None:
    row = next(row for row in of_task(rows, "editing") if row.truth and row.truth["category"] == "recolour")
    assert row.truth is not None
    (old, new), target = (scene["objects"] for scene in row.truth["scenes"]), open_image(row.images[1])
    (cell,) = {thing["cell"] for thing, after in zip(old, new, strict=True) if thing != after}
    inside, outside = target.copy(), target.copy()
    x, y = (int((value + 0.5) / 3 * 64) for value in (cell % 3, cell // 3))
    magenta = (255, 0, 255)  # far from every ground
    inside.putpixel((x, y), magenta)
    outside.putpixel((0, 63) if cell != 6 else (63, 0), magenta)
    assert judge_editing(row, inside)["psnr"] == 100.0
    assert 20 < judge_editing(row, outside)["psnr"] < 60


RED, BLUE = Thing("circle", "red", "large", 3), Thing("square", "blue", "large", 5)
# category -> the scene that its caption asks for, one that is wrong in that point, one that is wrong in another only
CASES: dict[str, tuple[tuple[Thing, ...], tuple[Thing, ...], tuple[Thing, ...]]] = {
    "single_object": ((RED,), (BLUE,), (dataclasses.replace(RED, colour="green", cell=8),)),
    "two_objects": ((RED, BLUE), (RED,), (dataclasses.replace(RED, cell=8), BLUE)),
    "counting": (
        (RED, dataclasses.replace(RED, cell=5)),
        (RED, dataclasses.replace(RED, cell=5), dataclasses.replace(RED, cell=8)),
        (dataclasses.replace(RED, colour="green"), dataclasses.replace(RED, cell=5)),
    ),
    "colours": ((RED,), (dataclasses.replace(RED, colour="green"),), (dataclasses.replace(RED, cell=8),)),
    "position": (
        (RED, BLUE),
        (dataclasses.replace(RED, cell=5), dataclasses.replace(BLUE, cell=3)),
        (dataclasses.replace(RED, colour="pink", cell=0), dataclasses.replace(BLUE, cell=2)),
    ),
    "colour_attribution": (
        (RED, BLUE),
        (dataclasses.replace(RED, colour="blue"), dataclasses.replace(BLUE, colour="red")),
        (dataclasses.replace(RED, cell=8), BLUE),
    ),
}


@pytest.mark.parametrize("category", CAPTIONS)
def test_a_category_asks_for_its_point_and_for_no_other(category: str) -> None:
    scenes = [Scene(things, "white", "plain", 0) for things in CASES[category]]
    metadata = geneval_metadata({"category": category, "scenes": [scenes[0].truth()]}, "words")
    assert json.loads(json.dumps(metadata)) == metadata and metadata["prompt"] == "words"
    asked, wrong, elsewhere = (unmet(metadata, detect(draw(scene, 64))) for scene in scenes)
    assert (asked, elsewhere) == ([], [])
    assert len(wrong) >= 1


def test_metadata_is_that_of_geneval() -> None:
    scene = {"objects": [RED.truth(), BLUE.truth()]}
    assert geneval_metadata({"category": "position", "scenes": [scene]}, "a") == {
        "tag": "position",
        "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
        "prompt": "a",
    }
    twice = {"objects": [RED.truth(), RED.truth()]}
    assert geneval_metadata({"category": "counting", "scenes": [twice]}, "a") == {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "circle", "count": 3}],
        "prompt": "a",
    }
    one = {"objects": [RED.truth()]}
    assert geneval_metadata({"category": "position", "scenes": [one]}, "a")["include"] == [
        {"class": "circle", "count": 1, "place": "left"}
    ]


def found(shape: str, colour: str, confidence: float) -> Found:
    return Found(shape, colour, "large", 0, (0.1, 0.1), (0.0, 0.0, 0.2, 0.2), confidence)


def test_the_surest_object_of_a_class_is_the_one_that_counts() -> None:
    metadata = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "red"}], "prompt": ""}
    red, blue = found("star", "red", 0.9), found("star", "blue", 0.8)
    assert unmet(metadata, Detection((red, blue), "white", "plain", 0)) == []
    assert unmet(metadata, Detection((blue, red), "white", "plain", 0)) == ["blue star, not red"]


def test_sides_of_objects() -> None:
    box = np.array([0.4, 0.4, 0.6, 0.6])
    sides = {"left of": (-0.3, 0), "right of": (0.3, 0), "above": (0, -0.3), "below": (0, 0.3)}
    for side, (across, down) in sides.items():
        assert relations(box + np.array([across, down, across, down]), box) == {side}
    assert relations(box - [0.3, 0.3, 0.3, 0.3], box) == {"left of", "above"}
    assert relations(box + 0.01, box) == set()  # nearer than a tenth of the sizes


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("Red", "red", True),
        (" top left. ", "top left", True),
        ("没有。", "没有", True),
        ("３", "3", True),
        ("red circle", "red", False),
        ("", "no", False),
        ("左边", "左上角", False),
    ],
)
def test_answers_match_exactly_but_for_case_and_width(answer: str, truth: str, right: bool) -> None:
    assert is_right(answer, truth) is right


def edited(
    category: str, before: tuple[Thing, ...], after: tuple[Thing, ...], made: tuple[Thing, ...], path: Path
) -> Any:
    """The outcome of an edit whose result shows the things `made`."""
    scenes = [Scene(things, "white", "plain", 0) for things in (before, after, made)]
    images = []
    for number, scene in enumerate(scenes):
        images.append(path / f"{number}.png")
        draw(scene, 64).save(images[-1])
    truth = {"category": category, "language": "en", "scenes": [scene.truth() for scene in scenes[:2]]}
    messages = [{"role": role, "content": "<image> words"} for role in ("user", "assistant")]
    return judge_editing(Row("1", "test", images[:2], messages, "editing", "test:1", [], truth), Image.open(images[2]))


GREEN = Thing("star", "green", "small", 0)


@pytest.mark.parametrize(
    ("category", "before", "after", "wrong"),
    [
        ("add", (RED,), (RED, BLUE), (RED, dataclasses.replace(BLUE, cell=8))),
        ("remove", (RED, BLUE), (RED,), (RED, GREEN, dataclasses.replace(BLUE, colour="pink"))),
        ("recolour", (RED,), (dataclasses.replace(RED, colour="cyan"),), (dataclasses.replace(RED, colour="pink"),)),
        (
            "move",
            (RED, GREEN),
            (dataclasses.replace(RED, cell=8), GREEN),
            (RED, dataclasses.replace(RED, cell=8), GREEN),
        ),
        ("replace", (RED,), (dataclasses.replace(RED, shape="star"),), (dataclasses.replace(RED, shape="ring"),)),
    ],
)
def test_edits_are_right_where_they_were_asked_for(category, before, after, wrong, tmp_path) -> None:
    assert edited(category, before, after, after, tmp_path)["right"]
    outcome = edited(category, before, after, wrong, tmp_path)
    assert not outcome["right"] and outcome["problems"]
    # What is beside the edited cells decides whether the rest was kept, and nothing else.
    outcome = edited(category, before, after, (*after, Thing("cross", "purple", "large", 7)), tmp_path)
    assert outcome["right"] and not outcome["kept"] and outcome["psnr"] < 40
