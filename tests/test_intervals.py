"""Intervals: the exact law of a Gamma and of a negative binomial, and coverage of molecules that nothing saw."""

from __future__ import annotations

from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import low_rank_profiles, poisson_counts
from scipy.stats import gamma, kstest, nbinom

import sc_noise2self as n2s
from sc_noise2self._intervals import LEVELS, Belief, sampled_genes, strata_of
from sc_noise2self._read import beliefs
from sc_noise2self._uncertainty import Dispersions
from sc_noise2self.methods._dispersion import POWERS, Dispersion

LEVEL_ERRORS = 3.5  # binomial standard errors


@pytest.fixture(scope="module")
def _denoised():
    rng = np.random.default_rng(0)
    truth = low_rank_profiles(400, 120, 3, seed=0) * rng.gamma(4, 0.25, (400, 120))
    adata = ad.AnnData(poisson_counts(truth / truth.sum(axis=1, keepdims=True), depth=1500, seed=1))
    adata.var_names = [f"g{i}" for i in range(120)]
    adata.obs["kind"] = pd.Categorical(np.where(np.arange(400) % 2, "odd", "even"))
    one, other = n2s.split_molecules(adata, random_state=3)
    n2s.denoise(one)
    return one, other


@pytest.fixture
def denoised(_denoised):
    return tuple(each.copy() for each in _denoised)


@pytest.mark.parametrize("phi", [0.05, 0.7, 3.0])
def test_the_interval_is_that_of_the_gamma_and_of_the_negative_binomial(phi):
    m = np.array([[0.02, 0.8, 40.0]])
    belief = Belief.around(m, np.full(3, phi))
    low, high = belief.interval(0.9)
    np.testing.assert_allclose([low, high], gamma.ppf([[[0.05]], [[0.95]]], 1 / phi, scale=m * phi), rtol=1e-6)
    low, high = belief.interval(0.8, predictive=True)
    expected = nbinom.ppf([[[0.1]], [[0.9]]], 1 / phi, 1 / (1 + phi * m))
    np.testing.assert_array_equal([low, high], expected)


@pytest.mark.parametrize(("spread", "mix", "least"), [(0.25, False, 0.9), (0.25, True, 0.88), (0, False, 0.9)])
def test_expected_counts_themselves_are_held_as_often_as_the_docstring_says(spread, mix, least):
    rng = np.random.default_rng(0)
    truth = low_rank_profiles(400, 120, 3, seed=0)
    truth = truth * (rng.gamma(1 / spread, spread, truth.shape) if spread else 1)
    truth /= truth.sum(axis=1, keepdims=True)
    adata = ad.AnnData(poisson_counts(truth, depth=1500, seed=1))
    n2s.denoise(adata, mix=mix)
    low, high = n2s.get.interval(adata, adata.var_names)
    expected = truth * adata.obs["denoised_size"].to_numpy()[:, None]
    assert least < ((low <= expected) & (expected <= high)).to_numpy().mean() < 0.97


def sample_of(halves):
    """Return two halves as `Sample` gives them."""
    cells = np.arange(halves[0].shape[0])
    totals = [np.asarray(half.sum(axis=0)).ravel() for half in halves]
    return SimpleNamespace(some=lambda n_entries: [(half, cells) for half in halves], totals=totals, cells=cells)


@pytest.mark.parametrize(("is_used", "most"), [(0, 1.0), (1, 0.0)])
def test_a_count_is_evidence_as_far_as_its_prediction_has_not_used_it(is_used, most):
    """The prediction is the mean of the rate, or its posterior mean given the count that would be mixed in again."""
    rng, phi, depth = np.random.default_rng(0), 0.5, 120
    expected = (depth * rng.dirichlet(np.full(40, 3.0))).astype(np.float32)
    rates = expected * rng.gamma(1 / phi, phi, (2000, 40))
    halves = [sp.csr_matrix(rng.poisson(rates).astype(np.float32)) for _ in range(2)]

    def predict(i, seen, cells):
        found = expected * (1 + is_used * phi * seen.toarray()) / (1 + is_used * phi * expected)
        found *= np.asarray(seen.sum(axis=1)) / found.sum(axis=1, keepdims=True)
        return SimpleNamespace(blocks=lambda: iter([(slice(0, len(cells)), found.astype(np.float32))]))

    sample = sample_of(halves)
    found = Dispersions.learned(predict, sample).with_evidence(predict, sample)
    assert [each.evidence for each in (found.of_all, *found.for_folds)] == 3 * [most]


