"""One process of one stage: `python -m train.worker runs/<name>/<stage>/config.yaml`, started by torchrun."""

import importlib
import logging
import os
import sys
import time

import yaml

from nexus_gen.specs.errors import UserError
from train.schemas.fields import typed
from train.schemas.stages import StageConfig

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


def load_config(path: str) -> StageConfig:
    with open(path, encoding="utf-8") as file:
        values = yaml.safe_load(file)
    return typed(values["stage"], values)


def main(argv: list[str]) -> int:
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    config = load_config(argv[0])
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
    try:
        finished = stage.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if rank == 0:
        logging.getLogger(__name__).info(
            "%s %s after %.0f s", config.stage, "finished" if finished else "stopped", time.monotonic() - began
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
