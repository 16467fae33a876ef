"""What counts as a count matrix, and the first entry that is not a count.

Molecule splitting is defined on whole, non-negative numbers of molecules alone; everything in the package that
takes counts passes through here once, so that a normalised matrix is refused in one place and in one sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp

CountMatrix: TypeAlias = np.ndarray | sp.csr_matrix | sp.csc_matrix | sp.csr_array | sp.csc_array
"""Cells x genes: dense, or compressed sparse by row or column, `scipy`'s matrices and arrays alike."""


class NotACount(Exception):
    """An entry that is not a count: `cell` and `gene` by number, and its value."""

    def __init__(self, cell: int, gene: int, value: float) -> None:
        super().__init__(cell, gene, value)
        self.cell, self.gene, self.value = cell, gene, value

    def named(self, name: str, cells: Sequence[str] | None, genes: Sequence[str] | None) -> ValueError:
        """Return the error for a user, with the names of matrix, cell and gene."""
        where = f"cell {_label(cells, self.cell)}, gene {_label(genes, self.gene)}"
        return ValueError(
            f"{name} holds {self.value:.4g} at {where}: molecule splitting needs raw counts. "
            'Pass the matrix before normalisation, e.g. layer="counts".'
        )


def check_counts(
    counts: Any,
    *,
    name: str = "the matrix",
    cells: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
) -> CountMatrix:
    """Return `counts` when it is a matrix of counts, else raise saying which entry is not one.

    Parameters
    ----------
    counts
        Cells x genes. Sparse CSR or CSC, or dense; any integer or floating type that holds whole numbers.
    name
        What the matrix is called in messages, e.g. ``'layer "counts"'``.
    cells, genes
        Names used in messages; indices are given where these are None.

    Returns
    -------
    The same object, or a copy in canonical form where a sparse matrix repeats entries or a matrix is boolean.

    Raises
    ------
    TypeError
        If it is not a two-dimensional CSR, CSC or dense numeric matrix.
    ValueError
        If an entry is negative, not finite or not a whole number, or if there is no molecule at all.
    """
    counts = check_format(counts, name=name)
    if counts.dtype.kind == "b":
        counts = counts.astype(np.int8)
    if sp.issparse(counts) and not counts.has_canonical_format:
        counts = counts.copy()
        counts.sum_duplicates()
    values = counts.data if sp.issparse(counts) else counts
    if counts.dtype.kind in "if":
        wrong = first_non_count(values)
        if wrong is not None:
            raise NotACount(*position(counts, wrong), float(values.flat[wrong])).named(name, cells, genes)
    if values.size == 0 or not values.any():
        raise ValueError(f"{name} holds no molecule (shape {counts.shape}): there is nothing to denoise.")
    return counts


def check_format(counts: Any, *, name: str = "the matrix") -> CountMatrix:
    """Return `counts` when it is a numeric matrix of a format that counts come in; see `check_counts`."""
    if isinstance(counts, np.matrix):
        counts = np.asarray(counts)
    if sp.issparse(counts):
        if counts.format not in ("csr", "csc"):
            raise TypeError(
                f"{name} is a sparse matrix of format {counts.format!r}: pass CSR or CSC, e.g. counts.tocsr()."
            )
    elif not isinstance(counts, np.ndarray):
        raise TypeError(
            f"{name} is of type {type(counts).__name__}: molecule splitting needs a NumPy array or a SciPy "
            "CSR or CSC matrix, cells x genes."
        )
    if counts.ndim != 2:
        raise TypeError(f"{name} has {counts.ndim} dimension(s): counts are two-dimensional, cells x genes.")
    if counts.dtype.kind not in "biuf":
        raise TypeError(f"{name} holds {counts.dtype}: counts are numbers.")
    return counts


def row_sums(counts: CountMatrix) -> np.ndarray:
    """Return the molecules of each cell, float64 of shape (cells,)."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def column_sums(counts: CountMatrix) -> np.ndarray:
    """Return the molecules of each gene, float64 of shape (genes,)."""
    return np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel()


def first_non_count(values: np.ndarray, block: int = 1 << 20) -> int | None:
    """Return the flat index of the first entry that is not a count, by blocks that stay in cache."""
    flat = values.reshape(-1) if values.flags.c_contiguous else values.flat
    for start in range(0, values.size, block):
        part = np.asarray(flat[start : start + block])
        wrong = ~(part >= 0)  # also NaN
        if part.dtype.kind == "f":
            wrong |= part != np.rint(part)
            wrong |= np.isinf(part)
        if wrong.any():
            return start + int(np.argmax(wrong))
    return None


def position(counts: CountMatrix, index: int) -> tuple[int, int]:
    """Return (cell, gene) of the entry at this index of the stored values."""
    if isinstance(counts, np.ndarray):
        cell, gene = np.unravel_index(index, counts.shape)
        return int(cell), int(gene)
    major = int(np.searchsorted(counts.indptr, index, side="right")) - 1
    minor = int(counts.indices[index])
    return (major, minor) if counts.format == "csr" else (minor, major)


def _label(names: Sequence[str] | None, index: int) -> str:
    return str(index) if names is None else f'"{names[index]}"'
