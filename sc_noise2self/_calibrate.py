"""Choose any denoiser's hyperparameter by the loss on data that were hidden from it: `calibrate`.

Noise2Self (Batson & Royer 2019), section 3: whatever the denoiser, its loss on hidden data is its error against the
truth plus a constant, so the parameter of least loss is the one of least error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from html import escape
from itertools import islice, product
from math import isnan, prod
from numbers import Number, Real
from typing import Any, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

from ._anndata import read_csr, read_labels
from ._blocks import Counts
from ._checks import as_whole, check_flag, check_one_of, describe_counts, seed_of
from ._choose import denoised
from ._compare import Parameters, Rule, compare, describe, in_words, short
from ._counts import SINGLE, check_counts, column_sums, row_sums
from ._jobs import Prefer, as_n_jobs
from ._loss import Loss
from ._random import RandomState, as_generator
from ._result import plain_table
from ._slots import check_key, committed, marked, owned
from ._transform import TransformName
from ._warnings import warn
from .methods import as_methods
from .methods._base import Method
from .methods._function import Function, checked_rows
from .methods._profiles import TableProfiles
from .partitions import Masks, Rows, as_numbers, as_partition, check_loss, folds_of

_MOST = 100_000  # candidates
_GRID = "pass a dict of lists, e.g. {'t': [1, 2, 3]}, or a list of such dicts"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` found: the parameters chosen, and how all candidates did.

    A row of `table` is a candidate, in the order of the grid: its parameters (`param_loss` for one called `loss`),
    `loss`, `error` (standard error of loss less the least one, paired by cell; infinite where one cell tells), with
    `loss="poisson"` `gain` (minus that loss, nats per held-out molecule above the mean profile), `seconds`, `failure`
    (what went wrong, or nothing) and `chosen`. `split_losses` has shape (candidates, splits); with `refit=True`
    `denoised` is what the best denoiser returns for all of the data.
    """

    best: Parameters
    table: pd.DataFrame
    split_losses: np.ndarray
    denoised: Any = field(repr=False, default=None)

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it, below what was chosen."""
        chosen = escape(describe(self.best))
        return (
            f"<p>Best: <b>{chosen}</b></p>{self.table.to_html(index=False, max_rows=20, float_format='{:.5g}'.format)}"
        )


def calibrate(
    data: AnnData | np.ndarray | sp.csr_matrix,
    denoiser: Any,
    grid: Mapping[str, Iterable[Any]] | Sequence[Mapping[str, Iterable[Any]]],
    *,
    partition: Any = "molecules",
    n_splits: int = 1,
    loss: Loss | None = None,
    rule: Rule = "least",
    transform: TransformName = "none",
    layer: str | None = None,
    key_added: str = "calibrate",
    refit: bool = False,
    n_jobs: int = 1,
    prefer: Prefer = "processes",
    random_state: RandomState = 0,
) -> Calibration:
    """Choose a denoiser's parameters by its loss on data that it has not seen. Any denoiser, over any partition.

    Parameters
    ----------
    data
        AnnData or a matrix with raw counts, cells x genes; with `partitions.Masks` any array, such as an image.
    denoiser
        A function of a CSR matrix or of an AnnData object, or an estimator, as `Function` takes them; where an
        estimator's `predict` names parameters, one fit serves all their values. Or a method: its name or a method
        object.
    grid
        Values of each parameter of the function, or field of the method: `{"t": range(9)}`, or a list of such dicts.
    partition
        What is hidden: `"molecules"` (halves, each predicted from the other), `"genes"` (ten random sets, each
        hidden in a tenth of the cells at a time), a dict of gene lists (pathways), `"blocks"` (of cells x genes),
        or an object of `sc_noise2self.partitions`, which says what each assumes and when that fails, or your own.
    n_splits
        Independent partitions to average over.
    loss
        `"poisson"` (the default), nats per held-out molecule; `"mse"`, `"mse_sqrt"`, `"mse_log1p"`; or a function
        of (expected counts, held-out counts), dense arrays, that returns each cell's loss. Of arrays: the squared
        error, or a function of (predicted, observed) values that returns each value's loss.
    rule
        `"least"`: the candidate of least loss. `"one_standard_error"`: the first of the grid that is within one
        standard error of it; so put the simplest candidates first.
    transform
        The scale on which a plain function works, see `Function`. Method objects have their own.
    layer
        The layer with raw counts; None takes `X`.
    key_added
        Name in `uns`, and of the layer with `refit=True`.
    refit
        Also denoise all of the data with the best parameters.
    n_jobs
        Candidates that run at a time; -1 for as many as there are cores.
    prefer
        Whether they run in processes or in threads. A candidate that ends its process, as by a segmentation fault or
        for want of memory, failed, and the others go on; with threads, or one job, there is no process but this one.
    random_state
        Seed or generator of the partition and of methods. A function's own randomness is its own affair.

    Returns
    -------
    The parameters chosen and a table of all candidates. Written to AnnData: `.uns[key_added]` with `best`, `table`,
    `split_losses`, `denoiser`, `partition`, `loss`, `rule` and `params`; with `refit=True` `.layers[key_added]`:
    expected counts at each cell's own depth, float32, dense. `X` and the input layer are not modified.

    Raises
    ------
    ValueError, TypeError
        If the data are no counts, a parameter is out of range, or every candidate failed.

    Warns
    -----
    UserWarning
        If a candidate failed, if the least loss is at the largest number tried, if no candidate beats the mean profile,
        or if one predicts even what it has seen worse than the mean profile does, as when cells or genes are in
        another order.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.calibrate(adata, n2s.Diffusion(n_pcs=30, n_neighbors=15), {"t": range(5)}).best
    {'t': 3}
    """
    check_one_of("rule", rule, get_args(Rule))
    check_one_of("prefer", prefer, get_args(Prefer))
    check_flag("refit", refit)
    as_whole("n_splits", n_splits)
    n_jobs = as_n_jobs(n_jobs)
    candidates = expand_grid(grid)
    rng = as_generator(random_state)
    adata = data if isinstance(data, AnnData) else None
    if adata is None and (layer is not None or key_added != "calibrate"):
        raise ValueError("layer and key_added belong to an AnnData object: they were given with an array.")
    partition = as_partition(partition, None if adata is None else adata.var_names)
    loss = check_loss(loss, partition)
    method = _as_method(denoiser, transform)
    groups = _groups(method, candidates)
    start = logg.info("calibrating" if adata is None else f"calibrating on {describe_counts(adata, layer)}")
    if isinstance(partition, Masks):
        values = _read_array(data, method)
    elif adata is not None:
        check_key(adata, key_added, layer, "calibrate", refit)
        values = read_csr(adata, layer)
    else:
        values = sp.csr_matrix(check_counts(data, largest=SINGLE), dtype=np.float32)

    splits = [folds_of(partition, values, rng) for _ in range(n_splits)]
    runner = _Runner(method, _about(adata, values, method, candidates), int(rng.integers(1 << 63)))
    compared = compare(candidates, splits, loss, predictor=runner.on, groups=groups, n_jobs=n_jobs, prefer=prefer)
    table, split_losses = compared.table(rule, gain=loss == "poisson"), compared.split_losses()
    row = int(np.argmax(table["chosen"]))
    if np.isnan(split_losses[row]).any():
        raise ValueError("nothing that was hidden can be scored: the data have too few molecules to hide some.")
    best = candidates[row]
    for message in _caveats(table, candidates, compared.blind()):
        warn(message)
    found = Calibration(best, table, split_losses, runner.refitted(values, best) if refit else None)
    if adata is not None:
        record = {
            # as `h5ad` and `zarr` keep it: a number or a truth value as it is, anything else as text
            "best": {name: each if isinstance(each, Number | np.bool_) else str(each) for name, each in best.items()},
            "table": plain_table(table),
            "split_losses": split_losses,
            "denoiser": runner.name,
            "partition": repr(partition),
            "loss": loss if isinstance(loss, str) else getattr(loss, "__qualname__", repr(loss)),
            "rule": rule,
            "params": {
                **({} if layer is None else {"layer": layer}),
                "transform": method.transform if isinstance(method, Function) else transform,
                "n_splits": n_splits,
                "refit": refit,
                "random_state": seed_of(random_state),
            },
        }
        layers = {key_added: found.denoised} if refit or ("layers", key_added) in owned(adata, key_added) else {}
        with committed(adata, {"uns": {key_added: marked("calibrate", record)}, "layers": layers}):
            pass
    logg.info(
        f"    {describe(best)}: loss {table['loss'][row]:.4f}",
        time=start,
        deep=None if adata is None else f"added\n    {key_added!r}, the loss of every candidate (adata.uns)",
    )
    return found


def expand_grid(grid: Any) -> list[dict[str, Any]]:
    """Return every combination of a grid, in its order, the last parameter running fastest; several grids in turn."""
    if not isinstance(grid, Iterable) or isinstance(grid, str | bytes):
        raise TypeError(f"grid is {short(grid)}: {_GRID}.")
    grids = [_lists(each) for each in ([grid] if isinstance(grid, Mapping) else grid)]
    if sum(prod(map(len, each.values())) for each in grids) > _MOST:
        raise ValueError(f"grid has more than {_MOST} candidates: pass fewer values, or fewer parameters at a time.")
    out = [dict(zip(each, values, strict=True)) for each in grids for values in product(*each.values())]
    if not out:
        raise ValueError(f"grid has no candidate: {_GRID}.")
    return out


def _lists(grid: Any) -> dict[str, list[Any]]:
    if not isinstance(grid, Mapping):
        raise TypeError(f"grid holds {short(grid)}: {_GRID}.")
    lists: dict[str, Any] = {}
    for name, values in grid.items():
        if not isinstance(name, str):
            raise TypeError(f"grid has {short(name)} for a parameter's name: {_GRID}.")
        try:
            lists[name] = list(islice(values, _MOST + 1))
        except TypeError:
            lists[name] = None
        if lists[name] is None or isinstance(values, str | bytes | Mapping | set | frozenset):  # or have no order
            raise TypeError(f"grid has {name!r}: {short(values)}: pass its values in a list, e.g. [1, 2, 3].")
        if not lists[name]:
            raise ValueError(f"grid has no candidate: {name!r} has no value, so pass at least one.")
    return lists


def _as_method(denoiser: Any, transform: TransformName) -> Method:
    """Return the method that a name, a method object, a function or an estimator stands for."""
    if not isinstance(denoiser, str | Method):
        return Function(denoiser, transform=transform)
    if transform != "none":
        what = denoiser if isinstance(denoiser, str) else type(denoiser).__name__
        raise ValueError(f"transform={transform!r} was given with the method {what}: set it on the method object.")
    _, methods = as_methods(denoiser)
    if len(methods) != 1:
        raise ValueError(f"denoiser is {denoiser!r}, which is {len(methods)} methods: calibrate one at a time.")
    return methods[0]


def _read_array(data: Any, method: Method) -> np.ndarray:
    """Return the array whose entries are to be hidden."""
    if isinstance(data, AnnData) or not isinstance(method, Function) or method.transform != "none":
        raise ValueError(
            "partitions.Masks hides entries of an array: pass one, and a function of it without transform, for "
            "instance an image."
        )
    if not callable(method.function):
        raise TypeError(f"denoiser is of type {type(method.function).__name__}: pass a function of an array.")
    return as_numbers(data, "the data hold")


def _about(adata: AnnData | None, values: Any, method: Method, candidates: Sequence[Parameters]) -> Counts | None:
    """Return what methods are told besides counts: names (numbers, of a matrix) and columns; an array needs nothing."""
    if isinstance(values, np.ndarray):
        return None
    about = Counts.of(sp.csr_matrix(values.shape, dtype=values.dtype))
    any_method: Any = method  # a dataclass, if it is not a function
    of_each = [method] if isinstance(method, Function) else [replace(any_method, **each) for each in candidates]
    wanted = dict.fromkeys(name for each in of_each for name in each.columns)
    if adata is None:
        if wanted:
            raise ValueError(f"batch_key is {next(iter(wanted))!r}, a column of obs: pass an AnnData object.")
        return about
    columns = {name: read_labels(adata, name, "batch_key") for name in wanted}
    return replace(about, cell_names=adata.obs_names, gene_names=adata.var_names, columns=columns)


def _groups(method: Any, candidates: Sequence[Parameters]) -> list[list[int]]:
    """Return the candidates that run together, by number; raise where one cannot be set."""
    if isinstance(method, Function):
        return method.groups(candidates)
    known = [each.name for each in fields(method) if each.init]
    if unknown := sorted({name for each in candidates for name in each} - set(known)):
        name = type(method).__name__
        raise ValueError(f"{name} has no field {', '.join(unknown)}: its fields are {', '.join(known)}.")
    for each in candidates:
        replace(method, **each)  # it checks itself
    return [[i] for i in range(len(candidates))]


@dataclass(frozen=True, eq=False)
class _Runner:
    """A method, and what it is given besides counts and parameters: for every candidate the same seed."""

    method: Any
    counts: Counts | None
    seed: int

    @property
    def name(self) -> str:
        return self.method.label if isinstance(self.method, Function) else self.method.name

    def on(self, seen: Any) -> Callable[[Parameters], Any]:
        """Return what predicts from what is seen, for the parameters of each candidate."""
        return self.method.on(seen, self.counts) if isinstance(self.method, Function) else partial(self._rows, seen)

    def _rows(self, seen: sp.csr_matrix, parameters: Parameters) -> Rows:
        assert self.counts is not None  # methods denoise counts
        counts = self.counts.part(seen.copy(), np.arange(seen.shape[0]))
        method = replace(self.method, **parameters).checked(counts)
        profiles = denoised(method, counts, np.random.default_rng(self.seed))
        return checked_rows(profiles, type(method).__name__, counts)

    def refitted(self, values: Any, best: Parameters) -> np.ndarray:
        """Return what the method makes of all of the data, expected counts at each cell's own depth."""
        try:
            out = self.on(values)(best)
            if isinstance(values, np.ndarray):
                return out
            size, totals = row_sums(values), column_sums(values)
            return TableProfiles.of(out, size, totals / totals.sum()).counts()
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{describe(best) or self.name} was chosen, and failed on all of the data: {in_words(error)}. Without "
                "refit=True the choice is kept."
            ) from error


