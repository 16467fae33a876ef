"""What the functions of clusters share: counts out of an AnnData object, and scanpy's recipe as it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData

from ._anndata import as_counts
from ._blocks import Counts
from ._checks import as_whole, describe_mask, seed_of, warn_of_unused_genes
from ._random import RandomState
from .methods._clusters import Clusters

Mask = str | np.ndarray | Sequence[bool] | None


def as_recipe(
    adata: AnnData,
    resolution: float | Sequence[float],
    *,
    n_pcs: int | None,
    n_neighbors: int,
    layer: str | None,
    mask_var: Mask,
) -> tuple[Counts, Clusters]:
    """Return the counts, and the recipe with one number of neighbours, checked against them."""
    counts = as_counts(adata, layer, mask_var)
    warn_of_unused_genes(adata, mask_var)
    method = Clusters(resolution=resolution, n_pcs=n_pcs, n_neighbors=as_whole("n_neighbors", n_neighbors, 2))
    return counts, method.checked(counts)


def described_recipe(
    method: Clusters,
    layer: str | None,
    mask_var: Mask,
    overdispersion: float | np.ndarray | None,
    random_state: RandomState,
) -> dict[str, Any]:
    """Return the options of a recipe as they are written down."""
    return {
        **({} if layer is None else {"layer": layer}),
        "n_pcs": method.n_pcs,
        "n_neighbors": method.n_neighbors,
        "mask_var": describe_mask(mask_var),
        "overdispersion": overdispersion is not None,
        "random_state": seed_of(random_state),
    }
