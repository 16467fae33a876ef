"""Denoise a cell by the cluster that it is in: clusters by scanpy's recipe, profiles shrunk to the mean profile.

The recipe is `sc.pp.normalize_total` (to the median), `sc.pp.log1p`, `sc.pp.pca`, `sc.pp.neighbors` and `sc.tl.leiden`
with igraph. The components are learned in passes over blocks of cells; the graph and its clusters are scanpy's own.

The profile of a cluster is the mean of a Dirichlet posterior, (n + s g) / (N + s), with n the molecules of each gene in
its cells, N their sum and g the mean profile. The strength s is the one under which every molecule is likeliest given
all the others. Where clusters differ by no more than chance it is infinite, and every cluster has the mean profile.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import scanpy as sc
import scipy.optimize
import scipy.sparse as sp
from anndata import AnnData
from sklearn.base import BaseEstimator, TransformerMixin

from .._blocks import Block, Chunks, Counts, Partial
from .._checks import bounded, check_number
from .._counts import column_sums, depth_of, row_sums
from .._loss import Gain
from .._split import checked_phi, split_matrix
from .._threads import FILTERS, ProcessLock
from .._transform import Transform
from ..partitions import Fold
from ._base import Learner, Method, TrialLearner, as_several, bounded_values, set_tuples
from ._neighbors import nearest
from ._populations import sums_of
from ._profiles import LowRankProfiles
from ._rank_curve import MAX_RANK, rank_curve
from ._svd import components_of, start_block

RESOLUTIONS = (0.0, 0.03, 0.04, 0.06, 0.09, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.7, 8.0)
"""One cluster, then steps of the square root of 2."""
_SCANPY = ProcessLock()  # what it says and igraph's random numbers are those of the process
_FEW = 20  # molecules, of which a half may hold none
_STRENGTHS = (1e-6, 1e4)  # between which the strength is looked for, the last times all molecules


@dataclass(frozen=True, kw_only=True)
class Clusters(Method):
    """Every cell as the mean of its cluster, by scanpy's recipe. Of several values the loss chooses one.

    Parameters
    ----------
    resolution
        Resolution of Leiden clustering, or several to compare; with 0 all cells are one cluster.
    n_pcs
        Principal components in which cells are near each other. None takes what `sc_noise2self.select_rank` finds, or
        1 where that is 0.
    n_neighbors
        Neighbours of a cell in the graph, 2 or more, as `sc.pp.neighbors` counts them, or several numbers to compare.
    """

    name: ClassVar[str] = "clusters"
    title: ClassVar[str] = "the mean of a cell's cluster"
    needs_memory: ClassVar[bool] = False

    resolution: float | Sequence[float] = RESOLUTIONS
    n_pcs: int | None = None
    n_neighbors: int | Sequence[int] = 15

    def __post_init__(self) -> None:
        set_tuples(self, "resolution", "n_neighbors")
        if not (values := as_several(self.resolution)):
            raise ValueError("resolution is empty: pass a number, or several.")
        for each in values:
            check_number("resolution", each, 0, np.inf)

    def checked(self, counts: Counts) -> Self:
        n_cells, usual = counts.chunks.shape[0], type(self)
        near = bounded_values("n_neighbors", self.n_neighbors, usual.n_neighbors, n_cells, f"{n_cells} cells", 2)
        if self.n_pcs is None:
            return replace(self, n_neighbors=near)
        n_pcs = bounded("n_pcs", self.n_pcs, MAX_RANK, n_cells, counts.n_used)
        return replace(self, n_pcs=n_pcs, n_neighbors=near)

    def learners(self, counts: Counts) -> Sequence[Learner]:
        return [_ClustersLearner(self, counts)]

    def denoise_counts(self, counts: Counts, rng: np.random.Generator) -> LowRankProfiles:
        """Return expected counts: the profile of each cell's cluster, at the cell's depth."""
        method = self.with_rank(counts, rng)
        labels = method.graph(counts, rng).labels(method.resolution)  # type: ignore[arg-type]
        return profiles_of_clusters(labels, counts).scaled()

    def with_rank(
        self, counts: Counts, rng: np.random.Generator, overdispersion: float | np.ndarray | None = None
    ) -> Self:
        """Return the method with a number of components: where none was given, the rank that `select_rank` finds.

        It has the generator as it is, as `select_rank` would have it, and what follows does not depend on who says it.
        """
        as_it_is = deepcopy(rng)
        rng.integers(2**63)
        return self if self.n_pcs is not None else replace(self, n_pcs=rank_of(counts, as_it_is, overdispersion))

    def graph(self, counts: Counts, rng: np.random.Generator) -> Graph:
        """Return the graph of the cells, where every option has one value."""
        assert self.n_pcs is not None
        return Graph.of(counts, self.n_pcs, self.n_neighbors, rng)  # type: ignore[arg-type]


class _ClustersLearner(TrialLearner):
    """Clusters: one graph serves every resolution."""

    method: Clusters

    @property
    def settings(self) -> Sequence[Any]:
        """The one that was chosen, e.g. ``"resolution 0.5, 15 neighbors"``."""
        return (f"resolution {self.method.resolution}, {self.method.n_neighbors} neighbors",)

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:
        self.method = self.method.with_rank(self._counts.part(counts, cells), rng)
        super().prepare(counts, cells, rng)

    def compare(self, fold: Fold, rng: np.random.Generator) -> None:
        seen = self._counts.part(fold.seen, fold.cells)
        method = self.method
        for n_neighbors in as_several(method.n_neighbors):
            graph = replace(method, n_neighbors=n_neighbors).graph(seen, rng)
            for resolution in as_several(method.resolution):
                gain = gain_of_clusters(graph.labels(resolution), fold)
                self._comparison.add({"resolution": resolution, "n_neighbors": n_neighbors}, -gain)


@dataclass(frozen=True, eq=False)
class Graph:
    """The neighbours that cells have by scanpy's recipe, from which clusters of any resolution come."""

    neighbors: AnnData  # without counts: `X` holds coordinates, `obsp` the graph
    seed: int

    @classmethod
    def of(cls, counts: Counts, n_pcs: int, n_neighbors: int, rng: np.random.Generator) -> Self:
        """Return the graph of cells by their counts; of few cells it has fewer neighbours."""
        seed = int(rng.integers(2**31))
        # In X, which is "X" in each of scanpy's presets; a name in obsm is not.
        cells = AnnData(principal_coordinates(counts, n_pcs, rng).astype(np.float32))
        if cells.n_obs > 2:
            n_neighbors = min(n_neighbors, cells.n_obs - 1)
            with _quietly():
                sc.pp.neighbors(cells, use_rep="X", random_state=seed, transformer=_Search(n_neighbors, seed))
        return cls(cells, seed)

    def labels(self, resolution: float) -> np.ndarray:
        """Return the cluster of each cell, whole numbers from 0 as scanpy counts them."""
        if resolution == 0 or self.neighbors.n_obs <= 2:
            return np.zeros(self.neighbors.n_obs, np.intp)
        options: dict[str, Any] = {"flavor": "igraph", "n_iterations": 2, "directed": False}
        with _quietly():
            sc.tl.leiden(self.neighbors, resolution=resolution, random_state=self.seed, **options)
            return self.neighbors.obs["leiden"].astype(int).to_numpy().astype(np.intp)


