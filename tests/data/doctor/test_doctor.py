"""The doctor: what it finds in rows, in pictures and between datasets, and what it writes."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from broken import BROKEN, Broken
from PIL import Image
from pyarrow import parquet

import data.doctor.examine
from data.doctor.checks import KINDS, Picture, RowChecker
from data.doctor.command import main
from data.doctor.examine import Report, examine, open_datasets
from data.doctor.places import FirstPlaces
from data.doctor.report import QuarantineFile, write_page
from data.messages.rows import Row
from data.records.reading import open_records
from nexus_gen.specs.errors import UserError

ASK, ANSWER = {"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "a cat"}
EDIT = [{"role": "user", "content": "<image> make it blue"}, {"role": "assistant", "content": "here: <image>"}]


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(directory: Path, *rows: dict[str, Any] | str, name: str = "rows.jsonl") -> Path:
    for number, picture in enumerate(("a.png", "b.png", "c.png")):
        noise((48, 40), number).save(directory / picture)
    path = directory / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def ask(image: str, question: str = "what?", **more: Any) -> dict[str, Any]:
    return {"images": [image], "messages": [{"role": "user", "content": f"<image> {question}"}, ANSWER], **more}


def check(path: Path, level: str = "decode", heldout: Path | None = None, **options: Any) -> Report:
    datasets = [("train", path)] + ([("heldout", heldout)] if heldout else [])
    return examine(open_datasets(datasets), RowChecker(level, by_content=level == "decode"), num_workers=1, **options)


def test_a_sound_dataset_is_counted_and_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好"}]}
    path = write(tmp_path, ask("a.png"), "", {"images": ["a.png", "b.png"], "messages": EDIT}, text)
    report = check(path)
    (dataset,) = report.datasets
    assert (dataset.rows, dataset.good, dataset.quarantined) == (3, 3, 0)
    assert dataset.tasks == {"understanding": 1, "editing": 1, "text": 1}
    assert dataset.languages == {"en": 2, "zh": 1}
    assert not report.rows_with
    assert report.num_distinct == 2
    assert report.histograms["aspect"].total == 3
    assert main(["check", str(path), "--strict"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


def shaped(size: tuple[int, int]) -> Any:
    return lambda path: noise(size, 9).save(path)


@pytest.mark.parametrize(
    ("level", "kind", "make"),
    [
        ("exists", "missing_picture", lambda path: None),
        ("header", "picture", lambda path: path.mkdir()),
        ("header", "picture", lambda path: path.touch()),
        ("header", "picture", lambda path: path.write_text("<html>404</html>")),
        ("decode", "picture", lambda path: (noise((64, 64), 9).save(path), truncate(path))),
        ("header", "picture", shaped((402, 2))),
        ("header", "extreme_aspect", shaped((200, 40))),
        ("header", "tiny_picture", shaped((31, 40))),
        ("decode", "flat_picture", lambda path: Image.new("RGB", (48, 48), "grey").save(path)),
    ],
)
def test_pictures(level: str, kind: str, make: Any, tmp_path: Path) -> None:
    make(tmp_path / "x.png")
    report = check(write(tmp_path, ask("a.png"), ask("x.png")), level)
    assert report.rows_with == {kind: 1}
    (example,) = report.examples[kind]
    assert example.where == f"{tmp_path / 'rows.jsonl'}:2"
    assert "x.png" in example.reason
    assert example.picture == tmp_path / "x.png"
    assert report.num_quarantined == (KINDS[kind][0] == "error")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (ask("a.png", "<|image_pad|>"), "markup"),
        (ask("a.png", "<|im_end|>"), "markup"),
        ({"images": ["a.png", "a.png"], "messages": EDIT}, "unchanged_edit"),
        ({"images": [], "messages": [ASK, ANSWER]}, "placeholders"),
        ({"images": ["a.png"], "messages": [ANSWER, ASK]}, "order"),
    ],
)
def test_rows(row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    report = check(write(tmp_path, ask("b.png"), row))
    assert report.rows_with == {kind: 1}
    assert report.examples[kind][0].where.endswith("rows.jsonl:2")


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_every_kind_of_broken_row_is_named_and_counted(broken: Broken, tmp_path: Path) -> None:
    path = broken.write(tmp_path)
    report = check(path)
    write_page(report, tmp_path / "page.html")
    quarantine = tmp_path / "quarantine.jsonl"
    assert main(["check", str(path), "--quarantine", str(quarantine), "--num-workers", "1"]) == 2
    (dataset,) = report.datasets
    assert (dataset.rows, dataset.good, dataset.quarantined) == (broken.num_rows, broken.num_rows - 1, 1)
    (line,) = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert line["where"] == f"{path}{broken.where}"
    assert line["file"] == str(path)
    # A link to nothing is a picture that is not there, to somebody who asks before opening it.
    assert line["kind"] == ("missing_picture" if broken.name == "a link to nothing" else broken.kind)
    assert broken.reason in line["reason"] or broken.found_by == "sizing"
    assert {kind for kind in report.rows_with if report.severity(kind) == "error"} == {line["kind"]} <= KINDS.keys()


def test_text_that_is_no_unicode_reaches_every_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, ask("a.png"), '{"id": "\\ud83d", "mesages\\ud83d": []}', ask("a.png", "\ud83d"))
    page, quarantine = tmp_path / "page.html", tmp_path / "quarantine.jsonl"
    assert main(["check", str(path), "--report", str(page), "--quarantine", str(quarantine)]) == 2
    assert "\\ud83d" in capsys.readouterr().out
    assert "\\ud83d" in page.read_text(encoding="utf-8")
    assert len(quarantine.read_text(encoding="utf-8").splitlines()) == 2


def test_duplicates_and_leaks_name_the_other_place(tmp_path: Path) -> None:
    heldout = write(tmp_path, ask("a.png", "which?"), ask("b.png"), name="heldout.jsonl")
    path = write(
        tmp_path,
        ask("c.png", id="1"),
        ask("c.png", id="2"),  # the same row under another id
        ask("copy.png", "which?"),  # the content of c.png
        ask("b.png"),  # a held-out row
        ask("./a.png", "another question"),  # a held-out picture
    )
    (tmp_path / "copy.png").write_bytes((tmp_path / "c.png").read_bytes())
    report = check(path, heldout=heldout)
    assert report.rows_with == {"duplicate_row": 1, "duplicate_picture": 1, "leaked_row": 1, "leaked_picture": 2}
    reasons = {kind: (found[0].where, found[0].reason) for kind, found in report.examples.items()}
    assert reasons["duplicate_row"] == (f"{path}:2", f"the same as {path}:1")
    assert reasons["duplicate_picture"] == (
        f"{path}:3",
        f"picture {tmp_path / 'copy.png'} has the content of one of {path}:1",
    )
    assert reasons["leaked_row"] == (f"{path}:4", f"the same as the held-out {heldout}:2")
    assert reasons["leaked_picture"] == (
        f"{path}:4",
        f"picture {tmp_path / 'b.png'} is one of the held-out {heldout}:2",
    )
    assert [dataset.quarantined for dataset in report.datasets] == [0, 1]
    strict = check(path, heldout=heldout, errors=frozenset(["leaked_picture", "duplicate_row"]))
    assert strict.num_quarantined == 3
    assert strict.severity("leaked_picture") == "error"
    by_path = check(path, "exists", heldout=heldout)
    assert by_path.rows_with == {"duplicate_row": 1, "leaked_row": 1, "leaked_picture": 2}


def broken_half(directory: Path) -> Path:
    rows: list[dict[str, Any] | str] = []
    for number in range(40):
        rows.append(ask("abc"[number % 3] + ".png", f"question {number % 30}", id=f"row {number}"))
        rows.append(["{", ask("gone.png"), {"messages": []}, "[]"][number % 4])
    return write(directory, *rows)


def test_nothing_depends_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.doctor.examine, "ROWS_PER_CHUNK", 7)
    path = broken_half(tmp_path)
    written = []
    for num_workers in ("1", "3"):
        page, quarantine = tmp_path / "page.html", tmp_path / "quarantine.jsonl"
        arguments = [str(path), "--report", str(page), "--quarantine", str(quarantine), "--num-workers", num_workers]
        assert main(["check", *arguments]) == 2
        written.append((page.read_text(), quarantine.read_text()))
    assert written[0] == written[1]
    lines = [json.loads(line) for line in written[0][1].splitlines()]
    assert [line["line"] for line in lines] == list(range(2, 81, 2))
    assert lines[1] == {
        "where": f"{path}:4",
        "file": str(path),
        "line": 4,
        "digest": open_records(path)[3].digest,
        "id": "4",
        "severity": "error",
        "kind": "missing_picture",
        "reason": f"picture {tmp_path / 'gone.png'} does not exist; paths are relative to the file that names them, "
        "or to picture_root",
    }
    assert not list(tmp_path.glob(".*"))


class Killed(RowChecker):
    """Ends its worker as a machine without memory does."""

    def pictures(self, row: Row) -> list[Picture]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_a_worker_that_is_killed_ends_the_command_and_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, ask("a.png"))
    with (
        pytest.raises(UserError, match="a worker process was ended from outside"),
        QuarantineFile(tmp_path / "quarantine.jsonl") as quarantine,
    ):
        examine(open_datasets([("train", path)]), Killed("exists"), quarantine=quarantine, num_workers=2)
    assert not list(tmp_path.glob("*quarantine*"))


def test_rows_that_are_read_in_pieces_go_to_workers_in_those_pieces(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "rows.parquet"
    rows = [ask("gone.png" if number % 5 == 4 else "a.png", f"question {number}") for number in range(20)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=6)
    datasets = open_datasets([("train", path)])
    assert [(chunk.first, chunk.last) for chunk in datasets[0].chunks(0)] == [(0, 6), (6, 12), (12, 18), (18, 20)]
    report = examine(datasets, RowChecker("exists"), num_workers=2)
    assert (report.datasets[0].rows, report.datasets[0].quarantined) == (20, 4)
    assert [example.where for example in report.examples["missing_picture"]] == [f"{path}:{n}" for n in (5, 10, 15, 20)]


def test_the_page_is_whole_and_safe(tmp_path: Path) -> None:
    Image.new("RGB", (48, 48), "grey").save(tmp_path / "flat.png")
    path = write(tmp_path, ask("flat.png", "<script>alert(1)</script>"), ask("gone.png"), "{")
    page = tmp_path / "page.html"
    main(["check", str(path), "--report", str(page)])
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert text.count("data:image/png;base64,") == 1  # the missing one has no thumbnail
    for kind in ("flat_picture", "missing_picture", "json"):
        assert f'id="{kind}"' in text
        assert KINDS[kind][1] in text


def test_exit_status_follows_severity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound, odd = [ask("a.png")], [ask("a.png"), ask("a.png")]
    for rows, flags, status in (
        (sound, ["--strict"], 0),
        (odd, [], 0),
        (odd, ["--strict"], 1),
        (odd, ["--as-error", "duplicate_row"], 2),
        ([*sound, "{"], [], 2),
    ):
        assert main(["check", str(write(tmp_path, *rows)), *flags]) == status, (rows, flags)
    assert main(["check", str(broken_half(tmp_path)), "--max-errors", "3", "--quarantine", str(tmp_path / "q")]) == 2
    assert "not written" in capsys.readouterr().out
    assert not list(tmp_path.glob("*q*"))


def test_a_config_names_datasets_and_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    data = {"train": str(write(tmp_path, ask("a.png"))), "heldout": str(write(tmp_path, ask("b.png"), name="h.jsonl"))}
    config.write_text(yaml.safe_dump({"model": {}, "data": {**data, "max_pixels": 3000, "max_length": 100}}))
    assert main(["check", "--config", str(config)]) == 0
    output = capsys.readouterr().out
    assert f"{data['heldout']} (heldout): 1 rows" in output
    assert f"{data['train']} (train): 1 rows" in output


def test_a_mixture_is_checked_file_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ask("a.png"), {"images": ["a.png", "b.png"], "messages": EDIT}, "{", name="one.jsonl")
    (tmp_path / "two.json").write_text(json.dumps([{"image": "c.png", "caption": "a cat"}]))
    mixture = tmp_path / "mixture.yaml"
    sources = [{"path": "one.jsonl", "tasks": ["editing"]}, {"path": "t*.json", "format": "captions", "system": "x"}]
    mixture.write_text(yaml.safe_dump({"sources": sources}))
    report = check(mixture)
    counts = {d.path.name: (d.rows, d.good, d.quarantined, d.left_out) for d in report.datasets}
    assert counts == {"one.jsonl": (3, 1, 1, 1), "two.json": (1, 1, 0, 0)}
    assert [dict(dataset.tasks) for dataset in report.datasets] == [{"editing": 1}, {"generation": 1}]
    assert report.examples["json"][0].where == f"{tmp_path / 'one.jsonl'}:3"
    page = tmp_path / "page.html"
    assert main(["check", str(mixture), "--report", str(page)]) == 2
    assert "3 rows = 1 good + 1 quarantined + 1 left out by the mixture" in capsys.readouterr().out
    assert "left out" in page.read_text()
    with pytest.raises(UserError, match="--format llava has no effect"):
        main(["check", str(mixture), "--format", "llava"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no dataset is given"),
        (["gone.jsonl"], "gone.jsonl cannot be read"),
        (["empty.jsonl"], "empty.jsonl holds no rows"),
        (["rows.jsonl", "--max-length", "9"], "--max-length needs --model"),
        (["rows.jsonl", "--model", "qwen"], "--model needs --max-pixels"),
        (["rows.jsonl", "--model", "qwen", "--max-pixels", "9"], "holds no preprocessor_config.json"),
        (["rows.jsonl", "--model", "qwen", "--images", "exists"], "--model has no effect with --images exists"),
        (["rows.jsonl", "--max-errors", "0"], "--max-errors is 0"),
        (["--config", "rows.jsonl"], "is not the config of a stage that reads messages"),
    ],
)
def test_mistakes_give_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, ask("a.png"))
    (tmp_path / "empty.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(["check", *arguments])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_first_places_are_those_of_a_dictionary() -> None:
    generator, places, known = np.random.default_rng(0), FirstPlaces(), {}
    for start in range(0, 6000, 50):
        hashes = generator.integers(0, 2000, 50, dtype=np.uint64)
        own = np.arange(start, start + 50, dtype=np.uint64)
        expected = [known.setdefault(int(value), int(place)) for value, place in zip(hashes, own, strict=True)]
        assert places.add(hashes, own).tolist() == expected
    assert len(places) == len(known)
    found, at = places.find(np.arange(2100, dtype=np.uint64))
    assert {n: int(at[n]) for n in np.flatnonzero(found).tolist()} == known
    assert len(places._runs) < 12


def test_the_guide_names_every_kind() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in guide] == []
