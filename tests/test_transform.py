"""Transforms, and the way back: the exact Poisson expectation and what it saves."""

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import poisson_counts

from sc_noise2self._transform import PoissonExpectation, Transform, rates
from sc_noise2self.methods._profiles import LowRankProfiles, TableProfiles

MEANS = np.array([0.01, 0.3, 1.0, 4.0, 25.0, 59.0, 61.0, 300.0])


@pytest.mark.parametrize("name", ["log1p", "sqrt"])
@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
def test_expectation_is_that_of_poisson_samples(name, scale):
    samples = np.random.default_rng(0).poisson(MEANS, size=(200_000, len(MEANS))) * scale
    samples = np.log1p(samples) if name == "log1p" else np.sqrt(samples)
    error = samples.std(axis=0) / np.sqrt(len(samples))
    # 1e-4: the expansion used above a mean of 60 leaves out terms of the order of m^-5/2.
    assert (np.abs(samples.mean(axis=0) - PoissonExpectation(name, scale)(MEANS)) < 5 * error + 1e-4).all()


@pytest.mark.parametrize("name", ["log1p", "sqrt", "none"])
@pytest.mark.parametrize("scale", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inverse_returns_the_mean(name, scale, dtype):
    g = PoissonExpectation(name, scale)
    z = g(MEANS).astype(dtype)
    back = g.inverse(z)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, MEANS, rtol=2e-3)
    np.testing.assert_array_equal(g.inverse(np.array([0.0, -1.0])), 0)


def test_inverse_is_smooth_where_the_table_ends():
    for name in ("log1p", "sqrt"):
        g = PoissonExpectation(name)
        means = np.linspace(55, 65, 2001)
        assert (np.diff(g.inverse(g(means))) > 0).all()


def test_expectation_moves_between_depths():
    g = PoissonExpectation("sqrt")
    at_depth_1 = g(MEANS)
    np.testing.assert_allclose(g(3 * g.inverse(at_depth_1)), g(3 * MEANS), rtol=2e-3)


def test_apply_brings_cells_to_one_depth(simulated):
    size = np.asarray(simulated.sum(axis=1)).ravel()
    before = simulated.copy()
    for name, inverse in (("none", lambda z: z), ("sqrt", np.square), ("log1p", np.expm1)):
        z = Transform(name, 250.0).apply(simulated, size)
        assert z.dtype == np.float32
        np.testing.assert_allclose(inverse(z.toarray()).sum(axis=1), 250, rtol=1e-5)
    assert (simulated != before).nnz == 0


def test_an_empty_cell_stays_empty():
    x = sp.csr_matrix(np.array([[0, 0], [1, 3]], dtype=np.float32))
    z = Transform("log1p", 4.0).apply(x, np.array([0.0, 4.0]))
    np.testing.assert_allclose(z.toarray(), np.log1p([[0, 0], [1, 3]]), rtol=1e-6)


@pytest.mark.parametrize("name", ["log1p", "sqrt", "none"])
def test_noise_variance_is_the_sampling_variance(name):
    # Cells of one profile and one depth: all variance is sampling noise.
    profile = np.random.default_rng(0).dirichlet(np.full(50, 0.3))
    x = sp.csr_matrix(np.random.default_rng(1).poisson(profile * 400, size=(4000, 50)).astype(np.float32))
    transform = Transform(name, 100.0)
    size = np.full(4000, 400.0)
    estimate, observed = transform.noise_variance(x, size), transform.apply(x, size).toarray().var(axis=0)
    # The jackknife overestimates (Efron & Stein 1981), for a bent scale by up to about half.
    common = profile * 400 > 0.05
    assert (estimate[common] > 0.85 * observed[common]).all()
    assert (estimate[common] < (1.25 if name != "sqrt" else 1.8) * observed[common]).all()


def test_exact_way_back_from_sqrt_beats_squaring():
    profiles = np.random.default_rng(0).dirichlet(np.full(200, 0.2), size=40)
    means = profiles * 300
    expectation = PoissonExpectation("sqrt")(means)
    exact = rates("sqrt", expectation.astype(np.float32).copy())
    np.testing.assert_allclose(exact, means, atol=1e-3, rtol=3e-3)
    # Squaring, even with every gene's total restored, is off by a factor that differs between cells.
    squared = expectation**2
    squared *= means.sum(axis=0) / squared.sum(axis=0)
    assert np.abs(squared - means).sum() > 0.1 * means.sum()


