"""Denoise a cell by the cells like it: the mean of its nearest neighbours, or a random walk among them.

Neighbours are found in the space of principal components (log1p), and it is the coordinates on these components that
are averaged: they fit in memory where counts do not, and the way back to counts is that of PCA. A neighbour weighs as
many molecules as it has, so an average is that of pooled molecules.

A walk of t steps averages over neighbours of neighbours (MAGIC, van Dijk et al. 2018). Its affinity of two cells is
exp(-(d / s)^2), with s the distance of a third of the way to the last neighbour, made symmetric: cells that few others
have for a neighbour are reached as well.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp
from sklearn.neighbors import KNeighborsTransformer

from .._blocks import Block, Counts, Partial
from .._checks import as_whole
from .._counts import depth_of, row_sums
from .._threads import in_threads
from ..partitions import Fold
from ._base import Learner, Method, TrialLearner, as_several, bounded_values, set_tuples
from ._components import Components, learn_components
from ._pca import n_components_of
from ._populations import HEIGHTS
from ._profiles import LowRankProfiles
from ._svd import N_PASSES

_STILL = float(np.finfo(np.float32).eps)
_TOGETHER = 8  # components that walk together: what they are on the way takes little memory
_EXACT_CELLS = 50_000  # searched exactly; neighbours among more are found by nearest neighbour descent


@dataclass(frozen=True, kw_only=True)
class _Neighbors(Method):
    """What both averages over neighbours share."""

    needs_memory: ClassVar[bool] = False

    n_pcs: int | Sequence[int] = (15, 30)
    n_neighbors: int | Sequence[int] = ()
    n_components: int | None = None

    def __post_init__(self) -> None:
        set_tuples(self, "n_pcs", "n_neighbors")

    @abstractmethod
    def walk(self, distances: np.ndarray, neighbors: np.ndarray, size: np.ndarray) -> sp.csr_matrix:
        """Return the weights of one step, CSR of shape (cells, cells), from what `nearest` returns."""

    @property
    def steps(self) -> Sequence[int]:
        """Numbers of steps to compare, rising."""
        return (1,)

    def checked(self, counts: Counts) -> Self:
        n, n_cells, usual = n_components_of(self.n_components, counts), counts.chunks.shape[0], type(self)
        pcs = bounded_values("n_pcs", self.n_pcs, usual.n_pcs, n, f"{n} components")
        near = bounded_values("n_neighbors", self.n_neighbors, usual.n_neighbors, n_cells - 1, f"{n_cells} cells")
        return replace(self, n_components=n, n_pcs=pcs, n_neighbors=near)

    def learners(self, counts: Counts) -> Sequence[Learner]:
        return [_NeighborsLearner(self, counts)]

    def denoise_counts(
        self, counts: Counts, rng: np.random.Generator, *, n_rounds: int | None = None
    ) -> LowRankProfiles:
        """Return expected counts; `n_rounds` is that of `ScaledProfiles.scaled`."""
        components, coordinates = self.coordinates(counts, N_PASSES, rng)
        found = nearest(coordinates[:, : self.n_pcs], self.n_neighbors, rng)  # type: ignore[arg-type]
        moved = walked(self.walk(*found, counts.size), coordinates, self.steps[0])
        return components.profiles(moved, counts.size).scaled(n_rounds)

    def coordinates(self, counts: Counts, n_passes: int, rng: np.random.Generator) -> tuple[Components, np.ndarray]:
        """Return the components and the coordinates of all cells on them, float32 of shape (cells, k)."""
        assert self.n_components is not None  # checked
        n_components = min(self.n_components, counts.chunks.shape[0] - 1)
        about: dict[str, Any] = {"n_passes": n_passes, "used": counts.used, "depth": depth_of(counts.size)}
        components = learn_components(counts.chunks, "log1p", n_components, rng, **about)

        def of_block(block: Block) -> Partial:
            return Partial(rows=[components.coordinates(block.counts).astype(np.float32)])

        return components, counts.chunks.run(of_block).rows[0]


@dataclass(frozen=True, kw_only=True)
class KNN(_Neighbors):
    """Every cell as the mean of its nearest neighbours and itself. Of several values the loss chooses one.

    Parameters
    ----------
    n_pcs
        Principal components in which cells are near each other, or several numbers to compare.
    n_neighbors
        Neighbours that are averaged, the cell itself included, or several numbers to compare.
    n_components
        Principal components whose coordinates are averaged. None takes 100, or as many as there are.
    """

    name: ClassVar[str] = "knn"
    title: ClassVar[str] = "the mean of neighbouring cells"

    n_neighbors: int | Sequence[int] = (10, 20, 40, 80)

    def walk(self, distances: np.ndarray, neighbors: np.ndarray, size: np.ndarray) -> sp.csr_matrix:
        kept = neighbors[:, : self.n_neighbors]
        return _walk(np.ones(kept.shape), kept, size)


@dataclass(frozen=True, kw_only=True)
class Diffusion(_Neighbors):
    """Every cell as the mean of where a random walk among neighbours ends. Of several values the loss chooses one.

    Parameters
    ----------
    n_pcs, n_components
        As in `KNN`.
    n_neighbors
        Neighbours of a cell in the graph, or several numbers to compare.
    t
        Steps of the walk, or several numbers to compare, in rising order until the gain first falls; 0 leaves the
        components as they are.
    """

    name: ClassVar[str] = "diffusion"
    title: ClassVar[str] = "a diffusion among neighbouring cells"

    n_neighbors: int | Sequence[int] = (8, 15, 30, 60)
    t: int | Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8)

    def __post_init__(self) -> None:
        super().__post_init__()
        set_tuples(self, "t")
        if not (steps := as_several(self.t)):
            raise ValueError("t is empty: pass a whole number, or several.")
        for each in steps:
            as_whole("t", each, least=0)

    @property
    def steps(self) -> Sequence[int]:
        return sorted(as_several(self.t))

    def walk(self, distances: np.ndarray, neighbors: np.ndarray, size: np.ndarray) -> sp.csr_matrix:
        kept = slice(self.n_neighbors + 1)  # type: ignore[operator]
        distances, neighbors = distances[:, kept], neighbors[:, kept]
        scale = distances[:, [max(1, (distances.shape[1] - 1) // 3)]]
        affinity = np.exp(-np.square(distances / np.where(scale > 0, scale, 1)))
        return _walk(affinity, neighbors, size, symmetric=True)


class _NeighborsLearner(TrialLearner):
    """An average over neighbours: one search serves every number of neighbours, and one walk every t."""

    method: _Neighbors

    @property
    def settings(self) -> Sequence[Any]:
        """The one that was chosen, e.g. ``"30 PCs, 15 neighbors, t 2"``."""
        t = getattr(self.method, "t", None)
        words = f"{self.method.n_pcs} PCs, {self.method.n_neighbors} neighbors"
        return (words if t is None else f"{words}, t {t}",)

    def compare(self, fold: Fold, rng: np.random.Generator) -> None:
        """Score the options; a walk goes on as long as it gains.

        Without a floor the options that leave fewest zeros would win. It is that of the mean profile, of the height
        that suits the first candidate best; the populations whose floor the result has are not known yet.
        """
        height = None
        method, size = self.method, row_sums(fold.seen)
        components, start = method.coordinates(self._counts.part(fold.seen, fold.cells), 3, rng)
        neighbors = sorted(as_several(method.n_neighbors))
        for n_pcs in sorted(as_several(method.n_pcs)):
            found = nearest(start[:, :n_pcs], neighbors[-1], rng)
            for n_neighbors in neighbors:
                options = {"n_pcs": n_pcs, "n_neighbors": n_neighbors}
                walk = replace(method, **options).walk(*found, size)
                moved, before, last = start, 0, -np.inf
                for t in method.steps:
                    moved, before = walked(walk, moved, t - before), t
                    profiles = components.profiles(moved, size).balanced(n_rounds=1)
                    if height is None:
                        height = max(HEIGHTS, key=lambda h: fold.gain(profiles.raised(h)).mean)
                    gain = fold.gain(profiles.raised(height))
                    self._comparison.add(options | {"t": t} if hasattr(method, "t") else options, -gain)
                    if gain.mean < last:
                        break
                    last = gain.mean

    def learn(self, half: Fold, rng: np.random.Generator) -> None:
        counts = self._counts.part(half.seen, half.cells)
        self._fits.append(self.method.denoise_counts(counts, rng, n_rounds=1))
        self._cells = half.cells


def nearest(points: np.ndarray, n_neighbors: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and indices of each point's nearest, itself first: shape (points, 1 + neighbours).

    The search is exact, or, for more than 50 000 points, nearest neighbour descent (Dong et al. 2011).
    """
    points = np.ascontiguousarray(points, np.float32)
    if len(points) <= _EXACT_CELLS:
        search = KNeighborsTransformer(n_neighbors=n_neighbors, algorithm="brute")
    else:
        from pynndescent import PyNNDescentTransformer

        search = PyNNDescentTransformer(n_neighbors=n_neighbors, random_state=int(rng.integers(2**31)))
    graph = search.fit_transform(points)
    distances, indices = (x.reshape(len(points), -1) for x in (graph.data, graph.indices))
    # Points that coincide may come before the point itself, or keep it out; it is wanted first.
    itself = np.arange(len(points))[:, None]
    missing = ~(indices == itself).any(axis=1)
    indices[missing, -1], distances[missing, -1] = np.flatnonzero(missing), 0
    order = np.lexsort((distances, indices != itself))
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(indices, order, axis=1)


