"""The table of everything that is compared: settings of a method, methods, or a user's grid, by their held-out loss.

A row is one candidate. Its loss is pooled over the folds of all splits, and its standard error is that of its
difference to the least loss, paired by cell. Nothing here knows what a denoiser is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from ._jobs import Prefer, in_jobs
from ._loss import Score
from ._progress import progress_bar

Parameters = Mapping[str, Any]
Predictor = Callable[[Any], Callable[[Parameters], Any]]
Rule = Literal["least", "one_standard_error"]
COLUMNS = ("loss", "error", "gain", "seconds", "failure", "chosen")
"""Columns of the table after those of the parameters; a parameter of such a name has `param_` before it."""

_LARGEST = 1e100  # a loss whose square is still a number


class _Outcome(NamedTuple):
    """What one candidate did in one fold."""

    score: Score | None
    seconds: float = 0.0
    failure: str = ""
    blind: bool = False


@dataclass(frozen=True, eq=False)
class _Row:
    """A candidate, and what it did in each fold by (split, fold): jobs may have ended in any order."""

    parameters: Parameters
    outcomes: dict[tuple[int, int], _Outcome] = field(default_factory=dict)

    @property
    def failure(self) -> str:
        """What went wrong first, or nothing."""
        return next((self.outcomes[fold].failure for fold in sorted(self.outcomes) if self.outcomes[fold].failure), "")

    def score(self, split: int | None = None) -> Score | None:
        """Return the loss over the folds of a split, or of all; None where it failed or was not measured."""
        scores = [self.outcomes[fold].score for fold in sorted(self.outcomes) if split in (None, fold[0])]
        known = [score for score in scores if score is not None]
        return None if self.failure or not known or len(known) < len(scores) else sum(known[1:], known[0])


class Comparison:
    """Losses of candidates in the folds of one or several splits, and the choice between them.

    Rows stand in the order in which their candidates first appeared, which matters to "one_standard_error" and to
    ties: the first wins, so the simplest candidate comes first. `candidates` fixes their order beforehand.
    """

    def __init__(self, candidates: Iterable[Parameters] = ()) -> None:
        self._rows = [_Row(parameters) for parameters in candidates]

    def __len__(self) -> int:
        return len(self._rows)

    def parameters(self, row: int) -> Parameters:
        """Return the parameters of a row."""
        return self._rows[row].parameters

    def add(
        self,
        parameters: Parameters,
        score: Score | None,
        *,
        row: int | None = None,
        split: int = 0,
        fold: int = 0,
        **more: Any,
    ) -> int:
        """Take what a candidate lost in one fold, on the same cells as every other, and return its row.

        Parameters equal to earlier ones belong to the same row; `row` says which it is where they repeat or cannot be
        compared. The score is None where it failed; one that is measured again takes the place of the first. `more` is
        the rest of an outcome.
        """
        if row is None:
            row = next((i for i, known in enumerate(self._rows) if known.parameters == parameters), len(self._rows))
        if row == len(self._rows):
            self._rows.append(_Row(parameters))
        self._rows[row].outcomes[split, fold] = _Outcome(score, **more)
        return row

    def blind(self) -> list[int]:
        """Return the rows that predict even what they have seen worse than the mean profile."""
        return [i for i, row in enumerate(self._rows) if any(outcome.blind for outcome in row.outcomes.values())]

    def scores(self) -> list[Score | None]:
        """Return the loss of each row over all folds; None where it failed, or was not measured in all of them."""
        folds = {where for row in self._rows for where in row.outcomes}
        return [row.score() if row.outcomes.keys() == folds else None for row in self._rows]

    def split_losses(self) -> np.ndarray:
        """Return the loss of each row in each split, shape (rows, splits); NaN where there is none."""
        n_splits = 1 + max((split for row in self._rows for split, _ in row.outcomes), default=-1)
        scores = [[row.score(split) for split in range(n_splits)] for row in self._rows]
        return np.array([[score.mean if score and score.n_cells else np.nan for score in each] for each in scores])

    def best(self, rule: Rule = "least", *, last: bool = False) -> int:
        """Return the row of least loss, or the first (last) within one standard error of the difference to it."""
        losses, errors = self._losses()
        least = np.nanmin(losses)
        allowed = 0.0 if rule == "least" else errors
        good = np.flatnonzero(losses <= least + allowed)
        return int(good[-1 if last else 0])

    def table(self, rule: Rule = "least", *, last: bool = False, gain: bool = False) -> pd.DataFrame:
        """Return the parameters of each row and the columns of `COLUMNS`, see `best`; `gain` (-loss) where asked."""
        losses, errors = self._losses()
        values = pd.DataFrame([row.parameters for row in self._rows], dtype=object)
        # None is a value, and pandas would take it for a number that is missing.
        table = values.apply(lambda column: column if any(v is None for v in column) else column.infer_objects())
        table = table.rename(columns={name: f"param_{name}" for name in COLUMNS})
        table["loss"], table["error"] = losses, errors
        if gain:
            table["gain"] = -losses
        table["seconds"] = [sum(row.outcomes[fold].seconds for fold in sorted(row.outcomes)) for row in self._rows]
        table["failure"] = [row.failure for row in self._rows]
        table["chosen"] = np.arange(len(table)) == self.best(rule, last=last)
        return table

    def _losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each row's loss, and the standard error of its difference to the least; NaN where it failed."""
        scores = self.scores()
        done = [score for score in scores if score is not None]
        if not done:
            first = self._rows[0]
            raise ValueError(f"every candidate failed; the first, {describe(first.parameters)}: {first.failure}")
        least = min(done, key=lambda score: score.mean)
        found = [(np.nan,) * 2 if each is None else (each.mean, each.error_of_difference(least)) for each in scores]
        return tuple(np.array(found).T)


