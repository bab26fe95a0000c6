"""The tower over many pictures at once against transformers' own loop over them."""

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from nexus_gen.language import vision_tower
from nexus_gen.language.vision_tower import VisionTower, vision_embeds


@pytest.mark.parametrize("grids", [[[1, 18, 18]] * 3, [[1, 18, 18], [1, 8, 12], [1, 18, 18], [1, 36, 36]]])
def test_pictures_at_once_are_embedded_as_one_by_one(grids: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=24, patch_size=4, window_size=32
    )
    config.fullatt_block_indexes = [1]
    config._attn_implementation = "sdpa"
    tower = VisionTower(config)
    grid_thw = torch.tensor(grids)
    pixels = torch.randn(int(grid_thw.prod(1).sum()), 3 * 2 * 4 * 4)
    together = vision_embeds(tower, pixels, grid_thw)
    together.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    tower.zero_grad()
    monkeypatch.setattr(vision_tower.qwen.Qwen2_5_VLVisionAttention, "forward", vision_tower._attend_one_by_one)
    wanted = tower(pixels, grid_thw=grid_thw).pooler_output
    wanted.square().sum().backward()
    torch.testing.assert_close(together, wanted, rtol=1e-5, atol=1e-6)
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
