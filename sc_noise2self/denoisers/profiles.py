"""Denoised profiles kept in factors: any cells and genes on request, the dense whole only when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..transform import TransformName, rates

_BLOCK = 1 << 20  # dense entries rebuilt at a time, 4 MB


@dataclass(frozen=True, eq=False)
class LowRankProfiles:
    """Expected counts = cell_scale * gene_scale * rates(scores @ loadings'), the rates those of the transform.

    Attributes
    ----------
    transform
        The scale on which the model is linear.
    scores, loadings
        float32 of shape (cells, k) and (genes, k).
    gene_scale, cell_scale
        Factors that give every gene its observed total and every cell its observed size, see `with_totals`.
    """

    transform: TransformName
    scores: np.ndarray
    loadings: np.ndarray
    gene_scale: np.ndarray
    cell_scale: np.ndarray

    @classmethod
    def with_totals(
        cls,
        transform: TransformName,
        scores: np.ndarray,
        loadings: np.ndarray,
        size: np.ndarray,
        gene_share: np.ndarray,
        n_rounds: int,
    ) -> LowRankProfiles:
        """Return profiles in which every gene has its share of all molecules and every cell its size.

        Going back from a transform is right up to a factor per gene; the observed totals say which. Genes and cells
        are scaled in turn (iterative proportional fitting), cells last, one pass over blocks of cells a round.

        Parameters
        ----------
        size
            Molecules observed in each cell, shape (cells,): the depth that expected counts are given at.
        gene_share
            The share of all molecules that each gene has, shape (genes,); a gene of share 0 stays at 0.
        n_rounds
            Rounds; after one, gene totals were off by .3 % at most on average, after three by .02 %.
        """
        gene_scale = (gene_share > 0).astype(np.float32)
        cell_scale = np.zeros(len(size), np.float32)
        out = cls(transform, scores, loadings, gene_scale, cell_scale)
        target = gene_share * size.sum()
        for round_ in range(n_rounds + 1):
            totals = np.zeros(len(gene_share))
            for rows, unscaled in out._unscaled_blocks():
                sums = unscaled @ out.gene_scale
                cell_scale[rows] = np.where(sums > 0, size[rows] / np.where(sums > 0, sums, 1), 0)
                if round_ < n_rounds:
                    totals += cell_scale[rows] @ unscaled
            if round_ < n_rounds:
                totals *= out.gene_scale
                out.gene_scale[:] *= np.where(totals > 0, target / np.where(totals > 0, totals, 1), 0)
        return out

    @property
    def shape(self) -> tuple[int, int]:
        """(cells, genes)."""
        return len(self.scores), len(self.loadings)

    def counts(self, cells: slice | np.ndarray = slice(None), genes: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Return expected counts at each cell's own depth, dense float32 of shape (cells asked, genes asked)."""
        out = rates(self.transform, self.scores[cells] @ self.loadings[genes].T)
        out *= self.gene_scale[genes]
        out *= self.cell_scale[cells][:, None]
        return out

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (cells, their expected counts) until every cell has been seen."""
        for rows in self._rows():
            yield rows, self.counts(rows)

    def take(self, cells: np.ndarray) -> LowRankProfiles:
        """Return the profiles of these cells."""
        return replace(self, scores=self.scores[cells], cell_scale=self.cell_scale[cells])

    def _rows(self) -> Iterator[slice]:
        step = max(1, _BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def _unscaled_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        for rows in self._rows():
            yield rows, rates(self.transform, self.scores[rows] @ self.loadings.T)
