"""A result's path is checked before a model loads, and what is half written never stays."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nexus_gen.artifacts.artifact import building, write_text_atomic
from nexus_gen.artifacts.results import PICTURES, aside, check_result
from nexus_gen.commands.use import save_atomic
from nexus_gen.specs.errors import UserError


def test_paths_that_can_be_written_pass_and_leave_no_trace(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(b"old")
    for name in ("new.png", "a/b/new.JPG", "there.png", "dot.in.name.webp"):
        check_result(tmp_path / name, "--result-path", suffixes=PICTURES)
    check_result(tmp_path / "a" / "directory", "--output", directory=True)
    check_result(tmp_path, "--output", directory=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("picture", {"suffixes": PICTURES}, r"does not end in \.png or"),
        ("picture.gif", {"suffixes": PICTURES}, r"does not end in \.png or"),
        ("folder.png", {"suffixes": PICTURES}, "is a directory; give the file"),
        ("file/x.png", {}, "file is a file"),
        ("file/a/b/x.png", {}, "file is a file|Not a directory"),
        ("file", {"directory": True}, "is a file; give a directory"),
        ("x" * 300 + ".png", {}, "File name too long"),
        ("a\0b.png", {}, "cannot be written"),
        ("pipe", {}, "is not a regular file"),
        ("new.json", {"num_bytes": 1 << 60}, "make room"),
    ],
)
def test_paths_that_cannot_be_written_are_named(
    name: str, options: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=rf"(?s)^--output .*(?:{sentence})"):
        check_result(tmp_path / name, "--output", **options)


def test_disks_that_take_no_files_are_named() -> None:
    with pytest.raises(UserError, match="cannot be written"):
        check_result("/proc/nexus/x.png", "--output")


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target.png"
    target.write_bytes(b"old")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for write in (
        lambda: save_atomic(Image.new("CMYK", (4, 4)), target),  # a PNG cannot hold it
        lambda: write_text_atomic(target, "\ud800"),  # nor UTF-8 that
    ):
        with pytest.raises((OSError, ValueError)):
            write()
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save_atomic(Image.new("RGB", (4, 4)), target)
    with pytest.raises(SystemExit), aside(target) as partial:
        partial.write_bytes(b"half")
        raise SystemExit(143)
    assert [path.name for path in tmp_path.iterdir()] == ["target.png"] and target.read_bytes() == b"old"


@pytest.mark.parametrize("resumable", [False, True])
def test_a_directory_that_is_half_made_stays_only_to_be_resumed(resumable: bool, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), building(tmp_path / "made", resumable=resumable) as directory:
        (directory / "part").touch()
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == (["made.partial"] if resumable else [])


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised, aside(tmp_path / "x.json"):
        Path("/dev/full").write_text("x")
    assert raised.value.filename == str(tmp_path / "x.json")
