"""Message rows in training order: a function of seed and position, the same for every number of processes.

A bad sample (a row, a picture or a length that cannot be trained on) is written to the run's quarantine and replaced by
another row of its source, chosen by seed and position too.
"""

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, get_worker_info

from data.messages.rows import Row, RowError
from data.mixture.order import Mixture
from data.mixture.quarantine import named
from data.records.reading import Record
from nexus_gen.specs.errors import UserError

log = logging.getLogger(__name__)

MAX_REPLACEMENTS = 100  # for one sample; so many in a row say that hardly any row is good
LEAST_ROWS = 1000  # a rate of bad rows says little before so many were read


class TooLong(ValueError):
    """A row of more tokens than the model is trained on; cutting it might cut a picture."""


class Quarantine:
    """The bad rows of a run, one JSON object for each in a file per rank, and the rate past which the run stops.

    The files are some that `data.quarantine` reads.
    Rows are counted once, by all ranks, their loader processes and earlier tries of the run together: every process
    reads what the others wrote before it writes. num_rows: rows of the dataset.
    """

    def __init__(self, directory: Path, rank: int, *, max_bad_fraction: float, num_rows: int) -> None:
        self._directory = directory
        self._path = directory / f"rank{rank}.jsonl"
        self._max_bad_fraction = max_bad_fraction
        self._num_rows = num_rows
        self._places: dict[Path, int] = {}  # how far each file was read
        self._bad: set[str] = set()

    def __len__(self) -> int:
        """Bad rows found so far."""
        for path in self._directory.glob("rank*.jsonl"):
            with open(path, "rb") as file:
                file.seek(self._places.get(path, 0))
                lines = [line for line in file if line.endswith(b"\n")]
            self._places[path] = self._places.get(path, 0) + sum(map(len, lines))
            self._bad.update(json.loads(line)["where"] for line in lines)
        return len(self._bad)

    def add(self, position: int, error: RowError, record: Record) -> None:
        """Set a row aside that stands at a position of the training order.

        UserError when more than max_bad_fraction of the rows are bad, out of those up to this position but at least
        LEAST_ROWS, or all where the dataset has fewer.
        """
        len(self)
        if error.where not in self._bad:
            entry = {**named(record), "kind": error.kind, "reason": error.problem, "position": position}
            self._directory.mkdir(parents=True, exist_ok=True)
            line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
            # One write at the end of the file: loader processes of a rank share it.
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
            log.warning("quarantined %s", error)
        num_bad = len(self)
        num_read = min(self._num_rows, max(position + 1, LEAST_ROWS))
        if num_bad > self._max_bad_fraction * num_read:
            raise UserError(
                f"{error} ({num_bad} bad rows of {num_read} are more than data.max_bad_fraction "
                f"{self._max_bad_fraction:g}; {self._directory} names them)"
            )


class MessageStream(Dataset[dict[str, Any]]):
    """Encoded rows of all epochs, one after the other, in the order of the mixture.

    encode: {"messages", "images"} -> inputs of the model; a UserError or ValueError of it makes the row a bad one.
    Position p of the training order is in micro-batch p // micro_batch_size, and micro-batch b goes to rank
    b % world_size. The trainer's sampler gives rank r the indices r, r + world_size, ...; `position` translates, so
    that one process that accumulates and several that do not average over the same micro-batches.
    """

    def __init__(
        self,
        mixture: Mixture,
        encode: Callable[[dict[str, Any]], dict[str, Any]],
        quarantine: Quarantine,
        *,
        num_samples: int,
        micro_batch_size: int,
        world_size: int,
    ) -> None:
        self._mixture = mixture
        self._encode = encode
        self._quarantine = quarantine
        self._num_samples = num_samples
        self._micro_batch_size = micro_batch_size
        self._world_size = world_size

    def __len__(self) -> int:
        return self._num_samples

    def position(self, index: int) -> int:
        """The place in the training order of the sampler's index."""
        step_of_rank, rank = divmod(index, self._world_size)
        micro_batch_of_rank, place = divmod(step_of_rank, self._micro_batch_size)
        return (micro_batch_of_rank * self._world_size + rank) * self._micro_batch_size + place

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample of the sampler's index; UserError when bad rows pass the configured rate."""
        if get_worker_info() is not None:
            # torchrun signals the whole process group: a loader process that dies would take the rank with it before
            # the rank has finished its step and saved. The loader ends with its rank in any case.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        position = self.position(index)
        draw = self._mixture.draw(position)
        for attempt in range(1, MAX_REPLACEMENTS + 1):
            try:
                return self._encoded(self._mixture.row(draw))
            except RowError as error:
                self._quarantine.add(position, error, self._mixture.record(draw))
                draw = self._mixture.replacement(position, attempt)
        raise UserError(f"{MAX_REPLACEMENTS} rows in a row are bad at position {position} of the training order")

    def _encoded(self, row: Row) -> dict[str, Any]:
        try:
            return self._encode({"messages": row.messages, "images": row.images})
        except TooLong as error:
            raise RowError(row.where, "length", str(error)) from error
        except (ValueError, UserError) as error:
            raise RowError(row.where, "picture", str(error)) from error
