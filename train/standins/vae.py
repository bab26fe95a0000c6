"""Fit a small FLUX autoencoder on the spot, in about a minute, on a CPU or a GPU.

Half of every batch are the given pictures, half are random ones (soft noise of every scale, cut by blobs and stripes),
so that photographs come through too. Legend: B pictures, S pixels per side.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from nexus_gen.flux.vae import DownSampler, FluxVae, ResnetBlock, UpSampler, VAEAttentionBlock
from nexus_gen.pictures.images import channels_first
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import LATENT_SCALE, LATENT_SHIFT, VaeGeometry

log = logging.getLogger(__name__)

LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
LATENT_NOISE = 0.05  # of latents with std 1: small errors of a decoder then stay small in pixels
FULL_SIZE_FROM = 0.8  # of the steps; before, crops of half the size cost a quarter and teach all but the norms' scale
COLOUR_GAIN = 1.6  # latents per unit of colour at the start: a std of about 1
NORM_CONSTANT = 8.0  # large beside colours in [-1, 1]
CALIBRATION_PICTURES = 64
RANDOM_AT_ONCE = 16  # batches whose random pictures are drawn together: in small ones a GPU waits for its host


def build_vae(geometry: VaeGeometry, seed: int) -> FluxVae:
    """An autoencoder as `initialise` has it begin; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = FluxVae(geometry)
    initialise(vae)
    return vae


def fit_vae(vae: FluxVae, pictures: Tensor, steps: int, batch_size: int, seed: int) -> FluxVae:
    """Train an autoencoder for `steps` batches; its latents, shifted and scaled, get mean about 0 and std about 1.

    pictures: (N, 3, S, S) uint8, on the device to train on; the autoencoder comes back on the CPU. What it becomes
    depends on the arguments and the number of threads alone. It touches no state that threads share.
    """
    vae.to(pictures.device)
    generator = torch.Generator(pictures.device).manual_seed(seed)
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step, batch in enumerate(training_batches(pictures, batch_size, steps, generator)):
        latents = vae.encode(batch)
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        error = vae.decode(latents + LATENT_NOISE * noise) - batch
        loss = error.abs().mean() + error.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            log.info("autoencoder step %d of %d: loss %.4f", step + 1, steps, loss.item())
    calibrate(vae, in_unit_range(pictures[:CALIBRATION_PICTURES]))
    return vae.cpu().eval()


def stacked(images: Sequence[Image.Image]) -> Tensor:
    """(N, 3, S, S) uint8 of square RGB pictures of one size."""
    return torch.from_numpy(np.stack([channels_first(image) for image in images]))


def in_unit_range(pictures: Tensor) -> Tensor:
    """float32 in [-1, 1] of uint8."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def initialise(vae: FluxVae) -> None:
    """Begin as a picture shrunk to the latents' size and blown up again, with residual branches that add nothing.

    Fitting then starts from 20 dB of blocky colours instead of noise, and 300 steps reach 26.0 dB where the default
    initialisation reaches 19.2.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        elif isinstance(module, VAEAttentionBlock):
            for block in module.transformer_blocks:
                nn.init.zeros_(block.to_out.weight)
                nn.init.zeros_(block.to_out.bias)
    groups, gain = vae.geometry.norm_groups, COLOUR_GAIN / LATENT_SCALE
    carry_colours(vae.encoder, groups, gain_in=1.0, bias_in=0.0, gain_out=gain, bias_out=LATENT_SHIFT)
    carry_colours(vae.decoder, groups, gain_in=1 / gain, bias_in=-LATENT_SHIFT / gain, gain_out=1.0, bias_out=0.0)


def carry_colours(coder: Any, groups: int, gain_in: float, bias_in: float, gain_out: float, bias_out: float) -> None:
    """Set the convolutions of the main path so that three input channels arrive at the first three outputs.

    Before the output stand a group norm and SiLU, which would lose the scale: beside each colour, two constant
    channels of opposite sign make the norm divide by what is nearly a constant, and SiLU halve what is small.
    """
    path = [coder.conv_in]
    for block in coder.blocks:
        if isinstance(block, ResnetBlock) and block.conv_shortcut is not None:
            path.append(block.conv_shortcut)
        elif isinstance(block, DownSampler | UpSampler):
            path.append(block.conv)
    per_group = path[-1].out_channels // groups
    if groups < 3 or per_group < 3:
        raise UserError(
            f"model.vae.norm_groups {groups} leaves {per_group} of {path[-1].out_channels} channels to a group; each "
            "of three colours needs a group of at least 3"
        )
    carriers = [colour * per_group for colour in range(3)]
    for conv in path:
        middle = conv.kernel_size[0] // 2
        for colour in range(3):
            out = carriers[colour] if conv is path[-1] else colour
            conv.weight[out] = 0
            conv.bias[out] = bias_in if conv is path[0] else 0
            if conv.stride[0] == 2:
                conv.weight[out, colour, :2, :2] = 0.25  # the mean of the 2 x 2 pixels that become one
            else:
                conv.weight[out, colour, middle, middle] = gain_in if conv is path[0] else 1
            if conv is path[-1]:
                for offset, constant in ((1, NORM_CONSTANT), (2, -NORM_CONSTANT)):
                    conv.weight[out + offset] = 0
                    conv.bias[out + offset] = constant
    deviation = NORM_CONSTANT * (2 / per_group) ** 0.5
    for colour in range(3):
        coder.conv_out.weight[colour] = 0
        coder.conv_out.weight[colour, carriers[colour], 1, 1] = 2 * deviation * gain_out
        coder.conv_out.bias[colour] = bias_out


