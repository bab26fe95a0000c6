"""What the loader promises: nothing lost or doubled over ranks, workers and resumption, bad rows set aside alike."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from data.mixture.order import Mixture
from data.mixture.quarantine import NOTHING, LeftOut, read_left_out
from nexus_gen.specs.errors import UserError
from train.pretrain.stream import MessageStream, Quarantine, TooLong

NUM_ROWS = 17
BAD = {3: "json", 8: "length", 11: "picture"}  # by line


def write(directory: Path) -> Path:
    lines = []
    for line in range(1, NUM_ROWS + 1):
        turns = [{"role": "user", "content": f"row {line}"}, {"role": "assistant", "content": "yes"}]
        lines.append("{" if BAD.get(line) == "json" else json.dumps({"messages": turns}))
    path = directory / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


def encode(row: dict[str, Any]) -> dict[str, Any]:
    line = int(row["messages"][0]["content"].split()[1])
    if BAD.get(line) == "length":
        raise TooLong(f"{line} tokens where data.max_length is 7")
    if BAD.get(line) == "picture":
        raise UserError("picture a.png cannot be read")
    return {"line": line}


def build(
    path: Path,
    bad: Path,
    rank: int = 0,
    world_size: int = 1,
    num_samples: int = 72,
    fraction: float = 0.5,
    left_out: LeftOut = NOTHING,
) -> MessageStream:
    mixture = Mixture(path, seed=5, left_out=left_out)
    quarantine = Quarantine(bad, rank, max_bad_fraction=fraction, num_rows=len(mixture))
    return MessageStream(
        mixture, encode, quarantine, num_samples=num_samples, micro_batch_size=2, world_size=world_size
    )


def read(stream: MessageStream, rank: int, world_size: int, num_workers: int = 0, start: int = 0) -> list[list[int]]:
    """The micro-batches of a rank, as the trainer's sampler and loader make them; resumed behind `start` of them."""
    indices = list(range(rank, len(stream), world_size))
    batches = [indices[first : first + 2] for first in range(0, len(indices), 2)][start:]
    loader: Any = DataLoader(stream, batch_sampler=batches, num_workers=num_workers)
    return [batch["line"].tolist() for batch in loader]


def quarantined(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(directory.glob("*.jsonl")) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_share_one_order(world_size: int, num_workers: int, tmp_path: Path) -> None:
    path = write(tmp_path)
    expected = read(build(path, tmp_path / "alone"), 0, 1)
    ranks = [
        read(build(path, tmp_path / "bad", rank, world_size), rank, world_size, num_workers)
        for rank in range(world_size)
    ]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == expected
    entries = quarantined(tmp_path / "bad")
    assert {entry["where"]: entry["kind"] for entry in entries} == {
        f"{path}:{line}": kind for line, kind in BAD.items()
    }
    assert all(entry["reason"] and entry["position"] < 72 for entry in entries)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_a_resumed_order_goes_on_exactly(before: int, after: int, tmp_path: Path) -> None:
    path = write(tmp_path)
    expected = read(build(path, tmp_path / "alone"), 0, 1)
    steps = 12  # micro-batches of all ranks before the interruption
    first = [
        read(build(path, tmp_path / "bad", rank, before), rank, before)[: steps // before] for rank in range(before)
    ]
    second = [
        read(build(path, tmp_path / "bad", rank, after), rank, after, start=steps // after) for rank in range(after)
    ]
    together = [batch for part in (first, second) for step in zip(*part, strict=True) for batch in step]
    assert together == expected
    assert len({entry["where"] for entry in quarantined(tmp_path / "bad")}) == len(BAD)


def test_rows_in_are_rows_used_and_rows_quarantined(tmp_path: Path) -> None:
    path = write(tmp_path)
    stream = build(path, tmp_path / "bad", num_samples=2 * NUM_ROWS)
    seen = Counter(line for batch in read(stream, 0, 1) for line in batch)
    aside = {int(entry["where"].rsplit(":")[-1]) for entry in quarantined(tmp_path / "bad")}
    assert aside == BAD.keys() and len(quarantined(tmp_path / "bad")) == len(BAD)
    assert not aside & seen.keys()
    assert len(seen) + len(aside) == NUM_ROWS
    assert all(times >= 2 for times in seen.values()) and seen.total() == 2 * NUM_ROWS


@pytest.mark.parametrize(("fraction", "stops"), [(0.0, True), (0.1, True), (3 / NUM_ROWS, False), (0.5, False)])
def test_the_run_stops_past_the_rate(fraction: float, stops: bool, tmp_path: Path) -> None:
    stream = build(write(tmp_path), tmp_path / "bad", fraction=fraction)
    if not stops:
        assert len(read(stream, 0, 1)) == 36
        return
    with pytest.raises(UserError, match=r"rows.jsonl:\d+: .* bad rows of 17 are more than data.max_bad_fraction"):
        read(stream, 0, 1)


def test_what_a_run_set_aside_another_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)  # a captured log with the name below cannot reach pytest's main process
    (directory := tmp_path / "caf\udce9").mkdir()  # a name that is no UTF-8
    path = write(directory)
    for rank in range(2):
        read(build(path, tmp_path / "bad", rank, 2), rank, 2)
    left_out = read_left_out([tmp_path / "bad"], [path])
    assert {index + 1 for index in left_out.of(path)} == BAD.keys()
    good = NUM_ROWS - len(BAD)
    for world_size in (1, 2):
        streams = [
            build(path, tmp_path / "none", rank, world_size, 2 * good, fraction=0.0, left_out=left_out)
            for rank in range(world_size)
        ]
        seen = Counter(
            line for rank, stream in enumerate(streams) for batch in read(stream, rank, world_size) for line in batch
        )
        assert seen == {line: 2 for line in range(1, NUM_ROWS + 1) if line not in BAD}
    assert not (tmp_path / "none").exists()


def test_all_ranks_and_tries_count_together_and_a_row_once(tmp_path: Path) -> None:
    path = write(tmp_path)
    for _ in range(2):
        for rank in range(2):
            read(build(path, tmp_path / "bad", rank, 2, fraction=3 / NUM_ROWS), rank, 2)
    entries = quarantined(tmp_path / "bad")
    assert len(entries) == len({entry["where"] for entry in entries}) == len(BAD)
    (tmp_path / "bad" / "rank7.jsonl").write_text('{"where": "elsewhere:1"}\n{"where": "half a li')
    with pytest.raises(UserError, match="4 bad rows of 17"):
        read(build(path, tmp_path / "bad", fraction=3 / NUM_ROWS), 0, 1)


def test_a_source_without_a_good_row_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 5)
    with pytest.raises(UserError, match=r"more than data.max_bad_fraction|100 rows in a row are bad"):
        read(build(path, tmp_path / "bad", fraction=1.0), 0, 1)
