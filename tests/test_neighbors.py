"""Averages over neighbours: their walks, what they gain, and how they are set."""

from __future__ import annotations

from itertools import product

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import divergence, low_rank_profiles, poisson_counts

import sc_noise2self as n2s
from sc_noise2self.methods._neighbor_member import GRIDS, NeighborsMember
from sc_noise2self.methods._neighbors import DiffusionDenoiser, KNNDenoiser, diffusion_walk, nearest, uniform_walk
from sc_noise2self.methods._pca import PCADenoiser

SMALL = {"n_pcs": 5, "n_components": 10}


@pytest.fixture
def points():
    return np.random.default_rng(0).normal(size=(200, 3))


def test_nearest_are_the_nearest_and_the_point_itself_comes_first(points):
    distances, indices = nearest(points, 7, np.random.default_rng(0))
    every = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.testing.assert_array_equal(indices[:, 0], np.arange(200))
    np.testing.assert_array_equal(indices, np.argsort(every, axis=1)[:, :8])
    np.testing.assert_allclose(distances, np.sort(every, axis=1)[:, :8], atol=1e-3)


def test_a_point_comes_first_among_others_at_its_place():
    points = np.zeros((6, 2))
    _, indices = nearest(points, 3, np.random.default_rng(0))
    np.testing.assert_array_equal(indices[:, 0], np.arange(6))


def test_many_points_are_searched_approximately(points, monkeypatch):
    monkeypatch.setattr("sc_noise2self.methods._neighbors._EXACT_CELLS", 100)
    distances, indices = nearest(points, 7, np.random.default_rng(0))
    again = nearest(points, 7, np.random.default_rng(0))[1]
    np.testing.assert_array_equal(indices, again)
    every = np.argsort(np.linalg.norm(points[:, None] - points[None], axis=2), axis=1)[:, :8]
    found = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(indices, every, strict=True)])
    assert found > 0.95
    np.testing.assert_array_equal(indices[:, 0], np.arange(200))
    assert (np.diff(distances, axis=1) >= 0).all()


def test_rows_of_a_walk_sum_to_one_and_neighbours_weigh_their_molecules(points):
    size = np.random.default_rng(1).integers(1, 100, 200).astype(float)
    distances, indices = nearest(points, 7, np.random.default_rng(0))
    for walk in (uniform_walk(indices, size), diffusion_walk(distances, indices, size)):
        np.testing.assert_allclose(walk.sum(axis=1), 1)
    row = uniform_walk(indices, size)[[3]].toarray().ravel()
    np.testing.assert_allclose(row[indices[3]], size[indices[3]] / size[indices[3]].sum())
    # the affinity behind the walk is symmetric: cell i's molecules x its row sum
    walk = diffusion_walk(distances, indices, np.ones(200))
    assert ((walk > 0) != (walk > 0).T).nnz == 0


def test_empty_cells_neither_fail_nor_weigh_anything(counts):
    dense = counts.toarray()
    dense[[0, 5]] = 0
    denoised = DiffusionDenoiser(10, **SMALL).fit(sp.csr_matrix(dense)).predict(sp.csr_matrix(dense))
    assert np.isfinite(denoised.counts()).all()
    assert (denoised.counts()[[0, 5]] == 0).all()


@pytest.mark.parametrize("denoiser", [KNNDenoiser(20, **SMALL), DiffusionDenoiser(10, **SMALL)])
def test_denoised_counts_are_nearer_the_truth_and_keep_totals(truth, counts, denoiser):
    before = counts.copy()
    denoised = denoiser.fit(counts).predict(counts)
    mean = np.tile(counts.sum(axis=0) / counts.sum(), (len(truth), 1))
    to_mean = (truth * np.log(truth / np.asarray(mean))).sum(axis=1).mean()
    assert divergence(truth, denoised) < 0.15 * to_mean
    np.testing.assert_allclose(denoised.counts().sum(axis=1), counts.sum(axis=1).A1, rtol=1e-4)
    np.testing.assert_allclose(denoised.counts().sum(axis=0), counts.sum(axis=0).A1, rtol=0.01)
    assert (counts != before).nnz == 0


def test_every_t_comes_from_one_walk(counts):
    fitted = DiffusionDenoiser(10, **SMALL).fit(counts)
    late = fitted.predict(counts, t=4).scores
    expected = fitted.pca_.coordinates(counts)
    for _ in range(4):
        expected = fitted.walk_ @ expected
    np.testing.assert_allclose(late[:, 1:], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        fitted.predict(counts, t=1).scores, DiffusionDenoiser(10, **SMALL).fit(counts).predict(counts, t=1).scores
    )
    np.testing.assert_allclose(fitted.predict(counts, t=0).scores, fitted.pca_.predict(counts).scores, rtol=1e-5)


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (KNNDenoiser(0), "n_neighbors is 0: with 400 cells pass a whole number from 1 to 399"),
        (KNNDenoiser(400), "n_neighbors is 400"),
        (KNNDenoiser(2.5), "n_neighbors is 2.5"),
        (DiffusionDenoiser(n_pcs=11, n_components=10), "n_pcs is 11: with 10 components"),
    ],
)
def test_impossible_neighbours_are_refused(counts, denoiser, message):
    with pytest.raises(ValueError, match=message):
        denoiser.fit(counts)