@contextmanager
def _quietly() -> Iterator[None]:
    """Run scanpy in one thread at a time, and let it say nothing of an object that nobody sees."""
    with _SCANPY, FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore", sp.SparseEfficiencyWarning)  # where cells are equal
        verbosity = sc.settings.verbosity
        sc.settings.verbosity = "error"  # `override` is another function from scanpy 1.13 on
        try:
            yield
        finally:
            sc.settings.verbosity = verbosity


class _Search(TransformerMixin, BaseEstimator):
    """The nearest neighbours of points, as `sc.pp.neighbors` takes them from a transformer.

    Its own search of many cells fails where scanpy is older than the array types of pynndescent's answer.
    """

    def __init__(self, n_neighbors: int, seed: int) -> None:
        self.n_neighbors = n_neighbors
        self.seed = seed

    def fit(self, points: np.ndarray, y: None = None) -> Self:
        """Return itself: there is nothing to learn."""
        return self

    def transform(self, points: np.ndarray) -> sp.csr_matrix:
        """Return the distances of each point to itself and its nearest, CSR of shape (points, points)."""
        distances, indices = nearest(points, self.n_neighbors, np.random.default_rng(self.seed))
        n, k = indices.shape
        return sp.csr_matrix((distances.ravel(), indices.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))


def principal_coordinates(counts: Counts, n_pcs: int, rng: np.random.Generator) -> np.ndarray:
    """Return what `sc.pp.pca` gives of log-normalised counts, shape (cells, components), but for signs.

    Cells are brought to their median depth by all of their genes; the components are those of the genes that are used.
    """
    transform = Transform("log1p", depth_of(counts.size))
    n_cells = counts.chunks.shape[0]

    def logged(block: Block) -> sp.csr_matrix:
        z = transform.apply(block.counts, row_sums(block.counts))
        return z if counts.used is None else z[:, counts.used]

    mean = counts.chunks.run(lambda block: Partial([column_sums(logged(block))])).sums[0] / n_cells
    start = start_block(len(mean), n_pcs, rng)
    ((_, v),) = components_of(
        counts.chunks, lambda block: [logged(block)], [start], n_pcs, mean_rows=[mean * n_cells**0.5]
    )
    rows = counts.chunks.run(lambda block: Partial(rows=(np.asarray(logged(block) @ v),))).rows
    return rows[0] - mean @ v


