"""PCA regression on transformed counts, its components weighted by what held-out molecules say they are worth.

The counts are brought to one depth, transformed, and weighted so that their sampling noise is even (`noise weights`).
What is left after the weighted mean profile is factorised once; every rank, and every shrinkage of the components, is
then a choice of weights between 0 and 1 on the same factors (Noise2Self, Batson & Royer 2019, section 3.2).

Everything is learned in passes over blocks of cells (`sc_noise2self._blocks`): one for the sizes of cells, one for the
noise and the mean of genes, `n_passes` for the components, one for the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Self

import numpy as np
import scipy.optimize
import scipy.sparse as sp

from .._blocks import Block, Chunks, InMemory, Partial
from .._counts import column_sums, row_sums
from .._dealing import row_keys
from .._random import RandomState, as_generator
from .._split import halves
from .._transform import Transform, TransformName
from ._profiles import LowRankProfiles, profiles_in_blocks
from ._svd import N_PASSES, right_singular_vectors, start_block, without_mean

_LOG1P_DEPTH = 0.25  # log1p's target over the median depth; on six data sets .125 to .25 gained most, 1 the least
_SCALED = 20_000_000  # dense entries of the cells that all but the last round of scaling genes look at

Parts = Callable[[Block], Sequence[sp.csr_matrix]]
"""The matrices to learn from, each with the rows of the block."""


def whole(block: Block) -> Sequence[sp.csr_matrix]:
    """Return all molecules."""
    return [block.counts]


def halves_of(keys: Sequence[int]) -> Parts:
    """Return the function that gives both halves of each split of a block, one split after another."""
    return lambda block: [half for key in keys for half in halves(block.counts, key, block.cells)]


class PCADenoiser:
    """PCA of transformed, noise-weighted counts; `predict` rebuilds them with each component weighted.

    Parameters
    ----------
    transform
        `"log1p"` (at a quarter of the median depth), `"sqrt"` or `"none"`.
    n_components
        Components beyond the mean profile, at most min(cells, genes used) - 1.
    n_passes
        Of the factorisation over the counts; 3 are enough to compare candidates, more gain a few 1e-4 nats.
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

    transform_: Transform
    gene_weights_: np.ndarray
    genes_: np.ndarray
    mean_: np.ndarray
    components_: np.ndarray
    singular_values_: np.ndarray
    gene_share_: np.ndarray

    def __init__(
        self,
        transform: TransformName = "log1p",
        *,
        n_components: int = 100,
        n_passes: int = N_PASSES,
        random_state: RandomState = 0,
    ) -> None:
        self.transform = transform
        self.n_components = n_components
        self.n_passes = n_passes
        self.random_state = random_state

    def fit(self, counts: sp.csr_matrix | Chunks, genes: np.ndarray | None = None) -> Self:
        """Learn the components from counts of shape (cells, genes).

        Parameters
        ----------
        genes
            Boolean, shape (genes,): the genes that determine the scores. None uses all.
        """
        chunks = counts if isinstance(counts, Chunks) else InMemory(counts)
        fit_together([self], chunks, whole, genes)
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
            The fold of each cell, 0 or 1, shape (cells,); each fold's weights are learned from its own cells.
        """
        return _worth_from(*self.products(counts, held_out, folds))

    def products(
        self, counts: sp.csr_matrix, held_out: sp.csr_matrix, folds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums over the cells of each fold that `worth` is the ratio of, shape (2, k) each."""
        scores = self.scores(counts)
        weighted, _ = self._weighted(held_out, row_sums(held_out))
        other = np.asarray(self._used(weighted) @ self.components_[self.genes_], dtype=np.float64)
        product, square = scores * other, np.square(scores, dtype=np.float64)
        sums = [(product[folds == fold].sum(axis=0), square[folds == fold].sum(axis=0)) for fold in (0, 1)]
        return np.array([p for p, _ in sums]), np.array([s for _, s in sums])

    def predict(
        self,
        counts: sp.csr_matrix,
        weights: np.ndarray | None = None,
        *,
        rank: int | None = None,
        n_rounds: int | None = None,
        gene_scale: np.ndarray | None = None,
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
        n_rounds, gene_scale
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
        return LowRankProfiles.with_totals(*self._weighted_model(counts, weights), n_rounds, gene_scale)

    def unscaled(
        self, counts: sp.csr_matrix, weights: np.ndarray, gene_scale: np.ndarray | None = None
    ) -> LowRankProfiles:
        """Return the profiles of `predict` whose cells have no scale yet."""
        return LowRankProfiles.unscaled(*self._weighted_model(counts, weights), gene_scale)

    def _weighted_model(
        self, counts: sp.csr_matrix, weights: np.ndarray
    ) -> tuple[TransformName, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        weights = np.atleast_2d(weights)
        kept = np.asarray((weights > 0).any(axis=0))
        return self._model(self.coordinates(counts)[:, kept] * weights[:, kept], row_sums(counts), kept)

    def coordinates(self, counts: sp.csr_matrix) -> np.ndarray:
        """Return the coordinates of cells beyond the mean, as if all were of one depth, shape (cells, k)."""
        depth = self._cell_weights(row_sums(counts))
        return self.scores(counts) / np.where(depth > 0, depth, 1)[:, None]

    def rebuild(
        self,
        coordinates: np.ndarray,
        size: np.ndarray,
        n_rounds: int | None = None,
        kept: np.ndarray | slice = slice(None),
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
        return LowRankProfiles.with_totals(*self._model(coordinates, size, kept), n_rounds)

    def _model(
        self, coordinates: np.ndarray, size: np.ndarray, kept: np.ndarray | slice
    ) -> tuple[TransformName, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return link, scores, loadings, sizes and shares of genes."""
        scores = np.column_stack([np.ones(len(size)), coordinates]) * self.transform_.own_depth(size)[:, None]
        return self.transform_.name, scores.astype(np.float32), self.loadings(kept), size, self.gene_share_

    def loadings(self, kept: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the mean and the components kept, on the transformed scale, float32 of shape (genes, 1 + k)."""
        scale = np.where(self.gene_weights_ > 0, self.gene_weights_, 1)
        loadings = np.column_stack([self.mean_, self.components_[:, kept]]) / scale[:, None]
        return np.ascontiguousarray(loadings, dtype=np.float32)

    def profiles(self, chunks: Chunks, weights: np.ndarray, size: np.ndarray) -> LowRankProfiles:
        """Return the denoised profiles of all cells, as `predict`, in two passes over the counts.

        All rounds of scaling genes but the last look at some of the cells, the last at all.

        Parameters
        ----------
        size
            Molecules of each cell, shape (cells,).
        """
        step = max(1, chunks.shape[0] * chunks.shape[1] // _SCALED)
        some = self.predict(chunks.take(np.arange(0, chunks.shape[0], step)), weights)

        def unscaled(block: Block, gene_scale: np.ndarray) -> LowRankProfiles:
            return self.unscaled(block.counts, weights, gene_scale)

        return profiles_in_blocks(chunks, size, some, unscaled)

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
        return np.asarray(self._used(z) @ v) - np.outer(cell_weights, self.mean_[self.genes_] @ v)

    def _used(self, z: sp.csr_matrix) -> sp.csr_matrix:
        """Return the columns of the genes that determine the scores."""
        return z if self.genes_.all() else z[:, self.genes_]


def fit_together(
    denoisers: Sequence[PCADenoiser],
    chunks: Chunks,
    parts: Parts,
    genes: np.ndarray | None = None,
    starts: Sequence[np.ndarray] | None = None,
) -> None:
    """Fit each denoiser to one of the parts of the counts, all in the same passes.

    Parameters
    ----------
    denoisers
        As many as there are parts, with the same `n_passes`.
    genes
        As in `PCADenoiser.fit`.
    starts
        Vectors of the genes used that are known to be near each one's components; None starts from random ones.
    """

    def of_sizes(block: Block) -> Partial:
        found = parts(block)
        return Partial([column_sums(part) for part in found], [row_sums(part) for part in found])

    totals, sizes = chunks.run(of_sizes)
    for denoiser, total, size in zip(denoisers, totals, sizes, strict=True):
        median = float(np.median(size[size > 0]))
        target = median * _LOG1P_DEPTH if denoiser.transform == "log1p" else median
        denoiser.transform_ = Transform(denoiser.transform, target)
        denoiser.gene_share_ = total / total.sum()
        denoiser.genes_ = np.ones(len(total), bool) if genes is None else genes

    def of_genes(block: Block) -> Partial:
        sums = []
        for denoiser, part in zip(denoisers, parts(block), strict=True):
            size, transform = row_sums(part), denoiser.transform_
            sums += [
                transform.noise_variance(part, size) * len(size),
                transform.apply(part, size).T @ (size / transform.target),
            ]
        return Partial(sums)

    sums = chunks.run(of_genes).sums
    means = []  # q'Z, with q the unit vector along the cells' weights
    for denoiser, noise, mean, size in zip(denoisers, sums[::2], sums[1::2], sizes, strict=True):
        weights = np.where(noise > 0, np.where(noise > 0, noise / chunks.shape[0], 1) ** -0.25, 0)
        denoiser.gene_weights_ = weights.astype(np.float32)
        square = size.sum() / denoiser.transform_.target
        denoiser.mean_ = weights * mean / square
        means.append((weights * mean / square**0.5)[denoiser.genes_])

    def gram(blocks: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        def of_block(block: Block) -> Partial:
            sums = []
            for denoiser, part, vectors in zip(denoisers, parts(block), blocks, strict=True):
                z = denoiser._used(denoiser._weighted(part, row_sums(part))[0])
                sums.append(z.T @ (z @ vectors))
            return Partial(sums)

        found = chunks.run(of_block).sums
        return [
            without_mean(product, block, mean).astype(block.dtype)
            for product, block, mean in zip(found, blocks, means, strict=True)
        ]

    if starts is None:
        starts = [
            start_block(int(denoiser.genes_.sum()), denoiser.n_components, as_generator(denoiser.random_state))
            for denoiser in denoisers
        ]
    n_components = max(denoiser.n_components for denoiser in denoisers)
    for denoiser, (s, v) in zip(
        denoisers, right_singular_vectors(gram, starts, n_components, denoisers[0].n_passes), strict=True
    ):
        denoiser.singular_values_, denoiser.components_ = s, v
    if genes is not None:
        _regress_other_genes(denoisers, chunks, parts)


def worth_of_halves(denoisers: Sequence[PCADenoiser], chunks: Chunks, key: int) -> list[np.ndarray]:
    """Return `PCADenoiser.worth` of both halves of a split, learned from all cells: one pass.

    Parameters
    ----------
    denoisers
        Fitted to `halves_of([key])`.
    """

    def of_block(block: Block) -> Partial:
        half1, half2 = halves(block.counts, key, block.cells)
        folds = folds_of(block.cells)
        pairs = ((half1, half2), (half2, half1))
        return Partial(
            [each for own, pair in zip(denoisers, pairs, strict=True) for each in own.products(*pair, folds)]
        )

    sums = chunks.run(of_block).sums
    return [_worth_from(*sums[:2]), _worth_from(*sums[2:])]


def noise_edge(denoiser: PCADenoiser, chunks: Chunks, parts: Parts, rng: np.random.Generator) -> float:
    """Return the largest singular value that noise alone reaches, in the units of `singular_values_`.

    The two parts of an even split differ by nothing but noise, and (z1 - z2) / sqrt(2) has as much of it as z1:
    its largest singular value is the noise edge, whatever the distribution of the noise over cells and genes.

    Parameters
    ----------
    denoiser
        Fitted to the first half.
    parts
        The two halves of a block.
    rng
        Source of the random start.
    """

    def gram(blocks: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        def of_block(block: Block) -> Partial:
            z1, z2 = (denoiser._used(denoiser._weighted(part, row_sums(part))[0]) for part in parts(block))
            difference = sp.csr_matrix(z1 - z2)
            return Partial([difference.T @ (difference @ blocks[0])])

        return [product.astype(np.float32) for product in chunks.run(of_block).sums]

    start = start_block(int(denoiser.genes_.sum()), 1, rng)
    return float(right_singular_vectors(gram, [start], 1)[0][0][0]) / 2**0.5


def folds_of(cells: np.ndarray) -> np.ndarray:
    """Return the fold of each cell, 0 or 1 at random, by its number."""
    return (row_keys(0, cells) & np.uint64(1)).astype(np.intp)


def _worth_from(products: np.ndarray, squares: np.ndarray) -> np.ndarray:
    return products / np.where(squares > 0, squares, 1)


def _regress_other_genes(denoisers: Sequence[PCADenoiser], chunks: Chunks, parts: Parts) -> None:
    """Give the genes that determine no scores the components that predict them from the scores."""
    used = [denoiser.components_ for denoiser in denoisers]
    for denoiser, v in zip(denoisers, used, strict=True):
        denoiser.components_ = np.zeros((len(denoiser.genes_), v.shape[1]), v.dtype)
        denoiser.components_[denoiser.genes_] = v

    def of_block(block: Block) -> Partial:
        return Partial(
            [
                denoiser._weighted(part, row_sums(part))[0].T @ denoiser.scores(part)
                for denoiser, part in zip(denoisers, parts(block), strict=True)
            ]
        )

    for denoiser, v, product in zip(denoisers, used, chunks.run(of_block).sums, strict=True):
        s = denoiser.singular_values_.astype(np.float64)
        denoiser.components_ = (product / np.where(s > 0, s, 1) ** 2).astype(v.dtype)
        denoiser.components_[denoiser.genes_] = v


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
