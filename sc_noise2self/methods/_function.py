"""Denoisers that somebody else wrote, called on counts: parameters in, denoised counts out, everything checked.

Three kinds are taken as they are: a function of a matrix, a function of an AnnData object (its first parameter is
called `adata`, as in scanpy), and an estimator with `fit(counts)` and `predict(counts)`. Parameters that `predict`
names are given to it, and one fit serves all their values.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from math import prod
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from .._counts import column_sums, row_sums
from .._transform import Transform, TransformName, rates
from ..partitions import Rows, as_numbers
from ._profiles import Profiles

_NEGATIVE = 0.1  # share of all that is negative, above which values are no expected counts
_LARGEST = 1e30  # value whose sums are still numbers in single precision
_MOST = 100_000  # candidates
_GRID = "pass a dict of lists, e.g. {'t': [1, 2, 3]}, or a list of such dicts"

Parameters = dict[str, Any]


def expand_grid(grid: Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Iterable[Any]]]) -> list[Parameters]:
    """Return every combination of a grid, in its order, the last parameter running fastest; several grids in turn.

    Raises
    ------
    ValueError, TypeError
        If the grid is empty or its values are no lists.
    """
    if not isinstance(grid, Iterable) or isinstance(grid, str | bytes):
        raise TypeError(f"grid is {_short(grid)}: {_GRID}.")
    grids = [_lists(each) for each in ([grid] if isinstance(grid, Mapping) else grid)]
    if sum(prod(map(len, each.values())) for each in grids) > _MOST:
        raise ValueError(f"grid has more than {_MOST} candidates: pass fewer values, or fewer parameters at a time.")
    out = [dict(zip(each, values, strict=True)) for each in grids for values in product(*each.values())]
    if not out:
        raise ValueError(f"grid has no candidate: {_GRID}.")
    return out


def _lists(grid: Any) -> dict[str, list[Any]]:
    """Return the values of each parameter of a grid."""
    if not isinstance(grid, Mapping):
        raise TypeError(f"grid holds {_short(grid)}: {_GRID}.")
    lists = {}
    for name, values in grid.items():
        if not isinstance(name, str):
            raise TypeError(f"grid has {_short(name)} for a parameter's name: {_GRID}.")
        try:
            if isinstance(values, str | bytes | Mapping | set | frozenset):
                raise TypeError("no list, or one without an order")
            lists[name] = list(islice(values, _MOST + 1))
        except TypeError:
            raise TypeError(
                f"grid has {name!r}: {_short(values)}: pass its values in a list, e.g. [1, 2, 3]."
            ) from None
        if not lists[name]:
            raise ValueError(f"grid has no candidate: {name!r} has no value, so pass at least one.")
    return lists


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A denoiser of counts, whatever its kind.

    Attributes
    ----------
    function
        A function or an estimator, as the user gave it.
    transform
        The scale that it works on: cells brought to the median depth and `log1p` or `sqrt`, or `none`, the counts.
    cells, genes
        Names that an AnnData object is given, and that a table returned must have.
    """

    function: Any
    transform: TransformName
    cells: pd.Index
    genes: pd.Index

    def __post_init__(self) -> None:
        if isinstance(self.function, type):
            name = self.function.__name__
            raise TypeError(f"denoiser is the class {name}: pass an object, e.g. {name}().")
        if not callable(self.function) and not self.is_estimator:
            raise TypeError(
                f"denoiser is of type {type(self.function).__name__}: pass a function of counts, or an object with "
                "`fit` and `predict`."
            )
        if self.is_estimator and self.transform != "none":
            raise ValueError(f"transform={self.transform!r} was given with an estimator: estimators take counts.")

    @property
    def name(self) -> str:
        """Of the function or the estimator's class."""
        return _name(self.function)

    @property
    def is_estimator(self) -> bool:
        """Whether it is fitted and predicts."""
        return hasattr(self.function, "fit") and hasattr(self.function, "predict")

    @property
    def takes_anndata(self) -> bool:
        """Whether it is a function of an AnnData object."""
        try:
            first = next(iter(inspect.signature(self.function).parameters), "")
        except (TypeError, ValueError):  # a built-in tells no signature
            return False
        return first == "adata"

    def groups(self, candidates: Sequence[Parameters]) -> list[list[int]]:
        """Return the candidates that one fit serves, as lists of their indices.

        Raises
        ------
        ValueError
            If one has a parameter that the denoiser does not take, or lacks one that it needs.
        """
        if not self.is_estimator:
            return _each_alone(self.function, self.name, candidates)
        groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for i, parameters in enumerate(candidates):
            fitted, _ = self._divide(parameters)
            key = tuple((name, id(value)) for name, value in fitted.items())  # values of a grid are the same objects
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def on(self, counts: sp.csr_matrix) -> Callable[[Parameters], Rows]:
        """Return what gives the denoised counts of each candidate of a group."""
        if not self.is_estimator:
            return partial(self._call, counts)
        fitted: Any = None

        def predict(parameters: Parameters) -> Rows:
            nonlocal fitted
            of_fit, of_predict = self._divide(parameters)
            given = counts.copy()
            if fitted is None:
                estimator = copy.deepcopy(self.function)  # what it holds is no other candidate's
                for name, value in of_fit.items():
                    setattr(estimator, name, value)
                found = estimator.fit(given)
                if not hasattr(found, "predict"):
                    raise TypeError(f"fit of {self.name} returned {type(found).__name__}: return self.")
                self._check_unchanged(counts, given)
                fitted = found
            predicted = fitted.predict(given, **of_predict)
            self._check_unchanged(counts, given)
            return self._rows(predicted, counts.shape)

        return predict

    def refit(self, counts: sp.csr_matrix, parameters: Parameters) -> np.ndarray:
        """Return expected counts at each cell's own depth, from all counts, dense float32 of shape (cells, genes).

        A cell of which nothing was predicted gets the mean profile, as where it was scored.
        """
        rows = self.on(counts)(parameters)
        out = np.maximum(rows[np.arange(counts.shape[0])], 0).astype(np.float32)
        total = out.sum(axis=1, dtype=np.float64)
        out[total == 0] = column_sums(counts)
        total[total == 0] = counts.sum(dtype=np.float64)
        out *= (row_sums(counts) / total).astype(np.float32)[:, None]
        return out

    def _divide(self, parameters: Parameters) -> tuple[Parameters, Parameters]:
        """Return the parameters of the estimator, and those of `predict`."""
        of_predict = set(list(inspect.signature(self.function.predict).parameters)[1:])
        own = set(inspect.signature(type(self.function)).parameters)
        if unknown := set(parameters) - of_predict - own:
            known = ", ".join(sorted(own | of_predict))
            raise ValueError(f"{self.name} has no parameter {', '.join(sorted(unknown))}: it takes {known}.")
        return (
            {name: value for name, value in parameters.items() if name not in of_predict},
            {name: value for name, value in parameters.items() if name in of_predict},
        )

    def _call(self, counts: sp.csr_matrix, parameters: Parameters) -> Rows:
        size = row_sums(counts)
        transform = None
        given = counts.copy()
        if self.transform != "none":
            transform = Transform(self.transform, float(np.median(size[size > 0])))
            given = transform.apply(given, size)
        before = given.copy()
        if self.takes_anndata:
            adata = AnnData(given, obs=pd.DataFrame(index=self.cells), var=pd.DataFrame(index=self.genes))
            returned = self.function(adata, **parameters)
            out = adata if returned is None else returned
            if returned is None and adata.X is given and _same(before, given):
                raise ValueError(f"{self.name} left adata.X as it was: write the denoised values to X, or return them.")
        else:
            out = self.function(given, **parameters)
            if out is given:
                raise ValueError(
                    f"{self.name} returned the matrix that it was given: return denoised values in a new one."
                )
            self._check_unchanged(before, given)
        rows = self._rows(out, counts.shape)
        if transform is None:
            return rows
        own_depth = transform.own_depth(size)
        return _Lazy(lambda cells: rates(transform.name, rows[cells] * own_depth[cells, None]))

    def _check_unchanged(self, before: sp.csr_matrix, after: sp.csr_matrix) -> None:
        if not _same(before, after):
            raise ValueError(f"{self.name} changed the matrix that it was given: let it work on a copy, counts.copy().")

    def _rows(self, out: Any, shape: tuple[int, int]) -> Rows:
        """Return the rows of what a denoiser returned, checked."""
        if isinstance(out, AnnData):
            self._check_names(out.obs_names, out.var_names)
            out = out.X
        if isinstance(out, pd.DataFrame):
            self._check_names(out.index, out.columns)
            out = out.to_numpy()
        if not (isinstance(out, np.ndarray | Profiles) or sp.issparse(out)):
            raise TypeError(
                f"{self.name} returned {type(out).__name__}: return denoised values of shape (cells, genes), an array, "
                "a sparse matrix, a DataFrame or an AnnData object."
            )
        if out.shape != shape:
            hint = " (they seem transposed)" if out.shape == shape[::-1] else ""
            raise ValueError(
                f"{self.name} returned shape {out.shape}{hint}: cells x genes are {shape[0]} x {shape[1]}."
            )
        if isinstance(out, Profiles):
            return _Lazy(out.counts)
        if sp.issparse(out):
            out = sp.csr_matrix(out)
            values = as_numbers(out.data, f"{self.name} returned")
        else:
            values = out = as_numbers(out, f"{self.name} returned")
        _check_finite(values, self.name)
        negative = -values[values < 0].sum(dtype=np.float64) / max(np.abs(values).sum(dtype=np.float64), 1e-300)
        if negative > _NEGATIVE:
            raise ValueError(
                f"{self.name} returned values of which {negative:.0%} are negative: return expected values of what it "
                "was given, neither centred nor scaled."
            )
        return _Lazy(lambda cells: out[cells].toarray()) if sp.issparse(out) else out

    def _check_names(self, cells: pd.Index, genes: pd.Index) -> None:
        for what, found, wanted in (("cells", cells, self.cells), ("genes", genes, self.genes)):
            if isinstance(found, pd.RangeIndex):  # a table without names
                continue
            if len(found) == len(wanted) and not np.array_equal(found.astype(str), wanted.astype(str)):
                raise ValueError(f"{self.name} returned {what} in another order, or others, than it was given.")


