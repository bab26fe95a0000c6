"""What the models paint and imagine of held-out rows, found again among their pictures by the vision tower."""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data.messages.rows import Row
from nexus_gen.pictures.framing import Frame
from nexus_gen.pictures.images import open_image
from train.evaluate.own_rows import KnownPictures
from train.evaluate.rows import KnownPicture

if TYPE_CHECKING:
    from torch import Tensor

    from nexus_gen.inference import NexusGen


class PictureFinder:
    """Compares pictures and embeddings with those of held-out rows, which are embedded when a task needs them first."""

    def __init__(
        self,
        known: Mapping[str, Sequence[KnownPicture]],
        for_probe: Mapping[str, Sequence[KnownPicture]],
        keys: Mapping[str, str],
        batch_size: int,
    ) -> None:
        """known: task -> its distinct pictures. for_probe: task -> pictures that teach the probes alone.

        keys: row -> the picture that it makes. batch_size: of the vision tower.
        """
        self._known = known
        self._for_probe = for_probe
        self._keys = keys
        self._batch_size = batch_size
        self._embeds: dict[str, np.ndarray] = {}  # task -> (G, N, D)
        self._pictures: dict[str, KnownPictures] = {}

    def imagined(self, model: "NexusGen", rows: Sequence[Row], embeds: "Tensor") -> list[dict[str, Any] | None]:
        """What `KnownPictures.compare` says of embeddings, (B, N, D), of the pictures that rows of one task make.

        None for all where a task has no two pictures.
        """
        task = rows[0].task
        if len(self._known.get(task, ())) < 2:
            return [None] * len(rows)
        if task not in self._pictures:
            pictures = [*self._known[task], *self._for_probe.get(task, ())]
            print(f"{task}: looking at {len(pictures)} pictures to find painted ones among", file=sys.stderr)
            parts = [pictures[first : first + self._batch_size] for first in range(0, len(pictures), self._batch_size)]
            self._embeds[task] = np.concatenate(
                [embedded(model, task, [open_image(picture.image) for picture in part]) for part in parts]
            )
            self._pictures[task] = KnownPictures(self._known[task], self._embeds[task], self._for_probe.get(task, ()))
        place = {picture.key: number for number, picture in enumerate(self._known[task])}
        keys = [self._keys[row.id] for row in rows]
        own = [
            self._embeds[task][place[key]] if key in place else embedded(model, task, [open_image(row.images[-1])])[0]
            for key, row in zip(keys, rows, strict=True)
        ]
        return list(self._pictures[task].compare(as_array(embeds), keys, np.stack(own)))

    def painted(
        self, model: "NexusGen", rows: Sequence[Row], pictures: Sequence[Image.Image]
    ) -> list[dict[str, Any] | None]:
        """The same of pictures."""
        if len(self._known.get(rows[0].task, ())) < 2:
            return [None] * len(rows)
        return self.imagined(model, rows, model.target_embeds(*shown(model, rows[0].task, pictures)))


def shown(model: "NexusGen", task: str, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures as the models see them: those of edits in the frame of the edit."""
    if task != "editing":
        return list(pictures)
    return [Frame.of(picture.size, model.details).fit(picture) for picture in pictures]


def embedded(model: "NexusGen", task: str, pictures: Sequence[Image.Image]) -> np.ndarray:
    """(B, N, D), what the language model aims at for these pictures."""
    return as_array(model.target_embeds(*shown(model, task, pictures)))


def as_array(embeds: "Tensor") -> np.ndarray:
    return embeds.float().cpu().numpy()
