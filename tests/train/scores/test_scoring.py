"""What counts as right: the true picture in every category, never a wrong one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.messages.rows import Row, read_rows
from data.shapes.contents import CAPTIONS, CHINESE_SIDES, EDITS, QUESTIONS, YES_NO
from data.shapes.dataset import DEFAULTS, draw_rows
from data.shapes.detector import Detection, Found, detect
from data.shapes.scenes import CELLS, COLOURS, SHAPES, Scene, Thing, draw, name, renamed
from nexus_gen.pictures.images import open_image
from train.scores.outcomes import judge_answer, judge_editing, judge_generation, judge_reconstruction, scores_of
from train.scores.scoring import geneval_metadata, is_right, relations, unmet

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
    for score in ("generation/exact_scene", "generation/ground", "generation/texture", "editing/kept"):
        assert scores[score].value == 1.0, score
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


# true answer -> answers that say it, and answers that do not
SAYS: dict[str, tuple[str, ...]] = {
    "red": (
        "Red",
        "It is red.",
        "The colour of the circle is red.",
    ),
    "top left": (
        " top left. ",
        "at the top left",
        "Top-left corner.",
        "top left of the picture",
    ),
    "没有": (
        "没有。",
        "没",
        "图中没有红色圆形",
        "不是",
        "否",
    ),
    "3": (
        "３",
        "three",
        "There are three shapes.",
        "三",
        "三个",
        "图中有三个三角形",
        "Three.",
        "3 (2 circles and 1 square)",
        "一共有3个",
        "**3**",
    ),
    "circle": ("It's a circle",),
    "红色": (
        "红",
        "红色的。",
        "它是红色的。",
    ),
    "圆形": (
        "圆",
        "是圆形",
    ),
    "左上角": (
        "左上",
        "左上方",
        "左上方。",
    ),
    "左边": (
        "在左边",
        "左面",
    ),
    "left": (
        "on the left",
        "to the left",
    ),
    "yes": (
        "Yes, there is a red circle.",
        "yes",
        "There is a red circle.",
        "<think>hm</think>yes",
    ),
    "no": (
        "No.",
        "No, there isn't.",
        "There is no red circle.",
    ),
    "有": (
        "有的",
        "有，图中有红色圆形",
        "是的",
    ),
    "grey": ("gray",),
    "12": ("十二",),
    "2": (
        "两个",
        "Two triangles",
        "两个三角形",
    ),
    "0": (
        "none",
        "zero",
    ),
    "a triangle": ("triangle",),
    "三角形": (
        "三角形",
        "三角",
    ),
    "4": ("I see 4 objects",),
    "5": ("the answer is five",),
    "centre": (
        "centre",
        "in the centre",
    ),
    "中间": ("中间",),
    "above": ("above",),
    "上面": ("上方",),
    "green": (
        "green.",
        "color: green",
    ),
    "五": (
        "五",
        "5",
    ),
    "十字": (
        "十字",
        "十字形",
    ),
}
SAYS_NOT: dict[str, tuple[str, ...]] = {
    "red": (
        "red circle",
        "not red",
        "red or blue",
        "blue",
        "dark red",
        "a horse",
        "",
        "the",
        "it is",
    ),
    "no": (
        "",
        "yes and no",
        "maybe",
        "a horse",
        "I cannot tell",
        "I don't know",
    ),
    "左上角": (
        "左边",
        "左",
    ),
    "3": (
        "3 or 4",
        "2 circles and 1 square",
        "more than 3",
        "at least 3",
        "13",
        "3.5",
        "三角形",
        "30",
        "三十",
        "a horse",
        "No",
        "it is not 3",
    ),
    "2": ("2 circles and 1 square",),
    "yes": (
        "yes and no",
        "no",
        "I cannot tell",
        "maybe",
        "red",
        "a horse",
    ),
    "有": (
        "有没有",
        "没有",
        "a horse",
    ),
    "没有": (
        "有没有",
        "有",
        "a horse",
        "不知道",
        "无法判断",
        "不确定",
    ),
    "right": ("left",),
    "left": ("top left",),
    "top left": ("left",),
    "三角形": ("三",),
    "红色": (
        "蓝",
        "是",
    ),
    "方形": ("圆",),
    "深红色": ("红色",),
    "5": ("五角星",),
    "10": ("十字",),
    "圆环": ("圆形",),
    "下方": ("上方",),
    "4": ("四边形",),
    "左边": ("不在左边",),
}


SENTENCES = {
    "red": (
        "The circle is red.",
        "Its color is red.",
        "The circle appears to be red.",
        "The circle on the left is coloured red.",
        "It looks red",
        "Red, of course.",
    ),
    "circle": ("The red shape is a circle.", "This image shows a circle.", "The object is a circle."),
    "top left": ("The circle is in the upper left.", "It is located in the top left corner of the image."),
    "centre": ("In the middle.", "It is in the center of the picture."),
    "21": ("twenty-one", "There are twenty-one."),
    "1000": ("1,000", "There are 1,000 of them."),
    "红色": ("圆形是红色的", "图中圆形的颜色是红色。", "紅色", "圆形呈红色"),
    "圆形": ("这是一个圆形。", "一个圆形", "這是一個圓形"),
    "左上角": ("圆形在左上角", "位于图片的左上角。", "在位置在左上角"),
}
OTHERS = {
    "red": (
        "The circle is not red.",
        "The circle isn't red",
        "The square is blue and the circle is red.",
        "The circle is red or blue.",
        "The red shape is a circle.",
    ),
    "above": ("The circle is above the square.",),
    "1000": ("1,0000", "1, 000"),
    "红色": ("圆形不是红色", "圆形是红色还是蓝色", "红色圆形", "圆是红色，方是蓝色"),
}


@pytest.mark.parametrize("truth", SENTENCES)
def test_a_sentence_about_what_was_asked_says_its_last_words(truth: str) -> None:
    assert [answer for answer in SENTENCES[truth] if not is_right(answer, truth)] == []


@pytest.mark.parametrize("truth", OTHERS)
def test_a_sentence_about_more_than_was_asked_is_wrong(truth: str) -> None:
    assert [answer for answer in OTHERS[truth] if is_right(answer, truth)] == []


@pytest.mark.parametrize("truth", SAYS)
def test_answers_that_say_the_truth_are_right(truth: str) -> None:
    assert [answer for answer in SAYS[truth] if not is_right(answer, truth)] == []


@pytest.mark.parametrize("truth", SAYS_NOT)
def test_answers_that_say_something_else_are_wrong(truth: str) -> None:
    assert [answer for answer in SAYS_NOT[truth] if is_right(answer, truth)] == []


def test_only_its_own_answer_is_right_of_the_answers_of_the_dataset() -> None:
    for language in ("en", "zh"):
        answers = [*(str(number) for number in range(1, 7)), *YES_NO[language]]
        answers += [name(word, language) for word in (*COLOURS, *SHAPES, *CELLS)]
        answers += [renamed(name(word, language), language) for word in (*COLOURS, *SHAPES)]
        answers += ["left", "right", "above", "below"] if language == "en" else list(CHINESE_SIDES.values())
        right = {(one, other) for one in answers for other in answers if is_right(one, other)}
        assert {pair for pair in right if pair[0] != pair[1]} <= {
            ("上面", "上方"),
            ("上方", "上面"),
            ("下面", "下方"),
            ("下方", "下面"),
        }


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
