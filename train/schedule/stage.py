"""The stage `schedule`: looks at the run's rows and pictures for seconds, and decides how the other stages train.

Run first by pipeline=finetune and pipeline=tiny_messages. Its artifact is one file, schedule.json. Every process of
the stage times the same passes at the same time, as training will have them compete for the machine.
Legend: P pictures, B micro batch, N target tokens, D embedding width.
"""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data.messages.rows import Row, RowError
from data.mixture.order import Mixture
from nexus_gen.artifacts.artifact import write_text_atomic
from nexus_gen.decoders.checkpoint import load_decoder, load_vae
from nexus_gen.decoders.decoders import build_editing_decoder, build_generation_decoder
from nexus_gen.flux.flow_match import flow_match_loss
from nexus_gen.flux.text_encoders import encode_pooled
from nexus_gen.language.checkpoint import load_autoregressive, load_processor
from nexus_gen.language.conversation import collate, encode, patches, target_size
from nexus_gen.language.generate import vision_embeddings
from nexus_gen.language.model import NexusGenForConditionalGeneration
from nexus_gen.language.tower_cache import TOWER_CACHE_BYTES, TowerCache
from nexus_gen.parts.models import find_decoder
from nexus_gen.pictures.images import open_image, squash
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import NUM_REFERENCE_TOKENS, REFERENCE_GRID
from train.decoders.monitor import LEVELS, UNWEIGHTED
from train.decoders.stage import DTYPES, projector_geometry
from train.preflight.rows import left_out_of, task_rows
from train.schedule.decide import EDITING, GENERATION, STAGE_START_S, DecoderFacts, Facts, decide
from train.schemas.schedule import SCHEDULE_FILE, ScheduleStageConfig
from train.stage import Stage
from train.steps.optimizers import build_optimizer

log = logging.getLogger(__name__)

TASK_OF = {GENERATION: "generation", EDITING: "editing"}
GUIDANCE = 3.5  # any value costs the same and says the same of what is new
EVALUATION_S = 60.0  # of the scores at the end of the pipeline
EMBED_OVERHEAD = 1.4  # over the models' passes: reading, writing, held-out rows and those of rehearsal
TIMED_PASSES = 3
TIMED_BATCHES = 4  # of rows: they are of several lengths


