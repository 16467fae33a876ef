"""Choose any denoiser's hyperparameter by the loss on data that were hidden from it: `calibrate`.

Noise2Self (Batson & Royer 2019), section 3: whatever the denoiser, its loss on hidden data is its error against the
truth plus a constant, so the parameter of least loss is the one of least error.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number, Real
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

from ._anndata import read_csr
from ._checks import check_flag, check_one_of, check_positive, describe_counts, seed_of
from ._compare import Comparison, Rule, compare
from ._counts import SINGLE, check_counts
from ._jobs import as_n_jobs
from ._random import RandomState, as_generator
from ._result import plain_table
from ._slots import check_key, committed, marked, owned
from ._transform import TransformName
from .methods._function import ArrayDenoiser, Denoiser, Parameters, describe, expand_grid, in_words
from .partitions import Loss, Masks, as_numbers, as_partition, check_loss, folds_of


@dataclass(frozen=True, eq=False)
class Calibration:
    """What `calibrate` found.

    Attributes
    ----------
    best
        The parameters chosen.
    table
        One row a candidate, in the order of the grid: its parameters (`param_loss` for one called `loss`), `loss`,
        `error` (standard error of loss less the least one, paired by cell; infinite where one cell tells), `gain`
        (minus the Poisson loss, nats per held-out molecule above the mean profile), `seconds`, `failure` (what went
        wrong, or nothing) and `chosen`.
    split_losses
        The loss of each candidate in each split, shape (candidates, splits).
    denoised
        With `refit=True`, what the best denoiser returns for all of the data.
    """

    best: Parameters
    table: pd.DataFrame
    split_losses: np.ndarray
    denoised: Any = field(repr=False, default=None)


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
    prefer: Literal["processes", "threads"] = "processes",
    random_state: RandomState = 0,
) -> Calibration:
    """Choose a denoiser's parameters by its loss on data that it has not seen. Any denoiser, over any partition.

    Parameters
    ----------
    data
        AnnData or a matrix with raw counts, cells x genes; with `partitions.Masks` any array, such as an image.
    denoiser
        `denoiser(counts, **parameters)` returns denoised counts: a function of a CSR matrix; a function of an
        AnnData object, recognised by its first parameter's name, `adata`, that writes to `X` or returns; or an
        object with `fit(counts)` and `predict(counts)`, whose parameters are set before it is fitted, or are given
        to `predict` where it names them: one fit then serves all their values. Each cell may be on a scale of its
        own; negative values count as 0.
    grid
        Values of each parameter, `{"t": range(9)}`, or a list of such dicts.
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
        The scale on which a function works. `"log1p"` and `"sqrt"`: it is given cells at the median depth,
        transformed, and what it returns is taken back (`sc_noise2self._transform.rates`). `"none"`: counts.
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
        Seed or generator of the partition. A denoiser's own randomness is its own affair.

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
    >>> from sc_noise2self.methods._neighbors import DiffusionDenoiser
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.calibrate(adata, DiffusionDenoiser(), {"t": range(5)}).best
    {'t': 2}
    """
    check_one_of("rule", rule, get_args(Rule))
    check_one_of("prefer", prefer, ("processes", "threads"))
    check_one_of("transform", transform, get_args(TransformName))
    check_flag("refit", refit)
    check_positive("n_splits", n_splits)
    n_jobs = as_n_jobs(n_jobs)
    candidates = expand_grid(grid)
    rng = as_generator(random_state)
    adata = data if isinstance(data, AnnData) else None
    if adata is None and (layer is not None or key_added != "calibrate"):
        raise ValueError("layer and key_added belong to an AnnData object: they were given with an array.")
    partition = as_partition(partition, None if adata is None else adata.var_names)
    start = logg.info("calibrating" if adata is None else f"calibrating on {describe_counts(adata, layer)}")
    called: Denoiser | ArrayDenoiser
    values: Any
    if isinstance(partition, Masks):
        if adata is not None or transform != "none":
            raise ValueError(
                "partitions.Masks hides entries of an array: pass one, without transform, for instance an image."
            )
        values, called = as_numbers(data, "the data hold"), ArrayDenoiser(denoiser)
    elif adata is not None:
        check_key(adata, key_added, layer, "calibrate", refit)
        values, called = read_csr(adata, layer), Denoiser(denoiser, transform, adata.obs_names, adata.var_names)
    else:
        values = sp.csr_matrix(check_counts(data, largest=SINGLE), dtype=np.float32)
        called = Denoiser(denoiser, transform, *(pd.RangeIndex(n).astype(str) for n in values.shape))
    loss = check_loss(loss, partition)

    splits = [folds_of(partition, values, rng) for _ in range(n_splits)]
    compared = compare(called, candidates, splits, loss, n_jobs, prefer)
    table = compared.table(rule, loss)
    best = candidates[int(np.argmax(table["chosen"]))]
    _warn(table, candidates, compared)
    denoised = _refitted(called, values, best) if refit else None
    found = Calibration(best, table, compared.split_losses(), denoised)
    if adata is not None:
        record = {
            "best": {name: _plain(value) for name, value in best.items()},
            "table": plain_table(table),
            "split_losses": found.split_losses,
            "denoiser": called.name,
            "partition": repr(partition),
            "loss": loss if isinstance(loss, str) else getattr(loss, "__qualname__", repr(loss)),
            "rule": rule,
            "params": {
                **({} if layer is None else {"layer": layer}),
                "transform": transform,
                "n_splits": n_splits,
                "refit": refit,
                "random_state": seed_of(random_state),
            },
        }
        layers = {key_added: denoised} if refit or ("layers", key_added) in owned(adata, key_added) else {}
        with committed(adata, {"uns": {key_added: marked("calibrate", record)}, "layers": layers}):
            pass
    logg.info(
        f"    {describe(best)}: loss {table['loss'][table['chosen']].iloc[0]:.4f}",
        time=start,
        deep=None if adata is None else f"added\n    {key_added!r}, the loss of every candidate (adata.uns)",
    )
    return found


def _refitted(called: Denoiser | ArrayDenoiser, values: Any, best: Parameters) -> np.ndarray:
    try:
        return called.refit(values, best)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{describe(best) or called.name} was chosen, and failed on all of the data: {in_words(error)}. Without "
            "refit=True the choice is kept."
        ) from error


def _warn(table: pd.DataFrame, candidates: Sequence[Parameters], compared: Comparison) -> None:
    """Say what a user should know before trusting the choice."""
    failed = table.index[table["failure"] != ""]
    if len(failed):
        what = "; ".join(f"{describe(candidates[i])}: {table['failure'][i]}" for i in failed[:3])
        warnings.warn(
            f"{len(failed)} of {len(table)} candidates failed and were left out: {what}", UserWarning, stacklevel=3
        )
    blind = [i for i in range(len(table)) if compared.blind(i)]
    if blind:
        warnings.warn(
            f"{describe(candidates[blind[0]])} predicts even the molecules that it was given worse than one mean "
            "profile: check that cells and genes are returned in the order given, and on the scale given (a denoiser "
            "of logarithms needs transform='log1p').",
            UserWarning,
            stacklevel=3,
        )
    elif "gain" in table and table["gain"].max() <= 0:
        warnings.warn(
            "no candidate predicts hidden molecules better than one mean profile: none of them is worth using.",
            UserWarning,
            stacklevel=3,
        )
    ends = _ends_of_grid(table, candidates)
    if ends:
        warnings.warn(
            f"the loss is least at the largest value tried, {ends}: let the grid go further.",
            UserWarning,
            stacklevel=3,
        )


def _ends_of_grid(table: pd.DataFrame, candidates: Sequence[Parameters]) -> str:
    """Return the numbers chosen that are the largest of three or more tried, e.g. ``"t=8"``."""
    best = candidates[int(np.argmax(table["chosen"]))]
    ends = {}
    for name, value in best.items():
        tried = {other[name] for other in candidates if _is_number(other.get(name))}
        if _is_number(value) and not isinstance(value, bool) and len(tried) > 2 and value == max(tried):
            ends[name] = value
    return describe(ends)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and value == value  # NaN is not


def _plain(value: Any) -> Any:
    """Return a value as `h5ad` and `zarr` keep it: a number or a truth value as it is, anything else as text."""
    return value if isinstance(value, Number | np.bool_) else str(value)
