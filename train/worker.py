"""One process of one stage: `python -m train.worker runs/<name>/<stage>/config.yaml`, started by train.torchrun."""

import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path

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
    # The first import of torchvision must find it mended, whichever library asks for it.
    from nexus_gen.compat import ensure_torchvision

    ensure_torchvision()
    from train.stage import device_type, seed_everything

    # DeepSpeed settles on a device when it is imported, and takes a GPU even where the config says cpu.
    os.environ["DS_ACCELERATOR"] = device_type(config.launch.device)
    module, name = STAGES[config.stage].split(":")
    stage = getattr(importlib.import_module(module), name)(config)
    seed_everything(config.seed)
    began = time.monotonic()
    finished = stage.run()
    if rank == 0:
        logging.getLogger(__name__).info(
            "%s %s after %.0f s", config.stage, "finished" if finished else "stopped", time.monotonic() - began
        )
    end_process_group()


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
