"""FLUX's autoencoder at any width, on diffsynth's blocks.

Latents are shifted and scaled as the transformer sees them: (mean - 0.1159) * 0.3611.
"""

from torch import Tensor, nn

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import LATENT_SCALE, LATENT_SHIFT, VaeGeometry
from nexus_gen.tensors.compat import ensure_torchvision

ensure_torchvision()

from diffsynth.models.flux_vae import (  # noqa: E402
    DownSampler,
    FluxVAEDecoder,
    FluxVAEEncoder,
    ResnetBlock,
    UpSampler,
    VAEAttentionBlock,
)

LATENT_CHANNELS = 16  # written into diffsynth's encoder, which keeps the first 16 of 32 output channels: the mean
NORM_EPS = 1e-6


class SizedVaeEncoder(FluxVAEEncoder):
    """diffsynth's FluxVAEEncoder with its channels, residual blocks and norm groups from a geometry."""

    def __init__(self, geometry: VaeGeometry) -> None:
        nn.Module.__init__(self)
        channels, groups = geometry.channels, geometry.norm_groups
        self.shift_factor, self.scaling_factor = LATENT_SHIFT, LATENT_SCALE
        self.conv_in = nn.Conv2d(3, channels[0], kernel_size=3, padding=1)
        blocks: list[nn.Module] = []
        width = channels[0]
        for level, out_width in enumerate(channels):
            for _ in range(geometry.num_res_blocks):
                blocks.append(ResnetBlock(width, out_width, groups=groups, eps=NORM_EPS))
                width = out_width
            if level < len(channels) - 1:
                blocks.append(DownSampler(width, padding=0, extra_padding=True))
        self.blocks = nn.ModuleList(blocks + middle(width, groups))
        self.conv_norm_out = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(width, 2 * LATENT_CHANNELS, kernel_size=3, padding=1)


class SizedVaeDecoder(FluxVAEDecoder):
    """diffsynth's FluxVAEDecoder, likewise; one residual block more per resolution than the encoder."""

    def __init__(self, geometry: VaeGeometry) -> None:
        nn.Module.__init__(self)
        channels, groups = geometry.channels[::-1], geometry.norm_groups
        self.shift_factor, self.scaling_factor = LATENT_SHIFT, LATENT_SCALE
        width = channels[0]
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, width, kernel_size=3, padding=1)
        blocks = middle(width, groups)
        for level, out_width in enumerate(channels):
            for _ in range(geometry.num_res_blocks + 1):
                blocks.append(ResnetBlock(width, out_width, groups=groups, eps=NORM_EPS))
                width = out_width
            if level < len(channels) - 1:
                blocks.append(UpSampler(width))
        self.blocks = nn.ModuleList(blocks)
        self.conv_norm_out = nn.GroupNorm(groups, width, eps=NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(width, 3, kernel_size=3, padding=1)


class FluxVae(nn.Module):
    """The encoder and the decoder together. Raises UserError when the geometry does not fit together."""

    def __init__(self, geometry: VaeGeometry) -> None:
        super().__init__()
        check_geometry(geometry)
        self.geometry = geometry
        self.encoder = SizedVaeEncoder(geometry)
        self.decoder = SizedVaeDecoder(geometry)

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean, shifted and scaled: (B, 3, H, W) in [-1, 1] -> (B, 16, H / downscale, W / downscale).

        H and W are multiples of `geometry.downscale`; images have the parameters' dtype.
        Raises ValueError for other sizes.
        """
        downscale = self.geometry.downscale
        if images.shape[-2] % downscale or images.shape[-1] % downscale:
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels do not divide by {downscale}")
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Undo `encode`: (B, 16, h, w) -> (B, 3, h * downscale, w * downscale), about [-1, 1], not clamped."""
        return self.decoder(latents)


def middle(width: int, groups: int) -> list[nn.Module]:
    """The blocks at the lowest resolution: residual, attention with one head, residual."""
    return [
        ResnetBlock(width, width, groups=groups, eps=NORM_EPS),
        VAEAttentionBlock(1, width, width, norm_num_groups=groups, eps=NORM_EPS),
        ResnetBlock(width, width, groups=groups, eps=NORM_EPS),
    ]


def check_geometry(geometry: VaeGeometry) -> None:
    """UserError unless the channels divide into the norm groups and the latents have FLUX's 16 channels."""
    if geometry.latent_channels != LATENT_CHANNELS:
        raise UserError(f"vae.latent_channels is {geometry.latent_channels}; FLUX's autoencoder has {LATENT_CHANNELS}")
    for channels in geometry.channels:
        if channels % geometry.norm_groups:
            raise UserError(f"vae.channels has {channels}, not a multiple of vae.norm_groups {geometry.norm_groups}")
