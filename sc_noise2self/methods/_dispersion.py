"""How widely true rates lie around a prediction, gene by gene, from molecules that it was made without.

A rate is Gamma distributed around its expected count m, with the squared coefficient of variation
phi (m / level)^power, where `level` is the gene's mean expected count. Then a held-out count is negative binomial,
of variance m + phi level^-power m^(2 + power) (NB-P, Greene 2008). With a power of 0 the rate varies by the same factor
wherever the gene is expressed, as biology's bursts let it; with -1 its variance grows as m does, as the error of a mean
over cells; with a power between them, by both. What halves of the molecules tell of phi at their level is taken to hold
at the level of all: a prediction from all is nearer the truth, so intervals are rather too wide than too narrow.

Each gene's likelihood is taken on a grid of phi, and a prior over that grid is learned from all genes (nonparametric
empirical Bayes, Kiefer & Wolfowitz 1956), so that genes with few molecules lean on the rest. Moments instead of the
likelihood would overrate rare genes. The power is the one that makes held-out counts likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numba
import numpy as np
import scipy.sparse as sp

from .._counts import row_sums
from .._loss import Profiles
from .._mixture import mixture_weights

PHI = np.concatenate([[0], np.geomspace(1e-4, 100, 25)])
"""The grid of phi; thousands of molecules in a cell tell one of 0.001 from 0."""
POWERS = (0.0, -0.25, -0.5, -0.75, -1.0)
_SHIFT = 21  # bits of a float32 that are left out of its bin: four bins an octave
_FIRST = (127 - 20) << 2  # bin of 2^-20, where the logarithm is a straight line
_BINS = 35 * 4  # up to 2^15
_AT_A_TIME = 64  # genes
_MANY = 30  # counts from which a product may overflow
_LEAST = 1e-6  # of a gene's level: expected counts below it are as widely known as this one


class Dispersion(NamedTuple):
    """The law of rates around expected counts: phi (m / level)^power."""

    phi: np.ndarray  # squared coefficient of variation of each gene's rate where it is expected as in the mean
    level: np.ndarray  # mean expected count of each gene
    power: float
    evidence: float = 0.0  # share of a cell's own count that is news to the prediction, where counts are mixed in

    def at(self, expected: np.ndarray, genes: Any = slice(None)) -> np.ndarray:
        """Return the squared coefficients of variation around expected counts, which are of these genes."""
        phi, level = self.phi[genes].astype(expected.dtype), self.level[genes].astype(expected.dtype)
        if not self.power:
            return np.broadcast_to(phi, expected.shape)
        relative = np.maximum(expected / np.where(level > 0, level, 1), expected.dtype.type(_LEAST))
        np.power(relative, expected.dtype.type(self.power), out=relative)
        return phi * np.where(level > 0, relative, 1)

    def mixing(self, expected: np.ndarray, genes: Any = slice(None)) -> np.ndarray:
        """Return the same as cells' own counts see them: the mean is m (1 + phi x) / (1 + phi m) with this phi."""
        return self.at(expected, genes) * expected.dtype.type(self.evidence)


class _Law(NamedTuple):
    """Dispersions to be compared."""

    level: np.ndarray  # of each gene
    grid: np.ndarray
    power: float


