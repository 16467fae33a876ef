"""How many principal components do the counts of an AnnData object support: `select_rank`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from anndata import AnnData
from scanpy import logging as logg

from ._anndata import as_counts
from ._checks import (
    as_whole,
    bounded,
    by_gene,
    check_flag,
    check_one_of,
    describe_counts,
    describe_mask,
    seed_of,
    warn_of_unused_genes,
)
from ._random import RandomState, as_generator
from ._slots import check_key, committed, marked
from ._split import checked_phi
from ._threads import one_blas_thread
from ._transform import TransformName
from ._warnings import warn
from .methods._rank_curve import MAX_RANK, Protocol, learned_shape, rank_curve


def select_rank(
    adata: AnnData,
    *,
    protocol: Protocol = "loo",
    layer: str | None = None,
    key_added: str = "select_rank",
    max_rank: int | None = None,
    transform: TransformName | None = None,
    center: bool | None = None,
    n_splits: int = 1,
    overdispersion: float | np.ndarray | None = None,
    mask_var: str | np.ndarray | Sequence[bool] | None = None,
    random_state: RandomState = 0,
) -> int:
    """Return the number of principal components that the counts support: "how many PCs?".

    Principal components learned from one half of the molecules must predict the other half; every rank's loss comes
    from one factorisation per half. The answer is for `sc.pp.pca` on the same genes, normalised to the median depth
    and log-transformed.

    Parameters
    ----------
    adata, layer, mask_var, n_splits, random_state
        As in `denoise`; here `mask_var` leaves the other genes out.
    protocol
        `"loo"`: each cell is predicted by the regression of all other cells, exactly; the rank is corrected to the
        depth of the full data. `"noise2self"`: as published (Noise2Self, Figure 3), square roots, uncentred,
        learned on three quarters of the cells and scored on the rest, no depth correction. `"mcv"`: molecular
        cross-validation, one half truncated to rank k against the other, square roots, uncentred, depth-corrected.
        `"bcv"`: bi-cross-validation (Owen & Perry 2009), half the genes of a quarter of the cells predicted from the
        other genes by the other cells, square roots, uncentred; it splits no molecules.
    key_added
        Name in `uns`.
    max_rank
        Largest rank tried, at most min(cells, genes) - 1. None takes 50, or as many as there are.
    overdispersion
        phi of `split_molecules`, from `sc_noise2self.overdispersion` within clusters: molecules are dealt so that a
        gene that varies from cell to cell on its own supports no component. None takes what differs between cells for
        real. With a phi that is too large, as that of all cells where there are groups, the halves differ by more than
        chance, and components predict even that.
    transform, center
        `"log1p"`, `"sqrt"` or `"none"`, and whether genes are centred as in `sc.pp.pca`; None takes the protocol's own.

    Returns
    -------
    The rank. `.uns[key_added]` holds `rank`, `split_rank` (of least loss, at half depth), `within_one_error` (ranks as
    good there within one paired standard error, all of them where one cell was scored, which tells no error; `rank`
    need not be among them), `table` (`rank`, `loss`, `error`, `full_depth_loss` where it is corrected, `chosen`;
    squared error per entry on the transformed scale), `splits` (the loss of each split and direction), and `params`.

    Raises
    ------
    ValueError, TypeError
        As `denoise`.

    Warns
    -----
    UserWarning
        If the loss still falls at `max_rank`, if no rank beats rank 0 by more than the error, or if
        `var["highly_variable"]` is there, which `sc.pp.pca` would use, and no `mask_var` is given.

    Notes
    -----
    See `sc_noise2self.methods._rank_curve` for the formulas.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> rank = n2s.select_rank(adata)
    """
    rng = as_generator(random_state)
    as_whole("n_splits", n_splits)
    check_one_of("protocol", protocol, get_args(Protocol))
    if transform is not None:
        check_one_of("transform", transform, get_args(TransformName))
    if center is not None:
        check_flag("center", center)
    if overdispersion is not None and protocol == "bcv":
        raise ValueError("overdispersion was given with protocol 'bcv', which splits no molecules.")
    counts = as_counts(adata, layer, mask_var)
    overdispersion = by_gene("overdispersion", overdispersion, adata.var_names)
    phi = None if overdispersion is None else checked_phi(overdispersion, counts.chunks.shape[1])
    check_key(adata, key_added, layer, "select_rank")
    warn_of_unused_genes(adata, mask_var)
    chunks = counts.chunks if counts.used is None else counts.chunks.of_genes(counts.used)
    if phi is not None and counts.used is not None:
        phi = phi[counts.used]
    bounds = learned_shape(protocol, *chunks.shape)
    max_rank = bounded("max_rank", max_rank, MAX_RANK, *bounds)
    start = logg.info(f"selecting the rank of {describe_counts(adata, layer)}")
    about: dict[str, Any] = {"protocol": protocol, "transform": transform, "center": center, "n_splits": n_splits}
    with one_blas_thread():
        curve = rank_curve(chunks, max_rank, rng, phi=phi, **about)
    if not curve.beats_none:
        warn(
            "no rank predicts held-out molecules better than rank 0 by more than the error: the counts show no "
            "structure that principal components could use."
        )
    elif curve.at_edge:
        more = "pass a larger max_rank" if max_rank < min(bounds) - 1 else "these counts have no more"
        warn(f"the loss still falls at the largest rank tried, {max_rank}: {more}.")
    within = curve.within_one_error
    record = {
        "rank": curve.rank,
        "split_rank": curve.split_rank,
        "within_one_error": within,
        "table": curve.table,
        "splits": curve.splits,
        "params": {
            "protocol": protocol,
            **({} if layer is None else {"layer": layer}),
            "transform": curve.transform,
            "center": curve.center,
            "max_rank": max_rank,
            "n_splits": n_splits,
            "overdispersion": overdispersion is not None,
            "mask_var": describe_mask(mask_var),
            "random_state": seed_of(random_state),
        },
    }
    with committed(adata, {"uns": {key_added: marked("select_rank", record)}}):
        pass
    logg.info(
        f"    rank {curve.rank} (least loss on a half at {curve.split_rank}, as good within one error: "
        f"{within.min()} to {within.max()})",
        time=start,
        deep=f"added\n    {key_added!r}, the loss of every rank (adata.uns)",
    )
    return curve.rank
