"""What a frozen vision tower said of pictures, kept in memory: an epoch after the first does not run it again.

On two cores a frozen tower is a quarter of a training step of the shipped model. Keys are what the tower reads, so that
a picture that changed is another picture.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

TOWER_CACHE_BYTES = 512_000_000  # of a process in training: ten thousand pictures of the shipped model
Tower = Callable[[Tensor, Tensor], Tensor]  # pixel_values (patches, ...), image_grid_thw (images, 3) -> (N, D)


class TowerCache:
    """Embeddings of pictures by their patches and grid; beyond `max_bytes` those that were not asked for longest go.

    Each picture goes through the tower alone: its numbers do not depend on what else is in its batch, or on whether it
    was remembered, so a resumed run computes what an uninterrupted one does.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_computed = 0
        self._embeds: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, tower: Tower, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """The tower's embeddings of all pictures, (N, D), without a graph."""
        grids = image_grid_thw.cpu()
        patches = pixel_values.split(grids.prod(dim=1).tolist())
        return torch.cat([self._of(tower, one, grid[None]) for one, grid in zip(patches, grids, strict=True)])

    def _of(self, tower: Tower, patches: Tensor, grid: Tensor) -> Tensor:
        key = hashlib.blake2b(
            patches.contiguous().view(torch.uint8).cpu().numpy().tobytes() + grid.numpy().tobytes(), digest_size=20
        ).digest()
        if key in self._embeds:
            self._embeds.move_to_end(key)
            return self._embeds[key]
        with torch.no_grad():
            embeds = tower(patches, grid)
        self.num_computed += 1
        self._embeds[key] = embeds
        self.num_bytes += embeds.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._embeds.popitem(last=False)[1].nbytes
        return embeds
