"""Denoisers that somebody else wrote, called on counts: parameters in, denoised counts out, everything checked.

Three kinds are taken as they are: a function of a matrix, a function of an AnnData object (its first parameter is
called `adata`, as in scanpy), and an estimator with `fit(counts)` and `predict(counts)`. Parameters that `predict`
names are given to it, and one fit serves all their values.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from .counts import row_sums
from .denoisers.profiles import Profiles
from .partitions import Rows
from .transform import Transform, TransformName, rates

_NEGATIVE = 0.1  # share of all that is negative, above which values are no expected counts

Parameters = dict[str, Any]


def expand_grid(grid: Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Iterable[Any]]]) -> list[Parameters]:
    """Return every combination of a grid, in its order, the last parameter running fastest; several grids in turn.

    Raises
    ------
    ValueError, TypeError
        If the grid is empty or its values are no lists.
    """
    grids = [grid] if isinstance(grid, Mapping) else list(grid)
    out: list[Parameters] = []
    for each in grids:
        if not isinstance(each, Mapping):
            raise TypeError(
                f"grid holds {each!r}: pass a dict of lists, e.g. {{'t': [1, 2, 3]}}, or a list of such dicts."
            )
        for name, values in each.items():
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise TypeError(f"grid has {name!r}: {values!r}: pass its values in a list, e.g. [{values!r}].")
        lists = {name: list(values) for name, values in each.items()}
        out += [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    if not out:
        raise ValueError("grid has no candidate: pass at least one value of each parameter.")
    return out


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
        """Return the candidates that one fit serves, as lists of their indices."""
        if not self.is_estimator:
            return [[i] for i in range(len(candidates))]
        groups: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for i, parameters in enumerate(candidates):
            fitted, _ = self._divide(parameters)
            key = tuple((name, id(value)) for name, value in fitted.items())  # values of a grid are the same objects
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def predictions(self, counts: sp.csr_matrix, candidates: Sequence[Parameters]) -> Iterator[Rows | Exception]:
        """Yield the denoised counts of each candidate of a group, or what went wrong."""
        fitted = None
        for parameters in candidates:
            try:
                if not self.is_estimator:
                    yield self._call(counts, parameters)
                    continue
                of_fit, of_predict = self._divide(parameters)
                given = counts.copy()
                if fitted is None:
                    estimator = copy.copy(self.function)
                    for name, value in of_fit.items():
                        setattr(estimator, name, value)
                    fitted = estimator.fit(given)
                predicted = fitted.predict(given, **of_predict)
                self._check_unchanged(counts, given)
                yield self._rows(predicted, counts.shape)
            except Exception as error:  # whatever a candidate does, the others go on
                yield error

    def refit(self, counts: sp.csr_matrix, parameters: Parameters) -> np.ndarray:
        """Return expected counts at each cell's own depth, from all counts, dense float32 of shape (cells, genes)."""
        (rows,) = self.predictions(counts, [parameters])
        if isinstance(rows, Exception):
            raise rows
        out = np.maximum(rows[np.arange(counts.shape[0])], 0).astype(np.float32)
        total = out.sum(axis=1, dtype=np.float64)
        out *= np.where(total > 0, row_sums(counts) / np.where(total > 0, total, 1), 0).astype(np.float32)[:, None]
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
        if isinstance(out, np.matrix):
            out = np.asarray(out)
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
        values = out.data if sp.issparse(out) else out
        if values.dtype.kind not in "buif":
            raise TypeError(f"{self.name} returned values of type {values.dtype}: denoised values are numbers.")
        if not np.isfinite(values).all():
            raise ValueError(f"{self.name} returned NaN or infinite values.")
        negative = -values[values < 0].sum(dtype=np.float64) / max(np.abs(values).sum(dtype=np.float64), 1e-300)
        if negative > _NEGATIVE:
            raise ValueError(
                f"{self.name} returned values of which {negative:.0%} are negative: return expected values of what it "
                "was given, neither centred nor scaled."
            )
        if sp.issparse(out):
            out = sp.csr_matrix(out)
            return _Lazy(lambda cells: out[cells].toarray())
        return out

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
        return [[i] for i in range(len(candidates))]

    def predictions(self, array: np.ndarray, candidates: Sequence[Parameters]) -> Iterator[np.ndarray | Exception]:
        """Yield the denoised array of each candidate, or what went wrong."""
        for parameters in candidates:
            try:
                yield self.refit(array, parameters)
            except Exception as error:  # whatever a candidate does, the others go on
                yield error

    def refit(self, array: np.ndarray, parameters: Parameters) -> np.ndarray:
        """Return the denoised array.

        Raises
        ------
        ValueError
            If it has another shape, holds NaN, or the function changed what it was given.
        """
        given = array.copy()
        out = np.asarray(self.function(given, **parameters))
        if out.shape != array.shape:
            raise ValueError(f"{self.name} returned shape {out.shape} for shape {array.shape}.")
        if not np.array_equal(given, array):
            raise ValueError(f"{self.name} changed the array that it was given: let it work on a copy.")
        if not np.isfinite(out).all():
            raise ValueError(f"{self.name} returned NaN or infinite values.")
        return out


def describe(parameters: Parameters) -> str:
    """Return e.g. ``"t=3, knn=5"``."""
    values = {name: value.item() if isinstance(value, np.generic) else value for name, value in parameters.items()}
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _same(first: sp.csr_matrix, second: sp.csr_matrix) -> bool:
    return all(np.array_equal(getattr(first, part), getattr(second, part)) for part in ("data", "indices", "indptr"))


def _name(function: Any) -> str:
    function = getattr(function, "func", function)  # what a partial holds
    return getattr(function, "__qualname__", type(function).__name__)
