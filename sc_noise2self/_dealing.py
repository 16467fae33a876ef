"""The kernel that deals the molecules of one entry to parts, compiled by numba.

Every entry of a matrix has a stream of random words of its own, keyed by (seed, cell, gene): SplitMix64 (Steele, Lea &
Flood 2014) started at the hash of the three. Every draw takes the next word, so no two draws share one. A cell is known
by its number and its counts: with its number alone, two matrices that are split by one seed would share their draws,
and so would a matrix and a part of it that is split again.

One molecule falls into a part by its share; of many the first part gets Binomial(n, share), the next its share of the
rest. With overdispersion phi a part's probability is drawn from Beta(share / phi, rest / phi). A binomial of few
molecules is drawn by inversion; one of many is first cut at an order statistic of its uniforms, which is Beta
distributed (Devroye 1986, X.4.3), until few are left: exact for every n and p, in a time of log n. Gamma variates are
those of Marsaglia & Tsang (2000).
"""

from __future__ import annotations

import math

import numba
import numpy as np

_ONE = np.uint64(1)
_STEP = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio, as in SplitMix64
_FACTOR1, _FACTOR2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT1, _SHIFT2, _SHIFT3 = np.uint64(30), np.uint64(27), np.uint64(31)
_ELEVEN = np.uint64(11)
_PAIRS, _FOURS = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
_EIGHTS, _BYTES = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)
_BITS = 64  # of a word: so many molecules it deals to even halves
_ONE_BY_ONE = 16  # molecules of an entry up to which each is dealt on its own
_INVERTED = 64  # molecules up to which a binomial is drawn by inversion

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Counts, minor indices and indptr of some rows (columns) of a compressed matrix, int64 as in SciPy."""

_compiled = numba.njit(nogil=True, cache=True)  # what it compiles takes its types from the call
_inlined = numba.njit(nogil=True, cache=True, inline="always")  # a call with arrays would count references, atomically


@_compiled
def _mixed(word: np.uint64) -> np.uint64:
    """Return SplitMix64's output function of a word."""
    word = (word ^ (word >> _SHIFT1)) * _FACTOR1
    word = (word ^ (word >> _SHIFT2)) * _FACTOR2
    return word ^ (word >> _SHIFT3)


@_compiled
def _entry_state(key: np.uint64, number: int) -> np.uint64:
    """Return where the stream of an entry starts, from the key of its row and its number there."""
    return _mixed(key + (np.uint64(number) + _ONE) * _STEP)


def row_keys(key: int, rows: np.ndarray, contents: np.ndarray | None = None) -> np.ndarray:
    """Return the key of each row by its number and, where they count, its `contents`, uint64 of shape (rows,)."""
    contents = np.zeros(len(rows), np.uint64) if contents is None else contents
    return _row_keys(np.uint64(key), rows.astype(np.int64), contents)


@_compiled
def _row_keys(key: np.uint64, rows: np.ndarray, contents: np.ndarray) -> np.ndarray:
    out = np.empty(len(rows), np.uint64)
    for i in range(len(rows)):
        out[i] = _mixed(_entry_state(key, rows[i]) + contents[i])
    return out


@_compiled
def add_contents(entries: Entries, first: int, by_row: bool, contents: np.ndarray) -> None:
    """Add to `contents`, a hash of each cell's counts, that of some entries, given as to `deal`, in any order."""
    counts, minor, indptr = entries
    for row in range(len(indptr) - 1):
        for j in range(indptr[row], indptr[row + 1]):
            gene = minor[j] if by_row else first + row
            if counts[j]:
                contents[row if by_row else minor[j]] += _entry_state(_entry_state(_ONE, gene), counts[j])


@_compiled
def _ones(word: np.uint64) -> np.int64:
    """Return how many bits of a word are 1, without a branch (Knuth, The Art of Computer Programming, 7.1.3)."""
    word -= (word >> _ONE) & _PAIRS
    word = (word & _FOURS) + ((word >> np.uint64(2)) & _FOURS)
    word = (word + (word >> np.uint64(4))) & _EIGHTS
    return np.int64((word * _BYTES) >> np.uint64(56))


@_compiled
def _uniform(state: np.uint64) -> tuple[float, np.uint64]:
    """Return a number in (0, 1) with 53 random bits, and the next state of the stream."""
    state += _STEP
    return (np.float64(_mixed(state) >> _ELEVEN) + 0.5) * 2.0**-53, state


@_compiled
def _log_gamma_variate(shape: float, state: np.uint64) -> tuple[float, np.uint64]:
    """Return the logarithm of a Gamma(shape) variate: one of a small shape is too near 0 for itself."""
    log_boost = 0.0
    if shape < 1:
        u, state = _uniform(state)
        log_boost = math.log(u) / shape
        shape += 1
    d = shape - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        u, state = _uniform(state)
        angle, state = _uniform(state)
        x = math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * angle)
        t = c * x
        if t <= -1:
            continue
        u, state = _uniform(state)
        log_v = 3 * math.log1p(t)
        # d (1 - v + log v) with v = (1 + t)^3, written so that it keeps its digits where t is small.
        if math.log(u) < x * x / 2 + d * (log_v - t * (3 + t * (3 + t))):
            return math.log(d) + log_v + log_boost, state


