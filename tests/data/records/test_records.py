"""Every kind of dataset file gives the same rows, by iteration and by index; every form of rows becomes ours."""

import base64
import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.messages.rows import Row, RowError, parse_record, read_rows
from data.records.reading import Parquet, open_records, read_records
from nexus_gen.pictures.images import EncodedImage, ImageMember, open_image, read_image_bytes
from nexus_gen.specs.errors import UserError

EDIT = [
    {"role": "system", "content": "You edit pictures."},
    {"role": "user", "content": "<image> make it blue"},
    {"role": "assistant", "content": "Here is the image: <image>"},
]
COLOURS = ("red", "blue")


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def row(number: int, images: Any) -> dict[str, Any]:
    return {"id": f"row {number}", "source": "test", "images": images, "messages": EDIT}


def paths(directory: Path) -> list[str]:
    for colour in COLOURS:
        (directory / f"{colour}.png").write_bytes(png(colour))
    return [f"{colour}.png" for colour in COLOURS]


def write_jsonl(directory: Path) -> Path:
    images = paths(directory)
    path = directory / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row(number, images))}\n\n" for number in range(5)), encoding="utf-8-sig")
    return path


def write_array(directory: Path) -> Path:
    images = paths(directory)
    path = directory / "rows.json"
    path.write_text(json.dumps([row(number, images) for number in range(5)], indent=1))
    return path


