"""One process of one stage: `python -m train.worker runs/<name>/<stage>/config.yaml`, started by train.torchrun."""

import gc
import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from train.schemas.failures import note_failure
from train.schemas.run_directory import load_config
from train.torchrun import end_with_parent

# stage -> class; imported when it runs, so that a stage loads only its own engine
STAGES = {
    "shapes": "train.sources:ShapesStage",
    "standins": "train.sources:StandinsStage",
    "pretrain": "train.pretrain:PretrainStage",
    "embed_generation": "train.embed:EmbedGenerationStage",
    "embed_editing": "train.embed:EmbedEditingStage",
    "generation_decoder": "train.decoder_stages:GenerationDecoderStage",
    "editing_decoder": "train.decoder_stages:EditingDecoderStage",
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
    end_process_group()


def import_stage(stage: str, device: str) -> Any:
    """The class of a stage, for device=auto, cpu or cuda.

    Nothing that is imported becomes garbage. Searched for it while it grows and once more at the end of the process,
    a decoder's modules cost 3.3 s of a core, of 7.4 s that importing them and ending took.
    """
    gc.disable()
    # The first import of torchvision must find it mended, whichever library asks for it.
    from nexus_gen.compat import ensure_torchvision

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


def main(argv: list[str]) -> None:
    end_with_parent(signal.SIGKILL)  # torchrun, when it is killed, leaves its workers to themselves
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    stage_dir = Path(argv[0]).parent
    try:
        run(stage_dir, rank)
    except Exception as error:
        note_failure(stage_dir / "log", rank, error)
        logging.shutdown()
        # Not sys.exit: what libraries do at exit waits for the other ranks, who wait for this one.
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
