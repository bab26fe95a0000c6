"""Where a hash occurred first: 16 bytes a hash, so that hundreds of millions fit into a machine's memory."""

import numpy as np

Hashes = np.ndarray  # (n,) uint64
Places = np.ndarray  # (n,) uint64, what the caller numbers places by


class FirstPlaces:
    """A map from 64-bit hashes to the first place of each, in sorted runs that are merged as they double."""

    def __init__(self) -> None:
        self._runs: list[tuple[Hashes, Places]] = []

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _ in self._runs)

    def find(self, hashes: Hashes) -> tuple[np.ndarray, Places]:
        """Which hashes (n,) are known, as booleans, and their first places (0 where unknown)."""
        known, places = np.zeros(len(hashes), dtype=bool), np.zeros(len(hashes), dtype=np.uint64)
        for run, run_places in self._runs:
            at = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            hit = run[at] == hashes
            known |= hit
            places[hit] = run_places[at[hit]]
        return known, places

    def add(self, hashes: Hashes, places: Places) -> Places:
        """The first place of each hash (n,): its own where it is new."""
        if not len(hashes):
            return places
        unique, index, inverse = np.unique(hashes, return_index=True, return_inverse=True)
        known, first = self.find(unique)
        first = np.where(known, first, places[index])
        if not known.all():
            self._runs.append((unique[~known], first[~known]))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (a, a_places), (b, b_places) = self._runs[-2:]
            merged, merged_places = np.concatenate([a, b]), np.concatenate([a_places, b_places])
            order = np.argsort(merged, kind="stable")
            self._runs[-2:] = [(merged[order], merged_places[order])]
        return first[inverse]
