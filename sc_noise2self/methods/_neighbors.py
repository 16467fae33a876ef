"""Denoise a cell by the cells like it: the mean of its nearest neighbours, or a random walk among them.

Neighbours are found in the space of principal components (`PCADenoiser`, log1p), and it is the coordinates on its
components that are averaged: factors stay factors, and the way back to counts is that of PCA. A neighbour weighs as
many molecules as it has, so an average is that of pooled molecules.

A walk of t steps averages over neighbours of neighbours (MAGIC, van Dijk et al. 2018). Its affinity of two cells is
exp(-(d / s)^2), with s the distance of a third of the way to the last neighbour, made symmetric: cells that few others
have for a neighbour are reached as well. (Symmetric affinities gained .001 to .004 nats over three data sets; other
widths and shapes of the kernel changed nothing.)
"""

from __future__ import annotations

from numbers import Integral
from typing import Self

import numpy as np
import scipy.sparse as sp
from sklearn.neighbors import KNeighborsTransformer

from .._counts import row_sums
from .._random import RandomState, as_generator
from ._pca import PCADenoiser
from ._profiles import LowRankProfiles

_STILL = float(np.finfo(np.float32).eps)
_EXACT_CELLS = 50_000  # searched exactly; neighbours among more are found by nearest neighbour descent


