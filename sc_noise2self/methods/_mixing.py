"""Mix the noisy input back into a denoised profile (Noise2Self, Batson & Royer 2019, section 4.2).

A J-invariant prediction and the observation have independent errors, so a combination beats both. For counts it is
conjugate: a rate with mean m (the prediction) and squared coefficient of variation phi, Gamma distributed, given a
Poisson count x has the expectation m (1 + phi x) / (1 + phi m). With phi = 0 the denoiser explains the gene and the
count adds nothing; the larger phi, the more the cell's own count weighs.

phi comes from J-invariant residuals: the held-out counts x2 of a gene are negative binomial around the prediction
m2 that was made without them. Each gene's likelihood is taken on a grid of phi, and a prior over that grid is
learned from all genes (nonparametric empirical Bayes, Kiefer & Wolfowitz 1956), so that genes with few molecules
lean on the rest. Moments instead of the likelihood would overrate rare genes.
"""

from __future__ import annotations

import numba
import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

from .._blocks import Block, Chunks, Partial
from .._counts import row_sums
from ._profiles import MixedProfiles, Profiles

PHI = np.concatenate([[0], np.geomspace(1e-4, 100, 25)])
"""The grid of phi; thousands of molecules in a cell tell one of 0.001 from 0."""
_STEPS = 200  # of expectation maximisation
_SHIFT = 21  # bits of a float32 that are left out of its bin: four bins an octave
_FIRST = (127 - 20) << 2  # bin of 2^-20, where the logarithm is a straight line
_BINS = 35 * 4  # up to 2^15
_AT_A_TIME = 64  # genes


def dispersion_curves(
    profiles: Profiles, held_out: sp.csr_matrix, size: np.ndarray, grid: np.ndarray = PHI
) -> np.ndarray:
    """Return the log likelihood of each phi of the grid, which starts with 0, for each gene, shape (grid, genes).

    `profiles` were predicted from a part with `size` molecules in each cell, and are brought to the depth of the other.
    What every entry adds, zero or not, is summed over expected counts in bins that are a quarter wide at most, by their
    mean and their variance in the bin (Taylor's series to the second order).
    """
    depth = (row_sums(held_out) / np.maximum(size, 1)).astype(np.float32)
    n_genes = held_out.shape[1]
    expected = np.empty(held_out.nnz)
    number, total, squares = np.zeros((3, n_genes, _BINS))
    for rows, found in profiles.blocks():
        block = found * depth[rows, None]
        entries = slice(held_out.indptr[rows.start], held_out.indptr[rows.stop])
        lengths = np.diff(held_out.indptr[rows.start : rows.stop + 1])
        expected[entries] = block[np.repeat(np.arange(len(lengths)), lengths), held_out.indices[entries]]
        _add_to_bins(block, block.view(np.int32), number, total, squares)
    gene, bin = np.nonzero(number)
    number, mean = number[gene, bin], total[gene, bin] / number[gene, bin]
    spread = np.maximum(squares[gene, bin] - number * mean**2, 0) / 2
    zeros = [-total.sum(axis=1)]
    for phi in grid[1:]:
        of_bins = spread * phi / (1 + phi * mean) ** 2 - number * np.log1p(phi * mean) / phi
        zeros.append(np.bincount(gene, of_bins, n_genes))
    x = held_out.data.astype(np.int64)
    distinct = np.flatnonzero(np.bincount(x))
    numbers = np.zeros(distinct.max(initial=0) + 1, np.intp)
    numbers[distinct] = np.arange(len(distinct))
    gammas = gammaln(distinct[:, None] + 1 / grid[1:]) - gammaln(1 / grid[1:])
    stored = np.zeros((n_genes, len(grid)))
    _add_stored(x, numbers, gammas, held_out.indices, np.maximum(expected, 1e-12), grid, stored)
    return np.array(zeros) + stored.T


@numba.njit(nogil=True, cache=True)
def _add_stored(
    x: np.ndarray,
    numbers: np.ndarray,
    gammas: np.ndarray,
    genes: np.ndarray,
    expected: np.ndarray,
    grid: np.ndarray,
    out: np.ndarray,
) -> None:
    """Add to `out`, shape (genes, grid), what the log likelihood of counts has that of zeros has not."""
    for i in range(len(x)):
        own, of_count, m = out[genes[i]], gammas[numbers[x[i]]], expected[i]
        own[0] += x[i] * np.log(m)
        for j in range(1, len(grid)):
            own[j] += of_count[j - 1] + x[i] * np.log(grid[j] * m / (1 + grid[j] * m))


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


def dispersions(curves: np.ndarray, grid: np.ndarray = PHI) -> np.ndarray:
    """Return the posterior mean of phi for each gene, under the prior over the grid that makes all genes likeliest.

    The log likelihoods are those of `dispersion_curves`. The prior is a concave problem for expectation maximisation.
    """
    likelihood = np.exp(curves - curves.max(axis=0))
    prior = np.full(len(grid), 1 / len(grid))
    for _ in range(_STEPS):
        posterior = prior[:, None] * likelihood
        posterior /= posterior.sum(axis=0)
        prior = posterior.mean(axis=1)
    return grid @ posterior


def hidden_by_totals(size: np.ndarray) -> float:
    """Return what dispersions are larger by than counts show that are compared at the cells' own totals.

    Given its total n, a cell's count of a gene with mean m varies by m - m^2 / n, so m^2 / n of its spread is not seen:
    a phi of 1 / n, in the mean over cells weighted by n^2, as m^2 is.
    """
    square = np.square(size, dtype=np.float64).sum()
    return float(size.sum() / square) if square else 0.0


def scales_of_cells(chunks: Chunks, profiles: Profiles, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what gives mixed cells their sizes, shape (cells,), and the weight of a cell's own count, shape (genes,).

    The weight is phi m / (1 + phi m), its mean over cells: 0 where nothing is mixed in. One pass over the counts.
    """

    def of_block(block: Block) -> Partial:
        own = profiles.of_cells(block.cells)
        ones, share = np.ones(len(block.cells), np.float32), np.zeros(len(phi))
        scale = MixedProfiles(own, block.counts, phi, ones).scales_to(row_sums(block.counts))
        for _, m in own.blocks():
            scaled = m * phi.astype(np.float32)
            share += (scaled / (1 + scaled)).sum(axis=0)
        return Partial([share], [scale])

    (share,), (scale,) = chunks.run(of_block)
    return scale, share / chunks.shape[0]
