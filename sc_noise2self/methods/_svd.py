"""The right singular vectors of a matrix that is known by products with its Gram matrix alone.

Block Krylov iteration (Musco & Musco 2015, "Randomized block Krylov methods"): with A = Z'Z and a block W0 of random
vectors, the best vectors in the span of W0, A W0, A^2 W0, ... are those of A projected on it (Rayleigh-Ritz). A
product with A is one pass over Z, and nothing with a row for each cell is held. For the same number of passes it is
never worse than power iteration (Halko, Martinsson & Tropp 2011), whose result lies in the same span.

scikit-learn's `randomized_svd` takes neither a matrix that is read in pieces nor one whose mean is removed without
making it dense; SciPy's `svds` takes both as an operator but multiplies one vector at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse as sp

from .._blocks import Block, Chunks, Partial
from .._threads import in_threads

N_PASSES = 4  # products with the Gram matrix
_OVERSAMPLES = 20
_ROWS = 1 << 12  # taken to double precision at a time
_ROUNDING = 1e-12  # of squared lengths, in single precision

Matrices = Callable[[Block], Sequence[sp.csr_matrix]]
"""The rows that several matrices have in a block of cells."""

GramProduct = Callable[[sp.csr_matrix, np.ndarray], np.ndarray]
"""Z'(Z W) of some rows Z and vectors W."""


def gram_product(rows: sp.csr_matrix, vectors: np.ndarray) -> np.ndarray:
    """Return Z'(Z W)."""
    return transposed(rows) @ (rows @ vectors)


def transposed(rows: sp.csr_matrix) -> sp.csr_matrix:
    """Return Z', stored by gene: each row of a product with it is then written once, which threads share better."""
    return rows.tocsc().T


def start_block(n_genes: int, n_components: int, rng: np.random.Generator) -> np.ndarray:
    """Return random vectors to start from, float32 of shape (genes, a few more than the components)."""
    width = min(n_components + _OVERSAMPLES, n_genes)
    return rng.standard_normal((n_genes, width), dtype=np.float32)


def components_of(
    chunks: Chunks,
    matrices: Matrices,
    starts: Sequence[np.ndarray],
    n_components: int,
    n_passes: int = N_PASSES,
    mean_rows: Sequence[np.ndarray | None] | None = None,
    product: GramProduct = gram_product,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return S and V of matrices that are made of the counts a block at a time, all learned in the same passes.

    Of each matrix S (k,), falling, and V (genes, k) with orthonormal columns of positive sums; 0 beyond the rank.
    `starts` are blocks of vectors, from `start_block` or known to be near the answer. `mean_rows` are q'Z of each
    matrix, with q the unit vector that is to be removed from its columns, Z becoming (I - qq')Z; None for none.
    """
    blocks = [_orthonormal(start) for start in starts]
    bases: list[list[np.ndarray]] = [[] for _ in starts]
    products: list[list[np.ndarray]] = [[] for _ in starts]

    def times_vectors(block: Block) -> Partial:
        return Partial([product(z, vectors) for z, vectors in zip(matrices(block), blocks, strict=True)])

    rows = [None] * len(starts) if mean_rows is None else mean_rows
    for i in range(n_passes):
        sums = chunks.run(times_vectors).sums
        for basis, of_basis, block, found, row in zip(bases, products, blocks, sums, rows, strict=True):
            basis.append(block)
            of_basis.append((found if row is None else found - np.outer(row, row @ block)).astype(block.dtype))
        if i < n_passes - 1:
            blocks = list(in_threads(lambda both: _beyond(both[0], both[1][-1]), zip(bases, products, strict=True)))
    both = zip(bases, products, strict=True)
    return list(in_threads(lambda each: _ritz(np.hstack(each[0]), np.hstack(each[1]), n_components), both))


def _ritz(basis: np.ndarray, product: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    small = _inner(basis, product)
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    values, vectors = values[::-1][:n_components], vectors[:, ::-1][:, :n_components]
    real = values > 1e-6 * max(values[0], 1e-300) if len(values) else np.zeros(0, bool)
    v = basis @ (vectors * real).astype(basis.dtype)
    v *= np.where(v.sum(axis=0) < 0, -1, 1).astype(v.dtype)
    s = np.sqrt(np.where(real, values, 0)).astype(basis.dtype)
    missing = n_components - len(s)
    return np.pad(s, (0, missing)), np.ascontiguousarray(np.pad(v, [(0, 0), (0, missing)]))


def _beyond(basis: Sequence[np.ndarray], block: np.ndarray) -> np.ndarray:
    """Return orthonormal vectors for what the block has outside the basis; fewer where it has none."""
    # Directions that a projection leaves next to nothing of are rounding errors, and not outside the basis.
    for least in (_ROUNDING * float(np.square(block).sum(axis=0).max(initial=0)), 0.25):
        for known in basis:
            block = block - known @ (known.T @ block)
        block = _orthonormal(block.astype(basis[0].dtype), least)
    return block


def _orthonormal(block: np.ndarray, least: float = 0.0) -> np.ndarray:
    """Return orthonormal vectors with the same span, without directions of a squared length up to `least`."""
    values, vectors = np.linalg.eigh(_inner(block, block))
    kept = values > max(least, _ROUNDING * values.max(initial=0))
    return block @ (vectors[:, kept] / np.sqrt(values[kept])).astype(block.dtype)


def _inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a'b in double precision, without a copy of either in it."""
    out = np.zeros((a.shape[1], b.shape[1]))
    for start in range(0, len(a), _ROWS):
        rows = slice(start, start + _ROWS)
        out += a[rows].T.astype(np.float64) @ b[rows]
    return out
