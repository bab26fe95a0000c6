"""FLUX's transformer at any width, on diffsynth's blocks.

Legend: B batch, C latent channels, h x w latent size, N context tokens.
Parameter names are diffsynth's; `final_norm_out.linear` holds (shift, scale). `nexus_gen.decoders.checkpoint` knows
the others.
"""

import torch
from torch import Tensor, nn

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import FluxGeometry
from nexus_gen.tensors.compat import ensure_torchvision
from nexus_gen.tensors.tensor_shapes import TIMESTEP_FREQUENCIES

ensure_torchvision()

from diffsynth.models.flux_dit import (  # noqa: E402
    AdaLayerNormContinuous,
    FluxDiT,
    FluxJointTransformerBlock,
    FluxSingleTransformerBlock,
    RoPEEmbedding,
    TimestepEmbeddings,
)
from diffsynth.pipelines.flux_image import model_fn_flux_image  # noqa: E402

ROPE_THETA = 10000
PATCH_SIZE = 2  # written into diffsynth's patchify


class FluxTransformer(FluxDiT):
    """diffsynth's FluxDiT, whose constructor writes FLUX.1-dev's widths in, sized from a geometry.

    At FLUX.1-dev's geometry its state dict has FluxDiT's keys and shapes.
    Raises UserError when the geometry does not fit together.
    """

    def __init__(self, geometry: FluxGeometry) -> None:
        nn.Module.__init__(self)
        check_geometry(geometry)
        width = geometry.hidden_size
        patch_dim = geometry.latent_channels * PATCH_SIZE**2
        self.geometry = geometry
        self.input_dim = patch_dim
        self.pos_embedder = RoPEEmbedding(width, ROPE_THETA, list(geometry.rope_axes_dim))
        self.time_embedder = TimestepEmbeddings(TIMESTEP_FREQUENCIES, width)
        self.guidance_embedder = TimestepEmbeddings(TIMESTEP_FREQUENCIES, width)
        self.pooled_text_embedder = nn.Sequential(
            nn.Linear(geometry.pooled_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.context_embedder = nn.Linear(geometry.context_dim, width)
        self.x_embedder = nn.Linear(patch_dim, width)
        self.blocks = nn.ModuleList(
            FluxJointTransformerBlock(width, geometry.num_heads) for _ in range(geometry.num_joint_blocks)
        )
        self.single_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(width, geometry.num_heads) for _ in range(geometry.num_single_blocks)
        )
        self.final_norm_out = AdaLayerNormContinuous(width)
        self.final_proj_out = nn.Linear(width, patch_dim)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor,
        text_ids: Tensor | None = None,
        gradient_checkpointing: bool = False,
    ) -> Tensor:
        """Predict the velocity (noise - data) at noisy latents.

        latents: (B, C, h, w), h and w even, in the parameters' dtype. timestep: (B,) in [0, 1000].
        context: (B, N, context_dim). pooled: (B, pooled_dim) or (1, pooled_dim). guidance: (B,), 3.5 as published.
        text_ids: (B, N, 3) positions of the context tokens; None means zeros, as for text.
        Returns (B, C, h, w).
        """
        if text_ids is None:
            text_ids = torch.zeros(*context.shape[:2], 3, device=context.device)
        return model_fn_flux_image(
            dit=self,
            latents=latents,
            timestep=timestep.float(),
            prompt_emb=context,
            pooled_prompt_emb=pooled,
            # In the latents' dtype as every published FLUX sampler holds it: bfloat16 turns 1000 x 3.5 into 3504.
            guidance=guidance.to(latents.dtype),
            text_ids=text_ids,
            use_gradient_checkpointing=gradient_checkpointing,
        )


def check_geometry(geometry: FluxGeometry) -> None:
    """UserError unless heads, rotary axes and patch size agree."""
    if geometry.patch_size != PATCH_SIZE:
        raise UserError(f"flux.patch_size is {geometry.patch_size}; FLUX's blocks take {PATCH_SIZE}")
    if geometry.hidden_size % geometry.num_heads:
        raise UserError(
            f"flux.hidden_size {geometry.hidden_size} is not a multiple of flux.num_heads {geometry.num_heads}"
        )
    head_dim = geometry.hidden_size // geometry.num_heads
    if len(geometry.rope_axes_dim) != 3 or sum(geometry.rope_axes_dim) != head_dim:
        raise UserError(
            f"flux.rope_axes_dim {list(geometry.rope_axes_dim)} must be three numbers that sum to hidden_size / "
            f"num_heads = {head_dim}"
        )
