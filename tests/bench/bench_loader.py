"""Embedding shards beside one `.pt` file per sample, as the published trainer reads them: samples/s, CPU per sample.

Full-size samples: 81 x 3584 embeddings and 16 x 64 x 64 latents in bfloat16, read from the page cache.
"""

import resource
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.shards.files import ShardSpec, write_shard
from data.shards.loader import ShardLoader
from nexus_gen.artifacts.artifact import Manifest, seal

NUM_SAMPLES, SAMPLES_PER_SHARD, BATCH_SIZE, EPOCHS = 256, 64, 4, 3
EMBED_DIM, LATENTS = 3584, (16, 64, 64)
SPEC = ShardSpec(81, 0, EMBED_DIM, list(LATENTS), "bfloat16", "encoder")


def sample(index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(index)
    shapes = {"target_embeds": (81, EMBED_DIM), "latents": LATENTS}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


class Files(Dataset[dict[str, Tensor]]):
    """One `.pt` per sample."""

    def __init__(self, directory: Path) -> None:
        self.paths = sorted(directory.glob("*.pt"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return torch.load(self.paths[index], weights_only=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples in `files/` and in the artifact `shards/`."""
    directory = tmp_path_factory.mktemp("bench")
    (directory / "files").mkdir()
    (directory / "shards" / "train").mkdir(parents=True)
    shards = []
    for first in range(0, NUM_SAMPLES, SAMPLES_PER_SHARD):
        samples = [(f"{i:09d}", sample(i), {"id": str(i)}) for i in range(first, first + SAMPLES_PER_SHARD)]
        file = f"train/{first // SAMPLES_PER_SHARD:06d}.tar"
        write_shard(directory / "shards" / file, samples)
        shards.append({"file": file, "samples": SAMPLES_PER_SHARD})
        for key, tensors, _ in samples:
            torch.save(tensors, directory / "files" / f"{key}.pt")
    details = {"spec": SPEC.__dict__, "splits": {"train": shards}}
    seal(directory / "shards", Manifest("embedding_shards", "embed_generation", {}, {}, {}, details))
    return directory


def cpu_seconds() -> float:
    """User and system time of this process and of the workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(batches: Callable[[], Iterable[dict[str, Tensor]]]) -> tuple[float, float]:
    """Samples/s and CPU seconds per sample over EPOCHS epochs."""
    started, used, count = time.perf_counter(), cpu_seconds(), 0
    for batch in batches():
        assert batch["target_embeds"].shape[1:] == (81, EMBED_DIM)
        count += len(batch["target_embeds"])
    assert count == EPOCHS * NUM_SAMPLES
    return count / (time.perf_counter() - started), (cpu_seconds() - used) / count


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_beside_files(written: Path, num_workers: int) -> None:
    def of_files() -> Iterable[dict[str, Tensor]]:
        options: dict[str, Any] = {"batch_size": BATCH_SIZE, "num_workers": num_workers, "shuffle": True}
        loader = DataLoader(Files(written / "files"), persistent_workers=num_workers > 0, **options)
        for _ in range(EPOCHS):
            yield from loader

    def of_shards() -> Iterable[dict[str, Tensor]]:
        loader = ShardLoader(
            written / "shards",
            "train",
            micro_batch_size=BATCH_SIZE,
            accumulation=1,
            rank=0,
            world_size=1,
            seed=0,
            num_workers=num_workers,
        )
        return islice(loader, EPOCHS * NUM_SAMPLES // BATCH_SIZE)

    measure(of_files), measure(of_shards)  # into the page cache
    rates = {}
    for name, batches in (("one .pt per sample", of_files), ("shards", of_shards)):
        rate, cpu = rates[name] = measure(batches)
        print(f"\n{name}, {num_workers} workers: {rate:,.0f} samples/s, {1e3 * cpu:.2f} ms CPU per sample", end="")
    (rate, cpu), (shard_rate, shard_cpu) = rates.values()
    print(f"\nshards: {shard_rate / rate:.2f} x the samples/s, {shard_cpu / cpu:.2f} x the CPU per sample")
