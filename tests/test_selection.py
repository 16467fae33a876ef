"""Choosing and combining denoisers by the gain on held-out molecules, and mixing the counts back in."""

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import divergence, low_rank_profiles, poisson_counts

from sc_noise2self._blocks import InMemory, Survey
from sc_noise2self._choose import combine, mixture_weights, n_steps, select
from sc_noise2self.methods._base import MeanMember, PCAMember
from sc_noise2self.methods._mixing import PHI, dispersion_curves, dispersions
from sc_noise2self.methods._neighbor_member import NeighborsMember
from sc_noise2self.methods._profiles import LowRankProfiles, MixedProfiles, WeightedProfiles


def members(*transforms, n_components=20):
    return [PCAMember(transform, n_components) for transform in transforms]


def run(members, counts, **options):
    options = {"average": False, "mix": False, **options}
    return select(members, InMemory(counts), np.random.default_rng(0), **options)


def refit(selection, counts):
    size, totals = (np.asarray(counts.sum(axis=axis), dtype=np.float64).ravel() for axis in (1, 0))
    return selection.refit(Survey(InMemory(counts), size, totals), np.random.default_rng(0))


def test_the_best_gain_is_chosen_and_every_candidate_reported(counts, truth):
    steps = []
    two = members("log1p", "none")
    announced = n_steps(two, average=False, n_splits=2)
    selection = run(two, counts, n_splits=2, on_step=lambda: steps.append(1))
    # Two members: prepared, then learned from both halves of two splits; six candidates scored.
    assert len(steps) == announced == 2 + 8 + 6
    assert len(selection.gains) == 6  # one setting of the loser, five of the winner
    (choice,) = selection.choices
    assert choice.weight == 1
    assert selection.gain.mean == pytest.approx(max(gain.mean for gain in selection.gains.values()))
    assert selection.gain.mean == pytest.approx(selection.gains[choice.label].mean, rel=1e-5)
    assert selection.gain.weights.sum() == 2 * counts.sum()  # each molecule is held out once a split
    assert selection.beats_mean
    assert choice.member.record(choice.setting)["rank"] == 3
    # The gain of the truth itself bounds it; a good choice comes near.
    share = np.asarray(counts.sum(axis=0)).ravel() / counts.sum()
    bound = (truth * np.log(truth / share)).sum(axis=1).mean()
    assert 0.7 * bound < selection.gain.mean < bound + 3 * selection.gain.error


@pytest.mark.parametrize("average", [False, True])
def test_the_steps_announced_are_those_made(counts, average):
    walk = NeighborsMember("diffusion", 20)
    chosen_among = [MeanMember(), PCAMember("log1p", 20), PCAMember("sqrt", 20), walk] if average else [walk]
    steps = []
    announced = n_steps(chosen_among, average, n_splits=1)
    run(chosen_among, counts, average=average, on_step=lambda: steps.append(1))
    assert len(steps) == announced


def test_nothing_to_gain_leaves_the_mean_profile():
    flat = poisson_counts(np.tile(low_rank_profiles(1, 80, 1, seed=0), (200, 1)), 300, seed=1)
    selection = run(members("log1p", "sqrt"), flat)
    assert not selection.beats_mean
    assert [choice.member.name for choice in selection.choices] == ["mean"]
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


def test_an_ensemble_gains_at_least_as_much_as_its_best_member(counts, truth):
    selection = run([MeanMember(), *members("log1p", "sqrt", "none")], counts, average=True)
    assert len(selection.gains) == 1 + 3 * 5
    assert selection.gain.mean >= max(gain.mean for gain in selection.gains.values())
    weights = [choice.weight for choice in selection.choices]
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0.01
    fitted = refit(selection, counts)
    together = divergence(truth, combine(fitted, weights))
    assert together < 1.02 * min(divergence(truth, profiles) for profiles in fitted)


def test_the_mean_profile_gets_no_weight_where_cells_are_told_apart(counts):
    selection = run([MeanMember(), *members("log1p")], counts, average=True)
    weights = {choice.member.name: choice.weight for choice in selection.choices}
    assert weights["pca log1p"] > 0.9


def flat_profiles(n_cells, share, size):
    """Every cell has the same profile; nothing is so rare that the floor shows."""
    one, sizes = np.ones((n_cells, 1), np.float32), np.full(n_cells, size)
    return LowRankProfiles.with_totals("none", one, share.astype(np.float32)[:, None], sizes, share, 0)


