"""Averages over neighbours as the selection sees them: components, neighbours and steps chosen by the gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from .._blocks import Chunks, Survey
from .._counts import column_sums, row_sums
from .._loss import Gain, held_out_gain, held_out_probabilities
from .._random import RandomState
from ._autoencoder import set_aside
from ._base import Half, Sample
from ._neighbors import DiffusionDenoiser, KNNDenoiser, diffusion_walk, nearest, uniform_walk, walked
from ._pca import PCADenoiser
from ._profiles import LowRankProfiles

Kind = Literal["knn", "diffusion"]
GRIDS: dict[Kind, dict[str, tuple[int, ...]]] = {
    "knn": {"n_pcs": (15, 30), "n_neighbors": (10, 20, 40, 80), "t": (1,)},
    "diffusion": {"n_pcs": (15, 30), "n_neighbors": (8, 15, 30, 60), "t": (1, 2, 3, 4, 5, 6, 7, 8)},
}
"""What is compared unless others are given."""

_ENOUGH_CELLS = 20_000  # to choose by


@dataclass(eq=False)
class NeighborsMember:
    """The mean of a cell's neighbours, or a walk among them.

    How many components, neighbours and steps is chosen with nine tenths of the molecules seen and the rest held out: a
    choice made on halves would be that for halves, which need larger averages. What it may tell of a half's
    held-out molecules is which of a few settings was best.

    Attributes
    ----------
    kind
        `"knn"` or `"diffusion"`, its name too.
    n_components
        Principal components whose coordinates are averaged.
    genes
        As in `KNNDenoiser.fit`.
    grid
        Values of `n_pcs`, `n_neighbors` or `t` to choose from; those of `GRIDS` where it has none.
    """

    kind: Kind
    n_components: int
    genes: np.ndarray | None = None
    grid: Mapping[str, Sequence[int]] = field(default_factory=dict)
    enough_cells: int | None = _ENOUGH_CELLS
    predicts_others: bool = False
    _tried: dict[tuple[int, int, int], Gain] = field(default_factory=dict)  # by (n_pcs, n_neighbors, t)
    _fits: list[LowRankProfiles] = field(default_factory=list)
    _cells: np.ndarray = field(default_factory=lambda: np.zeros(0, np.intp))

    @property
    def name(self) -> str:
        """See `Member`."""
        return self.kind

    @property
    def title(self) -> str:
        """See `Member`."""
        return self.kind

    def described(self, setting: str, rank: int) -> str:
        """See `Member`."""
        what = {"diffusion": "a diffusion among neighbouring cells", "knn": "the mean of neighbouring cells"}
        return f"{what[self.kind]} ({setting})"

    @property
    def settings(self) -> tuple[str, ...]:
        """The one that was chosen, e.g. ``"30 PCs, 15 neighbors, t 2"``."""
        if not self._tried:
            return ()
        n_pcs, n_neighbors, t = self._chosen
        return (f"{n_pcs} PCs, {n_neighbors} neighbors" + (f", t {t}" if self.kind == "diffusion" else ""),)

    @property
    def _chosen(self) -> tuple[int, int, int]:
        return max(self._tried, key=lambda setting: self._tried[setting].mean)

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:
        """See `Member`. One search serves every number of neighbours, and one walk every t, as long as it gains."""
        if counts.shape[0] > _ENOUGH_CELLS:
            counts = counts[np.sort(rng.choice(counts.shape[0], _ENOUGH_CELLS, replace=False))]
        seen, aside = set_aside(counts, np.arange(counts.shape[0]), rng)
        seen = seen.copy()
        seen.eliminate_zeros()
        share, size = column_sums(seen) / seen.sum(), row_sums(seen)
        pca = PCADenoiser("log1p", n_components=self.n_components, n_passes=3, random_state=rng).fit(seen, self.genes)
        start = pca.coordinates(seen)
        grid = self._grid(counts.shape[0])
        for n_pcs in grid["n_pcs"]:
            distances, neighbors = nearest(start[:, :n_pcs], max(grid["n_neighbors"]), rng)
            for n_neighbors in grid["n_neighbors"]:
                if self.kind == "knn":
                    walk = uniform_walk(neighbors[:, :n_neighbors], size)
                else:
                    walk = diffusion_walk(distances[:, : n_neighbors + 1], neighbors[:, : n_neighbors + 1], size)
                steps, last = start, -np.inf
                for before, t in zip([0, *grid["t"]], grid["t"], strict=False):
                    steps = walked(walk, steps, t - before)
                    probabilities = held_out_probabilities(pca.rebuild(steps, size, n_rounds=1), aside)
                    gain = self._tried[n_pcs, n_neighbors, t] = held_out_gain(probabilities, aside, share)
                    if gain.mean < last:
                        break
                    last = gain.mean

    def learn(self, half: Half, rng: np.random.Generator) -> None:
        """See `Member`."""
        self._fits.append(self._fit(half.seen, rng, n_rounds=1))
        self._cells = half.cells

    def learn_all(self, chunks: Chunks, keys: Sequence[int], rng: np.random.Generator) -> None:
        """See `Member`; there is nothing more to learn."""

    def forget(self) -> None:
        """See `Member`."""
        self._fits.clear()

    def settle(self, setting: str, sample: Sample) -> None:
        """See `Member`; there is nothing that they share."""

    def predict(self, half: int, setting: str, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        """See `Member`; the cells are some of those that the half was learned from."""
        return self._fits[half].of_cells(np.searchsorted(self._cells, cells))

    def refit(self, survey: Survey, setting: str, rng: np.random.Generator) -> LowRankProfiles:
        """See `Member`."""
        return self._fit(survey.chunks.in_memory(), rng)

    def record(self, setting: str) -> dict[str, object]:
        """See `Member`."""
        best, gains = self._tried[self._chosen], self._tried.values()
        table = pd.DataFrame(list(self._tried), columns=["n_pcs", "n_neighbors", "t"])
        table["loss"] = [-gain.mean for gain in gains]
        table["error"] = [gain.error_of_difference(best) for gain in gains]
        table["gain"] = [gain.mean for gain in gains]
        table["chosen"] = [tried == self._chosen for tried in self._tried]
        return {"rank": self._chosen[0], "table": table}

    def _grid(self, n_cells: int) -> dict[str, list[int]]:
        """Return what there is to choose from, the usual values as far as there are cells and components for them."""
        bounds = {"n_pcs": self.n_components, "n_neighbors": n_cells - 1}
        usual = {
            name: {min(value, bounds.get(name, value)) for value in values} for name, values in GRIDS[self.kind].items()
        }
        return {name: sorted(values) for name, values in {**usual, **self.grid}.items()}

    def _fit(self, counts: sp.csr_matrix, rng: RandomState, n_rounds: int | None = None) -> LowRankProfiles:
        n_pcs, n_neighbors, t = self._chosen
        options: dict[str, Any] = {"n_pcs": n_pcs, "n_components": self.n_components, "random_state": rng}
        if self.kind == "knn":
            return KNNDenoiser(n_neighbors, **options).fit(counts, self.genes).predict(counts, n_rounds=n_rounds)
        fitted = DiffusionDenoiser(n_neighbors, **options).fit(counts, self.genes)
        return fitted.predict(counts, t=t, n_rounds=n_rounds)
