"""The loader of the decoder stages: random access into shards, the same global batches for any number of processes.

Order depends on (seed, epoch) alone. Global batch s covers micro x world x accumulation consecutive places of that
order; the state is the number of micro batches handed out, so a resumed loader goes on exactly behind them.
"""

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from data.shards.files import index_shard, read_sample, repair_hint, require_global_batch
from data.shards.loader_processes import batches
from nexus_gen.artifacts.artifact import Manifest
from nexus_gen.specs.errors import UserError

log = logging.getLogger(__name__)

SHUFFLE_WINDOW = 8  # shards that are mixed with each other, so that reads stay within a few files at a time
Place = tuple[int, int]  # epoch, index of a sample

_index_shard = lru_cache(maxsize=64)(index_shard)


class ShardDataset(Dataset[dict[str, Tensor]]):
    """The samples of one split, by (epoch, index): their tensors, and epoch and index as int64 scalars.

    predicted_fraction: probability that `target_embeds` are the predicted ones where a sample holds both; drawn for
    each sample and epoch from (seed, epoch, index).
    """

    def __init__(self, artifact: Path, split: str, seed: int = 0, predicted_fraction: float = 0.0) -> None:
        self.seed, self.predicted_fraction = seed, predicted_fraction
        shards = Manifest.load(artifact).require("embedding_shards", artifact).details["splits"][split]
        self.paths = [artifact / shard["file"] for shard in shards]
        self.sizes = np.array([shard["samples"] for shard in shards], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, place: Place) -> dict[str, Tensor]:
        epoch, index = place
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        members = _index_shard(self.paths[shard])
        if len(members) != self.sizes[shard]:
            raise UserError(
                f"shard {self.paths[shard]} holds {len(members)} samples and its manifest says {self.sizes[shard]}; "
                f"{repair_hint(self.paths[shard])}"
            )
        sample = read_sample(self.paths[shard], members[index - int(self.starts[shard])])
        predicted = sample.pop("predicted_embeds", None)
        if predicted is not None and self._draw(epoch, index) < self.predicted_fraction:
            sample["target_embeds"] = predicted
        return {**sample, "epoch": torch.tensor(epoch), "index": torch.tensor(index)}

    def _draw(self, epoch: int, index: int) -> float:
        """A number in [0, 1) of each sample and epoch; the last 1 keeps it apart from the sample's noise."""
        return float(np.random.default_rng((self.seed, epoch, index, 1)).random())

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """A permutation of the samples: shards shuffled, then samples within windows of shards."""
        generator = np.random.default_rng((seed, epoch))
        shards = generator.permutation(len(self.paths))
        windows = []
        for first in range(0, len(shards), SHUFFLE_WINDOW):
            window = shards[first : first + SHUFFLE_WINDOW]
            samples = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1]) for shard in window])
            windows.append(generator.permutation(samples))
        return np.concatenate(windows)


class ShardLoader:
    """This rank's micro batches, without end; the tail of an epoch that fills no global batch is left out.

    A batch stacks the tensors of micro_batch_size samples. predicted_fraction: see ShardDataset. prepare: what the
    loader's processes make of a batch. Raises UserError when the split is smaller than one global batch.
    """

    def __init__(
        self,
        artifact: str | Path,
        split: str,
        *,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        num_workers: int,
        predicted_fraction: float = 0.0,
        prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.prepare = prepare
        self.on_death: Callable[[str], None] = log.warning  # called when a process of the loader was killed
        self.dataset = ShardDataset(Path(artifact), split, seed, predicted_fraction)
        self.micro_batch_size, self.accumulation = micro_batch_size, accumulation
        self.rank, self.world_size = rank, world_size
        self.seed, self.num_workers = seed, num_workers
        self.global_batch_size = micro_batch_size * accumulation * world_size
        self.steps_per_epoch = len(self.dataset) // self.global_batch_size
        require_global_batch(artifact, split, len(self.dataset), self.global_batch_size)
        self.batches_done = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=_Places(self, self.batches_done),
            collate_fn=self._collate,
            num_workers=self.num_workers,
            persistent_workers=False,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in batches(loader, self.on_death):
            self.batches_done += 1
            yield batch

    def _collate(self, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
        batch = default_collate(samples)
        return self.prepare(batch) if self.prepare else batch

    def state_dict(self) -> dict[str, Any]:
        """Samples handed out on all ranks together, so that another number of processes can go on behind them."""
        num_samples = self.batches_done * self.micro_batch_size * self.world_size
        return {"num_samples": num_samples, "global_batch_size": self.global_batch_size, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind the samples of `state`.

        UserError when its global batches were others, or when it ends inside what is now one pass of all ranks.
        """
        for name in ("global_batch_size", "seed"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"the checkpoint's loader had {name} {state[name]} and now it is {getattr(self, name)}; "
                    "go on with the former, or give resume=false to start over"
                )
        per_pass = self.micro_batch_size * self.world_size
        self.batches_done, rest = divmod(state["num_samples"], per_pass)
        if rest:
            raise UserError(
                f"the checkpoint's loader had handed out {state['num_samples']} samples, no multiple of micro batch "
                f"{self.micro_batch_size} x {self.world_size} processes; go on with the former or a smaller micro batch"
            )


class _Places:
    """The places of this rank's micro batches from the n-th on."""

    def __init__(self, loader: ShardLoader, first: int) -> None:
        self.loader, self.first = loader, first

    def __iter__(self) -> Iterator[list[Place]]:
        loader = self.loader
        step, micro = divmod(self.first, loader.accumulation)
        current, order = -1, np.empty(0, dtype=np.int64)
        while True:
            epoch, step_of_epoch = divmod(step, loader.steps_per_epoch)
            if epoch != current:
                current, order = epoch, loader.dataset.order(loader.seed, epoch)
            start = step_of_epoch * loader.global_batch_size
            start += (micro * loader.world_size + loader.rank) * loader.micro_batch_size
            yield [(epoch, int(index)) for index in order[start : start + loader.micro_batch_size]]
            micro += 1
            if micro == loader.accumulation:
                step, micro = step + 1, 0
