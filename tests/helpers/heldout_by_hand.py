"""The held-out loss of a decoder as its definition says it, for tests that compare with what a stage logged."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from data.shards.files import index_shard, read_sample
from nexus_gen.flux.text_encoders import encode_pooled
from train.schemas.decoders import DecoderConfig


def heldout_by_hand(decoder: nn.Module, config: DecoderConfig) -> float:
    """Mean squared error of the velocity: the first held-out samples, each at the middles of eight parts of the line.

    All in one pass, in float32. Noise is that of seed 0: the generator of (0, level, sample) draws a timestep first.
    """
    shards = sorted((Path(config.shards) / "heldout").glob("*.tar"))
    stored = [read_sample(shard, members) for shard in shards for members in index_shard(shard)]
    line = torch.linspace(1, 0.003 / 1.002, 1000, dtype=torch.float64)
    noisy, timesteps, targets, embeds = [], [], [], []
    generator = torch.Generator()
    for level in range(8):
        before = line[1000 * (2 * level + 1) // 16]
        sigma = float(3 * before / (1 + 2 * before))
        for index, sample in enumerate(stored[: config.heldout.num_samples]):
            generator.manual_seed(int(np.random.SeedSequence((0, level, index)).generate_state(1)[0]))
            torch.randint(1000, (1,), generator=generator)
            latents = sample["latents"].float()
            noise = torch.randn(*latents.shape, generator=generator)
            noisy.append((1 - sigma) * latents + sigma * noise)
            timesteps.append(1000 * sigma)
            targets.append(noise - latents)
            embeds.append([sample[name].float() for name in ("target_embeds", "source_embeds") if name in sample])
    with torch.no_grad():
        velocity = decoder(
            torch.stack(noisy),
            torch.tensor(timesteps),
            torch.full((len(noisy),), config.objective.guidance),
            encode_pooled(config.model.flux, "", torch.float32).expand(len(noisy), -1),
            *(torch.stack(own) for own in zip(*embeds, strict=True)),
        )
    return float((velocity - torch.stack(targets)).square().mean())
