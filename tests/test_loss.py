"""Losses against their definitions, written out densely."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from sc_noise2self._loss import Gain, GeneGains, held_out_gain, held_out_probabilities
from sc_noise2self.methods._rank_curve import cumulative_residuals, paired_errors, row_square_sums


def test_cumulative_residuals_are_those_of_the_predictions(simulated):
    rng = np.random.default_rng(0)
    scores, loadings = rng.normal(size=(300, 6)), rng.normal(size=(6, 120))
    target = simulated.astype(np.float64)
    expected = [np.square(target.toarray() - scores[:, :k] @ loadings[:k]).sum(axis=1) for k in range(7)]
    np.testing.assert_allclose(cumulative_residuals(target, scores, loadings), np.array(expected).T, rtol=1e-9)


def test_row_square_sums_with_empty_rows():
    x = sp.csr_matrix(np.array([[0, 0], [3, 4], [0, 0], [1, 0]], dtype=np.float32))
    for block in (1, 2, 100):
        np.testing.assert_array_equal(row_square_sums(x, block), [0, 25, 0, 1])


def _profiles(expected, rows):
    starts = range(0, len(expected), rows)
    slices = [slice(start, min(start + rows, len(expected))) for start in starts]
    return SimpleNamespace(blocks=lambda: ((cells, expected[cells]) for cells in slices))


def test_held_out_gain_is_its_definition():
    rng = np.random.default_rng(0)
    held_out = sp.csr_matrix(rng.poisson(0.7, size=(40, 9)).astype(np.float32))
    expected = rng.gamma(1.0, size=(40, 9)).astype(np.float32)
    g = rng.dirichlet(np.ones(9))
    p = 0.995 * expected / expected.sum(axis=1, keepdims=True) + 0.005 * g
    x = held_out.toarray()
    nats = (x * np.log(p / g)).sum(axis=1)
    for rows in (1, 7, 40):
        gain = held_out_gain(held_out_probabilities(_profiles(expected, rows), held_out), held_out, g)
        np.testing.assert_allclose(gain.sums, nats, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(gain.weights, x.sum(axis=1))
        assert gain.mean == pytest.approx(nats.sum() / x.sum(), rel=1e-5)


def test_the_mean_profile_gains_nothing_and_unseen_genes_do_not_count():
    held_out = sp.csr_matrix(np.array([[2, 1, 3], [0, 1, 1]], dtype=np.float32))
    g = np.array([0.4, 0.6, 0.0])
    gain = held_out_gain(held_out_probabilities(_profiles(np.tile(g, (2, 1)), 2), held_out), held_out, g)
    np.testing.assert_allclose(gain.sums, 0, atol=1e-12)
    np.testing.assert_array_equal(gain.weights, [3, 1])


def test_gains_of_genes_are_a_difference_of_poisson_likelihoods_and_add_up_to_the_gain():
    rng = np.random.default_rng(1)
    halves = [sp.csr_matrix(rng.poisson(0.7, size=(80, 9)).astype(np.float32)) for _ in range(2)]
    expected = [rng.gamma(1.0, size=(80, 9)).astype(np.float32) for _ in range(2)]
    means = [rng.dirichlet(np.ones(9)) for _ in range(2)]
    nats, molecules = np.zeros((2, 80, 9))
    total = 0.0
    for x, m, g in zip(halves, expected, means, strict=True):
        p = 0.995 * m / m.sum(axis=1, keepdims=True) + 0.005 * g
        size = x.sum(axis=1).A
        likelihood = [stats.poisson(q * size).logpmf(x.toarray()) for q in (p, np.tile(g, (80, 1)))]
        nats += likelihood[0] - likelihood[1]
        molecules += x.toarray()
        total += held_out_gain(held_out_probabilities(_profiles(m, 7), x), x, g).sums.sum()
    gains = GeneGains(means, [np.asarray(x.sum(axis=0)).ravel() for x in halves])
    found = [
        gains.of_cells([_profiles(m[cells], 4) for m in expected], [x[cells] for x in halves])
        for cells in (slice(0, 15), slice(15, 80))
    ]
    gain, error = gains.of_genes(found[0].sums[0] + found[1].sums[0])
    assert sum(part.rows[0].sum() for part in found) == pytest.approx(total, rel=1e-4)
    assert sum(part.rows[1].sum() for part in found) == molecules.sum()
    np.testing.assert_allclose(gain, nats.sum(axis=0) / molecules.sum(axis=0), rtol=1e-4)
    assert (gain * molecules.sum(axis=0)).sum() == pytest.approx(total, rel=1e-4)
    without = [np.delete(nats, i, 0).sum(axis=0) / np.delete(molecules, i, 0).sum(axis=0) for i in range(80)]
    np.testing.assert_allclose(error, np.sqrt(np.square(without - gain).sum(axis=0)), rtol=1e-3)


def _of_genes(expected, held_out, mean_profile):
    gains = GeneGains([mean_profile], [np.asarray(held_out.sum(axis=0)).ravel()])
    return gains.of_genes(gains.of_cells([_profiles(expected, 100)], [held_out]).sums[0])


def test_genes_of_few_cells_have_no_error_and_genes_of_none_no_gain():
    x = np.zeros((60, 3), np.float32)
    x[:40, 0], x[:39, 1] = 2, 1
    gain, error = _of_genes(np.ones((60, 3), np.float32), sp.csr_matrix(x), np.array([0.5, 0.3, 0.2]))
    np.testing.assert_array_equal(np.isnan(gain), [False, False, True])
    np.testing.assert_array_equal(np.isnan(error), [False, True, True])


def test_a_gene_predicted_too_high_everywhere_gains_nothing():
    """Its own molecules alone would say that it does."""
    x = sp.csr_matrix(np.random.default_rng(2).poisson([[1.0, 9.0]], size=(500, 2)).astype(np.float32))
    gain, error = _of_genes(np.tile(np.float32([0.3, 0.7]), (500, 1)), x, np.array([0.1, 0.9]))
    assert (gain < -2 * error).all()


def test_gain_is_a_proper_score():
    """No profile gains more, on average, than the true one."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.ones(20), size=500)
    g = truth.mean(axis=0)
    held_out = sp.csr_matrix(rng.poisson(truth * 400).astype(np.float32))
    gain = held_out_gain(held_out_probabilities(_profiles(truth, 100), held_out), held_out, g)
    for other in (truth**1.2, truth**0.8, truth + 0.01, np.roll(truth, 1, axis=0)):
        worse = held_out_gain(held_out_probabilities(_profiles(other, 100), held_out), held_out, g)
        assert gain.mean - worse.mean > 5 * gain.error_of_difference(worse)


