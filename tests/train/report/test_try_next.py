"""The commands that the report suggests: words and pictures of held-out rows, as a shell takes them."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from data.messages.rows import Row, read_rows
from nexus_gen.parts.models import SHIPPED_RUN
from nexus_gen.pictures.images import open_image
from train.report.try_next import commands_to_try


def rows(directory: Path, *lines: tuple[str, str, list[str]]) -> list[Row]:
    path = directory / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for user, reply, images in lines:
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
            file.write(json.dumps({"messages": messages, "images": images}) + "\n")
    return list(read_rows(path))


def test_prompts_are_of_the_rows_and_quoted_for_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a cat.png")
    found = commands_to_try(
        rows(
            tmp_path,
            ("<image>\n它's 什么颜色？", "红", ["a cat.png"]),
            ("Generate an image according to the following description: a $5 cat", "<image>", ["a cat.png"]),
            ("<image> 让它变红", "<image>", ["a cat.png", "a cat.png"]),
        ),
        tmp_path / "report.html",
    )
    assert found == [
        ["generate", "--prompt", "a $5 cat"],
        ["edit", "--input-image", "a cat.png", "--instruction", "让它变红", "--language", "zh"],
        ["understand", "--input-image", "a cat.png", "--prompt", "它's 什么颜色？"],
    ]
    assert [shlex.split(shlex.join(command)) for command in found] == found


def test_a_picture_elsewhere_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    Image.new("RGB", (8, 8)).save(there / "a.png")
    monkeypatch.chdir(here)
    found = commands_to_try(rows(there, ("<image> What?", "A cat.", ["a.png"])), here / "report.html")
    assert found == [["understand", "--input-image", str(there / "a.png"), "--prompt", "What?"]]


def test_a_picture_inside_its_row_is_written_beside_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = list(read_rows(SHIPPED_RUN / "shapes" / "artifact" / "heldout.jsonl"))
    commands = {command[0]: command for command in commands_to_try(shipped, tmp_path / "page.html")}
    edited = next(row for row in shipped if row.task == "editing")
    assert commands["edit"][1:3] == ["--input-image", "page-editing-0.png"]
    assert open_image(tmp_path / "page-editing-0.png").tobytes() == open_image(edited.images[0]).tobytes()
    assert commands["understand"][2] == "page-understanding-0.png"