@_compiled
def _beta_variate(a: float, b: float, state: np.uint64) -> tuple[float, np.uint64]:
    log_a, state = _log_gamma_variate(a, state)
    log_b, state = _log_gamma_variate(b, state)
    return 1 / (1 + math.exp(log_b - log_a)), state


@_compiled
def _binomial(n: np.int64, p: float, state: np.uint64) -> tuple[np.int64, np.uint64]:
    """Return a Binomial(n, p) variate."""
    drawn = np.int64(0)
    while n > _INVERTED and 0 < p < 1:
        # The i-th smallest of n uniforms is Beta(i, n + 1 - i); those on its other side are uniform again.
        i = n // 2 + 1
        x, state = _beta_variate(np.float64(i), np.float64(n + 1 - i), state)
        if x <= p:
            drawn += i
            n -= i
            p = (p - x) / (1 - x) if x < 1 else 1.0
        else:
            n = i - 1
            p /= x
    if p >= 1:
        return drawn + n, state
    if p <= 0 or n == 0:
        return drawn, state
    u, state = _uniform(state)
    q = min(p, 1 - p)
    odds, mass, k = q / (1 - q), (1 - q) ** n, np.int64(0)
    while u > mass and k < n:
        u -= mass
        k += 1
        mass *= odds * (n - k + 1) / k
    return drawn + (k if p <= 0.5 else n - k), state


@_inlined
def _category(bounds: np.ndarray, state: np.uint64) -> tuple[int, np.uint64]:
    """Return the category that one molecule falls into; `bounds` are the sums of the shares up to each.

    Bounds are counted: leaving the loop at a random one would be mispredicted.
    """
    u, state = _uniform(state)
    i = 0
    for k in range(len(bounds) - 1):
        i += u >= bounds[k]
    return i, state


@_inlined
def _deal(
    n: np.int64,
    shares: np.ndarray,
    rest: np.ndarray,
    bounds: np.ndarray,
    phi: float,
    state: np.uint64,
    dealt: np.ndarray,
) -> None:
    """Write to `dealt` how many of n molecules fall into each of the parts.

    `rest` is what each share is a share of: itself and those after it.
    """
    last = len(shares) - 1
    dealt[:] = 0
    if n == 1 or (phi == 0 and n <= _ONE_BY_ONE):
        for _ in range(n):
            i, state = _category(bounds, state)
            dealt[i] += 1
        return
    for i in range(last):
        p = shares[i] / rest[i]
        if phi > 0:
            p, state = _beta_variate(shares[i] / phi, rest[i + 1] / phi, state)
        dealt[i], state = _binomial(n, p, state)
        n -= dealt[i]
        if n == 0:
            return
    dealt[last] = n


@_compiled
def deal(
    entries: Entries,
    keys: np.ndarray,
    first: int,
    by_row: bool,
    law: tuple[np.ndarray, np.ndarray, np.ndarray, bool],
    out: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """Deal the entries of some rows (columns), from number `first`; only what is not zero is kept.

    `keys` are those of the cells: of these rows (`by_row`), or of all where columns are compressed. `law` has the
    probability of each category, of it and those after it, the overdispersion of each gene, and whether the first
    category belongs to both parts. Written to `out` are the values and minor indices of each part, int64 of shape
    (parts, entries), and where its rows (columns) end, shape (parts, rows).
    """
    counts, minor, indptr = entries
    shares, rest, phi, overlap = law
    values, minors, ends = out
    n_parts = len(values)
    even = n_parts == 2 and len(shares) == 2 and shares[0] == 0.5 and not phi.any()
    bounds = np.cumsum(shares)
    dealt = np.zeros(len(shares), np.int64)
    stored = np.zeros(n_parts, np.int64)
    for row in range(len(indptr) - 1):
        for j in range(indptr[row], indptr[row + 1]):
            n = counts[j]
            key = keys[row] if by_row else keys[minor[j]]
            gene = minor[j] if by_row else first + row
            state = _entry_state(key, gene)
            if even and n <= _BITS:  # a bit for each molecule
                dealt[0] = _ones(state if n == _BITS else state & ((_ONE << np.uint64(n)) - _ONE))
                dealt[1] = n - dealt[0]
            else:
                if n == 1 and not overlap:  # goes to one part alone
                    k, state = _category(bounds, state)
                    values[k, stored[k]], minors[k, stored[k]] = 1, minor[j]
                    stored[k] += 1
                    continue
                _deal(n, shares, rest, bounds, phi[gene], state, dealt)
            for k in range(n_parts):
                value = dealt[0] + dealt[k + 1] if overlap else dealt[k]
                # Written always, counted where it is not 0: a branch on a random number would be mispredicted.
                values[k, stored[k]] = value
                minors[k, stored[k]] = minor[j]
                stored[k] += value > 0
        for k in range(n_parts):
            ends[k, row] = stored[k]
