"""The packed tower against transformers' own, in float32 on the CPU."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from nexus_gen.language import packed_vision
from nexus_gen.language.packed_vision import PackedVisionTower, VisionTower

TOLERANCE = 1e-5  # relative, float32; measured worst 1.1e-6
GRIDS = {
    "one picture of 252 px": [(1, 18, 18)],
    "one window for all": [(1, 36, 36)],
    "pictures of one size": [(1, 18, 18)] * 5,
    "windows of every size": [(1, 18, 18), (1, 36, 36), (1, 2, 2), (1, 8, 8), (1, 4, 60), (1, 22, 14), (1, 16, 16)],
    "two frames": [(2, 10, 12), (1, 6, 6)],
}


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    """Qwen's patch and window sizes, few and narrow blocks, an MLP width that is no multiple of 8."""
    config = Qwen2_5_VLVisionConfig(
        depth=4,
        hidden_size=64,
        intermediate_size=101,
        num_heads=4,
        patch_size=14,
        window_size=112,
        fullatt_block_indexes=[1, 3],
        out_hidden_size=96,
    )
    torch.manual_seed(0)
    return VisionTower._from_config(config, dtype=torch.float32).eval()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def patches(grids: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    count = sum(frames * rows * columns for frames, rows, columns in grids)
    return torch.randn(count, 3 * 2 * 14**2, generator=generator), torch.tensor(grids)


@torch.no_grad()
@pytest.mark.parametrize("case", GRIDS)
def test_it_computes_what_the_tower_computes(tower: VisionTower, case: str) -> None:
    pixel_values, grid = patches(GRIDS[case])
    expected = tower(pixel_values, grid_thw=grid).pooler_output
    packed = PackedVisionTower(tower)
    assert_near(packed(pixel_values, grid), expected)
    assert_near(packed(pixel_values, grid), expected)  # from the layout that it remembers


@torch.no_grad()
def test_a_padded_mlp_changes_nothing(tower: VisionTower) -> None:
    pixel_values, grid = patches(GRIDS["windows of every size"])
    packed = PackedVisionTower(tower)
    packed.alignment = packed_vision.ALIGNMENT
    packed.blocks = [packed._weights(module) for module in tower.blocks]
    assert packed.blocks[0].down.shape == (64, 128)
    assert_near(packed(pixel_values, grid), tower(pixel_values, grid_thw=grid).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize(("width", "height"), [(252, 252), (280, 140)])
def test_pictures_go_in_as_bytes(tower: VisionTower, width: int, height: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 3, height, width), dtype=np.uint8)
    features = Qwen2VLImageProcessor(patch_size=14)(
        images=[Image.fromarray(picture.transpose(1, 2, 0)) for picture in pictures],
        do_resize=False,
        return_tensors="pt",
    )
    expected = tower(features["pixel_values"], grid_thw=features["image_grid_thw"]).pooler_output
    embeds = PackedVisionTower(tower).embed_pictures(torch.from_numpy(pictures))
    assert embeds.shape == (3, width * height // 28**2, 96)
    assert_near(embeds.flatten(0, 1), expected)
