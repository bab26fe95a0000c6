"""What `truth` of a row may hold, and how the doctor and an evaluation name what it may not."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.doctor.command import main as doctor
from data.messages.rows import read_rows
from data.messages.truth import has_scenes, truth_problem
from nexus_gen.parts.models import SHIPPED_RUN

ASKS = {
    "images": ["a.png"],
    "messages": [{"role": "user", "content": "<image> What?"}, {"role": "assistant", "content": "A cat."}],
}
MAKES = {
    "images": ["a.png"],
    "messages": [{"role": "user", "content": "Draw a cat."}, {"role": "assistant", "content": "Here: <image>"}],
}
SCENE = {"objects": [], "ground": "white", "texture": "plain"}
SCENES = {"category": "colour", "language": "en", "scenes": [SCENE]}


def problem(tmp_path: Path, row: dict[str, Any], truth: Any) -> str | None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "truth": truth}), encoding="utf-8")
    return truth_problem(next(read_rows(path)))


@pytest.mark.parametrize(
    ("row", "truth", "sentence"),
    [
        (ASKS, {"answer": "cat"}, None),
        (MAKES, {"label": "cat"}, None),
        (ASKS, SCENES, None),
        (ASKS, None, None),
        (ASKS, {}, "truth is empty; give answer, label or scenes, or leave it out"),
        (ASKS, {"anser": "cat"}, "truth has an unknown key 'anser'; split, task, category,"),
        (ASKS, {"answer": 3}, "truth.answer is 3; it must be a text"),
        (ASKS, {"answer": ["cat"]}, "truth.answer is ['cat']; it must be a text"),
        (ASKS, {"answer": " "}, "truth.answer is empty; write it, or leave it out"),
        (ASKS, {"label": "cat"}, "truth.label has no effect on a row that asks; take it out"),
        (MAKES, {"answer": "cat"}, "truth.answer has no effect on a row that makes a picture; take it out"),
        (MAKES, {"language": "en"}, "truth holds nothing that a generation row is scored by; give label"),
        (ASKS, {"scenes": [SCENE]}, "truth lacks category; rows with scenes need category, language, scenes"),
        (ASKS, {**SCENES, "category": "taste"}, "truth.category is 'taste'; of understanding rows there are colour,"),
        (ASKS, {**SCENES, "language": "fr"}, "truth.language is 'fr'; it must be en or zh"),
        (ASKS, {**SCENES, "scenes": [SCENE, SCENE]}, "truth has 2 scenes for 1 pictures; give one each"),
        (ASKS, {**SCENES, "scenes": [{}]}, "truth.scenes must be a list of {ground, objects, texture}"),
        (ASKS, {**SCENES, "scenes": [{**SCENE, "objects": [{}]}]}, "truth.scenes[0].objects must be a list of {shape,"),
    ],
)
def test_a_truth_that_nothing_can_be_scored_by_says_why(
    row: dict[str, Any], truth: Any, sentence: str | None, tmp_path: Path
) -> None:
    found = problem(tmp_path, row, truth)
    assert found is None if sentence is None else (found or "").startswith(sentence), found


def test_the_rows_that_ship_are_of_the_form() -> None:
    rows = list(read_rows(SHIPPED_RUN / "shapes" / "artifact" / "heldout.jsonl"))
    assert [truth_problem(row) for row in rows] == [None] * len(rows)
    assert all(map(has_scenes, rows))


def test_the_doctor_names_file_line_and_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # of the table that it prints
    Image.radial_gradient("L").save(tmp_path / "a.png")
    rows = [{**MAKES, "truth": {"label": "cat"}}, {**ASKS, "truth": {"lable": "cat"}}, ASKS]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    quarantine = tmp_path / "quarantine.jsonl"
    assert doctor(["check", str(path), "--quarantine", str(quarantine)]) == 2
    assert "rows.jsonl:2: truth has an unknown key 'lable'" in capsys.readouterr().out
    (named,) = map(json.loads, quarantine.read_text(encoding="utf-8").splitlines())
    assert (named["line"], named["kind"]) == (2, "truth")
