"""Simulated counts with known rates."""

from __future__ import annotations

import io
import logging
from contextlib import contextmanager

import numpy as np
import scanpy as sc
import scipy.sparse as sp

from sc_noise2self.methods._components import learn_components


def low_rank_profiles(n_cells: int, n_genes: int, rank: int, seed: int) -> np.ndarray:
    """Profiles (rows sum to 1) that are mixtures of `rank` random programmes: a matrix of exactly that rank."""
    rng = np.random.default_rng(seed)
    programmes = rng.gamma(0.3, size=(rank, n_genes)) + 0.02
    programmes /= programmes.sum(axis=1, keepdims=True)
    return rng.dirichlet(np.full(rank, 0.5), size=n_cells) @ programmes


def poisson_counts(profiles: np.ndarray, depth: float, seed: int) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    size = depth * rng.gamma(8, 1 / 8, size=(len(profiles), 1))
    return sp.csr_matrix(rng.poisson(profiles * size).astype(np.float32))


def dense(x) -> np.ndarray:
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def layer_names(adata) -> set[str]:
    """Names of the layers; anndata lists X among them as None since 0.13."""
    return set(adata.layers) - {None}


@contextmanager
def scanpy_settings(**values):
    """Change settings of scanpy, and set them back: the way of scanpy itself is another one from 1.13 on."""
    before = {name: getattr(sc.settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(sc.settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(sc.settings, name, value)


@contextmanager
def said_by_scanpy(verbosity):
    """Listen to what is logged; another `logfile` under pytest has scanpy 1.13 write a file named like a stream."""
    said, root = io.StringIO(), sc.settings._root_logger
    listener = logging.StreamHandler(said)
    root.addHandler(listener)
    try:
        with scanpy_settings(verbosity=verbosity):
            yield said
    finally:
        root.removeHandler(listener)


def divergence(truth: np.ndarray, denoised) -> float:
    """Mean KL(truth || profile) over cells, in nats; of expected counts, or of profiles that give them."""
    p = np.array(denoised.counts() if hasattr(denoised, "counts") else denoised, np.float64)
    p /= p.sum(axis=1, keepdims=True)
    return (truth * np.log(truth / np.maximum(p, 1e-12))).sum(axis=1).mean()


def mean_divergence(truth: np.ndarray, counts: sp.csr_matrix) -> float:
    """The same of the mean profile."""
    return divergence(truth, np.tile(np.asarray(counts.sum(axis=0)), (len(truth), 1)))


class PCAEstimator:
    """PCA as an estimator of somebody else's: `rank` says how many components `predict` keeps."""

    def __init__(self, transform="log1p", *, n_components=100):
        self.transform = transform
        self.n_components = n_components

    def fit(self, counts):
        self.components_ = learn_components(counts, self.transform, self.n_components, np.random.default_rng(0))
        return self

    def predict(self, counts, *, rank):
        weights = (np.arange(self.n_components) < rank).astype(float)
        return self.components_.weighted_profiles(counts, weights).scaled()
