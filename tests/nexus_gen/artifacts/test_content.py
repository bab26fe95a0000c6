"""What files hold is read once, and again whenever it may have changed."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from nexus_gen.artifacts import content
from nexus_gen.artifacts.content import CONTENTS, Contents


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read, in order; files count as settled at once."""
    names: list[str] = []
    plain = content.hash_file

    def hash_file(path: str | os.PathLike[str]) -> str:
        names.append(Path(path).name)
        return plain(path)

    monkeypatch.setattr(content, "SETTLED_NS", 0)
    monkeypatch.setattr(content, "hash_file", hash_file)
    return names


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tick() -> None:
    """Until the clock that a file system takes its times from has gone on."""
    time.sleep(0.02)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_an_unchanged_file_is_read_once_by_all_that_share_a_memory(tmp_path: Path, readings: list[str]) -> None:
    file, memory = write(tmp_path / "a", "one"), tmp_path / CONTENTS
    first = Contents.at(memory)
    assert first.sha256(file) == first.sha256(str(file)) == sha256("one")
    first.save()
    del first
    assert Contents.at(memory).sha256(file) == sha256("one")
    assert readings == ["a"]
    tick()
    os.utime(file)  # touched: read again, to the same result
    assert Contents.at(memory).sha256(file) == sha256("one")
    assert readings == ["a", "a"]


def test_a_file_of_the_same_size_and_time_is_another_one(tmp_path: Path, readings: list[str]) -> None:
    file, memory = write(tmp_path / "a", "one"), Contents(tmp_path / CONTENTS)
    assert memory.sha256(file) == sha256("one")
    other = write(tmp_path / "b", "two")
    shutil.copystat(file, other)
    os.replace(other, file)  # as rsync -t does
    assert memory.sha256(file) == sha256("two")
    facts = file.stat()
    tick()
    file.write_text("six")  # in place, and its time set back
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert memory.sha256(file) == sha256("six")


def test_a_link_to_another_file_is_another_content(tmp_path: Path, readings: list[str]) -> None:
    memory, link = Contents(), tmp_path / "link"
    for text in ("one", "two"):
        link.unlink(missing_ok=True)
        link.symlink_to(write(tmp_path / text, text))
        assert memory.sha256(link) == sha256(text)


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    """Within one tick of the file system's clock a second change leaves no trace."""
    file, memory = write(tmp_path / "a", "one"), Contents(tmp_path / CONTENTS)
    memory.sha256(file)
    facts = content.file_facts(file)
    assert memory._known["a"][0] != facts and content.ns_since_change(facts, facts[2] + 5) == 5


def test_a_memory_moves_with_its_directory(tmp_path: Path, readings: list[str]) -> None:
    file = write(tmp_path / "run" / "stage" / "a", "one")
    memory = Contents.at(tmp_path / "run" / CONTENTS)
    memory.sha256(file)
    memory.save()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert Contents.at(tmp_path / "moved" / CONTENTS).sha256(tmp_path / "moved" / "stage" / "a") == sha256("one")
    assert readings == ["a"]


def test_two_that_write_lose_nothing_of_each_other(tmp_path: Path, readings: list[str]) -> None:
    files = [write(tmp_path / name, name) for name in "abc"]
    memory = tmp_path / CONTENTS
    one, two = Contents(memory), Contents(memory)  # as two processes have them
    for user, file in ((one, files[0]), (two, files[1])):
        user.sha256(file)
    for user in (one, two):
        user.save()
    assert Contents(memory)._known.keys() == {"a", "b"}
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
    readings.clear()
    third = Contents.at(memory)
    two.sha256(files[2])
    two.save()
    assert Contents.at(memory) is third and list(third.sha256s(list(map(str, files)))) == [*map(sha256, "abc")]
    assert readings == ["c"]


def test_a_memory_that_makes_no_sense_or_cannot_be_written_costs_readings_alone(
    tmp_path: Path, readings: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    file, memory = write(tmp_path / "a", "one"), tmp_path / CONTENTS
    memory.write_bytes(b'["a"\n[1, 2, 3, 4]\n["a", [1], 2, 3]\n\xff\xfe\nnull\n')
    assert Contents(memory).sha256(file) == sha256("one")
    memory.unlink()
    memory.mkdir()  # whoever runs the tests may write into read-only directories
    broken = Contents(memory)
    assert broken.sha256(file) == sha256("one")
    broken.save()
    assert "files are read again next time" in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
    elsewhere = Contents(tmp_path / "nowhere" / CONTENTS)
    elsewhere.sha256(file)
    elsewhere.save()
    assert not (tmp_path / "nowhere").exists()


def test_what_is_gone_is_forgotten_and_changes_are_known_by_their_time(tmp_path: Path, readings: list[str]) -> None:
    memory = Contents(tmp_path / CONTENTS)
    kept, gone = write(tmp_path / "kept" / "a", "one"), write(tmp_path / "gone" / "a", "one")
    assert list(memory.sha256s([str(kept), str(gone)])) == [sha256("one")] * 2
    assert memory.changed_since([str(kept), str(gone)], 0) == []
    before = time.time_ns()
    tick()
    kept.write_text("two")
    memory.sha256(kept)
    shutil.rmtree(gone.parent)
    memory.save()
    again = Contents(tmp_path / CONTENTS)
    assert again._known.keys() == {"kept/a"}
    assert again.changed_since([str(kept), str(gone)], before) == [str(kept)]
    assert again.changed_since([str(kept)], time.time_ns()) == []


def test_parts_of_a_file_have_hashes_of_their_own(tmp_path: Path, readings: list[str]) -> None:
    file, memory = write(tmp_path / "a.tar", "onetwo"), Contents(tmp_path / CONTENTS)
    assert [memory.sha256(file, part) for part in ((0, 3), (3, 3))] == [sha256("one"), sha256("two")]
    assert memory.sha256(file) == sha256("onetwo")
    tick()
    file.write_text("onesix")
    assert memory.sha256(file, (3, 3)) == sha256("six")


def test_what_was_hashed_while_it_was_written_is_not_read(tmp_path: Path, readings: list[str]) -> None:
    file, memory = write(tmp_path / "a", "one"), Contents(tmp_path / CONTENTS)
    memory.learn([(str(file), sha256("one"))])
    assert memory.sha256(file) == sha256("one") and readings == []


def test_another_memory_is_asked_and_left_as_it_is(tmp_path: Path, readings: list[str]) -> None:
    file, theirs = write(tmp_path / "run" / "a", "one"), Contents(tmp_path / "run" / CONTENTS)
    theirs.sha256(file)
    theirs.save()
    before = (tmp_path / "run" / CONTENTS).read_bytes()
    arm = Contents(tmp_path / CONTENTS)
    for path in (tmp_path / "run" / CONTENTS, tmp_path / CONTENTS, tmp_path / "nowhere" / CONTENTS):
        arm.consult(path)
    assert arm.sha256(file) == sha256("one") and readings == ["a"]
    tick()
    file.write_text("two")
    assert arm.sha256(file) == sha256("two") and readings == ["a", "a"]
    arm.save()
    assert (tmp_path / "run" / CONTENTS).read_bytes() == before


def test_reading_much_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(content, "MUCH", 5)
    memory = Contents()
    for name, said in (("a", 0), ("b", 1), ("c", 1)):
        memory.sha256(write(tmp_path / name, "one"))
        assert len(caplog.records) == said