@pytest.mark.parametrize("name", ["log1p", "sqrt", "none"])
def test_rates_keep_the_order_of_expectations_also_below_zero(name):
    z = np.linspace(-3, 5, 2001).astype(np.float32)
    assert (np.diff(rates(name, z.copy())) > 0).all()
    assert rates(name, np.zeros(1, np.float32)) == 0


def test_refuses_unknown_transform_and_depth():
    with pytest.raises(ValueError, match="transform is 'log2': pass one of log1p, sqrt, none"):
        Transform("log2", 1.0)
    with pytest.raises(ValueError, match="target is 0"):
        Transform("log1p", 0)


@pytest.fixture
def size_and_share(simulated):
    """Sizes of cells, and the mean profile with one gene that nothing expresses."""
    share = np.asarray(simulated.sum(axis=0)).ravel() / simulated.sum()
    share[3] = 0
    return np.asarray(simulated.sum(axis=1)).ravel(), share / share.sum()


def keeps_sizes_and_totals(profiles, size, share):
    counts = profiles.counts()
    assert counts.dtype == np.float32
    assert counts.flags.c_contiguous
    np.testing.assert_allclose(counts.sum(axis=1), size, rtol=1e-5)
    np.testing.assert_allclose(counts.sum(axis=0), share * size.sum(), rtol=1e-3)
    assert (counts[:, 3] == 0).all()
    cells, genes = np.array([5, 0, 299]), np.array([7, 3])
    np.testing.assert_array_equal(profiles.counts(cells, genes), counts[cells][:, genes])
    np.testing.assert_array_equal(profiles.of_cells(cells).counts(), counts[cells])
    np.testing.assert_array_equal(np.concatenate([block for _, block in profiles.blocks()]), counts)


def test_factors_keep_gene_totals_and_cell_sizes(size_and_share):
    rng, (size, share) = np.random.default_rng(0), size_and_share
    scores = np.column_stack([np.ones(300), 0.1 * rng.normal(size=(300, 2))]).astype(np.float32)
    loadings = rng.uniform(0.1, 1, size=(120, 3)).astype(np.float32)
    keeps_sizes_and_totals(LowRankProfiles.unscaled("log1p", scores, loadings, size, share).scaled(4), size, share)
    # Cells whose factors call every gene absent have the mean profile.
    absent = scores.copy()
    absent[:20] = -1
    low = LowRankProfiles.unscaled("log1p", absent, loadings, size, share).scaled(0).counts()
    np.testing.assert_allclose(low[:20], np.outer(size, share)[:20], rtol=1e-4)


def test_tables_keep_gene_totals_and_cell_sizes(size_and_share):
    """Each cell is on a scale of its own; negative values are 0, and a cell without any has the mean profile."""
    rng, (size, share) = np.random.default_rng(0), size_and_share
    values = rng.gamma(2, size=(300, 120)) * share * rng.uniform(1, 100, (300, 1))
    values[rng.random(values.shape) < 0.05] *= -1
    values[[0, 7]] = -1
    profiles = TableProfiles.of(values, size, share).scaled()
    totals = profiles.counts().sum(axis=0, dtype=float) / size.sum()
    assert np.abs(totals / np.where(share > 0, share, 1) - (share > 0)).mean() <= 1e-3
    keeps_sizes_and_totals(TableProfiles.of(values, size, share).scaled(10), size, share)
    rescaled = TableProfiles.of(values * rng.uniform(1, 100, (300, 1)), size, share).scaled()
    np.testing.assert_allclose(rescaled.counts(), profiles.counts(), rtol=1e-4)
    mean = profiles.gene_scale * share
    unfloored = np.outer(size[[0, 7]] / mean.sum(), mean)
    assert np.corrcoef(profiles.counts(np.array([0, 7])).ravel(), unfloored.ravel())[0, 1] > 0.999


def test_depth_of_simulated_counts_is_what_the_tests_assume():
    x = poisson_counts(np.full((2000, 10), 0.1), depth=500, seed=0)
    assert abs(x.sum() / 2000 - 500) < 5 * np.sqrt(500**2 / 8 + 500) / np.sqrt(2000)
