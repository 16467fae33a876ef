"""Choose a denoiser, or the weights of several, by the gain on held-out molecules.

Candidates are compared in the one currency that needs neither transform nor depth (`sc_noise2self._loss`), each
learned from one half of the molecules and scored on the other, in both directions. What is learned from held-out
molecules, such as the worth of a component, comes from half the cells and is used on the other half: no cell's
held-out molecules are in its own prediction. (Without that, components of pure noise seem to gain a little.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from tqdm.auto import tqdm

from ._blocks import Counts, Partial
from ._compare import Comparison
from ._intervals import Coverage
from ._loss import Gain, GeneGains
from ._mixture import mixture_weights
from ._progress import progress_bar
from ._random import as_key, random_sample
from ._split import cell_folds
from ._split import halves as even_split
from ._threads import in_threads, one_blas_thread
from ._uncertainty import Dispersions
from .methods._base import Learner, MeanLearner, Method, Sample
from .methods._dispersion import Dispersion
from .methods._populations import AS_IT_IS, CrossFit, Populations, Refinement, best_refinement, cross_fit
from .methods._profiles import Profiles, ScaledProfiles, combine, parts_of, ratio
from .partitions import Fold, fold_of

_SCORED = 20_000_000  # dense entries that candidates are compared on: as many cells, drawn at random, as have so many
_MEASURED = 400_000_000  # and those that the gain of the choice is measured on
_REFINED = 100_000_000  # and those that populations are learned from, for that
_LEAST_WEIGHT = 0.01  # members of a smaller weight are left out of the mean
_DOUBTFUL = 0.001  # the most that a gain may be of a floor alone; one of noise gains some 0.0001


@dataclass(frozen=True, eq=False)
class Choice:
    """A learner as it is set, and its weight in the mean."""

    learner: Learner
    setting: Any
    weight: float = 1.0
    refinement: Refinement = AS_IT_IS

    @property
    def label(self) -> str:
        """E.g. ``"pca log1p, shrinkage 2"``."""
        return ", ".join(filter(None, (self.learner.name, str(self.setting))))


class Part(NamedTuple):
    """One of the profiles that a result is the mean of, and what it is a fit of."""

    choice: Choice
    profiles: Profiles
    weight: float


@dataclass(frozen=True, eq=False)
class Selection:
    """What was compared and what was chosen; the weights of the choices sum to 1."""

    comparison: Comparison  # the loss, minus the held-out gain, of each candidate by its label
    choices: tuple[Choice, ...]
    beats_mean: bool  # by more than two standard errors; else the mean profile, whose gain is 0, takes its place
    gain: Gain  # of the choice, the counts mixed in where that was asked for
    unmixed_gain: Gain
    measured: np.ndarray  # numbers of the cells that the gain was measured on
    gene_gains: tuple[np.ndarray, np.ndarray]  # the gain of each gene and its error, shape (genes,), see `GeneGains`
    dispersion: Dispersion  # of rates around the prediction
    coverage: Coverage

    def refit(self, counts: Counts, rng: np.random.Generator) -> list[Part]:
        """Return the parts of the result, fitted to all molecules; their weights sum to 1.

        The weight of a choice was learned for one fit of it; a result that counts for several has that much more.
        """
        found = []
        for choice in self.choices:
            choice.learner.refinement = choice.refinement
            parts = parts_of(choice.learner.refit(counts, choice.setting, rng))
            weight = choice.weight * choice.learner.counts_for
            found += [Part(choice, profiles, weight * share) for profiles, share in parts]
        total = sum(part.weight for part in found)
        return [part._replace(weight=part.weight / total) for part in found]


def select(
    methods: Sequence[Method], counts: Counts, rng: np.random.Generator, *, average: bool, mix: bool, n_splits: int = 1
) -> Selection:
    """Return the best of what methods offer, or the best mean of all (`average`, the mean profile among them).

    Every learner is tuned. Where fewer cells are enough for every method to be compared, a random choice of them is
    used; what is chosen then learns from all. Every split is used in both directions. `mix` measures what mixing the
    counts back in gains. The mean profile takes the place of a choice that does not beat it.
    """
    learners, average = learners_of(methods, counts, average)
    chunks = counts.chunks
    cells = np.arange(chunks.shape[0])
    enough = max(learner.enough_cells or len(cells) for learner in learners)
    if enough < len(cells):
        cells = random_sample(len(cells), enough, rng)
    some = chunks.take(cells)
    n_cells, n_genes = some.shape
    scored = random_sample(n_cells, max(2, _SCORED // n_genes), rng)
    keys = [as_key(rng) for _ in range(n_splits)]
    halves = _halves(some, keys, cells)
    check_enough([half.held_out[scored].sum() for half in halves], len(scored))
    scores, choices = _compared(learners, some, cells, halves, scored, average, rng)
    chosen = [choice.learner for choice in choices]
    for learner in learners:
        if learner not in chosen:
            learner.forget()
    if len(cells) < chunks.shape[0]:
        for learner in chosen:
            learner.learn_all(counts, keys)
    measured = np.arange(chunks.shape[0]) if all(learner.predicts_others for learner in chosen) else cells
    sample = Sample.of(chunks, keys, measured[random_sample(len(measured), max(2, _MEASURED // n_genes), rng)])
    measure, predict = Measurement(sample), _Prediction(choices, sample)
    unmixed, gene_gains = measure(predict)
    beats_mean = unmixed.is_clear and (unmixed.mean > _DOUBTFUL or _beats_a_floor(choices, sample, measure, unmixed))
    if not beats_mean:
        choices = (Choice(MeanLearner(), "as it is"),)
        predict = _Prediction(choices, sample)
        _, gene_gains = measure(predict)
    dispersions, gain = Dispersions.learned(predict, sample), unmixed
    if mix:
        dispersions = dispersions.with_evidence(predict, sample)
        gain, gene_gains = measure(dispersions.mixed(predict), by_fold=True)
    coverage = dispersions.coverage(predict, sample, mix=mix)
    about = (gain, unmixed, sample.cells, gene_gains, dispersions.of_all, coverage)
    return Selection(scores.comparison, choices, beats_mean, *about)


def _beats_a_floor(choices: Sequence[Choice], sample: Sample, measure: Measurement, gain: Gain) -> bool:
    """Return whether choices gain clearly more than the mean profile refined by no more than the floor of theirs."""
    floor = Refinement(1, max(choice.refinement.height for choice in choices))
    of_floor, _ = measure(_Prediction((Choice(MeanLearner(), "as it is", refinement=floor),), sample))
    return gain.mean - of_floor.mean > 2 * gain.error_of_difference(of_floor)


def denoised(method: Method, counts: Counts, rng: np.random.Generator) -> Profiles:
    """Return the profiles of the best that a method offers: chosen on these counts, then refitted to them."""
    with one_blas_thread():
        learners, _ = learners_of([method], counts, average=False)
        if len(learners) == 1:
            learners[0].prepare(counts.in_memory(), np.arange(counts.chunks.shape[0]), rng)
            if len(learners[0].settings) == 1:  # nothing is left to be chosen on halves
                return learners[0].refit(counts, learners[0].settings[0], rng)
        selection = select([method], counts, rng, average=False, mix=False)
        parts = selection.refit(counts, rng)
        return combine([part.profiles for part in parts], [part.weight for part in parts])


def learners_of(methods: Sequence[Method], counts: Counts, average: bool) -> tuple[list[Learner], bool]:
    """Return the learners of methods, each with a name of its own, and whether they are averaged."""
    learners: list[Learner] = [MeanLearner()] if average else []
    for method in methods:
        learners += method.learners(counts)
    for learner, name in zip(learners, numbered([learner.name for learner in learners]), strict=True):
        learner.name = name
    return learners, average or any(method.is_average for method in methods)


def numbered(names: Sequence[str]) -> list[str]:
    """Return names, the second of the same name with a 2, and so on."""
    counted = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if number == 1 else f"{name} {number}" for name, number in zip(names, counted, strict=True)]


def _compared(
    learners: Sequence[Learner],
    counts: sp.csr_matrix,
    cells: np.ndarray,
    halves: Sequence[Fold],
    scored: np.ndarray,
    average: bool,
    rng: np.random.Generator,
) -> tuple[_Scores, tuple[Choice, ...]]:
    """Return the scores of candidates and what they choose: the best, or all with their weights."""
    with progress_bar("comparing denoisers", (len(halves) + 3) * len(learners)) as bar:
        for learner in learners:
            learner.prepare(counts, cells, rng)
            bar.update()
        bar.total += sum(len(learner.settings) - 1 for learner in learners)
        # Random numbers are drawn in order, whichever thread is first.
        tasks = [(learner, [np.random.default_rng(rng.integers(2**63)) for _ in halves]) for learner in learners]
        together = [task for task in tasks if not task[0].learns_alone]
        alone = (task for task in tasks if task[0].learns_alone)
        for _ in chain(in_threads(partial(_learn, halves), together), map(partial(_learn, halves), alone)):
            bar.update(len(halves))
        scores = _Scores(halves, scored)
        best = []
        for choice in in_threads(scores.refined, (Choice(learner, learner.settings[0]) for learner in learners)):
            best.append(choice)
            bar.update()
        scores.add(best, bar)
        candidates = [[replace(choice, setting=each) for each in choice.learner.settings] for choice in best]
        scores.add([candidate for of_one in candidates for candidate in of_one[1:]], bar)
        best = [max(of_one, key=scores.mean) for of_one in candidates]
    return scores, scores.weighted(best) if average else (max(best, key=scores.mean),)


def _learn(halves: Sequence[Fold], about: tuple[Learner, Sequence[np.random.Generator]]) -> None:
    learner, rngs = about
    for half, rng in zip(halves, rngs, strict=True):
        learner.learn(half, rng)


def _halves(counts: sp.csr_matrix, keys: Sequence[int], cells: np.ndarray) -> list[Fold]:
    """Return both directions of each split."""
    pairs = [even_split(counts, key, cells) for key in keys]
    for pair in pairs:
        check_enough([part.sum() for part in pair], len(cells))
    return [fold_of(seen, held_out, cells) for one, two in pairs for seen, held_out in ((one, two), (two, one))]


def check_enough(molecules: Sequence[float], n_cells: int) -> None:
    """Raise if one of the halves holds no molecule to predict from or to be scored by; a split's stand side by side."""
    if not all(molecules):
        raise ValueError(
            f"the counts hold {int(molecules[0] + molecules[1])} molecule(s) in {n_cells} cells: too few "
            "to split into halves that each hold some, so nothing can be predicted from one and tested on the other."
        )


