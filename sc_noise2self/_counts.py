"""What counts as a count matrix, and the first entry that is not a count.

Molecule splitting is defined on whole, non-negative numbers alone; everything that takes counts passes through here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp

CountMatrix: TypeAlias = np.ndarray | sp.csr_matrix | sp.csc_matrix | sp.csr_array | sp.csc_array
"""Cells x genes: dense, or compressed sparse by row or column, `scipy`'s matrices and arrays alike."""

_BLOCK = 1 << 20  # entries at a time
SINGLE = 2**24  # up to here single precision, which denoisers work in, holds every whole number


class NotACount(Exception):
    """An entry that is not a count, or is too large: (cell, gene, value, largest allowed), the first two by number."""

    def named(self, name: str, cells: Sequence[str] | None, genes: Sequence[str] | None) -> ValueError:
        """Return the error for a user, with the names of matrix, cell and gene."""
        cell, gene, value, largest = self.args
        where = f"cell {_label(cells, cell)}, gene {_label(genes, gene)}"
        if largest < value < np.inf:
            shown = f"{value:.17g}" if isinstance(value, np.floating) else value
            return ValueError(
                f"{name} holds {shown} at {where}: counts are exact up to 2^{largest.bit_length() - 1} "
                "here, and no cell has so many molecules of a gene. Pass raw UMI counts."
            )
        return ValueError(
            f"{name} holds {str(value).removesuffix('.0')} at {where}: molecule splitting needs raw counts. "
            'Pass the matrix before normalisation, e.g. layer="counts".'
        )


def check_counts(
    counts: Any,
    *,
    name: str = "the matrix",
    cells: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    largest: int = 2**53,
) -> CountMatrix:
    """Return a matrix of counts up to `largest`, or to where its own type is exact; else say which entry is not one.

    A sparse matrix that repeats entries is copied, to a wider type if they add up to more than its own holds. `cells`
    and `genes` are names for messages.
    """
    counts = check_format(counts, name)
    try:
        check_values(counts, largest)
        if sp.issparse(counts) and not counts.has_canonical_format:
            counts = _canonical(counts)
            check_values(counts, largest)
    except NotACount as error:
        raise error.named(name, cells, genes) from None
    values = counts.data if sp.issparse(counts) else counts
    if values.size == 0 or not values.any():
        raise ValueError(f"{name} holds no molecule (shape {counts.shape}): there is nothing to denoise.")
    return counts


def check_format(counts: Any, name: str) -> CountMatrix:
    """Return a numeric matrix of a format that counts come in; raise for anything else."""
    if isinstance(counts, np.ndarray) and not isinstance(counts, np.ma.MaskedArray):
        counts = np.asarray(counts)  # a view of AnnData would write through to its parent
    if sp.issparse(counts):
        if counts.format not in ("csr", "csc"):
            raise TypeError(
                f"{name} is a sparse matrix of format {counts.format!r}: pass CSR or CSC, e.g. counts.tocsr()."
            )
        _check_indices(counts, name)
    elif type(counts) is not np.ndarray:
        raise TypeError(
            f"{name} is of type {type(counts).__name__}: molecule splitting needs a NumPy array or a SciPy "
            "CSR or CSC matrix, cells x genes."
        )
    if counts.ndim != 2:
        raise TypeError(f"{name} has {counts.ndim} dimension(s): counts are two-dimensional, cells x genes.")
    if counts.dtype.kind not in "biuf":
        raise TypeError(f"{name} holds {counts.dtype}: counts are numbers.")
    return counts


def _check_indices(counts: sp.csr_matrix | sp.csc_matrix, name: str) -> None:
    """Raise where a matrix names rows or columns that it does not have: reading them would end the process."""
    try:
        # SciPy's check casts and trims what it checks, so it is given another matrix of the same arrays.
        type(counts)((counts.data, counts.indices, counts.indptr), shape=counts.shape, copy=False).check_format()
    except ValueError as error:
        raise ValueError(
            f"{name} is a broken sparse matrix: {error}. Write the file, or build the matrix, anew."
        ) from None


def check_values(counts: CountMatrix, largest: int) -> None:
    """Raise NotACount for the first entry that is negative, not finite, not whole, or too large, also for its type."""
    if counts.dtype.kind == "f":
        largest = min(largest, 2 ** (np.finfo(counts.dtype).nmant + 1))
    values: Any = counts.data if sp.issparse(counts) else counts
    wrong = None if counts.dtype.kind == "b" else _first_wrong(values, largest)
    if wrong is not None:
        raise NotACount(*_position(counts, wrong), values.flat[wrong], largest)


def _canonical(counts: Any) -> CountMatrix:
    """Return a copy with one entry a place, in the matrix's own type if that holds the sums."""
    wide = counts.astype(np.int64 if counts.dtype.kind in "biu" else np.float64)
    wide.sum_duplicates()
    return narrowed(wide, counts.dtype)


def narrowed(counts: Any, dtype: np.dtype) -> CountMatrix:
    """Return a sparse matrix in another type, or as it is where that type does not hold its counts."""
    narrow = counts.astype(dtype)
    return narrow if np.array_equal(narrow.data, counts.data) else counts


def row_sums(counts: CountMatrix) -> np.ndarray:
    """Return the molecules of each cell, float64 of shape (cells,)."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def depth_of(size: np.ndarray) -> float:
    """Return the median number of molecules of the cells that hold one."""
    return float(np.median(size[size > 0]))


def column_sums(counts: CountMatrix) -> np.ndarray:
    """Return the molecules of each gene, float64 of shape (genes,)."""
    if isinstance(counts, np.ndarray) or counts.format != "csr":
        return np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()
    # SciPy adds up in single precision, which holds sums up to 2^24.
    out = np.zeros(counts.shape[1])
    for start in range(0, int(counts.indptr[-1]), _BLOCK):
        some = slice(start, min(start + _BLOCK, int(counts.indptr[-1])))
        out += np.bincount(counts.indices[some], counts.data[some], minlength=len(out))
    return out


def _first_wrong(values: np.ndarray, largest: int) -> int | None:
    """Return the flat index of the first entry that is not a count up to the largest, by blocks that stay in cache."""
    flat = values.reshape(-1) if values.flags.c_contiguous else values.flat
    for start in range(0, values.size, _BLOCK):
        part = np.asarray(flat[start : start + _BLOCK])
        wrong = ~(part >= 0) | (part > largest)  # also NaN
        if part.dtype.kind == "f":
            wrong |= part != np.rint(part)
        if wrong.any():
            return start + int(np.argmax(wrong))
    return None


def _position(counts: CountMatrix, index: int) -> tuple[int, int]:
    """Return (cell, gene) of the entry at this index of the stored values."""
    if isinstance(counts, np.ndarray):
        return divmod(index, counts.shape[1])
    major = int(np.searchsorted(counts.indptr, index, side="right")) - 1
    minor = int(counts.indices[index])
    return (major, minor) if counts.format == "csr" else (minor, major)


def _label(names: Sequence[str] | None, index: int) -> str:
    return str(index) if names is None else f'"{names[index]}"'