def test_expected_counts_of_rare_genes_are_held_less_often_as_the_docstring_says():
    rng = np.random.default_rng(0)
    share = np.exp(rng.normal(0, 1.5, (1, 500))) * np.exp(rng.normal(0, 1, (6, 500)))
    rates = (share / share.sum(axis=1, keepdims=True))[np.arange(400) % 6]
    adata = ad.AnnData(poisson_counts(rates, depth=1000, seed=1))
    n2s.denoise(adata)
    low, high = n2s.get.interval(adata, adata.var_names)
    expected = rates * adata.obs["denoised_size"].to_numpy()[:, None]
    held, total = ((low <= expected) & (expected <= high)).to_numpy().mean(axis=0), expected.sum(axis=0)
    assert held[total > 300].mean() > 0.8
    assert 0.2 < held[(total > 1) & (total < 30)].mean() < 0.5


def test_a_dispersion_below_one_over_the_depth_is_not_lost_because_totals_are_known():
    """Given its total a count varies less than by Poisson's law: taken for Poisson's, the dispersion would be 0."""
    rng = np.random.default_rng(0)
    phi, n_cells, depth = 0.01, 4000, 150
    share = rng.dirichlet(np.full(40, 3.0))
    rates = share * rng.gamma(1 / phi, phi, (n_cells, 40))
    halves = [sp.csr_matrix(rng.poisson(depth * rates).astype(np.float32)) for _ in range(2)]

    def predict(i, seen, cells):
        expected = share * np.asarray(seen.sum(axis=1))
        return SimpleNamespace(blocks=lambda: iter([(slice(0, len(cells)), expected.astype(np.float32))]))

    found = Dispersions.learned(predict, sample_of(halves)).of_all.phi
    assert abs(found.mean() - phi) < 0.0025


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("phi", [0.02, 0.3])
def test_how_dispersions_fall_with_expression_is_found(phi, power):
    """Rates are Gamma distributed with phi (m / level)^power around what is expected, which varies a hundredfold."""
    rng, cells = np.random.default_rng(0), np.arange(3000)
    expected = 5 * np.exp(rng.uniform(np.log(0.1), np.log(10), (len(cells), 60)))
    level = expected.mean(axis=0)
    own = phi * (expected / level) ** power
    rates = rng.gamma(1 / own, own * expected)
    halves = [sp.csr_matrix(rng.poisson(rates).astype(np.float32)) for _ in range(2)]

    def predict(i, seen, cells):
        depth = np.asarray(seen.sum(axis=1) / halves[1 - i][cells].sum(axis=1))  # is undone again
        found = (expected[cells] * depth).astype(np.float32)
        return SimpleNamespace(blocks=lambda: iter([(slice(0, len(cells)), found)]))

    found = Dispersions.learned(predict, sample_of(halves)).of_all
    assert found.power == power
    assert abs(found.phi.mean() / phi - 1) < 0.1
    of_all = found.at(2 * expected)  # both halves
    np.testing.assert_allclose(of_all.mean(axis=0), found.phi * own.mean(axis=0) / phi, rtol=0.05)


def test_a_gene_that_no_cell_has_keeps_its_dispersion_wherever_a_model_expects_it():
    dispersion = Dispersion(np.array([0.5, 0.5]), np.array([0.0, 1.0]), -1.0)
    np.testing.assert_allclose(dispersion.at(np.array([[0.1, 0.1], [0.0, 0.0]])), [[0.5, 5], [0.5, 5e5]])
    low, high = Belief.around(np.zeros((1, 2)), dispersion.at(np.zeros((1, 2)))).interval(0.9)
    assert not low.any()
    assert not high.any()


def test_what_is_not_expected_at_all_has_the_interval_zero():
    belief = Belief.around(np.array([0.0, 1.0]), np.array([0.3, 0.0]))
    for low, high in (belief.interval(0.9), belief.interval(0.9, predictive=True)):
        assert low[0] == high[0] == 0
        assert low[1] <= 1 <= high[1]


def test_a_cells_own_count_is_evidence_by_bayes_rule():
    """The posterior is proportional to prior times likelihood, on a grid."""
    m, phi, x = 3.0, 0.6, 7
    rates = np.linspace(1e-6, 40, 400_001)
    weights = gamma.pdf(rates, 1 / phi, scale=m * phi) * np.exp(-rates) * rates**x
    cumulative = np.cumsum(weights) / weights.sum()
    belief = Belief.around(np.array([m]), np.array([phi]), np.array([x]))
    low, high = belief.interval(0.9)
    assert low[0] == pytest.approx(rates[np.searchsorted(cumulative, 0.05)], rel=1e-3)
    assert high[0] == pytest.approx(rates[np.searchsorted(cumulative, 0.95)], rel=1e-3)


