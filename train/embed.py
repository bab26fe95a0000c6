"""The embedding stages: message rows become webdataset shards of embeddings and latents.

A shard covers a fixed range of rows and belongs to one process; it is written aside and renamed, so a second start
does only what is missing, on any number of processes. Legend: B rows, D embedding width.
"""

import dataclasses
import json
import logging
import time
from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as VisionTower

from data.messages import Row
from data.mixture import read_dataset
from data.shards import Sample, ShardSpec, index_shard, write_shard
from nexus_gen.ar_checkpoint import load_autoregressive, load_processor, load_vision_tower
from nexus_gen.ar_generation import teacher_forced_embeddings, vision_embeddings
from nexus_gen.autoregressive import NexusGenForConditionalGeneration
from nexus_gen.checkpoints import load_vae
from nexus_gen.conversation import collate, encode, patches, target_size
from nexus_gen.specs.artifact import write_text_atomic
from nexus_gen.specs.geometry import NUM_REFERENCE_TOKENS, NUM_TARGET_TOKENS, REFERENCE_GRID
from nexus_gen.specs.images import cover_crop, open_image, squash, to_array
from nexus_gen.specs.models import trained_details
from nexus_gen.specs.prompts import IMAGE_TAG
from nexus_gen.vae import FluxVae
from train.metrics import METRICS
from train.schemas.fields import fingerprint_path
from train.schemas.stages import EmbedEditingConfig, EmbedGenerationConfig, EmbedStageConfig
from train.stage import Stage

log = logging.getLogger(__name__)

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A range of a split's rows and the file that they become."""

    split: str
    number: int
    rows: list[Row]

    @property
    def file(self) -> str:
        return f"{self.split}/{self.number:06d}.tar"


EmbedConfig = TypeVar("EmbedConfig", bound=EmbedStageConfig)


