"""Are two clusters two: what keeping them apart gains on molecules that they were not found by (`cluster_support`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

from ._checks import by_gene, check_number, describe_counts
from ._counts import column_sums, row_sums
from ._loss import Gain
from ._random import RandomState, as_generator
from ._recipe import as_recipe, described_recipe
from ._slots import check_key, committed, marked
from ._threads import one_blas_thread
from .methods._clusters import as_groups, clustered_by_half, likeliest_strength, molecules_of, shrunk


def cluster_support(
    adata: AnnData,
    resolution: float = 1.0,
    *,
    n_pcs: int | None = None,
    n_neighbors: int = 15,
    overdispersion: float | np.ndarray | None = None,
    layer: str | None = None,
    key_added: str = "cluster_support",
    mask_var: str | np.ndarray | Sequence[bool] | None = None,
    random_state: RandomState = 0,
) -> pd.DataFrame:
    """Return what keeping clusters apart gains on molecules that they were not found by: whether they are two.

    Cells are clustered by half of their molecules. The clusters are joined one pair after another, the two that are
    most alike in that half first, until one is left. At each join the other half says what the two profiles predict
    better than their mean, weighted by molecules. Where the cells of both are of one kind the mean of two profiles
    predicts on average as well as they do or better, whichever they are, so noise hardly ever supports a join.

    Parameters
    ----------
    adata, layer, random_state
        As in `denoise`; counts that are not in memory are read into it.
    resolution
        Of Leiden clustering, e.g. from `select_resolution`. Labels that were found with all molecules have seen the
        half that would judge them, so cells are clustered anew.
    n_pcs, n_neighbors, overdispersion, mask_var
        As in `select_resolution`.
    key_added
        Name in `uns` and `obs`.

    Returns
    -------
    A table with a row for each join, in their order: `cluster` and `other` (names of clusters, joined by `+`),
    `n_cells` and `n_cells_other`, `distance` (nats per molecule of the half that was seen, the mean of the two
    clusters'), `gain` (nats per held-out molecule of their cells) with its standard error over cells, `error`, and
    `supported`: whether the gain is above two errors. It is `.uns[key_added]["table"]` too, beside `linkage`, of shape
    (joins, 4) as SciPy has it, and `params`. `.obs[key_added]` has the clusters, categorical.

    Raises
    ------
    ValueError, TypeError
        As `denoise`, and if there is only one cluster.

    Warns
    -----
    UserWarning
        If `var["highly_variable"]` is there, which `sc.pp.pca` would use, and no `mask_var` is given.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> support = n2s.cluster_support(adata, resolution=0.5)
    """
    rng = as_generator(random_state)
    check_number("resolution", resolution, 0, np.inf)
    asked: dict[str, Any] = {"n_pcs": n_pcs, "n_neighbors": n_neighbors, "layer": layer, "mask_var": mask_var}
    counts, method = as_recipe(adata, resolution, **asked)
    overdispersion = by_gene("overdispersion", overdispersion, adata.var_names)
    check_key(adata, key_added, layer, "cluster_support")
    start = logg.info(f"clustering {describe_counts(adata, layer)}")
    with one_blas_thread():
        method = method.with_rank(counts, rng, overdispersion)
        labels, seen, held_out = clustered_by_half(method, counts, overdispersion, rng)
        table, linkage = joins(labels, seen, held_out)
    record = {
        "table": table,
        "linkage": linkage,
        "params": {
            "resolution": float(resolution),
            **described_recipe(method, layer, mask_var, overdispersion, random_state),
        },
    }
    groups, written = as_groups(labels), marked("cluster_support", record)
    with committed(adata, {"obs": {key_added: groups}, "uns": {key_added: written}}):
        pass
    logg.info(
        f"    {labels.max() + 1} clusters; {int((~table['supported']).sum())} joins are not supported",
        time=start,
        deep=f"added\n    {key_added!r}, the clusters (adata.obs) and the gain of every join (adata.uns)",
    )
    return table


@dataclass(frozen=True, eq=False)
class _Node:
    """Clusters that were joined: their numbers, their molecules of each gene, and their number in the linkage.

    The profile is the mean of the clusters' profiles, weighted by their molecules.
    """

    clusters: tuple[int, ...]
    molecules: np.ndarray
    profile: np.ndarray
    number: int

    @property
    def name(self) -> str:
        return "+".join(map(str, self.clusters))

    def joined(self, other: _Node, number: int) -> _Node:
        both, molecules = tuple(sorted((*self.clusters, *other.clusters))), self.molecules + other.molecules
        weight = other.molecules.sum() / max(molecules.sum(), 1)
        return _Node(both, molecules, self.profile + weight * (other.profile - self.profile), number)


@dataclass(frozen=True, eq=False)
class _Pooled:
    """Profiles of molecules that are pooled, all shrunk with one strength."""

    share: np.ndarray
    strength: float

    def log(self, molecules: np.ndarray) -> np.ndarray:
        return _log(shrunk(molecules, self.share, self.strength))

    def distances(self, node: _Node, others: Sequence[_Node]) -> np.ndarray:
        """Return how far others are from a node: nats per molecule, the mean of the two, that their own profiles gain.

        What the profile of both together predicts is subtracted.
        """
        own, out = self.log(node.molecules), np.empty(len(others))
        for i, other in enumerate(others):
            both = self.log(node.molecules + other.molecules)
            gains = [(node.molecules, own - both), (other.molecules, self.log(other.molecules) - both)]
            out[i] = np.mean([(x @ gained) / max(x.sum(), 1) for x, gained in gains])
        return out


def _log(profile: np.ndarray) -> np.ndarray:
    """Return the logarithm of a profile, shape (genes,), 0 for genes that were not seen."""
    return np.log(np.where(profile > 0, profile, 1))


def joins(labels: np.ndarray, seen: sp.csr_matrix, held_out: sp.csr_matrix) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the table of `cluster_support` and the linkage, from clusters of what was seen, whole numbers from 0."""
    molecules, totals = molecules_of(labels, seen), column_sums(seen)
    share, size = totals / totals.sum(), row_sums(held_out)
    pooled = _Pooled(share, likeliest_strength(molecules, share))
    profiles = shrunk(molecules, share, pooled.strength)
    nodes = [_Node((i,), *each, i) for i, each in enumerate(zip(molecules, profiles, strict=True))]
    distances = {
        (one.number, other.number): distance
        for i, one in enumerate(nodes)
        for other, distance in zip(nodes[i + 1 :], pooled.distances(one, nodes[i + 1 :]), strict=True)
    }
    rows: list[tuple] = []
    linkage, height = [], 0.0
    while len(nodes) > 1:
        nearest = min(distances, key=lambda pair: distances[pair])
        distance = distances[nearest]
        one, other = (node for node in nodes if node.number in nearest)
        both = one.joined(other, len(molecules) + len(rows))
        joint, sums, weights = _log(both.profile), np.zeros(len(labels)), np.zeros(len(labels))
        n_cells = []
        for node in (one, other):
            cells = np.flatnonzero(np.isin(labels, node.clusters))
            sums[cells] = held_out[cells] @ (_log(node.profile) - joint)
            weights[cells] = size[cells]
            n_cells.append(len(cells))
        gain = Gain(sums, weights)
        rows.append((one.name, other.name, *n_cells, distance, gain.mean, gain.error, gain.is_clear))
        height = max(height, distance, 0.0)  # of a dendrogram, which does not fall
        linkage.append((one.number, other.number, height, len(both.clusters)))
        nodes = [node for node in nodes if node not in (one, other)]
        distances = {pair: d for pair, d in distances.items() if not {one.number, other.number} & set(pair)}
        for node, found in zip(nodes, pooled.distances(both, nodes), strict=True):
            distances[node.number, both.number] = found
        nodes.append(both)
    columns = ["cluster", "other", "n_cells", "n_cells_other", "distance", "gain", "error", "supported"]
    return pd.DataFrame(rows, columns=columns), np.array(linkage, np.float64)
