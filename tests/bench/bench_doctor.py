"""The doctor on metadata alone, beside reading the same rows and asking for each picture in a plain loop."""

import json
import os
import time
from pathlib import Path

from data.checks import RowChecker
from data.doctor import examine

NUM_ROWS = 100_000
PICTURES = 1000


def write_rows(directory: Path) -> Path:
    (directory / "images").mkdir()
    for number in range(PICTURES):
        (directory / "images" / f"{number}.png").touch()
    path = directory / "rows.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(NUM_ROWS):
            row = {
                "id": f"row-{number}",
                "source": "bench",
                "images": [f"images/{number % PICTURES}.png", f"images/{number * 7 % PICTURES}.png"],
                "messages": [
                    {
                        "role": "user",
                        "content": f"<image> Make the {number}th circle blue and leave the rest as it is.",
                    },
                    {"role": "assistant", "content": "Here is the image: <image>"},
                ],
            }
            file.write(json.dumps(row) + "\n")
    return path


def naive(path: Path) -> int:
    good = 0
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            good += all(os.path.exists(os.path.join(path.parent, image)) for image in row["images"])
    return good


def test_metadata(tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    started = time.perf_counter()
    assert naive(path) == NUM_ROWS
    plain = NUM_ROWS / (time.perf_counter() - started)
    print(f"\nplain loop (json, exists): {plain:,.0f} rows/s")
    cores = len(os.sched_getaffinity(0))
    for num_workers in sorted({1, cores}):
        started = time.perf_counter()
        report = examine([("train", path)], RowChecker("exists"), num_workers=num_workers)
        rate = NUM_ROWS / (time.perf_counter() - started)
        assert report.datasets[0].good == NUM_ROWS
        print(
            f"doctor, --images exists, {num_workers} processes: {rate:,.0f} rows/s, {rate / plain:.2f} x the loop; "
            f"a million rows in {1e6 / rate / 60:.1f} minutes"
        )
