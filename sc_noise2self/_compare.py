"""Run every candidate on every fold of every split, on as many cores as asked, and pool what they lost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from ._checks import progress_bar
from ._jobs import in_jobs
from ._loss import Score
from .methods._function import ArrayDenoiser, Denoiser, Parameters, describe, in_words
from .partitions import Loss

Rule = Literal["least", "one_standard_error"]
COLUMNS = ("loss", "error", "gain", "seconds", "failure", "chosen")
"""Of the table, after the parameters; a parameter of such a name has `param_` before it."""

_LARGEST = 1e100  # a loss whose square is still a number


def compare(
    denoiser: Denoiser | ArrayDenoiser,
    candidates: Sequence[Parameters],
    splits: Sequence[Sequence[Any]],
    loss: Loss,
    n_jobs: int,
    prefer: Literal["processes", "threads"],
) -> Comparison:
    """Return what each candidate lost in each fold of each split."""
    groups = denoiser.groups(candidates)
    tasks = [
        _Task({i: candidates[i] for i in group}, fold, (split, number))
        for split, folds in enumerate(splits)
        for number, fold in enumerate(folds)
        for group in groups
    ]
    comparison = Comparison(candidates, len(splits))
    with progress_bar("calibrate", len(tasks)) as bar:
        while tasks:
            again: list[_Task] = []
            with closing(in_jobs(partial(_evaluate, denoiser, loss), tasks, n_jobs, prefer)) as done:
                for task, outcomes in done:
                    if not isinstance(outcomes, Exception):
                        comparison.add(outcomes)
                    elif len(task.candidates) == 1:
                        (candidate,) = task.candidates
                        comparison.add([_Outcome(candidate, *task.where, failure=in_words(outcomes))])
                    else:  # which of them it was shows when each runs alone
                        again += [replace(task, candidates={i: each}) for i, each in task.candidates.items()]
                    bar.update()
            tasks = again
    return comparison


@dataclass(frozen=True, eq=False)
class _Task:
    """Candidates, by their number, that one fit serves; a fold, its split and its number there."""

    candidates: Mapping[int, Parameters]
    fold: Any
    where: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What one candidate did in one fold."""

    candidate: int
    split: int
    fold: int
    score: Score | None = None
    seconds: float = 0.0
    failure: str = ""
    blind: bool = False  # predicts what it has seen worse than the mean profile


def _evaluate(denoiser: Denoiser | ArrayDenoiser, loss: Loss, task: _Task) -> list[_Outcome]:
    """Return what the candidates of a task do. Whatever one of them does, the others go on, until an interrupt."""
    outcomes = []
    predict = denoiser.on(task.fold.seen)
    for candidate, parameters in task.candidates.items():
        score, blind, failure = None, False, ""
        start = time.perf_counter()
        try:
            rows = predict(parameters)
            score = _checked(task.fold.score(rows, loss))
            blind = bool(task.fold.is_blind(rows))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit
            failure = in_words(error)
        outcomes.append(_Outcome(candidate, *task.where, score, time.perf_counter() - start, failure, blind))
    return outcomes


def _checked(score: Any) -> Score:
    """Return a score that others can be compared with."""
    if not isinstance(score, Score):
        raise TypeError(f"the fold's score is of type {type(score).__name__}: return a sc_noise2self._loss.Score.")
    if len(score.sums) < 2:
        raise ValueError("the loss is that of one cell or value: its error takes two or more.")
    wrong = ~(np.abs(score.sums) <= _LARGEST) | ~(np.abs(score.weights) <= _LARGEST)
    if wrong.any():
        raise ValueError(f"the loss is NaN or infinite (or beyond {_LARGEST:g}) in {wrong.sum()} of {len(wrong)}.")
    return score


class Comparison:
    """What candidates did in every fold of every split, and the table of it."""

    def __init__(self, candidates: Sequence[Parameters], n_splits: int) -> None:
        self.candidates = candidates
        self.outcomes: list[list[list[_Outcome]]] = [[[] for _ in range(n_splits)] for _ in candidates]

    def add(self, outcomes: Iterable[_Outcome]) -> None:
        """Take what a task returned."""
        for outcome in outcomes:
            self.outcomes[outcome.candidate][outcome.split].append(outcome)

    def _all(self, candidate: int) -> Iterator[_Outcome]:
        for of_split in self.outcomes[candidate]:
            yield from of_split

    def failure(self, candidate: int) -> str:
        """Return what went wrong, or nothing."""
        return next((outcome.failure for outcome in self._all(candidate) if outcome.failure), "")

    def blind(self, candidate: int) -> bool:
        """Whether the candidate predicts what it has seen worse than the mean profile."""
        return any(outcome.blind for outcome in self._all(candidate))

    def score(self, candidate: int) -> Score | None:
        """Return the loss over all folds; None for a candidate that failed."""
        return None if self.failure(candidate) else _pooled(self._all(candidate))

    def split_losses(self) -> np.ndarray:
        """Return the loss of each candidate in each split, NaN where it failed."""
        return np.array(
            [
                [np.nan if self.failure(i) else _pooled(of_split).mean for of_split in of_candidate]
                for i, of_candidate in enumerate(self.outcomes)
            ]
        )

    def table(self, rule: Rule, loss: Loss) -> pd.DataFrame:
        """Return the table of `Calibration`."""
        scores = [self.score(i) for i in range(len(self.candidates))]
        done = [score for score in scores if score is not None]
        if not done:
            raise ValueError(f"every candidate failed; the first, {describe(self.candidates[0])}: {self.failure(0)}")
        if not all(_pooled(of_split).weights.sum() > 0 for of_split in self.outcomes[scores.index(done[0])]):
            raise ValueError("nothing that was hidden can be scored: the data have too few molecules to hide some.")
        least = min(done, key=lambda score: score.mean)
        losses = np.array([np.nan if score is None else score.mean for score in scores])
        errors = np.array([np.nan if score is None else score.error_of_difference(least) for score in scores])
        good = losses <= least.mean + (errors if rule == "one_standard_error" else 0)
        values = pd.DataFrame(self.candidates, dtype=object)
        # None is a value, and pandas would take it for a number that is missing.
        table = values.apply(lambda column: column if any(v is None for v in column) else column.infer_objects())
        table = table.rename(columns={name: f"param_{name}" for name in COLUMNS})
        table["loss"], table["error"] = losses, errors
        if loss == "poisson":
            table["gain"] = -losses
        table["seconds"] = [sum(outcome.seconds for outcome in self._all(i)) for i in range(len(table))]
        table["failure"] = [self.failure(i) for i in range(len(table))]
        table["chosen"] = np.arange(len(table)) == int(np.argmax(good))
        return table


def _pooled(outcomes: Iterable[_Outcome]) -> Score:
    """Return the sum of scores, in the order of splits and folds: jobs may have ended in any other."""
    ordered = sorted(outcomes, key=lambda outcome: (outcome.split, outcome.fold))
    first, *others = (outcome.score for outcome in ordered if outcome.score is not None)
    for other in others:
        first += other
    return first
