"""Pictures found again among others by their embeddings, with what chance would give. Arrays only, no torch here.

Legend: B pictures in question, G pictures to find them among, N embeddings of a picture, D their width. Every picture
in question has one of its own, the true one, by content: rows often show one picture under several names.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """How near an embedded picture is to its own among others.

    cosine_distance, mse: to its own, means over tokens. chance_*: the same to all others, on average. rank: 1 + the
    others that are at least as near, so a tie is a miss. among: distinct pictures, its own with them. nearest: the key
    of the nearest one.
    """

    cosine_distance: float
    mse: float
    chance_cosine_distance: float
    chance_mse: float
    rank: int
    among: int
    nearest: str


class Gallery:
    """Distinct pictures by their embeddings."""

    def __init__(self, keys: Sequence[str], embeds: np.ndarray) -> None:
        """keys: G distinct ones, of content. embeds: (G, N, D). Raises ValueError for a key that is there twice."""
        if len(set(keys)) < len(keys):
            raise ValueError("a gallery holds each picture once")
        self.keys = list(keys)
        self._units_NGD, self._norms_NG = _by_token(embeds)

    def compare(self, embeds: np.ndarray, own: Sequence[str], own_embeds: np.ndarray) -> list[Comparison]:
        """embeds, own_embeds: (B, N, D), of the pictures in question and of their own ones, whose keys are `own`.

        Raises ValueError where a picture would have no other beside its own.
        """
        units_NBD, norms_NB = _by_token(embeds)
        own_units_NBD, own_norms_NB = _by_token(own_embeds)
        width = embeds.shape[-1]
        cosines_NBG = units_NBD @ self._units_NGD.transpose(0, 2, 1)
        distances_BG = 1 - cosines_NBG.mean(axis=0)
        errors_BG = _mse(cosines_NBG, norms_NB[:, :, None], self._norms_NG[:, None], width)
        own_cosines_NB = (units_NBD * own_units_NBD).sum(axis=-1)
        own_errors_B = _mse(own_cosines_NB, norms_NB, own_norms_NB, width)
        keys = np.array(self.keys)
        found = []
        for number, key in enumerate(own):
            others = keys != key
            if not others.any():
                raise ValueError("a gallery of one picture has no other to compare with")
            distances, own_distance = distances_BG[number][others], float(1 - own_cosines_NB[:, number].mean())
            nearest = int(distances.argmin())
            found.append(
                Comparison(
                    cosine_distance=own_distance,
                    mse=float(own_errors_B[number]),
                    chance_cosine_distance=float(distances.mean()),
                    chance_mse=float(errors_BG[number][others].mean()),
                    rank=1 + int((distances <= own_distance).sum()),
                    among=1 + int(others.sum()),
                    nearest=str(keys[others][nearest]) if distances[nearest] <= own_distance else key,
                )
            )
        return found


def _by_token(embeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, N, D) -> directions (N, B, D) and lengths (N, B)."""
    tokens = np.ascontiguousarray(embeds.astype(np.float32).transpose(1, 0, 2))
    norms = np.linalg.norm(tokens, axis=-1)
    return tokens / np.maximum(norms, 1e-12)[..., None], norms


def _mse(cosines: np.ndarray, norms: np.ndarray, others: np.ndarray, width: int) -> np.ndarray:
    """Mean squared difference of vectors by their cosines and lengths, over tokens (the first axis) and width."""
    return (norms**2 + others**2 - 2 * norms * others * cosines).mean(axis=0) / width
