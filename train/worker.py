"""One process of one stage: `python -m train.worker runs/<name>/<stage>/config.yaml`, started by train.torchrun.

With `--ahead DEVICE` it imports what the stage needs, before there is a config, and waits for the launcher's word.
"""

import argparse
import atexit
import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from train.runs.directory import load_config
from train.runs.failures import note_failure
from train.runs.parents import end_with_parent

# stage -> class; imported when it runs, so that a stage loads only its own engine
STAGES = {
    "shapes": "train.sources:ShapesStage",
    "standins": "train.standins.stage:StandinsStage",
    "schedule": "train.schedule.stage:ScheduleStage",
    "pretrain": "train.pretrain.stage:PretrainStage",
    "embed_generation": "train.embed.stage:EmbedGenerationStage",
    "generation_decoder": "train.decoders.stage:GenerationDecoderStage",
    "embed_editing": "train.embed.stage:EmbedEditingStage",
    "editing_decoder": "train.decoders.stage:EditingDecoderStage",
}


def run(stage_dir: Path, rank: int) -> None:
    """Run the stage whose resolved config is in its directory of a run."""
    config = load_config(stage_dir)
    stage_class = import_stage(config.stage, config.launch.device)
    from train.stage import seed_everything

    stage = stage_class(config)
    seed_everything(config.seed)
    began = time.monotonic()
    finished = stage.run()
    if rank == 0:
        logging.getLogger(__name__).info(
            "%s %s after %.0f s", config.stage, "finished" if finished else "stopped", time.monotonic() - began
        )
        if finished and config.trains:
            from train.steps.convergence import findings

            if found := findings(stage.run_dir):
                logging.getLogger(__name__).warning("%s", found)
    end_process_group()


def be_alone_with_device() -> None:
    """Have every library take this process for the only one of its machine, whose device is number 0.

    torchrun shows it one GPU. Ms-swift would count the other processes and refuse, or spread one model over GPUs that
    it counts; DeepSpeed and Lightning would look for the GPU of the process's number. Rank and world size stay.
    """
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def import_stage(stage: str, device: str) -> Any:
    """The class of a stage, for device=auto, cpu or cuda.

    Nothing that is imported becomes garbage. Searched for it while it grows and once more at the end of the process,
    a decoder's modules cost 3.3 s of a core, of 7.4 s that importing them and ending took.
    """
    gc.disable()
    # The first import of torchvision must find it mended, whichever library asks for it.
    from nexus_gen.tensors.compat import ensure_torchvision

    ensure_torchvision()
    from train.stage import device_type

    # DeepSpeed settles on a device when it is imported, and takes a GPU even where the config says cpu.
    os.environ["DS_ACCELERATOR"] = device_type(device)
    module, name = STAGES[stage].split(":")
    found = getattr(importlib.import_module(module), name)
    gc.freeze()
    gc.enable()
    return found


def end_process_group() -> None:
    """Whoever started it; NCCL complains about one that is left to the interpreter's end."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def wait_for_word() -> bool:
    """Whether the launcher says that the stage begins, and hands over its lock; False when it has ended instead.

    The word is one byte for each rank on standard input, which all of them share.
    """
    with socket.socket(fileno=sys.stdin.fileno()) as launcher:
        word, locks, _, _ = socket.recv_fds(launcher, 1, 1)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), launcher.detach())
    for lock in locks:  # open until this process ends, and in none of the loader's, which may outlive it
        os.register_at_fork(after_in_child=partial(os.close, lock))
    return bool(word)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--ahead", metavar="DEVICE")
    arguments = parser.parse_args(argv)
    end_with_parent(signal.SIGKILL)  # torchrun, when it is killed, leaves its workers to themselves
    be_alone_with_device()
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    stage_dir = arguments.config.parent
    if arguments.ahead:
        with contextlib.suppress(Exception):  # it happens again, and is told, when the stage runs
            import_stage(stage_dir.name, arguments.ahead)
        if not wait_for_word():
            end_at_once()
    try:
        run(stage_dir, rank)
    except Exception as error:
        note_failure(stage_dir / "log", rank, error)
        logging.shutdown()
        # Not sys.exit: what libraries do at exit waits for the other ranks, who wait for this one.
        os._exit(1)
    end_at_once()


def end_at_once() -> None:
    """End this process with status 0 after the exit handlers, without Python's finalization.

    Threads of native libraries may still be running then. A rank whose work was done, its artifact written, was seen
    to die of SIGABRT ("terminate called without an active exception") while the interpreter was taken down.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
