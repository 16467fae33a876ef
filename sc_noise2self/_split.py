"""Split the molecules of a count matrix into independent parts.

Given the cell's true rates (Poisson counts) the parts are independent, so any function of X1 is J-invariant for X2, and
its squared error against X2 is its squared error against the truth plus a constant (Noise2Self, Batson & Royer 2019,
Proposition 1 and section 3.1).

The draw of an entry depends on the seed, its cell (number and counts) and its gene alone (`sc_noise2self._dealing`).
"""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from ._counts import CountMatrix, check_counts
from ._dealing import Entries, add_contents, deal, row_keys
from ._random import RandomState, as_generator, as_key
from ._threads import in_threads

_BLOCK = 1 << 15  # entries dealt at a time: they and their parts stay in the cache


class Law(NamedTuple):
    """How a molecule is dealt: the probability of each category, and the overdispersion of each gene.

    A category is a part; with `overlap` the first is that of both of two parts, and each other of one.
    """

    shares: np.ndarray
    overlap: bool
    phi: np.ndarray

    @property
    def n_parts(self) -> int:
        return len(self.shares) - int(self.overlap)


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
    if capture is not None:
        _check_share("capture", capture)
        first, second, both = overlap_probabilities(fraction, capture)
        shares = np.array([both, first - both, second - both])
    phi = np.zeros(counts.shape[1]) if overdispersion is None else checked_phi(overdispersion, counts.shape[1])
    law = Law(shares, capture is not None, phi)
    key, cells = as_key(as_generator(random_state)), np.arange(counts.shape[0])
    split = _split_dense if isinstance(counts, np.ndarray) else _split_sparse
    return split(counts, key, cells, law)