def write_parquet(directory: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    images = [{"bytes": png(colour), "path": None} for colour in COLOURS]
    path = directory / "rows.parquet"
    table = pyarrow.Table.from_pylist([row(number, images) for number in range(5)])
    parquet.write_table(table, path, row_group_size=2)
    return path


def write_paths_parquet(directory: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    images = paths(directory)
    rows = [{**row(number, images), "messages": json.dumps(EDIT)} for number in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "texts.parquet")
    return directory / "texts.parquet"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_message_tar(directory: Path) -> Path:
    """Pictures named in full, by what follows the key, and not at all: then all are taken, by number."""
    members = []
    for number in range(5):
        images = ([f"a/{number:03}.{n}.png" for n in (9, 10)], ["9.png", "10.png"], None)[number % 3]
        values = {key: value for key, value in row(number, images).items() if value is not None}
        members += [(f"a/{number:03}.10.png", png("blue")), (f"a/{number:03}.json", json.dumps(values).encode())]
        members += [(f"a/{number:03}.9.png", png("red"))]
    return write_tar(directory / "rows.tar", members)


FILES = (write_jsonl, write_array, write_parquet, write_paths_parquet, write_message_tar)


@pytest.mark.parametrize("write", FILES)
def test_every_kind_of_file_gives_the_same_rows(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    rows = list(read_rows(path))
    assert [(r.id, r.source, r.messages, r.task) for r in rows] == [
        (f"row {n}", "test", EDIT, "editing") for n in range(5)
    ]
    for r in rows:
        shown = [open_image(image) for image in r.images]
        assert [image.getpixel((0, 0)) for image in shown] == [(255, 0, 0), (0, 0, 255)]
        assert [read_image_bytes(image) for image in r.images] == [png(colour) for colour in COLOURS]
    records = open_records(path)
    unread = pickle.dumps(records)
    assert [records[index] for index in range(len(records))] == list(read_records(path))
    for sent in (unread, pickle.dumps(records)):
        received = pickle.loads(sent)
        assert received.span(0, len(received)) == list(read_records(path))
    assert len({record.where for record in records}) == 5


def test_places_are_named_as_editors_and_tar_name_them(tmp_path: Path) -> None:
    wheres = {write: [r.where for r in read_records(write(tmp_path))][1] for write in FILES}
    assert wheres[write_jsonl] == f"{tmp_path}/rows.jsonl:3"  # behind a blank line
    assert wheres[write_array] == f"{tmp_path}/rows.json:2"
    assert wheres[write_parquet] == f"{tmp_path}/rows.parquet:2"
    assert wheres[write_message_tar] == f"{tmp_path}/rows.tar:a/001.json"


def test_row_groups_are_the_pieces_of_parquet_files(tmp_path: Path) -> None:
    records = open_records(write_parquet(tmp_path))
    assert isinstance(records, Parquet) and records.chunks == [0, 2, 4]
    assert isinstance(parse_record(records[4]).images[0], EncodedImage)
    assert open_records(write_jsonl(tmp_path)).chunks == [0]


def test_pictures_of_a_tar_are_read_where_they_are(tmp_path: Path) -> None:
    image = next(read_rows(write_message_tar(tmp_path))).images[0]
    assert isinstance(image, ImageMember) and str(image) == f"{tmp_path}/rows.tar:a/000.9.png"


def write_row(directory: Path, values: dict[str, Any]) -> Path:
    paths(directory)
    path = directory / "rows.jsonl"
    path.write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def only_row(directory: Path, values: dict[str, Any], row_format: str = "auto") -> Row:
    return next(read_rows(write_row(directory, values), row_format))


SHAREGPT = {
    "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}],
    "system": "be brief",
    "images": ["red.png"],
}
LLAVA = {"id": 7, "image": "red.png", "conversations": SHAREGPT["conversations"]}
DATA_ADDRESS = f"data:image/png;base64,{base64.b64encode(png('red')).decode()}"
OPENAI = {
    "messages": [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [
                {
                    "type": "image_url",
                    "image_url": {"url": DATA_ADDRESS},
                },
                {"type": "text", "text": "\nwhat?"},
            ],
        },
        {"role": "assistant", "content": "red"},
    ]
}


@pytest.mark.parametrize(("values", "name"), [(SHAREGPT, "sharegpt"), (LLAVA, "llava"), (OPENAI, "openai")])
def test_rows_of_others_become_ours(values: dict[str, Any], name: str, tmp_path: Path) -> None:
    for row_format in ("auto", name):
        r = only_row(tmp_path, values, row_format)
        turns = [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}]
        assert [message for message in r.messages if message["role"] != "system"] == turns
        assert (r.messages[0] == {"role": "system", "content": "be brief"}) == (values is not LLAVA)
        assert [open_image(image).getpixel((0, 0)) for image in r.images] == [(255, 0, 0)]
        assert r.task == "understanding"


def test_captions_and_edits_get_the_words_of_their_language(tmp_path: Path) -> None:
    painted = only_row(
        tmp_path, {"image": "red.png", "captions": {"short": "红色", "long": ["一片红色", "红色的画面"]}}
    )
    assert painted.messages[0]["content"] == "根据以下描述生成一张图像：红色"
    assert painted.messages[1]["content"] == "这是根据您的描述生成的图像：<image>"
    assert (painted.task, painted.language) == ("generation", "zh")
    edit = {"source_image": "red.png", "target_image": "blue.png", "instruction": "make it blue"}
    edited = only_row(tmp_path, edit)
    assert [message["content"] for message in edited.messages] == ["<image> make it blue", "Here is the image: <image>"]
    assert (edited.task, edited.language) == ("editing", "en")
    with pytest.raises(RowError, match="a row of format edits needs 'target_image'"):
        only_row(tmp_path, {key: value for key, value in edit.items() if key != "target_image"})


def test_texts_are_drawn_by_label_and_seed(tmp_path: Path) -> None:
    captions = {"short": ["s0", "s1"], "long": ["l0"], "other": "o0"}
    r = only_row(tmp_path, {"image": "red.png", "captions": captions})

    def drawn(weights: dict[str, float] | None) -> list[str]:
        rows = [r.drawn(np.random.default_rng([5, epoch]), weights) for epoch in range(300)]
        assert all(other.messages[1] == r.messages[1] and other.images == r.images for other in rows)
        return [other.messages[0]["content"][-2:] for other in rows]

    assert drawn(None) == drawn(None)
    counts = Counter(drawn(None))
    assert counts.keys() == {"s0", "s1", "l0", "o0"} and min(counts.values()) > 25
    weighted = drawn({"short": 3, "long": 1})
    assert "o0" not in weighted and 190 < sum(text[0] == "s" for text in weighted) < 260
    assert set(drawn({"unknown": 1})) == {"s0", "s1", "l0", "o0"}


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    with pytest.raises(UserError, match=r"rows\.csv is no dataset of messages; a file ends in one of \.jsonl"):
        open_records(tmp_path / "rows.csv")
    with pytest.raises(UserError, match="cannot be read"):
        open_records(tmp_path / "no.parquet")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"rows\.parquet is no Parquet file"):
        list(read_records(tmp_path / "rows.parquet"))
