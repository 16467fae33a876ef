"""Split the molecules of a count matrix into independent parts.

A cell is a bag of molecules. Dealing each molecule to X1 with probability p, else to X2, is a binomial draw per entry:
X1 ~ Binomial(X, p), X2 = X - X1. Given the cell's true rates (Poisson counts) the parts are independent, so any
function of X1 is J-invariant for X2 and its squared error against X2 is its squared error against the truth plus a
constant (Noise2Self, Batson & Royer 2019, Proposition 1 and section 3.1).

The draw of an entry depends on the seed, its cell and its gene alone (`sc_noise2self.random.random_words`), so the
same split comes from the whole matrix, from any piece of it, and from any format.

Capture fractions are those of Batson, Royer & Webber 2019 (Molecular cross-validation); the Dirichlet-multinomial
split for overdispersed counts is that of Neufeld et al. 2023 (Negative binomial count splitting).
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real

import numpy as np
import scipy.sparse as sp
from scipy.special import betaincinv
from scipy.stats import binom

from .counts import CountMatrix, check_counts
from .random import RandomState, as_generator, as_key, random_uniforms, random_words, random_words_at, row_keys

_BLOCK = 1 << 15  # entries drawn at a time: they and their random words stay in the cache
_FEW = 16  # molecules of an entry up to which an uneven split deals them one by one
_LOW_BYTE = ((1 << np.arange(9)) - 1).astype(np.uint8)
_LOW_BITS = np.array([(1 << n) - 1 for n in range(65)], dtype=np.uint64)

Draw = Callable[[np.ndarray, np.ndarray, np.ndarray], list[np.ndarray]]
"""(counts, random word of each entry, gene of each entry) -> the parts of each count."""


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
    key = as_key(as_generator(random_state))
    if capture is not None:
        _check_share("capture", capture)
        draw = _overlapping(*overlap_probabilities(fraction, capture))
    elif overdispersion is not None:
        draw = _disjoint(shares, _check_overdispersion(overdispersion, counts.shape[1]))
    else:
        draw = _disjoint(shares)
    n_parts = 2 if capture is not None else len(shares)
    rows = row_keys(key, np.arange(counts.shape[0]))
    split = _split_dense if isinstance(counts, np.ndarray) else _split_sparse
    return split(counts, rows, draw, n_parts)


def halves(counts: sp.csr_matrix, key: int, cells: np.ndarray) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Return the even split of some rows of a matrix, the same as that of the whole matrix there.

    Parameters
    ----------
    counts
        CSR of whole numbers, in canonical form.
    key
        Which split, from `sc_noise2self.random.as_key`.
    cells
        Which rows of the whole they are, shape (rows,).
    """
    first, second = _split_sparse(counts, row_keys(key, cells), _disjoint(np.array([0.5, 0.5])), 2)
    return first, second


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


def _disjoint(shares: np.ndarray, overdispersion: np.ndarray | None = None) -> Draw:
    """Deal molecules to disjoint parts: a multinomial as a chain of binomials, or a Dirichlet-multinomial."""
    later = np.append(np.cumsum(shares[::-1])[::-1][1:], 0)

    def draw(counts: np.ndarray, words: np.ndarray, genes: np.ndarray) -> list[np.ndarray]:
        parts, rest = [], counts
        for i, (share, left) in enumerate(zip(shares[:-1], later[:-1], strict=True)):
            if i:
                words = random_words(words)
            if overdispersion is None:
                part = _binomial(rest, share / (share + left), words)
            else:
                size = 1 / np.maximum(overdispersion[genes], 1e-12)
                part = _beta_binomial(rest, share * size, left * size, words)
            parts.append(part)
            rest = rest - part
        return [*parts, rest]

    return draw


def _overlapping(first: float, second: float, both: float) -> Draw:
    """Deal molecules to X1, to X2, or to both."""

    def draw(counts: np.ndarray, words: np.ndarray, genes: np.ndarray) -> list[np.ndarray]:
        shared = _binomial(counts, both, words)
        only_first = _binomial(counts - shared, (first - both) / (1 - both), random_words(words))
        return [shared + only_first, counts - only_first]

    return draw


