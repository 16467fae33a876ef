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

import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

from .._blocks import Block, Chunks, Partial
from .._counts import row_sums
from ._profiles import MixedProfiles, Profiles, ratio

PHI = np.concatenate([[0], np.geomspace(0.01, 100, 17)])
"""The grid of phi."""
_STEPS = 200  # of expectation maximisation


def dispersion_curves(profiles: Profiles, held_out: sp.csr_matrix, size: np.ndarray) -> np.ndarray:
    """Return the log likelihood of each phi of the grid for each gene, shape (grid, genes).

    `profiles` were predicted from a part with `size` molecules in each cell, and are brought to the depth of the other.
    """
    depth = np.asarray(held_out.sum(axis=1)).ravel() / np.maximum(size, 1)
    expected = np.empty(held_out.nnz)
    zeros = np.zeros((len(PHI), held_out.shape[1]))  # the part of the log likelihood that every entry has, zero or not
    for rows, found in profiles.blocks():
        block = found * depth[rows, None].astype(np.float32)
        entries = slice(held_out.indptr[rows.start], held_out.indptr[rows.stop])
        lengths = np.diff(held_out.indptr[rows.start : rows.stop + 1])
        expected[entries] = block[np.repeat(np.arange(len(lengths)), lengths), held_out.indices[entries]]
        zeros[0] -= block.sum(axis=0)
        for k, phi in enumerate(PHI[1:], start=1):
            zeros[k] -= np.log1p(np.float32(phi) * block).sum(axis=0) / phi
    x, genes, m = held_out.data.astype(np.float64), held_out.indices, np.maximum(expected, 1e-12)
    stored = [x * np.log(m)]
    for phi in PHI[1:]:
        shape = 1 / phi
        stored.append(gammaln(x + shape) - gammaln(shape) + x * np.log(phi * m / (1 + phi * m)))
    return zeros + np.array([np.bincount(genes, weights=part, minlength=held_out.shape[1]) for part in stored])


def dispersions(curves: np.ndarray) -> np.ndarray:
    """Return the posterior mean of phi for each gene, under the prior over the grid that makes all genes likeliest.

    The log likelihoods are those of `dispersion_curves`. The prior is a concave problem for expectation maximisation.
    """
    likelihood = np.exp(curves - curves.max(axis=0))
    prior = np.full(len(PHI), 1 / len(PHI))
    for _ in range(_STEPS):
        posterior = prior[:, None] * likelihood
        posterior /= posterior.sum(axis=0)
        prior = posterior.mean(axis=1)
    return PHI @ posterior


def scales_of_cells(chunks: Chunks, profiles: Profiles, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what gives mixed cells their sizes, shape (cells,), and the weight of a cell's own count, shape (genes,).

    The weight is phi m / (1 + phi m), its mean over cells: 0 where nothing is mixed in. One pass over the counts.
    """

    def of_block(block: Block) -> Partial:
        own = profiles.of_cells(block.cells)
        ones = np.ones(len(block.cells), np.float32)
        share, scale = np.zeros(len(phi)), np.zeros(len(block.cells), np.float32)
        for rows, mixed in MixedProfiles(own, block.counts, phi, ones).blocks():
            scale[rows] = ratio(row_sums(block.counts[rows]), mixed.sum(axis=1))
        for _, m in own.blocks():
            scaled = m * phi.astype(np.float32)
            share += (scaled / (1 + scaled)).sum(axis=0)
        return Partial([share], [scale])

    (share,), (scale,) = chunks.run(of_block)
    return scale, share / chunks.shape[0]
