"""Every rank's loss: exact against refits, least where the true error is least, and as published."""

import warnings

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import low_rank_profiles, poisson_counts

import sc_noise2self as n2s
from sc_noise2self._blocks import InMemory, Partial
from sc_noise2self._split import split_matrix
from sc_noise2self._transform import Transform
from sc_noise2self.methods._rank_curve import Piece, _HiddenGenes, fit
from sc_noise2self.methods._rank_curve import rank_curve as curve_of
from sc_noise2self.methods._svd import components_of, start_block


def svd(x, n_components, matrices=lambda block: [block.counts], starts=None, **options):
    """S and V of a matrix, or of several, from blocks of 70 cells."""
    starts = starts or [start_block(x.shape[1], n_components, np.random.default_rng(0))]
    return components_of(InMemory(x, rows=70), matrices, starts, n_components, **options)


def rank_curve(x, *args, **options):
    return curve_of(InMemory(x), *args, **options)


def losses(x1, x2, max_rank, protocol, center=False, scored=None):
    """The model that predicts x2 from x1, and the loss of each cell."""
    every = np.ones(x1.shape[0], bool)
    learned, scored = (every, every) if scored is None else (~scored, scored)

    def pieces(block):
        rows = block.cells
        return [Piece(x1[rows], x2[rows], learned[rows], scored[rows])]

    model = fit(InMemory(x1, rows=17), pieces, [x1.shape[1]], max_rank, protocol, center, np.random.default_rng(5))[0]
    return model, *model.losses(Piece(x1, x2, learned, scored))


@pytest.mark.parametrize("center", [False, True])
def test_svd_is_the_dense_one(simulated, center):
    x = simulated.toarray().astype(np.float64)
    mean_row = x.mean(axis=0) * np.sqrt(len(x)) if center else None
    ((s, v),) = svd(simulated, 8, n_passes=8, mean_rows=[mean_row])
    x -= x.mean(axis=0) * center
    u, expected, _ = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(s, expected[:8], rtol=1e-5)
    np.testing.assert_allclose(v.T @ v, np.eye(8), atol=1e-5)
    np.testing.assert_allclose(np.abs(u[:, :3].T @ x @ v[:, :3]), np.diag(s[:3]), atol=1e-3 * s[0])


def test_svd_of_lower_rank_is_padded_with_zeros():
    x = sp.csr_matrix(np.outer(np.arange(1.0, 9), np.arange(1.0, 6)).astype(np.float32))
    ((s, v),) = svd(x, 3)
    assert (s.shape, v.shape) == ((3,), (5, 3))
    np.testing.assert_allclose(x @ v @ v.T, x.toarray(), rtol=1e-4)
    np.testing.assert_array_equal(s[1:], 0)


def test_svds_learned_together_are_those_learned_alone(simulated):
    matrices = [lambda block: block.counts, lambda block: block.counts[:, :50]]
    starts = [start_block(n_genes, 5, np.random.default_rng(1)) for n_genes in (120, 50)]
    together = svd(simulated, 5, lambda block: [matrix(block) for matrix in matrices], starts)
    for found, matrix, start in zip(together, matrices, starts, strict=True):
        (alone,) = svd(simulated, 5, lambda block, matrix=matrix: [matrix(block)], [start])
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("center", [False, True])
def test_leave_one_out_is_the_refit_without_the_cell(center):
    x1, x2 = split_matrix(poisson_counts(low_rank_profiles(40, 25, 3, seed=0), depth=200, seed=1))
    model, found, in_sample = losses(x1, x2, 6, "loo", center)
    u = model.scores(x1)
    np.testing.assert_allclose(u.T @ u, np.eye(6 + center), atol=1e-9)
    target = x2.toarray().astype(np.float64)
    for column, k in enumerate(range(1, 8) if center else range(7)):
        fitted = u[:, :k] @ (u[:, :k].T @ target)
        np.testing.assert_allclose(in_sample[:, column], np.square(target - fitted).mean(axis=1), rtol=1e-6)
        for i in range(len(target)):
            others = np.arange(len(target)) != i
            coefficients = np.linalg.lstsq(u[others, :k], target[others], rcond=None)[0]
            expected = np.square(target[i] - u[i, :k] @ coefficients).mean()
            assert found[i, column] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("center", [False, True])
