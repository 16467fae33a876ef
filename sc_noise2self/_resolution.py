"""How finely do the counts of an AnnData object let cells be clustered: `select_resolution`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from ._blocks import Counts
from ._checks import as_whole, by_gene, check_number, check_one_of, describe_counts
from ._compare import Comparison, Rule
from ._loss import Gain
from ._progress import progress_bar
from ._random import RandomState, as_generator
from ._recipe import as_recipe, described_recipe
from ._slots import check_key, committed, marked
from ._split import split_matrix
from ._threads import one_blas_thread
from ._warnings import warn
from .methods._clusters import RESOLUTIONS, Clusters, gain_of_clusters
from .partitions import Fold, fold_of

_PARTS = 10  # of the molecules, of which one is held out at a time: what is seen is nearly all
_PAST = 3  # resolutions in turn that gain less than the best: the usual grid ends there


def select_resolution(
    adata: AnnData,
    resolutions: Sequence[float] | None = None,
    *,
    n_pcs: int | None = None,
    n_neighbors: int = 15,
    rule: Rule = "one_standard_error",
    overdispersion: float | np.ndarray | None = None,
    layer: str | None = None,
    key_added: str = "select_resolution",
    n_folds: int = 2,
    mask_var: str | np.ndarray | Sequence[bool] | None = None,
    random_state: RandomState = 0,
) -> float:
    """Return the resolution of Leiden clustering that the counts support: "how many clusters?".

    Cells are clustered by nine tenths of their molecules, and each cluster's profile must predict the last tenth. Too
    few clusters average over cells that differ; too many have profiles that are noise. The answer is for `sc.tl.leiden`
    on the neighbours by as many components: it is the coarsest partition that predicts as well as the best, and not
    the number of cell types. A continuum, as of a gene's level or the cell cycle, is cut as finely as it can be told.

    Parameters
    ----------
    adata, layer, random_state
        As in `denoise`; counts that are not in memory are read into it.
    resolutions
        Numbers from 0, rising; with 0 all cells are one cluster, which is always compared. None takes steps of the
        square root of 2 from 0.03 until three in turn gain less than the best by more than the error, or 8 is reached.
    n_pcs
        Number of principal components; None takes what `select_rank` finds, or 1 where that is 0.
    n_neighbors
        As in `sc.pp.neighbors`, 2 or more.
    rule
        `"one_standard_error"`: the least resolution whose gain is within one standard error of the largest.
        `"least"`: that of the largest gain (the least loss).
    overdispersion
        phi of `split_molecules`, from `sc_noise2self.overdispersion` within clusters: molecules are dealt so that a
        gene that varies from cell to cell on its own supports no cluster. None takes what differs between cells for
        real.
    key_added
        Name in `uns`.
    n_folds
        Tenths of the molecules that are held out in turn, 10 at most.
    mask_var
        Genes that the components are learned from, as `sc.pp.pca` has it; the profiles are those of all genes.

    Returns
    -------
    The resolution; 0 where no partition predicts better than one cluster by more than two standard errors.
    `.uns[key_added]` holds `resolution`, `table` (`resolution`, `n_clusters`, the mean over folds of, `gain`, nats per
    held-out molecule above the mean profile, `error`, the standard error of the gain less the largest, paired by cell,
    and `chosen`), and `params`, with the number of components.

    Raises
    ------
    ValueError, TypeError
        As `denoise`.

    Warns
    -----
    UserWarning
        If no partition is better than one cluster, if the largest of several resolutions is chosen, or if
        `var["highly_variable"]` is there, which `sc.pp.pca` would use, and no `mask_var` is given.

    Notes
    -----
    The formulas are in `sc_noise2self.methods._clusters`.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> resolution = n2s.select_resolution(adata)
    """
    rng = as_generator(random_state)
    check_one_of("rule", rule, get_args(Rule))
    if as_whole("n_folds", n_folds) > _PARTS:
        raise ValueError(f"n_folds is {n_folds}: there are {_PARTS} tenths to hold out, so pass {_PARTS} or fewer.")
    tried = RESOLUTIONS if resolutions is None else _checked(resolutions)
    asked: dict[str, Any] = {"n_pcs": n_pcs, "n_neighbors": n_neighbors, "layer": layer, "mask_var": mask_var}
    counts, method = as_recipe(adata, tried, **asked)
    overdispersion = by_gene("overdispersion", overdispersion, adata.var_names)
    check_key(adata, key_added, layer, "select_resolution")
    start = logg.info(f"selecting the resolution of {describe_counts(adata, layer)}")
    with one_blas_thread():
        method = method.with_rank(counts, rng, overdispersion)
        folds = tenths(counts, n_folds, overdispersion, rng)
        compared, n_clusters = _compared(method, counts, folds, tried, resolutions is None, rng)
    table, gains = _table(compared, n_clusters, rule)
    if not table["chosen"].iloc[0] and not gains[int(table["gain"].argmax())].is_clear:
        table["chosen"] = np.arange(len(table)) == 0
    row = int(table["chosen"].argmax())
    chosen = float(table["resolution"].iloc[row])
    if row == 0 and len(table) > 1:
        warn(
            "no clustering predicts held-out molecules better than one cluster by more than the error: the counts show "
            "no groups of cells."
        )
    elif row == len(table) - 1 and len(table) > 2:
        warn(
            f"the gain still rises at the largest resolution tried, {chosen:g}, with {table['n_clusters'].iloc[row]} "
            "clusters: the molecules tell cells apart more finely than that, as along a continuum. Pass larger "
            "resolutions, or choose a coarser partition for what you want to see."
        )
    record = {
        "resolution": chosen,
        "table": table,
        "params": {
            "rule": rule,
            "n_folds": n_folds,
            **described_recipe(method, layer, mask_var, overdispersion, random_state),
        },
    }
    with committed(adata, {"uns": {key_added: marked("select_resolution", record)}}):
        pass
    logg.info(
        f"    resolution {chosen:g}, {table['n_clusters'].iloc[row]} clusters by {method.n_pcs} components",
        time=start,
        deep=f"added\n    {key_added!r}, the gain of every resolution (adata.uns)",
    )
    return chosen


def _checked(resolutions: Sequence[float]) -> tuple[float, ...]:
    """Return resolutions, rising, with 0 before them."""
    values = np.asarray(resolutions, dtype=object).ravel().tolist()
    for each in values:
        check_number("resolutions", each, 0, np.inf)
    if not values:
        raise ValueError("resolutions is empty: pass at least one number, e.g. [0.5, 1, 2].")
    return tuple(sorted({0.0, *map(float, values)}))


def tenths(
    counts: Counts, n_folds: int, overdispersion: float | np.ndarray | None, rng: np.random.Generator
) -> list[Fold]:
    """Return folds that each hold out another tenth of the molecules, and show the rest."""
    whole = counts.in_memory()
    parts: Any = split_matrix(whole, folds=_PARTS, overdispersion=overdispersion, random_state=rng)
    folds = []
    for part in parts[:n_folds]:
        seen = whole - part
        if not seen.nnz or not part.nnz:
            raise ValueError(
                f"the counts hold {int(whole.sum())} molecule(s): too few to hold out a tenth of them and to cluster "
                "cells by the rest."
            )
        folds.append(fold_of(seen, part))
    return folds


def _compared(
    method: Clusters,
    counts: Counts,
    folds: Sequence[Fold],
    tried: Sequence[float],
    may_stop: bool,
    rng: np.random.Generator,
) -> tuple[Comparison, list[int]]:
    """Return what each resolution lost in each fold, and the mean number of its clusters."""
    comparison, n_clusters = Comparison(), []
    with progress_bar("comparing resolutions", len(folds) * (1 + len(tried))) as bar:
        graphs = []
        for fold in folds:
            graphs.append(method.graph(counts.part(fold.seen, fold.cells), rng))
            bar.update()
        for resolution in tried:
            found = []
            for split, (fold, graph) in enumerate(zip(folds, graphs, strict=True)):
                labels = graph.labels(resolution)
                comparison.add({"resolution": resolution}, -gain_of_clusters(labels, fold), split=split)
                found.append(labels.max() + 1)
                bar.update()
            n_clusters.append(round(float(np.mean(found))))
            if may_stop and _is_past(comparison):
                break
    return comparison, n_clusters


def _is_past(comparison: Comparison) -> bool:
    """Whether the last resolutions gained less than the best by more than the error."""
    table = comparison.table()
    worse = table["loss"] - table["loss"].min() > table["error"]
    return len(table) > _PAST and bool(worse.iloc[-_PAST:].all())


def _table(comparison: Comparison, n_clusters: Sequence[int], rule: Rule) -> tuple[pd.DataFrame, list[Gain]]:
    """Return the table as it is written, and the gain of each row."""
    table = comparison.table(rule, gain=True)[["resolution", "gain", "error", "chosen"]]
    table.insert(1, "n_clusters", n_clusters)
    gains = [Gain(-score.sums, score.weights) for score in comparison.scores() if score is not None]
    return table, gains
