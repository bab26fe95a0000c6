"""Token counts and model geometry; no torch, so that launchers can read them.

The dataclasses are not frozen because omegaconf takes that for read-only and then cannot fill them.

Legend: a grid is counted in vision patches per side before merging; 2 x 2 patches merge into one token.
"""

from dataclasses import dataclass, fields

MERGE_SIZE = 2
TARGET_GRID = 18  # a target image is 18 x 18 patches: 252 px at patch 14
REFERENCE_GRID = 36  # a reference image of the editing decoder: 504 px at patch 14
NUM_TARGET_TOKENS = (TARGET_GRID // MERGE_SIZE) ** 2  # 81
# Rows and columns of merged tokens that a target image of dynamic aspect may have. The published list has 7 x 12 too:
# 84 tokens, more than the 81 prefill embeddings of the released layout.
TARGET_GRIDS = ((9, 9), (8, 10), (10, 8), (7, 11), (11, 7), (6, 12), (12, 6))
NUM_REFERENCE_TOKENS = (REFERENCE_GRID // MERGE_SIZE) ** 2  # 324


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
