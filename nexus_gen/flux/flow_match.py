"""Flow matching on FLUX's schedule: noise, targets, losses, and Euler sampling.

x_t = (1 - sigma) x0 + sigma noise, so the velocity dx/dsigma is noise - x0. Source: rectified flow, Liu et al. 2022.
Legend: B batch, C latent channels, h x w latent size. A timestep is 1000 x sigma; an index counts from the noisy end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nexus_gen.tensors.compat import ensure_torchvision

ensure_torchvision()

from diffsynth.diffusion.flow_match import FlowMatchScheduler  # noqa: E402

NUM_TRAIN_TIMESTEPS = 1000
TRAIN_SHIFT = 3.0
LEAST_SIGMA = 0.003 / 1.002  # before the shift
VelocityFn = Callable[[Tensor, Tensor], Tensor]  # latents (B, C, h, w), timestep (B,) -> velocity (B, C, h, w)
GuidedVelocityFn = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same with guidance (B,)


@dataclass(frozen=True)
class Schedule:
    """FLUX's noise levels from pure noise down, each (N,) float32: sigmas in (0, 1], timesteps, loss weights.

    The weights of the 1000 training steps have mean 1 and are 0 at the noisy end.
    """

    sigmas: Tensor
    timesteps: Tensor
    weights: Tensor

    def at(self, index: Tensor) -> "Schedule":
        """The entries at `index` (B,), on its device."""
        return Schedule(*(table.to(index.device)[index] for table in (self.sigmas, self.timesteps, self.weights)))


@cache
def training_schedule() -> Schedule:
    """The 1000 training steps: sigma from 1 to 0.003 / 1.002, shifted by 3."""
    scheduler = FlowMatchScheduler("FLUX.1")
    scheduler.set_timesteps(NUM_TRAIN_TIMESTEPS, training=True)
    return Schedule(scheduler.sigmas, scheduler.timesteps, scheduler.linear_timesteps_weights)


def sampling_sigmas(num_steps: int) -> Tensor:
    """The noise levels of an Euler run: (num_steps + 1,) float32, from 1 to the data's 0."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 is needed")
    scheduler = FlowMatchScheduler("FLUX.1")
    scheduler.set_timesteps(num_steps)
    return torch.cat([scheduler.sigmas, torch.zeros(1)])


@dataclass(frozen=True)
class TimestepDensity:
    """How noise levels are drawn and weighed in training; the defaults are as published.

    kind: uniform, or logit_normal (mean 0, std 1: the middle more often; Esser et al. 2024) before the shift.
    shift: s of sigma -> s sigma / (1 + (s - 1) sigma); more pixels want more, 1 is none. The levels stay those of the
    training schedule: the nearest is taken.
    weighting: published (largest in the middle, 0 at the noisy end) or none. Weights have mean 1 under the density.
    """

    kind: str = "uniform"
    shift: float = TRAIN_SHIFT
    weighting: str = "published"

    @property
    def is_published(self) -> bool:
        return self.kind == "uniform" and self.shift == TRAIN_SHIFT

    def index(self, quantile: Tensor) -> Tensor:
        """The schedule's index at quantiles in (0, 1), counted from clean to noisy: int64 of the same shape."""
        level = quantile.double()
        if self.kind == "logit_normal":
            level = torch.special.ndtri(level).sigmoid()
        sigma = self.shift * level / (1 + (self.shift - 1) * level)
        unshifted = sigma / (TRAIN_SHIFT - (TRAIN_SHIFT - 1) * sigma)  # the schedule is linear before its own shift
        return ((1 - unshifted) / (1 - LEAST_SIGMA) * (NUM_TRAIN_TIMESTEPS - 1)).round().long().clamp(0, 999)

    def weights(self, index: Tensor) -> Tensor:
        """Loss weights of drawn indices (B,): float32 on their device."""
        if self.weighting == "none":
            return torch.ones_like(index, dtype=torch.float32)
        weights = training_schedule().at(index).weights
        return weights if self.is_published else weights / _mean_weight(self)


@cache
def _mean_weight(density: TimestepDensity) -> float:
    quantiles = (torch.arange(100_000) + 0.5) / 100_000
    return float(training_schedule().at(density.index(quantiles)).weights.mean())


PUBLISHED = TimestepDensity()


def sample_timesteps(
    batch_size: int,
    generator: torch.Generator | None = None,
    density: TimestepDensity = PUBLISHED,
) -> Tensor:
    """Indices into the training schedule: (B,) int64 on the generator's device, else the CPU."""
    device = "cpu" if generator is None else generator.device
    if density.is_published:
        return torch.randint(NUM_TRAIN_TIMESTEPS, (batch_size,), generator=generator, device=device)
    return density.index(torch.rand(batch_size, generator=generator, device=device, dtype=torch.float64))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Interpolate data towards noise: (1 - sigma) x0 + sigma noise, computed in float32, in x0's dtype.

    x0, noise: (B, C, h, w). sigma: (B,) in [0, 1]; 1 is pure noise. Raises ValueError when sigma is not (B,).
    """
    if sigma.shape != x0.shape[:1]:
        raise ValueError(f"sigma has shape {tuple(sigma.shape)} where a batch of {len(x0)} needs ({len(x0)},)")
    sigma = sigma.to(x0.device, torch.float32).view(-1, 1, 1, 1)
    return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the transformer learns to predict: noise - x0."""
    return noise - x0


def flow_match_loss(
    velocity_fn: VelocityFn, x0: Tensor, noise: Tensor, index: Tensor, density: TimestepDensity = PUBLISHED
) -> Tensor:
    """Weighted squared error of the predicted velocity per sample: (B,) float32.

    x0, noise: (B, C, h, w) latents in the model's dtype. index: (B,) from `sample_timesteps`, drawn from `density`.
    """
    steps = training_schedule().at(index.to(x0.device))
    velocity = velocity_fn(add_noise(x0, noise, steps.sigmas), steps.timesteps)
    error = velocity.float() - velocity_target(x0, noise).float()
    return density.weights(index.to(x0.device)) * error.square().flatten(1).mean(dim=1)


@torch.no_grad()
def euler_sample(
    velocity_fn: GuidedVelocityFn,
    noise: Tensor,
    num_steps: int,
    embedded_guidance: float = 3.5,
    cfg_scale: float = 1.0,
    negative_fn: GuidedVelocityFn | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Integrate from noise (B, C, h, w) to latents of the same shape and dtype.

    embedded_guidance: the guidance that the transformer takes as an input.
    cfg_scale: classifier-free guidance, negative + cfg_scale * (velocity - negative); 1 takes one forward per step.
    negative_fn: the velocity under the negative prompt; needed unless cfg_scale is 1, else ValueError.
    progress: called with (steps done, num_steps); what it raises ends the work.
    """
    if cfg_scale != 1.0 and negative_fn is None:
        raise ValueError(f"cfg_scale {cfg_scale} needs negative_fn, the velocity under the negative prompt")
    sigmas = sampling_sigmas(num_steps)
    guidance = torch.full((len(noise),), embedded_guidance, device=noise.device)
    latents = noise
    for step in range(num_steps):
        timestep = (sigmas[step] * NUM_TRAIN_TIMESTEPS).to(noise.device).expand(len(noise))
        velocity = velocity_fn(latents, timestep, guidance)
        if cfg_scale != 1.0 and negative_fn is not None:
            negative = negative_fn(latents, timestep, guidance)
            velocity = negative + cfg_scale * (velocity - negative)
        latents = latents + velocity * (sigmas[step + 1] - sigmas[step])
        if progress is not None:
            progress(step + 1, num_steps)
    return latents
