"""Datasets that are folders, patterns, tars of captions and tables: what they become, what is passed over."""

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from data.doctor.command import main
from data.messages.rows import count_rows, read_rows
from data.mixture.memory import remembered
from data.mixture.order import Mixture, check_dataset, load_mixture, read_dataset
from data.mixture.quarantine import read_left_out
from data.notices import Notice
from data.records.dataset_files import dataset_files
from data.records.reading import open_records
from nexus_gen.pictures.images import open_image, read_image_bytes
from nexus_gen.specs.errors import UserError


def jpeg(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def fill(folder: Path, **files: bytes | str) -> Path:
    """`__` in a name is a slash, `_` behind the last one a full stop."""
    for name, content in files.items():
        path = folder / ".".join(name.replace("__", "/").rsplit("_", 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def captions(path: Path) -> list[tuple[str, str]]:
    """Of every row: the end of its caption, and where it is."""
    told = ": "
    return [(row.messages[0]["content"].partition(told)[2], row.where) for row in read_dataset(path)]


def write_parquet(path: Path, seeds: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": jpeg(seed), "path": None}, "text": f"noise {seed}"} for seed in seeds]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def photos(directory: Path) -> Path:
    return fill(
        directory / "photos",
        a_jpg=jpeg(0),
        a_txt="a cat\non a mat\n",
        more__B_JPG=jpeg(1),
        more__B_TXT="\ufeffa dog",
        more__c_jfif=jpeg(2),
        more__c_json=json.dumps({"caption": "a cow", "width": 48}),
        more__d_jpeg=jpeg(3),
        more__d_caption="a duck",
    )


def test_a_folder_of_pictures_and_captions_is_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path)
    expected = [
        ("a cat\non a mat", "a.jpg"),
        ("a dog", "more/B.JPG"),
        ("a cow", "more/c.jfif"),
        ("a duck", "more/d.jpeg"),
    ]
    assert captions(folder) == [(words, f"{folder}/{name}") for words, name in expected]
    records = open_records(folder)
    assert [records[index] for index in range(4)] == list(records)
    assert pickle.loads(pickle.dumps(records)).span(0, 4) == list(records)
    assert [records.find(record.line) for record in records] == [0, 1, 2, 3]
    for seed, row in enumerate(read_rows(folder)):
        assert read_image_bytes(row.images[0]) == jpeg(seed) and row.task == "generation" and row.source == "photos"
    monkeypatch.chdir(folder / "more")
    assert [str(row.images[0]) for row in read_rows(Path("."))] == ["B.JPG", "c.jfif", "d.jpeg"]
    assert [open_image(row.images[0]).size for row in read_rows(Path(".."))] == [(48, 40)] * 4


def test_what_a_folder_holds_beside_is_passed_over_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = fill(photos(tmp_path), README_md="x", notes_txt="x", more__Thumbs_db="x")
    (folder / "__MACOSX").mkdir()
    for name in ("._a.jpg", ".DS_Store", "more/._B.JPG", "__MACOSX/a.jpg"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    (folder / "more" / "up").symlink_to(folder)
    assert check_dataset(folder) == check_dataset(folder) == {"generation": 4}
    assert caplog.messages == [
        f"notice: {folder}: keys that are not read: width (1)",
        f"notice: {folder}: hidden files, passed over: 5, .DS_Store is the first",
        f"notice: {folder}: files that belong to no row, passed over: 2, README.md is the first",
    ]


@pytest.mark.parametrize(
    ("files", "where", "sentence"),
    [
        ({"x_png": b""}, "x.png", "no caption beside it; write x.txt"),
        ({"a_webp": b""}, "a.jpg", "a.jpg and a.webp would have one caption"),
        ({"a_txt": " \n"}, "a.jpg", "caption is empty; write what the picture shows"),
        ({"a_txt": "é".encode("latin-1")}, "a.jpg", "a.txt is not UTF-8 (unexpected end of data"),
        ({"a_txt": "a cat".encode("utf-16")}, "a.jpg", "a.txt is not UTF-8 (it is UTF-16)"),
        ({"a_txt": "a cat".encode("utf-16-le")}, "a.jpg", "a.txt is not UTF-8 (UTF-16LE)"),
        ({"more__c_json": "{"}, "more/c.jfif", "more/c.json is not JSON"),
        ({"more__c_json": '{"width": 3}'}, "more/c.jfif", "more/c.json has no caption"),
    ],
)
def test_a_broken_caption_is_named_by_its_picture_and_left_out_on_request(
    files: dict[str, Any], where: str, sentence: str, tmp_path: Path
) -> None:
    folder = fill(photos(tmp_path), **files)
    summary = count_rows(folder, "exists")
    assert summary.broken == 1 and f"{folder}/{where}: " in summary.first and sentence in summary.first
    quarantine = tmp_path / "quarantine.jsonl"
    assert main(["check", str(folder), "--images", "exists", "--quarantine", str(quarantine)]) == 2
    moved = (tmp_path / "elsewhere").joinpath("photos")
    moved.parent.mkdir()
    folder.rename(moved)
    left_out = read_left_out([quarantine], load_mixture(moved).files)
    good = list(read_dataset(moved, left_out))
    assert len(good) == summary.rows - 1 and f"{moved}/{where}" not in {row.where for row in good}
    assert Mixture(moved, 0, left_out).num_left_out == 1


@pytest.mark.parametrize("change", ["add", "remove", "edit"])
def test_what_is_remembered_of_a_folder_follows_its_files(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.mixture.memory.SETTLED_NS", 0)
    folder, memory = photos(tmp_path), tmp_path / "memory.jsonl"
    reads: list[int] = []

    def read() -> list[int]:
        reads.append(len(captions(folder)))
        return reads[-1:]

    def remember() -> int:
        (number,) = remembered(memory, "key", [folder], read)
        return number

    assert remember() == remember() == 4 and check_dataset(folder)["generation"] == 4 and len(reads) == 1
    if change == "add":
        fill(folder, more__e_jpg=jpeg(), more__e_txt="new")
    elif change == "remove":
        (folder / "more" / "c.jfif").unlink()
    else:
        fill(folder, a_txt="another cat")
    number = {"add": 5, "remove": 3, "edit": 4}[change]
    assert remember() == number and check_dataset(folder)["generation"] == number and len(reads) == 2


def test_metadata_of_an_imagefolder(tmp_path: Path) -> None:
    rows = [{"file_name": "a.jpg", "text": "a cat, lying", "score": 1}, {"file_name": "in/b.jpg", "text": "a\ndog"}]
    header = "file_name,text,score\r\n"
    table = header + 'a.jpg,"a cat, lying",1\r\nin/b.jpg,"a\ndog",\r\n'
    for name in ("jsonl", "csv", "parquet"):
        folder = fill(tmp_path / name, a_jpg=jpeg(0), in__b_jpg=jpeg(1), a_txt="not read")
        if name == "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")
        lines = "\r\n".join(map(json.dumps, rows))
        fill(folder, **{"jsonl": {"metadata_jsonl": lines}, "csv": {"metadata_csv": table}}.get(name, {}))
        (file,) = load_mixture(folder).files
        assert [words for words, _ in captions(folder)] == ["a cat, lying", "a\ndog"]
        assert [read_image_bytes(row.images[0]) for row in read_rows(file)] == [jpeg(0), jpeg(1)]
        assert captions(folder) == captions(file)
        notices = {Notice("ignored_key", "score"): 1, Notice("empty_value", "score"): 1}
        assert count_rows(file, "open").notices == (dict(list(notices.items())[:1]) if name == "jsonl" else notices)
        assert dataset_files(folder).notices == {folder: {Notice("unread_text", "a.txt"): 1}}
    fill(tmp_path / "csv", metadata_csv=f"{header}a.jpg,two\r\n{header}")
    assert [record.problem for record in open_records(tmp_path / "csv" / "metadata.csv")] == [
        "2 cells where the first line names 3 columns",
        None,
    ]
    fill(tmp_path / "jsonl", metadata_csv=table)
    with pytest.raises(UserError, match="more than one file of metadata"):
        load_mixture(tmp_path / "jsonl")


@pytest.mark.parametrize("splits", ["", "train__"])
def test_what_save_to_disk_writes_names_the_call_that_writes_a_table(splits: str, tmp_path: Path) -> None:
    files = {f"{splits}state_json": "{}", f"{splits}dataset_info_json": "{\n}", f"{splits}data_arrow": b"x"}
    folder = fill(tmp_path, **files, **({"dataset_dict_json": "{}"} if splits else {}))
    with pytest.raises(UserError, match=r"holds no rows; .*; datasets.load_from_disk\(...\).to_parquet"):
        dataset_files(folder)


def test_metadata_may_name_several_pictures(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "<image><image>?"}, {"role": "assistant", "content": "two"}]
    rows = [
        {"file_names": ["a.jpg", "b.jpg"], "messages": chat},
        {"source_image_file_name": "a.jpg", "target_image_file_name": "b.jpg", "instruction": "mirror it"},
    ]
    lines = "\n".join(map(json.dumps, rows))
    folder = fill(tmp_path, a_jpg=jpeg(0), b_jpg=jpeg(1), metadata_jsonl=lines)
    assert [row.task for row in read_dataset(folder)] == ["understanding", "editing"]
    assert all(row.images == [folder / "a.jpg", folder / "b.jpg"] for row in read_dataset(folder))


def test_a_folder_or_a_pattern_of_parquet_files(tmp_path: Path) -> None:
    for number in range(2):
        write_parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", range(3 * number, 3 * number + 3))
    fill(tmp_path, README_md="x", dataset_info_json="{}")
    for path in (tmp_path, tmp_path / "data", tmp_path / "data" / "train-*.parquet", tmp_path / "**" / "*.parquet"):
        assert [words for words, _ in captions(path)] == [f"noise {seed}" for seed in range(6)]
        assert len(Mixture(path, 0)) == 6
    assert dataset_files(tmp_path).notices[tmp_path] == {Notice("unused_file", "README.md"): 2}
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", range(9, 10))
    with pytest.raises(UserError, match=r"side by side \(data/train-00000.*and data/validation-00000"):
        load_mixture(tmp_path)
    assert len(captions(tmp_path / "data" / "train-*")) == 6
    with pytest.raises(UserError, match=r"no file is called .*test-\*"):
        load_mixture(tmp_path / "data" / "test-*")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds no rows; a folder of a dataset has files in Parquet"),
        ({"a_jpg": b""}, "holds 1 pictures and no captions"),
        ({"data_arrow": b""}, r"to_parquet\(\.\.\.\) writes one"),
        ({"a_tar": b"", "a_parquet": b""}, r"several kinds \(1 \.parquet, 1 \.tar\); give one of them, a pattern"),
        (
            {"a_jpg": b"", "a_txt": "a", "b_tar": b""},
            r"several kinds \(1 pictures with captions",
        ),
        ({"train__a_jpg": b"", "train__a_txt": "a", "test__b_jpg": b"", "test__b_txt": "b"}, "side by side"),
    ],
)
def test_a_folder_that_cannot_be_told_is_refused(files: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        load_mixture(fill(tmp_path, **files))


def test_captions_in_a_tar_and_what_is_passed_over(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "shard.tar",
        {
            "./0.jpg": jpeg(0),
            "./0.txt": b"a cat",
            "._0.jpg": b"x",
            "__MACOSX/._0.jpg": b"x",
            ".DS_Store": b"x",
            "in/1.JPG": jpeg(1),
            "in/1.json": b'{"text": "a dog", "url": "u"}',
            "in/1.txt": b"not read",
            "2.jpg": jpeg(2),
            "2.json": b'{"width": 3, "caption": null}',
            "2.TXT": b"a cow",
            "2.cls": b"4",
        },
    )
    rows = list(read_rows(path))
    assert [words for words, _ in captions(path)] == ["a cat", "a dog", "a cow"]
    assert [read_image_bytes(row.images[0]) for row in rows] == [jpeg(0), jpeg(1), jpeg(2)]
    records = open_records(path)
    assert [record.name for record in records] == ["./0.txt", "in/1.json", "2.json"]
    assert [records.find(record.line) for record in records] == [0, 1, 2]
    assert count_rows(path, "open").notices == {
        Notice("hidden_file", "._0.jpg"): 3,
        Notice("ignored_key", "url"): 1,
        Notice("ignored_key", "width"): 1,
        Notice("unread_text", ".txt"): 1,
    }
    broken = write_tar(
        tmp_path / "broken.tar", {"0.jpg": jpeg(), "0.cls": b"1", "1.txt": b"x", "2.jpg": jpeg(), "2.txt": b"\xe9"}
    )
    problems = [record.problem or "" for record in open_records(broken)]
    assert problems[0].startswith("no 0.json beside 0.jpg, 0.cls; add it, or a caption as 0.txt")
    assert problems[1].startswith("no picture beside 1.txt") and problems[2].startswith("the caption is not UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.jsonl.gz", gzip.compress(b"{}", mtime=0), "unpack it: gunzip < {path} > {path.parent}/rows.jsonl"),
        ("rows.jsonl.zst", b"", "unpack it: unzstd < {path} > {path.parent}/rows.jsonl"),
        ("rows.tgz", b"", "unpack it: gunzip < {path} > {path.parent}/rows.tar"),
        ("rows.tar", gzip.compress(b"{}", mtime=0), "{path} is compressed"),
        ("rows.zip", b"", "unpack it: unzip {path}"),
        ("rows.jsonl", '{"messages": []}'.encode("utf-16"), "{path} is UTF-16, not UTF-8; save it as UTF-8: iconv"),
        ("rows.json", '[{"messages": []}]'.encode("utf-16-be"), "{path} is UTF-16BE, not UTF-8"),
        ("metadata.csv", "file_name,text".encode("utf-16"), "{path} is UTF-16"),
        ("rows.arrow", b"", "to_parquet(...) writes one"),
    ],
)
def test_files_that_cannot_be_read_by_index_name_the_command(
    name: str, content: bytes, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_records(path)
    assert sentence.format(path=path) in str(caught.value)


def test_lines_with_a_mark_and_carriage_returns(tmp_path: Path) -> None:
    fill(
        tmp_path,
        a_jpg=jpeg(),
        rows_jsonl='\ufeff{"image": "a.jpg", "text": "a"}\r\n\r\n{"image": "a.jpg", "text": "b"}\r\n',
    )
    assert captions(tmp_path / "rows.jsonl") == [("a", f"{tmp_path}/rows.jsonl:1"), ("b", f"{tmp_path}/rows.jsonl:3")]


def test_picture_paths_are_relative_to_the_root_that_is_given(tmp_path: Path) -> None:
    rows = fill(tmp_path / "rows", rows_jsonl='{"image": "in/a.jpg", "text": "a cat"}\n') / "rows.jsonl"
    root = fill(tmp_path / "pictures", in__a_jpg=jpeg())
    with pytest.raises(UserError, match=r"rows/in/a\.jpg does not exist; paths are relative to"):
        check_dataset(rows)
    assert check_dataset(rows, picture_root=root) == {"generation": 1}
    (row,) = read_dataset(rows, picture_root=root)
    mixture = (
        fill(tmp_path / "rows", mix_yaml="sources:\n  - path: rows.jsonl\n    picture_root: ../pictures\n") / "mix.yaml"
    )
    for drawn in (row, Mixture(rows, 0, picture_root=root), Mixture(mixture, 0), Mixture(mixture, 0, picture_root="/")):
        found = drawn.row(drawn.draw(0)) if isinstance(drawn, Mixture) else drawn
        assert read_image_bytes(found.images[0]) == jpeg()
    assert main(["check", str(rows), "--picture-root", str(root)]) == 0
    assert main(["check", str(mixture)]) == 0
    with pytest.raises(UserError, match=r"picture_root .*gone is no directory"):
        check_dataset(rows, picture_root=tmp_path / "gone")
    mixture.write_text(mixture.read_text().replace("pictures", "gone"))
    with pytest.raises(UserError, match=r"source 1: picture_root .*gone is no directory"):
        load_mixture(mixture)


def test_folders_and_patterns_are_sources_of_a_mixture(tmp_path: Path) -> None:
    photos(tmp_path)
    write_parquet(tmp_path / "data" / "train-0.parquet", range(3))
    sources = (
        "sources:\n  - {path: photos, weight: 1, languages: [en]}\n  - {path: data, weight: 1, format: captions}\n"
    )
    mixture = Mixture(fill(tmp_path, mix_yaml=sources) / "mix.yaml", 0)
    received = pickle.loads(pickle.dumps(mixture))
    for position in range(12):
        assert received.row(received.draw(position)) == mixture.row(mixture.draw(position))
    assert {mixture.row(mixture.draw(position)).where for position in range(40)} == {
        *(str(tmp_path / "photos" / name) for name in ("a.jpg", "more/B.JPG", "more/c.jfif", "more/d.jpeg")),
        *(f"{tmp_path}/data/train-0.parquet:{n}" for n in (1, 2, 3)),
    }


def test_names_with_characters_of_patterns_are_names_first(tmp_path: Path) -> None:
    for folder in ("[y]", "y", "in/[y]"):
        fill(tmp_path / folder, a_jpg=jpeg(), rows_jsonl='{"image": "a.jpg", "text": "a cat"}')
    for pattern, found in (
        ("[y]/*.jsonl", ["[y]"]),
        ("[xy]/*.jsonl", ["y"]),
        ("*/rows.jsonl", ["[y]", "y"]),
        ("**/[y]/rows.jsonl", ["[y]", "in/[y]"]),
    ):
        files = tuple(tmp_path / folder / "rows.jsonl" for folder in found)
        assert dataset_files(tmp_path / pattern).files == files
        mixture = fill(tmp_path, mix_yaml=f"sources:\n  - path: '{pattern}'\n") / "mix.yaml"
        assert load_mixture(mixture).sources[0].files == files


def test_notices_are_shown_and_fail_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = photos(tmp_path)
    (folder / ".DS_Store").write_bytes(b"")
    page = tmp_path / "page.html"
    assert main(["check", str(folder), "--strict", "--report", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "notice   ignored_key" in shown and "keys that are not read: width (1)" in shown
    assert "notice   hidden_file" in shown and "nothing is wrong" in shown
    assert "keys that are not read: width (1)" in page.read_text(encoding="utf-8")
