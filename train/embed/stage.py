"""The embedding stages: message rows become webdataset shards of embeddings and latents.

A sample is stored under the address of what it follows from: pictures, words, and the recipe of the stage. What an
earlier start made under the same address is copied, so a second run embeds only what is new or stale, and a killed one
goes on where it was, on any number of processes. docs/embeddings.md tells users. Legend: B rows, N tokens of a target
image (81 as released), D embedding width.
"""

import json
import logging
import math
import os
import shutil
import signal
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.messages.rows import Row
from data.mixture.order import RowsByPlace
from data.shards.files import CONSTANTS, Listing, ShardSpec, listing_path
from data.shards.plan import Changes, EarlierSamples, PlannedSample, PlannedShard, SplitRows
from nexus_gen.artifacts.artifact import digest, write_text_atomic
from nexus_gen.artifacts.content import Contents, hash_file
from nexus_gen.artifacts.results import aside
from nexus_gen.decoders.checkpoint import load_vae
from nexus_gen.flux.text_encoders import encode_context, encode_pooled
from nexus_gen.flux.vae import FluxVae
from nexus_gen.language.checkpoint import (
    PROCESSOR_FILES,
    load_autoregressive,
    load_processor,
    load_vision_tower,
)
from nexus_gen.language.conversation import collate, encode, scaled_patches, target_size
from nexus_gen.language.generate import compiled_decoder_layer, decoder_layer, teacher_forced_pairs
from nexus_gen.language.model import IGNORE_INDEX, NexusGenForConditionalGeneration
from nexus_gen.language.packed_vision import PackedVisionTower
from nexus_gen.language.processor_files import processor_directory
from nexus_gen.parts.models import target_tokens_of, trained_details
from nexus_gen.pictures.images import channels_first, cover_crop, open_image, squash
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import NUM_REFERENCE_TOKENS, REFERENCE_GRID, RELEASED_TARGET_TOKENS
from nexus_gen.tensors.files import TensorFiles, fingerprint_tensors, save_tensors
from nexus_gen.tensors.weight_files import flux_part
from train.embed.pipeline import Prepared, ShardFiller, require_few, require_unchanged, stacked
from train.preflight.checkpoints import require_checkpoint
from train.preflight.rows import dataset_of, read_splits
from train.progress import progress_bar
from train.schemas.embed import EmbedEditingConfig, EmbedGenerationConfig, EmbedStageConfig
from train.stage import Stage
from train.steps.metrics import METRICS

log = logging.getLogger(__name__)

LENGTH_STEP = 64  # conversations are padded to multiples of it and share a batch with those of their own length only
QUARANTINE = "quarantine.jsonl"
COMPILED_FROM_ROWS = 10_000  # compiling the tower takes 11 s on an H200, and saves 0.8 ms a picture of 252 px

EmbedConfig = TypeVar("EmbedConfig", bound=EmbedStageConfig)


