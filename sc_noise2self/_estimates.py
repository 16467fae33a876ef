"""What denoising in blocks will take, said before it starts: memory by what is held, time by what one block takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from joblib import cpu_count

from ._blocks import Block, Chunks, block_rows
from ._counts import SINGLE, NotACount, check_values, row_sums
from ._memory import gigabytes
from ._split import halves
from ._transform import Transform

# Measured by benchmarks/scale.py on two cores; seconds of choosing do not grow with the cells.
_CHOOSING_SECONDS, _PASSES = 8, 12  # passes of the kind that is timed: the others take a part of it
_CHOOSING_BYTES = 600e6  # with the interpreter and its libraries
_BYTES_OF_A_SCORE, _BYTES_OF_A_LOADING, _BYTES_OF_AN_ENTRY = 8, 100, 150


@dataclass(frozen=True)
class Estimate:
    """Of `denoise(adata, write_layer=False)` on counts that are not in memory."""

    n_cells: int
    n_genes: int
    memory: float
    seconds: float

    def __str__(self) -> str:
        """Return it in a line."""
        how_long = f"{self.seconds:.0f} s" if self.seconds < 120 else f"{self.seconds / 60:.0f} min"
        return f"{self.n_cells} cells x {self.n_genes} genes: about {gigabytes(self.memory)} of memory and {how_long}"


def estimate(chunks: Chunks, n_components: int) -> Estimate | None:
    """Return what denoising will take, from one block of the counts; None where they are none and will be refused.

    Parameters
    ----------
    n_components
        Of PCA.
    """
    n_cells, n_genes = chunks.shape
    if min(chunks.shape) < 2:
        return None
    n_rows = min(n_cells, block_rows(n_genes))
    start = time.perf_counter()
    first = Block(chunks.take(np.arange(n_rows)), 0)
    try:
        check_values(first.counts, SINGLE)
    except NotACount:
        return None
    _one_pass(first, n_components)
    seconds = (time.perf_counter() - start) * n_cells / n_rows / cpu_count()
    memory = (
        _CHOOSING_BYTES
        + n_cells * n_components * _BYTES_OF_A_SCORE
        + n_genes * n_components * _BYTES_OF_A_LOADING
        + first.counts.nnz * _BYTES_OF_AN_ENTRY
    )
    return Estimate(n_cells, n_genes, memory, _CHOOSING_SECONDS + _PASSES * seconds)


def _one_pass(block: Block, n_components: int) -> None:
    """Multiply both halves with their Gram matrices, the dearest kind of pass."""
    vectors = np.ones((block.counts.shape[1], n_components), np.float32)
    for half in halves(block.counts, 0, block.cells):
        z = Transform("log1p", 1).apply(half, row_sums(half))
        z.T @ (z @ vectors)
