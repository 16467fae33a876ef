"""Populations of cells, what each says of its genes' rates, and a floor that no rate falls below.

A denoiser's errors pull rates of genes that a cell does not have away from zero, and push others below it. The
molecules of a population of cells say which is which. Two things are learned for each population k and gene g, from the
molecules T_kg that were observed in it and M_kg that the denoiser gives it:

* the factor that its rates are multiplied by. T is negative binomial around M: the true rate over the denoiser's is
  Gamma distributed with mean 1 and variance phi, so the factor is (1 + phi T) / (1 + phi M), as in
  `sc_noise2self.methods._mixing`, averaged over what phi may be. A prior over phi is learned for each pair of
  populations: for k, from all genes whose home is the other, the one where the denoiser gives them most. So a
  population learns at once that it has none of another's genes, and that where it has no molecule it has none.
* the floor, a share (the height) of the probability m / (1 + m) that a cell shows the gene whose rate is exponentially
  distributed around m = Q_kg n_i, the rate in a cell of n_i molecules with the profile Q_k of the population. A zero
  claims a certainty that a few molecules do not give; a gene of many molecules is told from zero well enough. The
  corner is rounded, so that rates below the floor, also those that a linear model puts below zero, keep their order.

How many populations and which height: what predicts held-out molecules best. The factors of a cell are then learned
from other cells, since they would repeat its own counts in small populations.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numba
import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from .._counts import row_sums
from .._model import State
from .._threads import FILTERS, in_threads, one_openmp_thread
from ..partitions import Fold

Index = slice | np.ndarray
Scales = tuple[np.ndarray, np.ndarray]
"""Both scales of cells, before the floor and after it, float32 of shape (cells,) each."""

_ZERO, _QUARTER, _HALF, _ONE = (np.float32(x) for x in (0, 0.25, 0.5, 1))
ROUNDING = np.float32(0.01)  # of the corner: 0, 0.01 and 0.1 gain the same on paul15 and PBMC 3k, to 0.0002
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy")
_inlined = numba.njit(inline="always")
_in_any_order = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "nnan", "nsz"})

FACTOR_GRID = np.concatenate([[0], np.geomspace(0.003, 1e4, 15)])
"""The grid of phi; the last is a Gamma distribution of nearly 0 or nearly any rate."""
HEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0)
_BLOCK = 1 << 20  # dense entries rebuilt at a time, 4 MB
_STEPS = 50  # of expectation maximisation, at most; 20 to 1 000 gain the same on four data sets, to 0.001
_STILL = 1e-4  # change of a prior that ends it
_KEPT = ("centers", "factors", "shares")
_LARGEST = np.float32(1e6)  # factor
_LEAST = 1e-9  # molecules expected
_SKETCH = 100  # random projections that profiles are clustered by
_LEAST_CELLS = 10  # of a population, on average


class Refinement(NamedTuple):
    """How profiles are refined: by how many populations, and with a floor of which height."""

    n_populations: int = 1
    height: float = 0.0

    def __str__(self) -> str:
        return f"{self.n_populations} populations, floor {self.height:g}"


AS_IT_IS = Refinement()


@dataclass(frozen=True, eq=False)
class Populations:
    """What was learned of populations of cells, for a denoiser.

    Attributes
    ----------
    centers
        Mean square roots of the profiles of each population's cells, shape (populations, genes): a cell belongs to the
        nearest.
    factors
        What the rates of each population's cells are multiplied by, shape (populations, genes).
    shares
        The profile of each population, shape (populations, genes); a cell without any rates has it.
    height
        Height of the floor, 0 for none.
    """

    centers: np.ndarray
    factors: np.ndarray
    shares: np.ndarray
    height: float

    @classmethod
    def one(cls, gene_share: np.ndarray) -> Populations:
        """Return one that changes nothing, with the mean profile."""
        shares = gene_share[None].astype(np.float32)
        return cls(np.zeros_like(shares), np.ones_like(shares), shares, 0.0)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the values and arrays that a model file keeps."""
        return {"floor": float(self.height)}, {f"population_{name}": getattr(self, name) for name in _KEPT}

    @classmethod
    def from_state(cls, state: State) -> Populations:
        """Return those of a model file."""
        centers, factors, shares = (state.arrays[f"population_{name}"] for name in _KEPT)
        return cls(centers, factors, shares, state.values["floor"])

    @property
    def changes_nothing(self) -> bool:
        """Whether there is one population, without a floor and with factors of 1."""
        return len(self.factors) == 1 and self.height == 0 and bool((self.factors == 1).all())

    def times(self, gene_scale: np.ndarray) -> Populations:
        """Return those whose factors are multiplied by a scale of genes too."""
        return replace(self, factors=self.factors * gene_scale)

    def nearest(self, rates: np.ndarray, gene_scale: np.ndarray) -> np.ndarray:
        """Return the population of each cell, shape (cells,), from rates of all genes and what they are scaled by."""
        if len(self.centers) == 1:
            return np.zeros(len(rates), np.intp)
        points, length = np.empty_like(rates), np.empty((len(rates), 1), np.float32)
        _roots(rates, gene_scale, points, length)
        return np.argmin(length * np.square(self.centers).sum(axis=1) - 2 * (points @ self.centers.T), axis=1)

    def refine(
        self, rates: np.ndarray, population: np.ndarray, size: np.ndarray, sums: np.ndarray | None = None
    ) -> Scales:
        """Make refined expected counts of rates of all genes, in place; return both scales of cells.

        What the genes of each population's cells add up to is added to `sums`, float64 of shape (populations, genes).
        """
        scales, sums = np.empty((2, len(rates)), np.float32), np.empty((0, 0)) if sums is None else sums
        _refine(rates, population, self.factors, self.shares, np.float32(self.height), size, scales, sums)
        return scales[0], scales[1]

    def refine_scaled(
        self, rates: np.ndarray, population: np.ndarray, size: np.ndarray, scales: Scales, genes: Index
    ) -> None:
        """Do the same where scales are known, for some genes."""
        factors, shares = (np.ascontiguousarray(each[:, genes]) for each in (self.factors, self.shares))
        _apply(rates, population, factors, shares, np.float32(self.height), size, *scales)


