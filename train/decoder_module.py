"""One training step of either decoder: noise, timestep, velocity, weighted flow-matching loss; optimizer and schedule.

Legend: B micro batch, C latent channels, h x w latent size, D embedding width, P width of CLIP's pooled output.
"""

import math
from typing import Any

import deepspeed
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from nexus_gen.decoders import EditingDecoder, GenerationDecoder
from nexus_gen.flow_match import flow_match_loss, sample_timesteps
from train.schemas.common import OptimConfig
from train.schemas.stages import DecoderObjective


def sample_noise(
    seed: int, epoch: int, index: int, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The timestep index, (1,) int64, and the noise, (1, *shape) float32, of one sample in one epoch.

    Both follow from (seed, epoch, index) alone, whatever the rank, the batch or what was drawn before.
    generator: a CPU generator to use; its state is overwritten. (A new one per sample costs more than the noise.)
    """
    # torch's CPU generator takes 32 bits of seed; SeedSequence hashes the three numbers into them.
    generator.manual_seed(int(np.random.SeedSequence((seed, epoch, index)).generate_state(1)[0]))
    return sample_timesteps(1, generator), torch.randn(1, *shape, generator=generator)


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
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.objective = objective
        self.optim = optim
        self.seed = seed
        self.max_steps = max_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.loss_sum: Tensor | float = 0.0
        self._pooled = pooled
        self._generator = torch.Generator()

    def configure_model(self) -> None:
        """Under ZeRO-3, cut rank zero's weights into every rank's share, one parameter at a time.

        The other ranks hold memory that was never written to, so that one process reads the files and no device ever
        holds the whole model. Below stage 3 the engine hands rank zero's weights to every rank when it starts.
        """
        strategy: Any = self.trainer.strategy
        if strategy.zero_stage_3:
            deepspeed.zero.Init(module=self.decoder, config_dict_or_path=strategy.config)

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Draw noise and timesteps while the batch is on the CPU: a device's generator draws other numbers."""
        shape = tuple(batch["latents"].shape[1:])
        timesteps, noise = zip(
            *(
                sample_noise(self.seed, epoch, index, shape, self._generator)
                for epoch, index in zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
            ),
            strict=True,
        )
        timestep_index = torch.cat(timesteps)
        if self.objective.timesteps == "per_batch":
            timestep_index = timestep_index[:1].expand(len(timestep_index))
        return {**batch, "noise": torch.cat(noise), "timestep_index": timestep_index}

    def loss_per_sample(self, batch: dict[str, Tensor]) -> Tensor:
        """Weighted flow-matching loss, (B,) float32.

        batch: latents (B, C, h, w), noise likewise, timestep_index (B,), target_embeds (B, 81, D) and, for the editing
        decoder, source_embeds (B, 324, D).
        """
        dtype = self.decoder.transformer.x_embedder.weight.dtype
        latents = batch["latents"].to(dtype)
        guidance = latents.new_full((len(latents),), self.objective.guidance)
        pooled = self._pooled = self._pooled.to(latents)
        source_embeds = batch.get("source_embeds")

        def velocity(noisy: Tensor, timestep: Tensor) -> Tensor:
            return self.decoder(
                noisy,
                timestep,
                guidance,
                pooled,
                batch["target_embeds"].to(dtype),
                None if source_embeds is None else source_embeds.to(dtype),
                gradient_checkpointing=self.gradient_checkpointing,
            )

        return flow_match_loss(velocity, latents, batch["noise"].to(dtype), batch["timestep_index"])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the micro batch; the engine averages over accumulation and ranks."""
        loss = self.loss_per_sample(batch).mean()
        self.loss_sum = self.loss_sum + loss.detach()
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW over every parameter, and its schedule in optimizer steps."""
        optimizer = AdamW(
            self.decoder.parameters(),
            lr=self.optim.learning_rate,
            betas=(self.optim.betas[0], self.optim.betas[1]),
            weight_decay=self.optim.weight_decay,
            fused=True,
        )
        scheduler = LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, self.optim.warmup_steps, self.max_steps, self.optim.schedule),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
