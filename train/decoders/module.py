"""One training step of either decoder: noise, timestep, velocity, weighted flow-matching loss; optimizer and schedule.

Legend: B micro batch, C latent channels, h x w latent size, N target tokens, D embedding width, P width of CLIP's
pooled output.
"""

import math
from dataclasses import dataclass
from typing import Any

import deepspeed
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from nexus_gen.decoders.decoders import EditingDecoder, GenerationDecoder
from nexus_gen.flux.flow_match import (
    PUBLISHED,
    GuidedVelocityFn,
    TimestepDensity,
    VelocityFn,
    flow_match_loss,
    sample_timesteps,
    training_schedule,
)
from train.schemas.common import OptimConfig
from train.schemas.decoders import DecoderObjective
from train.steps.optimizers import build_optimizer

_GENERATOR = torch.Generator()  # a new one per sample costs more than the noise


def sample_noise(
    seed: int, epoch: int, index: int, shape: tuple[int, ...], density: TimestepDensity = PUBLISHED
) -> tuple[Tensor, Tensor, float]:
    """The timestep index, (1,) int64, the noise, (1, *shape) float32, and a uniform number of one sample in one epoch.

    They follow from (seed, epoch, index) alone, whatever the rank, the batch or what was drawn before. The number says
    whether the sample's condition is dropped.
    """
    # torch's CPU generator takes 32 bits of seed; SeedSequence hashes the three numbers into them.
    _GENERATOR.manual_seed(int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0]))
    timestep = sample_timesteps(1, _GENERATOR, density=density)
    noise = torch.randn(1, *shape, generator=_GENERATOR)
    return timestep, noise, float(torch.rand(1, generator=_GENERATOR))


@dataclass(frozen=True)
class NoiseDraws:
    """Adds to a batch on the CPU what chance decides of its samples: noise, timesteps and dropped conditions.

    A device would draw other numbers. It is for the loader's processes: a generator is seeded for every sample.
    """

    seed: int
    density: TimestepDensity
    objective: DecoderObjective

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """batch: latents (B, C, h, w), epoch and index (B,); adds noise like latents, timestep_index (B,), dropped."""
        shape = tuple(batch["latents"].shape[1:])
        timesteps, noise, draws = zip(
            *(
                sample_noise(self.seed, epoch, index, shape, self.density)
                for epoch, index in zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
            ),
            strict=True,
        )
        timestep_index = torch.cat(timesteps)
        if self.objective.timesteps == "per_batch":
            timestep_index = timestep_index[:1].repeat(len(timestep_index))
        dropped = [place for place, draw in enumerate(draws) if draw < self.objective.condition_dropout]
        return {**batch, "noise": torch.cat(noise), "timestep_index": timestep_index, "dropped": dropped}