@_inlined
def _raised(rate: np.float32, mean: np.float32, height: np.float32) -> np.float32:
    """Return the larger of a rate and the floor, the corner rounded; without a floor, of the rate and 0."""
    if height == 0:
        return max(rate, _ZERO)
    floor = height * (mean / (_ONE + mean))
    above, corner = rate - floor, ROUNDING * floor * floor
    half = _HALF * (abs(above) + np.sqrt(above * above + corner))  # (above + sqrt(...)) / 2, without cancellation
    return floor + (half if above >= 0 else _QUARTER * corner / half)


@_in_any_order
def _roots(rates: np.ndarray, gene_scale: np.ndarray, points: np.ndarray, length: np.ndarray) -> None:
    """Set `points` to the square roots of scaled rates, 0 for those below 0, and `length` to the root of their sum."""
    for i in range(len(rates)):
        row, out, total = rates[i], points[i], 0.0
        for g in range(len(row)):
            scaled = max(row[g] * gene_scale[g], _ZERO)
            total += scaled
            out[g] = np.sqrt(scaled)
        length[i, 0] = np.sqrt(total)


@_in_any_order
def _refine(
    rates: np.ndarray,
    population: np.ndarray,
    factors: np.ndarray,
    shares: np.ndarray,
    height: np.float32,
    size: np.ndarray,
    scales: np.ndarray,
    sums: np.ndarray,
) -> None:
    for i in range(len(rates)):
        row, factor, share, n = rates[i], factors[population[i]], shares[population[i]], size[i]
        total = 0.0
        for g in range(len(row)):
            row[g] *= factor[g]
            total += max(row[g], _ZERO)
        scales[0, i] = scale = np.float32(n / total if total > 0 else 0)
        scales[1, i] = _ONE
        for g in range(len(row)):
            row[g] = _raised(row[g] * scale, n * share[g], height) if scale > 0 else n * share[g]
        if scale > 0 and height > 0:
            raised = 0.0
            for g in range(len(row)):
                raised += row[g]
            scales[1, i] = last = np.float32(n / raised)
            for g in range(len(row)):
                row[g] *= last
        if len(sums):
            own = sums[population[i]]
            for g in range(len(row)):
                own[g] += row[g]


