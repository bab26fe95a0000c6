"""What the doctor names is exactly what a run leaves out: of every kind of broken row, after moves, not after edits."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from broken import BROKEN, Broken

from data.doctor.command import main
from data.mixture.order import Mixture, check_dataset, load_mixture, read_dataset, read_places
from data.mixture.quarantine import LeftOut, read_left_out
from data.shards.plan import PictureHashes, SplitRows
from nexus_gen.specs.errors import UserError


def text(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"row {number}"}, {"role": "assistant", "content": "yes"}]
    return {"id": str(number), "messages": turns}


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def check(*datasets: Path, quarantine: Path) -> Path:
    assert main(["check", *map(str, datasets), "--quarantine", str(quarantine), "--num-workers", "1"]) == 2
    return quarantine


def left_out(quarantine: Path, dataset: Path) -> LeftOut:
    return read_left_out([quarantine], load_mixture(dataset).files)


def drawn(mixture: Mixture) -> list[str]:
    return sorted(mixture.row(mixture.draw(position)).id for position in range(mixture.epoch_rows))


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_exactly_the_other_rows_are_used_of_a_dataset_that_moved(broken: Broken, tmp_path: Path) -> None:
    (tmp_path / "checked").mkdir()
    name = broken.write(tmp_path / "checked").name
    quarantine = check(tmp_path / "checked" / name, quarantine=tmp_path / "quarantine.jsonl")
    path = (tmp_path / "checked").rename(tmp_path / "moved") / name
    out = left_out(quarantine, path)
    assert len(out) == len(out.of(path)) == 1
    num_used = broken.num_rows - 1
    if not num_used:
        with pytest.raises(UserError, match="but the 1 that are quarantined"):
            Mixture(path, 0, out)
        return
    rows = list(read_dataset(path, out))
    mixture = Mixture(path, 0, out)
    assert drawn(mixture) == sorted(row.id for row in rows)
    assert (len(rows), len(mixture), mixture.num_left_out) == (num_used, num_used, 1)
    assert sum(check_dataset(path, left_out=out).values()) == num_used


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Twenty rows, of which the third and the eighth are no JSON, and `quarantine.jsonl` beside them."""
    rows = ["{broken" if number in (3, 8) else text(number) for number in range(1, 21)]
    path = write(tmp_path / "rows.jsonl", *rows)
    check(path, quarantine=tmp_path / "quarantine.jsonl")
    return path


def test_other_rows_may_change_but_not_those_that_are_named(dataset: Path) -> None:
    quarantine, lines = dataset.with_name("quarantine.jsonl"), dataset.read_text().splitlines()
    write(dataset, *lines[:4], "", *lines[4:], text(21))
    with pytest.raises(
        UserError, match=r"rows\.jsonl:8 is not the row that .*quarantine\.jsonl names \(1 of 2 differ\)"
    ):
        left_out(quarantine, dataset)
    write(dataset, *lines[:4], *lines[5:])
    with pytest.raises(UserError, match="the dataset was changed since, write it again with `nexus-gen data check"):
        left_out(quarantine, dataset)
    write(dataset, *lines[:7], text(8), *lines[8:])
    with pytest.raises(UserError, match=r"rows\.jsonl:8 is not the row"):
        left_out(quarantine, dataset)
    write(dataset, *lines[:5])
    with pytest.raises(UserError, match=r"rows\.jsonl:8 is not the row"):
        left_out(quarantine, dataset)
    write(dataset, *lines[:4], text(50), *lines[5:], text(21))
    assert left_out(quarantine, dataset).of(dataset).keys() == {2, 7}


def test_a_row_that_is_written_otherwise_is_the_same_row(tmp_path: Path) -> None:
    row = {"messages": [], "id": "é"}
    path = write(tmp_path / "rows.jsonl", text(1), json.dumps(row))
    quarantine = check(path, quarantine=tmp_path / "quarantine.jsonl")
    write(path, text(1), json.dumps(dict(reversed(row.items())), ensure_ascii=False, indent=None) + " ")
    assert left_out(quarantine, path).of(path).keys() == {1}