def _caveats(table: pd.DataFrame, candidates: Sequence[Parameters], blind: Sequence[int]) -> Iterator[str]:
    """Yield what a user should know before trusting the choice."""
    failed = table.index[table["failure"] != ""]
    if len(failed):
        what = "; ".join(f"{describe(candidates[i])}: {table['failure'][i]}" for i in failed[:3])
        yield f"{len(failed)} of {len(table)} candidates failed and were left out: {what}"
    if blind:
        yield (
            f"{describe(candidates[blind[0]])} predicts even the molecules that it was given worse than one mean "
            "profile: check that cells and genes are returned in the order given, and on the scale given (a denoiser "
            "of logarithms needs transform='log1p')."
        )
    elif "gain" in table and table["gain"].max() <= 0:
        yield "no candidate predicts hidden molecules better than one mean profile: none of them is worth using."
    if ends := _ends_of_grid(candidates[int(np.argmax(table["chosen"]))], candidates):
        yield f"the loss is least at the largest value tried, {ends}: let the grid go further."


def _ends_of_grid(best: Parameters, candidates: Sequence[Parameters]) -> str:
    """Return the numbers chosen that are the largest of three or more tried, e.g. ``"t=8"``."""
    ends = {}
    for name, value in best.items():
        tried = {other[name] for other in candidates if _is_number(other.get(name))}
        if _is_number(value) and not isinstance(value, bool) and len(tried) > 2 and value == max(tried):
            ends[name] = value
    return describe(ends)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isnan(value)
