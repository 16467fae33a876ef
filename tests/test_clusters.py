"""Clusters by scanpy's recipe, and what the molecules say of them: resolution, support, and tests without circles."""

import importlib
import sys
import threading
import warnings
from contextlib import contextmanager

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
import scipy.stats
from helpers import dense, low_rank_profiles, poisson_counts, said_by_scanpy
from promises import difference, documented_warnings, fingerprint
from scipy.cluster.hierarchy import is_valid_linkage
from scipy.optimize import minimize_scalar
from sklearn.metrics import adjusted_rand_score

import sc_noise2self as n2s
from sc_noise2self._blocks import Counts
from sc_noise2self._groups import scored_clusters, tails
from sc_noise2self._support import joins
from sc_noise2self.methods._clusters import (
    Graph,
    gain_of_clusters,
    likeliest_strength,
    molecules_of,
    principal_coordinates,
    profiles_of_clusters,
    shrunk_shares,
)
from sc_noise2self.partitions import fold_of


def grouped(n_groups=4, n_cells=400, n_genes=300, depth=1500, seed=0, strength=1.0):
    """Counts of cells in groups that differ in a tenth of their genes, the groups, and the true profiles."""
    rng = np.random.default_rng(seed)
    logs = rng.normal(0, 1, n_genes) + rng.normal(0, strength, (n_groups, n_genes)) * (
        rng.random((n_groups, n_genes)) < 0.1
    )
    profiles = np.exp(logs)
    profiles /= profiles.sum(axis=1, keepdims=True)
    groups = rng.integers(n_groups, size=n_cells)
    return ad.AnnData(poisson_counts(profiles[groups], depth, seed)), groups, profiles


def negative_binomial(phi, n_cells=400, depth=1500, seed=0):
    """Counts in which every gene varies from cell to cell on its own, and there are no groups."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(len(phi), 2.0))
    mean = depth * rng.gamma(8, 1 / 8, size=(n_cells, 1)) * share
    return sp.csr_matrix(rng.poisson(mean * rng.gamma(1 / phi, phi, mean.shape)).astype(np.float32))


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*args, **options)


# The recipe


def recipe(adata, n_pcs, mask=None):
    """The clusters of scanpy's own functions."""
    other = adata.copy()
    sc.pp.normalize_total(other)
    sc.pp.log1p(other)
    sc.pp.pca(other, n_comps=n_pcs, mask_var=mask)
    return other


@pytest.mark.parametrize("masked", [False, True])
def test_coordinates_are_those_of_scanpy(masked):
    adata, _, _ = grouped()
    mask = np.arange(300) % 2 == 0 if masked else None
    found = principal_coordinates(Counts.of(adata.X, mask), 4, np.random.default_rng(0))
    expected = recipe(adata, 4, mask).obsm["X_pca"]
    # Three components tell four groups; the fourth is noise, which an iteration finds to some per cent.
    np.testing.assert_allclose(np.abs(found)[:, :3], np.abs(expected)[:, :3], rtol=1e-2, atol=1e-2)


def test_clusters_are_those_of_scanpy():
    adata, groups, _ = grouped(depth=3000)
    other = recipe(adata, 3)
    sc.pp.neighbors(other)
    options = {"flavor": "igraph", "n_iterations": 2, "directed": False}
    graph = Graph.of(Counts.of(adata.X), 3, 15, np.random.default_rng(0))
    for resolution in (0.2, 1.0):
        sc.tl.leiden(other, resolution=resolution, **options)
        assert adjusted_rand_score(other.obs["leiden"], graph.labels(resolution)) > 0.9
    assert adjusted_rand_score(groups, graph.labels(0.2)) > 0.99
    np.testing.assert_array_equal(graph.labels(0), 0)


def test_more_cells_than_scanpy_searches_exactly():
    adata, groups, _ = grouped(n_cells=4200, n_genes=60, depth=400)
    graph = Graph.of(Counts.of(adata.X), 3, 15, np.random.default_rng(0))
    assert adjusted_rand_score(groups, graph.labels(0.1)) > 0.9


def test_the_strength_makes_every_molecule_likeliest_given_the_others():
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(12))
    molecules = rng.multinomial(60, rng.dirichlet(20 * share, size=5)).astype(float)

    def one_by_one(strength):
        """The log likelihood of each molecule, itself taken out of its cluster."""
        total = 0.0
        for row in molecules:
            for gene in np.repeat(np.arange(12), row.astype(int)):
                rest = row.copy()
                rest[gene] -= 1
                total += np.log((rest[gene] + strength * share[gene]) / (rest.sum() + strength))
        return total

    found = likeliest_strength(molecules, share)
    grid = found * np.array([0.5, 0.9, 1.1, 2.0])
    assert all(one_by_one(found) > one_by_one(each) for each in grid)
    shares = shrunk_shares(molecules, molecules.sum(axis=0))
    np.testing.assert_allclose(shares.sum(axis=1), 1)


def test_clusters_of_chance_have_the_mean_profile():
    rng = np.random.default_rng(1)
    molecules = np.tile([8.0, 4.0, 4.0], (3, 1))  # as even as can be
    assert likeliest_strength(molecules, np.array([0.5, 0.25, 0.25])) == np.inf
    np.testing.assert_allclose(shrunk_shares(molecules, molecules.sum(axis=0)), [[0.5, 0.25, 0.25]] * 3)
    strengths = []
    for _ in range(200):
        x = rng.multinomial(400, rng.dirichlet(np.full(50, 5.0)), size=6).astype(float)
        strengths.append(likeliest_strength(x, x.sum(axis=0) / x.sum()))
    assert np.median(strengths) > 10 * 400  # against 400 molecules: nearly the mean profile, where not wholly


def test_the_gain_of_clusters_is_the_held_out_gain_of_their_profiles():
    adata, groups, _ = grouped()
    one, two = n2s.split_molecules(adata.X)
    fold = fold_of(one, two)
    profiles = profiles_of_clusters(groups.astype(np.intp), Counts.of(one)).scaled(n_rounds=0)
    assert gain_of_clusters(groups, fold).mean == pytest.approx(fold.gain(profiles).mean, rel=1e-4)


