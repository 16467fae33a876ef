"""PCA regression: weights that are best against the truth, and profiles that keep what they must."""

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import divergence

from sc_noise2self._split import split_matrix
from sc_noise2self.methods._components import learn_components, shrinkage, worth_from
from sc_noise2self.methods._pca import PCAModel, Shrinkage

every_transform = pytest.mark.parametrize("transform", ["log1p", "sqrt", "none"])


def components_of(counts, transform, n_components, genes=None):
    found = learn_components(counts, transform, n_components, np.random.default_rng(0), used=genes)
    return found


def denoised(components, counts, weights):
    return components.weighted_profiles(counts, weights).scaled()


def worth_of(components, first, second):
    """Of all cells as one fold."""
    return worth_from(*components.products(first, second, np.zeros(400, int)))[0]


@pytest.mark.parametrize("transform", ["log1p", "none"])
def test_no_weight_is_the_mean_profile(counts, transform):
    out = denoised(components_of(counts, transform, 5), counts, np.zeros(5)).counts()
    size = np.asarray(counts.sum(axis=1)).ravel()
    share = np.asarray(counts.sum(axis=0)).ravel() / counts.sum()
    np.testing.assert_allclose(out, np.outer(size, share), rtol=1e-3)


@every_transform
def test_denoised_is_nearer_to_the_truth_than_the_mean_and_the_raw_counts(counts, truth, transform):
    first, second = split_matrix(counts)
    worth = worth_of(components_of(first, transform, 20), first, second)
    components = components_of(counts, transform, 20)
    found = denoised(components, counts, shrinkage(worth, 0.5))
    assert divergence(truth, found) < 0.35 * divergence(truth, denoised(components, counts, np.zeros(20)))
    size = np.asarray(counts.sum(axis=1))
    raw = np.square(counts.toarray() / size - truth).sum()
    assert np.square(found.counts() / size - truth).sum() < 0.2 * raw


def test_worth_is_the_best_weight_on_the_other_half_and_against_the_truth(counts):
    first, second = split_matrix(counts)
    components = components_of(first, "none", 10)
    worth = worth_of(components, first, second)
    scores = components.scores(first).astype(np.float64)
    z2 = components.weighted(second)[0].toarray().astype(np.float64)
    for j in range(10):
        part = np.outer(scores[:, j], components.vectors[:, j])
        losses = [np.square(z2 - weight * part).sum() for weight in (worth[j] - 0.05, worth[j], worth[j] + 0.05)]
        assert losses[1] == min(losses)
    # Four programmes make three components beyond the mean; the others are noise.
    assert (worth[:3] > 0.7).all()
    assert (np.abs(worth[3:]) < 0.25).all()


def test_shrinkage_follows_its_formula():
    worth = np.array([1.2, 0.9, 0.4, 0.5, -0.1])
    falling = np.array([1, 0.9, 0.45, 0.45, 0])
    np.testing.assert_allclose(shrinkage(worth, 1.0), falling)
    np.testing.assert_allclose(shrinkage(worth, 0.5)[1:4], 1 / (1 + 0.5 * (1 / falling[1:4] - 1)))
    assert (shrinkage(worth, 4.0) <= shrinkage(worth, 2.0)).all()


def test_cut_at_full_depth_keeps_components_whose_weight_exceeds_a_half():
    worth = np.array([0.9, 0.51, 0.4, 0.32])
    np.testing.assert_array_equal(Shrinkage(None).weights(worth, noise=1.0), [1, 1, 0, 0])
    np.testing.assert_array_equal(Shrinkage(None).weights(worth, noise=0.5), [1, 1, 1, 0])
    np.testing.assert_allclose(Shrinkage(4.0).weights(worth, noise=0.5), shrinkage(worth, 2.0))
    assert [str(each) for each in (Shrinkage(None), Shrinkage(4.0))] == ["cut", "shrinkage 4"]


def test_a_cell_is_predicted_alone_as_among_others(counts):
    components = components_of(counts, "log1p", 5)
    found = denoised(components, counts, np.ones(5))
    model = PCAModel(components, np.ones(5), found.gene_scale, found.populations)
    together, alone = model.predict(counts), model.predict(counts[7:8])
    np.testing.assert_allclose(alone.scores, together.scores[7:8], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(alone.counts(), together.counts()[7:8], rtol=1e-4, atol=1e-6)


def test_genes_left_out_of_the_components_are_predicted_from_them(counts, truth):
    genes = np.arange(150) % 2 == 0
    components = components_of(counts, "log1p", 3, genes)
    q = components.used_vectors
    np.testing.assert_allclose(q.T @ q, np.eye(3), atol=1e-5)
    size = np.asarray(counts.sum(axis=1))

    def error(weights):
        return np.square(denoised(components, counts, weights).counts()[:, ~genes] / size - truth[:, ~genes]).sum()

    assert error(np.ones(3)) < 0.3 * error(np.zeros(3))


@every_transform
def test_unexpressed_genes_and_empty_cells_stay_zero(counts, transform):
    x = counts.tolil()
    x[:, 5] = 0
    x[9] = 0
    x = sp.csr_matrix(x)
    out = denoised(components_of(x, transform, 4), x, np.ones(4)).counts()
    assert np.isfinite(out).all()
    assert (out >= 0).all()
    assert (out[:, 5] == 0).all()
    assert (out[9] == 0).all()
    np.testing.assert_allclose(out.sum(axis=0), np.asarray(x.sum(axis=0)).ravel(), rtol=0.02, atol=1e-6)
