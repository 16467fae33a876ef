"""Choose a denoiser, or the weights of several, by the gain on held-out molecules.

Candidates are compared in the one currency that needs neither transform nor depth (`sc_noise2self._loss`), each
learned from one half of the molecules and scored on the other, in both directions. What is learned from held-out
molecules, such as the worth of a component, comes from half the cells and is used on the other half: no cell's
held-out molecules are in its own prediction. (Without that, components of pure noise seem to gain a little.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ._blocks import Chunks, Partial, Survey
from ._counts import column_sums, row_sums
from ._loss import Gain, GeneGains, held_out_gain, held_out_probabilities
from ._random import as_key
from ._result import Member as MemberResult
from ._split import halves as even_split
from .methods._base import Half, MeanMember, Member, Sample, totals_of_halves
from .methods._mixing import dispersion_curves, dispersions
from .methods._pca import folds_of
from .methods._profiles import LowRankProfiles, MixedProfiles, Profiles, WeightedProfiles

_SCORED = 20_000_000  # dense entries that candidates are compared on: as many cells, drawn at random, as have so many
_MEASURED = 400_000_000  # and those that the gain of the choice is measured on
_DISPERSION = 100_000_000  # and for the dispersions, where rare genes need cells
_LEAST_WEIGHT = 0.01  # members of a smaller weight are left out of the mean


@dataclass(frozen=True, eq=False)
class Choice:
    """A member as it is set, and its weight in the mean."""

    member: Member
    setting: str
    weight: float

    @property
    def label(self) -> str:
        """E.g. ``"pca log1p, shrinkage 2"``."""
        return f"{self.member.name}, {self.setting}"


@dataclass(frozen=True, eq=False)
class Selection:
    """What was compared and what was chosen.

    Attributes
    ----------
    gains
        The held-out gain of each candidate by its label, pooled over splits and directions.
    choices
        The members chosen; their weights sum to 1.
    gain
        The held-out gain of the choice, the counts mixed in where that was asked for.
    unmixed_gain
        The same before the counts are mixed in.
    phi
        Dispersion of each gene around the prediction, shape (genes,); None without mixing.
    beats_mean
        Whether the choice beats the mean profile, whose gain is 0, by more than two standard errors; the mean profile
        takes its place if not.
    gene_gains
        The gain of the choice in each gene and its standard error, shape (genes,) each, see `GeneGains`.
    """

    gains: dict[str, Gain]
    choices: tuple[Choice, ...]
    gain: Gain
    unmixed_gain: Gain
    phi: np.ndarray | None
    beats_mean: bool
    gene_gains: tuple[np.ndarray, np.ndarray]

    def refit(self, survey: Survey, rng: np.random.Generator) -> tuple[LowRankProfiles, ...]:
        """Return the profiles of each choice, fitted to all molecules."""
        return tuple(choice.member.refit(survey, choice.setting, rng) for choice in self.choices)

    @property
    def candidates(self) -> pd.DataFrame:
        """What was compared: `label`, `gain`, `error` of its difference to the best, `chosen`."""
        best, chosen = max(self.gains.values(), key=lambda gain: gain.mean), {choice.label for choice in self.choices}
        return pd.DataFrame(
            {
                "label": list(self.gains),
                "gain": [gain.mean for gain in self.gains.values()],
                "error": [gain.error_of_difference(best) for gain in self.gains.values()],
                "chosen": [label in chosen for label in self.gains],
            }
        )


def members_of(choices: Sequence[Choice], fitted: Sequence[LowRankProfiles]) -> list[MemberResult]:
    """Return the choices as they are written."""
    out = []
    for choice, profiles in zip(choices, fitted, strict=True):
        member, learned = choice.member, dict(choice.member.record(choice.setting))
        rank = int(learned.pop("rank"))  # type: ignore[call-overload]
        described = member.described(choice.setting, rank)
        out.append(
            MemberResult(member.name, member.title, described, choice.setting, rank, choice.weight, profiles, learned)
        )
    return out


def combine(profiles: Sequence[Profiles], weights: Sequence[float]) -> Profiles:
    """Return the weighted mean of profiles."""
    return profiles[0] if len(profiles) == 1 else WeightedProfiles(tuple(profiles), tuple(weights))


def select(
    members: Sequence[Member],
    chunks: Chunks,
    rng: np.random.Generator,
    *,
    average: bool,
    mix: bool,
    n_splits: int = 1,
    on_step: Callable[[], object] = lambda: None,
) -> Selection:
    """Return the best member and setting, or the best mean of all members.

    Parameters
    ----------
    members
        Denoisers that have learned nothing yet.
    chunks
        The counts. Where fewer cells are enough for every member to be compared, a random choice of them is used; what
        is chosen then learns from all.
    average
        Tune every member and find the weights of their mean; else tune the best one alone.
    mix
        Learn the dispersions that mixing the counts back in needs.
    n_splits
        Independent even splits; each is used in both directions.
    on_step
        Called `n_steps` times: as each member is prepared, after each fit to a half, and as each candidate is scored.
    """
    cells = np.arange(chunks.shape[0])
    enough = [member.enough_cells or len(cells) for member in members]
    if max(enough) < len(cells):
        cells = np.sort(rng.choice(cells, max(enough), replace=False))
    counts = chunks.take(cells)
    n_cells, n_genes = counts.shape
    scored, dispersed = (_some(rng, n_cells, entries // n_genes) for entries in (_SCORED, _DISPERSION))
    keys = [as_key(rng) for _ in range(n_splits)]
    halves = _halves(counts, keys, cells)
    check_enough([half.held_out[scored] for half in halves])
    for member in members:
        member.prepare(counts, cells, rng)
        on_step()
    del counts  # their halves are all that is needed from here
    for half in halves:
        for member in members:
            member.learn(half, rng)
            on_step()
    scores = _Scores(halves, scored)

    best = {member.name: Choice(member, member.settings[0], 1.0) for member in members}
    for choice in best.values():
        scores.add(choice)
        on_step()
    winner = max(best.values(), key=scores.mean)
    for member in members if average else [winner.member]:
        candidates = [Choice(member, setting, 1.0) for setting in member.settings]
        for candidate in candidates[1:]:
            scores.add(candidate)
            on_step()
        best[member.name] = max(candidates, key=scores.mean)
    choices = _weighted(list(best.values()), scores) if average else (best[winner.member.name],)

    for member in members:
        if all(choice.member is not member for choice in choices):
            member.forget()
    if len(cells) < chunks.shape[0]:
        for choice in choices:
            choice.member.learn_all(chunks, keys, rng)
    fitted = np.arange(chunks.shape[0]) if all(choice.member.predicts_others for choice in choices) else cells
    sample = Sample(chunks, keys, fitted[_some(rng, len(fitted), _MEASURED // n_genes)])
    measure = _Measurement(sample)
    predict = _Prediction(choices, sample)
    unmixed, gene_gains = measure(predict)
    beats_mean = unmixed.is_clear
    if not beats_mean:
        choices = (Choice(MeanMember(), "as it is", 1.0),)
        predict = _Prediction(choices, sample)
        _, gene_gains = measure(predict)
    gain, phi = unmixed, None
    if mix:
        phi = predict.learn_dispersions(halves, dispersed)
        gain, gene_gains = measure(predict)
    return Selection(scores.gains, choices, gain, unmixed, phi, beats_mean, gene_gains)


def n_steps(members: Sequence[Member], average: bool, n_splits: int) -> int:
    """Return how often `select` calls `on_step`; members that compete, not averaged, have as many settings each."""
    # The one setting of some members is not known before they are prepared.
    tuned = [max(1, len(member.settings)) - 1 for member in (members if average else members[:1])]
    return (2 * n_splits + 2) * len(members) + sum(tuned)


def _some(rng: np.random.Generator, n_cells: int, n_wanted: int) -> np.ndarray:
    """Return as many of the cells as are wanted, at least two, drawn at random, in rising order."""
    return np.sort(rng.choice(n_cells, min(n_cells, max(2, n_wanted)), replace=False))


def _halves(counts: sp.csr_matrix, keys: Sequence[int], cells: np.ndarray) -> list[Half]:
    """Return both directions of each split."""
    folds = folds_of(cells)
    pairs = [even_split(counts, key, cells) for key in keys]
    return [Half(seen, held_out, folds, cells) for one, two in pairs for seen, held_out in ((one, two), (two, one))]


def check_enough(parts: Sequence[sp.csr_matrix]) -> None:
    """Raise if one of the halves has no molecule to predict from or to be scored by; a split has two, side by side."""
    if any(part.nnz == 0 for part in parts):
        raise ValueError(
            f"the counts hold {int(parts[0].sum() + parts[1].sum())} molecule(s) in {parts[0].shape[0]} cells: too few "
            "to split into halves that each hold some, so nothing can be predicted from one and tested on the other."
        )


def mixture_weights(probabilities: np.ndarray, molecules: np.ndarray, n_iter: int = 200) -> np.ndarray:
    """Return the weights of the mixture of distributions under which the molecules are likeliest.

    A concave problem; expectation maximisation climbs it without a step size.

    Parameters
    ----------
    probabilities
        That each member gave to each held-out entry, shape (members, entries).
    molecules
        Of each entry, shape (entries,).
    """
    weights = np.full(len(probabilities), 1 / len(probabilities))
    probabilities = probabilities + 1e-12
    for _ in range(n_iter):
        weights = weights * (probabilities @ (molecules / (weights @ probabilities))) / molecules.sum()
    return weights


class _Scores:
    """Held-out probabilities and gains of candidates, on the same cells of every half."""

    def __init__(self, halves: list[Half], cells: np.ndarray) -> None:
        self._numbers = halves[0].cells[cells]
        self._seen = [half.seen[cells] for half in halves]
        self.held_out = [half.held_out[cells] for half in halves]
        self._mean_profiles = [column_sums(half.seen) / half.seen.sum() for half in halves]
        self.probabilities: dict[str, list[np.ndarray]] = {}
        self.gains: dict[str, Gain] = {}

    def add(self, choice: Choice) -> None:
        """Predict and score a candidate."""
        self.probabilities[choice.label] = [
            held_out_probabilities(choice.member.predict(i, choice.setting, seen, self._numbers), held_out)
            for i, (seen, held_out) in enumerate(zip(self._seen, self.held_out, strict=True))
        ]
        first, *others = (
            held_out_gain(p, held_out, mean)
            for p, held_out, mean in zip(
                self.probabilities[choice.label], self.held_out, self._mean_profiles, strict=True
            )
        )
        self.gains[choice.label] = sum(others, first)

    def mean(self, choice: Choice) -> float:
        """Return the gain of a candidate that was added."""
        return self.gains[choice.label].mean


def _weighted(best: list[Choice], scores: _Scores) -> tuple[Choice, ...]:
    """Return the choices with their weights in the mean, those of next to none left out."""
    probabilities = np.array([np.concatenate(scores.probabilities[choice.label]) for choice in best])
    molecules = np.concatenate([held_out.data for held_out in scores.held_out])
    weights = mixture_weights(probabilities, molecules)
    kept = weights >= _LEAST_WEIGHT
    weights = weights[kept] / weights[kept].sum()
    chosen = [choice for choice, keep in zip(best, kept, strict=True) if keep]
    return tuple(
        Choice(choice.member, choice.setting, float(weight)) for choice, weight in zip(chosen, weights, strict=True)
    )


class _Prediction:
    """What the choice predicts of each held-out half, the counts mixed in once their dispersions are learned."""

    def __init__(self, choices: tuple[Choice, ...], sample: Sample) -> None:
        self._choices = choices
        self._phi_for_fold: list[np.ndarray] | None = None
        for choice in choices:
            choice.member.settle(choice.setting, sample)

    def __call__(self, i: int, seen: sp.csr_matrix, cells: np.ndarray) -> Profiles:
        """Return the profiles of cells predicted from their part of a half; of one fold once counts are mixed in."""
        weights = [choice.weight for choice in self._choices]
        profiles = combine([choice.member.predict(i, choice.setting, seen, cells) for choice in self._choices], weights)
        if self._phi_for_fold is None:
            return profiles
        return MixedProfiles.with_totals(profiles, seen, self._phi_for_fold[folds_of(cells[:1])[0]])

    def learn_dispersions(self, halves: Sequence[Half], cells: np.ndarray) -> np.ndarray:
        """Return the dispersion of each gene; a fold's own are learned from the other fold."""
        # The mean over halves, not the sum: the two directions of a split say nearly the same.
        by_fold = [
            np.mean([self._curves(i, half, cells[half.folds[cells] == fold]) for i, half in enumerate(halves)], axis=0)
            for fold in (0, 1)
        ]
        self._phi_for_fold = [dispersions(by_fold[1]), dispersions(by_fold[0])]
        return dispersions(by_fold[0] + by_fold[1])

    def together(self, cells: np.ndarray) -> list[np.ndarray]:
        """Return which of the cells are predicted together: all, or, once counts are mixed in, those of each fold."""
        if self._phi_for_fold is None:
            return [np.ones(len(cells), bool)]
        return [folds_of(cells) == fold for fold in np.unique(folds_of(cells))]

    def _curves(self, i: int, half: Half, cells: np.ndarray) -> np.ndarray:
        seen = half.seen[cells]
        return dispersion_curves(self(i, seen, half.cells[cells]), half.held_out[cells], row_sums(seen))


class _Measurement:
    """The held-out gain of a prediction and of its genes, on the cells of a sample: one pass."""

    def __init__(self, sample: Sample) -> None:
        totals = totals_of_halves(sample)
        self._sample = sample
        self._gains = GeneGains([total / total.sum() for total in totals], [totals[i ^ 1] for i in range(len(totals))])

    def __call__(self, predict: _Prediction) -> tuple[Gain, tuple[np.ndarray, np.ndarray]]:
        """Return the gain, and that of each gene with its error."""

        def of_cells(cells: np.ndarray, parts: list[sp.csr_matrix]) -> Partial:
            sums, rows = np.zeros((6, parts[0].shape[1])), np.zeros((2, len(cells)))
            for own in predict.together(cells):
                of_own = [part[own] for part in parts]
                predictions = [predict(i, seen, cells[own]) for i, seen in enumerate(of_own)]
                found = self._gains.of_cells(predictions, [of_own[i ^ 1] for i in range(len(parts))])
                sums += found.sums[0]
                rows[:, own] = found.rows
            return Partial([sums], list(rows))

        (sums,), (nats, molecules) = self._sample.run(of_cells)
        return Gain(nats, molecules), self._gains.of_genes(sums)