class _Scores:
    """Held-out gains of candidates, on the same cells of every half."""

    def __init__(self, halves: Sequence[Fold], cells: np.ndarray) -> None:
        self._folds = [half.of_cells(cells) for half in halves]
        self._gains: dict[str, Gain] = {}
        self._populations: dict[tuple[str, int], CrossFit] = {}
        parts = [np.flatnonzero(cell_folds(self._folds[0].cells) == fold) for fold in (0, 1)]
        self._parts = parts if all(len(part) for part in parts) else [np.arange(len(cells))]
        self.comparison = Comparison()

    def add(self, choices: Sequence[Choice], bar: tqdm) -> None:
        """Predict and score candidates."""
        tasks = list(product(choices, range(len(self._folds))))
        found: dict[str, list[Gain]] = {choice.label: [] for choice in choices}
        for (choice, _), gain in zip(tasks, in_threads(self._scored, tasks), strict=True):
            found[choice.label].append(gain)
        for label, gains in found.items():
            self._gains[label] = sum(gains[1:], gains[0])
            self.comparison.add({"label": label}, -self._gains[label])
            bar.update()

    def _scored(self, about: tuple[Choice, int]) -> Gain:
        choice, i = about
        return self._folds[i].gain_of(self._probabilities_of(choice, i))

    def refined(self, choice: Choice) -> Choice:
        """Return the choice with the refinement that gains most."""
        profiles = self._predicted(choice, 0)
        if isinstance(choice.learner, MeanLearner) or not isinstance(profiles, ScaledProfiles):
            return choice
        refinement, fit = best_refinement(profiles.counts(), self._folds[0], self._parts)
        self._populations[choice.learner.name, 0] = fit
        return replace(choice, refinement=refinement)

    def _predicted(self, choice: Choice, i: int) -> Profiles:
        fold = self._folds[i]
        return choice.learner.predict(i, choice.setting, fold.seen, fold.cells)

    def _probabilities_of(self, choice: Choice, i: int) -> np.ndarray:
        """Return the probability that a choice gives to each held-out entry of a fold.

        Populations are those of the learner's first setting.
        """
        profiles, fold = self._predicted(choice, i), self._folds[i]
        if choice.refinement == AS_IT_IS or not isinstance(profiles, ScaledProfiles):
            return fold.probabilities(profiles)
        key = (choice.learner.name, i)
        if key not in self._populations:
            n_populations = choice.refinement.n_populations
            self._populations[key] = cross_fit(profiles.counts(), fold, self._parts, n_populations)
        return self._populations[key].probabilities(profiles.blocks(), [choice.refinement.height])[0]

    def mean(self, choice: Choice) -> float:
        """Return the gain of a candidate that was added."""
        return self._gains[choice.label].mean

    def weighted(self, best: list[Choice]) -> tuple[Choice, ...]:
        """Return the choices with their weights in the mean, those of next to none left out."""
        tasks = product(best, range(len(self._folds)))
        of_tasks = list(in_threads(lambda about: self._probabilities_of(*about), tasks))
        probabilities = np.concatenate(of_tasks).reshape(len(best), -1)
        molecules = np.concatenate([fold.held_out.data for fold in self._folds])
        weights = mixture_weights(probabilities, molecules)
        kept = weights >= _LEAST_WEIGHT
        weights = weights[kept] / weights[kept].sum()
        chosen = [choice for choice, keep in zip(best, kept, strict=True) if keep]
        return tuple(replace(choice, weight=float(weight)) for choice, weight in zip(chosen, weights, strict=True))


