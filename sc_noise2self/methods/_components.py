"""Principal components of transformed, noise-weighted counts: what PCA, neighbours and the autoencoder start from.

The counts are brought to one depth, transformed, and weighted so that their sampling noise is even. What is left after
the weighted mean profile is factorised once; every rank, and every shrinkage of the components, is then a choice of
weights between 0 and 1 on the same factors (Noise2Self, Batson & Royer 2019, section 3.2).

A cell of n molecules has its rates known with variance proportional to 1 / n, so its row is weighted by sqrt(n); a
gene's column by the fourth root of one over its noise variance, halfway between leaving genes as they are and making
their noise equal.

Everything is learned in passes over blocks of cells (`sc_noise2self._blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import scipy.optimize
import scipy.sparse as sp

from .._blocks import Block, Chunks, Partial, as_chunks, as_row
from .._counts import column_sums, depth_of, row_sums
from .._split import cell_folds, halves
from .._transform import Transform, TransformName
from ._profiles import Index, LowRankProfiles
from ._svd import N_PASSES, GramProduct, components_of, gram_product, start_block, transposed

_LOG1P_DEPTH = 0.25  # log1p's target over the median depth; on six data sets 0.125 to 0.25 gained most, 1 the least
_NOISE_POWER = -0.25  # of the noise variance, that genes are weighted by


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of counts, and the way from counts to scores and back."""

    transform: Transform  # at the depth that was learned
    gene_weights: np.ndarray  # fourth root of one over the noise variance, shape (genes,), 0 for a gene never seen
    used: np.ndarray  # genes that determine the scores, boolean
    mean: np.ndarray  # of the transformed, gene-weighted cells, each weighted by its depth, shape (genes,)
    vectors: np.ndarray  # V, shape (genes, k): orthonormal on the genes used; the others are regressed on the scores
    singular_values: np.ndarray  # of the weighted counts, the mean removed, shape (k,), falling
    gene_share: np.ndarray  # share of all molecules that each gene has

    @property
    def used_vectors(self) -> np.ndarray:
        """V on the genes used, shape (genes used, k): where further passes may start from."""
        return self.vectors[self.used]

    def weighted(self, counts: sp.csr_matrix) -> tuple[sp.csr_matrix, np.ndarray]:
        """Return the transformed counts with cells and genes weighted, and the cells' weights, shape (cells,)."""
        return self._weighted(counts, row_sums(counts), self.gene_weights)

    def _weighted(
        self, counts: sp.csr_matrix, size: np.ndarray, gene_weights: np.ndarray
    ) -> tuple[sp.csr_matrix, np.ndarray]:
        cell_weights = np.sqrt(size / self.transform.target)
        z = self.transform.apply(counts, size)
        z.data *= gene_weights[z.indices]
        z.data *= np.repeat(cell_weights.astype(np.float32), np.diff(z.indptr))
        return z, cell_weights

    def of_used_genes(self, counts: sp.csr_matrix, size: np.ndarray | None = None) -> sp.csr_matrix:
        """Return the weighted counts of the genes that determine the scores.

        With the sizes of cells, shape (cells,), `counts` are of these genes alone.
        """
        if size is None:
            return self._only_used(self.weighted(counts)[0])
        return self._weighted(counts, size, self.gene_weights[self.used])[0]

    def scores(self, counts: sp.csr_matrix) -> np.ndarray:
        """Return the coordinates of cells beyond the mean, each cell weighted by its depth, shape (cells, k)."""
        z, cell_weights = self.weighted(counts)
        v = self.used_vectors
        return np.asarray(self._only_used(z) @ v) - np.outer(cell_weights, self.mean[self.used] @ v)

    def coordinates(self, counts: sp.csr_matrix) -> np.ndarray:
        """Return the coordinates of cells beyond the mean, as if all were of one depth, shape (cells, k)."""
        depth = np.sqrt(row_sums(counts) / self.transform.target)
        return self.scores(counts) / np.where(depth > 0, depth, 1)[:, None]

    def products(
        self, counts: sp.csr_matrix, held_out: sp.csr_matrix, folds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums over the cells of each fold that `worth_from` takes the ratio of, shape (2, k) each.

        The counts are those that the components were learned from; `folds` has the fold of each cell, 0 or 1.
        """
        scores = self.scores(counts)
        other = np.asarray(self.of_used_genes(held_out) @ self.used_vectors, dtype=np.float64)
        product, square = scores * other, np.square(scores, dtype=np.float64)
        sums = [(product[folds == fold].sum(axis=0), square[folds == fold].sum(axis=0)) for fold in (0, 1)]
        return np.array([p for p, _ in sums]), np.array([s for _, s in sums])

    def weighted_profiles(
        self, counts: sp.csr_matrix, weights: np.ndarray, gene_scale: np.ndarray | None = None
    ) -> LowRankProfiles:
        """Return the denoised profiles of cells, each component multiplied by its weight; cells have no scale yet.

        Weights are between 0 and 1, of shape (k,), or (cells, k) where cells differ; 0 everywhere leaves the mean.
        """
        weights = np.atleast_2d(weights)
        kept = np.asarray((weights > 0).any(axis=0))
        coordinates = self.coordinates(counts)[:, kept] * weights[:, kept]
        return self.profiles(coordinates, row_sums(counts), kept, gene_scale)

    def profiles(
        self, coordinates: np.ndarray, size: np.ndarray, kept: Index = slice(None), gene_scale: np.ndarray | None = None
    ) -> LowRankProfiles:
        """Return the profiles that have these coordinates, shape (cells, components kept); cells have no scale yet."""
        own_depth = self.transform.own_depth(size)[:, None]
        scores = np.empty((len(size), coordinates.shape[1] + 1), np.float32)  # made in place: there may be many cells
        scores[:, :1] = own_depth
        np.multiply(coordinates, own_depth, out=scores[:, 1:], casting="same_kind")
        scale = np.where(self.gene_weights > 0, self.gene_weights, 1)
        loadings = np.column_stack([self.mean, self.vectors[:, kept]]) / scale[:, None]
        link, loadings = self.transform.name, np.ascontiguousarray(loadings, dtype=np.float32)
        return LowRankProfiles.unscaled(link, scores, loadings, size, self.gene_share, gene_scale)

    def _only_used(self, z: sp.csr_matrix) -> sp.csr_matrix:
        return z if self.used.all() else z[:, self.used]


def learn_components(
    chunks: Chunks | sp.csr_matrix,
    transform: TransformName,
    n_components: int,
    rng: np.random.Generator,
    *,
    n_passes: int = N_PASSES,
    used: np.ndarray | None = None,
    start: np.ndarray | None = None,
    depth: float | None = None,
    product: GramProduct = gram_product,
) -> Components:
    """Return the components of counts.

    At most min(cells, genes used) - 1 components, beyond the mean profile; `used` are the genes that determine the
    scores, boolean, None for all. `n_passes` are those of the factorisation; 3 are enough to compare candidates. It
    starts from vectors that are known to be near the components (`used_vectors`), or from random ones. `depth` is the
    median size of the cells that hold a molecule; it takes a pass where it is not known.
    """
    chunks = as_chunks(chunks)
    parts = _Parts(chunks, whole, 1, used, None if depth is None else [depth])
    if start is None:
        start = start_block(chunks.shape[1] if used is None else int(used.sum()), n_components, rng)
    found = _factorised(parts, transform, n_components, n_passes, [start], product)
    return found[0] if used is None else _with_other_genes(found, parts, lambda *_: [])[0][0]


def learn_halves(
    chunks: Chunks,
    transform: TransformName,
    n_components: int,
    *,
    key: int,
    depth: float,
    n_passes: int,
    used: np.ndarray | None,
    starts: Sequence[np.ndarray],
) -> tuple[list[Components], list[np.ndarray], float]:
    """Return the components of both halves of a split, learned in the same passes, their worth, and the noise edge.

    The options are those of `learn_components`; `depth` is half of the median size of a cell.
    """
    parts = _Parts(chunks, partial(_halves_of, key), 2, used, [depth, depth])
    found = _factorised(parts, transform, n_components, n_passes, starts, gram_product)

    def of_halves(
        learned: Sequence[Components], halves: Sequence[sp.csr_matrix], cells: np.ndarray
    ) -> list[np.ndarray]:
        folds, (one, two) = cell_folds(cells), halves
        of_worth = [*learned[0].products(one, two, folds), *learned[1].products(two, one, folds)]
        return [*of_worth, noise_squares(learned[0], one, two)]

    learned, (*sums, squares) = _with_other_genes(found, parts, of_halves)
    return learned, [worth_from(*sums[:2]), worth_from(*sums[2:])], noise_edge(squares, chunks.shape[0])


def whole(block: Block) -> list[sp.csr_matrix]:
    """Return all molecules."""
    return [block.counts]


def _halves_of(key: int, block: Block) -> Sequence[sp.csr_matrix]:
    return halves(block.counts, key, block.cells)


@dataclass(frozen=True, eq=False)
class _Parts:
    """What components are learned from: parts of the counts of each block, and the genes used, None for all.

    `depths` are the median sizes of cells in each part that hold a molecule, where they are known.
    """

    chunks: Chunks
    of_block: Callable[[Block], Sequence[sp.csr_matrix]]
    n_parts: int
    used: np.ndarray | None
    depths: Sequence[float] | None

    def measured(self) -> Sequence[float]:
        """Return the depths, in one pass where they are not known."""
        if self.depths is not None:
            return self.depths
        sizes = self.chunks.run(lambda block: Partial(rows=[row_sums(part) for part in self.of_block(block)])).rows
        return [depth_of(size) for size in sizes]

    def n_used(self, block: Block) -> int:
        """Return how many entries the genes used have in a block."""
        assert self.used is not None  # else nothing is kept
        return sum(int(self.used[part.indices].sum()) for part in self.of_block(block))


@dataclass(frozen=True, eq=False)
class _Kept:
    """The genes used of all parts, side by side in memory, and what each cell holds of each part on all genes."""

    chunks: Chunks
    sizes: Sequence[np.ndarray]

    def of_block(self, block: Block) -> Iterator[tuple[sp.csr_matrix, np.ndarray]]:
        """Yield the counts and sizes of each part."""
        n_genes = self.chunks.shape[1] // len(self.sizes)
        for i, size in enumerate(self.sizes):
            yield block.counts[:, i * n_genes : (i + 1) * n_genes], size[block.cells]


def _factorised(
    parts: _Parts,
    transform: TransformName,
    n_components: int,
    n_passes: int,
    starts: Sequence[np.ndarray],
    product: GramProduct,
) -> list[Components]:
    """Return the components of each part, whose vectors are on the genes used alone."""
    learned, mean_rows, kept = _without_vectors(parts, transform)

    def matrices(block: Block) -> list[sp.csr_matrix]:
        if kept is None:
            return [each.of_used_genes(part) for each, part in zip(learned, parts.of_block(block), strict=True)]
        return [each.of_used_genes(*part) for each, part in zip(learned, kept.of_block(block), strict=True)]

    read = parts.chunks if kept is None else kept.chunks
    found = components_of(read, matrices, starts, n_components, n_passes, mean_rows, product)
    return [replace(each, singular_values=s, vectors=v) for each, (s, v) in zip(learned, found, strict=True)]


def _without_vectors(
    parts: _Parts, transform: TransformName
) -> tuple[list[Components], list[np.ndarray], _Kept | None]:
    """Return depth, weights and means of each part, and q'Z, with q the unit vector of the cells' weights.

    In one pass, if depths are known; the counts of the genes used are kept, where not all are and memory is enough.
    """
    chunks, used = parts.chunks, parts.used
    keeps = used is not None and chunks.keeps(parts.n_used)
    ratio = _LOG1P_DEPTH if transform == "log1p" else 1
    transforms = [Transform(transform, depth * ratio) for depth in parts.measured()]

    def of_block(block: Block) -> Partial:
        found, sums = parts.of_block(block), []
        sizes = [row_sums(part) for part in found]
        for own, part, size in zip(transforms, found, sizes, strict=True):
            noise = own.noise_variance(part, size) * len(size)
            sums += [column_sums(part), noise, own.apply(part, size).T @ (size / own.target)]
        kept = [as_row(sp.hstack([part[:, used] for part in found], format="csr"))] if keeps else []
        return Partial(sums, sizes + kept)

    sums, rows = chunks.run(of_block)
    sizes, kept = rows[: parts.n_parts], rows[parts.n_parts :]
    learned, mean_rows = [], []
    for own, size, total, noise, mean in zip(transforms, sizes, sums[::3], sums[1::3], sums[2::3], strict=True):
        weights = np.where(noise > 0, np.where(noise > 0, noise / chunks.shape[0], 1) ** _NOISE_POWER, 0)
        square = size.sum() / own.target
        genes = np.ones(len(total), bool) if used is None else used
        none, share = np.zeros((len(total), 0), np.float32), total / total.sum()
        weights32 = weights.astype(np.float32)
        learned.append(Components(own, weights32, genes, weights * mean / square, none, none[0], share))
        mean_rows.append((weights * mean / square**0.5)[genes])
    return learned, mean_rows, _Kept(chunks.like(kept[0]), sizes) if keeps else None


_OfParts = Callable[[Sequence[Components], Sequence[sp.csr_matrix], np.ndarray], list[np.ndarray]]
"""What is summed over blocks: of components, parts of a block, and the numbers of its cells."""


def _with_other_genes(
    learned: Sequence[Components], parts: _Parts, of_parts: _OfParts
) -> tuple[list[Components], list[np.ndarray]]:
    """Return components whose genes that determine no scores are predicted from scores, and other sums: one pass."""
    if parts.used is not None:
        padded = []
        for each in learned:
            vectors = np.zeros((len(each.used), each.vectors.shape[1]), each.vectors.dtype)
            vectors[each.used] = each.vectors
            padded.append(replace(each, vectors=vectors))
        learned = padded

    def of_block(block: Block) -> Partial:
        found, sums = parts.of_block(block), []
        if parts.used is not None:
            sums += [
                transposed(each.weighted(part)[0]) @ each.scores(part)
                for each, part in zip(learned, found, strict=True)
            ]
        return Partial([*sums, *of_parts(learned, found, block.cells)])

    sums = parts.chunks.run(of_block).sums
    if parts.used is not None:
        for each, product in zip(learned, sums, strict=False):
            s = each.singular_values.astype(np.float64)
            others = product / np.where(s > 0, s, 1) ** 2
            each.vectors[~each.used] = others[~each.used]
        sums = sums[parts.n_parts :]
    return list(learned), list(sums)


def worth_from(products: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Return the weight on each component that predicts held-out molecules best, shape (folds, k).

    The least-squares weight c_j = <score_j v_j', X2> / <score_j, score_j>, which is signal / (signal + noise) of the
    component at the depth of a half, is best against the truth too (Noise2Self, Proposition 1).
    """
    return products / np.where(squares > 0, squares, 1)


def noise_squares(components: Components, half1: sp.csr_matrix, half2: sp.csr_matrix) -> np.ndarray:
    """Return the sum over cells of each used gene's squared noise, shape (genes used,), weighted as the components are.

    The components are those of the first of two even halves. These differ by nothing but noise, and (z1 - z2) / sqrt(2)
    has as much of it as z1.
    """
    z1, z2 = (components.of_used_genes(half) for half in (half1, half2))
    return column_sums(sp.csr_matrix((z1 - z2).power(2))) / 2


def noise_edge(squares: np.ndarray, n_cells: int) -> float:
    """Return the largest singular value that noise alone reaches, in the units of `singular_values`.

    With S_g the sum of gene g's squares, its square is the least of a (1 + sum_g S_g / (a - S_g) / cells) over a above
    the largest S_g: the edge of the law of Marchenko & Pastur (1967) for genes of different variances. On seven data
    sets it is 0.96 to 1.00 of the largest singular value of the difference of halves.
    """
    squares = squares[squares > 0]
    if not len(squares):
        return 0.0

    def squared(log_beyond: float) -> float:
        a = squares.max() * (1 + np.exp(log_beyond))
        return float(a * (1 + (squares / (a - squares)).sum() / n_cells))

    return scipy.optimize.minimize_scalar(squared, bounds=(-20, 20), method="bounded").fun ** 0.5


def shrinkage(worth: np.ndarray, strength: float) -> np.ndarray:
    """Return weights 1 / (1 + strength (1 / c - 1)) from the worth c of each component.

    With c = signal / (signal + noise) measured on one half of the molecules, strength 1 is the least-squares weight
    at that depth and 1/2 the one at the full depth, where the noise is half as large. Later components are worth less:
    the estimates are made to fall (isotonic regression) and kept between 0 and 1.
    """
    c = np.clip(scipy.optimize.isotonic_regression(worth, increasing=False).x, 0, 1)
    return np.where(c > 0, c / (c + strength * (1 - c) + (c <= 0)), 0)
