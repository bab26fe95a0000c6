"""What a decoder in training is watched by: its loss on held-out samples, and pictures that it paints from them.

Both use the same samples, noise and timesteps in every run, so they compare over runs, objectives and numbers of
processes. Legend: B pictures, N samples.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed
from PIL import Image
from torch import Tensor

from data.shards.files import ShardSpec
from data.shards.loader import ShardDataset
from nexus_gen.artifacts.artifact import Manifest
from nexus_gen.decoders.checkpoint import load_vae
from nexus_gen.flux.flow_match import NUM_TRAIN_TIMESTEPS, TimestepDensity, euler_sample, flow_match_loss
from train.decoders.module import DecoderModule, sample_noise
from train.schemas.decoders import DecoderConfig
from train.steps.average import WeightAverage
from train.steps.clock import StepClock
from train.steps.metrics import MetricsLogger

log = logging.getLogger(__name__)

SEED = 0  # of noise, in every run
NUM_LEVELS = 8  # timesteps of the held-out loss: the middles of equal parts of the schedule
LEVELS = [NUM_TRAIN_TIMESTEPS * (2 * level + 1) // (2 * NUM_LEVELS) for level in range(NUM_LEVELS)]
UNWEIGHTED = TimestepDensity(weighting="none")
MARGIN = 2  # pixels between the pictures of a grid


class DecoderMonitor(pl.Callback):
    """`heldout/loss` and sample grids every few steps and after the last one.

    Every process has to run it. average: the weights to look at, where they are not the trained ones. clock: does not
    count either among the steps.
    """

    def __init__(
        self,
        config: DecoderConfig,
        metrics: MetricsLogger,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        average: WeightAverage | None,
        clock: StepClock,
    ) -> None:
        self.average = average
        self._clock = clock
        self._config = config
        self._metrics = metrics
        self._rank, self._world_size = rank, world_size
        self._dtype = dtype
        shards = Path(config.shards)
        self._dataset = ShardDataset(shards, "heldout")
        predicted = ShardSpec.load(Manifest.load(shards)).predicted
        self._imagined = ShardDataset(shards, "heldout", predicted_fraction=1.0) if predicted else None
        self._vae: Any = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, heldout, samples = trainer.global_step, self._config.heldout, self._config.samples
        measures = min(heldout.num_samples, len(self._dataset)) and self._due(step, heldout.every_steps)
        paints = min(samples.num_pictures, len(self._dataset)) and self._due(step, samples.every_steps)
        if measures:
            with self._looking(pl_module, "heldout", step, heldout.every_steps):
                self._metrics.log(step, self.heldout_loss(pl_module))
        if paints:
            with self._looking(pl_module, "samples", step, samples.every_steps):
                self.paint(pl_module, step)

    @contextmanager
    def _looking(self, module: pl.LightningModule, kind: str, step: int, every_steps: int) -> Iterator[None]:
        """Not training: the weights to look at are in place, and the time is none of the steps'."""
        with self._clock.other(kind, step, every_steps):
            module.eval()
            with torch.no_grad(), self.average.applied() if self.average is not None else nullcontext():
                yield
            module.train()

    def _due(self, step: int, every: int) -> bool:
        return step == self._config.trainer.max_steps or (every > 0 and step % every == 0)

    def heldout_loss(self, module: DecoderModule) -> dict[str, float]:
        """Mean squared error of the velocity, unweighted: `heldout/loss`, and at each level `heldout/loss_t500`.

        `heldout/predicted_loss`: of the embeddings that the language model predicts, where shards hold true ones too.
        """
        of_level = self._loss_of_levels(module, self._dataset)
        timesteps = [round(float(module.schedule.timesteps[index])) for index in LEVELS]
        losses = {
            "heldout/loss": sum(of_level) / NUM_LEVELS,
            **{f"heldout/loss_t{timestep}": loss for timestep, loss in zip(timesteps, of_level, strict=True)},
        }
        if self._imagined is not None:
            losses["heldout/predicted_loss"] = sum(self._loss_of_levels(module, self._imagined)) / NUM_LEVELS
        return losses

    def _loss_of_levels(self, module: DecoderModule, dataset: ShardDataset) -> list[float]:
        """Processes share the samples; each makes the same number of passes, so that collectives inside them meet."""
        count = min(self._config.heldout.num_samples, len(self._dataset))
        batch_size = self._config.trainer.micro_batch_size
        sums = torch.zeros(NUM_LEVELS, dtype=torch.float64, device=module.device)
        for first in range(0, math.ceil(count / (batch_size * self._world_size))):
            start = (first * self._world_size + self._rank) * batch_size
            mine = [index for index in range(start, start + batch_size) if index < count]
            batch = self.samples(mine or [0], module.device, dataset)
            for level, index in enumerate(LEVELS):
                shape = batch["latents"].shape[1:]
                noise = torch.cat([sample_noise(SEED, level, own, shape)[1] for own in mine or [0]])
                timestep_index = torch.full((len(noise),), index, device=module.device)
                loss = flow_match_loss(
                    module.velocity(batch), batch["latents"], noise.to(batch["latents"]), timestep_index, UNWEIGHTED
                )
                if mine:
                    sums[level] += loss.sum()
        torch.distributed.all_reduce(sums)
        return (sums / count).tolist()

    def paint(self, module: DecoderModule, step: int) -> None:
        """Write samples/step_N.png: above, what the held-out latents decode to; below, what is painted.

        Every process paints the same, which keeps those together that share the model's weights.
        """
        count = min(self._config.samples.num_pictures, len(self._dataset))
        batch = self.samples(list(range(count)), module.device, self._dataset)
        noise = torch.cat([sample_noise(SEED, 0, index, batch["latents"].shape[1:])[1] for index in range(count)])
        sampling = self._config.sampling
        latents = euler_sample(
            module.guided_velocity(batch),
            noise.to(batch["latents"]),
            sampling.num_inference_steps,
            sampling.embedded_guidance,
            sampling.cfg_scale,
            module.null_velocity,
        )
        if self._rank != 0:
            return
        if self._vae is None:
            model = self._config.model
            self._vae = load_vae(model.flux, model.vae, self._dtype, module.device).eval()
        grid = picture_grid([self._vae.decode(batch["latents"]), self._vae.decode(latents)])
        path = self._config.run_dir / "samples" / f"step_{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
        self._metrics.log_picture(step, "samples", grid)

    def samples(self, indices: list[int], device: torch.device, dataset: ShardDataset) -> dict[str, Tensor]:
        """Samples stacked, in the training dtype."""
        rows = [dataset[(0, index)] for index in indices]
        return {
            name: torch.stack([row[name] for row in rows]).to(device, self._dtype)
            for name in rows[0]
            if name not in ("epoch", "index")
        }


def picture_grid(rows: list[Tensor]) -> Image.Image:
    """One picture of rows of pictures, each (B, 3, H, W) in about [-1, 1]."""
    values = torch.stack([row.float().cpu() for row in rows]).clamp(-1, 1)
    padded = torch.nn.functional.pad(values, (0, MARGIN, 0, MARGIN), value=1.0)
    pixels = ((padded + 1) * 127.5).round().to(torch.uint8).permute(0, 3, 1, 4, 2)  # row, y, picture, x, channel
    return Image.fromarray(np.ascontiguousarray(pixels.flatten(2, 3).flatten(0, 1).numpy()))
