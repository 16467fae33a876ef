"""Denoisers that somebody else wrote, called on counts: parameters in, denoised counts out, everything checked.

Three kinds are taken as they are: a function of a matrix, a function of an AnnData object (its first parameter is
called `adata`, as in scanpy), and an estimator with `fit(counts)` and `predict(counts)`. Parameters that `predict`
names are given to it, and one fit serves all their values. A function of an array serves other data, such as images.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, ClassVar, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from .._blocks import Counts
from .._checks import check_one_of
from .._compare import Parameters, describe
from .._counts import depth_of, row_sums
from .._transform import Transform, TransformName, rates
from ..partitions import LazyRows, Rows, as_numbers
from ._base import Method
from ._profiles import Profiles, TableProfiles

_NEGATIVE = 0.1  # share of all that is negative, above which values are no expected counts
_LARGEST = 1e30  # value whose sums are still numbers in single precision


@dataclass(frozen=True)
class Function(Method):
    """Any function or estimator as a denoiser.

    Parameters
    ----------
    function
        `function(counts, **parameters)` returns denoised counts: a function of a CSR matrix; a function of an
        AnnData object, recognised by its first parameter's name, `adata`, that writes to `X` or returns; or an
        object with `fit(counts)` and `predict(counts)`, whose parameters are set before it is fitted, or are given
        to `predict` where it names them. Each cell may be on a scale of its own; negative values count as 0.
    transform
        The scale on which a function works. `"log1p"` and `"sqrt"`: it is given cells at the median depth,
        transformed, and what it returns is taken back. `"none"`: counts.
    parameters
        Parameters that are passed to it.

    Raises
    ------
    TypeError, ValueError
        If it is no function or estimator, or does not take the transform or a parameter.
    """

    function: Any
    _: KW_ONLY
    transform: TransformName = "none"
    parameters: Mapping[str, Any] = field(default_factory=dict, hash=False)

    name: ClassVar[str] = "function"
    title: ClassVar[str] = "a function"
    has_factors: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.function, type):
            name = self.function.__name__
            raise TypeError(f"denoiser is the class {name}: pass an object, e.g. {name}().")
        if not callable(self.function) and not self.is_estimator:
            raise TypeError(
                f"denoiser is of type {type(self.function).__name__}: pass a function of counts, or an object with "
                "`fit` and `predict`."
            )
        check_one_of("transform", self.transform, get_args(TransformName))
        if self.is_estimator and self.transform != "none":
            raise ValueError(f"transform={self.transform!r} was given with an estimator: estimators take counts.")
        if not isinstance(self.parameters, Mapping):
            raise TypeError(f"parameters is {self.parameters!r}: pass a dictionary, with values by name.")

    @property
    def label(self) -> str:
        """Name of the function, or of the estimator's class."""
        function = getattr(self.function, "func", self.function)  # what a partial holds
        return getattr(function, "__qualname__", type(function).__name__)

    @property
    def is_estimator(self) -> bool:
        """Whether it is fitted and predicts."""
        return hasattr(self.function, "fit") and hasattr(self.function, "predict")

    def groups(self, candidates: Sequence[Parameters]) -> list[list[int]]:
        """Return the candidates that one fit serves, by number; raise where a parameter is not taken, or is missing."""
        every = [{**self.parameters, **candidate} for candidate in candidates]
        if not self.is_estimator:
            self._check_signature(every)
            return [[i] for i in range(len(every))]
        groups: dict[Any, list[int]] = {}
        for i, parameters in enumerate(every):
            fitted, _ = self.divided(parameters)
            key = tuple((name, id(value)) for name, value in fitted.items())  # values of a grid are the same objects
            groups.setdefault(key, []).append(i)
        return list(groups.values())

    def on(self, values: sp.csr_matrix | np.ndarray, about: Counts | None) -> Callable[[Parameters], Any]:
        """Return what gives checked, non-negative rows for each candidate of a group; of an array, a checked array."""
        if isinstance(values, np.ndarray):
            return partial(self._of_array, values)
        assert about is not None  # counts of cells and genes
        return _Fit(self, values, about) if self.is_estimator else partial(self._of_counts, values, about)

    def denoise_counts(self, counts: Counts, rng: np.random.Generator) -> TableProfiles:
        """Return what the function returns, as expected counts; its own randomness is its own affair."""
        self.groups([{}])
        rows = self.on(counts.in_memory(), counts)({})
        return TableProfiles.of(rows, counts.size, counts.totals / counts.totals.sum()).scaled()

    def described(self, setting: Any) -> str:
        return f"the function {self.label}"

    def _check_signature(self, candidates: Sequence[Parameters]) -> None:
        signature = _signature(self.function, follow_wrapped=False)
        for parameters in candidates:
            try:
                signature.bind(None, **parameters)
            except TypeError as error:
                takes = ", ".join(list(signature.parameters)[1:]) or "none"
                raise ValueError(
                    f"{self.label} cannot be called with the parameters {describe(parameters) or 'of an empty grid'}: "
                    f"{error}; it takes {takes}."
                ) from None

    def divided(self, parameters: Parameters) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the parameters of the estimator, and those of `predict`."""
        of_predict = set(list(inspect.signature(self.function.predict).parameters)[1:])
        own = getattr(self.function, "get_params", lambda: inspect.signature(type(self.function)).parameters)()
        known = of_predict.union(own)
        if unknown := set(parameters) - known:
            raise ValueError(
                f"{self.label} has no parameter {', '.join(sorted(unknown))}: it takes {', '.join(sorted(known))}."
            )
        given = {name: parameters[name] for name in parameters if name in of_predict}
        return {name: parameters[name] for name in parameters if name not in given}, given

    def _of_counts(self, counts: sp.csr_matrix, about: Counts, parameters: Parameters) -> Rows:
        size, given = row_sums(counts), counts.copy()
        transform = None
        if self.transform != "none":
            transform = Transform(self.transform, depth_of(size))
            given = transform.apply(given, size)
        before, parameters, name = given.copy(), {**self.parameters, **parameters}, self.label
        if next(iter(_signature(self.function).parameters), "") == "adata":
            adata = AnnData(given, obs=pd.DataFrame(index=about.cell_names), var=pd.DataFrame(index=about.gene_names))
            out = self.function(adata, **parameters)
            if out is None and adata.X is given and _same(before, given):
                raise ValueError(f"{name} left adata.X as it was: write the denoised values to X, or return them.")
            out = adata if out is None else out
        else:
            out = self.function(given, **parameters)
            if out is given:
                raise ValueError(f"{name} returned the matrix that it was given: return denoised values in a new one.")
            _check_unchanged(before, given, name)
        rows = checked_rows(out, name, about)
        if transform is None:
            return rows
        own_depth = transform.own_depth(size)
        return LazyRows(lambda cells: rates(transform.name, rows[cells] * own_depth[cells, None]))

    def _of_array(self, array: np.ndarray, parameters: Parameters) -> np.ndarray:
        given = array.copy()
        out = as_numbers(self.function(given, **{**self.parameters, **parameters}), f"{self.label} returned")
        if out.shape != array.shape:
            raise ValueError(f"{self.label} returned shape {out.shape} for shape {array.shape}.")
        if not np.array_equal(given, array):
            raise ValueError(f"{self.label} changed the array that it was given: let it work on a copy.")
        _check_finite(out, self.label)
        return out


@dataclass(eq=False)
class _Fit:
    """An estimator that is fitted when the first prediction is asked for, and serves every one of its group."""

    function: Function
    counts: sp.csr_matrix
    about: Counts
    fitted: Any = None

    def __call__(self, parameters: Parameters) -> Rows:
        """Return the rows predicted with these parameters."""
        name, given = self.function.label, self.counts.copy()
        of_fit, of_predict = self.function.divided({**self.function.parameters, **parameters})
        if self.fitted is None:
            estimator = copy.deepcopy(self.function.function)  # what it holds is no other candidate's
            if hasattr(estimator, "set_params"):  # scikit-learn's, which may be several in one
                estimator.set_params(**of_fit)
            else:
                for each, value in of_fit.items():
                    setattr(estimator, each, value)
            fitted = estimator.fit(given)
            if not hasattr(fitted, "predict"):
                raise TypeError(f"fit of {name} returned {type(fitted).__name__}: return self.")
            _check_unchanged(self.counts, given, name)
            self.fitted = fitted
        predicted = self.fitted.predict(given, **of_predict)
        _check_unchanged(self.counts, given, name)
        return checked_rows(predicted, name, self.about)


def checked_rows(out: Any, name: str, about: Counts) -> Rows:
    """Return the rows of what a denoiser of this name returned, below 0 as 0; raise if they are no expected counts."""
    shape = len(about.cell_names), len(about.gene_names)
    if isinstance(out, AnnData):
        _check_names(out.obs_names, out.var_names, name, about)
        out = out.X
    if isinstance(out, pd.DataFrame):
        _check_names(out.index, out.columns, name, about)
        out = out.to_numpy()
    if not (isinstance(out, np.ndarray | Profiles) or sp.issparse(out)):
        raise TypeError(
            f"{name} returned {type(out).__name__}: return denoised values of shape (cells, genes), an array, "
            "a sparse matrix, a DataFrame or an AnnData object."
        )
    if out.shape != shape:
        hint = " (they seem transposed)" if out.shape == shape[::-1] else ""
        raise ValueError(f"{name} returned shape {out.shape}{hint}: cells x genes are {shape[0]} x {shape[1]}.")
    if isinstance(out, Profiles):
        return LazyRows(out.counts)
    out = sp.csr_matrix(out) if sp.issparse(out) else as_numbers(out, f"{name} returned")
    values = as_numbers(out.data, f"{name} returned") if sp.issparse(out) else out
    _check_finite(values, name)
    negative = -values[values < 0].sum(dtype=np.float64) / max(np.abs(values).sum(dtype=np.float64), 1e-300)
    if negative > _NEGATIVE:
        raise ValueError(
            f"{name} returned values of which {negative:.0%} are negative: return expected values of what it "
            "was given, neither centred nor scaled."
        )
    return LazyRows(lambda cells: np.maximum(out[cells].toarray() if sp.issparse(out) else out[cells], 0))


def _signature(function: Any, follow_wrapped: bool = True) -> inspect.Signature:
    """Return the signature of a function; a built-in tells none, and takes anything."""
    try:
        return inspect.signature(function, follow_wrapped=follow_wrapped)
    except (TypeError, ValueError):
        return inspect.signature(lambda *args, **parameters: None)


def _check_names(cells: pd.Index, genes: pd.Index, name: str, about: Counts) -> None:
    for what, found, wanted in (("cells", cells, about.cell_names), ("genes", genes, about.gene_names)):
        has_names = not isinstance(found, pd.RangeIndex)
        if has_names and len(found) == len(wanted) and not np.array_equal(found.astype(str), wanted.astype(str)):
            raise ValueError(f"{name} returned {what} in another order, or others, than it was given.")


def _check_finite(values: np.ndarray, name: str) -> None:
    if values.size and not (float(values.max()) <= _LARGEST and float(values.min()) >= -_LARGEST):
        raise ValueError(f"{name} returned NaN or infinite values, or values beyond {_LARGEST:g}.")


def _check_unchanged(before: sp.csr_matrix, after: sp.csr_matrix, name: str) -> None:
    if not _same(before, after):
        raise ValueError(f"{name} changed the matrix that it was given: let it work on a copy, counts.copy().")


def _same(first: sp.csr_matrix, second: sp.csr_matrix) -> bool:
    return all(np.array_equal(getattr(first, part), getattr(second, part)) for part in ("data", "indices", "indptr"))