def halves(
    counts: sp.csr_matrix, key: int, cells: np.ndarray, phi: np.ndarray | None = None
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Return the even split of some rows of a matrix, by number, the same as that of the whole matrix there.

    `counts` are CSR in canonical form; `key`, from `as_key`, says which split; `phi`, from `checked_phi`, is the
    overdispersion of each gene, None for none.
    """
    law = Law(np.array([0.5, 0.5]), False, np.zeros(counts.shape[1]) if phi is None else phi)
    first, second = _split_sparse(counts, key, cells, law)
    return first, second


def overlap_probabilities(fraction: float, capture: float) -> tuple[float, float, float]:
    """Return P(in X1), P(in X2), P(in both) for a molecule of a sample that holds `capture` of the cell's molecules.

    Two samples drawn independently from the cell, sized as `fraction` to 1 - `fraction`, could both have caught the
    same molecule; that overlap vanishes as `capture` goes to 0. With a = (1 - s) / s:
    p' = ((1 + a) - sqrt((1 + a)^2 - 4 a c)) / 2a, p'' = a p' (Batson, Royer & Webber 2019).
    """
    a = (1 - fraction) / fraction
    first = 2 * capture / ((1 + a) + np.sqrt((1 + a) ** 2 - 4 * a * capture))  # the same, with its digits for a small c
    second = a * first
    return first / capture, second / capture, first * second / capture


def _in_blocks(counts: Any) -> Iterator[tuple[int, int, Entries]]:
    """Yield (first row or column, the one after the last, their entries)."""
    indptr, n_major = counts.indptr.astype(np.int64), len(counts.indptr) - 1
    first = 0
    while first < n_major:
        last = max(first + 1, int(np.searchsorted(indptr, indptr[first] + _BLOCK, side="right")) - 1)
        entries = slice(indptr[first], indptr[last])
        values, minor = counts.data[entries].astype(np.int64), counts.indices[entries].astype(np.int64)
        yield first, last, (values, minor, indptr[first : last + 1] - indptr[first])
        first = last


def _split_sparse(counts: Any, key: int, cells: np.ndarray, law: Law) -> tuple[Any, ...]:
    """Deal the stored entries, some rows (columns) at a time; only entries that are not zero are kept."""
    by_row, n_parts, n_major = counts.format == "csr", law.n_parts, len(counts.indptr) - 1
    rest = np.cumsum(law.shares[::-1])[::-1].copy()
    of_molecules = law.shares, rest, law.phi, law.overlap
    contents = np.zeros(len(cells), np.uint64)

    def add(block: tuple[int, int, Entries]) -> None:
        first, last, entries = block
        add_contents(entries, first, by_row, contents[first:last] if by_row else contents)

    for _ in (in_threads if by_row else map)(add, _in_blocks(counts)):  # columns share the cells that they add to
        pass
    keys = row_keys(key, cells, contents)
    # As long as the counts' own, then cut to what is stored: pages never written to take no memory.
    data = [np.empty_like(counts.data) for _ in range(n_parts)]
    indices = [np.empty_like(counts.indices) for _ in range(n_parts)]
    ends = np.zeros((n_parts, n_major + 1), np.int64)

    def dealt(block: tuple[int, int, Entries]) -> tuple[int, int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        first, last, entries = block
        values, minors = np.empty((2, n_parts, len(entries[0])), np.int64)
        out = values, minors, np.empty((n_parts, last - first), np.int64)
        deal(entries, keys[first:last] if by_row else keys, first, by_row, of_molecules, out)
        return first, last, out

    for first, last, (values, minors, of_block) in in_threads(dealt, _in_blocks(counts)):
        for i, end in enumerate(of_block):
            stored, n_new = ends[i, first], end[-1]
            data[i][stored : stored + n_new] = values[i, :n_new]
            indices[i][stored : stored + n_new] = minors[i, :n_new]
            ends[i, first + 1 : last + 1] = stored + end
    parts = []
    for own_data, own_indices, end in zip(data, indices, ends, strict=True):
        own_data.resize(end[-1], refcheck=False)
        own_indices.resize(end[-1], refcheck=False)
        arrays = own_data, own_indices, end.astype(counts.indptr.dtype)
        part = type(counts)(arrays, shape=counts.shape, copy=False)
        part.has_canonical_format = True
        parts.append(part)
    return tuple(parts)


def _split_dense(counts: np.ndarray, key: int, cells: np.ndarray, law: Law) -> tuple[CountMatrix, ...]:
    """Deal a block of rows at a time, its entries that are not zero."""
    parts = tuple(np.empty_like(counts) for _ in range(law.n_parts))
    step = max(1, _BLOCK // max(1, counts.shape[1]))
    for start in range(0, counts.shape[0], step):
        rows = slice(start, start + step)
        block = sp.csr_matrix(np.asarray(counts[rows], dtype=np.int64))
        for part, dealt in zip(parts, _split_sparse(block, key, cells[rows], law), strict=True):
            part[rows] = dealt.toarray()
    return parts


def _check_share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"{name} is {value!r}: pass a number between 0 and 1, both excluded.")


def cell_folds(cells: np.ndarray) -> np.ndarray:
    """Return the fold of each cell, 0 or 1 at random, by its number."""
    return (row_keys(0, cells) & np.uint64(1)).astype(np.intp)


def checked_phi(overdispersion: float | np.ndarray, n_genes: int) -> np.ndarray:
    """Return the overdispersion of each gene, shape (genes,); raise for what is none."""
    try:
        values = np.asarray(overdispersion, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"overdispersion is {overdispersion!r}: pass one number, or one per gene.") from None
    if values.ndim > 1 or (values.ndim == 1 and values.size != n_genes):
        raise ValueError(
            f"overdispersion has shape {values.shape}: pass one number, or one per gene ({n_genes} of them)."
        )
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(
            "overdispersion holds a negative or non-finite value: it is phi >= 0 in variance = mean + phi mean^2."
        )
    # Beyond these bounds parts are, to rounding, binomial, and all or nothing.
    return np.broadcast_to(np.where(values < 1e-18, 0, np.minimum(values, 1e12)), n_genes).copy()
