"""The page of rows without ground truth, with all that may be missing of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from pages import Page
from PIL import Image

from data.messages.rows import read_rows
from train.evaluate.page import render
from train.evaluate.score_lines import table, tables_of
from train.scores.outcomes import scores_of

FOUND = {
    "cosine_distance": 0.25,
    "chance_cosine_distance": 0.75,
    "mse": 1.0,
    "chance_mse": 2.0,
    "rank": 2,
    "among": 10,
    "nearest": {"id": "other", "place": 0},
    "class": {"name": "Draw a dog.", "right": False, "chance": 0.2, "true_right": True},
}
ABOUT = {"id": "mine", "language": "en", "prompt": "Draw a cat."}
ASKED: dict[str, Any] = {
    "phase": "understanding",
    **ABOUT,
    **{"exact": False, "similarity": 0.5, "answer": "a <dog>", "truth": "a cat", "replies": ["a cat"]},
}
PAINTED = {"phase": "generation", **ABOUT, "picture": "made.png"}
EDITED = {
    "phase": "editing",
    **ABOUT,
    "picture": "made.png",
    **{"psnr": None, "l1": None, "ssim": None, "inside_psnr": 12.0, "unchanged_psnr": 9.0, "changed": True},
}


@pytest.mark.parametrize(
    ("outcome", "pictures", "words"),
    [
        (ASKED, 1, ["a &lt;dog&gt;", "a cat", "0.50"]),
        ({**PAINTED, "painted": FOUND, "imagined": {**FOUND, "rank": 1}}, 3, ["place 2 of 10", "Draw a dog.", "0.750"]),
        (PAINTED, 2, ["Draw a cat."]),  # one picture alone has nothing to be found among
        ({**EDITED, "painted": {**FOUND, "nearest": None}}, 4, ["12.0 dB"]),
        (EDITED, 3, ["12.0 dB"]),
    ],
)
def test_a_row_is_shown_with_what_is_known_of_it(
    outcome: dict[str, Any], pictures: int, words: list[str], tmp_path: Path
) -> None:
    for name in ("a.png", "b.png", "made.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    messages = [{"role": "user", "content": "<image> Draw a cat."}, {"role": "assistant", "content": "<image>"}]
    lines = [{"id": name, "images": ["a.png", "b.png"], "messages": messages} for name in ("mine", "other")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    rows = {row.id: row for row in read_rows(tmp_path / "rows.jsonl")}
    scores = {name: score.as_json for name, score in scores_of([outcome]).items()}
    text = render("mine", scores, [outcome], rows, tmp_path, 24)
    page = Page(text)
    assert page.tags["img"] == pictures
    assert [word for word in words if word not in text] == []


def test_chance_has_a_column_where_there_is_any() -> None:
    scores = {
        "reconstruction/editing_decoder/psnr": {"value": 20.0, "low": 19.0, "high": 21.0, "count": 3},
        "imagined/editing/mse": {"value": 0.5, "low": 0.25, "high": 0.75, "count": 3, "chance": 2.0},
        "generation/class_top1": {"value": 0.5, "low": 0.25, "high": 0.75, "count": 4, "chance": 0.125},
        "generation/zh/counting": {"value": 0.5, "low": 0.25, "high": 0.75, "count": 4},  # a detail
    }
    assert [line.split() for line in table(scores).splitlines()] == [
        ["score", "value", "95%", "interval", "chance", "rows"],
        ["reconstruction/editing_decoder/psnr", "20.0", "dB", "19.0", "to", "21.0", "3"],
        ["imagined/editing/mse", "0.500", "0.250", "to", "0.750", "2.000", "3"],
        ["generation/class_top1", "50.0%", "25.0%", "to", "75.0%", "12.5%", "4"],
    ]
    assert "chance" not in table({"editing/kept": {"value": 0.5, "low": 0.25, "high": 0.75, "count": 4}})
    assert list(tables_of(scores)) == ["reconstruction/editing_decoder", "imagined/editing", "generation"]
    ((line, *_),) = [
        lines for _, lines in tables_of({"generation/class_top1": scores["generation/class_top1"]}).values()
    ]
    assert (line.label, line.chance, line.cells) == ("class top1", "12.5%", [("50.0%", "25.0% to 75.0%", 4)])