class ScheduleStage(Stage[ScheduleStageConfig]):
    def run(self) -> bool:
        """Measure, decide on rank zero, write schedule.json."""
        config = self.config
        began = time.monotonic()
        self.start_process_group()
        with torch.random.fork_rng(devices=[]):
            facts = Measuring(self).facts()
        schedule = decide(facts, config.budget_minutes)
        took = time.monotonic() - began

        def fill(directory: Path) -> dict[str, Any]:
            content = {
                "budget_minutes": config.budget_minutes,
                "values": schedule.values,
                "reasons": schedule.reasons,
                "unreached": schedule.unreached,
                "seconds": schedule.seconds,
                "facts": asdict(facts),
            }
            write_text_atomic(directory / SCHEDULE_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            return {"values": schedule.values}

        self.write_artifact(fill)
        if self.rank == 0:
            log.info("measured in %.0f s", took)
            for reason in schedule.reasons:
                log.info("%s", reason)
            for cut in schedule.unreached:
                log.warning("budget_minutes=%g: %s", config.budget_minutes, cut)
        return True


class Measuring:
    """The measurements of one process: of the pictures alike on all, of seconds the slowest process counts."""

    def __init__(self, stage: ScheduleStage) -> None:
        self.config = config = stage.config
        self.stage = stage
        self.device, self.dtype = stage.device, DTYPES[config.trainer.precision]
        data = config.data
        mixture = Mixture(data.train, config.seed, left_out_of(data, "train"), data.picture_root)
        self.num_rows = mixture.epoch_rows
        self.rows = list(readable(mixture, config.schedule.num_pictures * 4))
        self.processor = load_processor(config.model.qwen)

    def facts(self) -> Facts:
        config = self.config
        pictures = self.pictures(self.rows)
        vae = load_vae(config.model.flux, config.model.vae, self.dtype, self.device).eval()
        with torch.no_grad():
            latents, psnr = self.reconstruct(vae, pictures)
            vae_s = self.seconds(lambda: self.reconstruct(vae, pictures[:8])) / min(8, len(pictures))
        language = load_autoregressive(
            config.model.qwen,
            dtype=self.dtype,
            device=self.device,
            init_seed=config.seed,
            num_target_tokens=config.model.num_target_tokens,
        )
        side = target_size(self.processor, config.model.num_target_tokens)
        with torch.no_grad():
            embeds = self.embed(language, pictures, side)
        batch_size = config.trainer.global_batch_size
        passes = batch_size / (config.trainer.micro_batch_size * self.stage.world_size)
        pretrain_s, predict_s = self.pretrain_seconds(language, passes)
        decoders = {}
        counts = task_rows(config)
        for kind, task in TASK_OF.items():
            if counts.get(task):
                decoders[kind] = self.decoder_facts(kind, counts[task], latents, embeds, passes)
        few = pictures[:4]
        side_of = {GENERATION: side, EDITING: REFERENCE_GRID * self.processor.image_processor.patch_size}
        fixed_s = STAGE_START_S * (2 + 2 * len(decoders)) + EVALUATION_S
        for kind, decoder in decoders.items():  # whose embeddings are made first
            with torch.no_grad():
                tower_s = self.seconds(partial(self.embed, language, few, side_of[kind])) / len(few)
            fixed_s += EMBED_OVERHEAD * decoder.rows * (vae_s + predict_s + tower_s) / self.stage.world_size
        return Facts(
            rows=self.num_rows,
            batch_size=batch_size,
            step_s=pretrain_s,
            psnr=psnr,
            spread=spread(embeds),
            fixed_s=fixed_s,
            decoders=decoders,
            optimizer=config.schedule.optimizer,
        )

    def pictures(self, rows: list[Row]) -> list[Image.Image]:
        """The pictures that the rows' replies show, and where none does those that are looked at."""
        making = [row for row in rows if row.num_targets] or [row for row in rows if row.images]
        chosen = islice(shown(making), self.config.schedule.num_pictures)
        found = [images[-1 if row.num_targets else 0] for row, images in chosen]
        if not found:
            raise UserError(
                f"{self.config.data.train}: none of {len(rows)} rows looked at shows a picture that can be read; "
                "`nexus-gen data check` names what is wrong, and stage=pretrain trains on text alone"
            )
        return found

    def reconstruct(self, vae: Any, pictures: list[Image.Image]) -> tuple[Tensor, float]:
        """Latents (P, C, h, w), and the mean over the pictures of 10 log10(4 / MSE) in [-1, 1], in dB."""
        pixels = torch.stack([as_pixels(squash(picture, self.config.model.image_size)) for picture in pictures])
        pixels = pixels.to(self.device, self.dtype)
        latents = vae.encode(pixels)
        error = (vae.decode(latents).float().clamp(-1, 1) - pixels.float()).square().flatten(1).mean(1)
        return latents, float((10 * torch.log10(4 / error.clamp_min(1e-10))).mean())

    def embed(self, language: NexusGenForConditionalGeneration, pictures: list[Image.Image], side: int) -> Tensor:
        """(P, N, D): what the vision tower says of pictures squashed to squares of `side` pixels."""
        pixel_values, grid = patches(self.processor, [squash(picture, side) for picture in pictures])
        embeds = vision_embeddings(language, pixel_values.to(self.device, self.dtype), grid.to(self.device))
        return embeds.unflatten(0, (len(pictures), -1))

    def pretrain_seconds(self, language: NexusGenForConditionalGeneration, passes: float) -> tuple[float, float]:
        """Of a step of so many passes of a micro batch of rows, and of predicting one row's embeddings."""
        config = self.config
        padding = self.processor.tokenizer.pad_token_id
        rows = [
            encode(
                self.processor,
                row.messages,
                pictures,
                config.data.max_pixels,
                num_target_tokens=config.model.num_target_tokens,
            )
            for row, pictures in islice(shown(self.rows), TIMED_BATCHES * config.trainer.micro_batch_size)
        ]
        size = config.trainer.micro_batch_size
        batches = [
            {name: value.to(self.device) for name, value in collate(rows[at : at + size], padding).items()}
            for at in range(0, len(rows), size)
        ]
        for name, parameter in language.named_parameters():
            parameter.requires_grad_("visual" not in name)  # the recipe's frozen tower
        if self.device.type == "cpu":
            language.tower_cache = TowerCache(TOWER_CACHE_BYTES)

        def train() -> None:
            for batch in batches:
                language(**batch).loss.backward()

        def predict() -> None:
            with torch.no_grad():
                language(**batches[0])

        language.train()
        pass_s = self.seconds(train) / len(batches)
        optimizer_s = self.optimizer_seconds(language)
        language.eval()
        return pass_s * passes + optimizer_s, self.seconds(predict) / size

    def optimizer_seconds(self, model: nn.Module) -> float:
        """Of a step of the optimizer that trains on new pictures. Gradients have to be there; weights stay."""
        return self.seconds(build_optimizer(self.config.schedule.optimizer, model, 0.0, (0.9, 0.95), 0.0).step)

    def decoder_facts(self, kind: str, rows: int, latents: Tensor, embeds: Tensor, passes: float) -> DecoderFacts:
        """Loss on true embeddings, of the pictures measured, and the seconds of a step.

        The source that an editing decoder sees is the result itself, which is right where nothing was asked.
        """
        config = self.config
        decoder, known = self.decoder(kind, embeds.shape[-1])
        pooled = encode_pooled(config.model.flux, "", self.dtype).to(self.device)
        conditions = [embeds]
        if kind == EDITING:
            side = int(NUM_REFERENCE_TOKENS**0.5)
            conditions.append(resampled(embeds, side))

        def loss(pictures: slice, level: int) -> Tensor:
            shown = [condition[pictures] for condition in conditions]
            index = torch.full((len(latents[pictures]),), level, device=self.device)

            def velocity(noisy: Tensor, timestep: Tensor) -> Tensor:
                return decoder(noisy, timestep, noisy.new_full((len(noisy),), GUIDANCE), pooled, *shown)

            noise = torch.randn(latents[pictures].shape, generator=torch.Generator().manual_seed(level))
            return flow_match_loss(velocity, latents[pictures], noise.to(latents), index, UNWEIGHTED)

        # The best guess of the velocity without a condition is noise - mean: this is what it leaves.
        blank = float(1 + (latents - latents.mean(0)).float().square().mean())
        measured = blank
        if known is not None:
            with torch.no_grad():
                measured = float(torch.stack([loss(slice(0, 8), level).mean() for level in LEVELS]).mean())

        def train() -> None:
            loss(slice(0, config.trainer.micro_batch_size), LEVELS[3]).mean().backward()

        decoder.requires_grad_(True)
        step_s = self.seconds(train) * passes + self.optimizer_seconds(decoder)
        return DecoderFacts(rows, measured, known or 0.0, blank, step_s)

    def decoder(self, kind: str, embed_dim: int) -> tuple[nn.Module, float | None]:
        """The decoder that training begins with, and its recorded held-out loss.

        The loss is 0 where its file records none, and None for random weights.
        """
        config = self.config
        with torch.device("meta"):
            decoder: nn.Module = (
                build_generation_decoder(config.model.transformer, embed_dim)
                if kind == GENERATION
                else build_editing_decoder(config.model.transformer, projector_geometry(config.model.qwen))
            )
        given = getattr(config.schedule, kind)
        if not given:
            decoder = decoder.to_empty(device=self.device)
            for parameter in decoder.parameters():
                nn.init.normal_(parameter, std=0.02)
            return decoder.to(self.dtype), None
        found = find_decoder(Path(given), [kind], f"schedule.{kind}")
        load_decoder(decoder, found.file, self.dtype, self.device)
        return decoder, float(dict(found.details).get("metrics", {}).get("heldout/loss", 0.0))

    def seconds(self, work: Callable[[], object]) -> float:
        """Of one call after a first one: the median of a few, on the slowest process."""
        work()
        self.stage.barrier()
        times = []
        for _ in range(TIMED_PASSES):
            began = time.monotonic()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.monotonic() - began)
        slowest = torch.tensor(float(np.median(times)), device=self.device)
        torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
        return float(slowest)


def readable(mixture: Mixture, count: int) -> Iterator[Row]:
    """The first rows of the training order that can be read."""
    for position in range(min(count, len(mixture))):
        try:
            yield mixture.row(mixture.draw(position))
        except RowError:
            continue


def shown(rows: Sequence[Row]) -> Iterator[tuple[Row, list[Image.Image]]]:
    """Rows with their pictures, without the rows of which one cannot be opened: training names those."""
    for row in rows:
        with contextlib.suppress(UserError):
            yield row, [open_image(image) for image in row.images]


def as_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1


def resampled(embeds: Tensor, side: int) -> Tensor:
    """(P, N, D) of a square as (P, side x side, D), each the nearest."""
    own = int(embeds.shape[1] ** 0.5)
    grid = embeds.transpose(1, 2).unflatten(2, (own, own))
    return F.interpolate(grid, size=(side, side), mode="nearest").flatten(2).transpose(1, 2)


def spread(embeds: Tensor) -> float:
    """Mean over pairs of neighbours in the list, and over tokens, of the cosine distance; 0 where all look alike."""
    if len(embeds) < 2:
        return 0.0
    return float(1 - F.cosine_similarity(embeds.float(), embeds.roll(1, 0).float(), dim=-1).mean())
