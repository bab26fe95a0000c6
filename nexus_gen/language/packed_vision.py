"""Qwen2.5-VL's vision tower for embedding pictures in bulk: the same function as transformers', in few large kernels.

transformers runs one attention per window and lays out windows on the host at every call; at full size on an H200 that
is 100 pictures/s at 252 px whatever the batch. Here the windows of all pictures are packed into one attention call, the
layout of a batch's grids is computed once, gate and up projection are one product whose width is padded with zeros to
what 16-bit kernels need (3420 is no multiple of 8), and a block may be compiled. Inference only.

Legend: T patches of all pictures in window order, D hidden width, H heads, N merged tokens (T / 4), F MLP width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from nexus_gen.language.vision_tower import Runs, VisionTower, attend_by_length, grid_layout, runs_by_length

ALIGNMENT = 64  # elements; tensor-core kernels want rows of 128 bytes, and at least 16
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of Qwen2.5-VL's preprocessor_config.json, as all its checkpoints
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

Grid = tuple[int, int, int]  # frames, rows, columns of patches


class Segments(NamedTuple):
    """Which patches attend to each other: runs of T.

    cu_seqlens: (runs + 1,) int32 bounds on the device; longest: patches of the longest run. runs: the same by length;
    empty where the device has packed attention.
    """

    cu_seqlens: Tensor
    longest: int
    runs: Runs


class Layout(NamedTuple):
    """Of a batch's grids, on the device.

    order: (N,) merged token in window order -> its place in the input; inverse: back. cos, sin: (T, 1, head / 2)
    float32. windows, pictures: what attends to each other in most blocks and in the full-attention blocks.
    """

    order: Tensor
    inverse: Tensor
    cos: Tensor
    sin: Tensor
    windows: Segments
    pictures: Segments


class BlockWeights(NamedTuple):
    """gate_up: (2 F', D), down: (D, F') with F' >= F; the rest is the tower's own tensors."""

    norm1: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    norm2: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor
    down: Tensor
    down_bias: Tensor


@dataclass(frozen=True)
class _Sizes:
    num_heads: int
    merge: int
    window: int
    patch: int
    eps: float


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root mean square norm in float32, scaled in the input's dtype, as Qwen2 rounds it."""
    x = x_TD.float()
    return weight_D * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(x_TD.dtype)