@pytest.mark.parametrize("phi", [0.0, 0.3, 2.0])
def test_the_integral_transform_is_uniform_if_the_belief_is_right(phi):
    rng = np.random.default_rng(5)
    m = rng.gamma(0.5, 4, 20_000)
    rate = m if phi == 0 else m * rng.gamma(1 / phi, phi, len(m))
    integrals = Belief.around(m, np.full(len(m), phi)).probability_integral(rng.poisson(rate), rng.random(len(m)))
    assert kstest(integrals, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("level", LEVELS)
def test_intervals_cover_molecules_that_nothing_saw(denoised, level):
    one, other = denoised
    low, high = n2s.get.interval(one, list(one.var_names), level=level, predictive=True)
    m = one.layers["denoised"]
    depth = (other.X.sum(axis=1).A1 / one.X.sum(axis=1).A1)[:, None]
    counts, uniform = other.X.toarray(), np.random.default_rng(0).random(m.shape)
    integrals = beliefs(one, "denoised", slice(None), slice(None)).times(depth).probability_integral(counts, uniform)
    inside = np.abs(integrals - 0.5) <= level / 2
    # The dispersion was learned of predictions from half as many molecules: intervals are a little too wide.
    assert -0.01 < inside.mean() - level < 0.02
    for tenth in range(10):
        assert -0.03 < inside[:, strata_of(m.sum(axis=0)) == tenth].mean() - level < 0.06
        assert -0.03 < inside[strata_of(m.sum(axis=1)) == tenth].mean() - level < 0.06
    # What is asked of counts as they are is at least as wide, because they are discrete.
    assert ((counts >= low) & (counts <= high)).to_numpy().mean() > level - 0.01


def test_coverage_is_written_down_and_right(denoised):
    one, _ = denoised
    table = one.uns["denoised"]["coverage"]
    overall = table[table["by"] == "all"]
    error = LEVEL_ERRORS * np.sqrt(overall["level"] * (1 - overall["level"]) / overall["n"])
    assert ((overall["covered"] - overall["level"]).abs() < error + 0.005).all()
    assert set(table["by"]) == {"all", "expression", "depth"}
    assert one.obs["denoised_coverage"].between(0, 1).all()


@pytest.fixture
def mixed():
    rng = np.random.default_rng(0)
    truth = low_rank_profiles(400, 120, 3, seed=0) * rng.gamma(1, 1, (400, 120))
    one = ad.AnnData(poisson_counts(truth / truth.sum(axis=1, keepdims=True), depth=1500, seed=1))
    one.var_names = [f"g{i}" for i in range(120)]
    n2s.denoise(one)
    n2s.denoise(one, mix=True, key_added="mixed")
    return one


def test_intervals_of_a_mixed_result_stand_around_it_and_are_narrower(mixed):
    one = mixed
    genes = list(one.var_names[:5])
    low, high = n2s.get.interval(one, genes, key="mixed")
    values = n2s.get.denoised(one, genes, key="mixed")
    assert ((low <= values) & (values <= high)).all(axis=None)
    one.X = sp.csr_matrix(one.X.toarray() * (one.var_names != "g7"))
    n2s.denoise(one, mix=True, key_added="without")
    assert not (np.array(n2s.get.interval(one, "g7", key="without")) > 0).any()
    plain_low, plain_high = n2s.get.interval(one, genes)
    assert ((high - low) / values).mean(axis=None) < ((plain_high - plain_low) / n2s.get.denoised(one, genes)).mean(
        axis=None
    )


def test_what_is_mixed_in_follows_from_what_is_written(mixed):
    """m (1 + phi e x) / (1 + phi e m), and a Gamma distribution around it of the shape 1 / phi + e x."""
    one = mixed
    assert one.uns["denoised"]["evidence"] == 0
    share, power = (one.uns["mixed"][name] for name in ("evidence", "phi_power"))
    assert 0 < share <= 1
    m, x = n2s.get.denoised(one, one.var_names), one.X.toarray()
    phi = one.var["mixed_phi"].to_numpy() * (m / (one.var["mixed_total"] / one.n_obs)) ** power
    mean = m * (1 + phi * share * x) / (1 + phi * share * m)
    scale = one.obs["denoised_size"].to_numpy() / mean.sum(axis=1)
    np.testing.assert_allclose(one.obs["mixed_cell_scale"], scale, rtol=1e-3)
    np.testing.assert_allclose(one.layers["mixed"], mean.mul(scale, axis=0), rtol=1e-3)
    np.testing.assert_allclose(one.var["mixed_mixed"], (phi * share * m / (1 + phi * share * m)).mean(), rtol=1e-3)
    shape = 1 / phi + share * x
    expected = [gamma.ppf(end, shape, scale=mean.mul(scale, axis=0) / shape) for end in (0.05, 0.95)]
    np.testing.assert_allclose(n2s.get.interval(one, one.var_names, key="mixed"), expected, rtol=2e-3)


def test_the_interval_follows_from_what_is_written_as_the_docstring_says(denoised):
    """A Gamma quantile whose variation is phi (value / mean)^power, of any cells and genes, of a subset too."""
    one, _ = denoised
    assert one.uns["denoised"]["phi_power"] < 0
    mean = n2s.get.denoised(one, one.var_names).mean(axis=0)
    genes, cells = ["g7", "g2", "g90"], list(one.obs_names[[9, 3, 250]])
    value = n2s.get.denoised(one, genes, cells=cells)
    phi = one.var.loc[genes, "denoised_phi"].to_numpy() * (value / mean[genes]) ** one.uns["denoised"]["phi_power"]
    expected = [gamma.ppf(end, 1 / phi, scale=value * phi) for end in (0.05, 0.95)]
    np.testing.assert_allclose(n2s.get.interval(one, genes, cells=cells), expected, rtol=1e-3)
    some = one[cells, genes].copy()
    np.testing.assert_allclose(n2s.get.interval(some, genes), expected, rtol=1e-3)


def test_intervals_follow_the_scale_the_cells_and_the_level(denoised):
    one, _ = denoised
    genes, cells = ["g7", "g2"], list(one.obs_names[[9, 3]])
    low, high = n2s.get.interval(one, genes, cells=cells, scale="log1p_cp10k")
    plain = n2s.get.interval(one, genes, cells=cells)
    size = one.obs["denoised_size"][cells].to_numpy()[:, None]
    for found, counts in zip((low, high), plain, strict=True):
        assert list(found.columns) == genes
        assert list(found.index) == cells
        np.testing.assert_allclose(found, np.log1p(1e4 * counts / size), rtol=1e-6)
    wider = n2s.get.interval(one, genes, cells=cells, level=0.99)
    assert (wider[0] < plain[0]).all(axis=None)
    assert (wider[1] > plain[1]).all(axis=None)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"level": 0}, "level is 0"),
        ({"level": 1.2}, "level is 1.2"),
        ({"predictive": True, "scale": "rates"}, "predictive=True is of counts"),
        ({"key": "none"}, "there is no result 'none'"),
    ],
)
def test_what_cannot_be_is_refused(denoised, options, what):
    with pytest.raises((ValueError, KeyError, TypeError), match=what):
        n2s.get.interval(denoised[0], ["g1"], **options)


