"""Counts in which there is nothing to learn: a denoiser that reports a gain on them deceives itself."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import scipy.sparse as sp

from ._anndata import Countable, read_matrix, with_counts
from ._checks import check_one_of
from ._counts import narrowed, row_sums
from ._memory import available_memory, gigabytes
from ._random import RandomState, as_generator

Kind = Literal["shuffled", "permuted"]
_N_BINS = 20  # of depth, equal in cells
_BYTES = 8  # a molecule, at least, while labels are shuffled
_BLOCK = 1 << 22  # dense entries permuted at a time


def null_counts(
    counts: Countable, kind: Kind = "shuffled", *, layer: str | None = None, random_state: RandomState = 0
) -> Countable:
    """Return counts of the same cells and genes without what a denoiser should find.

    Parameters
    ----------
    counts
        Raw counts, cells x genes: CSR, CSC or dense, or an AnnData object.
    kind
        `"shuffled"`: the gene labels of all molecules are shuffled. Every cell keeps its molecules and every gene its
        total, exactly; nothing else is left, and the gain of any denoiser must vanish. `"permuted"`: the counts of each
        gene are permuted among cells of similar depth, within twentieths of the cells. What genes tell of each other
        is gone, but not that a gene varies more than a Poisson count: half of such a count tells of its other half, so
        a gain that is left under it is what genes tell of themselves.
    layer
        The layer of an AnnData object; None takes `X`.
    random_state
        Seed or generator.

    Returns
    -------
    Counts of the same type and dtype (a wider one if a shuffled count does not fit in it); an AnnData object with them
    in `X` and the same `obs` and `var` (what `denoise` wrote there left out). The input is not modified. Shuffling
    holds 8 bytes a molecule.

    Raises
    ------
    ValueError, TypeError
        If the counts are not whole, non-negative numbers, or there is no such kind.
    MemoryError
        If so many molecules do not fit in memory.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> null = n2s.null_counts(adata)
    >>> bool((null.X.sum(axis=1) == adata.X.sum(axis=1)).all())
    True
    """
    check_one_of("kind", kind, get_args(Kind))
    rng = as_generator(random_state)
    matrix = read_matrix(counts, layer)
    csr = sp.csr_matrix(matrix)
    null = _shuffled(csr, rng) if kind == "shuffled" else _permuted(csr, rng)
    return with_counts(counts, null.toarray() if isinstance(matrix, np.ndarray) else type(matrix)(null))


def _shuffled(counts: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
    """Deal the gene labels of all molecules anew, as many to each cell as it has."""
    n_molecules = int(counts.data.sum(dtype=np.float64))
    if n_molecules * _BYTES > (free := available_memory()):
        raise MemoryError(
            f"shuffling {n_molecules:,} molecules takes {gigabytes(n_molecules * _BYTES)} and {gigabytes(free)} of "
            "memory are free: pass fewer cells, or kind='permuted'."
        )
    genes = np.repeat(counts.indices, counts.data.astype(np.int64))
    rng.shuffle(genes)
    ends = np.concatenate([[0], np.cumsum(row_sums(counts))]).astype(np.int64)
    ones = np.ones(len(genes), np.int32 if n_molecules < 2**31 else np.int64)
    out = sp.csr_matrix((ones, genes, ends), shape=counts.shape)
    out.sum_duplicates()
    return narrowed(out, counts.dtype)


def _permuted(counts: sp.csr_matrix, rng: np.random.Generator) -> sp.csr_matrix:
    """Permute each gene's counts among the cells of each bin of depth, by blocks of genes."""
    n_cells, n_genes = counts.shape
    parts, order = [], np.argsort(row_sums(counts), kind="stable")
    for cells in np.array_split(order, min(_N_BINS, n_cells)):
        of_cells, step = counts[cells].tocsc(), max(1, _BLOCK // len(cells))
        blocks = (of_cells[:, start : start + step].toarray() for start in range(0, n_genes, step))
        parts.append(sp.hstack([sp.csr_matrix(rng.permuted(block, axis=0)) for block in blocks], format="csr"))
    return sp.vstack(parts, format="csr")[np.argsort(order)]
