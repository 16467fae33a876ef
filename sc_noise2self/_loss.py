"""Losses on molecules that the denoiser has not seen, and their errors.

Each loss is written once: those with a name in `LOSSES`, the held-out gain of cells and genes (nats per held-out
molecule above the mean profile, the one currency in which any two denoisers compare), and the squared error of every
rank at once. All are averages over cells, so differences between candidates are paired by cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, Self

import numpy as np
import scipy.sparse as sp

from ._blocks import Partial
from ._counts import row_sums
from ._transform import PoissonExpectation

_FEW_CELLS = 10  # with molecules of a gene: fewer tell neither its gain's error nor its sign
_ROUNDING = 1e-5  # nats: a prediction in single precision that is the mean differs from it by less
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
        """The ratio; 0, the mean profile's own, where no cell has any weight."""
        return float(self.sums.sum() / self.weights.sum()) if self.n_cells else 0.0

    @property
    def error(self) -> float:
        """Standard error of the ratio over cells; infinite where fewer than two have any weight."""
        return self._error(self.sums, self.mean)

    def error_of_difference(self, other: Score) -> float:
        """Return the standard error of this less another on the same cells, paired by cell."""
        return self._error(self.sums - other.sums, self.mean - other.mean) if other is not self else 0.0

    @property
    def n_cells(self) -> int:
        """How many cells have any weight."""
        return int((self.weights > 0).sum())

    def __add__(self, other: Self) -> Self:
        """Pool two measurements on the same cells, e.g. of both directions of a split."""
        return type(self)(self.sums + other.sums, self.weights + other.weights)

    def __neg__(self) -> Score:
        """Return the loss that a gain is, or the other way round."""
        return Score(-self.sums, self.weights)

    def _error(self, sums: np.ndarray, mean: float) -> float:
        n = self.n_cells
        if n < 2:
            return float("inf")
        residual = sums - mean * self.weights
        return float(np.sqrt(n / (n - 1) * (residual**2).sum()) / self.weights.sum())


class Gain(Score):
    """Nats (`sums`) per held-out molecule (`weights`) above the mean profile."""

    @property
    def is_clear(self) -> bool:
        """Whether the mean profile is beaten by more than two standard errors, and by more than rounding."""
        return is_clear(self.mean, self.error)

    def __str__(self) -> str:
        """Return the gain with its error, for a message."""
        error = f"+- {self.error:.4f}" if np.isfinite(self.error) else "of one cell, which tells no error,"
        return f"{self.mean:.4f} {error} nats per held-out molecule"


def is_clear(gain: float, error: float) -> bool:
    """Whether a gain of this error is more than two of them, and more than rounding, above 0."""
    return gain > max(2 * error, _ROUNDING)


