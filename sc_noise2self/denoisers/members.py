"""Denoisers as the selection sees them: learned from one half, predicting the other, refitted to all molecules.

A member knows how it may be set (`settings`) and what it learned from each half; the selection knows neither PCA
nor any other denoiser. A new denoiser joins by a class with these methods.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import scipy.sparse as sp

from ..counts import column_sums, row_sums
from ..transform import TransformName
from .pca import PCADenoiser, shrinkage
from .profiles import LowRankProfiles

_STRENGTHS = (1.0, 2.0, 4.0, 8.0)  # of `shrinkage` at the depth of a half; 1 is least squares


@dataclass(frozen=True, eq=False)
class Half:
    """One direction of a split: the part that is seen, the part that is held out, and the fold of each cell."""

    seen: sp.csr_matrix
    held_out: sp.csr_matrix
    folds: np.ndarray


class Member(Protocol):
    """A denoiser and the ways in which it may be set."""

    @property
    def name(self) -> str:
        """Of the member, in labels and records."""
        ...

    @property
    def settings(self) -> tuple[str, ...]:
        """The ways to set it; members are compared at the first before they are tuned."""
        ...

    def learn(self, half: Half, rng: np.random.Generator) -> None:
        """Learn from `half.seen`, and, per fold of cells, what `half.held_out` says of the settings."""
        ...

    def predict(self, half: int, setting: str, cells: np.ndarray) -> LowRankProfiles:
        """Return profiles of these cells from the seen part of that half; no fold is used on its own cells."""
        ...

    def refit(self, counts: sp.csr_matrix, setting: str, rng: np.random.Generator) -> LowRankProfiles:
        """Return profiles of all cells, fitted to all molecules."""
        ...

    def record(self, setting: str) -> dict[str, object]:
        """Return what is worth writing down of the choice: numbers, strings and arrays."""
        ...


@dataclass(eq=False)
class MeanMember:
    """Every cell has the mean profile: what any denoiser must beat."""

    name: str = "mean"
    settings: tuple[str, ...] = ("as it is",)
    _halves: list[Half] = field(default_factory=list)

    def learn(self, half: Half, rng: np.random.Generator) -> None:
        """See `Member`."""
        self._halves.append(half)

    def predict(self, half: int, setting: str, cells: np.ndarray) -> LowRankProfiles:
        """See `Member`."""
        seen = self._halves[half].seen
        return _mean_profiles(row_sums(seen[cells]), column_sums(seen))

    def refit(self, counts: sp.csr_matrix, setting: str, rng: np.random.Generator) -> LowRankProfiles:
        """See `Member`."""
        return _mean_profiles(row_sums(counts), column_sums(counts))

    def record(self, setting: str) -> dict[str, object]:
        """See `Member`."""
        return {"rank": 0}


@dataclass(eq=False)
class PCAMember:
    """PCA regression in one transform; it is set by how its components are weighted.

    ``"cut"`` gives weight 1 to components worth more than half, 0 to the rest; ``"shrinkage 2"`` shrinks them by
    `shrinkage` of that strength. Both are carried to the depth of all molecules, where noise is half as large.
    """

    transform: TransformName
    n_components: int
    genes: np.ndarray | None = None
    _fits: list[tuple[PCADenoiser, Half, np.ndarray]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """E.g. ``"pca log1p"``."""
        return f"pca {self.transform}"

    @property
    def settings(self) -> tuple[str, ...]:
        """See `Member`."""
        return ("shrinkage 2", "cut", *(f"shrinkage {s:g}" for s in _STRENGTHS if s != 2))

    def learn(self, half: Half, rng: np.random.Generator) -> None:
        """See `Member`."""
        denoiser = PCADenoiser(self.transform, n_components=self.n_components, n_iter=3, random_state=rng)
        denoiser.fit(half.seen, self.genes)
        self._fits.append((denoiser, half, denoiser.worth(half.seen, half.held_out, half.folds)))

    def predict(self, half: int, setting: str, cells: np.ndarray) -> LowRankProfiles:
        """See `Member`."""
        denoiser, learned, worth = self._fits[half]
        weights = np.array([component_weights(fold, setting, noise=1) for fold in worth])
        return denoiser.predict(learned.seen[cells], weights[1 - learned.folds[cells]], n_rounds=1)

    def refit(self, counts: sp.csr_matrix, setting: str, rng: np.random.Generator) -> LowRankProfiles:
        """See `Member`."""
        denoiser = PCADenoiser(self.transform, n_components=self.n_components, random_state=rng)
        return denoiser.fit(counts, self.genes).predict(counts, self.full_depth_weights(setting))

    def record(self, setting: str) -> dict[str, object]:
        """See `Member`."""
        worth = self._worth()
        return {
            "rank": int((shrinkage(worth, 0.5) > 0.5).sum()),
            "worth": worth,
            "weights": self.full_depth_weights(setting),
        }

    def full_depth_weights(self, setting: str) -> np.ndarray:
        """Return the weight of each component in a fit to all molecules, shape (k,)."""
        return component_weights(self._worth(), setting, noise=0.5)

    def _worth(self) -> np.ndarray:
        return np.mean([worth.mean(axis=0) for _, _, worth in self._fits], axis=0)


def component_weights(worth: np.ndarray, setting: str, noise: float) -> np.ndarray:
    """Return the weights of components, at a depth where noise is `noise` times that of the halves `worth` is from."""
    if setting == "cut":
        return (shrinkage(worth, noise) > 0.5).astype(np.float64)
    return shrinkage(worth, noise * float(setting.removeprefix("shrinkage ")))


def _mean_profiles(size: np.ndarray, totals: np.ndarray) -> LowRankProfiles:
    share = totals / totals.sum()
    one = np.ones((len(size), 1), np.float32)
    return LowRankProfiles.with_totals("none", one, share.astype(np.float32)[:, None], size, share, n_rounds=0)