def test_a_denoised_cell_has_the_profile_of_its_cluster():
    adata, groups, profiles = grouped(depth=4000)
    n2s.denoise(adata, n2s.Clusters(n_pcs=3))
    found = adata.layers["denoised"] / adata.layers["denoised"].sum(axis=1, keepdims=True)
    for group in range(4):
        own = found[groups == group]
        np.testing.assert_allclose(own, own[:1].repeat(len(own), axis=0), rtol=0.05, atol=1e-4)  # but for a floor
        assert (profiles[group] * np.log(profiles[group] / own[0])).sum() < 1e-3


def test_options_of_clusters_are_checked():
    adata = grouped(n_cells=20, n_genes=30, depth=100)[0]
    for wrong, message in (
        ({"resolution": -1}, "resolution is -1: pass a number 0 or more"),
        ({"resolution": ()}, "resolution is empty"),
        ({"n_pcs": 20}, "n_pcs is 20: 20 cells x 30 genes have at most 19 components"),
        ({"n_neighbors": 21}, "n_neighbors is 21: 20 is the most that 20 cells allow"),
    ):
        with pytest.raises(ValueError, match=message):
            n2s.denoise(adata, n2s.Clusters(**wrong))
    assert not adata.uns


def test_every_partition_judges_clusters():
    adata, _, _ = grouped()
    for partition in ("molecules", "genes"):
        found = n2s.calibrate(adata, n2s.Clusters(n_pcs=3), {"resolution": [0, 0.2]}, partition=partition)
        assert found.best == {"resolution": 0.2}


# Which resolution


@pytest.mark.parametrize("n_groups", [2, 5, 9])
def test_as_many_clusters_as_there_are_groups(n_groups):
    adata, groups, _ = grouped(n_groups, depth=3000)
    before = fingerprint(adata)
    resolution = n2s.select_resolution(adata)
    record = adata.uns["select_resolution"]
    table = record["table"]
    row = table[table["chosen"]]
    assert record["resolution"] == resolution == row["resolution"].item()
    assert list(table.columns) == ["resolution", "n_clusters", "gain", "error", "chosen"]
    assert row["n_clusters"].item() == n_groups
    assert table["gain"][0] == pytest.approx(0, abs=1e-12)
    # What is found is what the user will call next.
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=record["params"]["n_pcs"])
    sc.pp.neighbors(adata)
    sc.tl.leiden(adata, resolution=resolution, flavor="igraph", n_iterations=2, directed=False)
    assert adjusted_rand_score(groups, adata.obs["leiden"]) > 0.98
    again = grouped(n_groups, depth=3000)[0]
    assert n2s.select_resolution(again) == resolution
    n2s.remove(again, "select_resolution")
    assert not difference(before, fingerprint(again))


def one_cluster(counts, seed):
    """Whether one cluster is chosen, and said."""
    adata = ad.AnnData(counts)
    with documented_warnings() as said:
        found = n2s.select_resolution(adata, random_state=seed)
    told = any(
        "no clustering predicts held-out molecules better than one cluster" in str(each.message) for each in said
    )
    assert told == (found == 0)
    return found == 0


def test_nothing_to_find_is_one_cluster():
    x = poisson_counts(low_rank_profiles(150, 120, 3, seed=0), 800, seed=1)
    assert all(one_cluster(n2s.null_counts(x, random_state=seed), seed) for seed in range(6))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", ["paul15_myeloid", "cell_lines_5_celseq2", "mix_rnamix_celseq2_sortseq"])
def test_shuffled_real_counts_are_one_cluster(real_data, name):
    counts = sp.csr_matrix(real_data(name).X, dtype=np.float32)[:500]
    assert sum(one_cluster(n2s.null_counts(counts, random_state=seed), seed) for seed in range(10)) >= 9


def test_the_choice_is_as_good_as_the_best_of_the_grid():
    """Of clusters of all molecules, by the true rates: nested groups, the finer ones hard to tell."""
    regrets = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        logs = rng.normal(0, 1, 400) + np.repeat(rng.normal(0, 1, (3, 400)) * (rng.random((3, 400)) < 0.1), 3, axis=0)
        logs += rng.normal(0, 0.5, (9, 400)) * (rng.random((9, 400)) < 0.1)
        profiles = np.exp(logs) / np.exp(logs).sum(axis=1, keepdims=True)
        groups = rng.integers(9, size=500)
        adata = ad.AnnData(poisson_counts(profiles[groups], 2000, seed))
        chosen = n2s.select_resolution(adata, n_pcs=8)
        table = adata.uns["select_resolution"]["table"]
        graph = Graph.of(Counts.of(adata.X), 8, 15, rng)
        size, totals = dense(adata.X.sum(axis=1)).ravel(), dense(adata.X.sum(axis=0)).ravel()
        true = []
        for resolution in table["resolution"]:
            labels = graph.labels(resolution)
            logs = np.log(shrunk_shares(molecules_of(labels, adata.X), totals) / (totals / totals.sum()))
            true.append((size[:, None] * profiles[groups] * logs[labels]).sum() / size.sum())
        regrets.append(1 - true[list(table["resolution"]).index(chosen)] / max(true))
    assert max(regrets) < 0.1
    assert np.mean(regrets) < 0.04


def test_the_rank_is_that_of_select_rank_and_changes_nothing_else():
    adata, _, _ = grouped()
    rank = n2s.select_rank(adata, random_state=3)
    n2s.select_resolution(adata, random_state=3)
    n2s.select_resolution(adata, random_state=3, n_pcs=rank, key_added="given")
    assert adata.uns["select_resolution"]["params"]["n_pcs"] == rank
    pd.testing.assert_frame_equal(adata.uns["given"]["table"], adata.uns["select_resolution"]["table"])
    found = [n2s.cluster_support(adata, 1.0, random_state=3, n_pcs=n_pcs) for n_pcs in (None, rank)]
    pd.testing.assert_frame_equal(*found)