@torch.no_grad()
def calibrate(vae: FluxVae, pictures: Tensor) -> None:
    """Give every latent channel mean 0 and std 1 over `pictures`: in the encoder's last convolution, undone in the
    decoder's first, so that pictures come out as before."""
    std, mean = torch.std_mean(vae.encode(pictures), dim=(0, 2, 3))
    last: Any = vae.encoder.conv_out
    first: Any = vae.decoder.conv_in
    channels = len(std)
    raw_mean = LATENT_SHIFT + mean / LATENT_SCALE
    last.bias[:channels] = (last.bias[:channels] - raw_mean) / std + LATENT_SHIFT
    last.weight[:channels] /= std[:, None, None, None]
    # The old latent is std x (new - LATENT_SHIFT) + raw_mean. A constant reaches the border's zero padding unequally,
    # so the bias is exact inside the picture and all but exact at its edge.
    first.bias += (first.weight.sum(dim=(2, 3)) * (raw_mean - std * LATENT_SHIFT)).sum(dim=1)
    first.weight *= std[None, :, None, None]


def training_batches(pictures: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """(batch_size, 3, size, size) in [-1, 1]: half parts of `pictures`, mirrored and recoloured, half random ones."""
    half, side, device = batch_size // 2, pictures.shape[-1], pictures.device
    places = torch.rand(steps, 2, generator=generator, device=device).tolist()
    random: list[Tensor] = []
    for step, place in enumerate(places):
        size = side // (1 if step >= FULL_SIZE_FROM * steps else 2)
        if not random or random[-1].shape[-1] != size:
            count = min(RANDOM_AT_ONCE, steps - step)
            random = list(random_pictures(half * count, size, generator).chunk(count)) if half else []
        index = torch.randint(len(pictures), (batch_size - half,), generator=generator, device=device)
        top, left = (int(share * (side - size + 1)) for share in place)
        channels = torch.randperm(3, generator=generator, device=device)
        given = in_unit_range(pictures[index][:, channels, top : top + size, left : left + size])
        mirrored = torch.rand(len(given), 1, 1, 1, generator=generator, device=device) < 0.5
        yield torch.cat([torch.where(mirrored, given.flip(-1), given), *random[-1:]])
        del random[-1:]


def random_pictures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size) in [-1, 1]: two soft colour fields, divided by a hard edge of blobs or stripes."""
    device = generator.device
    inside, outside = (soft_noise(count, 3, size, generator) for _ in range(2))
    blobs = soft_noise(count, 1, size, generator)
    line = torch.linspace(-1, 1, size, device=device)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    waves = torch.randn(count, 2, 1, 1, generator=generator, device=device) * (size / 8)
    stripes = torch.sin(waves[:, :1] * rows + waves[:, 1:] * columns)
    striped = torch.rand(count, 1, 1, 1, generator=generator, device=device) < 0.3
    return torch.where(torch.where(striped, stripes, blobs) > 0, inside, outside)


def soft_noise(count: int, channels: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, channels, size, size) in [-1, 1]: noise of every scale; how steeply it falls is drawn per picture."""
    device = generator.device
    steepness = torch.rand(count, 1, 1, 1, generator=generator, device=device) * 1.5
    total = torch.randn(count, channels, 1, 1, generator=generator, device=device).expand(-1, -1, size, size) * 0.6
    for octave in range(1, int(math.log2(size)) + 1):
        noise = torch.randn(count, channels, 2**octave, 2**octave, generator=generator, device=device)
        amplitude = 0.8 * torch.exp(-steepness * octave)
        total = total + amplitude * F.interpolate(noise, (size, size), mode="bilinear", align_corners=False)
    return total.clamp(-1, 1)


@torch.no_grad()
def reconstruction_psnr(vae: FluxVae, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of encoding and decoding, over all pixels of all pictures (N, 3, S, S) uint8."""
    pictures = in_unit_range(pictures)
    error = (vae.decode(vae.encode(pictures)).clamp(-1, 1) - pictures).square().mean()
    return 10 * math.log10(4 / error.item())
