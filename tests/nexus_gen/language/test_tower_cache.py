"""The cache of a frozen tower: what it gives is what the tower says, it asks once, and it stays within its bound."""

import torch
from tiny_language import tiny

from nexus_gen.language.tower_cache import TowerCache
from nexus_gen.language.vision_tower import vision_embeds

GRIDS = torch.tensor([[1, 4, 4], [1, 2, 6], [1, 4, 4]])  # 16 + 12 + 16 patches: 4 + 3 + 4 tokens


def pictures(seed: int) -> torch.Tensor:
    return torch.randn(44, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed))


def test_embeddings_are_the_towers_own() -> None:
    model = tiny(32)
    model.requires_grad_(False)
    pixel_values = pictures(0)
    expected = vision_embeds(model.model.visual, pixel_values, GRIDS)
    model.tower_cache = TowerCache(10**6)
    for _ in range(2):  # computed, then remembered
        worst = (model.vision_embeds(pixel_values, GRIDS) - expected).abs().max()
        assert worst < 2e-6  # measured: 3e-7, as pictures go through the tower one by one
    assert model.tower_cache.num_computed == 3


def test_numbers_do_not_depend_on_the_rest_of_the_batch() -> None:
    tower = tiny(32).model.visual
    pixel_values = pictures(1)

    def embeds(patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return vision_embeds(tower, patches, grids)

    together = TowerCache(10**6)(embeds, pixel_values, GRIDS)
    alone = TowerCache(10**6)(embeds, pixel_values[16:28], GRIDS[1:2])
    assert torch.equal(together[4:7], alone)


def test_a_tower_that_learns_is_always_asked() -> None:
    model = tiny(32)
    model.tower_cache = TowerCache(10**6)
    assert model.vision_embeds(pictures(2), GRIDS).requires_grad
    assert model.tower_cache.num_computed == 0


def test_another_picture_or_grid_is_another_entry_and_the_oldest_goes() -> None:
    asked: list[tuple[float, int]] = []

    def tower(patches: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        asked.append((float(patches[0, 0]), int(grid[0, 1])))
        return patches[:2, :4]  # 32 bytes

    cache = TowerCache(64)
    flat, tall = torch.tensor([[1, 2, 4]]), torch.tensor([[1, 4, 2]])

    def ask(value: float, grid: torch.Tensor = flat) -> None:
        cache(tower, torch.full((8, 4), value), grid)

    ask(1.0), ask(2.0), ask(1.0)
    assert asked == [(1.0, 2), (2.0, 2)] and cache.num_bytes == 64
    ask(1.0, tall)  # 2 goes: 1 was asked for since
    assert asked[2:] == [(1.0, 4)] and cache.num_bytes == 64
    ask(1.0), ask(2.0)
    assert asked[3:] == [(2.0, 2)]
