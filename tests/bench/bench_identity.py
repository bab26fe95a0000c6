"""What it costs to ask whether anything changed: pictures that rows name, and files of weights.

The first look reads every byte, the second one asks for sizes, times and inodes; beside them a plain loop that reads
everything each time. Files are in the page cache: a first look at a disk waits for that instead.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.mixture.pictures import PictureHashes, fingerprint_pictures, named_pictures
from data.mixture.quarantine import LeftOut
from nexus_gen.artifacts import content
from nexus_gen.artifacts.artifact import fingerprint_path
from nexus_gen.artifacts.content import CONTENTS, Contents

PICTURES, PICTURE_BYTES = 40_000, 20_000
WEIGHTS_BYTES = 1 << 30


def write_rows(directory: Path) -> Path:
    """Rows of a picture each, a thousand pictures to a directory."""
    data, rows = os.urandom(PICTURE_BYTES), []
    for number in range(PICTURES):
        name = f"images/{number // 1000}/{number}.jpg"
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(number.to_bytes(8) + data)
        turns = [{"role": "user", "content": "<image> What is it?"}, {"role": "assistant", "content": "A picture."}]
        rows.append(json.dumps({"images": [name], "messages": turns}) + "\n")
    (directory / "rows.jsonl").write_text("".join(rows))
    return directory / "rows.jsonl"


def seconds(do: Callable[[], object]) -> tuple[float, float, object]:
    """Seconds, CPU seconds, and what came of it."""
    began, used = time.perf_counter(), time.process_time()
    result = do()
    return time.perf_counter() - began, time.process_time() - used, result


def test_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "SETTLED_NS", 0)
    monkeypatch.setattr("data.mixture.memory.SETTLED_NS", 0)
    rows, memory = write_rows(tmp_path), tmp_path / CONTENTS

    def plain() -> str:
        every = hashlib.sha256()
        for line in rows.read_text().splitlines():
            for name in json.loads(line)["images"]:
                every.update(hashlib.sha256((tmp_path / name).read_bytes()).digest())
        return every.hexdigest()

    def look() -> str:
        hashes = PictureHashes(memory)
        found = fingerprint_pictures(named_pictures(rows, LeftOut(), tmp_path / "names"), hashes)
        hashes.contents.save()
        return found

    looks = [("plain loop, each time", plain), ("first look", look), ("second look", look)]
    found = [(name, *seconds(do)) for name, do in looks]
    assert found[1][-1] == found[2][-1]
    remembered = memory.stat().st_size / PICTURES
    print(f"\n{PICTURES} pictures of {PICTURE_BYTES / 1e3:.0f} kB; memory: {remembered:.0f} bytes each")
    for name, took, used, _ in found:
        million = 1e6 * used / PICTURES
        print(f"{name}: {took:.2f} s, {used:.2f} s CPU, {million:.1f} us CPU a picture, {million:.0f} s a million")


def test_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "SETTLED_NS", 0)
    weights, memory = tmp_path / "weights.safetensors", tmp_path / CONTENTS
    with open(weights, "wb") as file:
        for _ in range(WEIGHTS_BYTES >> 24):
            file.write(os.urandom(1 << 24))

    def ends() -> bytes:
        with open(weights, "rb") as file:
            head = file.read(1 << 20)
            file.seek(-(1 << 20), os.SEEK_END)
            return hashlib.sha256(head + file.read()).digest()

    def look() -> str:
        contents = Contents.at(memory)
        found = fingerprint_path(weights, contents)
        contents.save()
        return found

    ends_s, _, _ = seconds(ends)
    first_s, used_s, first = seconds(look)
    second_s, _, second = seconds(look)
    assert first == second
    print(f"\na file of {WEIGHTS_BYTES / 1e9:.1f} GB")
    print(f"its two ends, as before: {ends_s * 1e3:.1f} ms")
    print(f"first look, every byte: {first_s:.2f} s, {WEIGHTS_BYTES / used_s / 1e9:.2f} GB per CPU second")
    print(f"second look: {second_s * 1e3:.1f} ms")
