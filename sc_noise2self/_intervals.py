"""How sure a denoised value is: the distribution of a cell's rate, and of a fresh count of it.

The true rate of a gene in a cell is Gamma distributed around the denoiser's expected count m, with the squared
coefficient of variation phi that held-out molecules say (`sc_noise2self.methods._mixing`): its shape is 1 / phi. With
a share e of the cell's own count x as evidence the shape is 1 / phi + e x, the mean m (1 + phi e x) / (1 + phi e m). A
fresh count of the cell is then negative binomial.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import betainc, gammaincinv, gammaln, pdtr, xlogy
from scipy.stats import nbinom, poisson

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Nominal levels whose coverage is written down."""
_N_STRATA = 10  # of genes by expression, and of cells by depth
_NONE = 1e-300  # an expected count of 0, which has no distribution
_LARGEST_SHAPE = 1e10  # from which a Gamma distribution is its mean


@dataclass(frozen=True, eq=False)
class Belief:
    """The Gamma distributions of rates, by shape and mean; all arrays of one shape."""

    shape: np.ndarray
    mean: np.ndarray

    @classmethod
    def around(
        cls, expected: np.ndarray, phi: np.ndarray, observed: np.ndarray | None = None, evidence: float = 1.0
    ) -> Belief:
        """Return those around expected counts; of the cells' own counts `observed`, a share is `evidence`."""
        expected = np.maximum(np.asarray(expected, dtype=np.float64), _NONE)
        phi = np.broadcast_to(np.maximum(phi, 1 / _LARGEST_SHAPE), expected.shape)
        if observed is None:
            return cls(1 / phi, expected)
        own, mixing = evidence * observed, evidence * phi
        return cls(1 / phi + own, expected * (1 + phi * own) / (1 + mixing * expected))

    def times(self, factor: np.ndarray) -> Belief:
        """Return the distributions of a multiple of the rates."""
        return Belief(self.shape, np.where(self.mean > _NONE, np.maximum(self.mean * factor, _NONE), _NONE))

    def interval(self, level: float, *, predictive: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the central interval of the rates, or of a fresh count (`predictive`)."""
        low, high = (1 - level) / 2, (1 + level) / 2
        if predictive:
            found = [self._count_quantile(each) for each in (low, high)]
        else:
            found = [gammaincinv(self.shape, each) / self.shape * self.mean for each in (low, high)]
            found = [np.where(self._is_sure, self.mean, each) for each in found]
        ends = [np.where(self.mean > _NONE, each, 0.0) for each in found]
        return ends[0], ends[1]

    def _count_quantile(self, level: float) -> np.ndarray:
        shape = np.where(self._is_sure, 1, self.shape)
        of_both = nbinom.ppf(level, shape, shape / (shape + self.mean))
        return np.where(self._is_sure, poisson.ppf(level, self.mean), of_both)

    def probability_integral(self, count: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Return the randomised probability integral transform of fresh counts: uniform if the belief is right.

        Of a discrete distribution it is P(X < x) + u P(X = x), u uniform (Smith 1985).
        """
        n, k = np.where(self._is_sure, 1, self.shape), np.asarray(count, dtype=np.float64)
        within = np.where(self._is_sure, pdtr(k - 1, self.mean), betainc(n, np.maximum(k, 1), n / (n + self.mean)))
        return np.where(k > 0, within, 0) + uniform * np.exp(self.log_likelihood(k))

    def log_likelihood(self, count: np.ndarray) -> np.ndarray:
        """Return the log probability of fresh counts."""
        n, k = np.where(self._is_sure, 1, self.shape), np.asarray(count, dtype=np.float64)
        of_both = gammaln(k + n) - gammaln(n) - n * np.log1p(self.mean / n) + xlogy(k, self.mean / (n + self.mean))
        return np.where(self._is_sure, k * np.log(self.mean) - self.mean, of_both) - gammaln(k + 1)

    @property
    def _is_sure(self) -> np.ndarray:
        """Where the rate is its mean."""
        return self.shape >= _LARGEST_SHAPE / 2


@dataclass(frozen=True, eq=False)
class Coverage:
    """How often intervals held fresh counts: of sampled genes of some cells.

    Attributes
    ----------
    cells
        Numbers of the cells, shape (cells,).
    integrals
        The probability integral transforms, shape (cells, strata of genes, genes sampled of each); NaN where none.
    depth
        Molecules of each cell, shape (cells,).
    """

    cells: np.ndarray
    integrals: np.ndarray
    depth: np.ndarray

    def table(self) -> pd.DataFrame:
        """Return the share inside by level, over all, by decile of genes' expression, and of cells' depth."""
        strata = strata_of(self.depth)
        parts = [("all", 0, self.integrals)]
        parts += [("expression", i, self.integrals[:, i]) for i in range(self.integrals.shape[1])]
        parts += [("depth", i, self.integrals[strata == i]) for i in range(int(strata.max(initial=0)) + 1)]
        rows = [
            {"by": by, "decile": i + 1 if by != "all" else 0, "level": level, "covered": covered, "n": int(known.sum())}
            for by, i, integrals in parts
            for level in LEVELS
            for known in [~np.isnan(integrals)]
            for covered in [float(_inside(integrals[known], level).mean()) if known.any() else np.nan]
        ]
        return pd.DataFrame(rows)

    def of_cells(self, n_cells: int, level: float = 0.9) -> np.ndarray:
        """Return the share of each cell's sampled genes inside their interval, NaN where none was sampled."""
        out = np.full(n_cells, np.nan)
        flat = self.integrals.reshape(len(self.cells), -1)
        known = ~np.isnan(flat)
        inside = (_inside(np.where(known, flat, 0.5), level) & known).sum(axis=1)
        out[self.cells] = np.where(known.any(axis=1), inside / np.maximum(known.sum(axis=1), 1), np.nan)
        return out


def _inside(integrals: np.ndarray, level: float) -> np.ndarray:
    return np.abs(integrals - 0.5) <= level / 2


def strata_of(values: np.ndarray, n: int = _N_STRATA) -> np.ndarray:
    """Return the tenth of each value by rank, 0 to 9, shape (values,)."""
    rank = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return rank * n // max(1, len(values))


def sampled_genes(totals: np.ndarray, n_cells: int, n_each: int, rng: np.random.Generator) -> np.ndarray:
    """Return genes drawn at random for each cell, as many of each tenth by expression: (cells, tenths, n_each).

    Where a tenth has no gene it has -1.
    """
    present = np.flatnonzero(totals)
    strata, out = strata_of(totals[present]), np.full((n_cells, _N_STRATA, n_each), -1)
    for i in np.unique(strata):
        out[:, i] = rng.choice(present[strata == i], (n_cells, n_each))
    return out