def test_dispersions_are_those_of_the_counts():
    rng = np.random.default_rng(0)
    phi = np.repeat([0.0, 0.1, 1.0, 10.0], 25)
    share = np.full(100, 0.01)
    rate = np.where(phi > 0, rng.gamma(1 / np.maximum(phi, 1e-9), np.maximum(phi, 1e-9), size=(3000, 100)), 1)
    held_out = sp.csr_matrix(rng.poisson(rate * 2.0).astype(np.float32))
    curves = dispersion_curves(flat_profiles(3000, share, 200.0), held_out, np.asarray(held_out.sum(axis=1)).ravel())
    found = dispersions(curves).reshape(4, 25).mean(axis=1)
    assert found[0] < 0.01
    np.testing.assert_allclose(found[1:], phi.reshape(4, 25).mean(axis=1)[1:], rtol=0.15)


def test_dispersion_curve_is_the_negative_binomial_likelihood():
    from scipy.stats import nbinom, poisson

    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(0.5, 2, size=(40, 3)))
    x[x.sum(axis=1) == 0, 0] = 1
    share = np.array([0.2, 0.5, 0.3])
    size = np.full(40, 10.0)
    curves = dispersion_curves(flat_profiles(40, share, 10.0), sp.csr_matrix(x.astype(np.float32)), size)
    m = np.outer(x.sum(axis=1), share)
    for k in (1, 5, 12):
        n = 1 / PHI[k]
        expected = nbinom.logpmf(x, n, n / (n + m)).sum(axis=0) - poisson.logpmf(x, m).sum(axis=0)
        np.testing.assert_allclose(curves[k] - curves[0], expected, rtol=1e-4, atol=1e-3)


def test_genes_with_few_molecules_lean_on_the_rest():
    certain = -0.5 * ((np.arange(len(PHI))[:, None] - 9) / 0.5) ** 2 * np.ones((1, 60))
    silent = np.zeros((len(PHI), 1))
    phi = dispersions(np.hstack([certain, silent]))
    assert phi[-1] == pytest.approx(phi[0], rel=0.05)


def test_mixing_is_the_posterior_mean_and_keeps_the_size_of_cells():
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(rng.poisson(0.6, size=(30, 12)).astype(np.float32))
    share = rng.dirichlet(np.ones(12))
    phi = np.linspace(0, 3, 12)
    profiles = flat_profiles(30, share, 8.0)
    m = profiles.counts().astype(np.float64)
    expected = m * (1 + phi * x.toarray()) / (1 + phi * m)
    size = np.asarray(x.sum(axis=1))
    expected *= size / expected.sum(axis=1, keepdims=True)
    mixed = MixedProfiles.with_totals(profiles, x, phi)
    np.testing.assert_allclose(mixed.counts(), expected, rtol=1e-5)
    cells, genes = np.array([3, 1]), np.array([11, 0, 5])
    np.testing.assert_allclose(mixed.counts(cells, genes), expected[cells][:, genes], rtol=1e-5)
    np.testing.assert_allclose(mixed.share_of_count(), (phi * m / (1 + phi * m)).mean(axis=0), rtol=1e-5)


def test_mixing_pays_where_the_denoiser_leaves_something_unexplained(truth, counts):
    rng = np.random.default_rng(0)
    size = np.asarray(counts.sum(axis=1))
    noisy = truth * rng.gamma(1.0, 1.0, size=truth.shape)  # phi = 1, new in every entry: nothing to learn from others
    noisy /= noisy.sum(axis=1, keepdims=True)
    overdispersed = sp.csr_matrix(rng.poisson(noisy * size).astype(np.float32))
    selection = run(members("log1p"), overdispersed, mix=True)
    assert selection.gain.mean > selection.unmixed_gain.mean + 5 * selection.gain.error_of_difference(
        selection.unmixed_gain
    )
    assert np.median(selection.phi) > 0.5
    (profiles,) = refit(selection, overdispersed)
    mixed = MixedProfiles.with_totals(profiles, overdispersed, selection.phi)
    assert divergence(noisy, mixed) < 0.8 * divergence(noisy, profiles)

    selection = run(members("log1p"), counts, mix=True)
    assert np.median(selection.phi) < 0.1
    assert abs(selection.gain.mean - selection.unmixed_gain.mean) < 0.01 * selection.gain.mean


def test_weighted_profiles_are_the_mean():
    first, second = (flat_profiles(5, share, 10.0) for share in (np.array([0.2, 0.8]), np.array([0.5, 0.5])))
    mean = WeightedProfiles((first, second), (0.25, 0.75))
    expected = 0.25 * first.counts() + 0.75 * second.counts()
    np.testing.assert_allclose(mean.counts(), expected, rtol=1e-6)
    np.testing.assert_allclose(mean.counts(np.array([1]), np.array([1])), expected[1:2, 1:], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([block for _, block in mean.blocks()]), expected, rtol=1e-6)
