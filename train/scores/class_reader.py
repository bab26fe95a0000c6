"""Which prompt, or label, a picture would have had, read from its embeddings by a linear probe. Arrays only, no torch.

The nearest picture is no good reader where pictures of one kind differ in colour and place; a probe that is fitted to
the same held-out pictures is a better one (docs/evaluation.md has figures). It never reads a picture that it was
fitted to: the row's own true picture is left out of each fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RIDGE = 0.1  # of the mean squared length of the features
MIN_NAMES = 2  # fewer, and every reading is right


@dataclass(frozen=True)
class Reading:
    """name: that the probe reads. right: whether it is one of the true picture's. chance: of names by their frequency.

    true_right: whether the same probe reads the true picture itself right, so what a perfect picture could expect.
    """

    name: str
    right: bool
    chance: float
    true_right: bool


def features_of(embeds: np.ndarray) -> np.ndarray:
    """(B, N, D) -> (B, 4D): mean, spread, greatest and least value over the tokens, whatever their places."""
    parts = (embeds.mean(axis=1), embeds.std(axis=1), embeds.max(axis=1), embeds.min(axis=1))
    return np.concatenate(parts, axis=1).astype(np.float64)


class ClassReader:
    """A ridge regression from features of pictures to their names, solved anew without each own picture."""

    def __init__(self, keys: Sequence[str], features: np.ndarray, names: Sequence[frozenset[str]]) -> None:
        """keys: of G distinct pictures. features: (G, F). names: of each; a picture without any is not fitted."""
        chosen = [number for number, of_picture in enumerate(names) if of_picture]
        self._keys = np.array([keys[number] for number in chosen])
        self._names_of = {keys[number]: names[number] for number in chosen}
        self.names = sorted({name for of_picture in names for name in of_picture})
        of_keys = [[name in self._names_of[key] for name in self.names] for key in self._keys]
        self._targets = np.array(of_keys, dtype=np.float64)
        fitted = features[chosen]
        self._centre = fitted.mean(axis=0) if chosen else 0.0
        self._scale = np.maximum(fitted.std(axis=0), 1e-6) if chosen else 1.0
        self._fitted = self._standard(fitted)

    def read(self, features: np.ndarray, own: str, own_features: np.ndarray) -> Reading | None:
        """A picture, (F,), that should show what the known picture `own` does; None where no other shares its name."""
        true = self._names_of.get(own, frozenset())
        others = self._keys != own
        targets = self._targets[others] if others.any() else np.zeros((0, len(self.names)))
        shares = targets.sum(axis=0) / max(targets.sum(), 1.0)
        chance = float(sum(shares[self.names.index(name)] for name in true))
        if len(self.names) < MIN_NAMES or not chance:
            return None
        fitted = self._fitted[others]
        centre, mean = fitted.mean(axis=0), targets.mean(axis=0)
        centred = fitted - centre
        kernel = centred @ centred.T
        kernel[np.diag_indices_from(kernel)] += RIDGE * np.trace(kernel) / len(kernel)
        weights = centred.T @ np.linalg.solve(kernel, targets - mean)
        scores = (self._standard(np.stack([features, own_features])) - centre) @ weights + mean
        read, read_of_true = (self.names[place] for place in scores.argmax(axis=1))
        return Reading(read, read in true, chance, read_of_true in true)

    def _standard(self, features: np.ndarray) -> np.ndarray:
        """Features of about one size, and of pictures all of one length."""
        scaled = (features - self._centre) / self._scale
        return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)
