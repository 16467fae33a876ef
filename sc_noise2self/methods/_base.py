"""What a denoising method is: its options (`Method`), and how the engine sees it at work (`Learner`).

A method is a frozen dataclass of options. A field that may hold several values and does is chosen by the gain on
molecules that the method has not seen. Whoever writes one gives it a name and `denoise_counts`; that is enough to be
fitted, compared, averaged with others, calibrated, reported and drawn. Methods that can do better than be called on
halves of the counts bring a `Learner` of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp

from .._blocks import Block, Chunks, Counts, InMemory, Partial
from .._checks import as_whole
from .._compare import Comparison
from .._counts import column_sums, row_sums
from .._model import State
from .._random import random_sample
from .._split import halves
from ..partitions import Fold, fold_of
from ._populations import AS_IT_IS
from ._profiles import LowRankProfiles, Profiles, ScaledProfiles, mean_profiles

_ENOUGH_CELLS = 20_000  # to choose the options of a method by
_ASIDE = 0.1  # share of the molecules that validate a choice made before halves are looked at


class Method(ABC):
    """A denoiser and its options: a frozen, keyword-only dataclass.

    Attributes
    ----------
    name
        Name in results, and in the registry of methods.
    title
        The same in words, for titles of plots and for the report.
    needs_memory
        Whether it needs all counts in memory; else it reads them a block of cells at a time.
    can_transfer
        Whether what it learned denoises other cells: see `sc_noise2self.denoise_with`.
    has_factors
        Whether its profiles are factors, from which any genes and cells are rebuilt without a layer.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    needs_memory: ClassVar[bool] = True
    can_transfer: ClassVar[bool] = False
    has_factors: ClassVar[bool] = True

    @property
    def columns(self) -> tuple[str, ...]:
        """Categorical columns of `obs` that the method wants to know of the cells."""
        return ()

    @property
    def is_average(self) -> bool:
        """Whether its learners are averaged, as the seeds of a network, rather than the best of them taken."""
        return False

    def checked(self, counts: Counts) -> Self:
        """Return the method with what is open settled for these counts.

        Raises
        ------
        ValueError
            If an option is more than the counts allow.
        """
        return self

    def learners(self, counts: Counts) -> Sequence[Learner]:
        """Return what is compared, or averaged, under the name of the method."""
        return [TrialLearner(self, counts)]

    def denoise_counts(self, counts: Counts, rng: np.random.Generator) -> Profiles:
        """Return expected counts of cells from their counts, every option with one value.

        Parameters
        ----------
        counts
            `counts.in_memory()` is CSR float32 of shape (cells, genes).
        rng
            Source of whatever is random.
        """
        raise NotImplementedError(f"{type(self).__name__} is fitted by its learners.")

    def described(self, setting: Any) -> str:
        """Return the method as it is set, in words, for the report."""
        return f"{self.title}{f' ({setting})' if str(setting) else ''}"


@dataclass(frozen=True, eq=False)
class Learned:
    """What is worth writing down of a learner as it is set.

    Of `values`, `table` is what was compared inside the method.
    """

    title: str  # in words, for a plot
    described: str  # for the report
    rank: int = 0  # number of components, or width of a bottleneck
    values: Mapping[str, Any] = field(default_factory=dict)


class Learner(ABC):
    """A method at work: learned from one half of the molecules, predicting the other, refitted to all.

    It has the name that tables and results give it. `cells` says which of all cells those of some counts are.
    """

    models: Sequence[Any]  # what `refit` fitted, where the method can transfer: one of each part of a mean
    enough_cells: int | None = None  # to choose by; None where more always tell more
    predicts_others: bool = True  # whether what was learned from some cells predicts others
    learns_alone: bool = True  # else it learns in a thread beside others
    counts_for: float = 1.0  # what `refit` gave, in fits like those that were compared

    def __init__(self, name: str) -> None:
        self.kind = self.name = name  # the name is numbered where several are of one kind
        self._fits: list[Any] = []  # what each half gave
        self.refinement = AS_IT_IS  # of the profiles that `refit` returns; chosen by the loss

    @property
    @abstractmethod
    def settings(self) -> Sequence[Any]:
        """The ways to set it, each a word or two as a string; learners are compared at the first, then tuned."""

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:  # noqa: B027
        """Settle what is chosen by molecules that the learner sets aside itself, if anything is."""

    @abstractmethod
    def learn(self, half: Fold, rng: np.random.Generator) -> None:
        """Learn from `half.seen`, and, per fold of cells, what `half.held_out` says of the settings."""

    def learn_all(self, counts: Counts, keys: Sequence[int]) -> None:  # noqa: B027
        """Learn the halves of the splits with these keys again from all cells, where `learn` saw some of them."""

    def forget(self) -> None:
        """Let go of what was learned from halves, where the learner was not chosen."""
        self._fits.clear()

    def settle(self, setting: Any, sample: Sample) -> None:  # noqa: B027
        """Learn what predictions in this setting share among all cells that will be measured, where they share any."""

    @abstractmethod
    def predict(self, half: int, setting: Any, seen: sp.csr_matrix, cells: np.ndarray) -> Profiles:
        """Return profiles of cells from their part of what was seen in that half; no fold is used on its own cells."""

    @abstractmethod
    def refit(self, counts: Counts, setting: Any, rng: np.random.Generator) -> Profiles:
        """Return profiles of all cells, fitted to all molecules; they may be a mean of several."""

    @abstractmethod
    def learned(self, setting: Any) -> Learned:
        """Return what is worth writing down."""

    def states(self) -> list[State]:
        """Return what was refitted, for a model file, where the method can transfer: one of each part of a mean."""
        return [model.state() for model in self.models]


