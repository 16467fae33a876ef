"""Choosing and combining denoisers by the gain on held-out molecules, and mixing the counts back in."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import divergence, low_rank_profiles, poisson_counts

import sc_noise2self as n2s
from sc_noise2self._blocks import Counts, InMemory
from sc_noise2self._choose import denoised, select
from sc_noise2self._mixture import mixture_weights
from sc_noise2self.methods import Method
from sc_noise2self.methods._dispersion import PHI, POWERS, Dispersion, HeldOut, posterior_means
from sc_noise2self.methods._mixing import scales_of_cells
from sc_noise2self.methods._pca import PCALearner
from sc_noise2self.methods._profiles import MixedProfiles, WeightedProfiles, combine, mean_profiles


def pca(*transforms):
    return [n2s.PCA(transform=transform, n_components=20) for transform in transforms]


def run(methods, counts, **options):
    options = {"average": False, "mix": False, **options}
    return select(methods, Counts.of(counts), np.random.default_rng(0), **options)


def refit(selection, counts):
    return [part.profiles for part in selection.refit(Counts.of(counts), np.random.default_rng(0))]


@pytest.fixture(scope="module")
def ensemble(counts):
    return run(pca("log1p", "sqrt", "none"), counts, average=True)


def test_the_best_gain_is_chosen_and_every_candidate_reported(counts, truth):
    selection = run(pca("log1p", "none"), counts, n_splits=2)
    table = selection.comparison.table(gain=True)
    assert len(table) == 2 * len(PCALearner.settings)
    (choice,) = selection.choices
    assert choice.weight == 1
    assert list(table["label"][table["chosen"]]) == [choice.label]
    assert table["gain"][table["chosen"]].item() == table["gain"].max()
    # Compared with populations of other cells, measured with those of all.
    assert selection.gain.mean == pytest.approx(table["gain"].max(), rel=5e-3)
    assert selection.gain.weights.sum() == 2 * counts.sum()  # each molecule is held out once a split
    assert selection.beats_mean
    assert choice.learner.learned(choice.setting).rank == 3
    # The gain of the truth itself bounds it; a good choice comes near.
    share = np.asarray(counts.sum(axis=0)).ravel() / counts.sum()
    bound = (truth * np.log(truth / share)).sum(axis=1).mean()
    assert 0.7 * bound < selection.gain.mean < bound + 3 * selection.gain.error


def test_nothing_to_gain_leaves_the_mean_profile():
    flat = poisson_counts(np.tile(low_rank_profiles(1, 80, 1, seed=0), (200, 1)), 300, seed=1)
    selection = run(pca("log1p", "sqrt"), flat)
    assert not selection.beats_mean
    assert [choice.learner.name for choice in selection.choices] == ["mean"]
    (profiles,) = refit(selection, flat)
    expected = np.outer(flat.sum(axis=1), flat.sum(axis=0)) / flat.sum()
    np.testing.assert_allclose(profiles.counts(), expected, rtol=1e-5)


def test_mixture_weights_are_the_likeliest():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(30), size=3)
    true = np.array([0.6, 0.3, 0.1])
    molecules = rng.multinomial(1_000_000, true @ probabilities)
    weights = mixture_weights(probabilities, molecules)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights, true, atol=0.02)

    def log_likelihood(w):
        return (molecules * np.log(w @ probabilities)).sum()

    for other in rng.dirichlet(np.ones(3), size=50):
        assert log_likelihood(weights) >= log_likelihood(other)


def test_an_ensemble_gains_at_least_as_much_as_its_best_member(counts, truth, ensemble):
    gains = ensemble.comparison.table(gain=True)["gain"]
    assert len(gains) == 1 + 3 * len(PCALearner.settings)
    assert ensemble.gain.mean >= gains.max()
    assert sum(choice.weight for choice in ensemble.choices) == pytest.approx(1)
    assert min(choice.weight for choice in ensemble.choices) >= 0.01
    fitted = refit(ensemble, counts)
    together = combine(fitted, [choice.weight for choice in ensemble.choices])
    assert divergence(truth, together) < 1.02 * min(divergence(truth, profiles) for profiles in fitted)
    again = combine(
        fitted, [choice.weight for choice in run(pca("log1p", "sqrt", "none"), counts, average=True).choices]
    )
    assert divergence(truth, again) == pytest.approx(divergence(truth, together), rel=0.02)


def test_the_mean_profile_is_a_member_that_gets_no_weight_where_cells_are_told_apart(ensemble):
    assert "mean, as it is" in list(ensemble.comparison.table()["label"])
    weights = {choice.learner.name: choice.weight for choice in ensemble.choices}
    assert weights.get("mean", 0) < 0.05


def test_methods_of_one_name_are_told_apart(counts):
    two = [n2s.KNN(n_neighbors=n, n_pcs=5, n_components=10).checked(Counts.of(counts)) for n in (10, 40)]
    labels = list(run(two, counts, average=True).comparison.table()["label"])
    assert labels == ["mean, as it is", "knn, 5 PCs, 10 neighbors", "knn 2, 5 PCs, 40 neighbors"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoPCAs(Method):
    """A method of one's own whose result is a mean of two."""

    name = "two"
    title = "the mean of two"

    def denoise_counts(self, counts, rng):
        one, other = (denoised(n2s.PCA(transform=name).checked(counts), counts, rng) for name in ("log1p", "none"))
        return combine([one, other], [0.5, 0.5])