def test_a_layer_on_another_scale_without_factors_has_no_intervals(denoised):
    adata = denoised[0]
    n2s.denoise(adata, n2s.Function(lambda counts: counts.toarray() + 0.1), scale="log1p_cp10k")
    with pytest.raises(ValueError, match=r"intervals are of expected counts, .* denoise with scale=\"counts\""):
        n2s.get.interval(adata, ["g1"])
    n2s.denoise(adata, n2s.Function(lambda counts: counts.toarray() + 0.1))
    low, high = n2s.get.interval(adata, ["g1"], scale="log1p_cp10k")
    assert (low < high).all(axis=None)


def test_a_report_by_group_adds_up_to_the_gain(denoised):
    one, _ = denoised
    total = one.uns["denoised"]["gain"]
    for groupby, n in (("kind", 2), ("depth", 10)):
        table = n2s.report(one, groupby=groupby)
        assert len(table) == n
        assert table["n"].sum() == 400
        sizes = one.obs["denoised_size"].groupby(
            one.obs["kind"] if n == 2 else strata_of(one.obs["denoised_size"].to_numpy()), observed=True
        )
        assert np.average(table["gain"], weights=sizes.sum()) == pytest.approx(total, rel=1e-6)
        assert table["coverage"].between(0.8, 1).all()
    table = n2s.report(one, groupby="expression")
    assert len(table) == 10
    with pytest.raises(KeyError, match="there is no column 'nothing'"):
        n2s.report(one, groupby="nothing")


@pytest.mark.parametrize("level", [0, 1, 1.5])
def test_a_level_is_between_0_and_1(denoised, level):
    adata = denoised if hasattr(denoised, "obs") else denoised[0]
    with pytest.raises(ValueError, match="level is"):
        n2s.get.interval(adata, list(adata.var_names[:2]), level=level)


@pytest.mark.parametrize("n_genes", [3, 10, 40])
def test_genes_are_sampled_from_the_tenths_that_a_report_shows(n_genes):
    totals = np.random.default_rng(0).permutation(np.arange(n_genes + 2))  # one gene has no molecule
    drawn = sampled_genes(totals, 50, 4, np.random.default_rng(1))
    present = np.flatnonzero(totals)
    strata = dict(zip(present, strata_of(totals[present]), strict=True))
    assert drawn.shape == (50, 10, 4)
    for tenth in range(10):
        expected = {gene for gene, stratum in strata.items() if stratum == tenth} or {-1}
        assert set(drawn[:, tenth].ravel()) <= expected
