"""Rows as other projects and tables write them: their forms, empty columns, own keys, pictures in base64."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.messages.rows import Row, RowError, count_rows, read_rows
from data.notices import Notice
from nexus_gen.pictures.images import EncodedImage, open_image, read_image_bytes
from nexus_gen.specs.errors import UserError

ASK, REPLY = {"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "a cat"}
TEXT = [{"role": "user", "content": "hi"}, REPLY]
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}


def encoded(image_format: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def only(directory: Path, values: Any, row_format: str = "auto") -> Row:
    for seed, name in enumerate(("a.png", "b.png")):
        (directory / name).write_bytes(encoded(seed=seed))
    path = directory / "rows.jsonl"
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
    (row,) = read_rows(path, row_format)
    return row


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("openai", {"messages": [PARTS, REPLY], "images": ["a.png"]}),
        ("openai", {"messages": [PARTS, REPLY], "image": "a.png"}),
        ("openai", {"messages": [PARTS, REPLY], "images": [{"bytes": base64_of(encoded()), "path": None}]}),
        ("openai", {"messages": [{"role": "user", "content": [{"type": "text", "text": ASK["content"]}]}, REPLY]}),
        ("trl", {"prompt": [PARTS], "completion": [REPLY]}),
        ("trl", {"prompt": [{"role": "user", "content": "what?"}], "completion": [REPLY]}),
        ("trl", {"prompt": "what?", "completion": "a cat"}),
        ("swift", {"query": "what?", "response": "a cat"}),
        ("swift", {"query": ASK["content"], "response": "a cat", "history": None, "system": None}),
    ],
)
def test_chats_with_an_images_column_become_ours(name: str, values: dict[str, Any], tmp_path: Path) -> None:
    given = {"images": ["a.png"], **values} if "image" not in values else values
    for row_format in ("auto", name):
        row = only(tmp_path, given, row_format)
        assert row.messages == [ASK, REPLY] and row.task == "understanding"
        assert [read_image_bytes(image) for image in row.images] == [encoded()]


@pytest.mark.parametrize(
    "images",
    [
        "a.png",
        '["a.png"]',
        {"bytes": base64_of(encoded()), "path": None},
        [{"path": "a.png", "bytes": None}],
    ],
)
def test_one_picture_is_a_list_of_one_and_empty_ones_are_none(images: Any, tmp_path: Path) -> None:
    for values in ({"messages": [ASK, REPLY]}, {"query": "what?", "response": "a cat"}):
        for key in ("image", "images"):
            row = only(tmp_path, {**values, key: images})
            assert [read_image_bytes(image) for image in row.images] == [encoded()]


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "image"}, "what?"],
        [{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "what?"}],
        [{"image": "a.png"}, {"text": "what?"}],
        [{"image": "a.png", "text": None}, {"image": None, "text": "what?"}],
        [{"image_url": {"url": "a.png"}}, "what?"],
    ],
)
def test_parts_of_messages_say_what_they_are_in_several_ways(parts: list[Any], tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": [{"type": "output_text", "text": "a cat"}]}
    column = {"images": ["a.png"]} if {"type": "image"} in parts else {}
    row = only(tmp_path, {"messages": [{"role": "user", "content": parts}, reply], **column})
    assert row.messages == [ASK, REPLY] and [read_image_bytes(image) for image in row.images] == [encoded()]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [ASK, REPLY]},
        {"messages": json.dumps([ASK, REPLY])},
        {"messages": [PARTS, REPLY]},
        {"prompt": "what?", "completion": "a cat"},
        {"query": "what?", "response": "a cat"},
        {"conversations": [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": "a cat"}]},
    ],
)
def test_a_system_prompt_may_stand_apart_in_every_chat(values: dict[str, Any], tmp_path: Path) -> None:
    row = only(tmp_path, {**values, "images": ["a.png"], "system": "be brief"})
    assert row.messages == [{"role": "system", "content": "be brief"}, ASK, REPLY] and not row.notices
    assert only(tmp_path, {**values, "images": ["a.png"], "system": ""}).messages == [ASK, REPLY]


def test_two_system_prompts_are_an_error(tmp_path: Path) -> None:
    values = {"messages": [{"role": "system", "content": "be long"}, *TEXT], "system": "be brief"}
    with pytest.raises(RowError, match=r"jsonl:1: a system prompt both in system and as the first message; keep one"):
        only(tmp_path, values)


@pytest.mark.parametrize("prompt", ["[1] what?", "[INST] what?", "[what]"])
def test_a_prompt_in_brackets_is_a_text(prompt: str, tmp_path: Path) -> None:
    assert only(tmp_path, {"prompt": prompt, "completion": "a cat"}).messages[0]["content"] == prompt
    for text in ("[{'role': 'user', 'content': 'hi'}]", "[{"):
        with pytest.raises(RowError, match="messages are text but not JSON"):
            only(tmp_path, {"prompt": text, "completion": "a cat"})


def test_a_path_of_another_system_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [ASK, REPLY], "images": ["photos\\a.png"]}) + "\n")
    assert count_rows(tmp_path / "rows.jsonl", "exists").first.endswith(
        "does not exist; write its path with / in place of \\"
    )


def test_a_picture_may_be_called_like_a_list(tmp_path: Path) -> None:
    (tmp_path / "[x]").mkdir()
    (tmp_path / "[x]/a.png").write_bytes(encoded())
    assert only(tmp_path, {"messages": [ASK, REPLY], "images": "[x]/a.png"}).images == [tmp_path / "[x]/a.png"]
    with pytest.raises(RowError, match="images are text but not JSON"):
        only(tmp_path, {"messages": [ASK, REPLY], "images": "['a.png']"})


def test_parts_take_the_pictures_of_the_column_in_order(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": [{"type": "text", "text": "here: "}, {"type": "image", "image": None}]}
    row = only(tmp_path, {"messages": [PARTS, reply], "images": ["b.png", "a.png"]})
    assert [read_image_bytes(image) for image in row.images] == [encoded(seed=1), encoded()]
    assert row.task == "editing" and row.messages[1]["content"] == "here: <image>"
    mixed = {"role": "assistant", "content": [{"type": "image", "image": "b.png"}]}
    with pytest.raises(RowError, match="both among the parts of messages and in images"):
        only(tmp_path, {"messages": [PARTS, mixed], "images": ["a.png"]})


def test_history_and_system_of_ms_swift_come_first(tmp_path: Path) -> None:
    values = {"query": "and now?", "response": "a dog", "history": [["what?", "a cat"]], "system": "be brief"}
    row = only(tmp_path, values | {"images": ["a.png", "b.png"]})
    assert [message["content"] for message in row.messages] == [
        "be brief",
        "<image><image>what?",
        "a cat",
        "and now?",
        "a dog",
    ]
    with pytest.raises(RowError, match=r"history must be a list of \[query, response\]"):
        only(tmp_path, values | {"history": ["what?"]})


@pytest.mark.parametrize(
    "values",
    [
        {"images": None},
        {"image": {"bytes": None, "path": None}},
        {"images": [{"bytes": None, "path": None}]},
        {"images": float("nan"), "id": None, "source": None, "truth": None, "captions": None, "conversations": None},
    ],
)
def test_empty_columns_are_as_good_as_absent(values: dict[str, Any], tmp_path: Path) -> None:
    row = only(tmp_path, {"messages": TEXT, **values})
    assert (row.task, row.images, row.id, row.source, row.truth) == ("text", [], "1", "rows", None)
    empty = {key for key, value in values.items() if value is None or value != value}
    assert set(row.notices) == {Notice("empty_value", key) for key in empty}
    if "captions" not in values:
        for chat in ({"prompt": "hi", "completion": "a cat"}, {"query": "hi", "response": "a cat"}):
            row = only(tmp_path, {**chat, **values})
            assert (row.messages, row.images) == (TEXT, [])


def test_nulls_inside_structs_of_parquet_are_absent_too(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    none = {"bytes": None, "path": None}
    rows = [
        {"messages": [{**PARTS, "name": "x"}, {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]},
        {"messages": [{**TEXT[0], "content": [{"type": "text", "text": "hi", "image": "no"}]}, {**PARTS, **REPLY}]},
    ]
    rows[1]["messages"][1]["content"] = [{"type": "text", "text": "a cat"}]
    rows[0] |= {"image": {"bytes": encoded(), "path": None}, "caption": None}
    rows[1] |= {"image": none, "caption": None}
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = read_rows(path)
    assert first.messages == [ASK, REPLY] and read_image_bytes(first.images[0]) == encoded()
    assert second.messages == TEXT and second.images == []


def test_a_label_without_a_text_is_no_choice(tmp_path: Path) -> None:
    content = {"short": ["hi"], "long": None}
    assert only(tmp_path, {"messages": [{"role": "user", "content": content}, REPLY]}).labels == {"short", ""}


def test_empty_cells_of_tables_are_said_and_nulls_among_captions_left_out(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = {"image": [encoded()] * 2, "captions": [["a cat", None, "one cat"], None], "score": [None, 1.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    (tmp_path / "metadata.csv").write_text("file_name,text,score\na.png,a cat,\na.png,,1\n")
    for name, key in (("rows.parquet", "captions"), ("metadata.csv", "text")):
        rows = read_rows(tmp_path / name)
        first = next(rows)
        assert first.notices == (Notice("empty_value", "score"),) and "a cat" in first.choices[0][""][0]
        assert len(first.choices[0][""]) == {"captions": 2, "text": 1}[key]
        with pytest.raises(RowError, match=f"'{key}', which a row of format captions needs, is empty"):
            next(rows)


OWN = ["image_id", "message_count", "imageId", "images_count", "message_ids", "sources", "idx", "_id", "Truth", "ID"]


@pytest.mark.parametrize("key", OWN)
def test_own_keys_are_said_and_nothing_else(key: str, tmp_path: Path) -> None:
    for values in ({"messages": TEXT}, {"image": "a.png", "text": "a cat"}, {"query": "hi", "response": "hello"}):
        assert only(tmp_path, {**values, key: 3}).notices == (Notice("ignored_key", key),)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"imagess": ["a.png"], "messages": [ASK, REPLY]}, "unknown key 'imagess'; did you mean 'images'?"),
        ({"imgaes": ["a.png"], "messages": TEXT}, "did you mean 'images'?"),
        ({"Images": ["a.png"], "messages": TEXT}, "did you mean 'images'?"),
        ({"iamge": "a.png", "caption": "a cat"}, "did you mean 'image'?"),
        ({"image": "a.png", "captoin": "a cat"}, "unknown key 'captoin'; did you mean 'caption'?"),
        ({"picture": "a.png", "messages": [ASK, REPLY]}, "call 'picture' image if it names one"),
        ({"image": "a.png", "TEXT": "a cat"}, "unknown key 'TEXT'; did you mean 'text'?"),
        ({"image": "a.png", "idx": 1, "sources": 2}, "nearest format is captions, which also needs 'caption'"),
        ({"text": "a cat"}, "the nearest format is captions, which also needs 'image'"),
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "nearest format is trl, which also needs 'completion'"),
        ({"source_image": "a.png", "instruction": "x"}, "a row of format edits needs 'target_image'"),
        ({"imgs": ["a.png"], "messages": [ASK, REPLY]}, "call 'imgs' image if it names one"),
        ({"image": "a.png", "caption": None}, "'caption', which a row of format captions needs, is empty; give it"),
        ({"image": "a.png", "text": float("nan")}, "'text', which a row of format captions needs, is empty"),
        ({"messages": None, "images": ["a.png"]}, "'messages', which a row of format messages needs, is empty"),
        ({"image": "a.png", "caption": " "}, "caption is empty; write what the picture shows"),
        ({"image": "a.png", "captions": {"short": None, "long": None}}, "captions is empty; write what"),
        ({"image": None, "caption": "a cat"}, "0 pictures for one caption; give one as image"),
        ({"image": ["a.png", "b.png"], "caption": "a cat"}, "2 pictures for one caption; give one as image"),
        ({"source_image": "a.png", "target_image": "b.png", "instruction": None}, "'instruction', which a row of"),
        ({"source_image": "a.png", "target_image": "b.png", "instruction": ""}, "instruction is empty; write what to"),
        ({"source_image": "a.png", "target_image": None, "instruction": "x"}, "'target_image', which a row of"),
        ({"source_image": "", "target_image": "b.png", "instruction": "x"}, "source_image is empty; give its path"),
    ],
)
def test_what_is_misspelt_or_lacking_is_named(values: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RowError) as caught:
        only(tmp_path, values)
    assert sentence in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/rows.jsonl:1: ")


@pytest.mark.parametrize(
    "image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "ICO"]
)
def test_pictures_in_base64_are_told_from_paths(image_format: str, tmp_path: Path) -> None:
    data = encoded(image_format)
    plain = base64_of(data)
    for image in (
        plain,
        plain.rstrip("="),
        base64.encodebytes(data).decode(),
        f"data:image/x;base64,{plain}",
        {"bytes": plain, "path": "gone.png"},
        {"bytes": f"data:image/x;base64,{plain}"},
    ):
        (found,) = only(tmp_path, {"image": image, "caption": "a cat"}).images
        assert isinstance(found, EncodedImage) and found.data == data
        open_image(found)


@pytest.mark.parametrize(
    "name", ["9j/4AAQSkZJRgABAQAAAQABAAD.jpg", "UklGR", "R0lGODlhAQABAIAAAAAAAP_dash-file", "f" * 64]
)
def test_paths_that_look_like_base64_stay_paths(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(encoded())
    assert only(tmp_path, {"image": name, "caption": "a cat"}).images == [tmp_path / name]


SECRET = base64_of(encoded(seed=7))


@pytest.mark.parametrize(
    "values",
    [
        {"image": SECRET[:-41] + "*", "caption": "a cat"},
        {"image": "x" + SECRET, "caption": "a cat"},
        {"image": SECRET[100:200], "caption": "a cat"},
        {"image": {"bytes": f"*{SECRET}"}, "caption": "a cat"},
        {"image": f"data:image/png;base64,*{SECRET}", "caption": "a cat"},
        {"image": f"https://x/{SECRET}", "caption": "a cat"},
        {"image": "a.png", "caption": "a cat", "language": SECRET},
        {"images": [], "messages": [{"role": SECRET, "content": "hi"}, REPLY]},
        {"messages": [{"role": "user", "content": [{"type": SECRET}]}, REPLY]},
        {"messages": [{"role": "user", "content": {SECRET: [1]}}, REPLY]},
        {"images": ["a.png"], "messages": TEXT, "id": SECRET},
        {"image": SECRET, "label": 3},
        {"truth": SECRET, "messages": TEXT},
        {SECRET: 1, "messages": []},
    ],
)
def test_no_error_or_report_quotes_a_picture(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from data.doctor.command import main

    with pytest.raises(UserError) as caught:
        only(tmp_path, values)
        count_rows(tmp_path / "rows.jsonl", "exists").check()
    output = ["--report", str(tmp_path / "page.html"), "--quarantine", str(tmp_path / "quarantine.jsonl")]
    assert main(["check", str(tmp_path / "rows.jsonl"), "--images", "exists", *output]) == 2
    written = "".join((tmp_path / name).read_text(encoding="utf-8") for name in ("page.html", "quarantine.jsonl"))
    for text in (str(caught.value), capsys.readouterr().out, written):
        assert SECRET[120:160] not in text


def test_records_and_rows_show_no_picture(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    from data.messages.rows import parse_record
    from data.records.reading import read_records

    data = encoded(seed=7)
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"image": data, "text": "a cat", "id": data}]), path)
    (record,) = read_records(path)
    for shown in (repr(record), repr(parse_record(record)), str(parse_record(record).images)):
        assert repr(data)[40:60] not in shown
