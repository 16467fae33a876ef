"""Calibration of any denoiser: the choice is that of the truth, and what goes wrong is said in one sentence."""

from __future__ import annotations

import warnings
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import divergence

import sc_noise2self as n2s
from sc_noise2self.denoisers.neighbors import DiffusionDenoiser, KNNDenoiser
from sc_noise2self.denoisers.pca import PCADenoiser


def toward_mean(counts, share):
    """Mix each cell with the mean profile: a denoiser with one number, best strictly between its ends."""
    x = counts.toarray()
    return (1 - share) * x + share * x.sum(axis=1, keepdims=True) * x.sum(axis=0) / x.sum()


def kernel(counts, bandwidth):
    """A deliberately odd denoiser: every cell the Gaussian mean of all cells, in Hellinger distance."""
    x = counts.toarray()
    root = np.sqrt(x / np.maximum(x.sum(axis=1, keepdims=True), 1))
    squares = np.square(root[:, None] - root[None]).sum(axis=2)
    np.fill_diagonal(squares, np.sort(squares, axis=1)[:, 1])
    return np.exp(-squares / bandwidth) @ x


DENOISERS = {
    "rank": (PCADenoiser("log1p", n_components=12), list(range(12))),
    "t": (DiffusionDenoiser(15, n_pcs=8, n_components=20), list(range(8))),
    "n_neighbors": (KNNDenoiser(n_pcs=8, n_components=20), [2, 4, 8, 16, 32, 64, 128, 256]),
    "bandwidth": (kernel, list(np.geomspace(0.005, 2, 10))),
}


@pytest.fixture(scope="module")
def true_errors(truth, counts):
    """KL(truth || denoised) of each value of each parameter, from all counts."""

    def of(parameter, value):
        denoiser, _ = DENOISERS[parameter]
        if callable(denoiser):
            out = denoiser(counts, **{parameter: value})
            p = out / out.sum(axis=1, keepdims=True)
            return (truth * np.log(truth / np.maximum(p, 1e-12))).sum(axis=1).mean()
        if parameter == "n_neighbors":
            return divergence(truth, KNNDenoiser(value, n_pcs=8, n_components=20).fit(counts).predict(counts))
        return divergence(truth, denoiser.fit(counts).predict(counts, **{parameter: value}))

    return {parameter: [of(parameter, value) for value in grid] for parameter, (_, grid) in DENOISERS.items()}


@pytest.mark.parametrize("partition", ["molecules", "genes"])
@pytest.mark.parametrize("parameter", list(DENOISERS))
def test_the_choice_is_that_of_the_truth_or_next_to_it(counts, true_errors, parameter, partition):
    denoiser, grid = DENOISERS[parameter]
    found = n2s.calibrate(counts, denoiser, {parameter: grid}, partition=partition)
    chosen = int(np.argmax(found.table["chosen"]))
    assert abs(chosen - int(np.argmin(true_errors[parameter]))) <= 1
    assert found.best == {parameter: grid[chosen]}


def test_what_mixes_a_cells_own_counts_back_in_is_judged_by_molecules_alone(counts):
    """The other genes say nothing of what only this gene's count knows; `partitions.Genes` warns of it."""
    grid = {"share": np.linspace(0, 1, 11)}
    by_molecules = n2s.calibrate(counts, toward_mean, grid)
    assert 0 < by_molecules.best["share"] < 1
    with (
        pytest.warns(UserWarning, match="at the largest value tried, share=1.0"),
        pytest.warns(UserWarning, match="no candidate predicts hidden molecules better"),
    ):
        by_genes = n2s.calibrate(counts, toward_mean, grid, partition="genes")
    assert by_genes.best["share"] == 1


def test_table_and_uns(adata, tmp_path):
    before = adata.X.copy()
    found = n2s.calibrate(adata, toward_mean, {"share": [0.2, 0.5, 0.8, 1.0]}, n_splits=3, refit=True)
    table = found.table
    assert list(table.columns) == ["share", "loss", "error", "gain", "seconds", "failure", "chosen"]
    assert table["chosen"].sum() == 1
    assert table["loss"].idxmin() == table["chosen"].idxmax()
    assert table["error"][table["chosen"]].item() == 0
    np.testing.assert_allclose(table["gain"], -table["loss"])
    assert found.split_losses.shape == (4, 3)
    np.testing.assert_allclose(found.split_losses.mean(axis=1), table["loss"], rtol=0.02)
    assert (before != adata.X).nnz == 0

    adata.write_h5ad(tmp_path / "a.h5ad")
    record = ad.read_h5ad(tmp_path / "a.h5ad").uns["calibrate"]
    assert record["best"]["share"] == found.best["share"]
    np.testing.assert_allclose(record["table"]["loss"], table["loss"])
    assert (record["denoiser"], record["loss"], record["partition"]) == (
        "toward_mean",
        "poisson",
        "Molecules(n_folds=2, fraction=None)",
    )
    layer = adata.layers["calibrate"]
    np.testing.assert_allclose(layer.sum(axis=1), before.sum(axis=1).A1, rtol=1e-4)
    np.testing.assert_allclose(layer, toward_mean(before, **found.best), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer, found.denoised)


