"""Rows to shards, in three places at once: workers decode pictures, the device embeds them, threads write behind it.

What a shard holds follows from its plan alone: its batches are cut from its own rows in their order, whichever process
embeds it and whatever came before. Legend: B rows of a batch.
"""

import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.mixture.pictures import UNREADABLE, hash_picture
from data.shards.files import Sample, checksum, save_samples, write_shard
from data.shards.plan import EarlierSamples, PlannedSample, PlannedShard
from data.shards.quantize import dequantize, embedding_gap, quantize, rounded, storage_error
from nexus_gen.pictures.images import StoredImage
from nexus_gen.specs.errors import UserError

BATCHES_BEHIND = 4  # embedded batches that may wait for their copy to the CPU: they hold device memory
SHARDS_BEHIND = 1  # embedded shards that may wait for the disk: they hold CPU memory
# Writing asks for the interpreter's lock several times a sample, and each time a busy thread may keep it for the
# interval: beside one, on two cores, 150 samples/s are written with Python's 5 ms and 510 with 0.1 ms.
SWITCH_INTERVAL_S = 1e-4
MEASURED = "measured/"  # before the name of what is measured of samples; "/" between the levels of its place
FINITE = "finite"
EMBEDS = "_embeds"  # tensors of this ending are stored in the configured dtype, others as floats

Prepared = dict[str, Tensor]  # a row ready for the device