def learning_rate_factor(step: int, warmup_steps: int, max_steps: int, schedule: str) -> float:
    """What the learning rate is multiplied by at optimizer step `step`, counted from 0.

    Linear warmup reaches 1 at step `warmup_steps - 1`; then constant, or down to 0 at `max_steps` along a line or a
    half cosine.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


class DecoderModule(pl.LightningModule):
    """Trains a decoder's transformer and conditioner together.

    decoder: built on the CPU, in the training dtype; only rank zero's weights count (see `configure_model`).
    pooled: (1, P), CLIP's embedding of the empty prompt, a constant.
    null_context: (1, L, context width), T5's embedding of the empty prompt, which takes the place of a dropped
    condition as it does in classifier-free guidance; None where nothing is dropped nor guided.
    draws: what the loader has to add to its batches.
    loss_sum: the losses of the micro batches since the last optimizer step; the engine checks and clears it.
    """

    def __init__(
        self,
        decoder: GenerationDecoder | EditingDecoder,
        pooled: Tensor,
        objective: DecoderObjective,
        optim: OptimConfig,
        seed: int,
        max_steps: int,
        gradient_checkpointing: bool,
        null_context: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.objective = objective
        self.density = TimestepDensity(objective.density, objective.shift, objective.weighting)
        self.draws = NoiseDraws(seed, self.density, objective)
        self.schedule = training_schedule()
        self.optim = optim
        self.max_steps = max_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.loss_sum: Tensor | float = 0.0
        self._pooled = pooled
        self._null_context = null_context
        self._partitioned = False

    def configure_model(self) -> None:
        """Under ZeRO-3, cut rank zero's weights into every rank's share, one parameter at a time.

        The other ranks hold memory that was never written to, so that one process reads the files and no device ever
        holds the whole model. Below stage 3 the engine hands rank zero's weights to every rank when it starts.
        """
        strategy: Any = self.trainer.strategy
        self._partitioned = strategy.zero_stage_3
        if strategy.zero_stage_3:
            deepspeed.zero.Init(module=self.decoder, config_dict_or_path=strategy.config)

    def loss_per_sample(self, batch: dict[str, Any]) -> Tensor:
        """Weighted flow-matching loss, (B,) float32.

        batch: latents (B, C, h, w), noise likewise, timestep_index (B,), target_embeds (B, N, D), for the editing
        decoder source_embeds (B, 324, D), and dropped, the places whose condition is the empty prompt instead.
        """
        latents = batch["latents"].to(self.compute_dtype)
        noise = batch["noise"].to(self.compute_dtype)
        return flow_match_loss(self.velocity(batch), latents, noise, batch["timestep_index"], self.density)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The training dtype."""
        return self.decoder.transformer.x_embedder.weight.dtype

    def velocity(self, batch: dict[str, Any]) -> VelocityFn:
        """(noisy, timestep) -> velocity under the conditions of a batch."""
        guidance = self.objective.guidance

        def velocity(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.guided_velocity(batch)(noisy, timestep, noisy.new_full((len(noisy),), guidance))

        return velocity

    def guided_velocity(self, batch: dict[str, Any]) -> GuidedVelocityFn:
        """(noisy, timestep, guidance) -> velocity under the conditions of a batch, of which some may be dropped."""
        embeds = [batch["target_embeds"].to(self.compute_dtype)]
        if "source_embeds" in batch and getattr(self.objective, "reference", True):
            embeds.append(batch["source_embeds"].to(self.compute_dtype))
        dropped: list[int] = batch.get("dropped", [])
        # The processes of ZeRO-3 gather weights together, so each has to make the passes that another may need.
        may_need_both = self._partitioned and self.training and self.objective.condition_dropout > 0
        always_both = may_need_both and len(batch["target_embeds"]) > 1

        def velocity(noisy: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
            if not dropped and not always_both:
                return self._conditional(noisy, timestep, guidance, embeds)
            kept = [place for place in range(len(noisy)) if place not in dropped]
            result = torch.zeros_like(noisy)
            if not kept and not always_both:
                result = result + 0 * self._conditioner(*embeds).sum()  # its gradients are waited for
            for places, predict in ((kept, self._conditional), (dropped, self._unconditional)):
                if not places and not always_both:
                    continue
                rows = torch.tensor(places or [0], device=noisy.device)
                part = predict(noisy[rows], timestep[rows], guidance[rows], [tensor[rows] for tensor in embeds])
                result = result.index_copy(0, rows, part) if places else result + 0 * part.sum()
            return result

        return velocity

    def _conditional(self, noisy: Tensor, timestep: Tensor, guidance: Tensor, embeds: list[Tensor]) -> Tensor:
        pooled = self._pooled = self._pooled.to(noisy)
        return self.decoder(
            noisy, timestep, guidance, pooled, *embeds, gradient_checkpointing=self.gradient_checkpointing
        )

    def _unconditional(self, noisy: Tensor, timestep: Tensor, guidance: Tensor, embeds: list[Tensor]) -> Tensor:
        return self.null_velocity(noisy, timestep, guidance)

    def null_velocity(self, noisy: Tensor, timestep: Tensor, guidance: Tensor) -> Tensor:
        """Under the empty prompt's text, as classifier-free guidance asks for it."""
        assert self._null_context is not None
        pooled = self._pooled = self._pooled.to(noisy)
        context = self._null_context = self._null_context.to(noisy)
        return self.decoder.transformer(
            noisy,
            timestep,
            context.expand(len(noisy), -1, -1),
            pooled,
            guidance,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    @property
    def _conditioner(self) -> nn.Module:
        decoder = self.decoder
        return decoder.adapter if isinstance(decoder, GenerationDecoder) else decoder.embedding_merger

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Mean loss of the micro batch; the engine averages over accumulation and ranks."""
        loss = self.loss_per_sample(batch).mean()
        self.loss_sum = self.loss_sum + loss.detach()
        return loss

    def configure_optimizers(self) -> Any:
        """The config's optimizer, and its schedule in optimizer steps."""
        optim = self.optim
        optimizer = build_optimizer(optim.name, self.decoder, optim.learning_rate, optim.betas, optim.weight_decay)
        scheduler = LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, self.optim.warmup_steps, self.max_steps, self.optim.schedule),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
