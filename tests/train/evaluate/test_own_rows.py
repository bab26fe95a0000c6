"""Rows without ground truth: which are asked, what theirs is found among, how replies and edits are judged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.messages.rows import Row, read_rows
from train.evaluate.own_rows import KnownPictures, judge_change, judge_reply
from train.evaluate.rows import key_of, look_at, probe_pictures, read_tasks

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


def picture(path: Path, colour: tuple[int, int, int], corner: tuple[int, int, int] | None = None) -> str:
    """A picture of 32 x 32 pixels, whose corner of 8 x 8 may have a colour of its own."""
    image = Image.new("RGB", (32, 32), colour)
    if corner:
        image.paste(corner, (0, 0, 8, 8))
    image.save(path)
    return path.name


def row(user: str, reply: Any, *images: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return {"messages": messages, "images": list(images), **more}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[Row]:
    return list(read_rows(path))


def test_what_cannot_be_asked_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    red = picture(tmp_path / "red.png", RED)
    two = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}
    longer = row("<image> What?", "Red.", red)
    longer["messages"] += two
    path = written(
        tmp_path / "rows.jsonl",
        row("<image> What?", "Red.", red, id="a"),
        row("<image> What else?", "Nothing.", red, id="a"),
        row("Hello", "Hello"),
        longer,
        row("Draw two.", "<image><image>", red, red),
        row("<image> What?", "Red."),
    )
    tasks = read_tasks(path, None)
    assert {task: [one.id for one in rows] for task, rows in tasks.items()} == {"understanding": ["a", "a#2"]}
    for words, line in (
        ("no pictures", 3),
        ("more than one exchange", 4),
        ("than one picture", 5),
        ("cannot be read", 6),
    ):
        assert any(words in message and f"rows.jsonl:{line}" in message for message in caplog.messages), words


def test_equal_pictures_are_one_whatever_their_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    red, green = picture(tmp_path / "red.png", RED), picture(tmp_path / "green.png", GREEN)
    Image.open(tmp_path / "red.png").save(tmp_path / "same.bmp")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    path = written(
        tmp_path / "rows.jsonl",
        row("Draw red.", "<image>", red, id="1", truth={"label": "r"}),
        row("Draw it red.", "<image>", "same.bmp", id="2"),
        row("Draw.", "<image>", "broken.png", id="3"),
        row("Draw green.", "<image>", green, id="4"),
    )
    asked, known, keys = look_at(rows_of(path), 2)
    assert [one.id for one in asked] == ["1", "2"]
    assert [(one.row, one.place, one.prompts, one.labels) for one in known] == [
        ("1", 0, {"Draw red.", "Draw it red."}, {"r"}),
        ("4", 0, {"Draw green."}, frozenset()),
    ]
    assert keys["1"] == keys["2"] == known[0].key == key_of(tmp_path / "same.bmp")
    assert any("rows.jsonl:3" in message for message in caplog.messages)
    assert len(look_at(rows_of(path), None)[0]) == 3


def test_edits_are_found_among_their_sources_too(tmp_path: Path) -> None:
    red, green = picture(tmp_path / "red.png", RED), picture(tmp_path / "green.png", GREEN)
    path = written(tmp_path / "rows.jsonl", row("<image> Green.", "<image>", red, green, truth={"label": "g"}))
    _, known, _ = look_at(rows_of(path), None)
    assert [(one.place, one.prompts, one.labels) for one in known] == [(0, set(), set()), (1, set(), {"g"})]


def test_a_probe_is_taught_by_other_rows_of_the_same_prompts(tmp_path: Path) -> None:
    red, green, blue = (
        picture(tmp_path / f"{name}.png", colour) for name, colour in (("r", RED), ("g", GREEN), ("b", BLUE))
    )
    pink = picture(tmp_path / "p.png", (255, 100, 100))
    heldout = written(tmp_path / "heldout.jsonl", row("Draw warm.", "<image>", red), row("Draw cold.", "<image>", blue))
    train = written(
        tmp_path / "train.jsonl",
        row("Draw warm.", "<image>", pink),
        row("Draw something.", "<image>", green),
        row("Draw warm.", "<image>", red),  # held out
        row("<image> Draw warm.", "<image>", green, pink),  # an edit
        row("Draw cold.", "<image>", "gone.png"),
    )
    _, known, _ = look_at(rows_of(heldout), None)
    (taught,) = probe_pictures(train, known, "generation")
    assert (taught.image, taught.prompts) == (tmp_path / pink, {"Draw warm."})
    assert probe_pictures(train, known[:1], "generation") == []  # of one prompt there is nothing to tell


def test_replies_are_compared_with_every_one_that_is_allowed(tmp_path: Path) -> None:
    red = picture(tmp_path / "red.png", RED)
    path = written(
        tmp_path / "rows.jsonl",
        row("<image>\nWhat?", ["It is red.", "Scarlet."], red),
        row("<image>\nWhat?", "It is red.", red, truth={"answer": "red"}),
    )
    choices, truth = rows_of(path)
    outcome = judge_reply(choices, "scarlet")
    assert (outcome["exact"], outcome["similarity"], outcome["prompt"]) == (True, 1.0, "What?")
    assert "right" not in outcome and outcome["truth"] == "It is red."
    outcome = judge_reply(truth, "Red!")
    assert (outcome["exact"], outcome["right"], outcome["true_answer"]) == (False, True, "red")
    assert outcome["similarity"] == pytest.approx(2 / 4)


def test_an_edit_is_judged_inside_and_outside_of_what_it_changes(tmp_path: Path) -> None:
    source, target = picture(tmp_path / "s.png", RED), picture(tmp_path / "t.png", RED, corner=BLUE)
    (edit,) = rows_of(written(tmp_path / "rows.jsonl", row("<image> Blue.", "<image>", source, target)))
    perfect = judge_change(edit, Image.open(tmp_path / target))
    assert (perfect["psnr"], perfect["inside_psnr"], perfect["changed"]) == (100, 100, True)
    nothing = judge_change(edit, Image.open(tmp_path / source))
    assert (nothing["psnr"], nothing["changed"]) == (100, False)
    # The corner of 8 x 8 with a rim of one pixel is 9 x 9; in 64 of 81 pixels two of three channels differ by 200.
    by_hand = 10 * np.log10(255**2 / (200**2 * 2 / 3 * 64 / 81))
    assert nothing["inside_psnr"] == pytest.approx(by_hand) == pytest.approx(nothing["unchanged_psnr"])
    everywhere = judge_change(edit, Image.new("RGB", (32, 32), BLUE))
    assert everywhere["changed"] and everywhere["psnr"] == pytest.approx(10 * np.log10(255**2 / (200**2 * 2 / 3)))


def test_an_edit_that_changes_nothing_or_all_leaves_nothing_to_measure(tmp_path: Path) -> None:
    red, blue = picture(tmp_path / "r.png", RED), picture(tmp_path / "b.png", BLUE)
    same, all_of_it = rows_of(
        written(
            tmp_path / "rows.jsonl",
            row("<image> Keep.", "<image>", red, red),
            row("<image> Blue.", "<image>", red, blue),
        )
    )
    kept = judge_change(same, Image.open(tmp_path / red))
    assert (kept["psnr"], kept["inside_psnr"], kept["changed"]) == (100, None, None)
    changed = judge_change(all_of_it, Image.open(tmp_path / blue))
    assert (changed["psnr"], changed["inside_psnr"], changed["changed"]) == (None, 100, True)


def test_a_comparison_names_the_nearest_row_and_what_is_read(tmp_path: Path) -> None:
    names = [picture(tmp_path / f"{n}.png", colour) for n, colour in enumerate((RED, GREEN, BLUE))]
    rows = [row(f"Draw {kind}.", "<image>", name, id=name) for kind, name in zip(("a", "a", "b"), names, strict=True)]
    _, known, keys = look_at(rows_of(written(tmp_path / "rows.jsonl", *rows)), None)
    embeds = np.array([[[1.0, 0.0]], [[1.0, 0.2]], [[0.0, 1.0]]])
    pictures = KnownPictures(known, embeds)
    (found,) = pictures.compare(embeds[2:], [keys["0.png"]], embeds[:1])
    assert (found["rank"], found["among"], found["nearest"]) == (3, 3, {"id": "2.png", "place": 0})
    assert found["class"] == {"name": "Draw b.", "right": False, "chance": 0.5, "true_right": True}
    assert "label" not in found and json.dumps(found)