class Embedder(Protocol):
    """What an embedding stage says of its rows. group: rows of one group share a batch."""

    def prepare(self, sample: PlannedSample) -> Prepared:
        """Decode and resize, on a worker. UserError or ValueError when the row's pictures do not allow it."""
        ...

    def group(self, prepared: Prepared) -> int: ...

    def embed(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """(B, ...) per name, on the device.

        `gap.predicted` and `gap.true`, where they are returned, are compared and not stored.
        """
        ...


@dataclass
class Work:
    """A shard in the making. todo: what no earlier start embedded, each address once."""

    shard: PlannedShard
    todo: list[PlannedSample]
    done: dict[str, tuple[bytes, dict[str, Any]]] = field(default_factory=dict)  # address -> safetensors, facts
    reasons: dict[str, str] = field(default_factory=dict)  # address -> why its rows are set aside

    @staticmethod
    def plan(shard: PlannedShard, earlier: EarlierSamples) -> "Work":
        """Reads what is to be copied: a damaged sample is embedded again."""
        distinct = {sample.address: sample for sample in reversed(shard.samples)}
        todo = [sample for sample in distinct.values() if earlier.read(sample.address) is None]
        return Work(shard, todo[::-1])


@dataclass
class Chunk:
    """Rows as one tensor for each name and dtype, so that few cross from a worker: each costs the rank a handshake.

    places: per row, name -> which tensor, and where in it: first element and shape. reasons: place -> why a row is bad.
    """

    tensors: list[Tensor]
    places: list[dict[str, tuple[int, int, torch.Size]]]
    reasons: dict[int, str]

    @staticmethod
    def pack(rows: Sequence[Prepared], reasons: dict[int, str]) -> "Chunk":
        pieces: dict[tuple[str, torch.dtype], list[Tensor]] = {}
        ends: Counter[tuple[str, torch.dtype]] = Counter()
        places = []
        for row in rows:
            place = {}
            for name, tensor in row.items():
                kind = name, tensor.dtype
                pieces.setdefault(kind, []).append(tensor.flatten())
                place[name] = list(pieces).index(kind), ends[kind], tensor.shape
                ends[kind] += tensor.numel()
            places.append(place)
        return Chunk([torch.cat(of_kind) for of_kind in pieces.values()], places, reasons)

    def rows(self) -> list[Prepared]:
        """The rows as they were, in the memory of the chunk."""
        return [
            {
                name: self.tensors[number][first : first + shape.numel()].view(shape)
                for name, (number, first, shape) in place.items()
            }
            for place in self.places
        ]

    def pin_memory(self) -> "Chunk":
        return Chunk([tensor.pin_memory() for tensor in self.tensors], self.places, self.reasons)


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """(B, ...) of tensors of one shape, which are not copied where they follow each other in a chunk."""
    first, size = rows[0], rows[0].numel()
    start, memory = first.storage_offset(), first.untyped_storage().data_ptr()
    if all(
        row.untyped_storage().data_ptr() == memory and row.storage_offset() == start + number * size
        for number, row in enumerate(rows)
    ):
        return first.as_strided((len(rows), *first.shape), (size, *first.stride()))
    return torch.stack(list(rows))


class Chunks(Dataset[Chunk]):
    """Rows in pieces of at most one batch: what `prepare` makes of them, and why it cannot."""

    def __init__(self, chunks: Sequence[Sequence[PlannedSample]], embedder: Embedder) -> None:
        self._chunks, self._embedder = chunks, embedder

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> Chunk:
        if get_worker_info() is not None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the rank, which stops its workers itself
        ready: list[Prepared] = []
        reasons: dict[int, str] = {}
        for place, sample in enumerate(self._chunks[number]):
            try:
                ready.append(self._embedder.prepare(sample))
            except (UserError, ValueError) as error:
                reasons[place] = str(error)
        return Chunk.pack(ready, reasons)


def require_unchanged(images: Sequence[StoredImage], sample: PlannedSample) -> None:
    """UserError when a picture no longer holds what its sample's address says."""
    for image, planned in zip(images, sample.facts["pictures"], strict=True):
        if planned != UNREADABLE and hash_picture(image) != planned:
            raise UserError(f"picture {image} changed while its stage was running; run the stage again")


def to_host(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Start copying behind the work that is queued on the device; the result waits for the copies and returns them.

    Called on another thread, it leaves this one free to queue the next batch.
    """
    if all(tensor.device.type != "cuda" for tensor in tensors.values()):
        return lambda: tensors
    copies = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> dict[str, Tensor]:
        copied.synchronize()
        return copies

    return wait


def require_few(quarantined: Sequence[dict[str, Any]], max_bad: float) -> None:
    """UserError when more rows are set aside than may be."""
    if len(quarantined) > max_bad:
        last = quarantined[-1]
        raise UserError(
            f"{len(quarantined)} rows could not be embedded, more than the {max_bad:.4g} that data.max_bad_fraction "
            f"allows; the last is {last['where']}: {last['reason']}"
        )


@contextmanager
def quick_switches() -> Iterator[None]:
    """Let the threads of this process take turns every SWITCH_INTERVAL_S."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class ShardFiller:
    """Embeds and writes shards into a directory.

    recipe: recorded in each listing. dtype: storage of embeddings, one of EMBED_DTYPES. max_bad: rows that may be set
    aside before UserError. embedded, quarantined: counted as they happen.
    """

    def __init__(
        self,
        directory: Path,
        embedder: Embedder,
        earlier: EarlierSamples,
        recipe: dict[str, Any],
        *,
        dtype: str,
        batch_size: int,
        num_workers: int,
        max_bad: float,
    ) -> None:
        self._directory, self._embedder, self._earlier, self._recipe = directory, embedder, earlier, recipe
        self._dtype, self._batch_size, self._num_workers = dtype, batch_size, num_workers
        self._max_bad = max_bad
        self.embedded = 0
        self.quarantined: list[dict[str, Any]] = []

    def fill(self, shards: Sequence[PlannedShard], stopping: Callable[[], bool], report: Callable[[int], None]) -> bool:
        """Write the shards; False when `stopping` said so before the end. report: rows done since it was last called.

        Raises UserError when more rows than max_bad have to be set aside.
        """
        works = [Work.plan(shard, self._earlier) for shard in shards]
        size = self._batch_size
        pieces = [
            (work, work.todo[first : first + size]) for work in works for first in range(0, len(work.todo) or 1, size)
        ]
        prepared = DataLoader(
            Chunks([chunk for _, chunk in pieces], self._embedder),
            batch_size=None,
            collate_fn=lambda chunk: chunk,
            num_workers=self._num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        packing: deque[Future[None]] = deque()
        writing: deque[Future[Any]] = deque()
        groups: dict[int, list[tuple[PlannedSample, Prepared]]] = {}
        with quick_switches(), ThreadPoolExecutor(1) as packer, ThreadPoolExecutor(1) as writer:

            def launch(work: Work, samples: Sequence[PlannedSample], rows: Sequence[Prepared]) -> None:
                while len(packing) >= BATCHES_BEHIND:
                    packing.popleft().result()
                stored = to_host(self._stored(self._embedder.embed(rows)))
                packing.append(packer.submit(self._pack, work, samples, stored))
                self.embedded += len(samples)

            def launch_groups(work: Work, at_least: int) -> None:
                for group in [group for group, rows in groups.items() if len(rows) >= at_least]:
                    samples, rows = zip(*groups.pop(group), strict=True)
                    launch(work, samples, rows)

            for number, ((work, chunk), made) in enumerate(zip(pieces, prepared, strict=True)):
                if stopping():
                    return False
                self._set_aside(work, chunk, made.reasons)
                good = [sample for place, sample in enumerate(chunk) if place not in made.reasons]
                for sample, row in zip(good, made.rows(), strict=True):
                    group = self._embedder.group(row)
                    groups.setdefault(group, []).append((sample, row))
                    launch_groups(work, self._batch_size)
                report(len(chunk))
                if number + 1 == len(pieces) or pieces[number + 1][0] is not work:
                    launch_groups(work, 1)
                    while packing:
                        packing.popleft().result()
                    while len(writing) > SHARDS_BEHIND:
                        writing.popleft().result()
                    writing.append(writer.submit(self._write, work))
            for future in writing:
                future.result()
        return True

    def _set_aside(self, work: Work, chunk: Sequence[PlannedSample], reasons: dict[int, str]) -> None:
        work.reasons |= {chunk[place].address: reason for place, reason in reasons.items()}
        bad = [sample for sample in work.shard.samples if sample.address in {chunk[place].address for place in reasons}]
        self.quarantined += [{"where": s.row.where, "id": s.row.id, "reason": work.reasons[s.address]} for s in bad]
        require_few(self.quarantined, self._max_bad)

    @torch.inference_mode()
    def _stored(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is stored of a batch and what is measured of it, each (B, ...), on the device.

        There, because the measuring of one picture takes a core 6 ms and the embedding of it takes a GPU 1 ms.
        """
        outputs = dict(outputs)
        found: dict[str, Tensor] = {}
        if "gap.true" in outputs:
            gap = embedding_gap(outputs.pop("gap.predicted"), outputs.pop("gap.true"))
            found |= {f"{MEASURED}gap/{name}": values for name, values in gap.items()}
        finite = []
        for name, values in outputs.items():
            if name.endswith(EMBEDS):
                packed = quantize(name, values, self._dtype)
                error = storage_error(values, dequantize(packed)[name])
                found |= {f"{MEASURED}storage/{name}/{measure}": values for measure, values in error.items()}
            else:
                packed = {name: values.to(torch.float32 if self._dtype == "float32" else torch.bfloat16)}
            found |= packed
            finite += [tensor.float().isfinite().flatten(1).all(1) for tensor in packed.values()]
        return {**found, FINITE: torch.stack(finite).all(0)}

    def _pack(self, work: Work, samples: Sequence[PlannedSample], on_host: Callable[[], dict[str, Tensor]]) -> None:
        """Bring each sample of a batch into the form that is stored."""
        tensors = on_host()
        finite = tensors.pop(FINITE).tolist()
        measures = {name: tensors.pop(name).tolist() for name in list(tensors) if name.startswith(MEASURED)}
        saved = save_samples({name: values[: len(samples)].contiguous() for name, values in tensors.items()})
        for number, sample in enumerate(samples):
            if not finite[number]:
                work.reasons[sample.address] = "its embeddings are not finite"
            measured: dict[str, Any] = {"storage": {}}
            for name, values in measures.items():
                *path, measure = name.removeprefix(MEASURED).split("/")
                place = measured
                for step in path:
                    place = place.setdefault(step, {})
                place[measure] = rounded(values[number])
            facts = {"measured": measured, "checksum": checksum(saved[number])}
            work.done[sample.address] = (saved[number], facts)

    def _write(self, work: Work) -> None:
        quarantined = [
            {"where": s.row.where, "reason": work.reasons[s.address], **s.facts}
            for s in work.shard.samples
            if s.address in work.reasons
        ]
        path = self._directory / work.shard.file
        write_shard(path, self._samples(work), self._recipe, quarantined)
        work.done.clear()

    def _samples(self, work: Work) -> Iterator[Sample]:
        for sample in work.shard.samples:
            if sample.address in work.reasons:
                continue
            if sample.address in work.done:
                data, facts = work.done[sample.address]
            else:
                copied = self._earlier.read(sample.address)
                if copied is None:
                    raise UserError(f"sample {sample.key} was damaged while it was copied; run the stage again")
                data, facts = copied
            yield sample.key, data, {**sample.facts, "measured": facts["measured"], "checksum": facts["checksum"]}