def log_ratio(predicted: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return log(p / g), a little of g mixed into p: nats that one molecule gains over the mean profile."""
    return np.log((1 - _BLEND) * predicted / mean + _BLEND)


def _nats(molecules: np.ndarray, predicted: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return nats and molecules; none of a gene whose mean is 0, since no method could tell such genes apart."""
    known = mean > 0
    molecules = np.where(known, molecules, 0).astype(np.float64)
    return molecules * log_ratio(predicted, np.where(known, mean, 1)), molecules


def _poisson(expected: np.ndarray, held_out: sp.csr_matrix, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = held_out.tocoo()
    nats, molecules = _nats(x.data, expected[x.row, x.col], mean[x.row, x.col])
    gained, weights = (np.bincount(x.row, weights=each, minlength=len(expected)) for each in (nats, molecules))
    return (1 - _BLEND) * (expected - mean).sum(axis=1) - gained, weights


def _squared(
    transform: Literal["none", "sqrt", "log1p"], expected: np.ndarray, held_out: sp.csr_matrix, mean: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    x = held_out.toarray().astype(np.float64)
    if transform != "none":
        x, expected = (np.sqrt if transform == "sqrt" else np.log1p)(x), PoissonExpectation(transform)(expected)
    return np.square(x - expected).sum(axis=1), np.full(len(x), float(x.shape[1]))


NamedLoss = Callable[[np.ndarray, sp.csr_matrix, np.ndarray], tuple[np.ndarray, np.ndarray]]
LOSSES: dict[str, NamedLoss] = {
    "poisson": _poisson,
    "mse": partial(_squared, "none"),
    "mse_sqrt": partial(_squared, "sqrt"),
    "mse_log1p": partial(_squared, "log1p"),
}
"""Losses by name. Each takes expected counts, dense, held-out counts, CSR, and expected counts of the mean profile,
dense, all of shape (cells, genes), and returns what each cell adds to the `sums` and `weights` of a `Score`."""

Loss = str | Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A name of `LOSSES`, or a function of (expected counts, held-out counts), dense, that returns each cell's loss."""


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
        of are left out.
    """
    nats, molecules = _nats(held_out.data, probabilities, mean_profile[held_out.indices])
    cells = np.repeat(np.arange(held_out.shape[0]), np.diff(held_out.indptr))
    return Gain(*(np.bincount(cells, weights=each, minlength=held_out.shape[0]) for each in (nats, molecules)))


class GeneGains:
    """The held-out gain of cells and of genes, in sums over cells: one pass tells both.

    The gain of a gene is in nats per held-out molecule of it, with its error over cells. With p the predicted profile
    of a cell, g the mean profile, L the cell's held-out molecules and x those of the gene,
    a gene's gain is sum over cells of x log(p / g) - L (p - g), over its molecules: the difference of two Poisson
    log-likelihoods. Profiles sum to one, so the second term vanishes over all genes, and the mean of these gains
    weighted by molecules is the total gain. Without it a gene would gain by being predicted too high everywhere.

    Parameters
    ----------
    mean_profiles
        One for every part that is held out: the mean profile of what was seen, as in `held_out_gain`. The parts are
        pooled cell by cell.
    totals
        Held-out molecules of each gene in each of these parts, over all cells that will be measured.
    """

    def __init__(self, mean_profiles: Sequence[np.ndarray], totals: Sequence[np.ndarray]) -> None:
        self._mean_profiles = mean_profiles
        self._total = np.sum([np.where(g > 0, t, 0) for g, t in zip(mean_profiles, totals, strict=True)], axis=0)

    def of_cells(self, predictions: Sequence[Profiles], held_out: Sequence[sp.csr_matrix]) -> Partial:
        """Return the sums over cells that `of_genes` takes, and the nats and molecules of each cell, as in `Gain`.

        Parameters
        ----------
        predictions, held_out
            One of each for every part: what was predicted of these cells, and their molecules.
        """
        known = [
            x @ sp.diags_array((g > 0).astype(x.dtype)) for x, g in zip(held_out, self._mean_profiles, strict=True)
        ]
        for x in known:
            x.eliminate_zeros()
        sizes = np.column_stack([row_sums(x) for x in known]).astype(np.float32) * np.float32(1 - _BLEND)
        pooled = sum(known[1:], known[0])
        sums, nats_of_cells = np.zeros((6, len(self._total))), np.zeros(pooled.shape[0])
        for blocks in zip(*(prediction.blocks() for prediction in predictions), strict=True):
            rows = blocks[0][0]
            totals = [p.sum(axis=1) for _, p in blocks]
            predicted = np.column_stack([np.where(total > 0, sizes[rows, i], 0) for i, total in enumerate(totals)])
            nats = predicted @ np.array(self._mean_profiles, np.float32)
            likelier = []
            for i, ((_, block), x, g) in enumerate(zip(blocks, known, self._mean_profiles, strict=True)):
                p = np.multiply(block, (1 / np.where(totals[i] > 0, totals[i], 1))[:, None], out=block)
                entry = x[rows].tocoo()
                likelihood = log_ratio(p[entry.row, entry.col].astype(np.float64), g[entry.col])
                likelier.append((entry, entry.data * likelihood))
                nats -= np.multiply(p, predicted[:, [i]], out=p)
            for entry, gained in likelier:
                nats[entry.row, entry.col] += gained
                nats_of_cells[rows] += np.bincount(entry.row, weights=gained, minlength=len(nats))
            sums += self._sums(nats, pooled[rows].tocoo())
        return Partial([sums], [nats_of_cells, row_sums(pooled)])

    def _sums(self, nats: np.ndarray, entry: sp.coo_matrix) -> np.ndarray:
        """Return sums over cells, shape (6, genes): nats, their squares elsewhere, cells, and what moves the ratio.

        Leaving a cell out moves the ratio by (nats - gain molecules) / (total - molecules); the square of that is a
        sum of three, and `elsewhere` are the cells without a molecule of the gene.
        """
        gene, molecules, there = entry.col, entry.data.astype(np.float64), nats[entry.row, entry.col].astype(np.float64)
        total = nats.sum(axis=0, dtype=np.float64)
        nats[entry.row, entry.col] = 0
        elsewhere = np.einsum("ij,ij->j", nats, nats, dtype=np.float64)
        left = self._total[gene] - molecules
        scale = 1 / np.where(left > 0, left, np.inf)
        moves, shares = there * scale, molecules * scale
        weights = (np.ones(len(gene)), moves**2, moves * shares, shares**2)
        return np.array([total, elsewhere, *(np.bincount(gene, weights=w, minlength=len(total)) for w in weights)])

    def of_genes(self, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the gain of each gene and its jackknife standard error over cells, shape (genes,) each.

        The gain is NaN for genes without a held-out molecule, the error for those with molecules in fewer than
        ten cells.
        """
        nats, elsewhere, n_cells, moves, products, shares = sums
        total = np.where(self._total > 0, self._total, 1)
        gain = np.where(np.abs(nats) < _ROUNDING * total, 0, nats / total)
        squares = elsewhere / total**2 + moves - 2 * gain * products + gain**2 * shares
        error = np.where(n_cells < _FEW_CELLS, np.nan, np.sqrt(np.maximum(squares, 0)))
        return np.where(self._total > 0, gain, np.nan), error


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


def paired_errors(loss: np.ndarray, products: np.ndarray, n_cells: float) -> np.ndarray:
    """Return the standard error of each candidate's mean loss less the least one's, paired by cell.

    Fewer than two cells tell no error: it is infinite.

    Parameters
    ----------
    loss
        Mean over cells of each candidate's loss, shape (candidates,).
    products
        D'D, with D the cells' losses less that of one of the candidates, shape (candidates, candidates): sums over
        cells from which the variance of any difference follows.
    n_cells
        How many cells.
    """
    if n_cells < 2:
        return np.full(len(loss), np.inf)
    best = int(np.argmin(loss))
    squares = np.diag(products) + products[best, best] - 2 * products[best]
    variance = (squares - n_cells * (loss - loss[best]) ** 2) / (n_cells - 1)
    variance[best] = 0
    return np.sqrt(np.maximum(variance, 0) / n_cells)