def test_several_grids_and_values_of_any_kind(adata, tmp_path):
    def power(counts, how, p=None):
        return toward_mean(counts, 0.5 if p is None else p) if how is np.mean else counts.toarray() + 0.1

    found = n2s.calibrate(adata, power, [{"how": [np.mean], "p": [0.3, 0.6]}, {"how": [np.median]}])
    assert len(found.table) == 3
    assert found.best["how"] is np.mean
    adata.write_h5ad(tmp_path / "a.h5ad")


def test_one_standard_error_takes_the_first_that_is_as_good(counts):
    grid = {"share": [1.0, 0.72, 0.7, 0.68, 0.66, 0.64, 0.62, 0.6]}
    least = n2s.calibrate(counts, toward_mean, grid)
    first = n2s.calibrate(counts, toward_mean, grid, rule="one_standard_error")
    good = (least.table["loss"] <= least.table["loss"].min() + least.table["error"]).to_numpy()
    assert int(np.argmax(first.table["chosen"])) == int(np.argmax(good))
    assert int(np.argmax(first.table["chosen"])) <= int(np.argmax(least.table["chosen"]))


@pytest.mark.parametrize("prefer", ["processes", "threads"])
def test_jobs_change_nothing(counts, prefer):
    grid = {"share": [0.2, 0.5, 0.8, 0.9]}
    alone = n2s.calibrate(counts, toward_mean, grid)
    together = n2s.calibrate(counts, toward_mean, grid, n_jobs=2, prefer=prefer)
    np.testing.assert_array_equal(alone.table["loss"], together.table["loss"])
    np.testing.assert_array_equal(alone.table["error"], together.table["error"])


def test_a_lambda_and_a_partial_and_every_array_type(counts):
    grid = {"share": [0.5, 0.9, 1.0]}
    expected = n2s.calibrate(counts, toward_mean, grid).table["loss"]
    for denoiser in (
        lambda counts, share: toward_mean(counts, share),
        lambda counts, share: sp.csr_matrix(toward_mean(counts, share)),
        lambda counts, share: pd.DataFrame(toward_mean(counts, share)),
        lambda counts, share: sp.csr_matrix(toward_mean(counts, share)).todense(),
        partial(toward_mean),
    ):
        np.testing.assert_allclose(n2s.calibrate(counts, denoiser, grid).table["loss"], expected)
    np.testing.assert_allclose(n2s.calibrate(counts.toarray(), toward_mean, grid).table["loss"], expected)


def test_scanpy_recipes_work_as_they_are(pbmc):
    def pcs(adata, n_pcs):
        sc.pp.pca(adata, n_comps=n_pcs)
        adata.X = adata.obsm["X_pca"] @ adata.varm["PCs"].T + np.asarray(adata.X.mean(axis=0))

    def neighbours(adata, n_neighbors):
        sc.pp.neighbors(adata, n_neighbors=n_neighbors, use_rep="X", transformer="sklearn", method="gauss")
        walk = adata.obsp["connectivities"] + sp.eye(adata.n_obs)
        return ad.AnnData(sp.diags(1 / walk.sum(axis=1).A1) @ walk @ adata.X, obs=adata.obs, var=adata.var)

    found = n2s.calibrate(pbmc, pcs, {"n_pcs": [2, 5, 10, 20, 40]}, transform="log1p")
    assert found.best["n_pcs"] in (5, 10, 20)
    assert found.table["gain"].max() > 0.05
    found = n2s.calibrate(
        pbmc, neighbours, {"n_neighbors": [5, 15, 45, 150, 400]}, transform="log1p", key_added="neighbours"
    )
    assert found.table["gain"].min() > 0
    assert found.table["gain"].max() > 0.2
    assert pbmc.uns["neighbours"]["params"]["transform"] == "log1p"