def test_a_mean_of_ones_own_keeps_the_weight_that_was_learned_for_it(counts):
    selection = run([TwoPCAs(), n2s.KNN(n_neighbors=10, n_pcs=5, n_components=10)], counts, average=True)
    learned = {choice.learner.kind: choice.weight for choice in selection.choices}
    parts = selection.refit(Counts.of(counts), np.random.default_rng(0))
    found = dict.fromkeys(learned, 0.0)
    for part in parts:
        found[part.choice.learner.kind] += part.weight
    assert len(parts) > len(learned)
    assert found == pytest.approx(learned)


def flat_profiles(n_cells, share, size):
    """Every cell has the same profile; nothing is so rare that the floor shows."""
    return mean_profiles(np.full(n_cells, size), share)


def test_dispersions_are_those_of_the_counts():
    rng = np.random.default_rng(0)
    phi = np.repeat([0.0, 0.1, 1.0, 10.0], 25)
    share = np.full(100, 0.01)
    rate = np.where(phi > 0, rng.gamma(1 / np.maximum(phi, 1e-9), np.maximum(phi, 1e-9), size=(3000, 100)), 1)
    held_out = sp.csr_matrix(rng.poisson(rate * 2.0).astype(np.float32))
    found = HeldOut.of(flat_profiles(3000, share, 200.0), held_out, np.asarray(held_out.sum(axis=1)).ravel())
    found = posterior_means(found.curves())[0].reshape(4, 25).mean(axis=1)
    assert found[0] < 0.01
    np.testing.assert_allclose(found[1:], phi.reshape(4, 25).mean(axis=1)[1:], rtol=0.15)


def test_small_dispersions_of_abundant_genes_are_told_from_none():
    """Of 2 000 molecules a cell the rate is known to 2 %: a spread of 3 or 6 % shows."""
    rng = np.random.default_rng(0)
    phi = np.repeat([0.001, 0.004], 10)
    rate = rng.gamma(1 / phi, phi, size=(1500, 20))
    held_out = sp.csr_matrix(rng.poisson(rate * 2000.0).astype(np.float32))
    profiles = flat_profiles(1500, np.full(20, 0.05), 40_000.0)
    found, _ = posterior_means(HeldOut.of(profiles, held_out, np.full(1500, 40_000.0)).curves())
    found = found.reshape(2, 10).mean(axis=1)
    np.testing.assert_allclose(found, [0.001, 0.004], rtol=0.25)


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("least", "most"), [(20, 200), (0.01, 3)])
def test_dispersion_curves_of_any_expected_counts_are_those_of_every_entry(least, most, power):
    """Entries are summed in bins, whose width must not look like a dispersion of less than none."""
    from scipy.stats import nbinom, poisson

    rng = np.random.default_rng(0)
    m = np.exp(rng.uniform(np.log(least), np.log(most), (600, 30))).astype(np.float32)
    x = rng.poisson(m * rng.gamma(500, 1 / 500, m.shape)).astype(np.float32)
    x[x.sum(axis=1) == 0, 0] = 1
    profiles, level = SimpleNamespace(blocks=lambda: iter([(slice(0, 600), m)])), m.mean(axis=0, dtype=np.float64)
    curves = HeldOut.of(profiles, sp.csr_matrix(x), x.sum(axis=1)).curves(power=power, level=level)
    laws = [phi * (m / level) ** power for phi in PHI]
    expected = [nbinom.logpmf(x, 1 / phi, 1 / (1 + phi * m)) if phi.any() else poisson.logpmf(x, m) for phi in laws]
    expected = np.array([each.sum(axis=0) for each in expected])
    found, expected = (each - each[0] for each in (curves, expected))
    below = expected.max(axis=0) - expected  # where a phi is out of the question its curve may be off by more
    np.testing.assert_array_less(np.abs(found - expected), 0.1 + 2e-3 * below)