class EmbedStage(Stage[EmbedConfig]):
    """Shared by both: which rows, which process, latents. A subclass says what a row's embeddings are."""

    num_reference_tokens: int

    def run(self) -> bool:
        self.start_process_group()
        partial = self.config.artifact_dir.with_name("artifact.partial")
        shards = self.plan()
        mine = [shard for shard in shards[self.rank :: self.world_size] if not (partial / shard.file).is_file()]
        kept = len(shards[self.rank :: self.world_size]) - len(mine)
        if kept:
            log.info("%d finished shards kept from an earlier try", kept)
        began = time.monotonic()
        rows = sum(len(shard.rows) for shard in mine)
        with tqdm(total=rows, unit="row", desc=self.config.stage, disable=self.rank != 0) as progress:
            for shard in mine:
                (partial / shard.file).parent.mkdir(parents=True, exist_ok=True)
                write_shard(partial / shard.file, self.samples(shard, progress))
        seconds = torch.tensor(time.monotonic() - began)
        embedded = torch.tensor(float(rows))
        torch.distributed.all_reduce(embedded := embedded.to(self.device))
        torch.distributed.all_reduce(seconds := seconds.to(self.device), torch.distributed.ReduceOp.MAX)
        if self.rank == 0 and embedded:
            # Not in the manifest: the same shards made at another speed are the same artifact.
            metrics = {"step": 0, "time": time.time(), "perf/samples_per_s": float(embedded / seconds)}
            write_text_atomic(self.run_dir / METRICS, json.dumps(metrics) + "\n")
        self.write_artifact(lambda directory: self.details(directory, shards), keep_partial=True)
        return True

    def plan(self) -> list[Shard]:
        """Every shard of both splits, in order."""
        size = self.config.embed.samples_per_shard
        shards = []
        for split in SPLITS:
            of_task = [row for row in read_dataset(getattr(self.config.data, split)) if row.task == self.config.task]
            rows = [row for row in of_task if row.messages[-1]["content"].count(IMAGE_TAG) == 1]
            if len(rows) < len(of_task) and self.rank == 0:
                left_out = len(of_task) - len(rows)
                log.warning("%d %s rows left out: their last reply does not hold exactly one picture", left_out, split)
            shards += [Shard(split, first // size, rows[first : first + size]) for first in range(0, len(rows), size)]
        return shards

    def samples(self, shard: Shard, progress: tqdm) -> Iterator[Sample]:
        """Embed a shard's rows batch by batch."""
        batch_size = self.config.embed.batch_size
        for first in range(0, len(shard.rows), batch_size):
            rows = shard.rows[first : first + batch_size]
            tensors = self.embed(rows)
            for number, row in enumerate(rows):
                index = shard.number * self.config.embed.samples_per_shard + first + number
                facts = {"id": row.id, "caption": row.messages[-2]["content"], "index": index}
                sample = {name: values[number].to("cpu", self.dtype).contiguous() for name, values in tensors.items()}
                yield f"{index:09d}", sample, facts
            progress.update(len(rows))

    @abstractmethod
    def embed(self, rows: list[Row]) -> dict[str, Tensor]:
        """The tensors of a shard's samples, each (B, ...)."""

    @property
    def dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.config.embed.dtype]

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device_type == "cuda" else torch.float32

    @cached_property
    def processor(self) -> Any:
        return load_processor(self.config.embed.autoregressive)

    @property
    @abstractmethod
    def tower(self) -> VisionTower:
        """The vision tower of the checkpoint."""

    @cached_property
    def vae(self) -> FluxVae:
        model = self.config.model
        return load_vae(model.flux, model.vae, self.compute_dtype, self.device).eval()

    @torch.inference_mode()
    def latents(self, images: list[Image.Image]) -> Tensor:
        """(B, C, h, w) of pictures at the decoders' size."""
        pixels = torch.from_numpy(np.stack([to_array(image) for image in images]))
        return self.vae.encode(pixels.to(self.device, self.compute_dtype))

    def vision(self, images: list[Image.Image], num_tokens: int) -> Tensor:
        """(B, num_tokens, D) of pictures that already have the size of their grid."""
        pixel_values, grid = patches(self.processor, images)
        embeds = vision_embeddings(self.tower, pixel_values.to(self.device), grid.to(self.device))
        return embeds.view(len(images), num_tokens, -1)

    def details(self, directory: Path, shards: list[Shard]) -> dict[str, Any]:
        """What the manifest says: the spec and the shards of each split."""
        model = self.config.model
        side = model.image_size // model.vae.downscale
        embed_dim = json.loads((Path(self.config.embed.autoregressive) / "config.json").read_text())["hidden_size"]
        spec = ShardSpec(
            num_target_tokens=NUM_TARGET_TOKENS,
            num_reference_tokens=self.num_reference_tokens,
            embed_dim=embed_dim,
            latent_shape=[model.vae.latent_channels, side, side],
            dtype=self.config.embed.dtype,
            encoder=fingerprint_path(Path(self.config.embed.autoregressive)),
        )
        splits = {
            split: [
                {"file": shard.file, "samples": len(index_shard(directory / shard.file))}
                for shard in shards
                if shard.split == split
            ]
            for split in SPLITS
        }
        return {"spec": dataclasses.asdict(spec), "splits": splits}


class EmbedGenerationStage(EmbedStage[EmbedGenerationConfig]):
    """81 vision embeddings of the picture that a row asks for; pixels and embeddings see the same centre crop."""

    num_reference_tokens = 0

    @cached_property
    def tower(self) -> VisionTower:
        """Alone: the language model, nearly all of a full-size checkpoint, is not read."""
        return load_vision_tower(self.config.embed.autoregressive, dtype=self.compute_dtype, device=self.device)

    def embed(self, rows: list[Row]) -> dict[str, Tensor]:
        images = [open_image(row.images[-1]) for row in rows]
        side = target_size(self.processor)
        return {
            "target_embeds": self.vision([cover_crop(image, side) for image in images], NUM_TARGET_TOKENS),
            "latents": self.latents([cover_crop(image, self.config.model.image_size) for image in images]),
        }


class EmbedEditingStage(EmbedStage[EmbedEditingConfig]):
    """81 embeddings that the model predicts for the result (teacher-forced) and 324 vision embeddings of the source.

    The published code crops the result's pixels and squashes its embeddings, which embed.pixels=crop does too.
    """

    num_reference_tokens = NUM_REFERENCE_TOKENS

    @cached_property
    def model(self) -> NexusGenForConditionalGeneration:
        return load_autoregressive(self.config.embed.autoregressive, dtype=self.compute_dtype, device=self.device)

    @property
    def tower(self) -> VisionTower:
        return self.model.model.visual

    def embed(self, rows: list[Row]) -> dict[str, Tensor]:
        pictures = [[open_image(path) for path in row.images] for row in rows]
        consistent = trained_details(Path(self.config.embed.autoregressive)).get("consistent_edit_scale", False)
        encoded = [
            encode(self.processor, row.messages, images, self.config.data.max_pixels, consistent_edit_scale=consistent)
            for row, images in zip(rows, pictures, strict=True)
        ]
        batch = collate(encoded, self.processor.tokenizer.pad_token_id)
        predicted = teacher_forced_embeddings(
            self.model, {name: value.to(self.device) for name, value in batch.items()}
        )
        last_of_row = np.cumsum([row.num_targets for row in rows]) - 1
        side = REFERENCE_GRID * self.processor.image_processor.patch_size
        return {
            "target_embeds": torch.stack([predicted[last] for last in last_of_row]),
            "source_embeds": self.vision([squash(images[-2], side) for images in pictures], NUM_REFERENCE_TOKENS),
            "latents": self.latents([self.square(images[-1]) for images in pictures]),
        }

    def square(self, image: Image.Image) -> Image.Image:
        """A result as the autoencoder sees it."""
        return (squash if self.config.embed.pixels == "squash" else cover_crop)(image, self.config.model.image_size)