def test_a_function_of_anndata_may_change_x_in_place(counts):
    def in_place(adata, power):
        adata.X.data **= power

    with pytest.warns(UserWarning, match="no candidate predicts|worse than one mean profile"):
        found = n2s.calibrate(counts, in_place, {"power": [0.5, 2.0]})
    assert found.best == {"power": 0.5}
    assert np.isfinite(found.table["loss"]).all()


def test_square_roots_go_back_by_the_poisson_expectation(counts):
    """A rank that is plenty on square roots: its gain is that of the exact way back, not that of squaring."""

    def low_rank(x, rank):
        u, s, vt = np.linalg.svd(x.toarray(), full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ vt[:rank]

    right = n2s.calibrate(counts, low_rank, {"rank": [4]}, transform="sqrt").table["gain"][0]

    def squared(x, rank):
        x = x.copy()
        x.data = np.sqrt(x.data)
        return np.square(np.maximum(low_rank(x, rank), 0))

    assert right > n2s.calibrate(counts, squared, {"rank": [4]}).table["gain"][0] + 0.01


def test_magic_works_as_it_is(pbmc):
    pytest.importorskip("magic", reason="magic-impute is not installed")
    found = n2s.calibrate(pbmc, sc.external.pp.magic, {"t": [1, 3]}, transform="log1p")
    assert found.table["gain"].max() > 0.03


@pytest.mark.parametrize("loss", ["poisson", "mse", "mse_sqrt", "mse_log1p"])
def test_losses_by_name_choose_alike(counts, loss):
    found = n2s.calibrate(counts, PCADenoiser("log1p", n_components=8), {"rank": range(9)}, loss=loss)
    assert found.best["rank"] in (2, 3, 4)
    assert ("gain" in found.table) == (loss == "poisson")


def test_a_loss_may_be_a_function(counts):
    def chi2(expected, observed):
        return (np.square(observed - expected) / np.maximum(expected, 0.1)).sum(axis=1)

    found = n2s.calibrate(counts, PCADenoiser("log1p", n_components=8), {"rank": range(9)}, loss=chi2)
    assert found.best["rank"] in (2, 3, 4)


def test_a_loss_that_is_no_loss_of_each_cell_is_refused(counts):
    with pytest.raises(ValueError, match=r"the loss returned shape \(\): return one number for each cell"):
        n2s.calibrate(counts, toward_mean, {"share": [0.5]}, loss=lambda m, x: np.square(m - x).mean())


def test_a_parameter_may_be_called_loss(adata):
    found = n2s.calibrate(adata, lambda counts, loss: toward_mean(counts, loss), {"loss": [0.2, 0.6, 1.0]})
    assert found.best == {"loss": 0.6}
    assert list(found.table["param_loss"]) == [0.2, 0.6, 1.0]
    assert n2s.pl.loss(adata, key="calibrate").get_xlabel() == "param_loss"


def test_one_fit_serves_what_predict_is_told(counts):
    fits = []

    class Counting(PCADenoiser):
        def fit(self, counts, genes=None):
            fits.append(self.n_components)
            return super().fit(counts, genes)

    estimator = Counting("log1p", n_components=3)
    n2s.calibrate(counts, estimator, {"n_components": [4, 6], "rank": [1, 3, 4]})
    assert sorted(fits) == [4, 4, 6, 6]
    assert estimator.n_components == 3
    assert not hasattr(estimator, "components_")


def test_pathways_are_named_by_genes(adata):
    pathways = {"first": list(adata.var_names[:10]), "second": list(adata.var_names[10:15])}
    found = n2s.calibrate(adata, PCADenoiser("log1p", n_components=8), {"rank": [0, 4]}, partition=pathways)
    assert found.best["rank"] == 4


def test_an_own_partition_is_taken(counts):
    class Even:
        """Cells of even index see half of their molecules."""

        def folds(self, data, rng):
            return n2s.partitions.Molecules().folds(data, rng)[:1]

    found = n2s.calibrate(counts, toward_mean, {"share": [0.5, 1.0]}, partition=Even())
    assert np.isfinite(found.table["loss"]).all()


def test_images(tmp_path):
    rng = np.random.default_rng(0)
    y = np.add.outer(np.sin(np.arange(64) / 9), np.cos(np.arange(64) / 7))
    x = y + rng.normal(0, 0.5, y.shape)
    masks = [np.add.outer(8 * (np.arange(64) % 3), np.arange(64) % 3) == 8 * i + j for i in range(3) for j in range(3)]

    def neighbours(z):
        return sum(np.roll(z, shift, axis) for shift in (-1, 1) for axis in (0, 1)) / 4

    def smooth(z, steps):
        for _ in range(steps):
            z = (z + 2 * neighbours(z)) / 3
        return z

    partition = n2s.partitions.Masks(masks, neighbours)
    found = n2s.calibrate(x, smooth, {"steps": [1, 2, 4, 8, 16, 32, 64]}, partition=partition, refit=True)
    truth = [np.square(partition.invariant(smooth)(x, steps=steps) - y).mean() for steps in found.table["steps"]]
    assert int(np.argmin(truth)) == int(np.argmax(found.table["chosen"]))
    # Proposition 1, to the error of a mean of 4096 squares
    np.testing.assert_allclose(found.table["loss"] - truth, 0.25, atol=4 * 0.25 * np.sqrt(2 / 4096))
    np.testing.assert_array_equal(found.denoised, smooth(x, **found.best))
    assert "gain" not in found.table


def test_a_candidate_that_fails_is_reported_and_the_others_go_on(counts):
    def fragile(counts, share):
        if share == 0.3:
            raise RuntimeError("no such share\nand more")
        return toward_mean(counts, share)

    with pytest.warns(UserWarning, match=r"1 of 3 candidates failed .*: share=0.3: RuntimeError: no such share$"):
        found = n2s.calibrate(counts, fragile, {"share": [0.3, 0.6, 1.0]})
    assert found.best["share"] == 0.6
    assert np.isnan(found.table["loss"][0])
    assert found.table["failure"][0] == "RuntimeError: no such share"
    with pytest.raises(ValueError, match=r"every candidate failed; the first, share=0.3: RuntimeError: no such share"):
        n2s.calibrate(counts, fragile, {"share": [0.3]})


def changes_its_input(counts):
    counts.data[:] = 1
    return counts.toarray()


def writes_nothing(adata):
    sc.pp.calculate_qc_metrics(adata, inplace=True, percent_top=None)


def other_order(counts):
    names = pd.RangeIndex(counts.shape[1]).astype(str)
    return pd.DataFrame(counts.toarray(), columns=names[::-1])


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (changes_its_input, "changes_its_input changed the matrix that it was given"),
        (writes_nothing, "writes_nothing left adata.X as it was"),
        (lambda counts: counts, "returned the matrix that it was given"),
        (
            lambda counts: counts.T.toarray(),
            r"returned shape \(150, 400\) \(they seem transposed\): cells x genes are",
        ),
        (lambda counts: counts[:, :5].toarray(), r"returned shape \(400, 5\): cells x genes are 400 x 150"),
        (lambda counts: None, "returned NoneType: return denoised values"),
        (lambda counts: counts.toarray().astype(str), "returned values of type"),
        (lambda counts: np.full(counts.shape, np.nan), "returned NaN or infinite values"),
        (lambda counts: counts.toarray() - counts.toarray().mean(axis=0), "are negative: return expected values"),
        (other_order, "returned genes in another order, or others"),
    ],
)
def test_what_a_denoiser_does_wrong_is_said_in_one_sentence(counts, denoiser, message):
    with pytest.raises(ValueError, match=message):
        n2s.calibrate(counts, denoiser, {})


