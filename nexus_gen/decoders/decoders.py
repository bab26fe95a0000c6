"""The two decoders: FLUX's transformer, painting from image embeddings in place of text.

Legend: B batch, C latent channels, h x w latent size, D embedding width, N tokens of the image to paint (81 as
released).
"""

import torch
from torch import Tensor, nn

from nexus_gen.decoders.conditioning import EditingProjector, GenerationAdapter, editing_text_ids
from nexus_gen.flux.transformer import FluxTransformer
from nexus_gen.specs.geometry import FluxGeometry, ProjectorGeometry, patches_per_side


class GenerationDecoder(nn.Module):
    """Velocities from the embeddings of the image to paint, any number of them."""

    def __init__(self, transformer: FluxTransformer, adapter: GenerationAdapter) -> None:
        super().__init__()
        self.transformer = transformer
        self.adapter = adapter

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        pooled: Tensor,
        target_embeds: Tensor,
        source_embeds: None = None,
        gradient_checkpointing: bool = False,
    ) -> Tensor:
        """Predict the velocity (noise - data), (B, C, h, w).

        latents: (B, C, h, w) noisy latents, h and w even. timestep: (B,) in [0, 1000]. guidance: (B,), published: 3.5.
        pooled: (B, P) or (1, P), CLIP's pooled embedding of the empty prompt. target_embeds: (B, N, D).
        source_embeds: always None; both decoders are called alike.
        """
        return self.transformer(
            latents,
            timestep,
            context=self.adapter(target_embeds),
            pooled=pooled,
            guidance=guidance,
            gradient_checkpointing=gradient_checkpointing,
        )


class EditingDecoder(nn.Module):
    """Velocities from the embeddings of the image to paint and, where given, the 324 of the image to edit.

    Token positions are rounded as `embedding_merger.round_positions` says.
    """

    def __init__(self, transformer: FluxTransformer, embedding_merger: EditingProjector) -> None:
        super().__init__()
        self.transformer = transformer
        self.embedding_merger = embedding_merger

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        pooled: Tensor,
        target_embeds: Tensor,
        source_embeds: Tensor | None = None,
        gradient_checkpointing: bool = False,
    ) -> Tensor:
        """Predict the velocity (noise - data), (B, C, h, w).

        As GenerationDecoder.forward; source_embeds: (B, 324, D), or None to paint from the target's embeddings alone.
        Raises ValueError when N is no square.
        """
        context = self.embedding_merger(target_embeds, source_embeds)
        text_ids = editing_text_ids(
            (latents.shape[-2], latents.shape[-1]),
            with_reference=source_embeds is not None,
            dtype=latents.dtype if self.embedding_merger.round_positions else torch.float32,
            target_grid=(patches_per_side(target_embeds.shape[1]),) * 2,
        )
        return self.transformer(
            latents,
            timestep,
            context=context,
            pooled=pooled,
            guidance=guidance,
            text_ids=text_ids.to(latents.device).expand(len(latents), -1, -1),
            gradient_checkpointing=gradient_checkpointing,
        )


def build_generation_decoder(flux: FluxGeometry, embed_dim: int) -> GenerationDecoder:
    """A randomly initialised generation decoder; embed_dim is the width of the image embeddings."""
    return GenerationDecoder(FluxTransformer(flux), GenerationAdapter(embed_dim, flux.context_dim))


def build_editing_decoder(
    flux: FluxGeometry, projector: ProjectorGeometry, round_positions: bool = False
) -> EditingDecoder:
    """A randomly initialised editing decoder; `init_from_qwen` gives its projector's layer the published start."""
    return EditingDecoder(FluxTransformer(flux), EditingProjector(projector, flux.context_dim, round_positions))
