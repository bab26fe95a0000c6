"""Rows to evaluate on may be any dataset: a file, a pattern, a folder or a mixture."""

import json
from pathlib import Path

import pytest

from data.mixture.pictures import PictureHashes
from data.shapes.dataset import DEFAULTS, draw_rows
from nexus_gen.specs.errors import UserError
from train.evaluate.command import fingerprint_dataset, main, read_tasks


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the held-out rows are in two files, and a mixture of both."""
    directory = tmp_path_factory.mktemp("rows")
    config = {**vars(DEFAULTS), "num_train": 1, "num_heldout": 12, "num_compositional": 0, "image_size": 32}
    draw_rows(directory, type(DEFAULTS)(**config), seed=0, num_workers=1)
    lines = (directory / "heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    parts = directory / "parts"
    parts.mkdir()
    (parts / "images").symlink_to(directory / "images")
    (parts / "one.jsonl").write_text("".join(lines[:5]), encoding="utf-8")
    (parts / "two.jsonl").write_text("".join(lines[5:]), encoding="utf-8")
    (parts / "both.yaml").write_text('sources: [{path: "*.jsonl"}]', encoding="utf-8")
    return directory


@pytest.mark.parametrize("name", ["parts/*.jsonl", "parts/both.yaml"])
def test_rows_of_several_files_are_those_of_one(name: str, rows: Path) -> None:
    def ids(path: Path) -> dict[str, list[str]]:
        return {task: [row.id for row in of_task] for task, of_task in read_tasks(path, None).items()}

    assert ids(rows / name) == ids(rows / "heldout.jsonl")


@pytest.mark.parametrize("name", ["parts/*.jsonl", "parts/both.yaml"])
def test_what_several_files_hold_counts(name: str, rows: Path, tmp_path: Path) -> None:
    def found() -> str:
        return fingerprint_dataset(rows / name, [], PictureHashes(tmp_path / "contents.jsonl"))

    before = found()
    assert before == found()
    second = rows / "parts" / "two.jsonl"
    text = second.read_text(encoding="utf-8")
    second.write_text(text + "\n", encoding="utf-8")
    after = found()
    second.write_text(text, encoding="utf-8")
    assert after != before


def test_rows_of_a_wrong_truth_in_a_mixture_are_named_by_their_own_file(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "truth": {}}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (tmp_path / "heldout.yaml").write_text("sources: [{path: mine.jsonl}]", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.jsonl:1: truth is empty"):
        main(["evaluate", "--rows", str(tmp_path / "heldout.yaml")])
    with pytest.raises(UserError, match=r"gone does not exist"):
        main(["evaluate", "--rows", str(tmp_path / "gone")])
