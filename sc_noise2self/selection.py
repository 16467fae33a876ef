"""Choose the transform and the weights of the components by the gain on held-out molecules.

Candidates are compared in the one currency that needs neither transform nor depth (`sc_noise2self.loss`), each learned
from one half of the molecules and scored on the other, in both directions. The transform is chosen first, at a middling
shrinkage; then how its components are weighted: cut after those worth more than half, or shrunk, more or less.

What a component is worth is learned from the held-out molecules of half the cells and used on the other half, so no
cell's held-out molecules are in its own prediction: without that, components of pure noise seem to gain a little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from .denoisers.pca import PCADenoiser, shrinkage
from .loss import Gain, held_out_gain, held_out_probabilities
from .split import split_matrix
from .transform import TransformName

_STRENGTHS = (1.0, 2.0, 4.0, 8.0)  # of `shrinkage` at the depth of a half; 1 is least squares
_FIRST = 2.0  # the strength at which transforms are compared
_ENTRIES = 20_000_000  # dense entries scored per candidate: as many cells, drawn at random, as have so many


@dataclass(frozen=True)
class Candidate:
    """A transform, and how its components are weighted.

    Attributes
    ----------
    transform
        Of `PCADenoiser`.
    strength
        Of `shrinkage`, at the depth of a half; None cuts: weight 1 for components worth more than half, 0 for the rest.
    """

    transform: TransformName
    strength: float | None

    @property
    def label(self) -> str:
        """E.g. ``"log1p, shrinkage 2"``."""
        return f"{self.transform}, " + ("cut" if self.strength is None else f"shrinkage {self.strength:g}")

    def weights(self, worth: np.ndarray, noise: float) -> np.ndarray:
        """Return the weights, at a depth where noise is `noise` times that of a half, from the worth on halves."""
        if self.strength is None:
            return (shrinkage(worth, noise) > 0.5).astype(np.float64)
        return shrinkage(worth, noise * self.strength)


@dataclass(frozen=True, eq=False)
class Selection:
    """What was compared and what was chosen.

    Attributes
    ----------
    gains
        The held-out gain of each candidate, pooled over splits and directions.
    worth
        Least-squares weights of the chosen transform's components at half depth, mean over splits and directions.
    """

    gains: dict[Candidate, Gain]
    worth: np.ndarray

    @property
    def best(self) -> Candidate:
        """The candidate of greatest gain."""
        return max(self.gains, key=lambda candidate: self.gains[candidate].mean)

    @property
    def gain(self) -> Gain:
        """The gain of the best candidate."""
        return self.gains[self.best]

    @property
    def beats_mean(self) -> bool:
        """Whether the best candidate beats the mean profile, whose gain is 0, by more than two standard errors."""
        return self.gain.mean > 2 * self.gain.error

    def full_depth_weights(self) -> np.ndarray:
        """Return the weights for all molecules, where noise is half as large; 0 when nothing beats the mean."""
        if not self.beats_mean:
            return np.zeros_like(self.worth)
        return self.best.weights(self.worth, noise=0.5)

    @property
    def rank(self) -> int:
        """Components that are more signal than noise at full depth."""
        return int((shrinkage(self.worth, 0.5) > 0.5).sum()) if self.beats_mean else 0


def select_pca(
    counts: sp.csr_matrix,
    rng: np.random.Generator,
    *,
    transforms: tuple[TransformName, ...],
    n_components: int,
    n_splits: int = 1,
    genes: np.ndarray | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Selection:
    """Return the best of the transforms and weightings for these counts.

    Parameters
    ----------
    counts
        CSR, cells x genes.
    transforms
        Those to compare.
    n_components, genes
        Of `PCADenoiser` and its `fit`.
    n_splits
        Independent even splits; each is used in both directions.
    on_step
        Called after each fit, `2 * n_splits * len(transforms)` times in all.
    """
    n_cells, n_genes = counts.shape
    n_scored = min(n_cells, max(2, _ENTRIES // n_genes))
    folds = rng.permutation(n_cells) % 2
    scored = np.sort(rng.choice(n_cells, n_scored, replace=False))
    gains: dict[Candidate, Gain] = {}
    worth: dict[TransformName, list[np.ndarray]] = {name: [] for name in transforms}

    def score(candidate: Candidate, fit: _Fit) -> None:
        gain = fit.gain(candidate, scored, folds)
        gains[candidate] = gains[candidate] + gain if candidate in gains else gain

    fits: list[_Fit] = []
    for _ in range(n_splits):
        first, second = split_matrix(counts, random_state=rng)
        for seen, held_out in ((first, second), (second, first)):
            for name in transforms:
                denoiser = PCADenoiser(name, n_components=n_components, n_iter=3, random_state=rng)
                denoiser.fit(seen, genes)
                fit = _Fit(denoiser, seen, held_out, denoiser.worth(seen, held_out, folds))
                score(Candidate(name, _FIRST), fit)
                worth[name].append(fit.worth.mean(axis=0))
                fits.append(fit)
                on_step()
    transform = max(gains, key=lambda candidate: gains[candidate].mean).transform
    for fit in fits:
        if fit.denoiser.transform == transform:
            for strength in (None, *_STRENGTHS):
                if strength != _FIRST:
                    score(Candidate(transform, strength), fit)
    return Selection(gains, np.mean(worth[transform], axis=0))


@dataclass(frozen=True, eq=False)
class _Fit:
    denoiser: PCADenoiser
    seen: sp.csr_matrix
    held_out: sp.csr_matrix
    worth: np.ndarray  # of each component, as learned from each fold of cells

    def gain(self, candidate: Candidate, cells: np.ndarray, folds: np.ndarray) -> Gain:
        """Return the gain on the held-out molecules of these cells, each weighted as the other fold says."""
        held_out = self.held_out[cells]
        weights = np.array([candidate.weights(worth, noise=1) for worth in self.worth])
        profiles = self.denoiser.predict(self.seen[cells], weights[1 - folds[cells]], n_rounds=1)
        return held_out_gain(held_out_probabilities(profiles, held_out), held_out, self.denoiser.gene_share_)