@dataclass(frozen=True, eq=False)
class Sample:
    """The cells that a choice is measured on: their halves are made anew, a block at a time, and never held."""

    chunks: Chunks  # of these cells
    keys: Sequence[int]  # of the splits
    cells: np.ndarray  # their numbers among all cells, rising

    @classmethod
    def of(cls, chunks: Chunks, keys: Sequence[int], cells: np.ndarray) -> Self:
        """Return the sample of these of all cells."""
        return cls(chunks.of_cells(cells), keys, cells)

    def run(self, work: Callable[[np.ndarray, list[sp.csr_matrix]], Partial]) -> Partial:
        """Return the sums over cells and their rows: one pass.

        `work` takes numbers of cells and both halves of each split; the other half of number i is number i ^ 1.
        """

        def of_block(block: Block) -> Partial:
            own = self.cells[block.cells]
            return work(own, [half for key in self.keys for half in halves(block.counts, key, own)])

        return self.chunks.run(of_block)

    def some(self, n_entries: int) -> list[tuple[sp.csr_matrix, np.ndarray]]:
        """Return the halves of so many dense entries of the cells, evenly drawn, and the numbers of these cells."""
        step = max(1, len(self.cells) * self.chunks.shape[1] // n_entries)
        cells = self.cells[::step]
        counts = self.chunks.take(np.arange(0, len(self.cells), step))
        return [(half, cells) for key in self.keys for half in halves(counts, key, cells)]

    @cached_property
    def totals(self) -> list[np.ndarray]:
        """The molecules of each gene in each half: one pass."""
        return list(self.run(lambda _, parts: Partial([column_sums(part) for part in parts])).sums)


@dataclass(frozen=True, eq=False)
class MeanModel:
    """The mean profile of the cells that a model was fitted to; `gene_share` has shape (genes,), summing to 1."""

    gene_share: np.ndarray
    name: ClassVar[str] = "mean"

    def predict(self, counts: sp.csr_matrix, codes: np.ndarray | None = None) -> LowRankProfiles:
        """Return the profiles of cells, CSR of shape (cells, genes)."""
        return mean_profiles(row_sums(counts), self.gene_share)

    def learned(self) -> Learned:
        """Return what is worth writing down."""
        return Learned("the mean profile", "the mean profile")

    def state(self) -> State:
        """Return what a model file keeps of it."""
        return State(self.name, {}, {"gene_share": self.gene_share})

    @classmethod
    def from_state(cls, state: State, device: str) -> Self:
        """Return the model that a state was made of."""
        return cls(state.arrays["gene_share"])


class MeanLearner(Learner):
    """Every cell has the mean profile: what any denoiser must beat."""

    settings = ("as it is",)
    enough_cells = 1

    def __init__(self) -> None:
        super().__init__("mean")

    def learn(self, half: Fold, rng: np.random.Generator) -> None:
        self._fits.append(column_sums(half.seen))

    def settle(self, setting: Any, sample: Sample) -> None:
        self._fits = sample.totals

    def predict(self, half: int, setting: Any, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        return mean_profiles(row_sums(seen), self._fits[half])

    def refit(self, counts: Counts, setting: Any, rng: np.random.Generator) -> LowRankProfiles:
        self.models = [MeanModel(counts.totals / counts.totals.sum())]
        return mean_profiles(counts.size, counts.totals)

    def learned(self, setting: Any) -> Learned:
        return self.models[0].learned()


class TrialLearner(Learner):
    """Any method: called on each half, and on all molecules.

    Options with several values are chosen with nine tenths of the molecules seen and the rest held out: a choice made
    on halves would be that for halves, which need larger averages.
    """

    enough_cells: int | None = _ENOUGH_CELLS
    predicts_others = False

    def __init__(self, method: Method, counts: Counts) -> None:
        super().__init__(method.name)
        self.method = method
        self._counts = counts
        self._comparison = Comparison()
        self._cells = np.zeros(0, np.intp)  # those of the halves

    @property
    def settings(self) -> Sequence[Any]:
        """The one that was chosen, e.g. ``"t=2, n_pcs=30"``; nothing where none was to be chosen."""
        names = self._comparison.parameters(0) if len(self._comparison) else ()
        return (", ".join(f"{name}={getattr(self.method, name)}" for name in names),)

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:
        if not grid_of(self.method):
            return
        if counts.shape[0] > _ENOUGH_CELLS:
            some = random_sample(counts.shape[0], _ENOUGH_CELLS, rng)
            counts, cells = counts[some], cells[some]
        self.compare(nine_tenths(counts, rng, cells), rng)
        chosen = self._comparison.parameters(self._comparison.best())
        self.method = replace(self.method, **chosen)  # type: ignore[type-var]  # methods are dataclasses

    def compare(self, fold: Fold, rng: np.random.Generator) -> None:
        """Score every combination of the options that have several values, the last option running fastest."""
        grid = grid_of(self.method)
        for values in product(*grid.values()):
            options = dict(zip(grid, values, strict=True))
            method = replace(self.method, **options)  # type: ignore[type-var]
            profiles = _denoised(method, self._counts.part(fold.seen, fold.cells), rng)
            self._comparison.add(options, -fold.gain(profiles))

    def learn(self, half: Fold, rng: np.random.Generator) -> None:
        self._fits.append(_denoised(self.method, self._counts.part(half.seen, half.cells), rng))
        self._cells = half.cells

    def predict(self, half: int, setting: Any, seen: sp.csr_matrix, cells: np.ndarray) -> Profiles:
        """Return the profiles of some of the cells that the half was learned from."""
        return self._fits[half].of_cells(np.searchsorted(self._cells, cells))

    def refit(self, counts: Counts, setting: Any, rng: np.random.Generator) -> Profiles:
        profiles = _denoised(self.method, counts, rng)
        if not isinstance(profiles, ScaledProfiles) or self.refinement == AS_IT_IS:
            return profiles
        return profiles.refined(counts.chunks, self.refinement).scaled(n_rounds=0)

    def learned(self, setting: Any) -> Learned:
        values = {}
        if len(self._comparison):
            values["table"] = self._comparison.table(gain=True).drop(columns=["seconds", "failure"])
        rank = int(getattr(self.method, "n_pcs", 0) or 0)
        return Learned(self.method.title, self.method.described(setting), rank, values)


def _denoised(method: Method, counts: Counts, rng: np.random.Generator) -> Profiles:
    """Return what a method makes of counts; one from elsewhere, which may write into them, gets its own in memory."""
    if isinstance(counts.chunks, InMemory) and not type(method).__module__.startswith(__package__):
        counts = counts.part(counts.in_memory().copy(), np.arange(len(counts.size)))
    return method.denoise_counts(counts, rng)


def nine_tenths(counts: sp.csr_matrix, rng: np.random.Generator, cells: np.ndarray) -> Fold:
    """Return nine tenths of the molecules to learn from, and one to validate a choice by."""
    seen, aside = set_aside(counts, np.arange(counts.shape[0]), rng)
    seen = seen.copy()
    seen.eliminate_zeros()
    return fold_of(seen, aside, cells)


def set_aside(
    counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Return the counts less a tenth of the molecules of these cells, and that tenth, CSR of shape (cells, genes).

    Cells that would lose all their molecules keep them all. The first shares its indices with `counts`, so zeros may
    be stored.
    """
    own = counts[cells]
    positions = np.arange(own.nnz) + np.repeat(counts.indptr[:-1][cells] - own.indptr[:-1], np.diff(own.indptr))
    size = row_sums(own)
    own.data = rng.binomial(own.data.astype(np.int64), _ASIDE).astype(np.float32)
    own.data *= np.repeat(row_sums(own) < size, np.diff(own.indptr))
    data = counts.data.copy()
    data[positions] -= own.data
    own.eliminate_zeros()
    return sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape, copy=False), own


def grid_of(method: Method) -> dict[str, tuple[Any, ...]]:
    """Return the options of a method that have several values, and these values."""
    values = {each.name: getattr(method, each.name) for each in fields(method)}  # type: ignore[arg-type]
    return {name: tuple(value) for name, value in values.items() if is_several(value)}


def is_several(value: Any) -> bool:
    """Whether an option has several values to choose from."""
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes) and np.ndim(value) > 0


def as_several(value: Any) -> tuple[Any, ...]:
    """Return the values of an option, of which there may be one."""
    return tuple(value) if is_several(value) else (value,)


def set_tuples(method: Method, *names: str) -> None:
    """Make tuples of the values of these options, where there are several, so that methods can be compared."""
    for name in names:
        if is_several(value := getattr(method, name)):
            object.__setattr__(method, name, tuple(value))  # the method is being made, and frozen


def bounded_values(name: str, value: Any, usual: Any, bound: int, why: str, least: int = 1) -> Any:
    """Return an option of one or several whole numbers, the usual ones cut to what is allowed.

    Parameters
    ----------
    name, value
        Name of the option and what it holds.
    usual
        Its default.
    bound, why
        The most that is allowed, and by what, e.g. `"60 cells"`.
    least
        The least that is allowed, unless even the most is below it.

    Raises
    ------
    ValueError
        If one that was given is beyond the bound or below the least.
    """
    if not (values := as_several(value)):
        raise ValueError(f"{name} is empty: pass a whole number, or several.")
    values = tuple(as_whole(name, each, min(least, bound)) for each in values)
    if values == as_several(usual):
        values = tuple(sorted({min(each, bound) for each in values}))
    elif max(values) > bound:
        raise ValueError(f"{name} is {max(values)}: {bound} is the most that {why} allow.")
    return values if is_several(value) else values[0]
