"""Fit a small FLUX autoencoder on the spot, in about a minute of CPU time.

Half of every batch are the given pictures, half are random ones (soft noise of every scale, cut by blobs and stripes),
so that photographs come through too. Legend: B pictures, S pixels per side.
"""

import logging
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nexus_gen.specs.geometry import VaeGeometry
from nexus_gen.specs.images import to_array
from nexus_gen.vae import FluxVae, ResnetBlock, VAEAttentionBlock

log = logging.getLogger(__name__)

BATCH_SIZE = 16
LEARNING_RATE = 4e-3
WARMUP_STEPS = 20
LATENT_NOISE = 0.05  # of latents with std 1: small errors of a decoder then stay small in pixels
MOMENT_WEIGHT = 0.01  # pull of every latent channel towards mean 0 and std 1


def fit_vae(geometry: VaeGeometry, images: list[Image.Image], steps: int, seed: int) -> FluxVae:
    """An autoencoder trained for `steps` batches; latents, shifted and scaled, have mean about 0 and std about 1.

    images: square, all of one size. The result depends on the arguments and the number of threads alone; the
    caller's random state is left alone.
    """
    pictures = torch.from_numpy(np.stack([to_array(image) for image in images]))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = FluxVae(geometry)
    initialise(vae)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        batch = training_batch(pictures, generator)
        latents = vae.encode(batch)
        noise = torch.randn(latents.shape, generator=generator)
        error = vae.decode(latents + LATENT_NOISE * noise) - batch
        std, mean = torch.std_mean(latents, dim=(0, 2, 3))
        moments = mean.square().mean() + (std - 1).square().mean()
        loss = error.abs().mean() + error.square().mean() + MOMENT_WEIGHT * moments
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log.info("autoencoder step %d of %d: loss %.4f", step + 1, steps, loss.item())
    return vae.eval()


@torch.no_grad()
def initialise(vae: FluxVae) -> None:
    """Begin as a linear autoencoder: every residual branch adds nothing at first, which trains several times faster."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, VAEAttentionBlock):
            for block in module.transformer_blocks:
                nn.init.zeros_(block.to_out.weight)
                nn.init.zeros_(block.to_out.bias)


def training_batch(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, S, S) in [-1, 1]: half of `pictures`, mirrored and with their colours exchanged at random; half random."""
    half = BATCH_SIZE // 2
    index = torch.randint(len(pictures), (half,), generator=generator)
    mirrored = torch.rand(half, 1, 1, 1, generator=generator) < 0.5
    given = torch.where(mirrored, pictures[index].flip(-1), pictures[index])
    given = given[:, torch.randperm(3, generator=generator)]
    return torch.cat([given, random_pictures(half, pictures.shape[-1], generator)])


def random_pictures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size) in [-1, 1]: two soft colour fields, divided by a hard edge of blobs or stripes."""
    inside, outside = (soft_noise(count, 3, size, generator) for _ in range(2))
    blobs = soft_noise(count, 1, size, generator)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    waves = torch.randn(count, 2, 1, 1, generator=generator) * (size / 8)
    stripes = torch.sin(waves[:, :1] * rows + waves[:, 1:] * columns)
    striped = torch.rand(count, 1, 1, 1, generator=generator) < 0.3
    return torch.where(torch.where(striped, stripes, blobs) > 0, inside, outside)


def soft_noise(count: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, channels, size, size) in [-1, 1]: noise of every scale; how steeply it falls is drawn per picture."""
    steepness = torch.rand(count, 1, 1, 1, generator=generator) * 1.5
    total = torch.randn(count, channels, 1, 1, generator=generator).expand(-1, -1, size, size) * 0.6
    for octave in range(1, int(math.log2(size)) + 1):
        noise = torch.randn(count, channels, 2**octave, 2**octave, generator=generator)
        amplitude = 0.8 * torch.exp(-steepness * octave)
        total = total + amplitude * F.interpolate(noise, (size, size), mode="bilinear", align_corners=False)
    return total.clamp(-1, 1)


@torch.no_grad()
def reconstruction_psnr(vae: FluxVae, images: list[Image.Image]) -> float:
    """Peak signal-to-noise ratio in dB of encoding and decoding, over all pixels of all pictures."""
    pictures = torch.from_numpy(np.stack([to_array(image) for image in images]))
    error = (vae.decode(vae.encode(pictures)).clamp(-1, 1) - pictures).square().mean()
    return 10 * math.log10(4 / error.item())