def test_truncation_and_held_out_cells_are_their_definitions(center):
    x1, x2 = split_matrix(poisson_counts(low_rank_profiles(40, 25, 3, seed=0), depth=200, seed=1))
    a, b = x1.toarray(), x2.toarray()
    mean = a.mean(axis=0) * center
    _, found, in_sample = losses(x1, x2, 24, "mcv", center)
    u, s, vt = np.linalg.svd(a - mean, full_matrices=False)
    for k in (0, 2, 5):
        prediction = (u[:, :k] * s[:k]) @ vt[:k] + mean
        np.testing.assert_allclose(found[:, k], np.square(b - prediction).mean(axis=1), rtol=1e-3)
        np.testing.assert_allclose(in_sample[:, k], np.square(a - prediction).mean(axis=1), rtol=1e-3)

    scored = np.random.default_rng(0).permutation(40) < 10
    _, found, in_sample = losses(x1, x2, 5, "noise2self", center, scored)
    assert in_sample is None
    mean1, mean2 = a[~scored].mean(axis=0) * center, b[~scored].mean(axis=0) * center
    # The randomised factorisation of 30 x 25 at width 25 is exact, so its subspaces are the dense ones.
    u, s, vt = np.linalg.svd(a[~scored] - mean1, full_matrices=False)
    for k in (0, 1, 4):
        regression = vt[:k].T / s[:k] @ u[:, :k].T @ (b[~scored] - mean2)
        prediction = (a[scored] - mean1) @ regression + mean2
        np.testing.assert_allclose(found[:, k], np.square(b[scored] - prediction).mean(axis=1), rtol=1e-3)


def bi_cross_validated(x, max_rank):
    """Which genes are hidden, the groups of cells, and the loss of the first group of cells."""
    hidden = _HiddenGenes(x.shape, np.random.default_rng(7))
    genes, groups = hidden._hidden[0], hidden._group
    size = np.asarray(x[:, np.flatnonzero(~genes)].sum(axis=1)).ravel()
    hidden.transforms = [Transform("none", float(np.median(size)))] * 2
    chunks = InMemory(x, rows=9)
    model = fit(chunks, hidden.pieces, hidden.n_seen, max_rank, "bcv", False, np.random.default_rng(7))[0]
    whole = chunks.run(lambda block: Partial(rows=[model.losses(hidden.pieces(block)[0])[0]])).rows[0]
    return genes, groups, size, whole


def test_bi_cross_validation_is_the_published_formula():
    x = poisson_counts(low_rank_profiles(40, 24, 3, seed=0), depth=200, seed=1)
    hidden, groups, size, found = bi_cross_validated(x, 8)
    scored = groups == 0
    z = x.toarray() * (np.median(size) / size)[:, None]
    a, b = z[np.ix_(scored, hidden)], z[np.ix_(scored, ~hidden)]
    c, d = z[np.ix_(~scored, hidden)], z[np.ix_(~scored, ~hidden)]
    u, s, vt = np.linalg.svd(d, full_matrices=False)
    for k in (0, 1, 3, 8):
        residual = a - b @ (vt[:k].T / s[:k]) @ (u[:, :k].T @ c)
        np.testing.assert_allclose(found[:, k], np.square(residual).mean(axis=1), rtol=1e-3)


