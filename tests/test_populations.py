"""What populations of cells say of their genes: factors by the exact law, floors, and no gene that a cell lacks."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import low_rank_profiles, poisson_counts
from scipy.integrate import quad
from scipy.stats import gamma, poisson

import sc_noise2self as n2s
from sc_noise2self._counts import column_sums, row_sums
from sc_noise2self.methods import _pca, _profiles
from sc_noise2self.methods._populations import (
    AS_IT_IS,
    FACTOR_GRID,
    Populations,
    Refinement,
    clusters_of,
    factors_of,
    sums_of,
)
from sc_noise2self.methods._profiles import UNKNOWN, LowRankProfiles, TableProfiles, _Steps


def test_the_factor_is_the_posterior_mean_of_the_true_rate_over_the_expected():
    """Of one gene, whose prior over phi stays where its likelihood is largest: the Gamma posterior by quadrature."""
    observed, expected = np.array([[30.0]]), np.array([[12.0]])
    phi = FACTOR_GRID[np.argmax([_marginal(30, 12, each) for each in FACTOR_GRID])]
    prior = gamma(1 / phi, scale=phi)
    top, bottom = (
        quad(lambda r, power=power: r**power * prior.pdf(r) * poisson.pmf(30, 12 * r), 0, 20, limit=400)[0]
        for power in (1, 0)
    )
    assert factors_of(observed, expected)[0, 0] == pytest.approx(top / bottom, rel=0.05)


def _marginal(observed, expected, phi):
    if phi == 0:
        return poisson.pmf(observed, expected)
    prior = gamma(1 / phi, scale=phi)
    return quad(lambda r: prior.pdf(r) * poisson.pmf(observed, expected * r), 0, 20, limit=400)[0]


def test_factors_of_a_denoiser_that_is_right_are_one():
    rng = np.random.default_rng(0)
    expected = rng.gamma(0.5, 20, (4, 3000))
    factors = factors_of(rng.poisson(expected), expected)
    assert np.sqrt(np.mean(np.square(factors - 1))) < 0.05  # where 20 molecules alone would tell 0.2
    assert np.average(np.abs(factors - 1), weights=expected) < 0.02


@pytest.mark.parametrize("phi", [0.1, 1.0])
def test_factors_are_nearer_the_truth_than_one_or_the_ratio(phi):
    rng = np.random.default_rng(1)
    expected = rng.gamma(0.5, 20, (3, 4000)) + 0.1
    truth = rng.gamma(1 / phi, phi, expected.shape)
    observed = rng.poisson(expected * truth)
    off = [
        np.average(np.square(found - truth), weights=expected)
        for found in (factors_of(observed, expected), np.ones(expected.shape), observed / expected)
    ]
    assert off[0] < min(off[1:])


def test_genes_of_another_population_are_known_to_be_absent():
    """What one gene is too rare to tell, all genes of that home tell together."""
    rng = np.random.default_rng(2)
    expected = np.vstack([np.full(2000, 0.2), np.full(2000, 20.0)])
    expected[:, 1000:] = expected[::-1, 1000:]
    observed = rng.poisson(np.where(expected > 1, expected, 0))
    factors = factors_of(observed, expected)
    assert factors[expected < 1].max() < 0.01
    assert np.sqrt(np.mean(np.square(factors[expected > 1] - 1))) < 0.05


def test_populations_are_numbered_without_gaps_also_where_points_coincide():
    points = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    assert sorted(set(clusters_of(points, 8))) == [0, 1, 2]
    assert (clusters_of(points, 1) == 0).all()


def test_sums_of_populations_are_those_of_their_cells():
    values = np.random.default_rng(0).poisson(2, (7, 3))
    labels = np.array([0, 2, 2, 0, 2, 0, 0])
    for given in (sp.csr_matrix(values), values):
        np.testing.assert_array_equal(sums_of(given, labels, 3)[[0, 2]], [values[labels == k].sum(0) for k in (0, 2)])


@pytest.mark.parametrize("refinement", [Refinement(1, 0.5), Refinement(4, 0.0), Refinement(4, 1.0)], ids=str)
@pytest.mark.parametrize("kind", ["low rank", "table"])
def test_refined_profiles_keep_sizes_and_gene_totals_and_stand_above_the_floor(kind, refinement):
    rng = np.random.default_rng(3)
    truth = low_rank_profiles(240, 60, 4, seed=0)
    counts = poisson_counts(truth, depth=400, seed=1)
    size, totals = (np.asarray(counts.sum(axis)).ravel() for axis in (1, 0))
    noisy = truth * rng.gamma(3, 1 / 3, truth.shape)
    if kind == "table":
        profiles = TableProfiles.of(noisy, size, totals / totals.sum())
    else:
        u, s, vt = np.linalg.svd(noisy, full_matrices=False)
        scores, loadings = ((u * s)[:, :8]).astype(np.float32), vt[:8].T.astype(np.float32)
        profiles = LowRankProfiles.unscaled("none", scores, loadings, size, totals / totals.sum())
    plain = profiles.scaled()
    found = plain.refined(counts, refinement)
    expected = found.counts()
    np.testing.assert_allclose(expected.sum(axis=1), size, rtol=1e-4)
    assert np.mean(np.abs(expected.sum(axis=0) / totals - 1)[totals > 0]) < 1.1e-3
    own = found.populations
    m = size[:, None] * own.shares[found.population.astype(int)]
    assert (expected >= found.row_scale[:, None] * own.height * m / (1 + m) * 0.999).all()
    np.testing.assert_array_equal(found.counts(np.array([5, 0]), np.array([7, 3])), expected[[5, 0]][:, [7, 3]])
    np.testing.assert_array_equal(found.of_cells(np.array([9, 2])).counts(), expected[[9, 2]])
    assert plain.refined(counts, AS_IT_IS) is plain
    # A network's rates come without the scale that gives genes their totals.
    unscaled = replace(plain, gene_scale=plain.gene_scale * rng.gamma(2, 0.5, 60).astype(np.float32)).balanced()
    np.testing.assert_allclose(unscaled.refined(counts, refinement).counts(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("refinement", [AS_IT_IS, Refinement(1, 0.5), Refinement(4, 1.0)], ids=str)
@pytest.mark.parametrize("link", ["none", "log1p", "sqrt", "exp"])
def test_cells_that_are_scaled_when_they_are_read_are_those_that_were_scaled_before(link, refinement):
    counts = poisson_counts(low_rank_profiles(50, 30, 3, seed=0), depth=300, seed=1).tolil()
    counts[7] = 0  # an empty cell
    counts = counts.tocsr()
    size, totals = (np.asarray(counts.sum(axis)).ravel() for axis in (1, 0))
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=(30, 4)).astype(np.float32)
    loadings[:, -1] = 1  # the level of log rates
    scores = rng.normal(size=(50, 4)).astype(np.float32)
    plain = LowRankProfiles.unscaled(link, scores, loadings, size, totals / totals.sum()).balanced()
    learned = plain.refined(counts, refinement).populations
    before, lazy = (plain.of_cells(np.arange(50)).of_populations(learned) for _ in range(2))
    before.scale_cells()
    lazy.cell_scale.fill(UNKNOWN)
    some, genes = np.array([9, 7, 2]), np.array([4, 0])
    expected = before.counts()
    np.testing.assert_allclose(lazy.counts(some, genes), expected[some][:, genes], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lazy.counts(slice(3, 9)), expected[3:9], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([block for _, block in lazy.blocks()]), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lazy.scales(), before.scales(), rtol=1e-5)
    assert (lazy.counts(np.array([7])) == 0).all()


def test_steps_to_gene_totals_are_few_where_a_floor_holds_most_of_a_gene():
    """In as many rounds proportional steps are not there, above all where little of a gene is above its floor."""
    total = np.full(5, 100.0)
    floor, above = np.array([0.0, 30, 60, 90, 99]), np.array([50.0, 200, 10, 4, 3])
    steps, secant, proportional = _Steps(total), np.ones(5), np.ones(5)
    for _ in range(8):
        secant *= steps.next(floor + above * secant)
        proportional *= total / (floor + above * proportional)
    off, plainly_off = (np.mean(np.abs((floor + above * scale) / total - 1)) for scale in (secant, proportional))
    assert off < 1e-3 < 5e-3 < plainly_off
    assert list(_Steps(np.array([0.0, 5])).next(np.array([3.0, 0]))) == [0, 1]  # nothing to have, nothing to scale yet


@pytest.mark.parametrize("height", [0.0, 0.25, 1.0])
def test_a_floor_is_a_maximum_with_a_rounded_corner_that_keeps_order(height):
    shares = np.array([[1e-6, 1e-3, 0.1, 0.898999]], np.float32)
    rates = np.linspace(-20, 30, 400)[:, None] * [0.0001, 0.05, 5, 60]
    size, ones = np.full(len(rates), 1000, np.float32), np.ones(len(rates), np.float32)
    own = Populations(np.zeros_like(shares), np.ones_like(shares), shares, height)
    found = rates.astype(np.float32)
    own.refine_scaled(found, np.zeros(len(rates), np.intp), size, (ones, ones), slice(None))
    m = 1000 * shares.astype(np.float64)
    floor = height * m / (1 + m)
    assert (found >= floor * (1 - 1e-6)).all()
    np.testing.assert_allclose(found, np.maximum(rates, floor), rtol=0.051, atol=1e-12)
    assert (np.diff(found, axis=0)[(rates[1:] > 0) if height == 0 else slice(None)] >= 0).all()
    if height:
        assert len(np.unique(found[:, 1])) > 0.9 * len(rates)


def two_species(n_cells=400, n_genes=300, depth=1000, seed=0):
    """Return counts of cells of two kinds that share no gene, shuffled, with the kind of each cell and gene."""
    rng = np.random.default_rng(seed)
    parts = [poisson_counts(low_rank_profiles(n_cells, n_genes, 3, seed=i), depth=depth, seed=i) for i in (1, 2)]
    order = rng.permutation(2 * n_cells)
    counts = sp.block_diag(parts).tocsr()[order]
    return counts, np.repeat([0, 1], n_cells)[order], np.repeat([0, 1], n_genes)


def foreign_share(expected, cells, genes):
    return max(expected[cells == kind][:, genes != kind].sum() / expected[cells == kind].sum() for kind in (0, 1))


@pytest.mark.parametrize("method", ["pca", "knn", "diffusion", "autoencoder", "ensemble"])
def test_no_method_gives_a_cell_the_genes_of_another_species(method):
    """The share of molecules on genes of the other, which is 0, stays below 1e-4."""
    if method in ("autoencoder", "ensemble"):
        pytest.importorskip("torch")
    counts, cells, genes = two_species()
    adata = ad.AnnData(counts)
    given = n2s.Autoencoder(width=8, n_epochs=10) if method == "autoencoder" else method
    if method == "ensemble":
        given = ["pca", "knn", n2s.Autoencoder(width=8, n_epochs=10)]
    n2s.denoise(adata, given)
    assert foreign_share(adata.layers["denoised"], cells, genes) < 1e-4


@pytest.mark.parametrize("method", [n2s.PCA(transform="log1p"), n2s.Diffusion(n_pcs=5, n_neighbors=8)])
def test_rates_that_are_kept_change_no_value(adata, method, monkeypatch):
    found = [n2s.denoise(adata, method, copy=True)]
    monkeypatch.setattr("sc_noise2self.methods._profiles._KEPT", 0)
    found.append(n2s.denoise(adata, method, copy=True))
    np.testing.assert_array_equal(*(each.layers["denoised"] for each in found))
    np.testing.assert_array_equal(*(each.uns["denoised"]["candidates"]["gain"] for each in found))


def test_any_cells_may_be_asked_for_while_rates_are_kept():
    rng = np.random.default_rng(0)
    scores, loadings = rng.normal(size=(30, 4)), rng.normal(size=(12, 4))
    of_rates = "log1p", scores.astype(np.float32), np.abs(loadings).astype(np.float32)
    profiles = LowRankProfiles.unscaled(
        *of_rates, rng.integers(5, 90, 30).astype(float), np.full(12, 1 / 12)
    ).balanced()
    whole = profiles.counts()
    for cells in (slice(0, 20), slice(0, 20, 2), slice(5, 20), np.arange(0, 20, 3)):
        np.testing.assert_array_equal(profiles.counts(cells), whole[cells])
        np.testing.assert_array_equal(profiles.counts(cells, slice(2, 9)), whole[cells, 2:9])


@pytest.mark.parametrize("stage", [2, 20])  # 2: genes are scaled in a quarter of the cells first
def test_genes_have_their_totals_where_populations_were_learned_from_few_cells(real_data, stage, monkeypatch):
    monkeypatch.setattr(_profiles, "_STAGE", stage)
    counts = sp.csr_matrix(real_data("pbmc3k_10x").X).astype(np.float32)
    often = np.argsort(-column_sums(counts))[:3000]
    genes = np.sort(np.random.default_rng(0).permutation(often)[:600])
    adata = ad.AnnData(counts[row_sums(counts[:, genes]) > 0][:, genes])
    monkeypatch.setattr(_pca, "SCALED", 300 * 600)  # dense entries, of 2 700 cells
    rounds, step = [], _Steps.next
    monkeypatch.setattr(_Steps, "next", lambda self, totals: rounds.append(1) or step(self, totals))
    n2s.denoise(adata, n2s.PCA(transform="log1p"))
    assert adata.uns["denoised"]["members"]["floor"] > 0
    found = adata.layers["denoised"]
    np.testing.assert_allclose(found.sum(axis=1), row_sums(adata.X), rtol=1e-4)
    off = np.abs(found.sum(axis=0, dtype=np.float64) / column_sums(adata.X) - 1)
    assert off.mean() < 0.003  # 0.012 with the floor that the 300 cells have, whose rare genes are others
    assert len(rounds) < 60  # 219 then