def test_rules_and_given_resolutions():
    adata, _, _ = grouped(strength=0.5)
    grid = [0.1, 0.3, 1, 3]
    least = n2s.select_resolution(adata, grid, rule="least")
    table = adata.uns["select_resolution"]["table"]
    assert list(table["resolution"]) == [0, *grid]
    assert least == table["resolution"][table["gain"].idxmax()]
    simplest = n2s.select_resolution(adata, grid, rule="one_standard_error")
    good = table["gain"] >= table["gain"].max() - table["error"]
    assert simplest == table["resolution"][good.idxmax()] <= least


def test_more_clusters_than_were_tried_are_said():
    adata, _, _ = grouped(9, depth=3000)
    with pytest.warns(UserWarning, match=r"the gain still rises at the largest resolution tried, 0.02"):
        n2s.select_resolution(adata, [0.001, 0.02])


def test_genes_that_vary_on_their_own_support_no_cluster_where_that_is_said():
    phi = np.full(150, 0.5)
    adata = ad.AnnData(negative_binomial(phi))
    with pytest.warns(UserWarning, match="no clustering predicts"):
        assert n2s.select_resolution(adata, overdispersion=n2s.overdispersion(adata)) == 0
    assert quietly(n2s.select_resolution, adata) > 0  # for the molecules these differences are real
    groups, _, _ = grouped()
    assert n2s.select_resolution(groups, overdispersion=n2s.overdispersion(groups)) > 0


def test_counts_on_disk_give_the_same(tmp_path):
    adata, _, _ = grouped(n_cells=150)
    expected = n2s.select_resolution(adata)
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    assert n2s.select_resolution(backed, key_added="again") == expected
    pd.testing.assert_frame_equal(backed.uns["again"]["table"], adata.uns["select_resolution"]["table"])
    backed.file.close()


def test_what_cannot_be_selected_is_refused_in_a_sentence():
    adata, _, _ = grouped(n_cells=30, n_genes=40, depth=100)
    before = fingerprint(adata)
    for wrong, message in (
        ({"resolutions": [1, -1]}, "resolutions is -1"),
        ({"resolutions": []}, "resolutions is empty: pass at least one"),
        ({"resolutions": ["a"]}, "resolutions is 'a': pass a number"),
        ({"n_folds": 11}, "n_folds is 11: there are 10 tenths"),
        ({"rule": "elbow"}, "rule is 'elbow': pass one of least, one_standard_error"),
        ({"n_neighbors": 31}, "n_neighbors is 31: 30 is the most"),
        ({"key_added": "leiden"}, "a name that sc.tl.leiden writes to"),
        ({"overdispersion": -1.0}, "overdispersion holds a negative"),
    ):
        with pytest.raises(ValueError, match=message):
            n2s.select_resolution(adata, **wrong)
    with pytest.raises(ValueError, match="too few to hold out a tenth"):
        quietly(n2s.select_resolution, ad.AnnData(np.eye(3, dtype=np.float32)[[0, 0, 1]]), n_folds=10)
    assert not difference(before, fingerprint(adata))


@pytest.mark.parametrize("function", [n2s.select_rank, n2s.select_resolution, n2s.cluster_support])
def test_genes_that_scanpy_would_use_are_named(function):
    adata, _, _ = grouped()
    adata.var["highly_variable"] = np.arange(300) < 150
    with pytest.warns(UserWarning, match=r'"highly_variable"\] was not used, and sc.pp.pca would use it'):
        function(adata)
    function(adata, mask_var="highly_variable")  # where a warning would be an error


@pytest.mark.slow
@pytest.mark.real
def test_lines_mixtures_and_blood_cells(real_data):
    lines = real_data("cell_lines_5_celseq2")
    lines = lines[lines.obs["demuxlet_cls"] == "SNG"].copy()
    mixtures = real_data("mix_rnamix_celseq2_sortseq")
    composition = mixtures.obs[["H2228_prop", "H1975_prop", "HCC827_prop"]].astype(str).agg(" ".join, axis=1)
    for adata, truth in ((lines, lines.obs["cell_line_demuxlet"]), (mixtures, composition)):
        resolution = quietly(n2s.select_resolution, adata)
        graph = Graph.of(
            Counts.of(sp.csr_matrix(adata.X, dtype=np.float32)),
            adata.uns["select_resolution"]["params"]["n_pcs"],
            15,
            np.random.default_rng(0),
        )
        found = pd.crosstab(graph.labels(resolution), np.asarray(truth))
        assert found.max(axis=1).sum() / found.to_numpy().sum() > 0.85  # each cluster is one, nearly
        assert set(found.idxmax(axis=1)) == set(truth)
    pbmc = real_data("pbmc3k_10x")
    n2s.select_resolution(pbmc)
    table = pbmc.uns["select_resolution"]["table"]
    assert 8 <= table["n_clusters"][table["chosen"]].item() <= 25  # 16 to 20, by the seed


def test_genes_that_vary_on_their_own_support_no_component_where_that_is_said():
    adata = ad.AnnData(negative_binomial(np.full(150, 0.5)))
    phi = n2s.overdispersion(adata)
    with pytest.warns(UserWarning, match="no rank predicts"):
        assert n2s.select_rank(adata, overdispersion=phi, max_rank=20) <= 1
    assert quietly(n2s.select_rank, adata, max_rank=20) > 10  # for the molecules these differences are real
    adata, _, _ = grouped()
    kept = np.arange(300) % 3 > 0
    phi = n2s.overdispersion(adata)
    assert n2s.select_rank(adata, overdispersion=phi, mask_var=kept) == n2s.select_rank(
        adata[:, kept].copy(), overdispersion=phi[kept]
    )
    with pytest.raises(ValueError, match="overdispersion was given with protocol 'bcv', which splits no molecules"):
        n2s.select_rank(adata, overdispersion=phi, protocol="bcv")
    with pytest.raises(ValueError, match="overdispersion has shape"):
        n2s.select_rank(adata, overdispersion=phi[:5])


