"""Denoisers as the selection sees them: learned from one half, predicting the other, refitted to all molecules.

A member knows how it may be set (`settings`) and what it learned from each half; the selection knows neither PCA
nor any other denoiser. A new denoiser joins by a class with these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp

from .._blocks import Block, Chunks, InMemory, Partial, Survey
from .._counts import column_sums, row_sums
from .._split import halves
from .._transform import TransformName
from ._autoencoder import WIDTHS, Autoencoder
from ._pca import PCADenoiser, fit_together, folds_of, halves_of, noise_edge, shrinkage, whole, worth_of_halves
from ._profiles import LowRankProfiles, scaled_to
from ._svd import N_PASSES

_COMPARED_CELLS = 5_000  # that settings of PCA are compared on
_FURTHER_PASSES = 2  # over all cells, for components that start from those of some cells
_LEARNED_CELLS = 50_000  # of a half that the autoencoder learns from: enough to choose by
_STRENGTHS = (1.0, 2.0, 4.0, 8.0)  # of `shrinkage` at the depth of a half; 1 is least squares


@dataclass(frozen=True, eq=False)
class Half:
    """One direction of a split.

    Attributes
    ----------
    seen, held_out
        Its two parts, CSR of shape (cells, genes).
    folds
        The fold of each cell, shape (cells,).
    cells
        Which cells these are of all, shape (cells,).
    """

    seen: sp.csr_matrix
    held_out: sp.csr_matrix
    folds: np.ndarray
    cells: np.ndarray


@dataclass(frozen=True, eq=False)
class Sample:
    """The cells that a choice is measured on: their halves are made anew, a block at a time, and never held.

    Attributes
    ----------
    chunks
        The counts of all cells.
    keys
        Of the splits.
    cells
        Which of all cells these are, in rising order.
    """

    chunks: Chunks
    keys: Sequence[int]
    cells: np.ndarray

    def run(self, work: Callable[[np.ndarray, list[sp.csr_matrix]], Partial]) -> Partial:
        """Return the sums over cells and their rows: one pass.

        Parameters
        ----------
        work
            Takes the numbers of cells and both halves of each split; the other half of number i is number i ^ 1.
        """

        def of_block(block: Block) -> Partial:
            first, last = np.searchsorted(self.cells, [block.start, block.start + block.counts.shape[0]])
            own = self.cells[first:last]
            counts = block.counts if len(own) == block.counts.shape[0] else block.counts[own - block.start]
            return work(own, [half for key in self.keys for half in halves(counts, key, own)])

        return self.chunks.run(of_block)


class Member(Protocol):
    """A denoiser and the ways in which it may be set."""

    @property
    def name(self) -> str:
        """Of the member, in labels and records."""
        ...

    @property
    def title(self) -> str:
        """For the title of a plot."""
        ...

    def described(self, setting: str, rank: int) -> str:
        """Return what it is and how it was set, for the report."""
        ...

    @property
    def settings(self) -> tuple[str, ...]:
        """The ways to set it; members are compared at the first before they are tuned."""
        ...

    @property
    def enough_cells(self) -> int | None:
        """How many cells are enough to choose by; None where more always tell more."""
        ...

    @property
    def predicts_others(self) -> bool:
        """Whether what was learned from some cells predicts others."""
        ...

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:
        """Settle what is chosen by molecules that the member sets aside itself, if anything is.

        `cells` says which of all these are, shape (cells,).
        """
        ...

    def learn(self, half: Half, rng: np.random.Generator) -> None:
        """Learn from `half.seen`, and, per fold of cells, what `half.held_out` says of the settings."""
        ...

    def learn_all(self, chunks: Chunks, keys: Sequence[int], rng: np.random.Generator) -> None:
        """Learn the halves again from all cells, where `learn` saw some of them and all would tell more.

        `keys` are those of the splits that the halves are of.
        """
        ...

    def forget(self) -> None:
        """Let go of what was learned, where the member was not chosen."""
        ...

    def settle(self, setting: str, sample: Sample) -> None:
        """Learn what predictions in this setting share among all cells that will be measured, where they share any."""
        ...

    def predict(self, half: int, setting: str, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        """Return profiles of cells from their part of what was seen in that half; no fold is used on its own cells.

        `cells` says which of all these are, shape (cells,).
        """
        ...

    def refit(self, survey: Survey, setting: str, rng: np.random.Generator) -> LowRankProfiles:
        """Return profiles of all cells, fitted to all molecules."""
        ...

    def record(self, setting: str) -> dict[str, object]:
        """Return what is worth writing down of the choice: numbers, strings and arrays."""
        ...


@dataclass(eq=False)
class MeanMember:
    """Every cell has the mean profile: what any denoiser must beat."""

    name: str = "mean"
    title: str = "mean profile"
    settings: tuple[str, ...] = ("as it is",)
    enough_cells: int | None = 1
    predicts_others: bool = True
    _totals: list[np.ndarray] = field(default_factory=list)

    def described(self, setting: str, rank: int) -> str:
        """See `Member`."""
        return "the mean profile"

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:
        """See `Member`; there is nothing to settle."""

    def learn(self, half: Half, rng: np.random.Generator) -> None:
        """See `Member`."""
        self._totals.append(column_sums(half.seen))

    def learn_all(self, chunks: Chunks, keys: Sequence[int], rng: np.random.Generator) -> None:
        """See `Member`; `settle` does it."""

    def forget(self) -> None:
        """See `Member`."""
        self._totals.clear()

    def settle(self, setting: str, sample: Sample) -> None:
        """See `Member`."""
        self._totals = totals_of_halves(sample)

    def predict(self, half: int, setting: str, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        """See `Member`."""
        return _mean_profiles(row_sums(seen), self._totals[half])

    def refit(self, survey: Survey, setting: str, rng: np.random.Generator) -> LowRankProfiles:
        """See `Member`."""
        return _mean_profiles(survey.size, survey.totals)

    def record(self, setting: str) -> dict[str, object]:
        """See `Member`."""
        return {"rank": 0}


@dataclass(eq=False)
class PCAMember:
    """PCA regression in one transform; it is set by how its components are weighted.

    ``"cut"`` gives weight 1 to components worth more than half, 0 to the rest; ``"shrinkage 2"`` shrinks them by
    `shrinkage` of that strength. Both are carried to the depth of all molecules, where noise is half as large.
    """

    transform: TransformName
    n_components: int
    genes: np.ndarray | None = None
    predicts_others: bool = True
    _fits: list[tuple[PCADenoiser, Half, np.ndarray]] = field(default_factory=list)
    _gene_scales: list[np.ndarray] = field(default_factory=list)
    _edge: float | None = None

    @property
    def name(self) -> str:
        """E.g. ``"pca log1p"``."""
        return f"pca {self.transform}"

    @property
    def title(self) -> str:
        """See `Member`."""
        return f"PCA of {'square roots' if self.transform == 'sqrt' else self.transform.replace('none', 'counts')}"

    def described(self, setting: str, rank: int) -> str:
        """See `Member`."""
        return f"{self.title} ({rank} components worth more than noise, {setting})"

    @property
    def settings(self) -> tuple[str, ...]:
        """See `Member`."""
        return ("shrinkage 2", "cut", *(f"shrinkage {s:g}" for s in _STRENGTHS if s != 2))

    @property
    def enough_cells(self) -> int | None:
        """See `Member`."""
        return _COMPARED_CELLS

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:
        """See `Member`; there is nothing to settle."""

    def learn(self, half: Half, rng: np.random.Generator) -> None:
        """See `Member`."""
        denoiser = self._new(3, rng).fit(half.seen, self.genes)
        self._fits.append((denoiser, half, denoiser.worth(half.seen, half.held_out, half.folds)))

    @staticmethod
    def n_passes(n_cells: int, n_splits: int) -> int:
        """Return how often `learn_all`, for more cells than are compared, `settle` and `refit` read all counts."""
        of_halves = (3 + _FURTHER_PASSES) * n_splits + N_PASSES if n_cells > _COMPARED_CELLS else 0
        return of_halves + 1 + 4 + _FURTHER_PASSES + 1

    def learn_all(self, chunks: Chunks, keys: Sequence[int], rng: np.random.Generator) -> None:
        """See `Member`. Each half starts from what some of its own cells gave, which has seen nothing of the other."""
        fits = []
        for key, *pair in zip(keys, self._fits[::2], self._fits[1::2], strict=True):
            parts, denoisers = halves_of([key]), [self._new(_FURTHER_PASSES, rng) for _ in pair]
            fit_together(denoisers, chunks, parts, self.genes, [self._used(fitted) for fitted, _, _ in pair])
            worths = worth_of_halves(denoisers, chunks, key)
            fits += [(new, half, worth) for new, (_, half, _), worth in zip(denoisers, pair, worths, strict=True)]
        self._fits = fits
        self._edge = noise_edge(fits[0][0], chunks, halves_of(keys[:1]), np.random.default_rng(0))

    def forget(self) -> None:
        """See `Member`."""
        self._fits.clear()
        self._gene_scales.clear()

    def predict(self, half: int, setting: str, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        """See `Member`."""
        scale = self._gene_scales[half] if self._gene_scales else None
        fitted = self._fits[half][0]
        return fitted.predict(seen, self._weights(half, setting, cells), n_rounds=int(scale is None), gene_scale=scale)

    def settle(self, setting: str, sample: Sample) -> None:
        """See `Member`: that is the scale of genes."""

        def totals(cells: np.ndarray, parts: list[sp.csr_matrix]) -> Partial:
            return Partial(
                [
                    self._fits[i][0].unscaled(seen, self._weights(i, setting, cells)).scale_cells()
                    for i, seen in enumerate(parts)
                ]
            )

        sums = sample.run(totals).sums
        shares = [fitted.gene_share_ for fitted, _, _ in self._fits]
        self._gene_scales = [
            scaled_to(share * total.sum(), total, np.ones_like(share))
            for share, total in zip(shares, sums, strict=True)
        ]

    def _weights(self, half: int, setting: str, cells: np.ndarray) -> np.ndarray:
        """Return the weight of each component in each cell; a fold's own are learned from the other fold."""
        weights = np.array([component_weights(fold, setting, noise=1) for fold in self._fits[half][2]])
        return weights[1 - folds_of(cells)]

    def refit(self, survey: Survey, setting: str, rng: np.random.Generator) -> LowRankProfiles:
        """See `Member`. The components start from those of a half."""
        denoiser = self._new(_FURTHER_PASSES + 1, rng)
        fit_together([denoiser], survey.chunks, whole, self.genes, [self._used(self._fits[0][0])])
        return denoiser.profiles(survey.chunks, self.full_depth_weights(setting), survey.size)

    def record(self, setting: str) -> dict[str, object]:
        """See `Member`."""
        worth = self._worth()
        fitted, half, _ = self._fits[0]
        # A seed of its own: what is only reported must not move the draws that the result depends on.
        edge = self._edge
        if edge is None:

            def parts(block: Block) -> list[sp.csr_matrix]:
                return [block.counts, half.held_out[block.cells]]

            edge = noise_edge(fitted, InMemory(half.seen), parts, np.random.default_rng(0))
        return {
            "rank": int((shrinkage(worth, 0.5) > 0.5).sum()),
            "worth": worth,
            "weights": self.full_depth_weights(setting),
            "singular_values": fitted.singular_values_,
            "noise_edge": edge,
        }

    def _new(self, n_passes: int, rng: np.random.Generator) -> PCADenoiser:
        return PCADenoiser(self.transform, n_components=self.n_components, n_passes=n_passes, random_state=rng)

    @staticmethod
    def _used(fitted: PCADenoiser) -> np.ndarray:
        return fitted.components_[fitted.genes_]

    def full_depth_weights(self, setting: str) -> np.ndarray:
        """Return the weight of each component in a fit to all molecules, shape (k,)."""
        return component_weights(self._worth(), setting, noise=0.5)

    def _worth(self) -> np.ndarray:
        return np.mean([worth.mean(axis=0) for _, _, worth in self._fits], axis=0)