def rank_of(counts: Counts, rng: np.random.Generator, overdispersion: float | np.ndarray | None = None) -> int:
    """Return the rank that `sc_noise2self.select_rank` finds, 1 at least, and of few molecules."""
    if counts.totals[slice(None) if counts.used is None else counts.used].sum() < _FEW:
        return 1
    chunks, phi = counts.chunks, None
    if overdispersion is not None:
        phi = checked_phi(overdispersion, chunks.shape[1])
    if counts.used is not None:
        chunks, phi = chunks.of_genes(counts.used), None if phi is None else phi[counts.used]
    max_rank = bounded("max_rank", None, MAX_RANK, *chunks.shape)
    return max(1, rank_curve(chunks, max_rank, rng, phi=phi).rank)


def clustered_by_half(
    method: Clusters, counts: Counts, overdispersion: float | np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, sp.csr_matrix, sp.csr_matrix]:
    """Return clusters of cells by half of their molecules, that half, and the other; raise where there is one cluster.

    Every option of the method has one value.
    """
    parts: Any = split_matrix(counts.in_memory(), overdispersion=overdispersion, random_state=rng)
    seen, held_out = parts
    if not seen.nnz or not held_out.nnz:
        raise ValueError(f"the counts hold {int(counts.size.sum())} molecule(s): too few to split into halves.")
    graph = method.graph(counts.part(seen, np.arange(len(counts.size))), rng)
    labels = graph.labels(method.resolution)  # type: ignore[arg-type]
    if labels.max() == 0:
        raise ValueError(f"all cells are one cluster at resolution {method.resolution:g}: pass a larger one.")
    return labels, seen, held_out


def as_groups(labels: np.ndarray) -> pd.Categorical:
    """Return clusters as `sc.tl.leiden` writes them, categories "0", "1", ..."""
    return pd.Categorical.from_codes(labels, [str(i) for i in range(labels.max() + 1)])


def profiles_of_clusters(labels: np.ndarray, counts: Counts) -> LowRankProfiles:
    """Return for every cell the profile of its cluster; cells have no scale yet."""
    shares = shrunk_shares(molecules_of(labels, counts.chunks), counts.totals)
    belongs = np.eye(len(shares), dtype=np.float32)[labels]
    share = counts.totals / counts.totals.sum()
    return LowRankProfiles.unscaled("none", belongs, shares.T.astype(np.float32), counts.size, share)


def gain_of_clusters(labels: np.ndarray, fold: Fold) -> Gain:
    """Return the gain on what is held out where every cell has the profile that its cluster has in what is seen."""
    held_out = fold.held_out
    shares = shrunk_shares(molecules_of(labels, fold.seen), column_sums(fold.seen))
    cluster = np.repeat(labels, np.diff(held_out.indptr))
    return fold.gain_of(shares[cluster, held_out.indices])


def molecules_of(labels: np.ndarray, counts: sp.csr_matrix | Chunks) -> np.ndarray:
    """Return the molecules of each gene in each cluster, float64 of shape (clusters, genes)."""
    n_clusters = int(labels.max()) + 1
    if not isinstance(counts, Chunks):
        return sums_of(counts, labels, n_clusters)
    return counts.run(lambda block: Partial([sums_of(block.counts, labels[block.cells], n_clusters)])).sums[0]


def shrunk_shares(molecules: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return the profile of each cluster, shape (clusters, genes), each summing to 1, shrunk to the mean profile.

    `molecules` has shape (clusters, genes), `totals` that of the mean profile, (genes,).
    """
    share = totals / totals.sum()
    return shrunk(molecules, share, likeliest_strength(molecules, share))


def shrunk(molecules: np.ndarray, share: np.ndarray, strength: float) -> np.ndarray:
    """Return profiles of these molecules, shape (..., genes), shrunk to a profile, (genes,), with a strength."""
    if np.isinf(strength):
        return np.broadcast_to(share, molecules.shape)
    return (molecules + strength * share) / (molecules.sum(axis=-1, keepdims=True) + strength)


def likeliest_strength(molecules: np.ndarray, share: np.ndarray) -> float:
    """Return the strength s that makes every molecule likeliest given all others; infinite where none does.

    The leave-one-out log likelihood is the sum of n log((n - 1 + s g) / (N - 1 + s)). Its derivative falls through 0
    where clusters differ by more than chance: where the sum of n (n - 1) / g exceeds that of N (N - 1).
    """
    cluster, gene = np.nonzero(molecules)
    n, g, size = molecules[cluster, gene], share[gene], molecules.sum(axis=1)
    size = size[size > 0]
    if (n * (n - 1) / g).sum() <= (size * (size - 1)).sum():
        return float("inf")

    def slope(log_strength: float) -> float:
        """Return the derivative by the logarithm of the strength."""
        s = np.exp(log_strength)
        return float(s * ((n * g / (n - 1 + s * g)).sum() - (size / (size - 1 + s)).sum()))

    low, high = np.log(_STRENGTHS[0]), np.log(_STRENGTHS[1] * size.sum())
    if slope(low) <= 0:
        return _STRENGTHS[0]
    if slope(high) >= 0:
        return float("inf")
    return float(np.exp(scipy.optimize.brentq(slope, low, high, xtol=1e-3)))
