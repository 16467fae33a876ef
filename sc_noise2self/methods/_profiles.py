"""Denoised profiles: any cells and genes on request, the dense whole only when it is asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp

from .._blocks import Block, Chunks, InMemory, OnDask, Partial, as_chunks
from .._counts import row_sums
from .._progress import progress_bar
from .._threads import in_threads
from .._transform import Link, rates
from ..partitions import Rows
from ._dispersion import Dispersion
from ._populations import (
    AS_IT_IS,
    Index,
    Populations,
    Refinement,
    clusters_of,
    nested_factors,
    populations_of,
    roots,
    rows_of,
    sketch_of,
    sums_of,
)

_CLUSTERED = 20_000_000  # dense entries of the cells that populations are found among
_KEPT = 50_000_000  # and of profiles whose rates are kept from one pass to the next, 200 MB

# Outputs whose rate, scaled and added over genes, is far from float32's end.
_LARGEST_OUTPUT: dict[Link, float] = {"exp": 1e4, "log1p": 60.0, "sqrt": 1e12, "none": 1e12}
_CHECKED = 5_000_000  # dense entries checked at a time

UNKNOWN = -1  # population, or scale before the floor, of a cell that is to be found when the cell is first read
_TOTALS_OFF = 1e-3  # how far genes may be from their totals, on average, where these count as right
_MOST_ROUNDS = 100
_STAGE = 20  # times as many cells, in which genes are scaled before all, where these are twice as many again or more
_LONGEST_STEP = 10  # what is missing of a gene's total, that often

_SCALES = ("cell_scale", "row_scale", "population")  # of cells, as they are kept
N_SCALES = len(_SCALES)


def _is_all(index: Index) -> bool:
    return isinstance(index, slice) and index == slice(None)


class Profiles(ABC):
    """Expected counts of every cell at its own depth, of shape (cells, genes), rebuilt on request."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(cells, genes)."""

    @abstractmethod
    def counts(self, cells: Index = slice(None), genes: Index = slice(None)) -> np.ndarray:
        """Return expected counts, dense float32 of shape (cells asked, genes asked)."""

    @abstractmethod
    def of_cells(self, cells: np.ndarray) -> Profiles:
        """Return the profiles of some cells, scaled as they are here."""

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (cells, their expected counts) until every cell has been seen."""
        for rows in self.rows():
            yield rows, self.counts(rows)

    def rows(self) -> Iterator[slice]:
        """Yield slices of cells, each as long as a block."""
        return rows_of(*self.shape)


@dataclass(frozen=True, eq=False)
class ScaledProfiles(Profiles):
    """Expected counts row_scale * max(cell_scale * factor * gene_scale * rates, floor), from rates of any kind.

    The corner of the maximum is rounded. The factor of a gene, and the floor, are those of the cell's
    population (`sc_noise2self.methods._populations`). Cells without a scale are given one when they are first read.
    """

    gene_scale: np.ndarray  # gives every gene its observed total
    cell_scale: np.ndarray  # gives every cell its observed size before the floor
    row_scale: np.ndarray  # and after it
    gene_share: np.ndarray  # the mean profile: share of all molecules that each gene has
    size: np.ndarray  # molecules observed in each cell: the depth that expected counts are given at
    population: np.ndarray  # of each cell, whole numbers
    populations: Populations
    source: ClassVar[str]  # what rates are made of, with a row for each cell
    _kept: dict[tuple[Any, ...], np.ndarray] | None = field(default=None, init=False)  # rates by block, once `balanced`

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.size), len(self.gene_share)

    def of_cells(self, cells: np.ndarray) -> Self:
        names = (self.source, "cell_scale", "row_scale", "size", "population")
        return replace(self, **{name: getattr(self, name)[cells] for name in names})

    @abstractmethod
    def _rates(self, cells: Index, genes: Index) -> np.ndarray:
        """Return rates up to a factor per gene and per cell, dense float32, which the caller may change.

        Those of linear models may be below 0, which counts as 0.
        """

    def _rates_to_scale(self, rows: Index) -> np.ndarray:
        """Return the rates of cells whose scale is about to be set."""
        return self._rates(rows, slice(None))

    def _kept_rates(self, rows: Index, rates_of: Callable[[Index], np.ndarray]) -> np.ndarray:
        """Return the rates of cells, kept where `balanced` said that another pass follows."""
        if self._kept is None or not isinstance(rows, slice):
            return rates_of(rows)
        key = rows.start, rows.stop, rows.step
        if key not in self._kept:
            self._kept[key] = rates_of(rows)
        return self._kept[key].copy()

    def _changed(self, **changes: Any) -> Self:
        """Return these profiles with changes that leave the rates as they are."""
        out = replace(self, **changes)
        object.__setattr__(out, "_kept", self._kept)
        return out

    def scale_cells(self) -> np.ndarray:
        """Set the scales that give every cell its size, in one pass; return what each gene adds up to, float64."""
        return self.sums_of_populations().sum(axis=0)

    def sums_of_populations(self) -> np.ndarray:
        """Do the same, and return what the genes of each population's cells add up to, shape (populations, genes)."""
        own = self.populations.times(self.gene_scale)

        def of_rows(rows: slice) -> np.ndarray:
            sums = np.zeros(own.factors.shape)
            self._scale_rows(own, rows, sums)
            return sums

        totals, blocks = np.zeros(own.factors.shape), list(self.rows())
        for of_block in progress_bar("scaling cells", len(blocks), iterable=in_threads(of_rows, blocks)):
            totals += of_block
        return totals

    def _scale_rows(self, own: Populations, rows: Index, sums: np.ndarray | None = None) -> np.ndarray:
        """Set the scales of cells and return their expected counts, as `Populations.refine` does."""
        block = self._kept_rates(rows, self._rates_to_scale)
        if (self.population[rows] == UNKNOWN).any():
            self.population[rows] = own.nearest(block, self.gene_scale)
        found = self.population[rows].astype(np.intp)
        self.cell_scale[rows], self.row_scale[rows] = own.refine(block, found, self.size[rows], sums)
        return block

    def scaled(self, n_rounds: int | None = None) -> Self:
        """Return these profiles, every gene with its share of all molecules and every cell with its size.

        `n_rounds` is that of `balanced`; with 0 genes keep `gene_scale`.
        """
        self.balanced(n_rounds)
        if (self.cell_scale == UNKNOWN).any():
            self.scale_cells()
        object.__setattr__(self, "_kept", None)
        return self

    def balanced(self, n_rounds: int | None = None, *, off: float = _TOTALS_OFF) -> Self:
        """Return these profiles, every gene with its share of all molecules; cells are scaled when they are read.

        Going back from a transform is right up to a factor per gene; the observed totals say which. Genes and cells
        are scaled in turn (iterative proportional fitting), one pass over blocks of cells a round. A floor does not
        grow with a gene's scale: so how a total answered to the step before says how far to go (secant method).

        Parameters
        ----------
        n_rounds
            Rounds; None makes as many as it takes until gene totals are right to 0.1 % on average, two or three on
            real data, some more with a high floor, a hundred at most.
        off
            Where totals are right, instead of 0.1 %.
        """
        if n_rounds != 0 and self._kept is None and len(self.size) * len(self.gene_share) <= _KEPT:
            object.__setattr__(self, "_kept", {})
        self.scale_genes(self.scale_cells, self.gene_share * float(self.size.sum()), off, n_rounds)
        return self

    def scale_genes(
        self, totals_of: Callable[[], np.ndarray], target: np.ndarray, off: float, n_rounds: int | None = None
    ) -> None:
        """Scale genes until `totals_of`, what they add up to as they are scaled, is right."""
        steps = _Steps(target)
        for _ in range(_MOST_ROUNDS if n_rounds is None else n_rounds):
            totals = totals_of()
            if n_rounds is None and _mean_deviation(totals, target) <= off:
                return
            # What is scaled must not change which population a cell belongs to.
            scale = self.gene_scale if len(self.populations.factors) == 1 else self.populations.factors
            scale *= steps.next(totals)
            self.cell_scale.fill(UNKNOWN)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        own = self.populations.times(self.gene_scale)
        for rows in self.rows():
            yield rows, self._counts(own, rows, slice(None))

    def counts(self, cells: Index = slice(None), genes: Index = slice(None)) -> np.ndarray:
        own = self.populations.times(self.gene_scale)
        if self._kept is None or not (_is_all(cells) and _is_all(genes)):
            return self._counts(own, cells, genes)
        out = np.empty(self.shape, np.float32)  # block by block, as the rates are kept

        def fill(rows: slice) -> None:
            out[rows] = self._counts(own, rows, genes)

        for _ in in_threads(fill, self.rows()):
            pass
        return out

    def _counts(self, own: Populations, cells: Index, genes: Index) -> np.ndarray:
        cell_scale = np.asarray(self.cell_scale[cells])
        if (cell_scale == UNKNOWN).any():
            return self._scale_rows(own, cells)[:, genes]
        if _is_all(genes):
            out = self._kept_rates(cells, lambda rows: self._rates(rows, genes))
        else:
            out = self._rates(cells, genes)
        population = np.asarray(self.population[cells]).astype(np.intp)
        scales = cell_scale, np.asarray(self.row_scale[cells])
        own.refine_scaled(out, population, self.size[cells], scales, genes)
        return out

    def scales(self) -> np.ndarray:
        """Return what is kept of cells beside scores: both scales and the population, float32 of shape (cells, 3).

        The cells are scaled: `scaled` was called.
        """
        return np.stack([getattr(self, name) for name in _SCALES], axis=1)

    def scales_of_genes(self) -> np.ndarray:
        """Return what is kept of genes beside loadings: their scale, then, by population, factors and shares."""
        own, columns = self.populations, [self.gene_scale]
        if len(own.factors) > 1 or own.height:
            columns += [*own.factors, *own.shares]
        return np.stack(columns, axis=1)

    def of_populations(self, populations: Populations, population: np.ndarray | None = None) -> Self:
        """Return these profiles refined by populations; cells have no scale yet, and a population if it is given."""
        if populations.changes_nothing:
            return self
        scales = _no_scales_of_cells(len(self.size))
        if population is not None:
            scales["population"] = population
        elif len(populations.factors) > 1:
            scales["population"] += UNKNOWN
        return self._changed(populations=populations, **scales)

    def raised(self, height: float) -> Self:
        """Return these profiles with a floor of the mean profile; cells have no scale yet."""
        return self.of_populations(replace(self.populations, height=height))

    def refined(self, observed: sp.csr_matrix | Chunks, refinement: Refinement, n_rounds: int | None = None) -> Self:
        """Return these profiles, whose genes have their totals, refined by what populations say.

        `observed` are the counts, of shape (cells, genes), that they were predicted from; `n_rounds` is that of
        `balanced`.
        """
        if refinement == AS_IT_IS:
            return self
        plain = self._changed(gene_scale=self.gene_scale.copy())
        centers = _centers_of(plain, refinement.n_populations)
        n_populations, ones = len(centers), np.ones(centers.shape, np.float32)
        found = plain.of_populations(Populations(centers, ones, ones, 0.0)) if n_populations > 1 else plain
        expected = found.sums_of_populations()
        population = found.population.astype(np.intp)

        def of_block(block: Block) -> Partial:
            return Partial([sums_of(block.counts, population[block.cells], n_populations)])

        molecules = as_chunks(observed).run(of_block).sums[0]
        populations = populations_of(molecules, expected, centers, refinement.height)
        of_cells = molecules.sum(axis=1)
        if not np.allclose(molecules.sum(axis=0) / of_cells.sum(), self.gene_share, rtol=1e-5, atol=0):
            # These are some cells, which may have more of a rare gene by chance than all: the floor is that of all.
            of_all = ratio(self.gene_share, of_cells @ populations.shares / of_cells.sum())
            populations = replace(populations, shares=populations.shares * of_all)
        out = plain.of_populations(populations, found.population)
        if n_populations > 1 and refinement.height:
            again = populations.factors * nested_factors(molecules, out.sums_of_populations())
            out = out.of_populations(replace(populations, factors=again), found.population)
        return out.balanced(n_rounds)


