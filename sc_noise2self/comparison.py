"""Run every candidate on every fold of every split, on as many cores as asked, and pool what they lost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from joblib import Parallel, delayed

from .arguments import progress_bar
from .candidates import ArrayDenoiser, Denoiser, Parameters, describe
from .loss import Score
from .partitions import Loss

Rule = Literal["least", "one_standard_error"]
COLUMNS = ("loss", "error", "gain", "seconds", "failure", "chosen")
"""Of the table, after the parameters; a parameter of such a name has `param_` before it."""


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
    tasks = [(i, j, group) for i, folds in enumerate(splits) for j in range(len(folds)) for group in groups]
    if not all(splits):
        raise ValueError("the partition hides nothing: it has no fold.")
    comparison = Comparison(candidates, len(splits))
    with progress_bar("calibrate", len(tasks)) as bar:
        run = Parallel(n_jobs=n_jobs, prefer=prefer, return_as="generator_unordered")
        work = (delayed(_evaluate)(denoiser, splits[i][j], candidates, group, loss, (i, j)) for i, j, group in tasks)
        for outcomes in run(work):
            comparison.add(outcomes)
            bar.update()
    return comparison


@dataclass(frozen=True, eq=False)
class _Outcome:
    """What one candidate did in one fold."""

    candidate: int
    split: int
    fold: int
    score: Score | None
    seconds: float
    failure: str = ""
    blind: bool = False  # predicts what it has seen worse than the mean profile


def _evaluate(
    denoiser: Denoiser | ArrayDenoiser,
    fold: Any,
    candidates: Sequence[Parameters],
    group: Sequence[int],
    loss: Loss,
    where: tuple[int, int],
) -> list[_Outcome]:
    """Return what the candidates of a group do in a fold; `where` is its split and its number there."""
    outcomes = []
    start = time.perf_counter()
    for candidate, rows in zip(group, denoiser.predictions(fold.seen, [candidates[i] for i in group]), strict=True):
        score, blind, failure = None, False, ""
        if isinstance(rows, Exception):
            failure = f"{type(rows).__name__}: {str(rows).strip().splitlines()[0] if str(rows).strip() else ''}"
        else:
            score = fold.score(rows, loss)
            blind = fold.is_blind(rows)
        now = time.perf_counter()
        outcomes.append(_Outcome(candidate, *where, score, now - start, failure, blind))
        start = now
    return outcomes


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
        least = min(done, key=lambda score: score.mean)
        losses = np.array([np.nan if score is None else score.mean for score in scores])
        errors = np.array([np.nan if score is None else score.error_of_difference(least) for score in scores])
        good = losses <= least.mean + (errors if rule == "one_standard_error" else 0)
        table = pd.DataFrame(self.candidates).rename(columns={name: f"param_{name}" for name in COLUMNS})
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
