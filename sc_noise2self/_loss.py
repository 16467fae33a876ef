"""Losses on molecules that the denoiser has not seen, and their errors.

Those with a name are in `LOSSES`; the held-out gain of cells and genes, nats per held-out molecule above the mean
profile, is the one currency in which any two denoisers compare. All are averages over cells, so differences between
candidates are paired by cell.
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

_FEW_CELLS = 40  # with molecules of a gene: of fewer, a gain has too skewed a law for its error to tell
_ROUNDING = 1e-5  # nats: a prediction in single precision that is the mean differs from it by less
_BLEND = 0.005  # share of the mean profile mixed into a prediction, so that one exact zero costs 5.3 nats, not infinity


class Profiles(Protocol):
    """What a loss needs of a denoiser's prediction: expected counts of cells, block by block."""

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (cells, their expected counts), each block dense of shape (cells in it, genes)."""
        ...


@dataclass(frozen=True, eq=False)
class Score:
    """A ratio of sums over cells: what each adds to the numerator and the denominator, shape (cells,) each."""

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
        return int((self.weights > 0).sum())

    def __add__(self, other: Self) -> Self:
        return type(self)(self.sums + other.sums, self.weights + other.weights)

    def __neg__(self) -> Score:
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
        return self.mean > max(2 * self.error, _ROUNDING)

    def __str__(self) -> str:
        error = f"+- {self.error:.4f}" if np.isfinite(self.error) else "of one cell, which tells no error,"
        return f"{self.mean:.4f} {error} nats per held-out molecule"


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


LOSSES: dict[str, Callable[[np.ndarray, sp.csr_matrix, np.ndarray], tuple[np.ndarray, np.ndarray]]] = {
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
    """Return the probability that a prediction gave to each stored entry of `held_out`, shape (nnz,)."""
    out = np.empty(held_out.nnz, np.float64)
    for rows, expected in profiles.blocks():
        entries = slice(held_out.indptr[rows.start], held_out.indptr[rows.stop])
        cells = np.repeat(np.arange(rows.stop - rows.start), np.diff(held_out.indptr[rows.start : rows.stop + 1]))
        total = expected.sum(axis=1, dtype=np.float64)
        out[entries] = expected[cells, held_out.indices[entries]] / np.where(total > 0, total, 1)[cells]
    return out


def held_out_gain(probabilities: np.ndarray, held_out: sp.csr_matrix, mean_profile: np.ndarray) -> Gain:
    """Return the held-out gain of a prediction, a proper score: only the true profile maximises its expectation.

    `probabilities` are from `held_out_probabilities`; `mean_profile`, shape (genes,), is that of what was seen.
    """
    nats, molecules = _nats(held_out.data, probabilities, mean_profile[held_out.indices])
    cells = np.repeat(np.arange(held_out.shape[0]), np.diff(held_out.indptr))
    return Gain(*(np.bincount(cells, weights=each, minlength=held_out.shape[0]) for each in (nats, molecules)))


class GeneGains:
    """The held-out gain of cells and of genes, in sums over cells: one pass tells both.

    With p the predicted profile of a cell, g the mean profile, L the cell's held-out molecules and x those of the gene,
    a gene's gain is the sum over cells of x log(p / g) - L (p - g), over its molecules: the difference of two Poisson
    log-likelihoods. Profiles sum to one, so the second term vanishes over all genes, and the mean of these gains
    weighted by molecules is the total gain. Without it a gene would gain by being predicted too high everywhere.

    For every part that is held out it takes the mean profile of what was seen, and the held-out molecules of each gene
    over all cells that will be measured. The parts are pooled cell by cell.
    """

    def __init__(self, mean_profiles: Sequence[np.ndarray], totals: Sequence[np.ndarray]) -> None:
        self._mean_profiles = mean_profiles
        self._total = np.sum([np.where(g > 0, t, 0) for g, t in zip(mean_profiles, totals, strict=True)], axis=0)

    def of_cells(self, predictions: Sequence[Profiles], held_out: Sequence[sp.csr_matrix]) -> Partial:
        """Return the sums over cells that `of_genes` takes, and the nats and molecules of each cell, as in `Gain`."""
        each = zip(held_out, self._mean_profiles, strict=True)
        known = [x @ sp.diags_array((g > 0).astype(x.dtype)) for x, g in each]
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
                likelihood *= (totals[i] > 0)[entry.row]  # a cell of which nothing was seen has the mean profile
                likelier.append((entry, entry.data * likelihood))
                nats -= np.multiply(p, predicted[:, [i]], out=p)
            for entry, gained in likelier:
                nats[entry.row, entry.col] += gained
                nats_of_cells[rows] += np.bincount(entry.row, weights=gained, minlength=len(nats))
            sums += self._sums(nats, pooled[rows].tocoo())
        return Partial([sums], [nats_of_cells, row_sums(pooled)])

    def _sums(self, nats: np.ndarray, entry: sp.coo_matrix) -> np.ndarray:
        """Return sums over cells, shape (6, genes): nats, their squares elsewhere, cells, and what moves the ratio.

        Leaving a cell out moves the ratio by (nats - gain molecules) / (total - molecules), whose square is a sum of
        three; `elsewhere` are the cells without a molecule of the gene.
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

        The gain of genes without a held-out molecule is NaN, the error of those with molecules in fewer than 40 cells.
        """
        nats, elsewhere, n_cells, moves, products, shares = sums
        total = np.where(self._total > 0, self._total, 1)
        gain = np.where(np.abs(nats) < _ROUNDING * total, 0, nats / total)
        squares = elsewhere / total**2 + moves - 2 * gain * products + gain**2 * shares
        error = np.where(n_cells < _FEW_CELLS, np.nan, np.sqrt(np.maximum(squares, 0)))
        return np.where(self._total > 0, gain, np.nan), error
