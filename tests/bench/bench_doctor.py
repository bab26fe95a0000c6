"""The doctor on metadata alone, beside reading the same rows and asking for each picture in a plain loop."""

import json
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from data.doctor.checks import RowChecker
from data.doctor.examine import examine, open_datasets

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


def doctor(path: Path, num_workers: int) -> int:
    return examine(open_datasets([("train", path)]), RowChecker("exists"), num_workers=num_workers).datasets[0].good


def cpu_seconds() -> float:
    """User and system time of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(check: Callable[[], int]) -> tuple[float, float]:
    """Rows/s and rows per CPU second of a check that returns how many rows are good."""
    started, used = time.perf_counter(), cpu_seconds()
    assert check() == NUM_ROWS
    return NUM_ROWS / (time.perf_counter() - started), NUM_ROWS / (cpu_seconds() - used)


def test_metadata(tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    plain, plain_cpu = measure(lambda: naive(path))
    print(f"\nplain loop (json, exists): {plain:,.0f} rows/s, {plain_cpu:,.0f} per CPU second")
    for num_workers in sorted({1, len(os.sched_getaffinity(0))}):
        rate, cpu = measure(partial(doctor, path, num_workers))
        print(f"doctor, {num_workers} processes: {rate:,.0f} rows/s, {cpu:,.0f} per CPU second")
        print(f"  {rate / plain:.2f} x the plain loop; a million rows in {1e6 / rate / 60:.1f} minutes")