def _binomial(n: np.ndarray, p: float, words: np.ndarray) -> np.ndarray:
    """Draw Binomial(n, p) in n's type, from one random word an entry and those that follow it."""
    if p == 0.5:
        return _fair(n, words)
    return _beta_binomial(n, p, 1 - p, words, adds=0)


def _fair(n: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Draw Binomial(n, 1/2): the number of ones among n random bits. Most counts are below 9 and need one byte."""
    drawn = np.bitwise_count(words.astype(np.uint8) & _LOW_BYTE[np.minimum(n, 8).astype(np.uint8)]).astype(n.dtype)
    many = np.nonzero(n > 8)
    if many[0].size:
        left, words, total = n[many].astype(np.int64), words[many], np.zeros(many[0].size, np.int64)
        while True:
            total += np.bitwise_count(words & _LOW_BITS[np.minimum(left, 64)])
            left = np.maximum(left - 64, 0)
            if not left.any():
                break
            words = random_words(words)
        drawn[many] = total
    return drawn


def _beta_binomial(
    n: np.ndarray, a: float | np.ndarray, b: float | np.ndarray, words: np.ndarray, adds: int = 1
) -> np.ndarray:
    """Draw by Polya's urn: a molecule is dealt to the first part with probability a / (a + b), and `adds` to its own.

    With `adds` 1 that is beta-binomial, with 0 binomial. Few molecules are dealt one by one; for many, the quantile
    of a uniform number has the same distribution.
    """
    drawn = ((random_uniforms(words) * (a + b) < a) & (n > 0)).astype(n.dtype)
    more = np.nonzero(n > 1)
    left, words, dealt = n[more].astype(np.int64), words[more], drawn[more].astype(np.int64)
    a, b = (np.broadcast_to(each, n.shape)[more] for each in (a, b))
    many = left > _FEW
    at = np.flatnonzero(~many)
    for j in range(1, _FEW):
        at = at[left[at] > j]
        word = words[at] = random_words(words[at])
        first = a[at] + adds * dealt[at]
        dealt[at] += random_uniforms(word) * (a[at] + b[at] + adds * j) < first
    if many.any():
        word = words[many]
        p = betaincinv(a[many], b[many], random_uniforms(word)) if adds else a[many]
        dealt[many] = binom.ppf(random_uniforms(random_words(word)), left[many], p)
    drawn[more] = dealt
    return drawn


def _split_sparse(
    counts: sp.csr_matrix | sp.csc_matrix, rows: np.ndarray, draw: Draw, n_parts: int
) -> tuple[CountMatrix, ...]:
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
        # The rows (columns) that end inside this block, and the one that each entry lies in.
        ends = slice(*np.searchsorted(counts.indptr, [start, stop], side="right"))
        major = np.repeat(
            np.arange(ends.start - 1, ends.stop),
            np.diff(counts.indptr[ends], prepend=start, append=stop),
        )
        cells, genes = (major, minor) if by_row else (minor, major)
        words = random_words_at(rows[cells], genes)
        for i, part in enumerate(draw(counts.data[start:stop], words, genes)):
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


def _split_dense(counts: np.ndarray, rows: np.ndarray, draw: Draw, n_parts: int) -> tuple[CountMatrix, ...]:
    parts = tuple(np.empty_like(counts) for _ in range(n_parts))
    step = max(1, _BLOCK // max(1, counts.shape[1]))
    for start in range(0, counts.shape[0], step):
        block = counts[start : start + step]
        genes = np.broadcast_to(np.arange(counts.shape[1]), block.shape)
        words = random_words_at(rows[start : start + step, None], genes)
        for part, drawn in zip(parts, draw(block, words, genes), strict=True):
            part[start : start + step] = drawn
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