@dataclass(eq=False)
class AutoencoderMember:
    """An autoencoder; its width is chosen on all molecules but those that it sets aside.

    A width chosen on halves would be that for halves: on sparse data they support a narrower one. What the choice
    may tell of a half's held-out molecules is which of a handful of widths was best.

    Attributes
    ----------
    genes, batch
        As in `Autoencoder.fit`, for all cells.
    widths
        To choose from.
    options
        Further arguments of `Autoencoder`.
    like
        Another member whose width to take instead: this one then differs by its seed.
    number
        Distinguishes members of several seeds, from 1.
    on_check
        Called with a line that says how training goes.
    fitted
        The autoencoder fitted to all molecules of all cells, or of as many as are enough until `refit`.
    choice
        The autoencoder whose widths were compared; None for a model that was loaded.
    """

    genes: np.ndarray | None = None
    batch: np.ndarray | None = None
    widths: tuple[int, ...] = WIDTHS
    options: dict[str, Any] = field(default_factory=dict)
    like: AutoencoderMember | None = None
    number: int = 1
    on_check: Callable[[str], object] = lambda line: None
    fitted: Autoencoder | None = None
    choice: Autoencoder | None = None
    predicts_others: bool = True
    _fits: list[Autoencoder] = field(default_factory=list)

    @property
    def name(self) -> str:
        """``"autoencoder"``, and its number from the second on."""
        return "autoencoder" if self.number == 1 else f"autoencoder {self.number}"

    @property
    def title(self) -> str:
        """See `Member`."""
        return self.name

    def described(self, setting: str, rank: int) -> str:
        """See `Member`."""
        return f"an autoencoder ({setting})"

    @property
    def settings(self) -> tuple[str, ...]:
        """The width chosen."""
        return (f"width {self.fitted.width_}",) if self.fitted else ()

    @property
    def enough_cells(self) -> int | None:
        """See `Member`."""
        return _LEARNED_CELLS

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:
        """See `Member`."""
        widths = self.widths if self.like is None else self._chosen(self.like)
        self.fitted = self.choice = self._fit(counts, self._batch(cells), widths, rng)

    def learn(self, half: Half, rng: np.random.Generator) -> None:
        """See `Member`."""
        self._fits.append(self._fit(half.seen, self._batch(half.cells), self._chosen(self), rng))

    def learn_all(self, chunks: Chunks, keys: Sequence[int], rng: np.random.Generator) -> None:
        """See `Member`; there is nothing more to learn."""

    def forget(self) -> None:
        """See `Member`."""
        self._fits.clear()

    def predict(self, half: int, setting: str, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        """See `Member`."""
        return self._fits[half].predict(seen, self._batch(cells))

    def settle(self, setting: str, sample: Sample) -> None:
        """See `Member`; there is nothing that they share."""

    def refit(self, survey: Survey, setting: str, rng: np.random.Generator) -> LowRankProfiles:
        """See `Member`."""
        assert self.fitted is not None  # prepared before anything was learned
        if len(survey.size) > _LEARNED_CELLS:
            fitted = self._new(self._chosen(self), rng)
            if isinstance(survey.chunks, InMemory):
                self.fitted = fitted.fit(survey.chunks.in_memory(), self.genes, self.batch)
            else:
                cells = np.sort(rng.choice(len(survey.size), _LEARNED_CELLS, replace=False))
                self.fitted = fitted.fit(survey.chunks.take(cells), self.genes, self.batch, survey=survey, cells=cells)
        return self.fitted.profiles(survey, self.batch)

    def record(self, setting: str) -> dict[str, object]:
        """See `Member`."""
        assert self.fitted is not None
        if self.choice is None:
            return {"rank": self.fitted.width_}
        gains = self.choice.gains_
        best = max(gains, key=lambda gain: gain.mean)
        history = self.fitted.histories_[self.fitted.tried_.index(self.fitted.width_)]
        return {
            "rank": self.fitted.width_,
            "table": pd.DataFrame(
                {
                    "width": self.choice.tried_,
                    "loss": [-gain.mean for gain in gains],
                    "error": [gain.error_of_difference(best) for gain in gains],
                    "gain": [gain.mean for gain in gains],
                    "chosen": [width == self.fitted.width_ for width in self.choice.tried_],
                }
            ),
            "epoch_losses": np.array(history.losses),
            "checked_epochs": np.array(history.checked),
            "checked_gains": np.array(history.gains),
        }

    @staticmethod
    def _chosen(member: AutoencoderMember) -> tuple[int, ...]:
        assert member.fitted is not None
        return (member.fitted.width_,)

    def _fit(
        self, counts: sp.csr_matrix, batch: np.ndarray | None, widths: tuple[int, ...], rng: np.random.Generator
    ) -> Autoencoder:
        """Return an autoencoder fitted to as many of the cells as are enough."""
        if counts.shape[0] > _LEARNED_CELLS:
            cells = np.sort(rng.choice(counts.shape[0], _LEARNED_CELLS, replace=False))
            counts, batch = counts[cells], None if batch is None else batch[cells]
        return self._new(widths, rng).fit(counts, self.genes, batch)

    def _batch(self, cells: np.ndarray) -> np.ndarray | None:
        return None if self.batch is None else self.batch[cells]

    def _new(self, widths: tuple[int, ...], rng: np.random.Generator) -> Autoencoder:
        n_batches = 0 if self.batch is None else int(self.batch.max()) + 1
        return Autoencoder(widths, n_batches=n_batches, random_state=rng, on_check=self._report, **self.options)

    def _report(self, width: int, n_epochs: int, epoch: int, gain: float) -> None:
        self.on_check(f"width {width}, epoch {epoch}/{n_epochs}, gain {gain:.4f}")


def totals_of_halves(sample: Sample) -> list[np.ndarray]:
    """Return the molecules of each gene in each half, shape (genes,)."""
    return list(sample.run(lambda _, parts: Partial([column_sums(part) for part in parts])).sums)


def component_weights(worth: np.ndarray, setting: str, noise: float) -> np.ndarray:
    """Return the weights of components, at a depth where noise is `noise` times that of the halves `worth` is from."""
    if setting == "cut":
        return (shrinkage(worth, noise) > 0.5).astype(np.float64)
    return shrinkage(worth, noise * float(setting.removeprefix("shrinkage ")))


def _mean_profiles(size: np.ndarray, totals: np.ndarray) -> LowRankProfiles:
    share = totals / totals.sum()
    one = np.ones((len(size), 1), np.float32)
    return LowRankProfiles.with_totals("none", one, share.astype(np.float32)[:, None], size, share, n_rounds=0)
