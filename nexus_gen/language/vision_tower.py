"""Qwen2.5-VL's vision tower over many pictures at once, in as many kernels as one picture takes.

transformers runs one attention per window or picture of a batch, and lays out windows and positions picture by picture.
Here equal lengths share one attention call, and the layout of a grid is computed once. Results agree to rounding.

Legend: P patches of all pictures, N merged tokens of all pictures (P / 4), D output width.
"""

from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_gen.tensors.compat import ensure_torchvision

ensure_torchvision()

from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen  # noqa: E402
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index  # noqa: E402

VisionTower = qwen.Qwen2_5_VisionTransformerPretrainedModel
_attend_one_by_one = qwen.Qwen2_5_VLVisionAttention.forward


def vision_embeds(tower: VisionTower, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
    """Merged embeddings of all pictures, (N, D).

    pixel_values: (P, channels x 2 x patch x patch), in any float dtype. grid_thw: (pictures, 3).
    """
    grids = tuple(map(tuple, grid_thw.tolist()))
    layout = _layout(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size, pixel_values.device)
    # Where attention goes by length, bounds stay on the CPU: reading them from a GPU would stop it in every block.
    bounds_on = torch.device("cpu") if tower.config._attn_implementation == "sdpa" else pixel_values.device
    layout["cu_window_seqlens"] = layout["cu_window_seqlens"].to(bounds_on)
    return tower(pixel_values.to(tower.dtype), grid_thw=grid_thw.to(bounds_on), **layout).pooler_output


@lru_cache(maxsize=1024)
def grid_layout(grid: tuple[int, int, int], merge: int, window: int, patch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one picture: positions (patches, 2), order of merged tokens by window, patches up to each window's end."""
    grid_thw = torch.tensor([grid])
    order, ends = get_vision_window_index(grid_thw, merge, window, patch)
    return get_vision_position_ids(grid_thw, merge), order, ends[1:]


def _layout(
    grids: tuple[tuple[int, int, int], ...], merge: int, window: int, patch: int, device: torch.device
) -> dict[str, Tensor]:
    """What the tower would compute from the grids in a loop over pictures; bounds on the CPU.

    The loop here is over runs of pictures of one grid: a training batch has hundreds of pictures and few grids.
    """
    positions, order, ends, num_patches = [], [], [torch.zeros(1, dtype=torch.int32)], 0
    for grid, pictures in groupby(grids):
        of_grid, order_of_grid, ends_of_grid = grid_layout(grid, merge, window, patch)
        count = len(list(pictures))
        before = num_patches + len(of_grid) * torch.arange(count, dtype=torch.int32)[:, None]
        positions.append(of_grid.repeat(count, 1))
        order.append((order_of_grid + before // merge**2).flatten())
        ends.append((ends_of_grid + before).flatten())
        num_patches += count * len(of_grid)
    return {
        "position_ids": torch.cat(positions).to(device),
        "window_index": torch.cat(order).to(device),
        "cu_window_seqlens": torch.cat(ends),
    }


Runs = tuple[tuple[int, Tensor | None], ...]  # per length of runs: their places (runs, length); None: all are of it


def runs_by_length(bounds: list[int], device: torch.device) -> Runs:
    """Runs that lie one behind the other between these bounds, by length."""
    lengths = [end - start for start, end in pairwise(bounds)]
    if len(set(lengths)) == 1:
        return ((lengths[0], None),)
    runs = []
    for length in sorted(set(lengths)):
        starts = [start for start, own in zip(bounds, lengths, strict=False) if own == length]
        places = torch.tensor(starts)[:, None] + torch.arange(length)
        runs.append((length, places.to(device, non_blocking=True)))
    return tuple(runs)


def attend_by_length(query: Tensor, key: Tensor, value: Tensor, runs: Runs) -> Tensor:
    """Attention within runs of (T, heads, width), one call for all runs of a length: any device, dtype and gradient."""

    def attend(*of_runs: Tensor) -> Tensor:
        """(runs, length, heads, width) each."""
        q, k, v = (tensor.transpose(1, 2) for tensor in of_runs)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    if runs[0][1] is None:
        parts = (tensor.unflatten(0, (-1, runs[0][0])) for tensor in (query, key, value))
        return attend(*parts).flatten(0, 1)
    attended = torch.empty_like(value)
    for _, places in runs:
        assert places is not None
        attended = attended.index_copy(
            0, places.flatten(), attend(query[places], key[places], value[places]).flatten(0, 1)
        )
    return attended


def _attend(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **kwargs: Any
) -> Tensor:
    """Qwen2_5_VLVisionAttention.forward with one call of attention per length, whatever the number of sequences."""
    if self.config._attn_implementation != "sdpa":
        return _attend_one_by_one(self, hidden_states, cu_seqlens, position_embeddings, **kwargs)
    query, key, value = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
    query, key = qwen.apply_rotary_pos_emb_vision(query, key, *position_embeddings)

    runs = runs_by_length(cu_seqlens.tolist(), value.device)
    attended = attend_by_length(query, key, value, runs)
    return self.proj(attended.flatten(1))


qwen.Qwen2_5_VLVisionAttention.forward = _attend  # type: ignore[method-assign, assignment]