# Are two clusters two


def test_gains_of_joins_add_up_to_that_of_all_clusters():
    adata, _, _ = grouped(5)
    one, two = n2s.split_molecules(adata.X)
    labels = Graph.of(Counts.of(one), 4, 15, np.random.default_rng(0)).labels(1.0)
    table, linkage = joins(labels, one, two)
    assert len(table) == labels.max()
    assert is_valid_linkage(linkage)
    assert linkage[-1, 3] == labels.max() + 1
    molecules, totals = molecules_of(labels, one), dense(one.sum(axis=0)).ravel()
    shares = shrunk_shares(molecules, totals)
    mean = molecules.sum(axis=1) @ shares / molecules.sum()
    whole = (two.toarray() * np.log(np.where(totals > 0, shares / np.where(totals > 0, mean, 1), 1))[labels]).sum()
    size = dense(two.sum(axis=1)).ravel()
    nats = 0.0
    for row in table.itertuples():
        members = [int(each) for each in f"{row.cluster}+{row.other}".split("+")]
        cells = np.isin(labels, members)
        assert cells.sum() == row.n_cells + row.n_cells_other
        nats += row.gain * size[cells].sum()
    assert nats == pytest.approx(whole, rel=1e-6)


def test_groups_are_supported_and_halves_of_groups_are_not():
    adata, groups, _ = grouped(3, depth=3000, n_cells=500)
    table = n2s.cluster_support(adata, resolution=2.0)
    clusters = adata.obs["cluster_support"]
    home = {name: np.bincount(groups[clusters == name]).argmax() for name in clusters.cat.categories}
    within = np.array(
        [len({home[each] for each in f"{row.cluster}+{row.other}".split("+")}) == 1 for row in table.itertuples()]
    )
    assert within.sum() > 3
    assert (~within).sum() == 2
    assert table["supported"][~within].all()
    assert not table["supported"][within].any()
    assert (table["gain"][within] < 0.002).all()
    pd.testing.assert_frame_equal(adata.uns["cluster_support"]["table"], table)
    n2s.remove(adata, "cluster_support")
    assert not len(adata.obs.columns)
    assert not adata.uns


@pytest.mark.parametrize("function", [n2s.select_resolution, n2s.cluster_support, n2s.select_rank, n2s.denoise])
def test_genes_without_molecules_cannot_say_which_cells_are_alike(function):
    adata = grouped(2, n_cells=60, n_genes=30, depth=200)[0]
    x = adata.X.toarray()
    x[:, :4] = 0
    adata.X = sp.csr_matrix(x)
    with pytest.raises(ValueError, match="mask_var keeps 4 genes, none of which has a molecule"):
        function(adata, mask_var=np.arange(30) < 4)