class _Prediction:
    """What the choice predicts of each held-out half."""

    def __init__(self, choices: tuple[Choice, ...], sample: Sample) -> None:
        self._choices = choices
        self._populations: list[list[Populations | None]] = []
        refined_on = sample.some(_REFINED)
        for choice in choices:
            choice.learner.settle(choice.setting, sample)
            self._populations.append(list(in_threads(partial(_learned_populations, choice), enumerate(refined_on))))

    def __call__(self, i: int, seen: sp.csr_matrix, cells: np.ndarray) -> Profiles:
        """Return the profiles of cells predicted from their part of a half."""
        found = []
        for choice, populations in zip(self._choices, self._populations, strict=True):
            profiles = choice.learner.predict(i, choice.setting, seen, cells)
            if (own := populations[i]) is not None and isinstance(profiles, ScaledProfiles):
                profiles = profiles.of_populations(own)
            found.append(profiles)
        return combine(found, [choice.weight for choice in self._choices])


def _learned_populations(choice: Choice, about: tuple[int, tuple[sp.csr_matrix, np.ndarray]]) -> Populations | None:
    """Return what a choice learns of populations from cells of a half, every gene with its total; None for nothing.

    It takes the number of the half, what it shows of these cells, and their numbers.
    """
    half, (seen, cells) = about
    profiles = choice.learner.predict(half, choice.setting, seen, cells)
    if choice.refinement == AS_IT_IS or not isinstance(profiles, ScaledProfiles):
        return None
    refined = profiles.refined(seen, choice.refinement, n_rounds=1)
    # Scales of genes are the learner's own; what they became here goes with the populations.
    return replace(
        refined.populations, factors=refined.populations.factors * ratio(refined.gene_scale, profiles.gene_scale)
    )


