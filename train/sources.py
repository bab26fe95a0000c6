"""The two stages before training in the tiny pipelines: the procedural dataset, and the stand-ins of the downloads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from data.mixture import read_dataset
from data.shapes import draw_rows
from nexus_gen.specs.images import StoredImage, cover_crop, open_image
from train.schemas.stages import ShapesStageConfig, StandinsStageConfig
from train.stage import Stage


class ShapesStage(Stage[ShapesStageConfig]):
    def run(self) -> bool:
        self.write_artifact(lambda directory: draw_rows(directory, self.config.shapes, self.config.seed))
        return True


class StandinsStage(Stage[StandinsStageConfig]):
    """The tokenizers learn from the dataset's words, the autoencoder and the vision tower from its pictures."""

    def run(self) -> bool:
        self.write_artifact(self.fill)
        return True

    def fill(self, directory: Path) -> dict[str, Any]:
        from train.standins import build_standins  # transformers and diffsynth: five seconds that shapes can do without

        words: list[str] = []
        scenes: dict[StoredImage, dict[str, Any]] = {}
        for row in read_dataset(self.config.data.train, self.config.data.left_out()):
            words += [text for choice in row.choices for texts in choice.values() for text in texts]
            known = (row.truth or {}).get("scenes", [{}] * len(row.images))
            scenes.update(zip(row.images, known, strict=False))
        pictures = sorted(scenes, key=str)[: self.config.standins.num_images]
        size = self.config.model.image_size
        with ThreadPoolExecutor() as pool:  # decoding does without the interpreter
            images = list(pool.map(lambda picture: cover_crop(open_image(picture), size), pictures))
        # Before the first kernel: matrices of float32 at the speed of TF32.
        torch.set_float32_matmul_precision("high")
        return build_standins(
            directory,
            self.config.model,
            self.config.standins,
            corpus=words,
            images=images,
            seed=self.config.seed,
            objects=[scenes[picture].get("objects") for picture in pictures],
            device=self.device,
        )
