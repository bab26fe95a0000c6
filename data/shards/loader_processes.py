"""Loader processes that are killed, by the kernel for want of memory as a rule.

What they owed is loaded in this process then, so that the ranks finish their step together and save it.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

REAP_S = 0.5  # within which a process that is gone is known to be gone


def batches(loader: DataLoader[Any], on_death: Callable[[str], None]) -> Iterator[Any]:
    """What a loader with a batch sampler yields, to the end, whatever happens to its processes.

    on_death: called once, with the beginning of a sentence: which process was killed, and how.
    """
    before, num_taken = set(multiprocessing.active_children()), 0
    iterator = DataLoader.__iter__(loader)
    processes = [process for process in multiprocessing.active_children() if process not in before]
    if processes and threading.current_thread() is threading.main_thread():
        # torch raises wherever this process is when a child dies, in the middle of an optimizer's step too. The
        # iterator looks after its processes itself while it waits for them.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for batch in iterator:
            num_taken += 1
            yield batch
        return
    except (RuntimeError, OSError, EOFError):  # the latter two where a tensor was about to be handed over
        death = death_among(processes)
        if not death:
            raise
    for process in processes:
        process.kill()  # the dead one may hold a lock that the others wait for
    on_death(death)
    assert loader.collate_fn is not None and loader.batch_sampler is not None
    for places in islice(loader.batch_sampler, num_taken, None):
        yield loader.collate_fn([loader.dataset[place] for place in places])


def death_among(processes: Sequence[BaseProcess]) -> str:
    """Which of the processes was killed; empty where none was."""
    for process in processes:
        process.join(REAP_S / len(processes))
        if process.exitcode is not None and process.exitcode < 0:
            return f"a loader process ({process.pid}) was killed by {signal.Signals(-process.exitcode).name}"
    return ""
