"""Learn how sure predictions are, from molecules that they were made without, and how often intervals then hold them.

The dispersion of each gene around the prediction is learned by fold of cells, and used on the other fold; its power is
one number, learned from all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import scipy.sparse as sp

from ._blocks import InMemory
from ._counts import row_sums
from ._intervals import Belief, Coverage, sampled_genes
from ._split import cell_folds
from ._threads import in_threads
from .methods._base import Sample
from .methods._dispersion import Dispersion, HeldOut, best_power, hidden_by_totals, posterior_means
from .methods._profiles import MixedProfiles, Profiles

_DISPERSION = 100_000_000  # dense entries of the cells that dispersions are learned from: rare genes need cells
_TELLING = 500  # genes, those with most molecules, which tell the power as all do
_COVERED = 20_000_000  # and of those that intervals are held against
_COVERED_CELLS = 2_000
_GENES_EACH = 10  # of each tenth of the genes
_EVIDENCE = (1.0, 0.75, 0.5, 0.25, 0.0)

Predict = Callable[[int, sp.csr_matrix, np.ndarray], Profiles]
"""Takes the number of a half, what it shows of some cells, and their numbers; returns their profiles."""


@dataclass(frozen=True, eq=False)
class Dispersions:
    """How widely rates lie around the prediction."""

    of_all: Dispersion
    for_folds: tuple[Dispersion, Dispersion]  # that for halves of cells of a fold, learned from the other

    @classmethod
    def learned(cls, predict: Predict, sample: Sample) -> Dispersions:
        """Return what the molecules of each half say around what the other half predicts."""
        halves = sample.some(_DISPERSION)

        def observed(about: tuple[int, int]) -> HeldOut:
            fold, i = about
            seen, cells = halves[i]
            own = np.flatnonzero((cell_folds(cells) == fold) & (row_sums(seen) > 0))
            profiles = predict(i, seen[own], cells[own])
            return HeldOut.of(profiles, halves[i ^ 1][0][own], row_sums(seen[own]))

        found = list(in_threads(observed, product((0, 1), range(len(halves)))))
        totals = np.sum(sample.totals[:2], axis=0)
        level = totals / len(sample.cells)

        def by_fold(found: Sequence[HeldOut], power: float, level: np.ndarray) -> np.ndarray:
            """Return curves, shape (folds, grid, genes)."""
            curves = np.array(list(in_threads(lambda each: each.curves(power=power, level=level / 2), found)))
            # The mean over halves, not the sum: the two directions of a split say nearly the same.
            return curves.reshape(2, len(halves), *curves.shape[1:]).mean(axis=1)

        telling = np.isin(np.arange(len(totals)), np.argsort(-totals, kind="stable")[:_TELLING])
        of_telling = [each.some(telling) for each in found]
        power = best_power(lambda power: by_fold(of_telling, power, level[telling]).sum(axis=0))
        curves = by_fold(found, power, level)
        hidden = float(np.mean([hidden_by_totals(row_sums(seen)) for seen, _ in halves]))
        all_cells, first, second = (
            Dispersion(posterior_means(each)[0] + hidden, level / 2, power)
            for each in (curves.sum(axis=0), curves[1], curves[0])
        )
        return cls(all_cells._replace(level=level), (first, second))

    def with_evidence(self, predict: Predict, sample: Sample) -> Dispersions:
        """Return these with the share of a cell's own count under which molecules held out are likeliest.

        Shares are tried from 1 down, until they are less likely than with the last.
        """
        genes = np.argsort(-np.sum(sample.totals[:2], axis=0), kind="stable")[:_TELLING]
        halves = _at_most(_COVERED_CELLS, sample.some(_COVERED))

        def told(about: tuple[int, int]) -> tuple[Any, ...]:
            """Return what is expected of some cells, phi, the counts seen and held out, and the depth of these."""
            fold, i = about
            (seen, cells), held_out = halves[i], halves[i ^ 1][0]
            own = np.flatnonzero((cell_folds(cells) == fold) & (row_sums(seen) > 0) & (row_sums(held_out) > 0))
            found = [expected[:, genes] for _, expected in predict(i, seen[own], cells[own]).blocks()]
            expected = np.concatenate([np.zeros((0, len(genes)), np.float32), *found])
            observed, count = (part[own][:, genes].toarray() for part in (seen, held_out))
            depth = row_sums(held_out[own]) / row_sums(seen[own])
            return expected, self.for_folds[fold].at(expected, genes), observed, count, depth[:, None]

        parts = list(in_threads(told, product((0, 1), range(len(halves)))))
        best, most = _EVIDENCE[0], -np.inf
        for evidence in _EVIDENCE:
            likelihood = 0.0
            for expected, phi, observed, count, depth in parts:
                belief = Belief.around(expected, phi, observed, evidence).times(depth)
                likelihood += float(belief.log_likelihood(count)[expected > 0].sum())
            if likelihood <= most:
                break
            best, most = evidence, likelihood
        of_all, *folds = (each._replace(evidence=best) for each in (self.of_all, *self.for_folds))
        return Dispersions(of_all, (folds[0], folds[1]))

    def mixed(self, predict: Predict) -> Predict:
        """Return what predicts with each cell's own counts mixed in; cells are of one fold at a time."""

        def predict_mixed(i: int, seen: sp.csr_matrix, cells: np.ndarray) -> MixedProfiles:
            return self._mixed(predict(i, seen, cells), seen, cell_folds(cells[:1])[0])

        return predict_mixed

    def _mixed(self, profiles: Profiles, seen: sp.csr_matrix, fold: int) -> MixedProfiles:
        """Return the profiles of cells of a fold with their own counts mixed in."""
        mixed = MixedProfiles(profiles, InMemory(seen), self.for_folds[fold], np.ones(seen.shape[0], np.float32))
        mixed.cell_scale[:] = mixed.scales_to(row_sums(seen))
        return mixed

    def coverage(self, predict: Predict, sample: Sample, *, mix: bool) -> Coverage:
        """Return how often intervals hold the molecules of the second half, predicted from the first.

        The random numbers are its own: what is only reported must not move other draws.
        """
        rng = np.random.default_rng(0)
        (seen, cells), (held_out, _) = _at_most(_COVERED_CELLS, sample.some(_COVERED)[:2])
        size, depth = row_sums(seen), row_sums(held_out)
        genes = sampled_genes(np.sum(sample.totals[:2], axis=0), len(cells), _GENES_EACH, rng)
        uniform, integrals = rng.random(genes.shape), np.full(genes.shape, np.nan)
        folds = cell_folds(cells)
        for fold in (0, 1):
            own = np.flatnonzero((folds == fold) & (size > 0) & (depth > 0))
            if not len(own):
                continue
            profiles, scale = predict(0, seen[own], cells[own]), np.ones(len(own), np.float32)
            if mix:
                scale = self._mixed(profiles, seen[own], fold).cell_scale
            for rows, block in profiles.blocks():
                at, drawn = own[rows], genes[own[rows]]
                flat, shape = drawn.reshape(len(at), -1), drawn.shape
                expected = np.take_along_axis(block, flat, axis=1)
                law = self.for_folds[fold]
                observed = np.take_along_axis(seen[at].toarray(), flat, axis=1) if mix else None
                belief = Belief.around(expected, law.at(expected, flat), observed, law.evidence)
                belief = belief.times((depth[at] / size[at] * scale[rows])[:, None])
                count = np.take_along_axis(held_out[at].toarray(), flat, axis=1)
                integrals[at] = belief.probability_integral(count, uniform[at].reshape(flat.shape)).reshape(shape)
        integrals[genes < 0] = np.nan
        return Coverage(cells, integrals, size + depth)


def _at_most(
    n_cells: int, halves: Sequence[tuple[sp.csr_matrix, np.ndarray]]
) -> list[tuple[sp.csr_matrix, np.ndarray]]:
    """Return counts and numbers of so many of their cells, evenly chosen."""
    step = -(-len(halves[0][1]) // n_cells)
    return [(counts[::step], cells[::step]) for counts, cells in halves]