def test_a_join_says_what_the_documentation_says():
    """Distances, gains, errors and support, from the formulas of docs/method.md, cell by cell."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(30), size=3)[[0, 1, 1]]  # the last two groups are one
    labels = np.repeat([0, 1, 2], [20, 30, 25])
    seen, held_out = (sp.csr_matrix(rng.poisson(40 * share[labels]).astype(np.float32)) for _ in range(2))
    table, linkage = joins(labels, seen, held_out)
    molecules = np.array([np.asarray(seen[labels == k].sum(axis=0)).ravel() for k in range(3)])
    mean = molecules.sum(axis=0) / molecules.sum()

    def minus_likelihood(log_s):
        s = np.exp(log_s)
        each = (molecules - 1 + s * mean) / (molecules.sum(axis=1, keepdims=True) - 1 + s)
        return -(molecules * np.log(np.where(molecules > 0, each, 1))).sum()

    s = np.exp(minimize_scalar(minus_likelihood, bounds=(-3, 15), method="bounded", options={"xatol": 1e-6}).x)

    n = molecules.sum(axis=1)

    def pooled(*clusters):
        return (molecules[list(clusters)].sum(axis=0) + s * mean) / (n[list(clusters)].sum() + s)

    def mixed(*clusters):
        return sum(n[k] * pooled(k) for k in clusters) / n[list(clusters)].sum()

    for row, one, other in ((table.iloc[0], (1,), (2,)), (table.iloc[1], (0,), (1, 2))):
        both = one + other
        assert (row["cluster"], row["other"]) == tuple("+".join(map(str, each)) for each in (one, other))
        assert (row["n_cells"], row["n_cells_other"]) == tuple(np.isin(labels, each).sum() for each in (one, other))
        of_seen = [
            molecules[list(each)].sum(axis=0) @ np.log(pooled(*each) / pooled(*both)) / n[list(each)].sum()
            for each in (one, other)
        ]
        assert row["distance"] == pytest.approx(np.mean(of_seen), rel=1e-3)
        gained = {k: np.log(mixed(*each) / mixed(*both)) for each in (one, other) for k in each}
        cells = np.isin(labels, both)
        x = held_out.toarray()[cells]
        nats, size = (x * np.array([gained[k] for k in labels[cells]])).sum(axis=1), x.sum(axis=1)
        assert row["gain"] == pytest.approx(nats.sum() / size.sum(), rel=1e-3, abs=1e-6)
        residual, n_cells = nats - row["gain"] * size, cells.sum()
        error = np.sqrt(n_cells / (n_cells - 1) * (residual**2).sum()) / size.sum()
        assert row["error"] == pytest.approx(error, rel=1e-3)
    assert list(table["supported"]) == list(table["gain"] > 2 * table["error"]) == [False, True]
    assert is_valid_linkage(linkage)
    assert linkage[:, 3].tolist() == [2, 3]


def test_joins_of_noise_are_supported_as_often_as_chance_says():
    supported = []
    for seed in range(12):
        x = n2s.null_counts(poisson_counts(low_rank_profiles(150, 120, 3, seed=0), 800, seed=1), random_state=seed)
        supported += list(n2s.cluster_support(ad.AnnData(x), 1.0, n_pcs=5, random_state=seed)["supported"])
    assert np.mean(supported) < 0.05


@pytest.mark.parametrize(("n_cells", "distinct"), [(300, 0.0), (600, 0.05)])
def test_joins_within_one_kind_of_cells_are_not_supported(n_cells, distinct):
    """Not even where the strength is large, beside which a profile of both would be shrunk less than its parts."""
    within, between = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        logs = rng.normal(0, 1.5, 500) + np.outer([0, 1], rng.normal(0, 1, 500) * (rng.random(500) < 0.2))
        profiles = np.exp(logs)
        profiles /= profiles.sum(axis=1, keepdims=True)
        kind = (rng.random(n_cells) < distinct).astype(int)
        adata = ad.AnnData(poisson_counts(profiles[kind], 500, seed))
        table = n2s.cluster_support(adata, 1.0, n_pcs=5, random_state=seed)
        clusters = adata.obs["cluster_support"]
        for row in table.itertuples():
            one, other = (kind[clusters.isin(name.split("+"))].mean() for name in (row.cluster, row.other))
            if max(one, other) < 0.02:
                within.append(row.supported)
            elif min(one, other) < 0.02 and max(one, other) > 0.7:
                between.append(row.supported)
    assert len(within) > 80
    assert np.mean(within) < 0.025
    if distinct:
        assert np.mean(between) == 1


def test_support_of_one_cluster_is_refused():
    adata, _, _ = grouped()
    for function in (n2s.cluster_support, n2s.rank_genes_groups):
        with pytest.raises(ValueError, match="all cells are one cluster at resolution 0: pass a larger one"):
            function(adata, 0)
    assert not adata.uns
    assert not len(adata.obs.columns)


def test_results_survive_files(tmp_path):
    adata, _, _ = grouped()
    n2s.select_resolution(adata)
    table = n2s.cluster_support(adata, 0.5)
    n2s.rank_genes_groups(adata, 0.5)
    adata.write_h5ad(tmp_path / "x.h5ad")
    found = ad.read_h5ad(tmp_path / "x.h5ad")
    pd.testing.assert_frame_equal(found.uns["cluster_support"]["table"], table, check_dtype=False)
    expected = sc.get.rank_genes_groups_df(adata, None)
    pd.testing.assert_frame_equal(sc.get.rank_genes_groups_df(found, None), expected, check_dtype=False)


# How much genes vary within groups


def test_overdispersion_is_found():
    rng = np.random.default_rng(0)
    phi = np.exp(rng.normal(np.log(0.4), 0.6, 200))
    counts = negative_binomial(phi, n_cells=1500, depth=3000)
    found = n2s.overdispersion(ad.AnnData(counts))
    assert np.corrcoef(np.log(found), np.log(phi))[0, 1] > 0.9
    assert found.mean() == pytest.approx(phi.mean(), rel=0.05)


def test_poisson_counts_have_none():
    profiles = np.tile(np.random.default_rng(0).dirichlet(np.full(150, 2.0)), (800, 1))
    assert n2s.overdispersion(ad.AnnData(poisson_counts(profiles, 1500, seed=0))).max() < 0.02


def test_what_groups_explain_is_not_noise():
    adata, groups, _ = grouped(n_cells=1200)
    adata.obs["group"] = pd.Categorical(groups.astype(str))
    within, all_cells = n2s.overdispersion(adata, "group"), n2s.overdispersion(adata)
    assert within.max() < 0.05
    assert np.sort(all_cells)[-20:].mean() > 10 * within.max()
    with pytest.raises(ValueError, match="'other' is missing: adata.obs has"):
        n2s.overdispersion(adata, "other")


def test_parts_of_an_overdispersed_count_are_independent():
    phi = np.full(60, 0.8)
    counts = negative_binomial(phi, n_cells=4000, depth=1000)
    found = n2s.overdispersion(ad.AnnData(counts))

    def correlation(parts):
        size = dense(counts.sum(axis=1)).reshape(-1, 1)
        a, b = (dense(part) / size for part in parts)
        return np.mean([np.corrcoef(a[:, gene], b[:, gene])[0, 1] for gene in range(60)])

    assert correlation(n2s.split_molecules(counts)) > 0.3
    assert abs(correlation(n2s.split_molecules(counts, overdispersion=found))) < 0.03


# Tests that are not circular


def test_tails_are_those_of_the_distributions():
    k, mean = np.arange(12.0), 4.0
    for variance, law in (
        (3.0, scipy.stats.binom(16, 0.25)),
        (4.0, scipy.stats.poisson(4)),
        (10.0, scipy.stats.nbinom(4 / 1.5, 0.4)),
    ):
        above, below = tails(k, np.full(12, mean), np.full(12, variance))
        np.testing.assert_allclose(above, law.sf(k) + law.pmf(k) / 2, rtol=1e-6)
        np.testing.assert_allclose(below, law.cdf(k) - law.pmf(k) / 2, rtol=1e-6)


def test_the_test_without_overdispersion_is_the_exact_one():
    adata, groups, _ = grouped(2, n_cells=60, n_genes=30, depth=200)
    found = scored_clusters(groups, adata.X, np.zeros(30))
    x = adata.X.toarray()
    share = x[groups == 0].sum() / x.sum()
    law = scipy.stats.binom(x.sum(axis=0), share)
    k = x[groups == 0].sum(axis=0)
    upper, lower = law.sf(k) + law.pmf(k) / 2, law.cdf(k - 1) + law.pmf(k) / 2
    np.testing.assert_allclose(found.pvals[0], 2 * np.minimum(upper, lower), rtol=1e-4)
    ratio = (k / x[groups == 0].sum()) / (x[groups == 1].sum(axis=0) / x[groups == 1].sum())
    np.testing.assert_allclose(found.logfoldchanges[0], np.log2(ratio), rtol=1e-3, atol=1e-4)
    assert (np.sign(found.scores[0]) == np.sign(np.log2(ratio))).all()


def false_positives(counts, level, seed, **options):
    """The share of p-values below the level, and of clusters in which a gene is found, adjusted, at 5 %."""
    adata = ad.AnnData(counts)
    n2s.rank_genes_groups(adata, 1.0, n_pcs=5, random_state=seed, **options)
    table = sc.get.rank_genes_groups_df(adata, None)
    found = (table["pvals_adj"] < 0.05).groupby(table["group"], observed=True).any()
    return (table["pvals"] < level).mean(), found.mean()


@pytest.mark.parametrize("kind", ["Poisson", "overdispersed"])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_of_noise_as_many_genes_differ_as_the_level_says(kind, level):
    phi = np.full(500, 0.5)
    found = []
    for seed in range(24):
        counts = negative_binomial(phi if kind == "overdispersed" else phi * 1e-6, seed=seed)
        found.append(false_positives(counts, level, seed))
    shares, discoveries = np.transpose(found)
    assert shares.mean() == pytest.approx(level, rel=0.2)
    assert discoveries.mean() < 0.1


def test_the_same_molecules_give_false_positives():
    """What the function is for: clusters of noise by all molecules, and a test on log-normalised counts of them."""
    adata = ad.AnnData(negative_binomial(np.full(200, 1e-6), depth=1500))
    other = recipe(adata, 5)
    sc.pp.neighbors(other)
    sc.tl.leiden(other, flavor="igraph", n_iterations=2, directed=False)
    sc.tl.rank_genes_groups(other, "leiden", method="wilcoxon")
    naive = sc.get.rank_genes_groups_df(other, None)["pvals"]
    assert (naive < 0.05).mean() > 2 * false_positives(adata.X, 0.05, 0)[0]


def test_genes_that_differ_come_first():
    adata, groups, profiles = grouped(3, depth=3000)
    before = fingerprint(adata.X)
    n2s.rank_genes_groups(adata, 0.2)
    assert not difference(before, fingerprint(adata.X))
    assert adata.obs["n2s_groups"].cat.categories.tolist() == ["0", "1", "2"]
    for name in ("0", "1", "2"):
        group = np.bincount(groups[adata.obs["n2s_groups"] == name]).argmax()
        others = np.delete(profiles, group, axis=0).mean(axis=0)
        table = sc.get.rank_genes_groups_df(adata, name)
        found = table[table["pvals_adj"] < 0.05]
        true = np.log2(profiles[group] / others)[found["names"].astype(int)]
        assert (np.sign(true) == np.sign(found["logfoldchanges"])).mean() > 0.9
        assert set(table["names"][:3]) <= set(np.argsort(-profiles[group] / others)[:15].astype(str))
        assert table["scores"].is_monotonic_decreasing
        np.testing.assert_allclose(table["pvals_adj"], scipy.stats.false_discovery_control(table["pvals"]))


def test_scanpy_draws_the_ranking():
    adata, _, _ = grouped(3, depth=3000)
    n2s.rank_genes_groups(adata, 0.2, key_added="held_out", groups_added="clusters")
    axes = sc.pl.rank_genes_groups(adata, key="held_out", n_genes=5, show=False)
    assert axes is not None
    assert adata.uns["held_out"]["params"]["groupby"] == "clusters"
    with pytest.raises(ValueError, match="groups_added is '': pass a name without"):
        n2s.rank_genes_groups(adata, 0.2, groups_added="")


# What was found by attacks


def few_words(adata):
    """Every function of clusters, with the least that it takes."""
    return {
        "select_resolution": lambda **options: n2s.select_resolution(adata, **options),
        "cluster_support": lambda **options: n2s.cluster_support(adata, 1.0, **options),
        "rank_genes_groups": lambda **options: n2s.rank_genes_groups(adata, 1.0, **options),
    }


@pytest.mark.parametrize("name", few_words(None))
def test_options_of_one_value_are_refused_in_a_sentence_where_there_are_several(name):
    adata, _, _ = grouped(n_cells=40, n_genes=30, depth=200)
    before = fingerprint(adata)
    for option, least in (("n_pcs", 1), ("n_neighbors", 2)):
        with pytest.raises(ValueError, match=rf"{option} is \[2, 3\]: pass a whole number, {least} or more"):
            few_words(adata)[name](**{option: [2, 3]})
    with pytest.raises(ValueError, match=r"n_pcs is \[2, 3\]: pass a whole number"):
        n2s.denoise(adata, n2s.Clusters(n_pcs=[2, 3]))
    assert not difference(before, fingerprint(adata))


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_cell_has_two_neighbors_or_more(wrong):
    """As scanpy counts them the first is the cell itself."""
    adata, _, _ = grouped(n_cells=40, n_genes=30, depth=200)
    for function in few_words(adata).values():
        with pytest.raises(ValueError, match=f"n_neighbors is {wrong}: pass a whole number, 2 or more"):
            function(n_neighbors=wrong)
    for several in (wrong, [wrong, 15]):
        with pytest.raises(ValueError, match=f"n_neighbors is {wrong}: pass a whole number, 2 or more"):
            n2s.denoise(adata, n2s.Clusters(n_pcs=2, n_neighbors=several))


def test_resolutions_that_are_no_float_are_refused_in_a_sentence():
    adata, _, _ = grouped(n_cells=40, n_genes=30, depth=200)
    n2s.denoise(adata, n2s.Clusters(resolution=np.float32(0.5)))  # where a warning would be an error
    with pytest.raises(ValueError, match=r"resolution is array\(0.5\): pass a number"):
        n2s.Clusters(resolution=np.array(0.5))
    with pytest.raises(ValueError, match="resolutions is 1000.*: pass a number 0 or more"):
        n2s.select_resolution(adata, [10**400])
    with pytest.raises(ValueError, match="resolution is 1000.*: pass a number 0 or more"):
        n2s.cluster_support(adata, 10**400)


def test_a_ranking_replaces_nothing_but_a_ranking():
    adata, _, _ = grouped(n_cells=60, n_genes=40, depth=400)
    n2s.denoise(adata, n2s.PCA(n_components=2), write_layer=False)
    adata.obs["cell_type"], adata.uns["note"] = "a", {"by": "hand"}
    before = fingerprint(adata)
    for wrong, message in (
        ({"key_added": "denoised"}, r"adata.uns\['denoised'\] exists and is not an earlier ranking"),
        ({"key_added": "note"}, r"adata.uns\['note'\] exists and is not an earlier ranking"),
        ({"key_added": ""}, "key_added is ''"),
        ({"key_added": "a/b"}, "key_added is 'a/b'"),
        ({"key_added": "neighbors"}, "a name that sc.pp.neighbors writes to"),
        ({"groups_added": "a/b"}, "groups_added is 'a/b'"),
        ({"groups_added": "rank_genes_groups"}, "groups_added is 'rank_genes_groups', the name of the ranking too"),
        ({"groups_added": "cell_type"}, r"adata.obs\['cell_type'\] exists and is not of an earlier ranking"),
    ):
        with pytest.raises(ValueError, match=message):
            n2s.rank_genes_groups(adata, 1.0, **wrong)
    assert not difference(before, fingerprint(adata))
    for seed in (0, 1):  # its own are replaced
        n2s.rank_genes_groups(adata, 1.0, random_state=seed)
    with pytest.raises(ValueError, match=r"adata.obs\['n2s_groups'\] is what the ranking 'rank_genes_groups' is of"):
        n2s.rank_genes_groups(adata, 1.0, key_added="other")  # the first would be a ranking of other groups
    sc.tl.rank_genes_groups(adata, "n2s_groups")  # another ranking stands under the key then, and the groups are free
    n2s.rank_genes_groups(adata, 1.0, key_added="other")
    n2s.remove(adata, "n2s_groups")
    assert "n2s_groups" not in adata.obs


def test_a_part_of_a_backed_object_is_refused_in_a_sentence(tmp_path):
    adata, _, _ = grouped(n_cells=60, n_genes=40, depth=400)
    adata.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    for function in few_words(backed[:40]).values():
        with pytest.raises(ValueError, match="adata is a part of a backed object, which cannot be written to"):
            function()
    backed.file.close()


def test_groups_of_overdispersion_are_named_as_they_were_given(tmp_path):
    adata, groups, _ = grouped(n_cells=60, n_genes=40, depth=400)
    adata.obs["group"] = pd.Categorical(groups.astype(str))
    adata.obs["part"] = [None, *["a"] * 59]
    for wrong, error, message in (
        ("other", ValueError, "groupby 'other' is missing"),
        (["group"], TypeError, r"groupby is \['group'\]: pass a name"),
        ("part", ValueError, "has 1 missing values: every cell needs one"),
    ):
        with pytest.raises(error, match=message):
            n2s.overdispersion(adata, wrong)
    pytest.importorskip("xarray")
    adata.write_h5ad(tmp_path / "x.h5ad")
    lazy = ad.experimental.read_lazy(tmp_path / "x.h5ad")
    np.testing.assert_allclose(n2s.overdispersion(lazy, "group"), n2s.overdispersion(adata, "group"), rtol=1e-6)


def test_equal_cells_are_clustered_without_a_word():
    x = np.repeat(np.random.default_rng(0).poisson(2, (2, 12)), 20, axis=0).astype(np.float32)
    with said_by_scanpy("hint") as said, documented_warnings():
        for function in few_words(ad.AnnData(x)).values():
            function(n_pcs=1, n_neighbors=3)
        graph = Graph.of(
            Counts.of(sp.csr_matrix(np.vstack([x, x[:1].repeat(20, axis=0)]))), 1, 3, np.random.default_rng(0)
        )
        assert len(np.unique(graph.labels(0.5)[:20])) == 1
    assert "Leiden" not in said.getvalue()  # of an object that nobody sees
    assert "are not supported" in said.getvalue()


def test_clusters_are_found_with_the_defaults_of_scanpy_2(scanpy2):
    adata, groups, _ = grouped()
    n2s.cluster_support(adata, 0.5, n_pcs=3)
    assert adjusted_rand_score(groups, adata.obs["cluster_support"]) > 0.95
    assert n2s.select_resolution(adata, [0, 0.5], n_pcs=3) == 0.5
    n2s.rank_genes_groups(adata, 0.5, n_pcs=3)
    assert set(sc.get.rank_genes_groups_df(adata, group="0")["names"]) == set(adata.var_names)


def test_clusters_that_do_not_differ_are_drawn():
    adata, _, _ = grouped(n_cells=100, n_genes=60, depth=600)
    table = n2s.cluster_support(adata, 2.0, n_pcs=2)
    adata.uns["cluster_support"]["linkage"][:, 2] = 0
    axes = n2s.pl.cluster_support(adata, show=False)
    assert len([line for line in axes.lines if len(line.get_xdata()) == 4]) == len(table)


def test_runs_of_resolutions_stand_at_their_resolutions():
    adata, _, _ = grouped(n_cells=100, n_genes=60, depth=600)
    quietly(n2s.select_resolution, adata, [0.5, 2], key_added="few")
    quietly(n2s.select_resolution, adata, [0.1, 1, 2, 10], key_added="more", random_state=1)
    axes = n2s.pl.loss(adata, key=["few", "more"], show=False)
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["0", "0.1", "0.5", "1", "2", "10"]
    places = [[names[int(x)] for x in container.lines[0].get_xdata()] for container in axes.containers]
    assert places == [["0", "0.5", "2"], ["0", "0.1", "1", "2", "10"]]


def test_both_tails_keep_their_digits():
    k, mean = np.array([0.0, 0.0, 0.0, 250.0]), np.array([60.0, 60.0, 60.0, 60.0])
    variance = np.array([40.0, 60.0, 80.0, 60.0])
    above, below = tails(k, mean, variance)
    laws = [scipy.stats.binom(180, 1 / 3), scipy.stats.poisson(60), scipy.stats.nbinom(180, 0.75)]
    np.testing.assert_allclose(below[:3], [law.pmf(0) / 2 for law in laws], rtol=1e-6)
    law = scipy.stats.poisson(60)
    np.testing.assert_allclose(above[3], law.sf(250) + law.pmf(250) / 2, rtol=1e-6)
    assert (above + below == pytest.approx(1)) is True


def test_a_gene_that_a_cluster_lacks_has_a_p_value():
    x = np.full((20, 3), 20.0, np.float32)
    x[:10, 0] = 0
    found = scored_clusters(np.repeat([0, 1], 10), sp.csr_matrix(x), np.zeros(3))
    assert 0 < found.pvals[0, 0] < 1e-40
    assert found.pvals[0, 0] == pytest.approx(found.pvals[1, 0])  # all its molecules in one, none in the other


def test_boundless_overdispersion_tells_nothing():
    adata, _, _ = grouped(n_cells=60, n_genes=40, depth=400)
    for phi in (1e12, 1e300):
        n2s.rank_genes_groups(adata, 1.0, overdispersion=phi)
        table = sc.get.rank_genes_groups_df(adata, None)
        assert np.isfinite(table.select_dtypes("number")).all(axis=None)
        assert (table["pvals"] > 0).all()


def test_labels_of_support_are_not_left_in_a_transposed_object():
    adata, _, _ = grouped(n_cells=60, n_genes=40, depth=400)
    n2s.cluster_support(adata, 1.0)
    with pytest.raises(ValueError, match="adata was transposed after it was clustered to 'cluster_support'"):
        n2s.remove(adata.T, "cluster_support")


def test_threads_that_cluster_at_once_get_the_bytes_of_one_alone():
    """The random numbers of igraph are those of the process."""
    adata, _, _ = grouped(n_cells=150, n_genes=60, depth=400)
    graph = Graph.of(Counts.of(adata.X), 5, 15, np.random.default_rng(0))
    expected = graph.labels(3.0).tolist()
    found, interval = [], sys.getswitchinterval()
    before = sc.settings.verbosity

    def cluster():
        own = Graph.of(Counts.of(adata.X), 5, 15, np.random.default_rng(0))
        found.extend(own.labels(3.0).tolist() for _ in range(10))

    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=cluster) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(found) == 40
    assert all(labels == expected for labels in found)
    assert sc.settings.verbosity == before


MODULES = {"select_resolution": "_resolution", "cluster_support": "_support", "rank_genes_groups": "_groups"}


@pytest.mark.parametrize("name", MODULES)
def test_matrix_products_have_one_thread_and_so_one_rounding(name, monkeypatch):
    """However many threads there are, which on some machines is one."""
    inside, seen, search = [], [], sc.pp.neighbors

    @contextmanager
    def noted_thread():
        inside.append(True)
        yield
        inside.pop()

    def noted(*args, **options):
        seen.append(bool(inside))
        return search(*args, **options)

    module = importlib.import_module(f"sc_noise2self.{MODULES[name]}")
    monkeypatch.setattr(module, "one_blas_thread", noted_thread)
    monkeypatch.setattr(sc.pp, "neighbors", noted)
    quietly(few_words(grouped(n_cells=60, n_genes=40, depth=400)[0])[name])
    assert seen
    assert all(seen)


@pytest.mark.parametrize("n_each", [5, 20])
def test_small_groups_fit_some_of_the_noise(n_each):
    """phi within groups of n cells is by 1/n to 2/n too small, as the docstring says."""
    rng, n_groups = np.random.default_rng(0), 1200 // n_each
    groups = np.repeat(np.arange(n_groups), n_each)
    means = 2000 * rng.dirichlet(np.full(60, 2.0), size=n_groups)[groups]
    adata = ad.AnnData(rng.poisson(means * rng.gamma(2, 0.5, means.shape)).astype(np.float32))
    adata.obs["group"] = pd.Categorical(groups.astype(str))
    found = np.median(quietly(n2s.overdispersion, adata, "group")) / 0.5
    assert 1 - 2.2 / n_each < found < 1 - 0.8 / n_each


@pytest.mark.parametrize("depth", [100, 300])
def test_overdispersion_does_not_see_what_totals_take(depth):
    """By 1/m where cells hold m molecules."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(60, 3.0))
    counts = rng.poisson(depth * share * rng.gamma(50, 1 / 50, (4000, 60)))
    found = quietly(n2s.overdispersion, ad.AnnData(counts.astype(np.float32))).mean()
    assert found == pytest.approx(0.02 - 1 / depth, abs=0.0025)