class KNNDenoiser:
    """Every cell as the mean of its nearest neighbours and itself.

    Parameters
    ----------
    n_neighbors
        Neighbours that are averaged, the cell itself included.
    n_pcs
        Principal components in which cells are near each other.
    n_components
        Principal components whose coordinates are averaged.
    random_state
        Seed of the factorisation and of an approximate search, or a generator.

    Attributes
    ----------
    pca_
        The `PCADenoiser` that gave the coordinates.
    walk_
        Weight of each cell in each cell's average, CSR of shape (cells, cells); rows sum to 1.
    """

    def __init__(
        self,
        n_neighbors: int = 30,
        *,
        n_pcs: int = 30,
        n_components: int = 100,
        random_state: RandomState = 0,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.n_pcs = n_pcs
        self.n_components = n_components
        self.random_state = random_state

    def fit(self, counts: sp.csr_matrix, genes: np.ndarray | None = None) -> Self:
        """Find the neighbours from counts, CSR of shape (cells, genes).

        Parameters
        ----------
        genes
            Boolean, shape (genes,): the genes that determine which cells are near. None uses all.

        Raises
        ------
        ValueError
            If a parameter is out of range.
        """
        n_used = counts.shape[1] if genes is None else int(genes.sum())
        n_components = min(self.n_components, counts.shape[0] - 1, n_used - 1)
        _check("n_neighbors", self.n_neighbors, counts.shape[0] - 1, f"{counts.shape[0]} cells")
        _check("n_pcs", self.n_pcs, n_components, f"{n_components} components")
        rng = as_generator(self.random_state)
        self.pca_ = PCADenoiser("log1p", n_components=n_components, random_state=rng).fit(counts, genes)
        self.size_ = row_sums(counts)
        coordinates = self.pca_.coordinates(counts)
        self.walk_ = self._walk(*nearest(coordinates[:, : self.n_pcs], self.n_neighbors, rng))
        self._coordinates = coordinates
        return self

    def predict(self, counts: sp.csr_matrix, *, n_rounds: int | None = None) -> LowRankProfiles:
        """Return the denoised profiles of the cells that were fitted: `counts` is what `fit` was given.

        Parameters
        ----------
        n_rounds
            Of `LowRankProfiles.with_totals`.

        Raises
        ------
        ValueError
            If these are other cells.
        """
        return self._predict(counts, 1, n_rounds)

    def _walk(self, distances: np.ndarray, neighbors: np.ndarray) -> sp.csr_matrix:
        return uniform_walk(neighbors[:, : self.n_neighbors], self.size_)

    def _predict(self, counts: sp.csr_matrix, t: int, n_rounds: int | None) -> LowRankProfiles:
        if not np.array_equal(row_sums(counts), self.size_):
            raise ValueError("these are other counts than those fitted: neighbours are known among those alone.")
        return self.pca_.rebuild(walked(self.walk_, self._coordinates, t), self.size_, n_rounds)


class DiffusionDenoiser(KNNDenoiser):
    """Every cell as the mean of where a random walk of t steps among neighbours ends.

    Parameters
    ----------
    n_neighbors
        Of the graph.
    n_pcs, n_components, random_state
        As in `KNNDenoiser`.

    Attributes
    ----------
    pca_, walk_
        As in `KNNDenoiser`; `walk_` is one step.
    """

    def __init__(
        self,
        n_neighbors: int = 15,
        *,
        n_pcs: int = 30,
        n_components: int = 100,
        random_state: RandomState = 0,
    ) -> None:
        super().__init__(n_neighbors, n_pcs=n_pcs, n_components=n_components, random_state=random_state)

    def predict(self, counts: sp.csr_matrix, *, t: int = 2, n_rounds: int | None = None) -> LowRankProfiles:
        """Return the denoised profiles of the cells that were fitted: `counts` is what `fit` was given.

        Parameters
        ----------
        t
            Steps of the walk; 0 leaves the components as they are.
        n_rounds
            Of `LowRankProfiles.with_totals`.

        Raises
        ------
        ValueError
            If these are other cells, or `t` is no number of steps.
        """
        if isinstance(t, bool) or not isinstance(t, Integral) or t < 0:
            raise ValueError(f"t is {t!r}: pass a whole number of steps, 0 or more.")
        return self._predict(counts, int(t), n_rounds)

    def _walk(self, distances: np.ndarray, neighbors: np.ndarray) -> sp.csr_matrix:
        return diffusion_walk(distances, neighbors, self.size_)


def nearest(points: np.ndarray, n_neighbors: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and indices of each point's nearest, itself first: shape (points, 1 + neighbours).

    scikit-learn's exact search, or, for more than 50 000 points, nearest neighbour descent (Dong et al. 2011) by
    PyNNDescent, which scanpy uses too.
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
    ordered = np.take_along_axis(indices, order, axis=1), np.take_along_axis(distances, order, axis=1)
    return ordered[1], ordered[0]


def uniform_walk(neighbors: np.ndarray, size: np.ndarray) -> sp.csr_matrix:
    """Return the weights of the average over neighbours, each by its molecules, CSR of shape (cells, cells).

    Parameters
    ----------
    neighbors
        Indices of those that each cell is the average of, shape (cells, k).
    size
        Molecules of each cell, shape (cells,).
    """
    return _walk(np.ones(neighbors.shape), neighbors, size)


def diffusion_walk(distances: np.ndarray, neighbors: np.ndarray, size: np.ndarray) -> sp.csr_matrix:
    """Return the probabilities of one step of the walk, CSR of shape (cells, cells).

    Parameters
    ----------
    distances, neighbors
        From `nearest`, shape (cells, 1 + k).
    size
        Molecules of each cell, shape (cells,).
    """
    scale = distances[:, [max(1, (distances.shape[1] - 1) // 3)]]
    affinity = np.exp(-np.square(distances / np.where(scale > 0, scale, 1)))
    return _walk(affinity, neighbors, size, symmetric=True)


def walked(walk: sp.csr_matrix, coordinates: np.ndarray, n_steps: int) -> np.ndarray:
    """Return the coordinates after so many steps; a walk that moves nothing more, to single precision, has arrived."""
    for _ in range(n_steps):
        before, coordinates = coordinates, walk @ coordinates
        if np.abs(coordinates - before).max(initial=0) <= _STILL * np.abs(before).max(initial=0):
            break
    return coordinates


def _walk(weights: np.ndarray, neighbors: np.ndarray, size: np.ndarray, symmetric: bool = False) -> sp.csr_matrix:
    n, k = neighbors.shape
    affinity = sp.csr_matrix((weights.ravel(), neighbors.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    if symmetric:
        affinity = (affinity + affinity.T).tocsr() / 2
    walk = affinity @ sp.diags(np.maximum(size, 1e-6))  # a cell without molecules stays where it is
    return (sp.diags(1 / row_sums(walk)) @ walk).tocsr()


def _check(name: str, value: int, bound: int, of: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value <= bound:
        raise ValueError(f"{name} is {value!r}: with {of} pass a whole number from 1 to {bound}.")
