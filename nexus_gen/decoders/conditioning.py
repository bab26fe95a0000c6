"""From image embeddings to the transformer's context: the generation adapter, the editing projector, and positions.

Legend: B batch, N target tokens (81 as released), M reference tokens (324), D embedding width, C context width.
A grid is (height, width) in vision patches before merging: (18, 18) for 81 tokens, (36, 36) for a reference.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from nexus_gen.specs.geometry import (
    MERGE_SIZE,
    REFERENCE_GRID,
    RELEASED_TARGET_TOKENS,
    ProjectorGeometry,
    patches_per_side,
)
from nexus_gen.tensors.compat import ensure_torchvision
from nexus_gen.tensors.files import TensorFiles
from nexus_gen.tensors.layouts import Source
from nexus_gen.tensors.tensor_shapes import EXPANSION
from nexus_gen.tensors.translation import load_strictly

ensure_torchvision()

from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig  # noqa: E402
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
)

Grid = tuple[int, int]
TARGET: Grid = (patches_per_side(RELEASED_TARGET_TOKENS),) * 2
REFERENCE: Grid = (REFERENCE_GRID, REFERENCE_GRID)
BASE_GRID = 72  # the grid whose patch indices are the projector's position ids


class GenerationAdapter(nn.Sequential):
    """Two layers from image embeddings to context, (B, N, D) -> (B, N, C); keys are the released `adapter.*`."""

    def __init__(self, embed_dim: int, context_dim: int) -> None:
        super().__init__(
            nn.Linear(embed_dim, context_dim),
            nn.LayerNorm(context_dim),
            nn.ReLU(),
            nn.Linear(context_dim, context_dim),
            nn.LayerNorm(context_dim),
        )


class EditingProjector(nn.Module):
    """One bidirectional Qwen2.5-VL decoder layer over target and reference embeddings, then a projection to context.

    Keys are those of the released `embedding_merger`: `layers.0.*` and `projector.{0,1,2,4,5}`.
    round_positions: keep the rotary frequencies in the embeddings' dtype as the published code does, which rounds them
    when that is bfloat16; False keeps float32.
    """

    def __init__(self, geometry: ProjectorGeometry, context_dim: int, round_positions: bool = False) -> None:
        super().__init__()
        self.round_positions = round_positions
        self.config = Qwen2_5_VLTextConfig(
            hidden_size=geometry.hidden_size,
            intermediate_size=geometry.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=geometry.num_heads,
            num_key_value_heads=geometry.num_key_value_heads,
            rms_norm_eps=geometry.rms_norm_eps,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": geometry.rope_theta,
                "mrope_section": list(geometry.mrope_section),
            },
        )
        self.config._attn_implementation = "sdpa"  # a bare layer would take the slow reference attention
        layer = Qwen2_5_VLDecoderLayer(self.config, layer_idx=0)
        layer.self_attn.is_causal = False  # causal by default even where no mask is passed
        self.layers = nn.ModuleList([layer])
        width, eps = EXPANSION * context_dim, geometry.rms_norm_eps
        self.projector = nn.Sequential(
            Qwen2_5_VLRMSNorm(geometry.hidden_size, eps=eps),
            nn.Linear(geometry.hidden_size, width),
            Qwen2_5_VLRMSNorm(width, eps=eps),
            nn.SiLU(),
            nn.Linear(width, context_dim),
            Qwen2_5_VLRMSNorm(context_dim, eps=eps),
        )

    def forward(
        self,
        target_embeds: Tensor,
        source_embeds: Tensor | None = None,
        target_grid: Grid | None = None,
        reference_grid: Grid = REFERENCE,
    ) -> Tensor:
        """(B, N, D) target and, where there is a reference, (B, M, D) -> (B, N + M, C); target tokens come first.

        target_grid: the square of N tokens unless given. Raises ValueError when N or M is not what the grids say.
        """
        target_grid = target_grid or (patches_per_side(target_embeds.shape[1]),) * 2
        grids = [target_grid] if source_embeds is None else [target_grid, reference_grid]
        hidden = target_embeds if source_embeds is None else torch.cat((target_embeds, source_embeds), dim=1)
        positions = torch.cat([projector_position_ids(grid) for grid in grids], dim=-1).to(hidden.device)
        if positions.shape[-1] != hidden.shape[1]:
            raise ValueError(
                f"{hidden.shape[1]} embeddings do not fill the grids {grids}, {positions.shape[-1]} tokens"
            )
        hidden = self.layers[0](hidden, position_embeddings=self._rotation(hidden, positions))
        return self.projector(hidden)

    def _rotation(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at `positions` (3, 1, N).

        Built where it is used: as a buffer, its frequencies would follow every cast of the module.
        """
        with torch.device(hidden.device):
            rotary = Qwen2_5_VLRotaryEmbedding(self.config)  # type: ignore[arg-type]  # takes the text config
        if self.round_positions:
            rotary = rotary.to(hidden.dtype)
        return rotary(hidden, positions)


def projector_position_ids(grid: Grid) -> Tensor:
    """M-RoPE positions of one image's merged tokens: (3, 1, N) float32, rows (t, h, w).

    t is 0; h and w are the merged index times 72 / grid: 0, 4, .., 32 at 18 patches and 0, 2, .., 34 at 36.
    """
    height, width = grid
    rows, columns = merged_indices(grid)
    return torch.stack([torch.zeros_like(rows), rows * (BASE_GRID / height), columns * (BASE_GRID / width)])[:, None]


def editing_text_ids(
    latent_size: tuple[int, int],
    with_reference: bool,
    dtype: torch.dtype = torch.float32,
    target_grid: Grid = TARGET,
    reference_grid: Grid = REFERENCE,
) -> Tensor:
    """Positions of the editing context in the transformer's latent space: (1, N [+ M], 3) in float32.

    latent_size: (h, w) of the latents. Axis 0 is 0 for target and 1 for reference tokens; axes 1 and 2 are the merged
    index times latent size / grid.
    dtype: the dtype that the ids are rounded to. The published code holds them in the latents', so bfloat16 there.
    """
    ids = []
    for reference, grid in enumerate([target_grid, reference_grid] if with_reference else [target_grid]):
        rows, columns = merged_indices(grid)
        scaled = [rows * (latent_size[0] / grid[0]), columns * (latent_size[1] / grid[1])]
        ids.append(torch.stack([torch.full_like(rows, reference), *scaled], dim=-1))
    return torch.cat(ids)[None].to(dtype).float()


def merged_indices(grid: Grid) -> tuple[Tensor, Tensor]:
    """Row and column of every merged token in reading order, each (N,) float32."""
    height, width = (side // MERGE_SIZE for side in grid)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return rows.flatten().float(), columns.flatten().float()


def init_from_qwen(projector: EditingProjector, checkpoint_dir: str | Path) -> None:
    """Copy layer 0 of a Qwen2.5-VL checkpoint, in either layout, into the projector's decoder layer.

    The file that holds it comes from the checkpoint's index. Every missing, unexpected or misshapen key is a UserError.
    """
    layer = projector.layers[0]
    files = TensorFiles(checkpoint_dir, next(layer.parameters()).device)
    nested = any(key.startswith("model.language_model.") for key in files)
    prefix = "model.language_model.layers.0." if nested else "model.layers.0."
    sources = {key: Source((prefix + key,)) for key in layer.state_dict()}
    load_strictly(layer, files, sources, concerns=lambda key: key.startswith(prefix))
