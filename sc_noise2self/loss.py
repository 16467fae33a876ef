"""Losses on molecules that the denoiser has not seen, and their errors.

`cumulative_residuals` gives the squared error of every rank at once; `held_out_gain` is the one currency in which any
two denoisers compare: nats per held-out molecule above the mean profile. Both are averages over cells, so
differences between candidates are paired by cell.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import scipy.sparse as sp

_BLEND = 0.005  # share of the mean profile mixed into a prediction, so that one exact zero costs 5.3 nats, not infinity


class Profiles(Protocol):
    """What a loss needs of a denoiser's prediction: expected counts of cells, block by block."""

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (cells, their expected counts), each block dense of shape (cells in it, genes)."""
        ...


@dataclass(frozen=True, eq=False)
class Score:
    """A ratio of sums over cells, with what is needed to pair it with another on the same cells.

    Attributes
    ----------
    sums
        What each cell adds to the numerator, shape (cells,).
    weights
        What each cell adds to the denominator, shape (cells,).
    """

    sums: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        """Return the ratio."""
        return float(self.sums.sum() / self.weights.sum())

    @property
    def error(self) -> float:
        """Standard error of the ratio over cells."""
        return self._error(self.sums, self.mean)

    def error_of_difference(self, other: Score) -> float:
        """Return the standard error of this less another on the same cells, paired by cell."""
        return self._error(self.sums - other.sums, self.mean - other.mean)

    def __add__(self, other: Self) -> Self:
        """Pool two measurements on the same cells, e.g. of both directions of a split."""
        return type(self)(self.sums + other.sums, self.weights + other.weights)

    def _error(self, sums: np.ndarray, mean: float) -> float:
        n = len(sums)
        if n < 2:
            return float("nan")
        residual = sums - mean * self.weights
        return float(np.sqrt(n / (n - 1) * (residual**2).sum()) / self.weights.sum())


class Gain(Score):
    """Nats (`sums`) per held-out molecule (`weights`) above the mean profile."""


def held_out_probabilities(profiles: Profiles, held_out: sp.csr_matrix) -> np.ndarray:
    """Return the probability that the denoiser gave to each stored entry of `held_out`, shape (nnz,).

    Parameters
    ----------
    profiles
        The denoiser's prediction from the other part of the molecules; rows are scaled to sum to 1.
    held_out
        CSR counts of the same cells and genes.
    """
    out = np.empty(held_out.nnz, np.float64)
    for rows, expected in profiles.blocks():
        entries = slice(held_out.indptr[rows.start], held_out.indptr[rows.stop])
        cells = np.repeat(np.arange(rows.stop - rows.start), np.diff(held_out.indptr[rows.start : rows.stop + 1]))
        total = expected.sum(axis=1, dtype=np.float64)
        out[entries] = expected[cells, held_out.indices[entries]] / np.where(total > 0, total, 1)[cells]
    return out


def held_out_gain(probabilities: np.ndarray, held_out: sp.csr_matrix, mean_profile: np.ndarray) -> Gain:
    """Return the held-out gain of a prediction, a proper score: only the true profile maximises its expectation.

    Parameters
    ----------
    probabilities
        From `held_out_probabilities`, shape (nnz,).
    held_out
        CSR counts that the prediction has not seen.
    mean_profile
        The mean profile of the part that was seen, summing to 1, shape (genes,). Molecules of genes that it has none
        of are left out: no method could tell them apart.
    """
    g = mean_profile[held_out.indices]
    molecules = np.where(g > 0, held_out.data, 0).astype(np.float64)
    g = np.where(g > 0, g, 1)
    nats = molecules * np.log((1 - _BLEND) * probabilities / g + _BLEND)
    cells = np.repeat(np.arange(held_out.shape[0]), np.diff(held_out.indptr))
    return Gain(
        np.bincount(cells, weights=nats, minlength=held_out.shape[0]),
        np.bincount(cells, weights=molecules, minlength=held_out.shape[0]),
    )


def cumulative_residuals(target: sp.csr_matrix, scores: np.ndarray, loadings: np.ndarray) -> np.ndarray:
    """Return each cell's squared error when `target` is predicted by the first 0, 1, ..., K components.

    With A the scores and C the loadings, M = target C' and G = C C':
    |r_i(k)|^2 = |x_i|^2 - 2 sum_{j<=k} A_ij M_ij + sum_{j,l<=k} A_ij A_il G_jl.
    Sparse products only; nothing of size cells x genes is formed.

    Parameters
    ----------
    target
        CSR, cells x genes.
    scores
        Shape (cells, K).
    loadings
        Shape (K, genes).

    Returns
    -------
    float64 of shape (cells, K + 1).
    """
    a = scores.astype(np.float64)
    m = np.asarray(target @ np.ascontiguousarray(loadings.T), dtype=np.float64)
    gram = loadings.astype(np.float64) @ loadings.T.astype(np.float64)
    # What component k adds to the quadratic form: its products with the components before it, twice, and its square.
    adds = a * (2 * (a @ np.triu(gram, 1)) + a * np.diag(gram)) - 2 * a * m
    return row_square_sums(target)[:, None] + np.concatenate([np.zeros((len(a), 1)), np.cumsum(adds, axis=1)], axis=1)


def row_square_sums(matrix: sp.csr_matrix, block: int = 256) -> np.ndarray:
    """Return the squared norm of each row of a CSR matrix, float64, by blocks of rows."""
    out = np.empty(matrix.shape[0])
    for start in range(0, matrix.shape[0], block):
        ends = matrix.indptr[start : start + block + 1]
        rows = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        squares = matrix.data[ends[0] : ends[-1]].astype(np.float64) ** 2
        out[start : start + block] = np.bincount(rows, weights=squares, minlength=len(ends) - 1)
    return out


def paired_errors(losses: np.ndarray, best: int) -> np.ndarray:
    """Return the standard error of each candidate's mean loss less the best one's, paired by cell.

    Parameters
    ----------
    losses
        Shape (cells, candidates).
    best
        Index of the candidate that the others are compared with; its own error is 0.
    """
    n = len(losses)
    if n < 2:
        return np.full(losses.shape[1], np.nan)
    return (losses - losses[:, [best]]).std(axis=0, ddof=1) / np.sqrt(n)
