"""A loader whose processes are killed yields what it would have yielded."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info

from data.shards.loader_processes import batches


class Deadly(Dataset[int]):
    """Numbers; the first process to load `deadly` is killed, or raises."""

    def __init__(self, mark: Path, deadly: int, raises: bool = False) -> None:
        self.mark, self.deadly, self.raises = mark, deadly, raises

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> int:
        if index == self.deadly and not self.mark.exists() and get_worker_info() is not None:
            self.mark.touch()
            if self.raises:
                raise RuntimeError("broken row")
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def loader(dataset: Deadly, num_workers: int) -> DataLoader[int]:
    sampler = BatchSampler(range(len(dataset)), batch_size=3, drop_last=False)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=torch.tensor, num_workers=num_workers)


@pytest.mark.parametrize(("deadly", "num_workers"), [(0, 1), (7, 2), (23, 2)])
def test_a_killed_process_costs_no_batch(deadly: int, num_workers: int, tmp_path: Path) -> None:
    deaths: list[str] = []
    made = [batch.tolist() for batch in batches(loader(Deadly(tmp_path / "m", deadly), num_workers), deaths.append)]
    assert made == [list(range(first, first + 3)) for first in range(0, 24, 3)]
    assert len(deaths) == 1 and deaths[0].endswith("was killed by SIGKILL")


def test_an_error_of_a_row_is_no_death(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken row"):
        list(batches(loader(Deadly(tmp_path / "m", 4, raises=True), 1), lambda _: None))


def test_loaders_without_processes_are_as_they_were(tmp_path: Path) -> None:
    assert len(list(batches(loader(Deadly(tmp_path / "m", 4), 0), pytest.fail))) == 8