@pytest.mark.parametrize(
    "denoiser",
    [
        lambda counts: toward_mean(counts, 0.8)[::-1],
        lambda counts: toward_mean(counts, 0.8)[:, ::-1],
        lambda counts: np.exp(toward_mean(counts, 0.5)),
    ],
    ids=["cells", "genes", "scale"],
)
def test_another_order_or_scale_is_warned_about(counts, denoiser):
    with pytest.warns(UserWarning, match="worse than one mean profile: check that cells and genes are returned in the"):
        n2s.calibrate(counts, denoiser, {})


def test_nothing_is_warned_about_a_good_denoiser(counts):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        n2s.calibrate(counts, toward_mean, {"share": [0.2, 0.6, 1.0]})


def test_no_structure_is_warned_about():
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(np.outer(np.full(200, 1.0), rng.gamma(1, size=50))).astype(np.float32))
    with pytest.warns(UserWarning, match="no candidate predicts hidden molecules better than one mean profile"):
        n2s.calibrate(counts, toward_mean, {"share": [0.0, 0.5]})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": {"share": 0.5}}, TypeError, r"grid has 'share': 0.5: pass its values in a list"),
        ({"grid": {"share": []}}, ValueError, "grid has no candidate"),
        ({"grid": [3]}, TypeError, "grid holds 3: pass a dict of lists"),
        (
            {"denoiser": PCADenoiser},
            TypeError,
            r"denoiser is the class PCADenoiser: pass an object",
        ),
        ({"denoiser": 3}, TypeError, "denoiser is of type int"),
        ({"denoiser": PCADenoiser(), "grid": {"k": [3]}}, ValueError, "PCADenoiser has no parameter k: it takes"),
        ({"denoiser": PCADenoiser(), "transform": "log1p"}, ValueError, "estimators take counts"),
        ({"transform": "log"}, ValueError, "transform is 'log': pass one of log1p, sqrt, none"),
        ({"loss": "l2"}, ValueError, "loss is 'l2': pass one of poisson, mse, mse_sqrt, mse_log1p, or a function"),
        ({"rule": "best"}, ValueError, "rule is 'best': pass one of least, one_standard_error"),
        ({"prefer": "gpu"}, ValueError, "prefer is 'gpu'"),
        ({"n_splits": 0}, ValueError, "n_splits is 0"),
        ({"partition": "cells"}, ValueError, "partition is 'cells'"),
        ({"key_added": "a/b"}, ValueError, "key_added is 'a/b'"),
        ({"key_added": "taken"}, ValueError, r"adata.uns\['taken'\] exists and is not an earlier calibration"),
        ({"layer": "counts"}, ValueError, "layer 'counts' is missing"),
        ({"partition": n2s.partitions.Masks([], np.zeros_like)}, ValueError, "Masks hides entries of an array"),
    ],
)
def test_bad_input_is_refused_and_nothing_written(adata, change, error, message):
    adata.uns["taken"] = 1
    options = {"denoiser": toward_mean, "grid": {"share": [0.5]}} | change
    with pytest.raises(error, match=message):
        n2s.calibrate(adata, **options)
    assert set(adata.uns) == {"taken"}