@dataclass(frozen=True, eq=False)
class _Lazy:
    """Rows that are computed when they are asked for."""

    rows: Callable[[np.ndarray], np.ndarray]

    def __getitem__(self, cells: np.ndarray) -> np.ndarray:
        return self.rows(cells)


@dataclass(frozen=True, eq=False)
class ArrayDenoiser:
    """A denoiser of arrays, such as images: a function of an array that returns one of the same shape."""

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"denoiser is of type {type(self.function).__name__}: pass a function of an array.")

    @property
    def name(self) -> str:
        """Of the function."""
        return _name(self.function)

    def groups(self, candidates: Sequence[Parameters]) -> list[list[int]]:
        """Return the candidates that one fit serves: each is its own."""
        return _each_alone(self.function, self.name, candidates)

    def on(self, array: np.ndarray) -> Callable[[Parameters], np.ndarray]:
        """Return what gives the denoised array of each candidate."""
        return partial(self.refit, array)

    def refit(self, array: np.ndarray, parameters: Parameters) -> np.ndarray:
        """Return the denoised array.

        Raises
        ------
        ValueError
            If it has another shape, holds NaN, or the function changed what it was given.
        """
        given = array.copy()
        out = as_numbers(self.function(given, **parameters), f"{self.name} returned")
        if out.shape != array.shape:
            raise ValueError(f"{self.name} returned shape {out.shape} for shape {array.shape}.")
        if not np.array_equal(given, array):
            raise ValueError(f"{self.name} changed the array that it was given: let it work on a copy.")
        _check_finite(out, self.name)
        return out


