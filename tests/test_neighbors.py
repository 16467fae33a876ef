"""Averages over neighbours: their walks, what they gain, and how they are set."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import divergence, low_rank_profiles, mean_divergence, poisson_counts

import sc_noise2self as n2s
from sc_noise2self._blocks import Counts
from sc_noise2self.methods._components import learn_components
from sc_noise2self.methods._neighbors import nearest, walked

SMALL = {"n_pcs": 5, "n_components": 10}
ONE_OF_EACH = [n2s.KNN(n_neighbors=20, **SMALL), n2s.Diffusion(n_neighbors=10, t=2, **SMALL)]
each_kind = pytest.mark.parametrize("method", ONE_OF_EACH, ids=lambda method: method.name)


def denoised(method, counts, genes=None):
    counts = Counts.of(counts, genes)
    return method.checked(counts).denoise_counts(counts, np.random.default_rng(0))


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


@pytest.mark.slow  # to compile PyNNDescent takes half a minute
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
    found = nearest(points, 7, np.random.default_rng(0))
    mean, diffusion = n2s.KNN(n_neighbors=5), n2s.Diffusion(n_neighbors=5)
    for method in (mean, diffusion):
        np.testing.assert_allclose(method.walk(*found, size).sum(axis=1), 1)
    row, own = mean.walk(*found, size)[[3]].toarray().ravel(), found[1][3, :5]
    assert np.count_nonzero(row) == 5  # the cell itself among them
    np.testing.assert_allclose(row[own], size[own] / size[own].sum())
    # the affinity behind the walk is symmetric: cell i's molecules x its row sum
    walk = diffusion.walk(*found, np.ones(200))
    assert ((walk > 0) != (walk > 0).T).nnz == 0


@each_kind
def test_empty_cells_neither_fail_nor_weigh_anything(counts, method):
    dense = counts.toarray()
    dense[[0, 5]] = 0
    found = denoised(method, sp.csr_matrix(dense)).counts()
    assert np.isfinite(found).all()
    assert (found[[0, 5]] == 0).all()
    others = np.delete(dense, [0, 5], axis=0)
    totals = found.sum(axis=0)
    np.testing.assert_allclose(totals, others.sum(axis=0), rtol=0.01)


@each_kind
def test_denoised_counts_are_nearer_the_truth_and_keep_totals(truth, counts, method):
    before = counts.copy()
    found = denoised(method, counts)
    assert divergence(truth, found) < 0.15 * mean_divergence(truth, counts)
    np.testing.assert_allclose(found.counts().sum(axis=1), counts.sum(axis=1).A1, rtol=1e-4)
    np.testing.assert_allclose(found.counts().sum(axis=0), counts.sum(axis=0).A1, rtol=0.01)
    assert (counts != before).nnz == 0


def test_t_steps_average_coordinates_t_times(counts):
    method, about = n2s.Diffusion(n_neighbors=10, t=4, **SMALL), Counts.of(counts)
    components, start = method.coordinates(about, 4, np.random.default_rng(0))
    walk = method.walk(*nearest(start[:, :5], 10, np.random.default_rng(0)), about.size)
    expected = start
    for _ in range(4):
        expected = walk @ expected
    np.testing.assert_allclose(denoised(method, counts).scores[:, 1:], expected, rtol=1e-4, atol=1e-5)
    exact = start.astype(np.float64)
    np.testing.assert_array_equal(walked(walk, walked(walk, exact, 1), 3), walked(walk, exact, 4))
    still = components.weighted_profiles(counts, np.ones(10)).scaled()
    np.testing.assert_allclose(denoised(replace(method, t=0), counts).scores, still.scores, rtol=1e-5)


def test_a_walk_that_moves_nothing_more_has_arrived():
    walk = sp.csr_matrix(np.full((4, 4), 0.25))
    found = walked(walk, np.arange(8, dtype=np.float64).reshape(4, 2), 10**9)  # as many steps would take for ever
    np.testing.assert_allclose(found, np.tile([3.0, 4.0], (4, 1)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: n2s.KNN(n_neighbors=0), "n_neighbors is 0: pass a whole number, 1 or more"),
        (lambda: n2s.KNN(n_neighbors=2.5), "n_neighbors is 2.5: pass a whole number, 1 or more"),
        (lambda: n2s.KNN(n_neighbors=300), "n_neighbors is 300: 299 is the most that 300 cells allow"),
        (lambda: n2s.KNN(n_neighbors=[5, 300]), "n_neighbors is 300: 299 is the most"),
        (lambda: n2s.KNN(n_neighbors=[]), "n_neighbors is empty: pass a whole number, or several"),
        (lambda: n2s.Diffusion(n_pcs=11, n_components=10), "n_pcs is 11: 10 is the most that 10 components allow"),
        (lambda: n2s.Diffusion(n_pcs=120), "n_pcs is 120: 100 is the most"),
        (lambda: n2s.Diffusion(n_components=120), "n_components is 120: 300 cells x 120 genes have at most 119"),
        (lambda: n2s.Diffusion(t=-1), "t is -1: pass a whole number, 0 or more"),
        (lambda: n2s.Diffusion(t=[1, 2.5]), "t is 2.5: pass a whole number, 0 or more"),
        (lambda: n2s.Diffusion(t=[]), "t is empty: pass a whole number, or several"),
    ],
)
def test_what_cannot_be_is_refused(adata, make, message):
    with pytest.raises(ValueError, match=message):
        n2s.denoise(adata, make())
    assert not adata.uns
    assert not adata.obsm


def test_the_usual_values_are_cut_to_what_few_cells_have(simulated):
    few = Counts.of(simulated[:12])
    method = n2s.Diffusion().checked(few)
    assert (method.n_components, method.n_pcs, method.n_neighbors) == (11, (11,), (8, 11))
    assert method.checked(few) == method


@pytest.mark.parametrize("several", [list, tuple, np.array])
def test_values_come_in_any_sequence(simulated, several):
    adata = ad.AnnData(simulated.copy())
    n2s.denoise(adata, n2s.KNN(n_pcs=several([5, 8]), n_neighbors=several([20, 10])), write_layer=False)
    table = adata.uns["denoised"]["learned"]["knn"]["table"]
    assert sorted(zip(table["n_pcs"], table["n_neighbors"], strict=True)) == [(5, 10), (5, 20), (8, 10), (8, 20)]


@pytest.mark.parametrize("several", [list, np.array])
def test_methods_of_equal_values_are_equal(several):
    for kind, options in (
        (n2s.KNN, {"n_pcs": [5, 8]}),
        (n2s.Diffusion, {"t": [1, 2]}),
        (n2s.Autoencoder, {"width": [2, 4]}),
    ):
        one, other = (kind(**{name: make(value) for name, value in options.items()}) for make in (several, tuple))
        assert one == other
        assert hash(one) == hash(other)


@pytest.mark.parametrize("kind", [n2s.KNN, n2s.Diffusion], ids=lambda kind: kind.name)
def test_what_is_chosen_is_near_the_best_against_the_truth(truth, counts, kind):
    adata = ad.AnnData(counts)
    n2s.denoise(adata, kind())
    about = Counts.of(counts)
    usual = kind().checked(about)
    components, start = usual.coordinates(about, 4, np.random.default_rng(0))
    best = np.inf
    for n_pcs, n_neighbors in product(usual.n_pcs, usual.n_neighbors):
        method = replace(usual, n_pcs=n_pcs, n_neighbors=n_neighbors)
        walk = method.walk(*nearest(start[:, :n_pcs], n_neighbors, np.random.default_rng(0)), about.size)
        moved = start
        for _ in usual.steps:
            moved = walk @ moved
            best = min(best, divergence(truth, components.profiles(moved, about.size).scaled(2)))
    assert divergence(truth, adata.layers["denoised"]) < 1.1 * best


def test_the_table_says_what_was_compared(adata):
    for method, names in (
        (n2s.KNN(n_neighbors=[10, 40], n_pcs=[5, 10]), ["n_pcs", "n_neighbors"]),
        (n2s.Diffusion(n_neighbors=[12, 20], t=[3, 2], n_pcs=6), ["n_pcs", "n_neighbors", "t"]),
    ):
        n2s.denoise(adata, method, write_layer=False, key_added=method.name)
        record = adata.uns[method.name]
        table = record["learned"][method.name]["table"]
        assert list(table) == [*names, "loss", "error", "gain", "chosen"]
        np.testing.assert_array_equal(table["gain"], -table["loss"])
        assert list(np.flatnonzero(table["chosen"])) == [table["gain"].argmax()]
        assert table["error"][table["gain"].argmax()] == 0
        assert (table["error"].drop(table["gain"].argmax()) > 0).all()
        for name in names:
            assert set(table[name]) <= set(np.atleast_1d(getattr(method, name)))
        assert list(record["members"]["name"]) == [method.name]
        chosen = table[table["chosen"]].iloc[0]
        setting = f"{chosen['n_pcs']} PCs, {chosen['n_neighbors']} neighbors"
        assert record["members"]["setting"][0] == setting + (f", t {chosen['t']}" if "t" in names else "")
    assert set(table["t"]) == {2, 3}  # in rising order, a walk going on as long as it gains
    np.testing.assert_array_equal(record["params"]["methods"]["0 diffusion"]["n_neighbors"], [12, 20])


def test_neighbours_join_the_ensemble_and_survive_a_file(adata, tmp_path):
    n2s.denoise(adata, ["pca", *ONE_OF_EACH])
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
        n2s.denoise(adata, n2s.Diffusion(n_pcs=(5, 10), n_neighbors=(8, 15)))
        layers.append(adata.layers["denoised"].tobytes())
    assert layers[0] == layers[1]


def test_only_the_genes_asked_for_say_who_is_near(counts):
    genes = np.arange(counts.shape[1]) % 2 == 0
    found = denoised(n2s.KNN(n_neighbors=10, **SMALL), counts, genes)
    components = learn_components(counts, "log1p", 10, np.random.default_rng(0), used=genes)
    start, size = components.coordinates(counts), np.asarray(counts.sum(axis=1)).ravel()
    near = nearest(start[:, :5], 10, np.random.default_rng(0))[1][:, :10]
    expected = np.array([np.average(start[own], axis=0, weights=size[own]) for own in near])
    np.testing.assert_allclose(found.scores[:, 1:], expected, rtol=1e-4, atol=1e-5)


def test_few_cells_are_chosen_by_where_there_are_many(monkeypatch):
    monkeypatch.setattr("sc_noise2self.methods._base._ENOUGH_CELLS", 100)
    counts = Counts.of(poisson_counts(low_rank_profiles(250, 80, 3, seed=0), 500, seed=1))
    (learner,) = n2s.Diffusion(n_neighbors=8, n_pcs=5, t=(1, 2), n_components=20).checked(counts).learners(counts)
    compare, folds = learner.compare, []
    monkeypatch.setattr(learner, "compare", lambda fold, rng: folds.append(fold) or compare(fold, rng))
    learner.prepare(counts.in_memory(), np.arange(250), np.random.default_rng(0))
    assert [fold.seen.shape[0] for fold in folds] == [100]
    assert len(np.unique(folds[0].cells)) == 100
    assert folds[0].cells.max() > 100  # from anywhere
