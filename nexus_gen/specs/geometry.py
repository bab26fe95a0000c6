"""Token counts and model geometry; no torch, so that launchers can read them.

Legend: a grid is counted in vision patches per side before merging; 2 x 2 patches merge into one token.
"""

import math
from dataclasses import dataclass, fields

from nexus_gen.specs.keys import described, key

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


@described
class VisionGeometry:
    """Qwen2.5-VL's vision tower; `out_hidden_size` is the language model's width."""

    patch_size: int = key("Side of the square that becomes one vector; 2 x 2 patches merge into a token", "pixels")
    hidden_size: int = key("Width of the vision tower")
    intermediate_size: int = key("Width inside the vision tower's feed-forward layers")
    depth: int = key("Blocks of the vision tower")
    num_heads: int = key("Attention heads of the vision tower; they divide hidden_size")
    window_size: int = key("Side of the windows in which most blocks attend", "pixels")
    fullatt_block_indexes: list[int] = key(
        "Blocks that attend over the whole picture instead of windows, counted from 0"
    )


@described
class LanguageGeometry:
    """Qwen2.5's decoder; `mrope_section` sums to half the head width."""

    vocab_size: int = key("Rows of the language model's token embedding")
    hidden_size: int = key("Width of the language model")
    intermediate_size: int = key("Width inside the language model's feed-forward layers")
    num_layers: int = key("Layers of the language model")
    num_heads: int = key("Query heads of the language model")
    num_key_value_heads: int = key("Key and value heads of the language model, each shared by several query heads")
    mrope_section: list[int] = key("Rotary frequencies for time, height and width; they sum to half the head width")
    rope_theta: float = key("Base of the language model's rotary frequencies")
    rms_norm_eps: float = key("Added to the mean square in the language model's RMS norms")


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


@described
class FluxGeometry:
    """FLUX's transformer; `rope_axes_dim` sums to hidden_size / num_heads."""

    hidden_size: int = key("Width of FLUX's transformer")
    num_heads: int = key("Attention heads of FLUX's transformer; they divide hidden_size")
    num_joint_blocks: int = key("Blocks with separate weights for the condition and the picture")
    num_single_blocks: int = key("Blocks with the same weights for the condition and the picture")
    context_dim: int = key("Width of the condition's tokens, T5's hidden_size")
    pooled_dim: int = key("Width of the pooled text vector, CLIP's hidden_size")
    rope_axes_dim: list[int] = key("Rotary widths of index, row and column; they sum to hidden_size / num_heads")
    latent_channels: int = key("Channels of the latents that the transformer denoises, those of the VAE")
    patch_size: int = key("Side of the square of latents that becomes one token", "latents")


@described
class VaeGeometry:
    """FLUX's autoencoder: one entry of `channels` per resolution, halved between entries."""

    channels: list[int] = key("Channels at each resolution, from full size down; each next one has half the side")
    num_res_blocks: int = key("Residual blocks at each resolution of the encoder")
    norm_groups: int = key("Groups of the group norms; they divide every entry of channels")
    latent_channels: int = key("Channels of the latents that the encoder makes")

    @property
    def downscale(self) -> int:
        """Pixels per latent element and side."""
        return 2 ** (len(self.channels) - 1)


@described
class TextEncoderGeometry:
    """CLIP's or T5's text encoder."""

    vocab_size: int = key("Rows of the text encoder's token embedding")
    hidden_size: int = key("Width of the text encoder")
    intermediate_size: int = key("Width inside the text encoder's feed-forward layers")
    num_layers: int = key("Layers of the text encoder")
    num_heads: int = key("Attention heads of the text encoder")