def describe(parameters: Parameters) -> str:
    """Return e.g. ``"t=3, knn=5"``."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in parameters.items()}
    return ", ".join(f"{''.join(_first_line(name, 80))}={_short(value)}" for name, value in values.items())


def in_words(error: BaseException) -> str:
    """Return an error's name and the first line of its message, as a table and a file can hold it."""
    try:
        message = str(error).strip()
    except Exception:  # it is no message's fault that there is an error
        message = ""
    return ": ".join([type(error).__name__, *_first_line(message, 300)])


def _short(value: Any) -> str:
    """Return how a value is written, cut to a part of a line."""
    try:
        text = repr(value)
    except Exception:
        text = object.__repr__(value)
    return "".join(_first_line(" ".join(text[:200].split()), 80))


def _first_line(text: str, length: int) -> list[str]:
    """Return the first line of a text, printable and cut to a length; nothing of a text that is empty."""
    lines = text[: length + 1].splitlines()[:1]
    return [
        "".join(letter if letter.isprintable() else " " for letter in line[:length]) + "..." * (len(line) > length)
        for line in lines
    ]


def _each_alone(function: Callable[..., Any], name: str, candidates: Sequence[Parameters]) -> list[list[int]]:
    """Return each candidate as a group, where the function can be called with it."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # a built-in tells no signature
        return [[i] for i in range(len(candidates))]
    for parameters in candidates:
        try:
            signature.bind(None, **parameters)
        except TypeError as error:
            takes = ", ".join(list(signature.parameters)[1:]) or "none"
            raise ValueError(
                f"{name} cannot be called with the parameters {describe(parameters) or 'of an empty grid'}: {error}; "
                f"it takes {takes}."
            ) from None
    return [[i] for i in range(len(candidates))]


def _check_finite(values: np.ndarray, name: str) -> None:
    if values.size and not (float(values.max()) <= _LARGEST and float(values.min()) >= -_LARGEST):
        raise ValueError(f"{name} returned NaN or infinite values, or values beyond {_LARGEST:g}.")


def _same(first: sp.csr_matrix, second: sp.csr_matrix) -> bool:
    return all(np.array_equal(getattr(first, part), getattr(second, part)) for part in ("data", "indices", "indptr"))


def _name(function: Any) -> str:
    function = getattr(function, "func", function)  # what a partial holds
    return getattr(function, "__qualname__", type(function).__name__)