class _Bins(NamedTuple):
    """Entries of genes in bins, each as two that have its mean and its variance."""

    gene: np.ndarray
    weight: np.ndarray  # of either of the two
    expected: np.ndarray  # shape (2, bins)

    @classmethod
    def of(cls, weight: np.ndarray, total: np.ndarray, squares: np.ndarray) -> Self:
        """Return those that are not empty, from sums of weights times powers of values, shape (genes, bins)."""
        gene, bin = np.nonzero(weight)
        weight, mean = weight[gene, bin], total[gene, bin] / weight[gene, bin]
        spread = np.sqrt(np.maximum(squares[gene, bin] / weight - mean**2, 0))
        return cls(gene, weight / 2, np.stack([np.maximum(mean - spread, _LEAST * mean), mean + spread]))

    def some(self, genes: np.ndarray) -> _Bins:
        """Return those of some genes, numbered as these are."""
        number = _numbers(genes)[self.gene]
        kept = number >= 0
        return _Bins(number[kept], self.weight[kept], self.expected[:, kept])


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What held-out counts say of the dispersions of their genes.

    A count x around m adds, beside what it adds for every dispersion, the log likelihood
    sum over k < x of log(1 + k phi) - (x + 1 / phi) log(1 + phi m); entries are summed in bins of m for the second
    term, which are a quarter wide at most.
    """

    total: np.ndarray  # expected counts of each gene
    entries: _Bins  # every entry, zero or not
    molecules: _Bins
    repeated: tuple[np.ndarray, np.ndarray, np.ndarray]  # gene, expected count and count where that is 2 or more

    @classmethod
    def of(cls, profiles: Profiles, held_out: sp.csr_matrix, size: np.ndarray) -> Self:
        """Return what they say of profiles that were predicted from a part with `size` molecules in each cell.

        These are brought to the depth of what was held out.
        """
        depth = (row_sums(held_out) / np.maximum(size, 1)).astype(np.float32)
        n_genes = held_out.shape[1]
        stored = np.empty(held_out.nnz, np.float32)
        sums = np.zeros((3, n_genes, _BINS))
        for rows, found in profiles.blocks():
            block = found * depth[rows, None]
            entries = slice(held_out.indptr[rows.start], held_out.indptr[rows.stop])
            lengths = np.diff(held_out.indptr[rows.start : rows.stop + 1])
            stored[entries] = block[np.repeat(np.arange(len(lengths)), lengths), held_out.indices[entries]]
            _add_to_bins(block, block.view(np.int32), *sums)
        of_entries, total = _Bins.of(*sums), sums[1].sum(axis=1)
        gene, x, m = held_out.indices.astype(np.intp), held_out.data, stored.astype(np.float64)
        place = gene * _BINS + np.clip((stored.view(np.int32) >> _SHIFT) - _FIRST, 0, _BINS - 1)
        for k, each in enumerate(sums):
            each[:] = np.bincount(place, x * m**k, each.size).reshape(each.shape)
        more = np.flatnonzero(x > 1)
        return cls(total, of_entries, _Bins.of(*sums), (gene[more], m[more], x[more].astype(np.int64)))

    def some(self, genes: np.ndarray) -> HeldOut:
        """Return what they say of the genes that are marked."""
        number = _numbers(genes)[self.repeated[0]]
        kept = number >= 0
        repeated = number[kept], self.repeated[1][kept], self.repeated[2][kept]
        bins = self.entries.some(genes), self.molecules.some(genes)
        return HeldOut(self.total[genes], *bins, repeated)

    def curves(self, grid: np.ndarray = PHI, power: float = 0.0, level: np.ndarray | float = 1.0) -> np.ndarray:
        """Return the log likelihood of each phi of the grid, which starts with 0, for each gene, shape (grid, genes).

        `power` and `level` are those of `Dispersion`. What all phi and powers have in common is left out.
        """
        out = np.zeros((len(self.total), len(grid)))
        law = _Law(np.broadcast_to(level, len(out)), grid[1:], power)
        for i in range(2):
            for bins, over_phi in ((self.entries, True), (self.molecules, False)):
                _add_logs(bins.gene, bins.weight, bins.expected[i], law, over_phi, out[:, 1:])
        _add_repeated(*self.repeated, law, out[:, 1:])
        out[:, 0] = -self.total
        return out.T


def _numbers(genes: np.ndarray) -> np.ndarray:
    """Return the number of each gene among those that are marked, -1 of the others."""
    return np.where(genes, np.cumsum(genes) - 1, -1)


@numba.njit(nogil=True, cache=True)
def _add_to_bins(
    values: np.ndarray, bits: np.ndarray, number: np.ndarray, total: np.ndarray, squares: np.ndarray
) -> None:
    """Add values >= 0, shape (cells, genes), to the bins of their genes, which the first bits of a float32 tell.

    A few genes at a time, whose bins stay in the processor's cache.
    """
    n_genes = values.shape[1]
    for start in range(0, n_genes, _AT_A_TIME):
        for i in range(len(values)):
            for g in range(start, min(start + _AT_A_TIME, n_genes)):
                bin = min(max((bits[i, g] >> _SHIFT) - _FIRST, 0), _BINS - 1)
                number[g, bin] += 1
                value = np.float64(values[i, g])
                total[g, bin] += value
                squares[g, bin] += value * value


@numba.njit(nogil=True, cache=True)
def _relative(m: float, level: float, power: float) -> float:
    """Return how many times that at the level the dispersion around m is."""
    return max(m / level, _LEAST) ** power if power != 0 and level > 0 else 1.0


@numba.njit(nogil=True, cache=True)
def _add_logs(
    genes: np.ndarray,
    weight: np.ndarray,
    expected: np.ndarray,
    law: _Law,
    over_phi: bool,
    out: np.ndarray,
) -> None:
    """Take log(1 + phi m), or that over phi, from `out`, shape (genes, grid)."""
    for i in range(len(genes)):
        g, m = genes[i], expected[i]
        relative = _relative(m, law.level[g], law.power)
        for j in range(len(law.grid)):
            phi = law.grid[j] * relative
            out[g, j] -= weight[i] * math.log1p(phi * m) / (phi if over_phi else 1.0)


@numba.njit(nogil=True, cache=True)
def _add_repeated(
    genes: np.ndarray,
    expected: np.ndarray,
    counts: np.ndarray,
    law: _Law,
    out: np.ndarray,
) -> None:
    """Add the logarithms of 1 + k phi, k below each count, to `out`, shape (genes, grid)."""
    for i in range(len(genes)):
        g, x = genes[i], counts[i]
        relative = _relative(expected[i], law.level[g], law.power)
        for j in range(len(law.grid)):
            phi = law.grid[j] * relative
            if x < _MANY:
                product = 1.0
                for k in range(1, x):
                    product *= 1 + k * phi
                out[g, j] += math.log(product)
            else:
                out[g, j] += math.lgamma(x + 1 / phi) - math.lgamma(1 / phi) + x * math.log(phi)


def posterior_means(curves: np.ndarray, grid: np.ndarray = PHI) -> tuple[np.ndarray, float]:
    """Return the posterior mean of phi for each gene, and the log likelihood of all genes.

    The log likelihoods of phi are those of `HeldOut.curves`. The prior over the grid is the one that makes all genes
    likeliest.
    """
    highest = curves.max(axis=0)
    likelihood = np.exp(curves - highest)
    posterior = mixture_weights(likelihood)[:, None] * likelihood
    of_genes = posterior.sum(axis=0)
    return grid @ (posterior / of_genes), float((np.log(of_genes) + highest).sum())


def best_power(curves_of: Callable[[float], np.ndarray]) -> float:
    """Return the power under which held-out counts are likeliest, of their curves by power.

    They are tried from 0 on, until one is less likely than the last.
    """
    best, most = POWERS[0], -np.inf
    for power in POWERS:
        _, likelihood = posterior_means(curves_of(power))
        if likelihood <= most:
            break
        best, most = power, likelihood
    return best


def hidden_by_totals(size: np.ndarray) -> float:
    """Return what dispersions are larger by than counts show that are compared at the cells' own totals.

    Given its total n, a cell's count of a gene with mean m varies by m - m^2 / n, so m^2 / n of its spread is not seen:
    a phi of 1 / n, in the mean over cells weighted by n^2, as m^2 is.
    """
    square = np.square(size, dtype=np.float64).sum()
    return float(size.sum() / square) if square else 0.0