def walked(walk: sp.csr_matrix, coordinates: np.ndarray, n_steps: int) -> np.ndarray:
    """Return the coordinates after so many steps, each step in double precision, a few components at a time.

    Components that a step no longer moves, to single precision, have arrived.
    """
    out = np.empty_like(coordinates)

    def of_some(columns: slice) -> None:
        moved = np.ascontiguousarray(coordinates[:, columns])
        for _ in range(n_steps):
            before, moved = moved, walk @ moved
            if np.abs(moved - before).max(initial=0) <= _STILL * np.abs(before).max(initial=0):
                break
        out[:, columns] = moved

    for _ in in_threads(of_some, (slice(i, i + _TOGETHER) for i in range(0, coordinates.shape[1], _TOGETHER))):
        pass
    return out


def _walk(weights: np.ndarray, neighbors: np.ndarray, size: np.ndarray, symmetric: bool = False) -> sp.csr_matrix:
    """Return the weights of the average over neighbours, each by its molecules, CSR of shape (cells, cells)."""
    n, k = neighbors.shape
    affinity = sp.csr_matrix((weights.ravel(), neighbors.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    if symmetric:
        affinity = (affinity + affinity.T).tocsr() / 2
    walk = affinity @ sp.diags(np.maximum(size, 1e-6))  # a cell without molecules stays where it is
    return (sp.diags(1 / row_sums(walk)) @ walk).tocsr()