def _centers_of(profiles: ScaledProfiles, n_populations: int) -> np.ndarray:
    """Return the mean square roots of profiles in clusters of cells, shape (clusters, genes)."""
    if n_populations == 1:
        return np.zeros((1, profiles.shape[1]), np.float32)
    cells = np.flatnonzero(profiles.size)
    some = profiles.of_cells(cells[:: max(1, len(cells) * profiles.shape[1] // _CLUSTERED)])
    points = np.concatenate(list(in_threads(lambda rows: roots(some.counts(rows)), some.rows())))
    labels = clusters_of(sketch_of(points), n_populations)
    return (sums_of(points, labels, int(labels.max()) + 1) / np.bincount(labels)[:, None]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class LowRankProfiles(ScaledProfiles):
    """Expected counts from factors: the rates are `rates(link, scores @ loadings')`.

    Attributes
    ----------
    link
        The transform on whose scale the model is linear, or `"exp"` where it is log-linear.
    scores, loadings
        float32 of shape (cells, k) and (genes, k). With `"exp"` the last column of loadings is 1: the last score of a
        cell is the level of its log rates.
    """

    source: ClassVar[str] = "scores"

    link: Link
    scores: np.ndarray
    loadings: np.ndarray

    @cached_property
    def _factors(self) -> np.ndarray:
        """The loadings, shape (k, genes), row by row, which products with a few cells at a time read fastest."""
        return np.ascontiguousarray(self.loadings.T)

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
        """Return profiles whose cells have no scale yet; genes have `gene_scale`, None for 1."""
        return cls(*_no_scales(size, gene_share, gene_scale), link, scores, loadings)

    def like(self, scores: np.ndarray, size: np.ndarray) -> LowRankProfiles:
        """Return the profiles of other cells by the same model; they have no scale, and no population, yet."""
        populations = replace(self.populations, factors=self.populations.factors.copy())
        of_cells = _no_scales_of_cells(len(size)) | {"scores": scores, "size": size}
        return replace(self, gene_scale=self.gene_scale.copy(), **of_cells).of_populations(populations)

    def checked(self, what: str) -> LowRankProfiles:
        """Return the profiles; raise if a rate is out of range, which a model from elsewhere can bring about."""
        most, step = _LARGEST_OUTPUT[self.link], max(1, _CHECKED // len(self.loadings))

        def largest(start: int) -> float:
            with np.errstate(all="ignore"):
                return float(np.abs((self.scores[start : start + step] @ self.loadings.T).max(axis=1)).max())

        for found in in_threads(largest, range(0, len(self.scores), step)):
            if not found <= most:  # nor NaN
                raise ValueError(
                    f"{what} for these cells reaches {found:.3g}, and {most:g} is the most that can become a rate: its "
                    "weights, or these counts, are out of range."
                )
        return self

    def _rates(self, cells: Index, genes: Index) -> np.ndarray:
        loadings = self._factors if _is_all(genes) else self.loadings[genes].T
        return rates(self.link, self.scores[cells] @ loadings)

    def _rates_to_scale(self, rows: Index) -> np.ndarray:
        linear = self.scores[rows] @ self._factors
        if self.link == "exp":
            # The level of a cell's log rates is arbitrary: with the largest at 0 their sum is a number.
            level = linear.max(axis=1)
            linear -= level[:, None]
            self.scores[rows, -1] -= level
        return rates(self.link, linear)


@dataclass(frozen=True, eq=False)
class TableProfiles(ScaledProfiles):
    """Expected counts from a table of them, such as a function of the user's returns; it has no factors.

    Attributes
    ----------
    values
        Rates of each cell, on a scale of its own; negative ones count as 0. A cell without any has the mean profile.
    """

    source: ClassVar[str] = "values"

    values: Rows

    @classmethod
    def of(cls, values: Rows, size: np.ndarray, gene_share: np.ndarray) -> TableProfiles:
        """Return profiles whose cells have no scale yet."""
        return cls(*_no_scales(size, gene_share), values)

    def _rates(self, cells: Index, genes: Index) -> np.ndarray:
        numbers = np.arange(len(self.size))[cells]
        out = np.maximum(self.values[numbers], 0).astype(np.float32)
        total = out.sum(axis=1, dtype=np.float64)
        out[total <= 0] = self.gene_share
        out /= np.where(total > 0, total, 1)[:, None].astype(np.float32)
        return out[:, genes]


def _no_scales(
    size: np.ndarray, gene_share: np.ndarray, gene_scale: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, Populations]:
    """Return the attributes of `ScaledProfiles` before cells are scaled."""
    gene_share, size = gene_share.astype(np.float32), size.astype(np.float32)
    gene_scale = (gene_share > 0) * np.float32(1 if gene_scale is None else gene_scale)
    cell_scale, row_scale, population = _no_scales_of_cells(len(size)).values()
    return gene_scale, cell_scale, row_scale, gene_share, size, population, Populations.one(gene_share)


def _no_scales_of_cells(n_cells: int) -> dict[str, Any]:
    """Return the attributes of cells by their names in `_SCALES`, before they are scaled."""
    return {name: np.full(n_cells, 0 if name == "population" else UNKNOWN, np.float32) for name in _SCALES}


class _Steps:
    """What scales of genes are multiplied by, round after round, so that totals become what they should be.

    A total is F + A s in the scale s of its gene, of what is at the floor and what is above it. How it answered to the
    last step tells the share that is above (the secant method), unless it came no nearer.
    """

    def __init__(self, target: np.ndarray) -> None:
        self._target, self._above = target, np.ones_like(target)
        self._before: tuple[np.ndarray, ...] | None = None

    def next(self, totals: np.ndarray) -> np.ndarray:
        """Return the next step, from the totals that the last has led to."""
        there = (totals > 0) & (self._target > 0)
        found = np.where(there, totals, 1)
        wanted = np.where(there, self._target, 1) / found
        if self._before is not None:
            last_found, last_wanted, last_step = self._before
            moved = np.abs(last_step - 1) > _TOTALS_OFF
            told = (1 - last_found / found) / np.where(moved, 1 - 1 / last_step, 1)
            nearer = np.abs(wanted - 1) <= np.abs(last_wanted - 1)
            self._above = np.clip(np.where(nearer, np.where(moved, told, self._above), 1), 1 / _LONGEST_STEP, 1)
        step = np.maximum(1 + (wanted - 1) / self._above, wanted / _LONGEST_STEP)
        self._before = found, wanted, step
        return np.where(there, step, self._target > 0).astype(np.float32)  # a gene without a total may come to one


def mean_profiles(size: np.ndarray, totals: np.ndarray) -> LowRankProfiles:
    """Return the mean profile for cells of these sizes, from the molecules of each gene, shape (genes,)."""
    share = totals / totals.sum()
    one = np.ones((len(size), 1), np.float32)
    return LowRankProfiles.unscaled("none", one, share.astype(np.float32)[:, None], size, share).scaled(n_rounds=0)


def profiles_in_blocks(
    chunks: Chunks,
    size: np.ndarray,
    some: LowRankProfiles,
    scores_of: Callable[[Block], np.ndarray],
) -> LowRankProfiles:
    """Return the profiles of all cells, every gene with its share of all molecules.

    Scores are made in one pass over the counts; of a Dask array they are not kept, but made where they are read. Genes
    start from the scale that they have in the profiles of `some` cells, go on in twenty times as many where these are
    still few, and then in all, until their totals are right to 0.3 % on average. Where `some` are all, they are
    returned. `scores_of` returns the scores of a block.
    """
    if len(some.size) == len(size) and not isinstance(chunks, OnDask):
        return some.scaled(n_rounds=0)
    (all_scores,) = chunks.rows(lambda block: Partial(rows=(scores_of(block),)), (some.scores.shape[1],))
    size = size.astype(np.float32)
    step = len(size) // (_STAGE * len(some.size))
    if step > 1:
        some = some.like(np.array(all_scores[::step]), size[::step]).balanced(off=1.5 * _TOTALS_OFF)
    if isinstance(all_scores, np.ndarray):
        return some.like(all_scores, size).balanced(off=3 * _TOTALS_OFF).scaled(n_rounds=0)
    model = some.like(some.scores[:0], some.size[:0])  # of genes alone

    def of_block(block: Block) -> LowRankProfiles:
        """Return the profiles of a block, whose cells have no scale yet."""
        return model.like(scores_of(block), row_sums(block.counts).astype(np.float32))

    def totals() -> np.ndarray:
        return chunks.run(lambda block: Partial([of_block(block).scale_cells()])).sums[0]

    model.scale_genes(totals, some.gene_share * size.sum(dtype=np.float64), 3 * _TOTALS_OFF)

    def of_cells(block: Block) -> Partial:
        found = of_block(block)
        found.scale_cells()
        return Partial(rows=(found.scores, found.scales()))

    scores, scales = chunks.rows(of_cells, (some.scores.shape[1], N_SCALES))
    lazy: dict[str, Any] = scales_from(scales) | {"scores": scores, "size": size}
    return replace(model, **lazy)


def _mean_deviation(totals: np.ndarray, target: np.ndarray) -> float:
    """Return how far totals of genes are from what they should be, as a share of it, on average."""
    there = target > 0
    return float(np.mean(np.abs(totals[there] / target[there] - 1)))


def ratio(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return wanted / found, 0 where nothing was found."""
    return np.where(found > 0, wanted / np.where(found > 0, found, 1), 0).astype(np.float32)


@dataclass(frozen=True, eq=False)
class WeightedProfiles(Profiles):
    """The mean of several denoisers' profiles, each with its weight."""

    members: tuple[Profiles, ...]
    weights: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.members[0].shape

    def of_cells(self, cells: np.ndarray) -> WeightedProfiles:
        return replace(self, members=tuple(member.of_cells(cells) for member in self.members))

    def counts(self, cells: Index = slice(None), genes: Index = slice(None)) -> np.ndarray:
        out = self.members[0].counts(cells, genes)
        out *= np.float32(self.weights[0])
        for member, weight in zip(self.members[1:], self.weights[1:], strict=True):
            part = member.counts(cells, genes)
            part *= np.float32(weight)
            out += part
        return out


def combine(profiles: Sequence[Profiles], weights: Sequence[float]) -> Profiles:
    """Return the weighted mean of profiles."""
    return profiles[0] if len(profiles) == 1 else WeightedProfiles(tuple(profiles), tuple(weights))


def parts_of(profiles: Profiles) -> list[tuple[Profiles, float]]:
    """Return what profiles are the mean of, each with its weight; themselves where they are no mean."""
    if isinstance(profiles, WeightedProfiles):
        return list(zip(profiles.members, profiles.weights, strict=True))
    return [(profiles, 1.0)]


@dataclass(frozen=True, eq=False)
class MixedProfiles(Profiles):
    """Denoised profiles with the observed counts mixed back in, see `sc_noise2self.methods._mixing`."""

    profiles: Profiles  # the denoiser's expected counts m
    observed: Chunks  # the counts x, of which the cells and genes asked are read
    dispersion: Dispersion  # phi, the squared coefficient of variation of rates around m, and what of x is evidence
    cell_scale: np.ndarray  # gives every cell its observed size again

    @property
    def shape(self) -> tuple[int, int]:
        return self.profiles.shape

    def of_cells(self, cells: np.ndarray) -> MixedProfiles:
        observed = InMemory(self.observed.part(cells))
        return MixedProfiles(self.profiles.of_cells(cells), observed, self.dispersion, self.cell_scale[cells])

    def sums_of_counts(self) -> np.ndarray:
        """Return the molecules of each cell that are mixed in, shape (cells,): one pass."""
        return self.observed.run(lambda block: Partial(rows=[row_sums(block.counts)])).rows[0]

    def scales_to(self, size: np.ndarray) -> np.ndarray:
        """Return what every cell is multiplied by to hold so many molecules, shape (cells,)."""
        scale = np.zeros(len(size), np.float32)
        for rows, mixed in self.blocks():
            scale[rows] = ratio(size[rows], mixed.sum(axis=1))
        return scale

    def counts(self, cells: Index = slice(None), genes: Index = slice(None)) -> np.ndarray:
        """Return m (1 + phi x) / (1 + phi m), dense float32 of shape (cells asked, genes asked)."""
        out = self.profiles.counts(cells, genes)
        phi = self.dispersion.mixing(out, genes)
        out /= 1 + phi * out
        entry = self.observed.part(cells, genes).tocoo()
        out[entry.row, entry.col] *= 1 + phi[entry.row, entry.col] * entry.data
        out *= self.cell_scale[cells][:, None]
        return out


def split_scales_of_genes(
    scales: np.ndarray, gene_share: np.ndarray, n: int, height: float
) -> tuple[np.ndarray, Populations, np.ndarray]:
    """Return the scale of genes and the populations that `scales_of_genes` wrote first, and the columns that follow."""
    n, gene_scale, rest = int(n), scales[:, 0], scales[:, 1:]
    if n == 1 and not height:
        return gene_scale, Populations.one(gene_share), rest
    factors, shares = (np.ascontiguousarray(each.T) for each in (rest[:, :n], rest[:, n : 2 * n]))
    return gene_scale, Populations(np.zeros((n, 0), np.float32), factors, shares, float(height)), rest[:, 2 * n :]


def scales_from(scales: Any) -> dict[str, Any]:
    """Return the attributes that `ScaledProfiles.scales` was made of."""
    return {name: scales[:, i] for i, name in enumerate(_SCALES)}


def computed(profiles: Profiles) -> Profiles:
    """Return profiles whose scores and scales of cells are NumPy arrays, where they were Dask's."""
    if not isinstance(profiles, LowRankProfiles) or isinstance(profiles.scores, np.ndarray):
        return profiles
    import dask

    scores, scales = dask.compute(profiles.scores, profiles.scales())
    return replace(profiles, scores=scores, **scales_from(scales))