@_compiled
def _apply(
    rates: np.ndarray,
    population: np.ndarray,
    factors: np.ndarray,
    shares: np.ndarray,
    height: np.float32,
    size: np.ndarray,
    cell_scale: np.ndarray,
    row_scale: np.ndarray,
) -> None:
    for i in range(len(rates)):
        row, factor, share, n = rates[i], factors[population[i]], shares[population[i]], size[i]
        scale = cell_scale[i]
        for g in range(len(row)):
            refined = _raised(row[g] * factor[g] * scale, n * share[g], height) * row_scale[i]
            row[g] = refined if scale > 0 else n * share[g]


@_in_any_order
def _probabilities(
    rates: np.ndarray,
    population: np.ndarray,
    factors: np.ndarray,
    shares: np.ndarray,
    heights: np.ndarray,
    size: np.ndarray,
    indptr: np.ndarray,
    genes: np.ndarray,
    out: np.ndarray,
) -> None:
    """Set `out`, shape (heights, entries), to the probabilities of entries of these cells, as `_refine` has them."""
    for i in range(len(rates)):
        row, factor, share, n = rates[i], factors[population[i]], shares[population[i]], size[i]
        total = 0.0
        for g in range(len(row)):
            total += max(row[g] * factor[g], _ZERO)
        scale = np.float32(n / total if total > 0 else 0)
        for h in range(len(heights)):
            height, raised = heights[h], np.float64(n)
            if scale > 0 and height > 0:
                raised = np.float64(0)
                for g in range(len(row)):
                    raised += _raised(row[g] * factor[g] * scale, n * share[g], height)
            for entry in range(indptr[i], indptr[i + 1]):
                g = genes[entry]
                if scale > 0:
                    out[h, entry] = _raised(row[g] * factor[g] * scale, n * share[g], height) / raised
                else:
                    out[h, entry] = share[g] if n > 0 else 0