def test_errors_are_the_spread_of_repeated_measurements():
    rng = np.random.default_rng(0)
    molecules = rng.poisson(50, size=(400, 300)) + 1
    nats = molecules * 0.1 + rng.normal(size=(400, 300)) * 2
    gains = [Gain(n, m) for n, m in zip(nats, molecules, strict=True)]
    spread = np.std([gain.mean for gain in gains])
    assert np.mean([gain.error for gain in gains]) == pytest.approx(spread, rel=0.15)  # 4 errors of a spread of 400
    shifted = [Gain(gain.sums + 0.5, gain.weights) for gain in gains[:3]]
    assert all(s.error_of_difference(g) < 0.1 * g.error for s, g in zip(shifted, gains, strict=False))


def test_paired_errors_leave_out_what_candidates_share():
    rng = np.random.default_rng(0)
    shared = rng.gamma(2, 100, size=(1000, 1))
    losses = shared + rng.normal(size=(1000, 4)) * np.array([1, 2, 3, 4])
    losses[:, 0] -= 10  # the least
    differences = losses - losses[:, [2]]
    errors = paired_errors(losses.mean(axis=0), differences.T @ differences, len(losses))
    assert errors[0] == 0
    np.testing.assert_allclose(errors, (losses - losses[:, [0]]).std(axis=0, ddof=1) / np.sqrt(1000), rtol=1e-9)
    np.testing.assert_allclose(errors[1:], np.sqrt(1 + np.array([4, 9, 16])) / np.sqrt(1000), rtol=0.15)
    assert np.isposinf(paired_errors(losses[0], differences.T @ differences, 1)).all()