def test_a_partition_that_hides_nothing_is_refused():
    nothing = n2s.partitions.Masks([], np.zeros_like)
    with pytest.raises(ValueError, match="the partition hides nothing"):
        n2s.calibrate(np.ones((4, 4)), lambda x: x + 1, {}, partition=nothing)


def test_a_layer_is_not_lost_and_options_of_anndata_need_one(adata, counts):
    adata.layers["mine"] = adata.X.copy()
    with pytest.raises(ValueError, match=r"adata.layers\['mine'\] exists and is not an earlier calibration"):
        n2s.calibrate(adata, toward_mean, {"share": [0.5]}, key_added="mine", refit=True)
    with pytest.raises(ValueError, match="layer and key_added belong to an AnnData object"):
        n2s.calibrate(counts, toward_mean, {"share": [0.5]}, layer="counts")
    n2s.calibrate(adata, toward_mean, {"share": [0.5]}, refit=True)
    n2s.calibrate(adata, toward_mean, {"share": [0.7]}, refit=True)
    assert adata.uns["calibrate"]["best"]["share"] == 0.7
    n2s.calibrate(adata, toward_mean, {"share": [0.6]})
    assert "calibrate" not in adata.layers  # the layer of an earlier choice would not be that of this one
    adata.layers["calibrate"] = adata.X.copy()
    with pytest.raises(ValueError, match=r"adata.layers\['calibrate'\] exists"):
        n2s.calibrate(adata, toward_mean, {"share": [0.6]}, refit=True)
    n2s.calibrate(adata, toward_mean, {"share": [0.6]})
    assert "calibrate" in adata.layers


def test_the_curve_is_plotted(adata):
    grid = {"share": [0.2, 0.6, 1.0], "name": ["a", "b"]}
    n2s.calibrate(adata, lambda counts, share, name: toward_mean(counts, share), grid)
    ax = n2s.pl.loss(adata, key="calibrate")
    assert ax.get_xlabel() == "share"
    labels = ax.get_legend_handles_labels()[1]
    assert {"name a", "name b", "chosen: share 0.6, name a", "one mean profile"} <= set(labels)
    table = adata.uns["calibrate"]["table"]
    np.testing.assert_allclose(ax.containers[0][0].get_ydata(orig=False), table["loss"][table["name"] == "a"])

    n2s.calibrate(
        adata, lambda counts, how: toward_mean(counts, {"no": 0.0, "some": 0.6}[how]), {"how": ["no", "some"]}
    )
    ax = n2s.pl.loss(adata, key="calibrate")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["no", "some"]
    n2s.calibrate(adata, lambda counts: toward_mean(counts, 0.5), {})
    with pytest.raises(ValueError, match="one candidate without parameters"):
        n2s.pl.loss(adata, key="calibrate")