def test_dispersion_curve_is_the_negative_binomial_likelihood():
    from scipy.stats import nbinom, poisson

    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(0.5, 2, size=(40, 3)))
    x[x.sum(axis=1) == 0, 0] = 1
    share = np.array([0.2, 0.5, 0.3])
    size = np.full(40, 10.0)
    curves = HeldOut.of(flat_profiles(40, share, 10.0), sp.csr_matrix(x.astype(np.float32)), size).curves()
    m = np.outer(x.sum(axis=1), share)
    for k in (1, 5, 12):
        n = 1 / PHI[k]
        expected = nbinom.logpmf(x, n, n / (n + m)).sum(axis=0) - poisson.logpmf(x, m).sum(axis=0)
        np.testing.assert_allclose(curves[k] - curves[0], expected, rtol=1e-2, atol=1e-2)  # in bins


def test_genes_with_few_molecules_lean_on_the_rest():
    certain = -0.5 * ((np.arange(len(PHI))[:, None] - 9) / 0.5) ** 2 * np.ones((1, 60))
    silent = np.zeros((len(PHI), 1))
    phi, _ = posterior_means(np.hstack([certain, silent]))
    assert phi[-1] == pytest.approx(phi[0], rel=0.05)


@pytest.mark.parametrize("power", [0.0, -0.5, -1.0])
def test_mixing_is_the_posterior_mean_and_keeps_the_size_of_cells(power):
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(rng.poisson(0.6, size=(30, 12)).astype(np.float32))
    share = rng.dirichlet(np.ones(12))
    dispersion = Dispersion(np.linspace(0, 3, 12), np.full(12, 0.5), power, 0.6)
    profiles = flat_profiles(30, share, 8.0)
    m = profiles.counts().astype(np.float64)
    phi = dispersion.phi * (m / 0.5) ** power
    expected = m * (1 + phi * 0.6 * x.toarray()) / (1 + phi * 0.6 * m)
    size = np.asarray(x.sum(axis=1))
    expected *= size / expected.sum(axis=1, keepdims=True)
    cells, genes = np.array([3, 1]), np.array([11, 0, 5])
    cell_scale, weight = scales_of_cells(InMemory(x, rows=7), profiles, dispersion)
    for observed in (InMemory(x), InMemory(x, rows=7)):
        mixed = MixedProfiles(profiles, observed, dispersion, cell_scale)
        np.testing.assert_allclose(mixed.counts(), expected, rtol=1e-5)
        np.testing.assert_allclose(mixed.counts(cells, genes), expected[cells][:, genes], rtol=1e-5)
        np.testing.assert_allclose(mixed.of_cells(cells).counts(), expected[cells], rtol=1e-5)
    np.testing.assert_allclose(weight, (phi * 0.6 * m / (1 + phi * 0.6 * m)).mean(axis=0), rtol=1e-5)


def test_mixing_pays_where_the_denoiser_leaves_something_unexplained(truth, counts):
    rng = np.random.default_rng(0)
    size = np.asarray(counts.sum(axis=1))
    noisy = truth * rng.gamma(1.0, 1.0, size=truth.shape)  # phi = 1, new in every entry: nothing to learn from others
    noisy /= noisy.sum(axis=1, keepdims=True)
    overdispersed = sp.csr_matrix(rng.poisson(noisy * size).astype(np.float32))
    selection = run(pca("log1p"), overdispersed, mix=True)
    assert selection.gain.mean > selection.unmixed_gain.mean + 5 * selection.gain.error_of_difference(
        selection.unmixed_gain
    )
    assert np.median(selection.dispersion.phi) > 0.5
    (profiles,) = refit(selection, overdispersed)
    cell_scale, _ = scales_of_cells(InMemory(overdispersed), profiles, selection.dispersion)
    mixed = MixedProfiles(profiles, InMemory(overdispersed), selection.dispersion, cell_scale)
    assert divergence(noisy, mixed) < 0.8 * divergence(noisy, profiles)


def test_mixing_adds_nothing_where_all_is_explained(counts):
    selection = run(pca("log1p"), counts, mix=True)
    assert np.median(selection.dispersion.phi) < 0.1
    assert abs(selection.gain.mean - selection.unmixed_gain.mean) < 0.01 * selection.gain.mean


def test_weighted_profiles_are_the_mean():
    first, second = (flat_profiles(5, share, 10.0) for share in (np.array([0.2, 0.8]), np.array([0.5, 0.5])))
    mean = WeightedProfiles((first, second), (0.25, 0.75))
    expected = 0.25 * first.counts() + 0.75 * second.counts()
    np.testing.assert_allclose(mean.counts(), expected, rtol=1e-6)
    np.testing.assert_allclose(mean.counts(np.array([1]), np.array([1])), expected[1:2, 1:], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([block for _, block in mean.blocks()]), expected, rtol=1e-6)
    np.testing.assert_allclose(mean.of_cells(np.array([4, 2])).counts(), expected[[4, 2]], rtol=1e-6)
