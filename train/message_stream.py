"""Message rows in training order: a function of seed and position, the same for every number of processes."""

import signal
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from data.messages import Row, parse_record
from data.records import open_records
from nexus_gen.specs.errors import UserError


class MessageFile:
    """Random access to the rows of a dataset file."""

    def __init__(self, path: str | Path) -> None:
        self._records = open_records(path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        return parse_record(self._records[index])


class MessageStream(Dataset[dict[str, Any]]):
    """Encoded rows of all epochs, one after the other, each epoch in an order of its own.

    encode: {"messages", "images"} -> inputs of the model; what it raises comes out as a UserError naming the row.
    Position p of the training order is in micro-batch p // micro_batch_size, and micro-batch b goes to rank
    b % world_size. The trainer's sampler gives rank r the indices r, r + world_size, ...; `position` translates, so
    that one process that accumulates and several that do not average over the same micro-batches.
    """

    def __init__(
        self,
        rows: MessageFile,
        encode: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        num_samples: int,
        micro_batch_size: int,
        world_size: int,
        seed: int,
    ) -> None:
        self._rows = rows
        self._encode = encode
        self._num_samples = num_samples
        self._micro_batch_size = micro_batch_size
        self._world_size = world_size
        self._order_of_epoch = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(len(rows))
        )

    def __len__(self) -> int:
        return self._num_samples

    def position(self, index: int) -> int:
        """The place in the training order of the sampler's index."""
        step_of_rank, rank = divmod(index, self._world_size)
        micro_batch_of_rank, place = divmod(step_of_rank, self._micro_batch_size)
        return (micro_batch_of_rank * self._world_size + rank) * self._micro_batch_size + place

    def row_index(self, index: int) -> int:
        """The row that the sampler's index stands for."""
        epoch, place = divmod(self.position(index), len(self._rows))
        return int(self._order_of_epoch(epoch)[place])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if get_worker_info() is not None:
            # torchrun signals the whole process group: a loader process that dies would take the rank with it before
            # the rank has finished its step and saved. The loader ends with its rank in any case.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        row = self._rows[self.row_index(index)]
        try:
            return self._encode({"messages": row.messages, "images": row.images})
        except (ValueError, UserError) as error:
            raise UserError(f"{row.where}: {error}") from error
