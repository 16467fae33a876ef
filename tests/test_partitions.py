"""Partitions: every count hidden once, nothing hidden seen, losses as defined."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import low_rank_profiles, poisson_counts

from sc_noise2self._transform import PoissonExpectation
from sc_noise2self.partitions import Blocks, Genes, Masks, Molecules, as_partition, fold_of

PATHWAYS = {"a": [0, 1, 2, 3], "b": [3, 4, 5]}


@pytest.fixture(scope="module")
def x():
    return poisson_counts(low_rank_profiles(60, 40, 3, seed=0), 800, seed=1)


def folds_of(partition, x, seed=0):
    return partition.folds(x, np.random.default_rng(seed))


def hidden_entries(fold, shape):
    return np.ones(shape, bool) if fold.hidden is None else fold.hidden[fold.groups]


@pytest.mark.parametrize("partition", [*map(Molecules, range(2, 11)), Molecules(fraction=0.8)])
def test_molecules_add_up_and_each_is_held_out_once(x, partition):
    before = x.copy()
    folds = folds_of(partition, x)
    for fold in folds:
        assert (fold.seen + fold.held_out != x).nnz == 0
        np.testing.assert_allclose(fold.size, fold.held_out.sum(axis=1).A1)
        np.testing.assert_allclose(fold.share.sum(), 1)
    if partition.fraction is None:
        assert (sum(fold.held_out for fold in folds) != x).nnz == 0
        assert len(folds) == partition.n_folds
    else:
        assert folds[0].seen.sum() / x.sum() == pytest.approx(0.8, abs=0.02)
    assert (x != before).nnz == 0


@pytest.mark.parametrize("n_folds", range(2, 11))
def test_parts_of_poisson_counts_are_equal_and_independent(n_folds):
    """What a fold holds out says nothing of what another does, nor of what it shows."""
    x = sp.csr_matrix(np.random.default_rng(n_folds).poisson(2, (400, 500)).astype(np.float32))
    folds = folds_of(Molecules(n_folds), x)
    parts = np.array([fold.held_out.toarray().ravel() for fold in folds])
    n = x.shape[0] * x.shape[1]
    # correlations of independent entries are normal, with a standard error of 1 / sqrt(n)
    found = np.corrcoef(parts)[np.triu_indices(n_folds, 1)]
    np.testing.assert_allclose(found, 0, atol=4.5 / np.sqrt(n))
    for part, fold in zip(parts, folds, strict=True):
        assert abs(np.corrcoef(part, fold.seen.toarray().ravel())[0, 1]) < 4.5 / np.sqrt(n)
    # Poisson: mean and variance are 2 / n_folds; their standard errors, of a sample of n
    rate = 2 / n_folds
    np.testing.assert_allclose(parts.mean(axis=1), rate, atol=4.5 * np.sqrt(rate / n))
    np.testing.assert_allclose(parts.var(axis=1), rate, atol=4.5 * np.sqrt((rate + 2 * rate**2) / n))


@pytest.mark.parametrize("partition", [Genes(4, 5), Genes(10), Genes(2, 2), Blocks(3, 4), Blocks(2, 2), Blocks(60, 40)])
def test_every_entry_is_hidden_once_and_what_is_visible_is_as_it_was(x, partition):
    before = x.copy()
    times = np.zeros(x.shape)
    for fold in folds_of(partition, x):
        hidden = hidden_entries(fold, x.shape)
        times += hidden
        np.testing.assert_array_equal(fold.held_out.toarray(), np.where(hidden, x.toarray(), 0))
        np.testing.assert_array_equal(fold.seen.toarray()[~hidden], x.toarray()[~hidden])
        np.testing.assert_allclose(fold.size, np.where(hidden, 0, x.toarray()).sum(axis=1))
    np.testing.assert_array_equal(times, 1)
    assert (x != before).nnz == 0


@pytest.mark.parametrize("partition", [Genes(4), Genes(10), Genes(PATHWAYS, 3), Blocks(3, 4)])
def test_what_is_hidden_does_not_show_in_what_is_seen(x, partition):
    for i, first in enumerate(folds_of(partition, x)):
        hidden = hidden_entries(first, x.shape)
        other = x.toarray()
        other[hidden] = (0, 7, 1000)[i % 3]
        second = folds_of(partition, sp.csr_matrix(other))[i]
        np.testing.assert_array_equal(hidden_entries(second, x.shape), hidden)
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(first.seen, part), getattr(second.seen, part))
        np.testing.assert_array_equal(first.share, second.share)
        np.testing.assert_array_equal(first.size, second.size)


def test_what_a_mask_hides_does_not_show_in_what_is_seen():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(8, 9))
    masks = [(np.add.outer(np.arange(8), np.arange(9)) % 2) == i for i in (0, 1)]

    def neighbours(y):  # on a checkerboard they are of the other colour; the first row and column have fewer
        out = np.zeros(y.shape)
        out[1:] += y[:-1]
        out[:-1] += y[1:]
        out[:, 1:] += y[:, :-1]
        out[:, :-1] += y[:, 1:]
        return out

    partition = Masks(masks, neighbours)
    times = np.zeros(image.shape)
    for i, mask in enumerate(masks):
        other = image.copy()
        other[mask] = 1e6
        np.testing.assert_array_equal(partition.folds(other, rng)[i].seen, partition.folds(image, rng)[i].seen)
        # all of the loss is that of the masked entries
        right = np.where(mask, image, 1e9)
        assert partition.folds(image, rng)[i].score(right, "mse").mean == 0
        times += mask
    np.testing.assert_array_equal(times, 1)


def test_hidden_counts_are_replaced_by_whole_counts_at_the_cells_depth():
    x = poisson_counts(low_rank_profiles(2000, 30, 1, seed=0), 3000, seed=1)
    fold = folds_of(Genes(5), x)[0]
    hidden = hidden_entries(fold, x.shape)
    seen = fold.seen.toarray()
    np.testing.assert_array_equal(seen, np.rint(seen))
    # one programme: the true profile is the same everywhere, and so must be the means of what fills the gaps
    filled = [seen[hidden[:, gene], gene].sum() for gene in range(30)]
    expected = [x.toarray()[hidden[:, gene], gene].sum() for gene in range(30)]
    # both are Poisson sums, and cells' visible depths are known to some 2 %
    np.testing.assert_allclose(filled, expected, atol=6 * np.sqrt(max(expected)), rtol=0.03)
    np.testing.assert_allclose(fold.share, x.sum(axis=0).A1 / x.sum(), rtol=0.05)


def test_pathways_are_hidden_whole_and_other_genes_never(x):
    times = np.zeros(x.shape, int)
    for fold in folds_of(Genes(PATHWAYS), x):
        hidden = hidden_entries(fold, x.shape)
        times += hidden
        for row in hidden:
            assert set(np.flatnonzero(row)) in (set(), {0, 1, 2, 3}, {3, 4, 5})
    np.testing.assert_array_equal(times[:, 3], 2)
    np.testing.assert_array_equal(times[:, [0, 4]], 1)
    assert not times[:, 6:].any()


def test_poisson_loss_of_halves_is_the_held_out_gain(x):
    fold = folds_of(Molecules(), x)[0]
    predicted = np.random.default_rng(0).gamma(2, size=x.shape)
    found = fold.score(predicted, "poisson")

    class Dense:
        def blocks(self):
            yield slice(0, x.shape[0]), predicted

    gain = fold.gain(Dense())
    np.testing.assert_allclose(-found.sums, gain.sums, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(found.weights, gain.weights)
    p = predicted / predicted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(fold.probabilities(Dense()), p[fold.held_out.nonzero()])


def test_a_fold_of_some_cells_scores_them_as_the_whole_does(x):
    predicted = np.random.default_rng(0).gamma(2, size=x.shape)
    seen, held_out = Molecules(fraction=0.5).folds(x, np.random.default_rng(0))[0].seen, x
    halves = fold_of(seen, held_out, cells=np.arange(60) + 100)
    rows = np.array([3, 50, 7])
    np.testing.assert_array_equal(halves.of_cells(rows).cells, rows + 100)
    for fold in (halves, *folds_of(Genes(4), x)[:1]):
        some = fold.of_cells(rows)
        whole = fold.score(predicted, "poisson")
        part = some.score(predicted[rows], "poisson")
        np.testing.assert_allclose(part.sums, whole.sums[rows])
        np.testing.assert_allclose(part.weights, whole.weights[rows])
    with pytest.raises(ValueError, match=r"cells of a Fold has shape \(3,\): seen has \(60, 40\), so it needs \(60,\)"):
        fold_of(seen, held_out, cells=rows)


@pytest.mark.parametrize("partition", [Molecules(), Genes(4), Blocks(2, 2)])
@pytest.mark.parametrize("loss", ["poisson", "mse", "mse_sqrt", "mse_log1p"])
def test_losses_are_their_definitions(x, partition, loss):
    fold = folds_of(partition, x)[1]
    hidden = hidden_entries(fold, x.shape)
    predicted = np.random.default_rng(0).gamma(2, size=x.shape)
    found = fold.score(predicted, loss)
    held_out, sums, weights = fold.held_out.toarray(), np.zeros(60), np.zeros(60)
    for i in range(60):
        basis = np.ones(40, bool) if fold.hidden is None else ~hidden[i]
        m = (predicted[i] * fold.size[i] / predicted[i, basis].sum())[hidden[i]]
        m0 = (fold.share * fold.size[i] / fold.share[basis].sum())[hidden[i]]
        observed = held_out[i, hidden[i]]
        if loss == "poisson":
            blend = 0.995 * m + 0.005 * m0
            log = np.log(np.where(observed > 0, blend / np.where(m0 > 0, m0, 1), 1))
            sums[i], weights[i] = (blend - m0 - observed * log).sum(), observed.sum()
        else:
            transform = {"mse": lambda y: y, "mse_sqrt": np.sqrt, "mse_log1p": np.log1p}[loss]
            expected = m if loss == "mse" else PoissonExpectation(loss.removeprefix("mse_"))(m)
            sums[i], weights[i] = np.square(transform(observed) - expected).sum(), hidden[i].sum()
    np.testing.assert_allclose(found.sums, sums, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.weights, weights)


def test_a_loss_may_be_a_function_and_the_scale_of_a_cell_does_not_matter(x):
    fold = folds_of(Genes(4), x)[0]
    predicted = np.random.default_rng(0).gamma(2, size=x.shape)

    def absolute(expected, observed):
        assert expected.shape == observed.shape
        return np.abs(expected - observed).sum(axis=1)

    first = fold.score(predicted, absolute)
    scaled = fold.score(predicted * np.arange(1, 61)[:, None], absolute)
    np.testing.assert_allclose(first.sums, scaled.sums)
    assert first.mean > 0


def test_the_truth_loses_least(x):
    """The Poisson loss is proper: no other profile expects less, over molecules and over genes."""
    profiles = low_rank_profiles(2000, 40, 3, seed=0)
    counts = poisson_counts(profiles, 800, seed=1)
    rng = np.random.default_rng(0)
    for partition in (Molecules(), Genes(4)):
        folds = folds_of(partition, counts)
        best = sum(fold.score(profiles, "poisson").sums.sum() for fold in folds)
        for wrong in (
            np.tile(profiles.mean(axis=0), (2000, 1)),
            profiles**1.1,
            profiles * rng.gamma(50, 1 / 50, profiles.shape),
        ):
            assert sum(fold.score(wrong, "poisson").sums.sum() for fold in folds) > best


def test_masks_hide_what_they_say_and_make_any_function_invariant():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(8, 9))
    masks = [(np.add.outer(np.arange(8), 2 * np.arange(9)) % 4) == i for i in range(4)]
    partition = Masks(masks, lambda y: np.full(y.shape, 0.5))
    for fold, mask in zip(partition.folds(image, rng), masks, strict=True):
        np.testing.assert_array_equal(fold.seen, np.where(mask, 0.5, image))
        score = fold.score(np.zeros((8, 9)), "mse")
        assert score.mean == pytest.approx(np.square(image[mask]).mean())

    def blur(y, weight):
        return weight * y + (1 - weight) * (np.roll(y, 1, 0) + np.roll(y, -1, 0)) / 2

    f = partition.invariant(blur)
    out = f(image, weight=0.7)
    other = image.copy()
    other[masks[2]] += 10
    np.testing.assert_array_equal(f(other, weight=0.7)[masks[2]], out[masks[2]])
    assert not np.allclose(f(other, weight=0.7)[masks[1]], out[masks[1]])


def test_entries_in_no_mask_are_denoised_as_they_are():
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    out = Masks([mask], np.zeros_like).invariant(lambda y: 2 * y)(np.ones((4, 4)))
    np.testing.assert_array_equal(out[1:], 2)
    np.testing.assert_array_equal(out[0], 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Molecules(1), "n_folds is 1: pass a whole number, 2 or more"),
        (lambda: Molecules(5, 0.5), "n_folds and fraction were both given"),
        (lambda: Genes(1), "sets is 1"),
        (lambda: Genes(10, n_folds=2), "n_folds is 2 for 10 sets: pass 10 or more, or leave it out"),
        (lambda: Blocks(2, 1.5), "genes is 1.5"),
        (lambda: folds_of(Genes(41), np.eye(40)), "40 genes cannot be dealt to 41 groups"),
        (lambda: as_partition("molecule", None), "partition is 'molecule': pass one of molecules, genes, blocks"),
        (lambda: as_partition({"a": ["x"]}, None), "pathways name genes, and a matrix has no names"),
        (lambda: as_partition({"a": ["x", "q"]}, ["x", "y"]), "pathway 'a' has genes that adata lacks: q"),
        (lambda: as_partition({"a": "x"}, ["x", "y"]), "pathway 'a' is 'x': pass a list of gene names"),
        (lambda: as_partition({"a": 3}, ["x", "y"]), "pathway 'a' is 3: pass a list of gene names"),
        (lambda: as_partition({"a": ["x"]}, ["x", "y", "x"]), "pathway 'a' has genes whose names adata has more than"),
        (lambda: as_partition({}, ["x"]), "partition is an empty dict"),
        (lambda: folds_of(Genes({"a": [20]}), sp.eye(20, format="csr")), "positions 20 to 20: there are 20 genes"),
        (lambda: folds_of(Genes({"a": [-1]}), sp.eye(20, format="csr")), "positions -1 to -1: there are 20 genes"),
        (lambda: folds_of(Genes({"a": [True]}), sp.eye(20, format="csr")), r"booleans of shape \(1,\) for 20 genes"),
        (lambda: folds_of(Blocks(6, 2), sp.eye(5, format="csr")), "5 cells cannot be dealt to 6 groups"),
        (
            lambda: folds_of(Genes({"a": ["x"]}), sp.eye(20, format="csr")),
            "pass positions, or name genes in partition=",
        ),
        (lambda: folds_of(Genes({"a": range(20)}), sp.eye(20, format="csr")), "a set holds every gene"),
        (lambda: Masks([np.ones(3)], np.zeros_like).folds(np.ones(3), None), "a mask holds float64 of shape"),
        (lambda: Masks([np.ones(3, bool)], np.sum).folds(np.ones(3), None), "fill returned shape"),
    ],
)
def test_impossible_partitions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("partition", [Molecules, 3, None])
def test_what_is_no_partition_is_refused(partition):
    with pytest.raises(TypeError, match="pass 'molecules', 'genes', 'blocks'"):
        as_partition(partition, None)
