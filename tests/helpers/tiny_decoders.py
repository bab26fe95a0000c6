"""Tiny geometries and models that the decoders' tests share."""

import torch
from torch import nn

from nexus_gen.specs.geometry import FluxGeometry, ProjectorGeometry, VaeGeometry

FLUX_1_DEV = FluxGeometry(3072, 24, 19, 38, 4096, 768, [16, 56, 56], 16, 2)
FLUX_1_VAE = VaeGeometry([128, 256, 512, 512], 2, 32, 16)

# Widths, heads, depths and context widths that share no factor by accident.
FLUXES = [
    FluxGeometry(32, 2, 1, 2, 24, 16, [4, 6, 6], 16, 2),
    FluxGeometry(48, 4, 2, 1, 40, 10, [4, 4, 4], 16, 2),
    FluxGeometry(60, 3, 1, 1, 14, 6, [8, 6, 6], 4, 2),
]
VAES = [VaeGeometry([8, 16], 1, 4, 16), VaeGeometry([4, 8, 12], 2, 2, 16), VaeGeometry([8, 16, 24, 24], 2, 8, 16)]
PROJECTOR = ProjectorGeometry(64, 128, 4, 2, [2, 3, 3], 1e6, 1e-6)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, norms and biases too, so that no key can be lost or swapped unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    return module


def flux_inputs(geometry: FluxGeometry, batch_size: int, num_tokens: int = 5, size: tuple[int, int] = (6, 4)) -> dict:
    """Keyword arguments of FluxTransformer.forward, different for every sample."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "latents": randn(batch_size, geometry.latent_channels, *size),
        "timestep": torch.linspace(990.0, 30.0, batch_size),
        "context": randn(batch_size, num_tokens, geometry.context_dim),
        "pooled": randn(batch_size, geometry.pooled_dim),
        "guidance": torch.linspace(3.5, 1.0, batch_size),
    }
