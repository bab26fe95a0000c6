"""torchrun for one stage: `python -m train.torchrun [torchrun's options] -m train.worker CONFIG`.

As torch.distributed.run, but it tells why a stage failed once, without a traceback of its own, and it does not outlive
the command that started it.
"""

import logging
import signal
import sys
from pathlib import Path

from train.runs.failures import STOPPED, first_failure
from train.runs.parents import end_with_parent

# They tell of every rank that died after the first; the others stay, such as those of the rendezvous.
NOISY = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


def main(argv: list[str]) -> int:
    # Before torch, whose import takes seconds. SIGTERM lets the workers write a checkpoint.
    end_with_parent(signal.SIGTERM)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.main([word.replace("$", "$$") for word in argv])  # it replaces ${local_rank}, and $$ by $
    except SignalException:
        return STOPPED
    except ChildFailedError as error:
        rank, first = error.get_first_failure()
        if first.exitcode == -signal.SIGTERM:  # before it had a checkpoint to write
            return STOPPED
        if first.exitcode < 0:
            name = signal.Signals(-first.exitcode).name
            hint = "; out of memory, perhaps (dmesg tells)" if name == "SIGKILL" else ""
            print(f"error: rank {rank} was killed by {name}{hint}", file=sys.stderr)
            return 1
        failure = first_failure(Path(argv[-1]).parent / "log")
        print(failure or f"error: rank {rank} ended with status {first.exitcode}", file=sys.stderr)
        return failure.status if failure else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