def rotate(x_THC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in float32 of (T, H, head width); cos and sin: (T, 1, half of it)."""
    first, second = x_THC.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_THC.dtype)


def attend_packed(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Attention within runs of (T, H, head width) by torch's variable-length kernel (16-bit on CUDA)."""
    bounds, longest = segments.cu_seqlens, segments.longest
    attended: Any = varlen_attn(query, key, value, bounds, bounds, longest, longest)
    return attended


@torch.compiler.disable  # it would be compiled anew for every mixture of lengths
def attend_anywhere(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """The same on any device and in any dtype."""
    return attend_by_length(query, key, value, segments.runs)


def block(
    x_TD: Tensor,
    weights: BlockWeights,
    cos: Tensor,
    sin: Tensor,
    segments: Segments,
    num_heads: int,
    eps: float,
    attend: Callable[[Tensor, Tensor, Tensor, Segments], Tensor],
) -> Tensor:
    """One transformer block over T patches in window order."""
    normed = rms_norm(x_TD, weights.norm1, eps)
    query, key, value = F.linear(normed, weights.qkv, weights.qkv_bias).unflatten(-1, (3, num_heads, -1)).unbind(1)
    attended = attend(rotate(query, cos, sin), rotate(key, cos, sin), value, segments)
    x_TD = x_TD + F.linear(attended.flatten(1), weights.proj, weights.proj_bias)
    normed = rms_norm(x_TD, weights.norm2, eps)
    gate, up = F.linear(normed, weights.gate_up, weights.gate_up_bias).chunk(2, dim=-1)
    return x_TD + F.linear(F.silu(gate) * up, weights.down, weights.down_bias)


class PackedVisionTower:
    """A loaded tower's weights behind a faster forward for batches of pictures of any grids.

    tower: eval-mode tower of `load_vision_tower` or of a whole model. Its attention, norm and merger weights are
    shared; the MLP's are copied (fused), so a tower that nobody else holds gives back its own. compiled: compile block
    and merger, which serve every batch and take the better part of a minute on a GPU. pixel_mean, pixel_std: of the
    checkpoint's image processor, for pictures given as bytes.
    """

    def __init__(
        self,
        tower: VisionTower,
        *,
        compiled: bool = False,
        pixel_mean: Sequence[float] = PIXEL_MEAN,
        pixel_std: Sequence[float] = PIXEL_STD,
    ) -> None:
        config: Any = tower.config
        if config.hidden_act != "silu":
            raise ValueError(f"the vision tower's activation is {config.hidden_act}; this forward computes silu")
        first = next(tower.parameters())
        self.dtype, self.device = first.dtype, first.device
        self.sizes = _Sizes(
            config.num_heads, config.spatial_merge_size, config.window_size, config.patch_size, eps=1e-6
        )
        self.full_blocks = frozenset(config.fullatt_block_indexes)
        self.frames = config.temporal_patch_size
        self.channels = config.in_channels
        self.attend = attend_packed if has_packed_attention(self.dtype, self.device) else attend_anywhere
        self.alignment = ALIGNMENT if self.device.type == "cuda" and self.dtype.itemsize == 2 else 1
        with torch.no_grad():
            inv_freq: Any = tower.rotary_pos_emb.inv_freq
            self.inv_freq: Tensor = inv_freq.float().cpu()
            self.patch_weight = tower.patch_embed.proj.weight.flatten(1)
            # Both frames of a still picture are the same: their weights can be added beforehand.
            still = tower.patch_embed.proj.weight.float().sum(2).flatten(1).to(self.dtype)
            self.still_weight = F.pad(still, (0, -still.shape[1] % self.alignment))
            self.blocks = [self._weights(module) for module in tower.blocks]
            scale = torch.tensor([pixel_mean, pixel_std], device=self.device)[:, :, None, None] * 255
            self.pixel_mean, self.pixel_std = scale
        self._layout = lru_cache(maxsize=16)(self._compute_layout)
        # Two graphs serve every batch: what varies in size is marked, and `longest` becomes a symbol when it varies.
        # Past dynamo's limit of 8 graphs it would run uncompiled, with a mere warning.
        self._block: Callable[..., Tensor] = torch.compile(block) if compiled else block
        self._merge: Callable[[Tensor], Tensor] = torch.compile(tower.merger) if compiled else tower.merger

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Merged embeddings (N, D_out) of pictures in their order, in the tower's dtype.

        pixel_values: (patches, channels x 2 x patch x patch) as Qwen's processor lays them out; image_grid_thw:
        (pictures, 3), on the CPU or else read back from the device.
        """
        layout = self._layout(tuple((t, h, w) for t, h, w in image_grid_thw.tolist()))
        unit = self.sizes.merge**2
        pixels = pixel_values.to(self.device, self.dtype, non_blocking=True)
        in_windows = pixels.unflatten(0, (-1, unit))[layout.order].flatten(0, 1)
        return self._run(F.linear(in_windows, self.patch_weight), layout)[layout.inverse]

    @torch.no_grad()
    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Merged embeddings (B, N / B, D_out) of pictures of one size, in the tower's dtype.

        pictures: (B, 3, height, width) uint8 on any device, sides multiples of a merged patch. Scaling, normalising and
        cutting into patches happen on the tower's device, with the numbers of Qwen's processor.
        """
        sizes, (batch, _, height, width) = self.sizes, pictures.shape
        grid = (1, height // sizes.patch, width // sizes.patch)
        layout = self._layout((grid,) * batch)
        pixels = pictures.to(self.device, non_blocking=True).float()
        pixels = ((pixels - self.pixel_mean) / self.pixel_std).to(self.dtype)
        merge, patch = sizes.merge, sizes.patch
        patches = pixels.view(
            batch, self.channels, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
        ).permute(0, 2, 5, 3, 6, 1, 4, 7)  # batch, merged rows and columns, 2 x 2 patches, channels, pixels of a patch
        in_windows = patches.reshape(-1, merge**2, self.channels * patch**2)[layout.order].flatten(0, 1)
        in_windows = F.pad(in_windows, (0, self.still_weight.shape[1] - in_windows.shape[1]))
        embeds = self._run(F.linear(in_windows, self.still_weight), layout)
        return embeds[layout.inverse].unflatten(0, (batch, -1))

    def _run(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """Blocks and merger, in window order: (N, D_out)."""
        torch._dynamo.maybe_mark_dynamic(x_TD, 0)
        for index, weights in enumerate(self.blocks):
            segments = layout.pictures if index in self.full_blocks else layout.windows
            x_TD = self._block(
                x_TD, weights, layout.cos, layout.sin, segments, self.sizes.num_heads, self.sizes.eps, self.attend
            )
        return self._merge(x_TD)

    def _weights(self, module: Any) -> BlockWeights:
        attention, mlp = module.attn, module.mlp
        extra = -mlp.gate_proj.weight.shape[0] % self.alignment

        def padded_rows(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor.new_zeros(extra, *tensor.shape[1:])])

        return BlockWeights(
            norm1=module.norm1.weight.detach(),
            qkv=attention.qkv.weight.detach(),
            qkv_bias=attention.qkv.bias.detach(),
            proj=attention.proj.weight.detach(),
            proj_bias=attention.proj.bias.detach(),
            norm2=module.norm2.weight.detach(),
            gate_up=torch.cat([padded_rows(mlp.gate_proj.weight), padded_rows(mlp.up_proj.weight)]),
            gate_up_bias=torch.cat([padded_rows(mlp.gate_proj.bias), padded_rows(mlp.up_proj.bias)]),
            down=F.pad(mlp.down_proj.weight.detach(), (0, extra)),
            down_bias=mlp.down_proj.bias.detach(),
        )

    def _compute_layout(self, grids: tuple[Grid, ...]) -> Layout:
        """What the blocks need to know of a batch's grids; the last 16 batches' are kept."""
        sizes = self.sizes
        orders, positions, windows, pictures, tokens = [], [], [], [], 0
        for grid in grids:
            of_grid, order, ends = grid_layout(grid, sizes.merge, sizes.window, sizes.patch)
            orders.append(order + tokens)
            positions.append(of_grid.unflatten(0, (-1, sizes.merge**2))[order].flatten(0, 1))
            windows.append(ends.diff(prepend=ends.new_zeros(1)).long())
            pictures += [grid[1] * grid[2]] * grid[0]
            tokens += len(order)
        order = torch.cat(orders)
        angles = torch.cat(positions)[:, :, None] * self.inv_freq  # (T, 2, head / 4): rows, then columns
        angles = angles.flatten(1)[:, None]
        cos, sin = angles.cos().to(self.device), angles.sin().to(self.device)
        for table in (cos, sin):
            torch._dynamo.maybe_mark_dynamic(table, 0)
        return Layout(
            order=order.to(self.device),
            inverse=order.argsort().to(self.device),
            cos=cos,
            sin=sin,
            windows=self._segments(torch.cat(windows)),
            pictures=self._segments(torch.tensor(pictures)),
        )

    def _segments(self, lengths: Tensor) -> Segments:
        """Of runs of these lengths, one behind the other."""
        bounds = F.pad(lengths.cumsum(0), (1, 0))
        cu_seqlens = bounds.to(self.device, torch.int32)
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
        runs = runs_by_length(bounds.tolist(), self.device) if self.attend is attend_anywhere else ()
        return Segments(cu_seqlens, int(lengths.max()), runs)


def has_packed_attention(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's variable-length attention runs there: 16 bits on a GPU of compute capability 8 or more."""
    return device.type == "cuda" and dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (8, 0)
