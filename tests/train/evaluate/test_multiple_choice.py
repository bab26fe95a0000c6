"""Multiple choice as MMMU has it: rows to questions, replies to letters, letters to scores."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from data.records.reading import read_records
from nexus_gen.pictures.images import open_image
from nexus_gen.specs.errors import UserError
from train.evaluate.multiple_choice import Question, read_question, scores_of
from train.scores.letter_reader import parse_letter

OPTIONS = {"A": "a circle", "B": "two", "C": "-3 m/s", "D": "None of the above"}


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def question_of(values: dict[str, Any], path: Path) -> Question | None:
    path.write_text(json.dumps(values), encoding="utf-8")
    (record,) = read_records(path)
    return read_question(record)


def test_a_row_of_mmmu_becomes_a_question(tmp_path: Path) -> None:
    row = {
        "id": "validation_Art_Theory_12",
        "question": "Which of <image 2> and <image 1> is red?",
        "options": "['the first', \"<image 3>\", 'both']",
        "answer": "B",
        "question_type": "multiple-choice",
        **{f"image_{number}": None for number in range(4, 8)},
        **{
            f"image_{number}": {"bytes": picture(colour), "path": f"{number}.png"}
            for number, colour in enumerate(("red", "blue", "green"), start=1)
        },
    }
    file = tmp_path / "validation.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row, {**row, "question_type": "open", "options": "[]"}]), file)
    question, open_question = map(read_question, read_records(file))
    assert open_question is None and question is not None
    assert (question.id, question.subject, question.answer) == ("validation_Art_Theory_12", "Art_Theory", "B")
    assert question.content.splitlines()[:3] == ["Which of <image> and <image> is red?", "A. the first", "B. <image>"]
    colours = [open_image(image).getpixel((0, 0)) for image in question.images]
    assert colours == [(0, 0, 255), (255, 0, 0), (0, 128, 0)]  # in the order of the tags


def test_pictures_that_are_named_nowhere_come_first(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("red"))
    row = {"question": "What?", "options": ["x", "y"], "answer": "A", "subject": "shapes"}
    absent = {"question_type": None, "images": None, "image_2": None}  # where Parquet became JSON
    row |= {**absent, "image_1": "a.png"}
    question = question_of(row, tmp_path / "q.jsonl")
    assert question is not None
    assert question.content.startswith("<image>\nWhat?\nA. x\nB. y\n")
    assert (question.images, question.subject, question.options) == (
        [tmp_path / "a.png"],
        "shapes",
        {"A": "x", "B": "y"},
    )


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"options": ["x"]}, "options must be a list of 2 to 26 texts"),
        ({"options": "x, y"}, "options is a text that is no list"),
        ({"answer": "C"}, "answer is 'C'; it must be one of A, B"),
        ({"question": "See <image 2>"}, "<image 2> stands in it, but it has 0 pictures"),
        ({"question": None}, "no question"),
        ({"answer": ["A"]}, r"answer is \['A'\]; it must be one of A, B"),
        ({"images": "a.png"}, "images is a str; give a list"),
        ({"question": "See <image>"}, "<image> stands in it; say which picture"),
    ],
)
def test_broken_questions_are_named(changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    row = {"question": "What?", "options": ["x", "y"], "answer": "A", **changed}
    with pytest.raises(UserError, match=rf"q.jsonl:1: {sentence}"):
        question_of(row, tmp_path / "q.jsonl")


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        (" (C) because", "C"),
        ("D.", "D"),
        ("B because it is", "B"),
        ("A: a circle", "A"),
        ("The answer is B.", "B"),
        ("I think answer: (D)", "D"),
        ("It has to be (A), as it is round", "A"),
        ("two", "B"),
        ("none of the above.", "D"),
        ("A circle is round", None),  # an article, not a letter
        ("E", None),
        ("", None),
        ("Blue", None),
    ],
)
def test_letters_of_replies(reply: str, letter: str | None) -> None:
    assert parse_letter(reply, OPTIONS) == letter


def test_scores_by_subject() -> None:
    answered = [
        ("maths", True, "A"),
        ("maths", False, "B"),
        ("art", True, "A"),
        ("art", True, "C"),
        ("art", False, None),
    ]
    scores = scores_of([{"subject": s, "right": right, "letter": letter} for s, right, letter in answered])
    assert {name: round(score.value, 4) for name, score in scores.items()} == {
        "accuracy": 0.6,
        "mean_over_subjects": 0.5833,
        "named_a_letter": 0.8,
        "subject/art": 0.6667,
        "subject/maths": 0.5,
    }
