"""The message format: what is accepted, and how each mistake is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data.messages.rows import count_rows, read_rows
from nexus_gen.specs.errors import UserError

USER, REPLY = {"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "a cat"}
PAINT = [{"role": "user", "content": "paint a cat"}, {"role": "assistant", "content": "here: <image>"}]
EDIT = [{"role": "user", "content": "<image> make it blue"}, {"role": "assistant", "content": "here: <image>"}]


def row(**changes: Any) -> dict[str, Any]:
    values = {"id": "1", "source": "test", "images": ["a.png"], "messages": [USER, REPLY], **changes}
    return {key: value for key, value in values.items() if value is not None}


def write(directory: Path, *rows: Any) -> Path:
    Image.new("RGB", (8, 8), "red").save(directory / "a.png")
    path = directory / "rows.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_tasks_follow_from_where_the_pictures_are(tmp_path: Path) -> None:
    text = [{"role": "user", "content": "hi"}, REPLY]
    path = write(
        tmp_path,
        row(),
        row(messages=PAINT),
        row(messages=EDIT, images=["a.png", "a.png"]),
        row(messages=text, images=[]),
        row(messages=[{"role": "system", "content": "be brief"}, *EDIT, *PAINT], images=["a.png"] * 3),
    )
    rows = list(read_rows(path))
    assert [r.task for r in rows] == ["understanding", "generation", "editing", "text", "editing"]
    assert [r.num_targets for r in rows] == [0, 1, 1, 0, 2]
    assert rows[0].images == [tmp_path / "a.png"]
    summary = count_rows(path, check_images="open").check()
    assert (summary.rows, summary.tasks["editing"]) == (5, 2)


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "a list where a JSON object"),
        (row(images=[]), "0 images for 1 <image> tags"),
        (row(images=["a.png", "a.png"]), "2 images for 1 <image> tags"),
        (row(images=[3]), "image 1 is neither a path nor bytes, but 3"),
        (row(images=["a.png", None]), "image 2 is empty; give its path, or take it out of images"),
        (row(messages=None), "no messages"),
        (row(messages=[]), "no messages"),
        (row(messages=[USER]), "turns are user"),
        (row(messages=[REPLY, USER]), "turns are assistant, user"),
        (row(messages=[USER, USER]), "turns are user, user"),
        (row(messages=[{"role": "human", "content": "<image>"}, REPLY]), "role 'human' is none of"),
        (row(messages=[{"role": "user"}, REPLY]), "a role and a content of text"),
        (row(messages=[USER, {"role": "assistant", "content": " "}]), "an assistant message is empty"),
        (row(messages=[USER, REPLY, {"role": "system", "content": "x"}]), "a system message stands first"),
        (row(messages=[{"role": "system", "content": "<image>"}, PAINT[0], REPLY]), "a system message holds <image>"),
        (row(messages=None, message=[USER, REPLY]), "unknown key 'message'; did you mean 'messages'?"),
        (row(truth="red"), "truth is a str"),
        (row(images=["gone.png"]), "gone.png does not exist"),
        (row(images=["no/dir/a.png"]), "does not exist"),
    ],
)
def test_a_broken_row_is_refused_by_file_and_line(broken: Any, sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path, row(), broken)
    with pytest.raises(UserError) as caught:
        count_rows(path, check_images="exists").check()
    assert f"{path}:2: " in str(caught.value)
    assert sentence in str(caught.value)


def test_keys_of_others_are_tolerated_beside_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path, {**row(image_size=[8, 8], idx=3, url="x"), "truth": None})
    assert count_rows(path, check_images="exists").check().rows == 1


def test_files_without_rows_or_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        count_rows(tmp_path / "no.jsonl", check_images="exists").check()
    with pytest.raises(UserError, match="holds no rows"):
        count_rows(write(tmp_path, "", ""), check_images="exists").check()
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        count_rows(tmp_path / "bytes.jsonl", check_images="exists").check()


def test_a_picture_cut_short_is_found_by_opening(tmp_path: Path) -> None:
    path = write(tmp_path, row())
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    count_rows(path, check_images="exists").check()
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        count_rows(path, check_images="open").check()