def test_other_cells_and_negative_steps_are_refused(counts):
    fitted = DiffusionDenoiser(10, **SMALL).fit(counts)
    with pytest.raises(ValueError, match="other counts than those fitted"):
        fitted.predict(counts[:10])
    with pytest.raises(ValueError, match="t is -1: pass a whole number of steps, 0 or more"):
        fitted.predict(counts, t=-1)


@pytest.mark.parametrize("kind", ["knn", "diffusion"])
def test_denoise_chooses_what_is_near_the_best_against_the_truth(truth, counts, kind):
    adata = ad.AnnData(counts)
    n2s.denoise(adata, method=kind)
    found = _divergence(truth, adata.layers["denoised"])
    grid = GRIDS[kind]
    best = np.inf
    for n_pcs, n_neighbors in product(grid["n_pcs"], grid["n_neighbors"]):
        denoiser = {"knn": KNNDenoiser, "diffusion": DiffusionDenoiser}[kind](n_neighbors, n_pcs=n_pcs).fit(counts)
        for t in grid["t"]:
            steps = {"t": t} if kind == "diffusion" else {}
            best = min(best, divergence(truth, denoiser.predict(counts, **steps)))
    assert found < 1.1 * best
    table = adata.uns["denoised"]["learned"][kind]["table"]
    assert list(table) == ["n_pcs", "n_neighbors", "t", "loss", "error", "gain", "chosen"]
    assert table["error"][table["gain"].argmax()] == 0
    assert list(adata.uns["denoised"]["members"]["name"]) == [kind]


def _divergence(truth, denoised):
    p = np.maximum(np.asarray(denoised, np.float64), 1e-12)
    p /= p.sum(axis=1, keepdims=True)
    return (truth * np.log(truth / p)).sum(axis=1).mean()


def test_parameters_given_are_used_alone(adata):
    n2s.denoise(adata, method="diffusion", neighbors={"n_neighbors": 12, "t": [2, 3], "n_pcs": 6})
    record = adata.uns["denoised"]["learned"]["diffusion"]["table"]
    assert set(record["n_neighbors"]) == {12}
    assert set(record["n_pcs"]) == {6}
    assert set(record["t"]) <= {2, 3}
    assert adata.uns["denoised"]["params"]["neighbors"]["n_neighbors"] == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pca", "neighbors": {"t": 2}}, "neighbors was given, but neither diffusion nor knn is used"),
        ({"method": "knn", "neighbors": {"t": 2}}, "neighbors has t: it takes n_neighbors, n_pcs"),
        ({"method": "diffusion", "neighbors": {"knn": 2}}, "neighbors has knn: it takes n_neighbors, n_pcs, t"),
        ({"method": "diffusion", "neighbors": {"t": 0}}, "t is 0: pass a whole number, 1 or more"),
        ({"method": "diffusion", "neighbors": {"t": []}}, "t is 0"),
        ({"method": "diffusion", "neighbors": {"n_neighbors": 300}}, "n_neighbors is 300: 299 is the most"),
        ({"method": "diffusion", "neighbors": {"n_pcs": 120}}, "n_pcs is 120: 100 is the most"),
    ],
)
def test_parameters_that_do_nothing_or_cannot_be_are_refused(adata, options, message):
    with pytest.raises(ValueError, match=message):
        n2s.denoise(adata, **options)
    assert not adata.uns


def test_neighbours_join_the_ensemble_and_survive_a_file(adata, tmp_path):
    n2s.denoise(adata, method="ensemble", members=("pca", "diffusion", "knn"))
    names = set(adata.uns["denoised"]["members"]["name"])
    assert names & {"diffusion", "knn"}
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    found = n2s.get.denoised(again, list(again.var_names[:3]))
    np.testing.assert_allclose(found, adata.layers["denoised"][:, :3], rtol=1e-4, atol=1e-6)


def test_same_seed_same_bytes(simulated):
    layers = []
    for _ in range(2):
        adata = ad.AnnData(simulated.copy())
        n2s.denoise(adata, method="diffusion")
        layers.append(adata.layers["denoised"].tobytes())
    assert layers[0] == layers[1]


def test_only_the_genes_asked_for_say_who_is_near(counts):
    genes = np.arange(counts.shape[1]) % 2 == 0
    found = KNNDenoiser(10, **SMALL).fit(counts, genes)
    scores = PCADenoiser("log1p", n_components=10).fit(counts, genes).coordinates(counts)[:, :5]
    _, indices = nearest(scores, 10, np.random.default_rng(0))
    expected = uniform_walk(indices[:, :10], np.asarray(counts.sum(axis=1)).ravel())
    assert (found.walk_ != expected).nnz == 0


def test_few_cells_are_chosen_by_where_there_are_many(monkeypatch):
    monkeypatch.setattr("sc_noise2self.methods._neighbor_member._ENOUGH_CELLS", 100)
    counts = poisson_counts(low_rank_profiles(250, 80, 3, seed=0), 500, seed=1)
    member = NeighborsMember("diffusion", 20, grid={"n_neighbors": (8,), "n_pcs": (5,), "t": (1, 2)})
    member.prepare(counts, np.arange(250), np.random.default_rng(0))
    assert all(len(gain.sums) == 100 for gain in member._tried.values())
