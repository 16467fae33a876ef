"""Choose a denoiser, or the weights of several, by the gain on held-out molecules.

Candidates are compared in the one currency that needs neither transform nor depth (`sc_noise2self.loss`), each
learned from one half of the molecules and scored on the other, in both directions. What is learned from held-out
molecules, such as the worth of a component, comes from half the cells and is used on the other half: no cell's
held-out molecules are in its own prediction. (Without that, components of pure noise seem to gain a little.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .chunks import Chunks, Survey
from .counts import column_sums, row_sums
from .denoisers.members import Half, MeanMember, Member
from .denoisers.mixing import dispersion_curves, dispersions
from .denoisers.pca import folds_of
from .denoisers.profiles import LowRankProfiles, MixedProfiles, Profiles, WeightedProfiles
from .loss import Gain, GeneGains, held_out_gain, held_out_probabilities
from .random import as_key
from .split import halves as even_split

_SCORED = 20_000_000  # dense entries scored per candidate: as many cells, drawn at random, as have so many
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
        The gain of the choice in each gene.
    """

    gains: dict[str, Gain]
    choices: tuple[Choice, ...]
    gain: Gain
    unmixed_gain: Gain
    phi: np.ndarray | None
    beats_mean: bool
    gene_gains: GeneGains

    def refit(self, survey: Survey, rng: np.random.Generator) -> tuple[LowRankProfiles, ...]:
        """Return the profiles of each choice, fitted to all molecules."""
        return tuple(choice.member.refit(survey, choice.setting, rng) for choice in self.choices)


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
    for member in members:
        member.prepare(counts, cells, rng)
        on_step()
    n_cells, n_genes = counts.shape
    folds = folds_of(cells)
    scored, dispersed = (
        np.sort(rng.choice(n_cells, min(n_cells, max(2, entries // n_genes)), replace=False))
        for entries in (_SCORED, _DISPERSION)
    )
    halves: list[Half] = []
    keys = [as_key(rng) for _ in range(n_splits)]
    for key in keys:
        first, second = even_split(counts, key, cells)
        for half in (Half(first, second, folds, cells), Half(second, first, folds, cells)):
            halves.append(half)
            for member in members:
                member.learn(half, rng)
                on_step()
    del counts  # their halves are all that is needed from here
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
    predict = _Prediction(choices, halves)
    unmixed = predict.gain(scores)
    beats_mean = unmixed.mean > 2 * unmixed.error
    if not beats_mean:
        choices = (Choice(MeanMember(), "as it is", 1.0),)
        for half in halves:
            choices[0].member.learn(half, rng)
        predict = _Prediction(choices, halves)
    gain, phi = unmixed, None
    if mix:
        phi = predict.learn_dispersions(dispersed)
        gain = predict.gain(scores)
    return Selection(scores.gains, choices, gain, unmixed, phi, beats_mean, predict.gene_gains(scored))


def n_steps(members: Sequence[Member], average: bool, n_splits: int) -> int:
    """Return how often `select` calls `on_step`; members that compete, not averaged, have as many settings each."""
    # The one setting of some members is not known before they are prepared.
    tuned = [max(1, len(member.settings)) - 1 for member in (members if average else members[:1])]
    return (2 * n_splits + 2) * len(members) + sum(tuned)


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
        self.cells = cells
        self.held_out = [half.held_out[cells] for half in halves]
        self.mean_profiles = [column_sums(half.seen) / half.seen.sum() for half in halves]
        self.probabilities: dict[str, list[np.ndarray]] = {}
        self.gains: dict[str, Gain] = {}

    def add(self, choice: Choice) -> None:
        """Predict and score a candidate."""
        self.probabilities[choice.label] = [
            held_out_probabilities(choice.member.predict(i, choice.setting, self.cells), held_out)
            for i, held_out in enumerate(self.held_out)
        ]
        self.gains[choice.label] = self.gain(self.probabilities[choice.label])

    def mean(self, choice: Choice) -> float:
        """Return the gain of a candidate that was added."""
        return self.gains[choice.label].mean

    def gain(self, probabilities: list[np.ndarray]) -> Gain:
        """Return the gain pooled over halves."""
        first, *others = (
            held_out_gain(p, held_out, mean)
            for p, held_out, mean in zip(probabilities, self.held_out, self.mean_profiles, strict=True)
        )
        for other in others:
            first += other
        return first


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

    def __init__(self, choices: tuple[Choice, ...], halves: list[Half]) -> None:
        self._choices = choices
        self._halves = halves
        self._folds = halves[0].folds
        self._mean_profiles = [column_sums(half.seen) / half.seen.sum() for half in halves]
        self._phi_for_fold: list[np.ndarray] | None = None

    def __call__(self, i: int, cells: np.ndarray) -> Profiles:
        """Return the profiles of cells predicted from a half; all of one fold once counts are mixed in."""
        weights = [choice.weight for choice in self._choices]
        profiles = combine([choice.member.predict(i, choice.setting, cells) for choice in self._choices], weights)
        if self._phi_for_fold is None:
            return profiles
        return MixedProfiles.with_totals(
            profiles, self._halves[i].seen[cells], self._phi_for_fold[self._folds[cells[0]]]
        )

    def learn_dispersions(self, cells: np.ndarray) -> np.ndarray:
        """Return the dispersion of each gene; a fold's own are learned from the other fold."""
        # The mean over halves, not the sum: the two directions of a split say nearly the same.
        by_fold = [
            np.mean([_curves(self(i, own), half, own) for i, half in enumerate(self._halves)], axis=0)
            for own in (cells[self._folds[cells] == fold] for fold in (0, 1))
        ]
        self._phi_for_fold = [dispersions(by_fold[1]), dispersions(by_fold[0])]
        return dispersions(by_fold[0] + by_fold[1])

    def gain(self, scores: _Scores) -> Gain:
        """Return the gain on the cells of `scores`."""
        probabilities = [np.empty(held_out.nnz) for held_out in scores.held_out]
        for own in self._together(scores.cells):
            for i, half in enumerate(self._halves):
                entries = np.repeat(own, np.diff(scores.held_out[i].indptr))
                cells = scores.cells[own]
                probabilities[i][entries] = held_out_probabilities(self(i, cells), half.held_out[cells])
        return scores.gain(probabilities)

    def gene_gains(self, cells: np.ndarray) -> GeneGains:
        """Return the gain of each gene on these cells."""
        out = GeneGains(self._halves[0].seen.shape[1])
        for own in self._together(cells):
            of_fold = cells[own]
            held_out = [half.held_out[of_fold] for half in self._halves]
            out.add([self(i, of_fold) for i in range(len(self._halves))], held_out, self._mean_profiles)
        return out

    def _together(self, cells: np.ndarray) -> Iterator[np.ndarray]:
        """Yield which of the cells are predicted together: all, or, once counts are mixed in, those of each fold."""
        if self._phi_for_fold is None:
            yield np.ones(len(cells), bool)
            return
        for fold in np.unique(self._folds[cells]):
            yield self._folds[cells] == fold


def _curves(profiles: Profiles, half: Half, cells: np.ndarray) -> np.ndarray:
    return dispersion_curves(profiles, half.held_out[cells], row_sums(half.seen[cells]))
