"""Denoised profiles kept in factors: any cells and genes on request, the dense whole only when it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import scipy.sparse as sp

from .._blocks import Block, Chunks, Partial
from .._threads import in_threads
from .._transform import Link, rates

_BLOCK = 1 << 20  # dense entries rebuilt at a time, 4 MB
_FLOOR = np.float32(
    0.15
)  # of the mean profile; .1 to .2 gained the same to .001 on three data sets, 0 lost .003 to .012
_FLOOR_CAP = np.float32(0.3)  # molecules

_TOTALS_OFF = 1e-3  # how far genes may be from their totals, on average, where these count as right
_MOST_ROUNDS = 100

Index = slice | np.ndarray


class Profiles(ABC):
    """Expected counts of every cell at its own depth, of shape (cells, genes), rebuilt on request."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(cells, genes)."""

    @abstractmethod
    def counts(self, cells: Index = slice(None), genes: Index = slice(None)) -> np.ndarray:
        """Return expected counts, dense float32 of shape (cells asked, genes asked)."""

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (cells, their expected counts) until every cell has been seen."""
        for rows in self.rows():
            yield rows, self.counts(rows)

    def rows(self) -> Iterator[slice]:
        """Yield slices of cells, each as long as a block."""
        step = max(1, _BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))


@dataclass(frozen=True, eq=False)
class LowRankProfiles(Profiles):
    """Expected counts from factors: row_scale * max(cell_scale * gene_scale * rates(scores @ loadings'), floor).

    The floor is .15 min(mean profile at the cell's depth, .3 molecules). Noise left in a denoised value pushes rates to
    zero, and a zero claims a certainty that no cell's few molecules give; the floor takes that bias away. It is
    capped because a gene that the mean profile gives many molecules is told from zero well enough.

    Attributes
    ----------
    link
        The transform on whose scale the model is linear, or `"exp"` where it is log-linear.
    scores, loadings
        float32 of shape (cells, k) and (genes, k). With `"exp"` the last column of loadings is 1: the last score of a
        cell is the level of its log rates.
    gene_scale, cell_scale, row_scale
        Factors that give every gene its observed total and every cell its observed size, before and after the floor.
    gene_share
        The mean profile: share of all molecules that each gene has, shape (genes,).
    size
        Molecules observed in each cell, shape (cells,): the depth that expected counts are given at.
    """

    link: Link
    scores: np.ndarray
    loadings: np.ndarray
    gene_scale: np.ndarray
    cell_scale: np.ndarray
    row_scale: np.ndarray
    gene_share: np.ndarray
    size: np.ndarray

    @classmethod
    def with_totals(
        cls,
        link: Link,
        scores: np.ndarray,
        loadings: np.ndarray,
        size: np.ndarray,
        gene_share: np.ndarray,
        n_rounds: int | None = None,
        gene_scale: np.ndarray | None = None,
    ) -> LowRankProfiles:
        """Return profiles in which every gene has its share of all molecules and every cell its size.

        Going back from a transform is right up to a factor per gene; the observed totals say which. Genes and cells
        are scaled in turn (iterative proportional fitting), cells last, one pass over blocks of cells a round.

        Parameters
        ----------
        n_rounds
            Rounds; None makes as many as it takes until gene totals are right to 0.1 % on average, two or three on
            real data, a hundred at most. With 0 genes keep `gene_scale`.
        gene_scale
            What to start from, shape (genes,); None for 1.
        """
        out = cls.unscaled(link, scores, loadings, size, gene_share, gene_scale)
        target = out.gene_share * float(out.size.sum())
        for _ in range(_MOST_ROUNDS if n_rounds is None else n_rounds):
            totals = out.scale_cells()
            if n_rounds is None and _mean_deviation(totals, target) <= _TOTALS_OFF:
                return out
            out.gene_scale[:] = scaled_to(target, totals, out.gene_scale)
        out.scale_cells()
        return out

    @classmethod
    def unscaled(
        cls,
        link: Link,
        scores: np.ndarray,
        loadings: np.ndarray,
        size: np.ndarray,
        gene_share: np.ndarray,
        gene_scale: np.ndarray | None = None,
    ) -> LowRankProfiles:
        """Return profiles whose cells have no scale yet."""
        gene_share, size = gene_share.astype(np.float32), size.astype(np.float32)
        gene_scale = (gene_share > 0) * np.float32(1 if gene_scale is None else gene_scale)
        cell_scale, row_scale = np.zeros((2, len(size)), np.float32)
        return cls(link, scores, loadings, gene_scale, cell_scale, row_scale, gene_share, size)

    def scale_cells(self) -> np.ndarray:
        """Set the scales that give every cell its size, in one pass; return what each gene adds up to, shape (genes,).

        The sum is in double precision.
        """

        def of_rows(rows: slice) -> np.ndarray:
            block = self.scores[rows] @ self.loadings.T
            if self.link == "exp":
                # The level of a cell's log rates is arbitrary: with the largest at 0 their sum is a number.
                level = block.max(axis=1)
                block -= level[:, None]
                self.scores[rows, -1] -= level
            block = rates(self.link, block)
            block *= self.gene_scale
            self.cell_scale[rows] = _ratio(self.size[rows], block.sum(axis=1))
            block *= self.cell_scale[rows, None]
            np.maximum(block, self._floor(rows), out=block)
            self.row_scale[rows] = _ratio(self.size[rows], block.sum(axis=1))
            return self.row_scale[rows] @ block

        totals = np.zeros(len(self.loadings))
        for of_block in in_threads(of_rows, self.rows()):
            totals += of_block
        return totals

    @property
    def shape(self) -> tuple[int, int]:
        """(cells, genes)."""
        return len(self.scores), len(self.loadings)

    def of_cells(self, cells: Index) -> LowRankProfiles:
        """Return the profiles of some cells, scaled as they are here."""
        of_cells = {name: getattr(self, name)[cells] for name in ("scores", "cell_scale", "row_scale", "size")}
        return replace(self, **of_cells)

    def counts(self, cells: Index = slice(None), genes: Index = slice(None)) -> np.ndarray:
        """Return expected counts, dense float32 of shape (cells asked, genes asked)."""
        out = rates(self.link, self.scores[cells] @ self.loadings[genes].T)
        out *= self.gene_scale[genes]
        out *= self.cell_scale[cells][:, None]
        np.maximum(out, self._floor(cells, genes), out=out)
        out *= self.row_scale[cells][:, None]
        return out

    def _floor(self, cells: Index, genes: Index = slice(None)) -> np.ndarray:
        floor = np.multiply.outer(self.size[cells], self.gene_share[genes])
        np.minimum(floor, _FLOOR_CAP, out=floor)
        floor *= _FLOOR
        return floor


def profiles_in_blocks(
    chunks: Chunks,
    size: np.ndarray,
    some: LowRankProfiles,
    unscaled: Callable[[Block, np.ndarray], LowRankProfiles],
) -> LowRankProfiles:
    """Return the profiles of all cells, every gene with its share of all molecules, in passes over the counts.

    There are two where gene totals are right to 0.3 % on average at the start, else one or two more.

    Parameters
    ----------
    chunks
        The counts. Of a Dask array, the last pass is made where scores and scales of cells are read.
    size
        Molecules of each cell, shape (cells,).
    some
        The profiles of some of the cells, from which genes have their scale but for a last round.
    unscaled
        Returns those of a block, with a scale of genes that is given, cells without a scale.
    """

    def of_totals(block: Block) -> Partial:
        return Partial([unscaled(block, gene_scale).scale_cells()])

    gene_scale, target = some.gene_scale, some.gene_share * size.sum()
    for _ in range(_MOST_ROUNDS):
        totals = chunks.run(of_totals).sums[0]
        gene_scale = scaled_to(target, totals, gene_scale)
        if _mean_deviation(totals, target) <= 3 * _TOTALS_OFF:
            break

    def of_cells(block: Block) -> Partial:
        found = unscaled(block, gene_scale)
        found.scale_cells()
        return Partial(rows=(found.scores, np.column_stack([found.cell_scale, found.row_scale])))

    scores, scales = chunks.rows(of_cells, (some.scores.shape[1], 2))
    return replace(
        some,
        scores=cast("np.ndarray", scores),
        gene_scale=gene_scale,
        cell_scale=cast("np.ndarray", scales[:, 0]),
        row_scale=cast("np.ndarray", scales[:, 1]),
        size=size.astype(np.float32),
    )


def _mean_deviation(totals: np.ndarray, target: np.ndarray) -> float:
    """Return how far totals of genes are from what they should be, as a share of it, on average."""
    there = target > 0
    return float(np.mean(np.abs(totals[there] / target[there] - 1)))


def scaled_to(target: np.ndarray, totals: np.ndarray, gene_scale: np.ndarray) -> np.ndarray:
    """Return the scale of genes that brings their totals to the target, shape (genes,)."""
    return gene_scale * _ratio(target, totals)


def _ratio(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return wanted / found, 0 where nothing was found."""
    return np.where(found > 0, wanted / np.where(found > 0, found, 1), 0).astype(np.float32)


@dataclass(frozen=True, eq=False)
class WeightedProfiles(Profiles):
    """The mean of several denoisers' profiles, each with its weight."""

    members: tuple[Profiles, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(cells, genes)."""
        return self.members[0].shape

    def counts(self, cells: Index = slice(None), genes: Index = slice(None)) -> np.ndarray:
        """Return expected counts, dense float32 of shape (cells asked, genes asked)."""
        out = self.members[0].counts(cells, genes)
        out *= np.float32(self.weights[0])
        for member, weight in zip(self.members[1:], self.weights[1:], strict=True):
            part = member.counts(cells, genes)
            part *= np.float32(weight)
            out += part
        return out


@dataclass(frozen=True, eq=False)
class MixedProfiles(Profiles):
    """Denoised profiles with the observed counts mixed back in, see `sc_noise2self.methods._mixing`.

    Attributes
    ----------
    profiles
        The denoiser's expected counts m.
    observed
        The counts x, CSR of shape (cells, genes), or where they are, of which the cells and genes asked are read.
    phi
        Squared coefficient of variation of each gene's rate around m, shape (genes,).
    cell_scale
        Factors that give every cell its observed size again, shape (cells,), see `with_totals`.
    """

    profiles: Profiles
    observed: sp.csr_matrix | Chunks
    phi: np.ndarray
    cell_scale: np.ndarray

    @classmethod
    def with_totals(cls, profiles: Profiles, observed: sp.csr_matrix, phi: np.ndarray) -> MixedProfiles:
        """Return mixed profiles in which every cell has its observed size: one pass over blocks of cells."""
        out = cls(profiles, observed, phi, np.ones(observed.shape[0], np.float32))
        size = np.asarray(observed.sum(axis=1)).ravel()
        for rows, block in out.blocks():
            out.cell_scale[rows] = _ratio(size[rows], block.sum(axis=1))
        return out

    @property
    def shape(self) -> tuple[int, int]:
        """(cells, genes)."""
        return self.profiles.shape

    def counts(self, cells: Index = slice(None), genes: Index = slice(None)) -> np.ndarray:
        """Return m (1 + phi x) / (1 + phi m), dense float32 of shape (cells asked, genes asked)."""
        out = self.profiles.counts(cells, genes)
        phi = self.phi[genes].astype(np.float32)
        out /= 1 + phi * out
        if isinstance(self.observed, Chunks):
            observed = self.observed.part(cells, genes).tocoo()
        else:
            observed = sp.coo_matrix(self.observed[cells][:, genes])
        out[observed.row, observed.col] *= 1 + phi[observed.col] * observed.data
        out *= self.cell_scale[cells][:, None]
        return out

    def share_of_count(self) -> np.ndarray:
        """Return the mean over cells of phi m / (1 + phi m), shape (genes,).

        It is the weight of the cell's own count x in the mixture, against that of m: 0 where nothing was mixed in.
        """
        total = np.zeros(self.shape[1])
        for _, block in self.profiles.blocks():
            block *= self.phi.astype(np.float32)
            total += (block / (1 + block)).sum(axis=0)
        return total / self.shape[0]