class EmbedStage(Stage[EmbedConfig]):
    """Shared by both: which rows, which process, latents. A subclass says what a row's embeddings are."""

    num_reference_tokens: int
    compiled = False  # whether blocks are; `run` decides

    def run(self) -> bool:
        self.start_process_group()
        signals: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
        splits, recipe = self.from_rank_zero(lambda: (read_splits(self.config), self.recipe()))
        self._rows = self.from_rank_zero(self._rows_by_place)
        size = self.config.embed.samples_per_shard
        plan = [shard for split in splits for shard in split.plan(recipe, self.config.reads_conversations, size)]
        unfinished = self.from_rank_zero(lambda: self._settle(plan))
        if self.rank == 0:
            for split in splits:
                if split.num_rehearsed < split.num_wanted:
                    log.warning(
                        "rehearsal: data.rehearsal %g asks for %d rows of this task, and there are %d",
                        self.config.data.rehearsal,
                        split.num_wanted,
                        split.num_rehearsed,
                    )
            log.info("%s", Changes.between(EarlierSamples([*self._sources(), self._partial]), plan, recipe))
        mine = [plan[number] for number in unfinished[self.rank :: self.world_size]]
        filler = ShardFiller(
            self._partial,
            self,
            EarlierSamples(self._sources()),
            recipe,
            dtype=self.config.embed.dtype,
            batch_size=self.config.embed.batch_size,
            num_workers=self.config.embed.num_workers,
            max_bad=self._max_bad(splits),
        )
        _ = self.processor  # before workers are forked, which would each read it again
        began = time.monotonic()
        num_rows = sum(len(shard.samples) for shard in mine)
        self.compiled = self.config.embed.compile == "always" or (
            self.config.embed.compile == "auto" and self.device_type == "cuda" and num_rows >= COMPILED_FROM_ROWS
        )
        with progress_bar(num_rows, self.config.stage, "row", disable=self.rank != 0) as progress:
            try:
                done = filler.fill(mine, lambda: bool(signals), progress.update)
            except UserError:
                write_text_atomic(self.run_dir / QUARANTINE, json_lines(filler.quarantined))
                raise
        if self._total(float(not done)):
            return False
        seconds = self._total(time.monotonic() - began, torch.distributed.ReduceOp.MAX)
        embedded = self._total(float(filler.embedded))
        self._write(splits, plan, recipe, {"perf/samples_per_s": embedded / seconds} if embedded else {})
        return True

    # ---- what there is to do ----

    def recipe(self) -> dict[str, Any]:
        """What a sample's tensors follow from beside its row; a name here is what users read as changed."""
        config = self.config
        checkpoint = Path(config.embed.autoregressive)
        whole = config.reads_conversations
        recipe: dict[str, Any] = {
            "stage": config.stage,
            "code": config.numerics,
            "encoder": fingerprint_tensors(TensorFiles(checkpoint), "" if whole else "visual."),
            "encoder config": hash_file(checkpoint / "config.json")[:16],
            "processor": self._processor_fingerprint(),
            "compute dtype": str(self.compute_dtype).removeprefix("torch."),
            "storage dtype": config.embed.dtype,
            "latents": config.embed.latents,
        }
        if self.num_target_tokens != RELEASED_TARGET_TOKENS:  # shards of earlier versions do not say it
            recipe["num_target_tokens"] = self.num_target_tokens
        if whole:
            recipe |= {"max_pixels": config.data.max_pixels, "consistent_edit_scale": self.consistent_edit_scale}
        if config.embed.latents:
            vae = flux_part(Path(config.model.flux), "autoencoder")
            recipe |= {"vae": fingerprint_tensors(TensorFiles(vae)), "image_size": config.model.image_size}
        return recipe

    def _processor_fingerprint(self) -> str:
        """Of how pictures become patches, and words tokens where they enter."""
        image: Any = self.processor.image_processor
        facts = [image.image_mean, image.image_std, image.rescale_factor, image.patch_size]
        if self.config.reads_conversations:
            directory = processor_directory(self.config.embed.autoregressive)
            facts += [hash_file(path) for name in PROCESSOR_FILES if (path := directory / name).is_file()]
        return digest(facts)

    @property
    def _partial(self) -> Path:
        return self.config.artifact_dir.with_name("artifact.partial")

    @property
    def _leftovers(self) -> Path:
        """Shards of unfinished tries with another plan: kept for their samples until the stage is done."""
        return self.config.artifact_dir.with_name("artifact.earlier")

    def _sources(self) -> list[Path]:
        """Where samples may be copied from."""
        artifact = [self.config.artifact_dir] if self.config.resume else []
        return artifact + sorted(self._leftovers.glob("*"))

    def _max_bad(self, splits: list[SplitRows]) -> float:
        return self.config.data.max_bad_fraction * sum(len(split.rows) for split in splits)

    def _settle(self, plan: Sequence[PlannedShard]) -> list[int]:
        """Keep what holds of an earlier start, clear away the rest; the places in the plan of the shards to be made."""
        planned = {shard.file: shard for shard in plan}
        self._partial.mkdir(parents=True, exist_ok=True)
        for path in sorted(path for path in self._partial.rglob("*") if path.is_file()):
            name = path.relative_to(self._partial).as_posix()
            shard = planned.get(name if path.suffix == ".tar" else f"{name.removesuffix('.json')}.tar")
            whole = Listing.read(path.with_suffix(".tar"))
            if path.name.startswith(".") or whole is None:
                path.unlink(missing_ok=True)
            elif path.suffix == ".tar" and (shard is None or not shard.is_held_by(whole)):
                self._set_aside(path)
        unfinished, contents = [], Contents.at(self.config.contents)
        for number, shard in enumerate(plan):
            made, before = self._partial / shard.file, self.config.artifact_dir / shard.file
            if made.is_file():
                continue
            listing = Listing.read(before) if self.config.resume else None
            if listing and shard.is_held_by(listing) and contents.sha256(before) == listing.sha256:
                for old, new in ((before, made), (listing_path(before), listing_path(made))):
                    link(old, new)
            else:
                unfinished.append(number)
        contents.save()
        return unfinished

    def _set_aside(self, shard: Path) -> None:
        """Move a shard of another plan out of the way, where its samples are found."""
        number = sum(1 for _ in self._leftovers.glob("*"))
        to = self._leftovers / f"{number:06d}" / shard.parent.name / shard.name
        to.parent.mkdir(parents=True)
        os.replace(shard, to)
        os.replace(listing_path(shard), listing_path(to))

    # ---- what becomes of it ----

    def _write(
        self,
        splits: list[SplitRows],
        plan: list[PlannedShard],
        recipe: dict[str, Any],
        metrics: dict[str, float],
    ) -> None:
        """The artifact, on rank zero; and what is logged of it."""
        known = {}
        if self.rank == 0:
            listings = {shard.file: self._listing(self._partial, shard) for shard in plan}
            known = {file: listing.sha256 for file, listing in listings.items()}
            # Those of shards that were kept count, too.
            bad = [entry for listing in listings.values() for entry in listing.quarantined]
            require_few(bad, self._max_bad(splits))

        def finish(directory: Path) -> dict[str, Any]:
            if self.config.embed.latents:
                pooled = encode_pooled(self.config.model.flux, "", torch.float32)
                constants = {"pooled": pooled.contiguous()}
                if self.config.embed.null_context:
                    context = encode_context(self.config.model.flux, "", self.compute_dtype, self.device)
                    constants["null_context"] = context.cpu().contiguous()
                save_tensors(constants, directory / CONSTANTS)
            details = self.details(directory, splits, plan, recipe)
            gap = {f"gap/{name}": value for name, value in details["gap"].items()}
            if metrics or gap:  # not the speed in the manifest: the same shards made faster are the same artifact
                line = json.dumps({"step": 0, "time": time.time(), **metrics, **gap})
                write_text_atomic(self.run_dir / METRICS, line + "\n")
            if gap:
                log.info("predicted against true embeddings: cosine %(cosine).4f, MSE %(mse).4f", details["gap"])
            for split, rows in details["rows"].items():
                rehearsal = f" + {rows['rehearsal']} of rehearsal" if "rehearsal" in rows else ""
                line = "%s: %d rows%s = %d embedded + %d quarantined"
                log.info(line, split, rows["rows"], rehearsal, rows["embedded"], rows["quarantined"])
            return details

        self.write_artifact(finish, keep_partial=True, known=known)
        if self.rank == 0:
            shutil.rmtree(self._leftovers, ignore_errors=True)

    def _listing(self, directory: Path, shard: PlannedShard) -> Listing:
        listing = Listing.read(directory / shard.file)
        assert listing is not None, f"{shard.file} is not finished"
        return listing

    def details(
        self, directory: Path, splits: list[SplitRows], plan: list[PlannedShard], recipe: dict[str, Any]
    ) -> dict[str, Any]:
        """What the manifest says: spec, recipe, shards, rows in and out, what storage loses, the gap.

        Rows that gave no sample are written beside the shards.
        """
        model = self.config.model
        side = model.image_size // model.vae.downscale
        checkpoint = require_checkpoint("embed.autoregressive", self.config.embed.autoregressive)
        spec = ShardSpec(
            num_target_tokens=self.num_target_tokens,
            num_reference_tokens=self.num_reference_tokens,
            embed_dim=(checkpoint.get("text_config") or checkpoint)["hidden_size"],  # nested by later transformers
            latent_shape=[model.vae.latent_channels, side, side] if self.config.embed.latents else [],
            dtype=self.config.embed.dtype,
            encoder=recipe["encoder"],
            predicted=self.stores_predicted,
        )
        listings = [(shard, self._listing(directory, shard)) for shard in plan]
        quarantined, rows = [], {}
        for split in splits:
            bad = list(split.unusable)
            own = [listing for shard, listing in listings if shard.split == split.split]
            bad += [
                {name: entry[name] for name in ("where", "id", "reason")}
                for listing in own
                for entry in listing.quarantined
            ]
            embedded = sum(len(listing.samples) for listing in own)
            rows[split.split] = {
                "rows": len(split.rows) + len(split.unusable) - split.num_rehearsed,
                "embedded": embedded,
                "quarantined": len(bad),
                **({"rehearsal": split.num_rehearsed} if split.num_rehearsed else {}),
            }
            assert rows[split.split]["rows"] + split.num_rehearsed == embedded + len(bad), rows
            quarantined += bad
        if quarantined:
            write_text_atomic(directory / QUARANTINE, json_lines(quarantined))
        measured = [facts["measured"] for _, listing in listings for facts in listing.samples]
        return {
            "spec": asdict(spec),
            "recipe": recipe,
            "splits": {
                split.split: [
                    {
                        "file": shard.file,
                        "samples": len(listing.samples),
                        "bytes": listing.bytes,
                        "sha256": listing.sha256,
                    }
                    for shard, listing in listings
                    if shard.split == split.split
                ]
                for split in splits
            },
            "rows": rows,
            "storage_error": {
                name: means(sample["storage"][name] for sample in measured) for name in measured[0]["storage"]
            }
            if measured
            else {},
            "gap": means(sample["gap"] for sample in measured if "gap" in sample),
        }

    # ---- models ----

    @property
    def stores_predicted(self) -> bool:
        """Whether samples hold `predicted_embeds` beside true ones."""
        return False

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device_type == "cuda" else torch.float32

    @cached_property
    def processor(self) -> Any:
        return load_processor(self.config.embed.autoregressive)

    @cached_property
    def model(self) -> NexusGenForConditionalGeneration:
        return load_autoregressive(self.config.embed.autoregressive, dtype=self.compute_dtype, device=self.device)

    @cached_property
    def tower(self) -> PackedVisionTower:
        """The checkpoint's; alone where nothing needs the language model, nearly all of a full-size checkpoint."""
        alone = not self.config.reads_conversations
        checkpoint = self.config.embed.autoregressive
        image: Any = self.processor.image_processor
        return PackedVisionTower(
            load_vision_tower(checkpoint, dtype=self.compute_dtype, device=self.device)
            if alone
            else self.model.model.visual,
            compiled=self.compiled,
            pixel_mean=image.image_mean,
            pixel_std=image.image_std,
        )

    @cached_property
    def vae(self) -> FluxVae:
        model = self.config.model
        return load_vae(model.flux, model.vae, self.compute_dtype, self.device).eval()

    def _rows_by_place(self) -> dict[str, RowsByPlace]:
        data = self.config.data
        return {split: RowsByPlace(dataset_of(data, split)) for split in data.splits}

    def read(self, sample: PlannedSample) -> tuple[Row, list[Image.Image]]:
        """A sample's row, and the pictures of it that enter; UserError when they are not those of its address."""
        row = self._rows[sample.split][sample.row.place]
        images = row.images[-len(sample.facts["pictures"]) :]
        require_unchanged(images, sample)
        return row, [open_image(image) for image in images]

    def prepare_latents(self, image: Image.Image) -> Prepared:
        """A picture that the decoders paint, at their size; nothing where no latents are stored."""
        return {"pixels": torch.from_numpy(channels_first(image))} if self.config.embed.latents else {}

    def full_batch(self, pictures: Sequence[Tensor]) -> Tensor:
        """(batch_size, 3, H, W) on the device, black behind the given ones.

        One shape for every batch: a picture's numbers then do not depend on how many others are embedded with it. On a
        CPU the VAE's latents of one picture alone differ by 6e-6 from those of the same picture in a batch.
        """
        missing = self.config.embed.batch_size - len(pictures)
        rows = stacked(pictures).to(self.device, non_blocking=True)
        return torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, missing))

    @torch.inference_mode()
    def latents(self, pictures: Sequence[Tensor]) -> Tensor:
        """(B, C, h, w) of uint8 pictures at the decoders' size."""
        pixels = self.full_batch(pictures).float() / 127.5 - 1
        return self.vae.encode(pixels.to(self.compute_dtype))[: len(pictures)]

    def vision(self, pictures: Sequence[Tensor], num_tokens: int) -> Tensor:
        """(B, num_tokens, D) of uint8 pictures that already have the size of their grid."""
        embeds = self.tower.embed_pictures(self.full_batch(pictures))[: len(pictures)]
        assert embeds.shape[1] == num_tokens, f"{embeds.shape[1]} tokens instead of {num_tokens}"
        return embeds

    def conversation(self, row: Row, images: list[Image.Image]) -> Prepared:
        pixels = self.config.data.max_pixels
        return encode(
            self.processor,
            row.messages,
            images,
            pixels,
            consistent_edit_scale=self.consistent_edit_scale,
            num_target_tokens=self.num_target_tokens,
            as_bytes=True,
        )

    @cached_property
    def num_target_tokens(self) -> int:
        """As the checkpoint has it; a plain Qwen2.5-VL embeds as the released models do."""
        return target_tokens_of(Path(self.config.embed.autoregressive)) or RELEASED_TARGET_TOKENS

    @cached_property
    def consistent_edit_scale(self) -> bool:
        """As the checkpoint was trained."""
        return bool(trained_details(Path(self.config.embed.autoregressive)).get("consistent_edit_scale", False))

    def predicted(self, rows: Sequence[Prepared]) -> tuple[Tensor, Tensor]:
        """Of each row's last target image, (B, N, D) twice: what the model predicts, and the tower's embeddings."""
        names = ("input_ids", "labels", "pixel_values", "image_grid_thw")
        encoded = [{name: row[name] for name in names} for row in rows]
        batch = collate(encoded, self.processor.tokenizer.pad_token_id, self.group(rows[0]) * LENGTH_STEP)
        batch["pixel_values"] = scaled_patches(self.processor, batch["pixel_values"].to(self.device))
        layer = compiled_decoder_layer() if self.compiled else decoder_layer
        pairs = teacher_forced_pairs(self.model, batch, self.tower, layer)
        num_targets = [int((row["labels"] != IGNORE_INDEX).sum()) // self.num_target_tokens for row in rows]
        last = [pairs[end - 1] for end in np.cumsum(num_targets)]
        return torch.stack([predicted for predicted, _ in last]), torch.stack([true for _, true in last])

    def group(self, prepared: Prepared) -> int:
        """Conversations of one padded length, which then does not depend on what else is in the batch; or all rows."""
        return -(-len(prepared.get("input_ids", ())) // LENGTH_STEP)

    @abstractmethod
    def prepare(self, sample: PlannedSample) -> Prepared: ...

    @abstractmethod
    def embed(self, rows: Sequence[Prepared]) -> dict[str, Tensor]: ...

    def _total(self, value: float, op: Any = torch.distributed.ReduceOp.SUM) -> float:
        """Over all ranks."""
        torch.distributed.all_reduce(total := torch.tensor(value, device=self.device), op)
        return float(total)


class EmbedGenerationStage(EmbedStage[EmbedGenerationConfig]):
    """Vision embeddings of the picture that a row asks for; pixels and embeddings see the same centre crop.

    With embed.predicted, also those that the language model predicts from the row's words.
    """

    num_reference_tokens = 0

    @property
    def stores_predicted(self) -> bool:
        return self.config.embed.predicted

    def prepare(self, sample: PlannedSample) -> Prepared:
        row, images = self.read(sample)
        target_image = cover_crop(images[-1], target_size(self.processor, self.num_target_tokens))
        target = {"target": torch.from_numpy(channels_first(target_image))}
        words = self.conversation(row, images) if self.config.embed.predicted else {}
        return target | words | self.prepare_latents(cover_crop(images[-1], self.config.model.image_size))

    def embed(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        outputs = {"target_embeds": self.vision([row["target"] for row in rows], self.num_target_tokens)}
        if self.config.embed.latents:
            outputs["latents"] = self.latents([row["pixels"] for row in rows])
        if self.config.embed.predicted:
            outputs["predicted_embeds"], _ = self.predicted(rows)
            outputs |= {"gap.predicted": outputs["predicted_embeds"], "gap.true": outputs["target_embeds"]}
        return outputs


class EmbedEditingStage(EmbedStage[EmbedEditingConfig]):
    """Embeddings that the model predicts for the result (teacher-forced) and 324 vision embeddings of the source.

    The published code crops the result's pixels and squashes its embeddings, which embed.pixels=crop does too.
    """

    num_reference_tokens = NUM_REFERENCE_TOKENS

    def prepare(self, sample: PlannedSample) -> Prepared:
        row, images = self.read(sample)
        side = REFERENCE_GRID * self.processor.image_processor.patch_size
        return {
            **self.conversation(row, images),
            "source": torch.from_numpy(channels_first(squash(images[-2], side))),
            **self.prepare_latents(self.square(images[-1])),
        }

    def square(self, image: Image.Image) -> Image.Image:
        """A result as the autoencoder sees it."""
        return (squash if self.config.embed.pixels == "squash" else cover_crop)(image, self.config.model.image_size)

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"pixels": self.config.embed.pixels}

    def embed(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        predicted, true = self.predicted(rows)
        outputs = {
            "target_embeds": predicted,
            "source_embeds": self.vision([row["source"] for row in rows], NUM_REFERENCE_TOKENS),
            "gap.predicted": predicted,
            "gap.true": true,
        }
        if self.config.embed.latents:
            outputs["latents"] = self.latents([row["pixels"] for row in rows])
        return outputs


def means(measured: Iterable[dict[str, float]]) -> dict[str, float]:
    """Per name, the mean over samples; exact sums, so that their order does not count."""
    rows = list(measured)
    return {name: float(f"{math.fsum(row[name] for row in rows) / len(rows):.6g}") for name in rows[0]} if rows else {}


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def link(old: Path, new: Path) -> None:
    """The same file under another name; a copy where the file system has no links."""
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(old, new)
    except OSError:
        with aside(new) as partial:
            shutil.copyfile(old, partial)
