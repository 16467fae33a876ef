"""Split the molecules of a count matrix into independent parts.

A cell is a bag of molecules. Dealing each molecule to X1 with probability p, else to X2, is a binomial draw per entry:
X1 ~ Binomial(X, p), X2 = X - X1. Given the cell's true rates (Poisson counts) the parts are independent, so any
function of X1 is J-invariant for X2 and its squared error against X2 is its squared error against the truth plus a
constant (Noise2Self, Batson & Royer 2019, Proposition 1 and section 3.1).

Capture fractions are those of Batson, Royer & Webber 2019 (Molecular cross-validation); the Dirichlet-multinomial
split for overdispersed counts is that of Neufeld et al. 2023 (Negative binomial count splitting).
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real

import numpy as np
import scipy.sparse as sp

from .counts import CountMatrix, check_counts
from .random import RandomState, as_generator

_BLOCK = 1 << 18  # entries drawn at a time: small enough for the cache, and no temporary grows with the matrix
_BITS = 8  # an even split of a count up to this is the number of ones among as many random bits
_LOW_BITS = ((1 << np.arange(_BITS + 1)) - 1).astype(np.uint8)

Draw = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]
"""(counts, gene of each count) -> the parts of each count."""


def split_matrix(
    counts: CountMatrix,
    fraction: float = 0.5,
    *,
    folds: int | None = None,
    capture: float | None = None,
    overdispersion: float | np.ndarray | None = None,
    random_state: RandomState = 0,
) -> tuple[CountMatrix, ...]:
    """Return the parts of a count matrix; `sc_noise2self.split_molecules` describes the parameters."""
    counts = check_counts(counts)
    if folds is not None:
        if isinstance(folds, bool) or not isinstance(folds, Integral) or folds < 2:
            raise ValueError(f"folds is {folds!r}: pass a whole number of parts, 2 or more.")
        if fraction != 0.5 or capture is not None:
            given = "fraction" if fraction != 0.5 else "capture"
            raise ValueError(f"folds and {given} were both given: folds are disjoint and equal, so pass one.")
        shares = np.full(folds, 1 / folds)
    else:
        _check_share("fraction", fraction)
        shares = np.array([fraction, 1 - fraction])
    if capture is not None and overdispersion is not None:
        raise ValueError("capture and overdispersion were both given: they assume different noise, so pass one.")
    rng = as_generator(random_state)
    if capture is not None:
        _check_share("capture", capture)
        draw = _overlapping(*overlap_probabilities(fraction, capture), rng)
    elif overdispersion is not None:
        draw = _disjoint(shares, rng, _check_overdispersion(overdispersion, counts.shape[1]))
    else:
        draw = _disjoint(shares, rng)
    n_parts = 2 if capture is not None else len(shares)
    split = _split_dense if isinstance(counts, np.ndarray) else _split_sparse
    return split(counts, draw, n_parts)


def overlap_probabilities(fraction: float, capture: float) -> tuple[float, float, float]:
    """Return P(in X1), P(in X2), P(in both) for a molecule of a sample that holds `capture` of the cell's molecules.

    Two samples drawn independently from the cell, sized as `fraction` to 1 - `fraction`, could both have caught the
    same molecule; that overlap vanishes as `capture` goes to 0. With a = (1 - s) / s:
    p' = ((1 + a) - sqrt((1 + a)^2 - 4 a c)) / 2a, p'' = a p' (Batson, Royer & Webber 2019).
    """
    a = (1 - fraction) / fraction
    first = ((1 + a) - np.sqrt((1 + a) ** 2 - 4 * a * capture)) / (2 * a)
    second = a * first
    return first / capture, second / capture, first * second / capture


def _disjoint(shares: np.ndarray, rng: np.random.Generator, overdispersion: np.ndarray | None = None) -> Draw:
    """Deal molecules to disjoint parts: a multinomial as a chain of binomials, or a Dirichlet-multinomial."""
    later = np.append(np.cumsum(shares[::-1])[::-1][1:], 0)

    def draw(counts: np.ndarray, genes: np.ndarray) -> list[np.ndarray]:
        parts, rest = [], counts
        for share, left in zip(shares[:-1], later[:-1], strict=True):
            p: float | np.ndarray = share / (share + left)
            if overdispersion is not None:
                size = 1 / np.maximum(overdispersion[genes], 1e-12)
                p = np.where(overdispersion[genes] > 0, rng.beta(share * size, left * size), p)
            part = _binomial(rest, p, rng)
            parts.append(part)
            rest = rest - part
        return [*parts, rest]

    return draw


def _overlapping(first: float, second: float, both: float, rng: np.random.Generator) -> Draw:
    """Deal molecules to X1, to X2, or to both."""

    def draw(counts: np.ndarray, genes: np.ndarray) -> list[np.ndarray]:
        shared = _binomial(counts, both, rng)
        only_first = _binomial(counts - shared, (first - both) / (1 - both), rng)
        return [shared + only_first, counts - only_first]

    return draw


def _binomial(n: np.ndarray, p: float | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw Binomial(n, p) in n's type. Most counts are 1, so most draws are coin tosses."""
    if np.ndim(p):
        return rng.binomial(n.astype(np.int64), p).astype(n.dtype)
    if p == 0.5:
        bits = rng.integers(0, 1 << _BITS, n.shape, dtype=np.uint8)
        drawn = np.bitwise_count(bits & _LOW_BITS[np.minimum(n, _BITS).astype(np.uint8)]).astype(n.dtype)
        rest = np.nonzero(n > _BITS)
    else:
        drawn = ((rng.random(n.shape) < p) & (n > 0)).astype(n.dtype)
        rest = np.nonzero(n > 1)
    drawn[rest] = rng.binomial(n[rest].astype(np.int64), p)
    return drawn


