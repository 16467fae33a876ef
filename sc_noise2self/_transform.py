"""From counts to the scale on which a linear model works, and the way back.

A transform brings every cell to one depth and then bends the scale. Going back is not the inverse function:
E[T(counts)] is not T(E[counts]), and squaring a denoised square root loses most of what denoising gained.
`PoissonExpectation` is the exact relation between the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numba
import numpy as np
import scipy.sparse as sp
from scipy.special import gammaln

TransformName = Literal["log1p", "sqrt", "none"]
Link = Literal["log1p", "sqrt", "none", "exp"]
"""From a linear model to rates: the way back from a transform, or the exponential of a log-linear one."""
_LARGEST = 60.0  # log of a rate, in any unit: beyond, single precision overflows in the sum over genes
_LIMIT = 60.0  # mean of a Poisson distribution up to which expectations are tabulated


@dataclass(frozen=True)
class Transform:
    """T(x * target / size): counts brought to a depth of `target` molecules a cell, then log1p, sqrt or nothing."""

    name: TransformName
    target: float

    def __post_init__(self) -> None:
        if self.name not in get_args(TransformName):
            raise ValueError(f"transform is {self.name!r}: pass one of {', '.join(get_args(TransformName))}.")
        if not self.target > 0:
            raise ValueError(f"target is {self.target!r}: the depth that cells are brought to is above 0.")

    def apply(self, counts: sp.csr_matrix, size: np.ndarray) -> sp.csr_matrix:
        """Return the transformed counts, float32, of the same sparsity pattern; an empty cell stays empty."""
        scale = self.target / np.maximum(size, 1)
        values = np.repeat(scale.astype(np.float32), np.diff(counts.indptr))
        values *= counts.data
        if self.name == "log1p":
            np.log1p(values, out=values)
        elif self.name == "sqrt":
            np.sqrt(values, out=values)
        return _with_data(counts, values)

    def own_depth(self, size: np.ndarray) -> np.ndarray:
        """Return the factor that takes an expectation from the target depth to where `rates` needs it, shape (cells,).

        For `sqrt` that is the cell's own depth; for the others `rates` holds at any depth.
        """
        return np.sqrt(size / self.target) if self.name == "sqrt" else np.ones(len(size))

    def noise_variance(self, counts: sp.csr_matrix, size: np.ndarray) -> np.ndarray:
        """Return the mean sampling variance of each gene on the transformed scale, shape (genes,).

        The jackknife over molecules (Efron & Stein 1981): the sum over an entry's x molecules of the squared change
        when one is left out, x (T(x) - T(x - 1))^2. It needs the counts alone, so it can be learned from one part.
        """
        full = self.apply(counts, size)
        less_one = self.apply(_with_data(counts, np.maximum(counts.data - 1, 0)), size)
        change = full.data - less_one.data
        change *= change
        change *= counts.data
        return np.bincount(counts.indices, weights=change, minlength=counts.shape[1]) / counts.shape[0]


def rates(link: Link, expectation: np.ndarray) -> np.ndarray:
    """Return the expected counts behind expectations on the transformed scale: the way back.

    `expectation` is E[T(counts)], shape (cells, genes), after `Transform.own_depth`, or log rates; it is overwritten
    where that saves a copy. What is returned is known up to one factor per gene and one per cell
    (`sc_noise2self.methods._profiles`). Below zero, where a linear model may end, it stays below zero. The exact
    inverse of the square root is worth up to a third of the held-out gain; that of `log1p` differs from expm1 by little
    more than a factor per gene, and stretches noise.
    """
    if link == "exp":
        np.minimum(expectation, _LARGEST, out=expectation)
        return np.exp(expectation, out=expectation)
    if link == "sqrt":
        return np.where(expectation < 0, expectation, PoissonExpectation("sqrt").inverse(expectation))
    if link == "log1p":
        np.minimum(expectation, _LARGEST, out=expectation)
        np.expm1(expectation, out=expectation)
    return expectation


@dataclass(frozen=True)
class PoissonExpectation:
    """g(m) = E[T(scale * Poisson(m))] and its inverse, for T = log1p or sqrt.

    Small means have the sum over the Poisson distribution, tabulated and interpolated; larger ones an expansion:

    * sqrt: sqrt(m) - m^(-1/2) / 8 - 7 m^(-3/2) / 128, times sqrt(scale)
    * log1p, with s the scale: log1p(s m) - s^2 m / (2 (1 + s m)^2) + s^3 m / (3 (1 + s m)^3)
    """

    name: TransformName
    scale: float = 1.0

    def __call__(self, mean: np.ndarray) -> np.ndarray:
        """Return E[T(scale * Poisson(mean))], elementwise."""
        mean = np.asarray(mean, dtype=np.float64)
        if self.name == "none":
            return mean * self.scale
        tabulated = np.interp(mean, *_poisson_grid(self.name, self.scale))
        return np.where(mean < _LIMIT, tabulated, self._expansion(np.maximum(mean, _LIMIT)))

    def inverse(self, expectation: np.ndarray) -> np.ndarray:
        """Return the Poisson mean whose expectation this is, elementwise and in its type; negative gives 0."""
        z = np.maximum(expectation, 0)
        if self.name == "none":
            return z / self.scale
        table, slope, step = _inverse_table(self.name, self.scale)
        table, slope = table.astype(z.dtype), slope.astype(z.dtype)
        mean = np.empty(z.shape, z.dtype)
        _interpolate(z.reshape(-1), table, slope, z.dtype.type(1 / step), mean.reshape(-1))
        large = z >= step * (len(table) - 1)
        if large.any():
            mean[large] = self._invert_expansion(z[large].astype(np.float64))
        return mean

    def _expansion(self, mean: np.ndarray) -> np.ndarray:
        s = self.scale
        if self.name == "sqrt":
            return np.sqrt(s) * (np.sqrt(mean) - mean**-0.5 / 8 - 7 * mean**-1.5 / 128)
        d = 1 + s * mean
        return np.log1p(s * mean) - s**2 * mean / (2 * d**2) + s**3 * mean / (3 * d**3)

    def _invert_expansion(self, z: np.ndarray) -> np.ndarray:
        """Newton's method from T's own inverse; the expansion is smooth and nearly T there."""
        mean = z**2 / self.scale if self.name == "sqrt" else np.expm1(z) / self.scale
        for _ in range(4):
            slope = 0.5 * np.sqrt(self.scale / mean) if self.name == "sqrt" else self.scale / (1 + self.scale * mean)
            mean = np.maximum(mean + (z - self._expansion(mean)) / slope, _LIMIT / 2)
        return mean


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _interpolate(z: np.ndarray, table: np.ndarray, slope: np.ndarray, per_step: float, out: np.ndarray) -> None:
    """Set `out` to the values of an evenly spaced table at z >= 0; beyond its end they are those there."""
    last = len(table) - 1
    for i in range(len(z)):
        position = z[i] * per_step
        index = int(position) if position < last else last
        out[i] = table[index] + slope[index] * (position - index)


@lru_cache(maxsize=64)
def _poisson_grid(name: TransformName, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return means from 0 to the limit, even in their square roots, and the expectations there."""
    means = np.linspace(0, np.sqrt(_LIMIT), 2000) ** 2
    k = np.arange(int(_LIMIT + 12 * np.sqrt(_LIMIT)))
    log_pmf = k * np.log(np.maximum(means, 1e-300))[:, None] - means[:, None] - gammaln(k + 1)
    transformed = np.sqrt(scale * k) if name == "sqrt" else np.log1p(scale * k)
    return means, np.exp(log_pmf) @ transformed


@lru_cache(maxsize=64)
def _inverse_table(name: TransformName, scale: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Return means on an even grid of expectations from 0 to g(limit), their differences, and the grid's step."""
    means, values = _poisson_grid(name, scale)
    even = np.linspace(0, values[-1], 4097)
    table = np.interp(even, values, means)
    return table, np.append(np.diff(table), 0), float(even[1])


def _with_data(matrix: sp.csr_matrix, data: np.ndarray) -> sp.csr_matrix:
    """Return a matrix of the same pattern that shares its indices."""
    out = type(matrix)((data, matrix.indices, matrix.indptr), shape=matrix.shape, copy=False)
    out.has_canonical_format = True
    return out
