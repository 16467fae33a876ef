"""Partitions J: what is hidden from a denoiser and then predicted (Noise2Self, Batson & Royer 2019, sections 2 and 6).

A loss on hidden data ranks denoisers as the truth would if, given the truth, the noise in what is hidden is
independent of the noise in what is seen (Proposition 1). Each partition says which independence it assumes:

* `Molecules`: molecules of one cell were caught independently. It fails for copies of one molecule (UMI errors, PCR).
* `Genes`: given the cell's true expression, the noise of a set of genes is independent of the other genes' noise. It
  fails where genes share their noise, as in a pathway that bursts together: then hide pathways whole. What only one
  gene knows cannot be predicted from the others, so it judges the shared part of expression alone.
* `Blocks`: the same, and a denoiser never sees these genes in these cells, but in others.
* `Masks`: the noise of the entries of each mask is independent of all others', as that of pixels.

Any object with a method `folds(data, rng)` that returns a list of `Fold` is a partition too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ._checks import as_whole
from ._counts import column_sums, row_sums
from ._loss import LOSSES, Gain, Loss, Profiles, Score, held_out_gain, held_out_probabilities
from ._random import random_groups
from ._split import split_matrix

_BLOCK = 1 << 20  # dense entries at a time
_CHECKED_CELLS = 500  # on which a denoiser must predict what it has seen
_ROUNDING = 1e-3  # nats, which the mean profile itself may be from the mean profile of some cells
_FOLDS = "return a list of sc_noise2self.partitions.Fold"


@dataclass(frozen=True, eq=False)
class LazyRows:
    """Rows that a function of their numbers computes when they are asked for."""

    rows: Callable[[np.ndarray], np.ndarray]

    def __getitem__(self, cells: np.ndarray) -> np.ndarray:
        return self.rows(cells)


Rows = np.ndarray | LazyRows


@dataclass(frozen=True, eq=False)
class Fold:
    """Counts of which some are hidden.

    Attributes
    ----------
    seen
        What the denoiser is given, CSR of shape (cells, genes).
    held_out
        The counts that it must predict, CSR of the same shape.
    size
        Molecules that the prediction is scaled to, shape (cells,): those held out, or, where genes are hidden,
        those of the genes that are not.
    share
        The mean profile of what was seen, shape (genes,), summing to 1.
    groups, hidden
        Group of each cell, shape (cells,), and which genes are hidden in each group, boolean of shape (groups, genes).
        None where molecules of all genes are held out.
    cells
        Number of each cell among all cells, shape (cells,); None where these are all.
    """

    seen: sp.csr_matrix
    held_out: sp.csr_matrix
    size: np.ndarray
    share: np.ndarray
    groups: np.ndarray | None = None
    hidden: np.ndarray | None = None
    cells: np.ndarray = None  # type: ignore[assignment]  # set below where it is not given

    def __post_init__(self) -> None:
        n_cells, n_genes = shape = self.seen.shape
        if self.cells is None:
            object.__setattr__(self, "cells", np.arange(n_cells))
        wanted = {"held_out": shape, "size": (n_cells,), "share": (n_genes,), "cells": (n_cells,)}
        for name, needed in wanted.items():
            found = getattr(self, name).shape
            if found != needed:
                raise ValueError(f"{name} of a Fold has shape {found}: seen has {shape}, so it needs {needed}.")

    def of_cells(self, rows: np.ndarray) -> Fold:
        """Return the fold of some of its cells, by position; the mean profile stays that of all."""
        groups = None if self.groups is None else self.groups[rows]
        parts = (self.seen[rows], self.held_out[rows], self.size[rows])
        return Fold(*parts, self.share, groups, self.hidden, self.cells[rows])

    def probabilities(self, profiles: Profiles) -> np.ndarray:
        """Return the probability that a prediction gave to each stored entry of `held_out`, shape (nnz,)."""
        return held_out_probabilities(profiles, self.held_out)

    def gain_of(self, probabilities: np.ndarray) -> Gain:
        """Return the held-out gain of a prediction from its probabilities.

        A cell of which nothing was seen is predicted by the mean profile, whoever predicts.
        """
        if (unseen := row_sums(self.seen) == 0).any():
            own = np.repeat(unseen, np.diff(self.held_out.indptr))
            probabilities = np.where(own, self.share[self.held_out.indices], probabilities)
        return held_out_gain(probabilities, self.held_out, self.share)

    def gain(self, profiles: Profiles) -> Gain:
        """Return the held-out gain of a prediction; molecules of all genes are held out."""
        return self.gain_of(self.probabilities(profiles))

    def score(self, predicted: Rows, loss: Loss) -> Score:
        """Return the loss of a prediction, by cell.

        Parameters
        ----------
        predicted
            Denoised counts, each cell's on a scale of its own: `predicted[cells]` is dense of shape (cells, genes).
        loss
            `"poisson"`: nats per held-out molecule below the mean profile, sum of -x log(m / m0) + m - m0 with m the
            expected count and m0 that of the mean profile; where molecules are split, minus the held-out gain.
            `"mse"`, `"mse_sqrt"`, `"mse_log1p"`: (T(x) - E[T(Poisson(m))])^2 per entry. Or a function of (m, x), both
            dense of shape (cells, genes hidden), that returns the loss of each cell.
        """
        sums, weights = np.zeros((2, len(self.size)))
        for cells, genes in self._blocks():
            expected = np.maximum(predicted[cells], 0).astype(np.float64)
            basis = expected if genes is None else expected[:, ~genes]
            total, share = basis.sum(axis=1), self.share
            if genes is not None:
                expected, share = expected[:, genes], share[genes] / max(share[~genes].sum(), 1e-12)
            mean = np.multiply.outer(self.size[cells], share)
            known = total > 0
            expected = np.where(known[:, None], expected, mean)
            with np.errstate(over="ignore", invalid="ignore"):  # a loss that is no number is a failure of its own
                expected *= np.where(known, self.size[cells] / np.where(known, total, 1), 1)[:, None]
            held_out = self.held_out[cells] if genes is None else self.held_out[cells][:, genes]
            if callable(loss):
                lost: Any = _of_each(loss(expected, held_out.toarray()), len(cells), "cell"), 1
            else:
                lost = LOSSES[loss](expected, held_out, mean)
            sums[cells] += lost[0]
            weights[cells] += lost[1]
        return Score(sums, weights)

    def is_blind(self, predicted: Rows) -> bool:
        """Whether a prediction is worse than the mean profile on the very molecules that it was made from."""
        cells = np.arange(0, len(self.size), max(1, len(self.size) // _CHECKED_CELLS))
        seen = self.seen[cells]
        some = LazyRows(lambda rows: predicted[cells[rows]])
        score = fold_of(seen, seen, share=self.share).score(some, "poisson")
        return bool(score.weights.any()) and score.mean > 2 * score.error + _ROUNDING

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield cells with the genes that are hidden in them; None for all."""
        step = max(1, _BLOCK // self.seen.shape[1])
        parts: list[tuple[np.ndarray, np.ndarray | None]] = [(np.arange(len(self.size)), None)]
        if self.groups is not None and self.hidden is not None:
            parts = [(np.flatnonzero(self.groups == i), genes) for i, genes in enumerate(self.hidden) if genes.any()]
        for cells, genes in parts:
            for start in range(0, len(cells), step):
                yield cells[start : start + step], genes


def fold_of(
    seen: sp.csr_matrix, held_out: sp.csr_matrix, cells: np.ndarray | None = None, share: np.ndarray | None = None
) -> Fold:
    """Return the fold in which molecules of any gene are held out; `share` is None for the mean of what is seen."""
    share = _profile(column_sums(seen)) if share is None else share
    return Fold(seen, held_out, row_sums(held_out), share, cells=cells)  # type: ignore[arg-type]


class Partition(Protocol):
    """What `sc_noise2self.calibrate` takes as a partition."""

    def folds(self, data: Any, rng: np.random.Generator) -> Sequence[Any]:
        """Return the ways to hide a part of the data, one after another."""


@dataclass(frozen=True)
class Molecules:
    """Every cell's molecules dealt at random to what is seen and what is held out.

    It assumes that molecules were caught independently of each other given the cell's expression; copies of one
    molecule (UMI errors, PCR) break it, and look like expression that a less smoothed result predicts better.

    Parameters
    ----------
    n_folds
        Equal parts; each is held out once and predicted from the others. 2: halves, in both directions.
    fraction
        Instead: the share that is seen, in one direction.
    """

    n_folds: int = 2
    fraction: float | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and self.n_folds != 2:
            raise ValueError("n_folds and fraction were both given: folds are equal parts, so pass one.")
        as_whole("n_folds", self.n_folds, least=2)

    def folds(self, data: sp.csr_matrix, rng: np.random.Generator) -> list[Fold]:
        """Return the folds of counts, CSR of shape (cells, genes)."""
        if self.fraction is not None:
            seen, held_out = split_matrix(data, self.fraction, random_state=rng)
            return [fold_of(seen, held_out)]
        parts = split_matrix(data, folds=self.n_folds, random_state=rng)
        if self.n_folds == 2:
            return [fold_of(*parts), fold_of(*parts[::-1])]
        return [fold_of((data - part).tocsr(), part) for part in parts]


@dataclass(frozen=True)
class Genes:
    """Sets of genes hidden whole in a cell and predicted from the cell's other genes.

    It assumes that, given the cell's true expression, the noise in a set is independent of that in the other genes.
    Genes that are noisy together belong in one set: name pathways. In every fold each set is hidden in other cells,
    so a denoiser can learn a gene from the cells that show it.

    Parameters
    ----------
    sets
        Number of random sets, or positions of genes (boolean or whole numbers) by name: pathways. Genes in no
        pathway are always seen and never scored; pathways may share genes.
    n_folds
        Groups of cells, and ways to hide, as many as there are sets or more. None takes as many, but at least 10. Each
        call of the denoiser hides one set in each group, and each cell has one set hidden at a time.
    """

    sets: int | Mapping[str, Sequence[int] | np.ndarray] = 10
    n_folds: int | None = None

    def __post_init__(self) -> None:
        n_sets = len(self.sets) if isinstance(self.sets, Mapping) else as_whole("sets", self.sets, least=2)
        if self.n_folds is not None and as_whole("n_folds", self.n_folds, least=2) < n_sets:
            raise ValueError(f"n_folds is {self.n_folds} for {n_sets} sets: pass {n_sets} or more, or leave it out.")

    def folds(self, data: sp.csr_matrix, rng: np.random.Generator) -> list[Fold]:
        """Return the folds of counts, CSR of shape (cells, genes)."""
        n_cells, n_genes = data.shape
        if isinstance(self.sets, Mapping):
            sets = np.array([_chosen(genes, n_genes) for genes in self.sets.values()]).reshape(-1, n_genes)
        else:
            sets = _groups_of("genes", n_genes, self.sets, rng) == np.arange(self.sets)[:, None]
        n_groups = max(10, len(sets)) if self.n_folds is None else self.n_folds
        groups = _groups_of("cells", n_cells, n_groups, rng)
        turns = np.vstack([sets, np.zeros((n_groups - len(sets), n_genes), bool)])
        turned = [np.roll(turns, shift, axis=0) for shift in range(n_groups)]
        return [_hide(data, groups, *each) for each in zip(turned, _one_each(n_groups, rng), strict=True)]


@dataclass(frozen=True)
class Blocks:
    """Blocks of cells x genes, one hidden at a time (bi-cross-validation, Owen & Perry 2009).

    It assumes what `Genes` does, and suits regressions, such as that on principal components, for which
    `select_rank(adata, protocol="bcv")` is the published form. It fails for averages over neighbours: the cells in
    which the same genes are hidden are nearest to each other, so they are averaged with what took their genes' place.

    Parameters
    ----------
    cells, genes
        Groups of each; their product is the number of folds.
    """

    cells: int = 5
    genes: int = 5

    def __post_init__(self) -> None:
        as_whole("cells", self.cells, least=2)
        as_whole("genes", self.genes, least=2)

    def folds(self, data: sp.csr_matrix, rng: np.random.Generator) -> list[Fold]:
        """Return the folds of counts, CSR of shape (cells, genes)."""
        groups = _groups_of("cells", data.shape[0], self.cells, rng)
        sets = _groups_of("genes", data.shape[1], self.genes, rng)
        own = np.arange(self.cells)[:, None]
        blocks = [(own == group) & (sets == genes) for group in range(self.cells) for genes in range(self.genes)]
        return [_hide(data, groups, *each) for each in zip(blocks, _one_each(len(blocks), rng), strict=True)]


PARTITIONS: dict[str, Callable[[], Partition]] = {"molecules": Molecules, "genes": Genes, "blocks": Blocks}


@dataclass(frozen=True, eq=False)
class Masks:
    """Entries of any array, such as the pixels of an image, hidden mask by mask (Noise2Self, equation 3).

    It assumes that the noise of the entries in a mask is independent of that outside, given the truth. Noise that
    neighbouring pixels share breaks it, unless they lie in one mask.

    Parameters
    ----------
    masks
        Boolean arrays of the data's shape.
    fill
        Returns an array of the same shape whose masked entries take the place of the hidden ones, s(x) in the paper;
        what it returns at a masked entry must not depend on the masked entries. It is given the data.
    """

    masks: Sequence[np.ndarray]
    fill: Callable[[np.ndarray], np.ndarray]

    def folds(self, data: np.ndarray, rng: np.random.Generator) -> list[_MaskedFold]:
        """Return the folds of an array."""
        data = as_numbers(data, "the data hold")
        if not np.isfinite(data).all():
            raise ValueError("the data hold NaN or infinite values: fill them first.")
        masks = [np.asarray(mask) for mask in self.masks]
        for mask in masks:
            if mask.dtype != bool or mask.shape != data.shape:
                raise ValueError(
                    f"a mask holds {mask.dtype} of shape {mask.shape}: the data need booleans of shape {data.shape}."
                )
        filled = as_numbers(self.fill(data.copy()), "fill returned")
        if filled.shape != data.shape:
            raise ValueError(f"fill returned shape {filled.shape} for data of shape {data.shape}.")
        return [_MaskedFold(np.where(mask, filled, data), data, mask) for mask in masks]

    def invariant(self, denoiser: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        """Return the J-invariant version of a denoiser: every entry as it is predicted without it.

        f(x)_J = g(1_J s(x) + 1_{J^c} x)_J (Noise2Self, equation 3). Entries in no mask are those of g(x).
        """

        def f(x: np.ndarray, **parameters: Any) -> np.ndarray:
            folds = self.folds(np.asarray(x), np.random.default_rng(0))
            everywhere = np.logical_or.reduce([fold.mask for fold in folds])
            out = np.zeros(np.shape(x)) if everywhere.all() else np.array(denoiser(x, **parameters), dtype=float)
            for fold in folds:
                out[fold.mask] = np.asarray(denoiser(fold.seen, **parameters))[fold.mask]
            return out

        return f


@dataclass(frozen=True, eq=False)
class _MaskedFold:
    """An array of which the entries in a mask are hidden."""

    seen: np.ndarray
    data: np.ndarray
    mask: np.ndarray

    def score(self, predicted: np.ndarray, loss: Loss) -> Score:
        """Return the squared error, or what a function of (predicted, data) says, by entry."""
        p, x = np.asarray(predicted, dtype=np.float64)[self.mask], self.data[self.mask]
        sums = np.zeros(self.data.size)
        sums[self.mask.ravel()] = _of_each(loss(p, x), len(p), "value") if callable(loss) else (p - x) ** 2
        return Score(sums, self.mask.ravel().astype(np.float64))

    def is_blind(self, predicted: np.ndarray) -> bool:
        """Arrays have no mean profile to compare with."""
        return False


def _chosen(genes: Sequence[int] | np.ndarray, n_genes: int) -> np.ndarray:
    """Return which genes a set holds, boolean of shape (genes,)."""
    index = np.asarray(genes)
    if index.dtype.kind not in "biu":
        raise ValueError(f"Genes was given {index.dtype} in a set: pass positions, or name genes in partition={{...}}.")
    if index.dtype == bool and index.shape != (n_genes,):
        raise ValueError(f"Genes was given booleans of shape {index.shape} for {n_genes} genes: pass one for each.")
    if index.dtype != bool and ((index < 0) | (index >= n_genes)).any():
        raise ValueError(
            f"Genes was given positions {index.min()} to {index.max()}: there are {n_genes} genes, from 0."
        )
    out = np.zeros(n_genes, bool)
    out[index] = True
    return out


def _profile(totals: np.ndarray) -> np.ndarray:
    """Return the share of each gene in what is seen."""
    if not totals.any():
        raise ValueError("a fold hides every molecule: the data have too few to hide some and show others.")
    return totals / totals.sum()


def _hide(counts: sp.csr_matrix, groups: np.ndarray, hidden: np.ndarray, rng: np.random.Generator) -> Fold:
    """Return a fold in which each group of cells hides its genes.

    A hidden count is replaced by a Poisson draw from the mean profile at the depth of the cell's other genes, so that
    what is seen are whole counts, as sparse as before, of cells that are complete.
    """
    if hidden.all(axis=1).any():
        raise ValueError("a set holds every gene: nothing is left to predict it from, so hide fewer together.")
    cells = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    is_hidden = hidden[groups[cells], counts.indices]
    visible, held_out = counts.copy(), counts.copy()
    for part, keep in ((visible, ~is_hidden), (held_out, is_hidden)):
        part.data *= keep
        part.eliminate_zeros()
    size, totals = row_sums(visible), column_sums(visible)
    share = _profile(totals)
    per_group = np.bincount(groups, weights=size, minlength=len(hidden))
    for _ in range(5):  # a gene's share among the molecules of the cells that show it
        depth = per_group / np.maximum(1 - hidden @ share, 1e-12)
        shown = depth @ ~hidden
        share = np.where(shown > 0, totals / np.where(shown > 0, shown, 1), 0)
        share /= share.sum()
    fill = []
    for group, genes in enumerate(hidden):
        weight = share[genes].sum()
        own = np.flatnonzero(groups == group)
        if weight == 0 or not len(own):
            continue
        drawn = rng.poisson(size[own] * weight / max(share[~genes].sum(), 1e-12))
        which = rng.choice(np.flatnonzero(genes), drawn.sum(), p=share[genes] / weight)
        ones = np.ones(len(which), counts.dtype)
        fill.append(sp.csr_matrix((ones, (np.repeat(own, drawn), which)), shape=counts.shape))
    return Fold(sum(fill, visible).tocsr(), held_out, size, share, groups, hidden)


def _of_each(losses: Any, n: int, what: str) -> np.ndarray:
    losses = as_numbers(losses, "the loss returned").astype(np.float64)
    if losses.shape != (n,):
        raise ValueError(f"the loss returned shape {losses.shape}: return one number for each {what}, shape ({n},).")
    return losses


def as_numbers(values: Any, whose: str) -> np.ndarray:
    """Return values as a plain array, whatever kind of array they came in; raise if some are no real numbers."""
    if np.ma.is_masked(values):
        raise ValueError(f"{whose} masked values: what is masked is no number, so fill it first, e.g. by .filled(0).")
    out = np.asarray(values)
    if out.dtype.kind not in "buif":
        raise TypeError(f"{whose} values of type {out.dtype}: real numbers are needed.")
    return out


def as_partition(partition: Any, gene_names: Sequence[str] | None) -> Partition:
    """Return the partition that a name, a mapping of pathways or an object stands for; raise if it is none."""
    if isinstance(partition, str):
        if partition not in PARTITIONS:
            raise ValueError(
                f"partition is {partition!r}: pass one of {', '.join(PARTITIONS)}, or an object of `partitions`."
            )
        return PARTITIONS[partition]()
    if isinstance(partition, Mapping):
        return Genes(_pathways(partition, gene_names))
    if isinstance(partition, type) or not callable(getattr(partition, "folds", None)):
        raise TypeError(
            f"partition is {partition!r}: pass 'molecules', 'genes', 'blocks', a dict of gene lists, or an object with "
            "a method `folds`, such as those of sc_noise2self.partitions."
        )
    return partition


def folds_of(partition: Partition, data: Any, rng: np.random.Generator) -> list[Any]:
    """Return the folds of a partition, which may be somebody else's; raise if they are none."""
    name = type(partition).__name__
    folds = partition.folds(data.copy(), rng)
    if not isinstance(folds, Iterable):
        raise TypeError(f"folds of {name} returned {type(folds).__name__}: {_FOLDS}.")
    folds = list(folds)
    for fold in folds:
        if missing := [part for part in ("seen", "score", "is_blind") if not hasattr(fold, part)]:
            raise TypeError(f"folds of {name} holds a {type(fold).__name__} without {', '.join(missing)}: {_FOLDS}.")
    if not folds:
        raise ValueError(f"the partition hides nothing: folds of {name} returned no fold.")
    return folds


def check_loss(loss: Loss | None, partition: Partition) -> Loss:
    """Return the loss, or the partition's usual one for None; raise if there is no such loss for it."""
    names = ("mse",) if isinstance(partition, Masks) else tuple(LOSSES)
    loss = names[0] if loss is None else loss
    if not callable(loss) and not (isinstance(loss, str) and loss in names):
        raise ValueError(f"loss is {loss!r}: pass one of {', '.join(names)}, or a function.")
    return loss


def _pathways(pathways: Mapping[str, Sequence[str]], gene_names: Sequence[str] | None) -> dict[str, np.ndarray]:
    if gene_names is None:
        raise ValueError("pathways name genes, and a matrix has no names: pass an AnnData object.")
    names = pd.Index(gene_names)
    twice = set(names[names.duplicated()])
    out = {}
    for pathway, genes in pathways.items():
        if isinstance(genes, str) or not isinstance(genes, Iterable) or not (wanted := list(genes)):
            raise ValueError(f"pathway {pathway!r} is {genes!r}: pass a list of gene names.")
        if missing := [gene for gene in wanted if gene not in names]:
            raise ValueError(f"pathway {pathway!r} has genes that adata lacks: {', '.join(map(str, missing[:5]))}.")
        if double := sorted(twice.intersection(wanted)):
            raise ValueError(
                f"pathway {pathway!r} has genes whose names adata has more than once: {', '.join(double[:5])}: "
                "make them unique with adata.var_names_make_unique()."
            )
        out[pathway] = names.get_indexer_for(wanted)
    if not out:
        raise ValueError("partition is an empty dict: pass at least one pathway.")
    return out


def _groups_of(what: str, n: int, n_groups: int, rng: np.random.Generator) -> np.ndarray:
    if n_groups > n:
        raise ValueError(f"{n} {what} cannot be dealt to {n_groups} groups: ask for fewer.")
    return random_groups(n, n_groups, rng)


def _one_each(n: int, rng: np.random.Generator) -> list[np.random.Generator]:
    """Return a generator for each fold: with one for all, a fold's draws would tell how many others had made."""
    return [np.random.default_rng(key) for key in rng.integers(1 << 63, size=n)]
