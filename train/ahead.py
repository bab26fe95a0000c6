"""Work that goes on beside the GPU: preparing batches in worker processes ahead of it, writing results behind it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nexus_gen.compat import ensure_torchvision

Item = TypeVar("Item")
BATCHES_AHEAD = 4  # per worker: pictures of one size take as long as each other, so a short queue is enough


class _Prepared(Dataset[Any]):
    """`prepare(item)` of every item; pickled into the workers."""

    def __init__(self, items: Sequence[Any], prepare: Callable[[Any], Any]) -> None:
        self.items = items
        self.prepare = prepare

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.prepare(self.items[index])


def _start_worker(_: int) -> None:
    """A worker prepares on one thread: there is one worker per core, and their threads would fight for them."""
    torch.set_num_threads(1)
    ensure_torchvision()


def prepared(
    items: Sequence[Item], prepare: Callable[[Item], Any], *, num_workers: int, pin_memory: bool = False
) -> Iterator[Any]:
    """`prepare(item)` of every item in order, computed by `num_workers` processes ahead of the caller; 0: in this one.

    prepare: a picklable function (or partial of one); tensors that it returns come through shared memory. pin_memory:
    put them where copies to a GPU run beside its work. An exception in a worker is raised here.
    """
    loader = DataLoader(
        _Prepared(items, prepare),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=BATCHES_AHEAD if num_workers else None,
        pin_memory=pin_memory,
        # Not a fork of this process, which holds a GPU and threads; a server that has imported the libraries once.
        multiprocessing_context="forkserver" if num_workers else None,
        worker_init_fn=_start_worker,
    )
    yield from loader


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Start copying to the host behind the work that is queued now; the result waits for the copy and returns it.

    Called on another thread it leaves this one free to queue the next batch.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Tensor:
        copied.synchronize()
        return host

    return wait


@contextmanager
def behind(depth: int = 4) -> Iterator[Callable[..., None]]:
    """Yields `submit(function, *arguments)`: calls run in order on one thread, at most `depth` of them waiting.

    An exception is raised at a later submit or at the end, after which nothing more is run.
    """
    waiting: list[Future[Any]] = []
    with ThreadPoolExecutor(1) as pool:

        def submit(function: Callable[..., Any], *arguments: Any) -> None:
            while len(waiting) >= depth:
                waiting.pop(0).result()
            waiting.append(pool.submit(function, *arguments))

        try:
            yield submit
            for future in waiting:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
