"""`train.worker` that writes down what a training stage begins with: `python telling_worker.py DIRECTORY CONFIG`.

weights.safetensors: the weights as loaded, before a step. average.safetensors: their average, where one is kept.
samples.jsonl: the samples of each micro batch in order, by their place in the training order or in the shards.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from train import worker


def tell(directory: Path, stage: str) -> None:
    """Have our own callbacks and loaders write, and do as ever."""

    def write(tensors: dict[str, Any], name: str) -> None:
        save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, directory / name)

    def write_samples(samples: Sequence[int]) -> None:
        with open(directory / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(list(samples)) + "\n")

    if stage == "pretrain":
        from train.pretrain import stage as pretrain

        class Averaging(pretrain.Averaging):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                super().on_train_begin(*args, **kwargs)
                write(self._average.gather(), "average.safetensors")

        class NewPlan(pretrain.NewPlan):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                super().on_train_begin(*args, **kwargs)
                write(dict(kwargs["model"].named_parameters()), "weights.safetensors")

        class Stream(pretrain.MessageStream):
            def __getitem__(self, index: int) -> dict[str, Any]:
                if self._quarantine._directory.name != "heldout":
                    write_samples([self.position(index)])
                return super().__getitem__(index)

        pretrain.Averaging, pretrain.NewPlan, pretrain.MessageStream = Averaging, NewPlan, Stream  # type: ignore[misc]
    else:
        from train.decoders import engine
        from train.decoders import stage as decoder_stages

        class DecoderAveraging(engine.Averaging):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                super().on_train_start(trainer, pl_module)
                write(self._average.gather(), "average.safetensors")

        class DecoderPlan(engine.NewPlan):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                super().on_train_start(trainer, pl_module)
                write(dict(pl_module.decoder.named_parameters()), "weights.safetensors")

        class Module(decoder_stages.DecoderModule):
            def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
                write_samples(batch["index"].tolist())
                return super().training_step(batch, batch_idx)

        engine.Averaging, engine.NewPlan = DecoderAveraging, DecoderPlan  # type: ignore[misc]
        decoder_stages.DecoderModule = Module  # type: ignore[misc]


if __name__ == "__main__":
    directory, config = map(Path, sys.argv[1:])
    worker.import_stage(config.parent.name, "cpu")
    tell(directory, config.parent.name)
    worker.main([str(config)])
