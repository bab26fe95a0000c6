"""What was read of a dataset is there again until one of its files, or what is asked, changes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data.mixture.memory import remembered


def test_values_are_read_again_only_when_files_or_key_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, memory, readings = tmp_path / "rows", tmp_path / "memory", []

    def read() -> Iterator[list[str]]:
        readings.append(1)
        for line in file.read_text().split():
            yield [line, "\ud800 half of a pair"]

    def ask(key: str) -> tuple[str, int]:
        values = list(remembered(memory, key, [file], read))
        assert all(more == "\ud800 half of a pair" for _, more in values)
        return "".join(line for line, _ in values), len(readings)

    file.write_text("a b")
    assert ask("key") == ("ab", 1)
    assert ask("key") == ("ab", 2)  # its last change was too shortly before to be told from another one
    assert not memory.exists()
    monkeypatch.setattr("data.mixture.memory.SETTLED_NS", 0)
    assert ask("key") == ("ab", 3)
    assert ask("key") == ("ab", 3)
    assert ask("other") == ("ab", 4)
    next(remembered(memory, "third", [file], read))  # not to its end
    assert ask("other") == ("ab", 5)
    file.write_text("a c d")
    assert ask("other") == ("acd", 6)
    assert [path.name for path in tmp_path.iterdir() if path not in (file, memory)] == []


def test_a_dataset_that_is_a_directory_changes_with_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.mixture.memory.SETTLED_NS", 0)
    dataset, readings = tmp_path / "dataset", []
    (dataset / "sub").mkdir(parents=True)

    def ask() -> int:
        list(remembered(tmp_path / "memory", "key", [dataset], lambda: readings.append(1) or ["row"]))
        return len(readings)

    (dataset / "sub" / "1.txt").write_text("a caption")
    assert [ask(), ask()] == [1, 1]
    (dataset / "sub" / "1.txt").write_text("another caption")
    assert [ask(), ask()] == [2, 2]
    (dataset / "sub" / "2.txt").write_text("a caption")
    assert [ask(), ask()] == [3, 3]
    (dataset / "sub" / "1.txt").unlink()
    assert [ask(), ask()] == [4, 4]


def test_where_nothing_can_be_written_values_are_read_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.mixture.memory.SETTLED_NS", 0)
    file, no_directory = tmp_path / "rows", tmp_path / "run"
    file.write_text("a")
    no_directory.touch()  # whoever runs the tests may write into read-only directories
    for _ in range(2):
        assert list(remembered(no_directory / "memory", "key", [file], lambda: ["row"])) == ["row"]