def test_bi_cross_validation_finds_the_rank_and_does_not_see_what_is_hidden():
    x = poisson_counts(low_rank_profiles(300, 120, 4, seed=0), depth=5000, seed=1)
    curve = rank_curve(x, 15, np.random.default_rng(0), protocol="bcv", transform="none")
    # Rank 3 misses a programme; from 4 on the basin is flat, and all that is left is noise.
    assert curve.loss[3] > 2 * curve.loss[4]
    assert curve.loss[4] < 1.02 * curve.loss.min()
    assert curve.rank >= 4
    assert curve.full_depth_loss is None
    assert curve.splits.shape == (8, 16)
    # Other hidden counts change the loss, but not by way of the prediction: a constant offset of the target shows it.
    hidden, groups, size, first = bi_cross_validated(x, 3)
    other = x.toarray()
    block = np.ix_(groups == 0, hidden)
    other[block] = 0
    second = bi_cross_validated(sp.csr_matrix(other), 3)[-1]
    a = (x.toarray() * (np.median(size) / size)[:, None])[block]
    # |a - p|^2 and |0 - p|^2 for the same p: at rank 0, where p = 0, their difference is |a|^2
    np.testing.assert_allclose(first[:, 0] - second[:, 0], np.square(a).mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize("protocol", ["loo", "mcv", "noise2self", "bcv"])
def test_the_default_rank_fits_what_components_are_learned_from(protocol):
    adata = ad.AnnData(poisson_counts(low_rank_profiles(20, 16, 2, seed=0), depth=60, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the edge: so few genes have few ranks
        n2s.select_rank(adata, protocol=protocol)
    largest = {"loo": 15, "mcv": 15, "noise2self": 14, "bcv": 7}[protocol]
    assert adata.uns["select_rank"]["table"]["rank"].iloc[-1] == largest


def test_a_larger_rank_is_asked_for_only_where_there_is_one():
    adata = ad.AnnData(poisson_counts(low_rank_profiles(400, 10, 9, seed=0), depth=100, seed=1))
    with pytest.warns(UserWarning, match="largest rank tried, 9: these counts have no more"):
        n2s.select_rank(adata)
    with pytest.warns(UserWarning, match="largest rank tried, 3: pass a larger max_rank"):
        n2s.select_rank(adata, max_rank=3)


@pytest.mark.parametrize("protocol", ["loo", "mcv", "noise2self", "bcv"])
def test_no_rank_beyond_those_that_there_are_is_tried(protocol):
    adata = ad.AnnData(poisson_counts(low_rank_profiles(20, 16, 2, seed=0), depth=60, seed=1))
    largest = {"loo": 15, "mcv": 15, "noise2self": 14, "bcv": 7}[protocol]
    with pytest.raises(ValueError, match=f"max_rank is 19: .* have at most {largest} components"):
        n2s.select_rank(adata, protocol=protocol, max_rank=19)


def losses_and_truth(rank, depth, max_rank=30):
    """Per cell and rank: loss and true error of the leave-one-out predictor, in-sample loss, and noise."""
    profiles = low_rank_profiles(400, 300, rank, seed=rank)
    counts = poisson_counts(profiles, depth, seed=rank + 1)
    parts = split_matrix(counts, random_state=0)
    # Rates per 1000 molecules: the expectation of X2 brought to 1000, given the cell, is exactly 1000 x profile.
    z1, z2 = (sp.csr_matrix(part.multiply(1000 / np.asarray(part.sum(axis=1)))).astype(np.float32) for part in parts)
    model, loss, _ = losses(z1, z2, max_rank, "loo")
    u = model.scores(z1)
    y, target = 1000 * profiles, z2.toarray()
    true_error, in_sample = np.empty((2, 400, max_rank + 1))
    for k in range(max_rank + 1):
        fitted = u[:, :k] @ (u[:, :k].T @ target)
        h = np.square(u[:, :k]).sum(axis=1, keepdims=True)
        without_cell = (fitted - h * target) / (1 - h)
        true_error[:, k] = np.square(without_cell - y).mean(axis=1)
        in_sample[:, k] = np.square(fitted - target).mean(axis=1)
    return loss, true_error, in_sample, np.square(target - y).mean(axis=1)


@pytest.mark.parametrize("rank", [1, 3, 8, 20])
@pytest.mark.parametrize("depth", [500, 2000, 10_000])
def test_least_loss_is_least_true_error(rank, depth):
    loss, true_error, in_sample, noise = losses_and_truth(rank, depth)
    best, chosen = true_error.mean(axis=0).argmin(), loss.mean(axis=0).argmin()
    # The same rank, or one whose error against the truth is not told apart from the least over so many cells.
    excess = true_error[:, chosen] - true_error[:, best]
    assert abs(int(chosen) - int(best)) <= 1 or excess.mean() < 2 * excess.std() / np.sqrt(len(excess))
    # Proposition 1: loss = true error + noise variance, at every rank, within the standard error over cells.
    surplus = loss - true_error - noise[:, None]
    z = surplus.mean(axis=0) / (surplus.std(axis=0, ddof=1) / np.sqrt(len(surplus)))
    assert np.abs(z).max() < 4
    # The counter-example: with the cell's own X2 in the fit the loss falls for ever and is far below that sum.
    surplus = in_sample - true_error - noise[:, None]
    z = surplus.mean(axis=0) / (surplus.std(axis=0, ddof=1) / np.sqrt(len(surplus)))
    assert in_sample.mean(axis=0).argmin() == 30
    assert z[-1] < -10


def test_rank_at_low_depth_is_corrected_towards_that_of_the_full_depth():
    """The corrected rank is nearer to the one found with halves as deep as the full data.

    It stays a little below, because components learned from all molecules are better ones, which no correction of
    the loss of the old ones can know.
    """
    off, corrected_off = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        programmes = rng.gamma(0.5, size=(40, 300))
        weights = rng.gamma(0.3, size=(500, 40)) * 0.85 ** np.arange(40)  # ever weaker programmes
        profiles = weights @ programmes
        profiles /= profiles.sum(axis=1, keepdims=True)
        counts = poisson_counts(profiles, 1000, seed)
        curve = rank_curve(counts, 40, np.random.default_rng(0))
        deep = rank_curve(poisson_counts(profiles, 2000, seed + 100), 40, np.random.default_rng(0))
        off.append(deep.split_rank - curve.split_rank)
        corrected_off.append(deep.split_rank - curve.rank)
    assert np.mean(off) > 1
    assert 0 <= np.mean(corrected_off) < 0.75 * np.mean(off)


def test_more_splits_average_and_the_curve_says_what_it_is(simulated):
    curve = rank_curve(simulated, 12, np.random.default_rng(0), n_splits=3)
    assert curve.splits.shape == (6, 13)
    np.testing.assert_allclose(curve.splits.mean(axis=0), curve.loss, rtol=1e-9)
    assert curve.error[curve.split_rank] == 0
    assert curve.split_rank in curve.within_one_error
    assert curve.rank >= curve.split_rank
    assert rank_curve(simulated, 12, np.random.default_rng(0), protocol="noise2self").splits.shape == (1, 13)


def test_edge_and_absence_are_recognised(simulated):
    assert rank_curve(simulated, 1, np.random.default_rng(0)).at_edge
    assert rank_curve(simulated, 12, np.random.default_rng(0)).beats_none
    flat = poisson_counts(np.tile(low_rank_profiles(1, 120, 1, seed=0), (300, 1)), 600, seed=1)
    curve = rank_curve(flat, 12, np.random.default_rng(0))
    assert not curve.beats_none
    assert curve.split_rank == 0


@pytest.mark.real
@pytest.mark.slow
def test_published_rank_of_the_myeloid_cells(real_data):
    """Noise2Self (Batson & Royer 2019), Figure 3: 17."""
    x = real_data("paul15_myeloid").X.tocsr()
    x = x[np.asarray(x.sum(axis=1)).ravel() > 1000]
    x = x[:, np.asarray((x > 0).sum(axis=0)).ravel() >= 10]
    ranks = [rank_curve(x, 40, np.random.default_rng(seed), protocol="noise2self").rank for seed in range(10)]
    assert all(15 <= rank <= 20 for rank in ranks)
    assert 16 <= np.median(ranks) <= 18