def test_counts_add_up_over_a_mixture_of_tasks(dataset: Path, tmp_path: Path) -> None:
    """A broken row is nobody's task, so each source counts it; `--as-error` names rows that could be read."""
    picture = {"images": ["a.png"], "messages": [{"role": "user", "content": "<image>"}, text(0)["messages"][1]]}
    write(tmp_path / "more.jsonl", text(30), text(30), picture, "{")
    (tmp_path / "a.png").touch()
    path = tmp_path / "mixture.yaml"
    sources = [{"path": "rows.jsonl"}, {"path": "more.jsonl", "tasks": ["text"]}]
    path.write_text(yaml.safe_dump({"sources": sources}))
    quarantine = tmp_path / "all.jsonl"
    arguments = ["--quarantine", str(quarantine), "--as-error", "duplicate_row", "--images", "none"]
    assert main(["check", str(path), *arguments, "--num-workers", "1"]) == 2
    out = left_out(quarantine, path)
    mixture = Mixture(path, 0, out)
    assert (mixture.counts, mixture.num_left_out) == ([18, 1], 4)
    assert len(mixture) + mixture.num_left_out == 20 + 3  # the picture is not asked for
    assert drawn(mixture) == sorted([*(str(n) for n in range(1, 21) if n not in (3, 8)), "30"])
    found = list(read_places(path, out))
    assert len(found) == 23 and sum(not reason for *_, reason in found) == len(mixture)
    assert check_dataset(path, left_out=out) == {"text": 19, "understanding": 1}


def test_embedding_sets_them_aside_with_their_reason(dataset: Path, tmp_path: Path) -> None:
    painted = {
        "id": "p",
        "images": ["no.png"],
        "messages": [{"role": "user", "content": "paint"}, {"role": "assistant", "content": "<image>"}],
    }
    path = write(tmp_path / "paint.jsonl", painted, text(1), "{")
    out = left_out(check(path, quarantine=tmp_path / "q.jsonl"), path)
    rows = SplitRows.read("train", path, "generation", False, PictureHashes(tmp_path / "hashes"), out, tmp_path / "m")
    assert not rows.rows and [entry["id"] for entry in rows.unusable] == ["p", ""]
    assert "no.png does not exist" in rows.unusable[0]["reason"] and "not JSON" in rows.unusable[1]["reason"]


def test_files_are_known_by_the_longest_end_of_their_paths(tmp_path: Path) -> None:
    named = [write(tmp_path / "old" / name / "train.jsonl", text(1), "{" + name) for name in ("cats", "dogs", "birds")]
    quarantine = check(*named, quarantine=tmp_path / "quarantine.jsonl")
    moved = [write(tmp_path / "new" / name / "train.jsonl", text(1), "{" + name) for name in ("dogs", "cats")]
    out = read_left_out([quarantine], moved)
    assert {file: set(of_file) for file, of_file in out.rows.items()} == {file: {1} for file in moved}
    assert out.elsewhere == {str(named[2]): 1}
    other = write(tmp_path / "new" / "train.jsonl", text(1), "{")
    with pytest.raises(UserError, match=r"names .*train\.jsonl, which may be .*new/train\.jsonl or not"):
        read_left_out([quarantine], [other])
    renamed = write(tmp_path / "new" / "rows.jsonl", text(1), "{cats")
    assert read_left_out([quarantine], [renamed]).elsewhere == {str(path): 1 for path in named}


def test_names_that_are_no_unicode_are_found_again(tmp_path: Path) -> None:
    path = write(tmp_path / "caf\udce9" / "rows.jsonl", text(1), '{"id": "\\ud83d", "messages": []}')
    quarantine = check(path, quarantine=tmp_path / "quarantine.jsonl")
    assert left_out(quarantine, path).of(path).keys() == {1}


def test_what_is_no_quarantine_file_is_refused(dataset: Path, tmp_path: Path) -> None:
    old = write(tmp_path / "old.jsonl", {"where": "rows.jsonl:3", "file": "rows.jsonl", "line": 3, "reason": "bad"})
    with pytest.raises(UserError, match=r"old\.jsonl:1 names no row by file, line, digest and reason; write it again"):
        left_out(old, dataset)
    with pytest.raises(UserError, match=r"rows\.jsonl:1 names no row"):
        left_out(dataset, dataset)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no quarantine file"):
        left_out(tmp_path / "empty", dataset)
    assert not left_out(write(tmp_path / "none.jsonl"), dataset)