def compare(
    candidates: Sequence[Parameters],
    splits: Sequence[Sequence[Any]],
    loss: Any,
    *,
    predictor: Predictor,
    groups: Sequence[Sequence[int]],
    n_jobs: int,
    prefer: Prefer,
) -> Comparison:
    """Return what each candidate lost in each fold of each split, several at a time.

    `predictor` takes what a fold shows, and returns what predicts for each candidate's parameters. Candidates of a
    group, by number, run in one task: one fit serves them.
    """
    tasks = [
        _Task({i: candidates[i] for i in group}, fold, split, number)
        for split, folds in enumerate(splits)
        for number, fold in enumerate(folds)
        for group in groups
    ]
    comparison = Comparison(candidates)
    with progress_bar("calibrate", len(tasks)) as bar:
        while tasks:
            again: list[_Task] = []
            with closing(in_jobs(partial(_evaluate, predictor, loss), tasks, n_jobs, prefer)) as done:
                for task, found in done:
                    bar.update()
                    if isinstance(found, Exception) and len(task.candidates) > 1:
                        # which of them it was shows when each runs alone
                        again += [replace(task, candidates={i: each}) for i, each in task.candidates.items()]
                        continue
                    outcomes: dict[int, dict[str, Any]] = (
                        found
                        if isinstance(found, dict)
                        else {row: {"score": None, "failure": in_words(found)} for row in task.candidates}
                    )
                    for row, outcome in outcomes.items():
                        comparison.add(candidates[row], row=row, split=task.split, fold=task.number, **outcome)
            tasks = again
    return comparison


@dataclass(frozen=True, eq=False)
class _Task:
    """Candidates, by their row, that one fit serves; a fold, its split and its number there."""

    candidates: Mapping[int, Parameters]
    fold: Any
    split: int
    number: int


def _evaluate(predictor: Predictor, loss: Any, task: _Task) -> dict[int, dict[str, Any]]:
    """Return what `Comparison.add` takes of each candidate; whatever one does, the others go on, until an interrupt."""
    outcomes = {}
    predict = predictor(task.fold.seen)
    for row, parameters in task.candidates.items():
        outcome: dict[str, Any] = {"score": None}
        start = time.perf_counter()
        try:
            prediction = predict(parameters)
            outcome["score"] = _checked(task.fold.score(prediction, loss))
            outcome["blind"] = bool(task.fold.is_blind(prediction))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit
            outcome["failure"] = in_words(error)
        outcome["seconds"] = time.perf_counter() - start
        outcomes[row] = outcome
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


def describe(parameters: Parameters) -> str:
    """Return e.g. ``"t=3, knn=5"``."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in parameters.items()}
    return ", ".join(f"{_first_line(name, 80)}={short(value)}" for name, value in values.items())


def in_words(error: BaseException) -> str:
    """Return an error's name and the first line of its message, as a table and a file can hold it."""
    try:
        message = _first_line(str(error).strip(), 300)
    except Exception:  # it is no message's fault that there is an error
        message = ""
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def short(value: Any) -> str:
    """Return how a value is written, cut to a part of a line."""
    try:
        text = repr(value)
    except Exception:
        text = object.__repr__(value)
    return _first_line(" ".join(text[:200].split()), 80)


def _first_line(text: str, length: int) -> str:
    """Return the first line of a text, printable and cut to a length."""
    line = next(iter(text[: length + 1].splitlines()), "")
    return "".join(letter if letter.isprintable() else " " for letter in line[:length]) + "..." * (len(line) > length)