def rows_of(n_cells: int, n_genes: int) -> Iterator[slice]:
    """Yield slices of cells, whose dense rows are a block."""
    step = max(1, _BLOCK // max(1, n_genes))
    for start in range(0, n_cells, step):
        yield slice(start, min(start + step, n_cells))


def roots(expected: np.ndarray) -> np.ndarray:
    """Return square roots of the profiles of cells, whose distances are those of Hellinger; empty cells stay 0."""
    total = expected.sum(axis=1, keepdims=True)
    out = expected / np.where(total > 0, total, 1)
    return np.sqrt(out, out=out)


def sketch_of(points: np.ndarray) -> np.ndarray:
    """Return random projections of points, which keep their distances (Johnson & Lindenstrauss 1984)."""
    projections = np.random.default_rng(0).standard_normal((points.shape[1], _SKETCH), np.float32)
    return points @ projections


def clusters_of(sketch: np.ndarray, n_clusters: int) -> np.ndarray:
    """Return the cluster of each point by k-means, numbered from 0 without gaps, shape (points,)."""
    n_clusters = min(n_clusters, len(sketch))
    if n_clusters <= 1:
        return np.zeros(len(sketch), np.intp)
    # With one thread the rounding of its sums is the same, however many there are.
    with FILTERS, one_openmp_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # there may be fewer distinct points
        labels = KMeans(n_clusters, n_init=10, random_state=0).fit_predict(sketch)
    return np.unique(labels, return_inverse=True)[1]


def sums_of(values: sp.csr_matrix | np.ndarray, population: np.ndarray, n_populations: int) -> np.ndarray:
    """Return sums over the cells of each population, float64 of shape (populations, genes), exact for counts."""
    cells, dtype = np.arange(len(population)), np.float64 if sp.issparse(values) else np.float32
    one = sp.csr_matrix((np.ones(len(cells), dtype), (population, cells)), (n_populations, len(cells)))
    found = one @ values
    return np.asarray(found.toarray() if sp.issparse(found) else found, dtype=np.float64)


def nested_factors(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the factors of all cells together, times those that each population then still has, see `factors_of`."""
    common = factors_of(observed.sum(axis=0, keepdims=True), expected.sum(axis=0, keepdims=True))
    if len(observed) == 1:
        return np.minimum(common, _LARGEST)
    return np.minimum(common * factors_of(observed, common * expected), _LARGEST)


def factors_of(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the posterior mean of the true rate over the denoiser's, all of shape (populations, genes)."""
    expected = np.maximum(expected, _LEAST)
    out = np.ones(expected.shape, np.float32)
    if len(expected) == 1:
        homes = np.zeros(expected.shape[1], np.intp)
    else:
        homes = np.argmax(expected / expected.sum(axis=1, keepdims=True), axis=0)
    order = np.argsort(homes, kind="stable")
    homes, phi = homes[order], FACTOR_GRID[1:]

    def of_population(k: int) -> np.ndarray:
        x, m = observed[k, order, None], expected[k, order, None]
        shape = 1 / phi
        log, log_m = np.log1p(phi * m), np.log(m)
        curves = np.empty((len(order), len(FACTOR_GRID)))
        curves[:, :1] = x * log_m - m
        distinct, number = np.unique(x, return_inverse=True)
        gammas = gammaln(distinct[:, None] + shape) - gammaln(shape)
        curves[:, 1:] = gammas[number.ravel()] + x * (np.log(phi) + log_m - log) - shape * log
        curves -= curves.max(axis=1, keepdims=True)
        found = np.empty(len(order))
        values = (1 + FACTOR_GRID * x) / (1 + FACTOR_GRID * m)
        _posterior_means(np.exp(curves, dtype=np.float32), values.astype(np.float32), homes, found)
        return found

    for k, found in enumerate(in_threads(of_population, range(len(expected)))):
        out[k, order] = found
    return out


@numba.njit(nogil=True, cache=True, fastmath=True)
def _posterior_means(likelihood: np.ndarray, values: np.ndarray, homes: np.ndarray, out: np.ndarray) -> None:
    """Set `out` to the posterior means of values, shape (genes, grid), each home's under the prior that suits it best.

    Expectation maximisation (nonparametric empirical Bayes, Kiefer & Wolfowitz 1956); `homes` of genes rise.
    """
    n_genes, n_grid = likelihood.shape
    prior, new = np.empty(n_grid, np.float32), np.empty(n_grid, np.float32)
    start = 0
    while start < n_genes:
        stop = start
        while stop < n_genes and homes[stop] == homes[start]:
            stop += 1
        prior[:] = 1 / n_grid
        for _ in range(_STEPS):
            new[:] = 0
            for g in range(start, stop):
                of_gene = np.float32(0)
                for j in range(n_grid):
                    of_gene += prior[j] * likelihood[g, j]
                scale = np.float32(1) / of_gene
                for j in range(n_grid):
                    new[j] += likelihood[g, j] * scale
            change = 0.0
            for j in range(n_grid):
                moved = np.float32(prior[j] * new[j] / (stop - start))
                change = max(change, abs(moved - prior[j]))
                prior[j] = moved
            if change < _STILL:
                break
        for g in range(start, stop):
            total, mean = 0.0, 0.0
            for j in range(n_grid):
                weight = prior[j] * likelihood[g, j]
                total += weight
                mean += weight * values[g, j]
            out[g] = mean / total
        start = stop


@dataclass(frozen=True, eq=False)
class CrossFit:
    """Populations of the cells of a fold, what holds for a half of the cells learned from the other half."""

    fold: Fold
    own: np.ndarray  # of each cell, its population's row among the factors
    factors: np.ndarray  # of both halves, shape (2 x populations, genes)
    shares: np.ndarray

    @classmethod
    def learned(cls, expected: np.ndarray, fold: Fold, halves: Sequence[np.ndarray], labels: np.ndarray) -> CrossFit:
        """Return the populations with these labels; `expected` are dense expected counts of the cells.

        `halves` are numbers of cells in the fold.
        """
        n_populations, own = int(labels.max()) + 1, labels.copy()
        for i, half in enumerate(halves):
            own[half] += i * n_populations

        def from_cells(cells: np.ndarray) -> Populations:
            observed, given = (sums_of(values[cells], labels[cells], n_populations) for values in (fold.seen, expected))
            return populations_of(observed, given, np.zeros(given.shape, np.float32), 0.0)

        found = list(in_threads(from_cells, reversed(halves)))
        return cls(
            fold, own, *(np.concatenate([getattr(each, name) for each in found]) for name in ("factors", "shares"))
        )

    def probabilities(self, blocks: Iterable[tuple[slice, np.ndarray]], heights: Sequence[float]) -> np.ndarray:
        """Return the probability of each held-out entry, shape (heights, entries), from counts before refinement.

        `blocks` are (cells, their expected counts), as `Profiles.blocks` yields them.
        """
        size, held_out = row_sums(self.fold.seen).astype(np.float32), self.fold.held_out
        out, levels = np.empty((len(heights), held_out.nnz)), np.array(heights, np.float32)

        def of_block(block: tuple[slice, np.ndarray]) -> None:
            rows, expected = block
            of_cells = expected, self.own[rows], self.factors, self.shares, levels, size[rows]
            _probabilities(*of_cells, held_out.indptr[rows.start : rows.stop + 1], held_out.indices, out)

        for _ in in_threads(of_block, blocks):
            pass
        return out


def best_refinement(expected: np.ndarray, fold: Fold, halves: Sequence[np.ndarray]) -> tuple[Refinement, CrossFit]:
    """Return the number of populations and the height of the floor that gain most on held-out molecules, and these.

    Every height is tried for one population, two, four and on until two in a row gain nothing more.
    """
    sketch = sketch_of(roots(expected))
    blocks = [(rows, expected[rows]) for rows in rows_of(*expected.shape)]
    fit = CrossFit.learned(expected, fold, halves, clusters_of(sketch, 1))
    best, best_fit, most = AS_IT_IS, fit, -np.inf
    n_populations = 1
    while True:
        gains = [fold.gain_of(each).mean for each in fit.probabilities(blocks, HEIGHTS)]
        if max(gains) > most:
            best, best_fit, most = Refinement(n_populations, HEIGHTS[int(np.argmax(gains))]), fit, max(gains)
        n_populations *= 2
        if n_populations > 4 * best.n_populations or n_populations * _LEAST_CELLS > len(sketch):
            return best, best_fit
        fit = CrossFit.learned(expected, fold, halves, clusters_of(sketch, n_populations))


def cross_fit(expected: np.ndarray, fold: Fold, halves: Sequence[np.ndarray], n_populations: int) -> CrossFit:
    """Return so many populations, learned from expected counts."""
    return CrossFit.learned(expected, fold, halves, clusters_of(sketch_of(roots(expected)), n_populations))


def populations_of(observed: np.ndarray, expected: np.ndarray, centers: np.ndarray, height: float) -> Populations:
    """Return populations from what was observed of their genes and what the denoiser expects, see `factors_of`."""
    factors = nested_factors(observed, expected)
    share = factors * expected
    share /= np.where((total := share.sum(axis=1, keepdims=True)) > 0, total, 1)
    return Populations(centers, factors, share.astype(np.float32), height)
