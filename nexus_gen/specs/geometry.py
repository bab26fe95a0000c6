"""Token counts and model geometry; no torch, so that launchers can read them.

The dataclasses are not frozen because omegaconf takes that for read-only and then cannot fill them.

Legend: a grid is counted in vision patches per side before merging; 2 x 2 patches merge into one token.
"""

import math
from dataclasses import dataclass, fields

MERGE_SIZE = 2
REFERENCE_GRID = 36  # a reference image of the editing decoder: 504 px at patch 14
NUM_REFERENCE_TOKENS = (REFERENCE_GRID // MERGE_SIZE) ** 2  # 324
# Of a target image in the released models, and of whatever does not say: an autoregressive model says it by the rows of
# `image_prefill_embeds`, shards and decoders by their manifests.
RELEASED_TARGET_TOKENS = 81
LATENT_SHIFT, LATENT_SCALE = 0.1159, 0.3611  # of FLUX: latents are (mean - shift) * scale


def tokens_per_side(num_target_tokens: int) -> int:
    """Merged tokens per side of a target image, 9 for 81. Raises ValueError, with the nearest squares, for others."""
    side = math.isqrt(max(0, num_target_tokens))
    if side == 0 or side**2 != num_target_tokens:
        squares = " and ".join(str(near**2) for near in (side, side + 1) if near)
        raise ValueError(f"a target image of {num_target_tokens} tokens is no square of them; {squares} would do")
    return side


def patches_per_side(num_target_tokens: int) -> int:
    """Patches per side of a target image: 18 for 81 tokens, 252 px at patch 14."""
    return tokens_per_side(num_target_tokens) * MERGE_SIZE


def target_grids(num_target_tokens: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of merged tokens that a target image of dynamic aspect may have, the square first.

    For 81: 9 x 9, 8 x 10, 7 x 11, 6 x 12 and these turned, so up to twice as long as wide. The published list has
    7 x 12 too: 84 tokens, more than the 81 prefill embeddings of the released layout.
    """
    side = tokens_per_side(num_target_tokens)
    longer = [(side - step, side + step) for step in range(1, side // 3 + 1)]
    return ((side, side), *(turned for grid in longer for turned in (grid, grid[::-1])))


@dataclass
class VisionGeometry:
    """Qwen2.5-VL's vision tower; `out_hidden_size` is the language model's width."""

    patch_size: int
    hidden_size: int
    intermediate_size: int
    depth: int
    num_heads: int
    window_size: int
    fullatt_block_indexes: list[int]


@dataclass
class LanguageGeometry:
    """Qwen2.5's decoder; `mrope_section` sums to half the head width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    mrope_section: list[int]
    rope_theta: float
    rms_norm_eps: float


@dataclass
class ProjectorGeometry:
    """The editing decoder's projector: one Qwen2.5 decoder layer, sized like those of the autoregressive model."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    mrope_section: list[int]
    rope_theta: float
    rms_norm_eps: float

    @classmethod
    def of(cls, language: LanguageGeometry) -> "ProjectorGeometry":
        """The projector that fits this language model, whose first layer initialises it."""
        return cls(**{field.name: getattr(language, field.name) for field in fields(cls)})


@dataclass
class FluxGeometry:
    """FLUX's transformer; `rope_axes_dim` sums to hidden_size / num_heads."""

    hidden_size: int
    num_heads: int
    num_joint_blocks: int
    num_single_blocks: int
    context_dim: int
    pooled_dim: int
    rope_axes_dim: list[int]
    latent_channels: int
    patch_size: int


@dataclass
class VaeGeometry:
    """FLUX's autoencoder: one entry of `channels` per resolution, halved between entries."""

    channels: list[int]
    num_res_blocks: int
    norm_groups: int
    latent_channels: int

    @property
    def downscale(self) -> int:
        """Pixels per latent element and side."""
        return 2 ** (len(self.channels) - 1)


@dataclass
class TextEncoderGeometry:
    """CLIP's or T5's text encoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