def test_genes_of_a_mask_may_hold_next_to_nothing():
    adata, _, _ = grouped(n_cells=60, n_genes=40, depth=400)
    x = np.hstack([adata.X.toarray()[:, 20:], np.zeros((60, 20), np.float32)])
    x[3, 30] = 1
    adata.X = sp.csr_matrix(x)
    mask = np.arange(40) >= 20
    quietly(n2s.select_resolution, adata, mask_var=mask)
    assert adata.uns["select_resolution"]["params"]["n_pcs"] == 1
    quietly(n2s.denoise, adata, n2s.Clusters(), mask_var=mask)


def test_one_cluster_alone_is_compared_with_nothing():
    adata, _, _ = grouped(n_cells=60, n_genes=40, depth=400)
    assert n2s.select_resolution(adata, [0]) == 0  # where a warning would be an error


def test_clusters_of_one_seed_and_phi_are_the_same_whoever_asks():
    adata = n2s.datasets.pbmc68k_reduced()
    phi = np.full(adata.n_vars, 0.3)
    n2s.cluster_support(adata, 1.0, overdispersion=phi)
    n2s.rank_genes_groups(adata, 1.0, overdispersion=phi)
    assert list(adata.obs["cluster_support"]) == list(adata.obs["n2s_groups"])
