"""PCA regression on transformed counts, its components weighted by what held-out molecules say they are worth.

The counts are brought to one depth, transformed, and weighted so that their sampling noise is even (`noise weights`).
What is left after the weighted mean profile is factorised once; every rank, and every shrinkage of the components, is
then a choice of weights between 0 and 1 on the same factors (Noise2Self, Batson & Royer 2019, section 3.2).
"""

from __future__ import annotations

from numbers import Integral
from typing import Self

import numpy as np
import scipy.optimize
import scipy.sparse as sp

from ..counts import column_sums, row_sums
from ..random import RandomState, as_generator
from ..transform import Transform, TransformName
from .profiles import LowRankProfiles
from .svd import truncated_svd

_LOG1P_DEPTH = 0.25  # log1p's target over the median depth; on six data sets .125 to .25 gained most, 1 the least


class PCADenoiser:
    """PCA of transformed, noise-weighted counts; `predict` rebuilds them with each component weighted.

    Parameters
    ----------
    transform
        `"log1p"` (at a quarter of the median depth), `"sqrt"` or `"none"`.
    n_components
        Components beyond the mean profile, at most min(cells, genes used) - 1.
    n_iter
        Power iterations of the factorisation; 3 are enough to compare candidates, more gain a few 1e-4 nats.
    random_state
        Seed of the factorisation's random start, or a generator.

    Attributes
    ----------
    transform_
        The `Transform` with the depth learned in `fit`.
    gene_weights_
        One over the root of each gene's noise on the transformed scale, shape (genes,), 0 for a gene never seen.
    mean_
        The mean of the transformed, gene-weighted cells, each weighted by its depth, shape (genes,).
    components_
        V, shape (genes, k): the components on the genes used, orthonormal there; the other genes are regressed on
        the scores.
    singular_values_
        Of the weighted counts, the mean removed, shape (k,), falling.
    gene_share_
        The share of all molecules that each gene has, shape (genes,).

    Notes
    -----
    A cell of n molecules has its rates known with variance proportional to 1 / n, so its row is weighted by sqrt(n);
    a gene's column by the fourth root of one over its noise variance, halfway between leaving genes as they are and
    making their noise equal (either end gained less on all data sets tried).
    """

    def __init__(
        self,
        transform: TransformName = "log1p",
        *,
        n_components: int = 100,
        n_iter: int = 6,
        random_state: RandomState = 0,
    ) -> None:
        self.transform = transform
        self.n_components = n_components
        self.n_iter = n_iter
        self.random_state = random_state

    def fit(self, counts: sp.csr_matrix, genes: np.ndarray | None = None) -> Self:
        """Learn the components from counts, CSR of shape (cells, genes).

        Parameters
        ----------
        genes
            Boolean, shape (genes,): the genes that determine the scores. None uses all.
        """
        size = row_sums(counts)
        median = float(np.median(size[size > 0]))
        target = median * _LOG1P_DEPTH if self.transform == "log1p" else median
        self.transform_ = Transform(self.transform, target)
        variance = self.transform_.noise_variance(counts, size)
        self.gene_weights_ = np.where(variance > 0, np.where(variance > 0, variance, 1) ** -0.25, 0).astype(np.float32)
        self.genes_ = np.ones(counts.shape[1], bool) if genes is None else genes
        self.gene_share_ = column_sums(counts) / size.sum()

        z, cell_weights = self._weighted(counts, size)
        norm = float(np.linalg.norm(cell_weights))
        offset = cell_weights / norm
        used = z if genes is None else z[:, genes]
        rng = as_generator(self.random_state)
        u, s, v = truncated_svd(used, self.n_components, rng, offset=offset, n_iter=self.n_iter)
        self.mean_ = np.asarray(z.T @ offset) / norm
        self.singular_values_ = s
        if genes is None:
            self.components_ = v
        else:
            self.components_ = np.asarray(z.T @ (u / np.where(s > 0, s, 1)))
            self.components_[genes] = v
        return self

    @property
    def n_components_(self) -> int:
        """How many components were learned."""
        return int(self.components_.shape[1])

    def worth(self, counts: sp.csr_matrix, held_out: sp.csr_matrix, folds: np.ndarray) -> np.ndarray:
        """Return the weight on each component that predicts held-out molecules best, shape (folds, k).

        The least-squares weight c_j = <score_j v_j', X2> / <score_j, score_j>, which is signal / (signal + noise) of
        the component at the depth of `counts`; by the self-supervised loss (Noise2Self, Proposition 1) it is the
        weight that is best against the truth.

        Parameters
        ----------
        counts
            The part that was fitted.
        held_out
            The other part of an even split of the same cells.
        folds
            The fold of each cell, 0, 1, ..., shape (cells,); each fold's weights are learned from its own cells.
        """
        scores = self.scores(counts)
        weighted, _ = self._weighted(held_out, row_sums(held_out))
        other = np.asarray(weighted[:, self.genes_] @ self.components_[self.genes_], dtype=np.float64)
        product, square = scores * other, np.square(scores, dtype=np.float64)
        sums = [
            (product[folds == fold].sum(axis=0), square[folds == fold].sum(axis=0)) for fold in range(folds.max() + 1)
        ]
        return np.array([p / np.where(s > 0, s, 1) for p, s in sums])

    def noise_edge(self, counts: sp.csr_matrix, held_out: sp.csr_matrix, rng: np.random.Generator) -> float:
        """Return the largest singular value that noise alone reaches, in the units of `singular_values_`.

        The two parts of an even split differ by nothing but noise, and (z1 - z2) / sqrt(2) has as much of it as z1:
        its largest singular value is the noise edge, whatever the distribution of the noise over cells and genes.

        Parameters
        ----------
        counts, held_out
            As in `worth`.
        rng
            Source of the random start.
        """
        z1, z2 = (self._weighted(part, row_sums(part))[0][:, self.genes_] for part in (counts, held_out))
        return float(truncated_svd(sp.csr_matrix(z1 - z2), 1, rng)[1][0]) / 2**0.5

    def predict(
        self,
        counts: sp.csr_matrix,
        weights: np.ndarray | None = None,
        *,
        rank: int | None = None,
        n_rounds: int = 3,
    ) -> LowRankProfiles:
        """Return the denoised profiles of cells, each component's part multiplied by its weight.

        Parameters
        ----------
        counts
            CSR of shape (cells, genes), the genes in the order of `fit`.
        weights
            Between 0 and 1, shape (k,), or (cells, k) where they differ between cells; 0 everywhere leaves the mean.
        rank
            Instead of weights: the first components as they are, the others left out. With neither, all are kept.
        n_rounds
            Of `LowRankProfiles.with_totals`.

        Raises
        ------
        ValueError
            If `rank` is out of range, or both were given.
        """
        if weights is None:
            rank = self.n_components_ if rank is None else rank
            if isinstance(rank, bool) or not isinstance(rank, Integral) or not 0 <= rank <= self.n_components_:
                raise ValueError(f"rank is {rank!r}: pass a whole number from 0 to n_components, {self.n_components_}.")
            weights = (np.arange(self.n_components_) < rank).astype(np.float64)
        elif rank is not None:
            raise ValueError("weights and rank were both given: a rank is weights of 1 and 0, so pass one.")
        weights = np.atleast_2d(weights)
        kept = np.asarray((weights > 0).any(axis=0))
        return self.rebuild(self.coordinates(counts)[:, kept] * weights[:, kept], row_sums(counts), n_rounds, kept)

    def coordinates(self, counts: sp.csr_matrix) -> np.ndarray:
        """Return the coordinates of cells beyond the mean, as if all were of one depth, shape (cells, k)."""
        depth = self._cell_weights(row_sums(counts))
        return self.scores(counts) / np.where(depth > 0, depth, 1)[:, None]

    def rebuild(
        self, coordinates: np.ndarray, size: np.ndarray, n_rounds: int = 3, kept: np.ndarray | slice = slice(None)
    ) -> LowRankProfiles:
        """Return the profiles that have these coordinates.

        Parameters
        ----------
        coordinates
            As from `coordinates`, shape (cells, components kept).
        size
            Molecules of each cell, shape (cells,).
        n_rounds
            Of `LowRankProfiles.with_totals`.
        kept
            Which components they are of.
        """
        scale = np.where(self.gene_weights_ > 0, self.gene_weights_, 1)
        loadings = np.column_stack([self.mean_, self.components_[:, kept]]) / scale[:, None]
        scores = np.column_stack([np.ones(len(size)), coordinates]) * self.transform_.own_depth(size)[:, None]
        return LowRankProfiles.with_totals(
            self.transform_.name,
            scores.astype(np.float32),
            np.ascontiguousarray(loadings, dtype=np.float32),
            size,
            self.gene_share_,
            n_rounds,
        )

    def _cell_weights(self, size: np.ndarray) -> np.ndarray:
        return np.sqrt(size / self.transform_.target)

    def _weighted(self, counts: sp.csr_matrix, size: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
        """Return the transformed counts with cells and genes weighted, and the cells' weights."""
        cell_weights = self._cell_weights(size)
        z = self.transform_.apply(counts, size)
        z.data *= self.gene_weights_[z.indices]
        z.data *= np.repeat(cell_weights.astype(np.float32), np.diff(z.indptr))
        return z, cell_weights

    def scores(self, counts: sp.csr_matrix) -> np.ndarray:
        """Return the coordinates of cells beyond the mean, each cell weighted by its depth, shape (cells, k)."""
        z, cell_weights = self._weighted(counts, row_sums(counts))
        v = self.components_[self.genes_]
        scores = np.asarray(z[:, self.genes_] @ v) if not self.genes_.all() else np.asarray(z @ v)
        return scores - np.outer(cell_weights, self.mean_[self.genes_] @ v)


def shrinkage(worth: np.ndarray, strength: float) -> np.ndarray:
    """Return weights 1 / (1 + strength (1 / c - 1)) from the worth c of each component.

    With c = signal / (signal + noise) measured on one half of the molecules, strength 1 is the least-squares weight
    at that depth and 1/2 the one at the full depth, where the noise is half as large.

    Parameters
    ----------
    worth
        From `PCADenoiser.worth`, averaged over splits and directions, shape (k,). Later components are worth less:
        the estimates are made to fall (isotonic regression) and kept between 0 and 1.
    """
    c = np.clip(scipy.optimize.isotonic_regression(worth, increasing=False).x, 0, 1)
    return np.where(c > 0, c / (c + strength * (1 - c) + (c <= 0)), 0)