def _split_sparse(counts: sp.csr_matrix | sp.csc_matrix, draw: Draw, n_parts: int) -> tuple[CountMatrix, ...]:
    """Sample the stored entries block by block; only entries that are not zero are kept."""
    by_row = counts.format == "csr"
    # As long as the counts' own, then cut to what is stored: pages never written to take no memory.
    data = [np.empty_like(counts.data) for _ in range(n_parts)]
    indices = [np.empty_like(counts.indices) for _ in range(n_parts)]
    indptr = [np.zeros_like(counts.indptr) for _ in range(n_parts)]
    stored = [0] * n_parts
    for start in range(0, counts.nnz, _BLOCK):
        stop = min(start + _BLOCK, counts.nnz)
        minor = counts.indices[start:stop]
        # The rows (columns) that end inside this block, and, for CSC, the one that each entry lies in.
        ends = slice(*np.searchsorted(counts.indptr, [start, stop], side="right"))
        genes = minor if by_row else np.searchsorted(counts.indptr, np.arange(start, stop), side="right") - 1
        for i, part in enumerate(draw(counts.data[start:stop], genes)):
            kept = np.flatnonzero(part > 0)
            filled = slice(stored[i], stored[i] + kept.size)
            np.take(part, kept, out=data[i][filled])
            np.take(minor, kept, out=indices[i][filled])
            indptr[i][ends] = stored[i] + np.searchsorted(kept, counts.indptr[ends] - start)
            stored[i] += kept.size
    parts = []
    for i in range(n_parts):
        data[i].resize(stored[i], refcheck=False)
        indices[i].resize(stored[i], refcheck=False)
        part = type(counts)((data[i], indices[i], indptr[i]), shape=counts.shape, copy=False)
        part.has_canonical_format = True
        parts.append(part)
    return tuple(parts)


def _split_dense(counts: np.ndarray, draw: Draw, n_parts: int) -> tuple[CountMatrix, ...]:
    parts = tuple(np.empty_like(counts) for _ in range(n_parts))
    rows = max(1, _BLOCK // max(1, counts.shape[1]))
    genes = np.arange(counts.shape[1])
    for start in range(0, counts.shape[0], rows):
        block = counts[start : start + rows]
        for part, drawn in zip(parts, draw(block, np.broadcast_to(genes, block.shape)), strict=True):
            part[start : start + rows] = drawn
    return parts


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"{name} is {value!r}: pass a number between 0 and 1, both excluded.")


def _check_overdispersion(overdispersion: float | np.ndarray, n_genes: int) -> np.ndarray:
    values = np.asarray(overdispersion, dtype=np.float64)
    if values.ndim > 1 or (values.ndim == 1 and values.size != n_genes):
        raise ValueError(
            f"overdispersion has shape {values.shape}: pass one number, or one per gene ({n_genes} of them)."
        )
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(
            "overdispersion holds a negative or non-finite value: it is phi >= 0 in variance = mean + phi mean^2."
        )
    return np.broadcast_to(values, n_genes)