class Measurement:
    """The held-out gain of predictions and of their genes, on the cells of a sample: one pass each."""

    def __init__(self, sample: Sample) -> None:
        totals = sample.totals
        check_enough([total.sum() for total in totals], len(sample.cells))
        self._sample = sample
        self._gains = GeneGains([total / total.sum() for total in totals], [totals[i ^ 1] for i in range(len(totals))])

    def __call__(
        self, predict: Callable[[int, sp.csr_matrix, np.ndarray], Profiles], *, by_fold: bool = False
    ) -> tuple[Gain, tuple[np.ndarray, np.ndarray]]:
        """Return the gain, and that of each gene with its error.

        `predict` takes the number of a half, what it shows of some cells (of one fold if `by_fold`), and their numbers.
        """

        def of_cells(cells: np.ndarray, parts: list[sp.csr_matrix]) -> Partial:
            sums, rows = np.zeros((6, parts[0].shape[1])), np.zeros((2, len(cells)))
            folds = cell_folds(cells) if by_fold else np.zeros(len(cells))
            for own in (folds == fold for fold in np.unique(folds)):
                of_own = [part[own] for part in parts]
                predictions = [predict(i, seen, cells[own]) for i, seen in enumerate(of_own)]
                found = self._gains.of_cells(predictions, [of_own[i ^ 1] for i in range(len(parts))])
                sums += found.sums[0]
                rows[:, own] = found.rows
            return Partial([sums], list(rows))

        (sums,), (nats, molecules) = self._sample.run(of_cells)
        return Gain(nats, molecules), self._gains.of_genes(sums)
