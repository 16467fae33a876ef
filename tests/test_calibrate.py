"""Calibration of any denoiser: the choice is that of the truth, and what goes wrong is said in one sentence."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import signal
import threading
import warnings
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import PCAEstimator, divergence

import sc_noise2self as n2s
from sc_noise2self._blocks import Counts
from sc_noise2self._calibrate import Calibration
from sc_noise2self._compare import COLUMNS, Comparison
from sc_noise2self._loss import Gain, Score
from sc_noise2self.methods import Function, Method
from sc_noise2self.methods._profiles import TableProfiles


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
    "rank": (PCAEstimator("log1p", n_components=12), list(range(12))),
    "t": (n2s.Diffusion(n_neighbors=15, n_pcs=8, n_components=20), list(range(8))),
    "n_neighbors": (n2s.KNN(n_pcs=8, n_components=20), [2, 4, 8, 16, 32, 64, 128, 256]),
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
        if isinstance(denoiser, Method):
            method = dataclasses.replace(denoiser, **{parameter: value}).checked(Counts.of(counts))
            return divergence(truth, method.denoise_counts(Counts.of(counts), np.random.default_rng(0)))
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
    columns = ["share", "loss", "error", "gain", "failure", "chosen"]
    pd.testing.assert_frame_equal(alone.table[columns], together.table[columns], check_exact=True)
    np.testing.assert_array_equal(alone.split_losses, together.split_losses)


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


@pytest.mark.slow  # scanpy compiles its neighbours
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
    found = n2s.calibrate(counts, PCAEstimator("log1p", n_components=8), {"rank": range(9)}, loss=loss)
    assert found.best["rank"] in (2, 3, 4)
    assert ("gain" in found.table) == (loss == "poisson")


def test_a_loss_may_be_a_function(counts):
    def chi2(expected, observed):
        return (np.square(observed - expected) / np.maximum(expected, 0.1)).sum(axis=1)

    found = n2s.calibrate(counts, PCAEstimator("log1p", n_components=8), {"rank": range(9)}, loss=chi2)
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

    class Counting(PCAEstimator):
        def fit(self, counts):
            fits.append(self.n_components)
            return super().fit(counts)

    estimator = Counting("log1p", n_components=3)
    n2s.calibrate(counts, estimator, {"n_components": [4, 6], "rank": [1, 3, 4]})
    assert sorted(fits) == [4, 4, 6, 6]
    assert estimator.n_components == 3
    assert not hasattr(estimator, "components_")


def test_pathways_are_named_by_genes(adata):
    pathways = {"first": list(adata.var_names[:10]), "second": list(adata.var_names[10:15])}
    found = n2s.calibrate(adata, PCAEstimator("log1p", n_components=8), {"rank": [0, 4]}, partition=pathways)
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
        ({"grid": {"share": []}}, ValueError, "grid has no candidate: 'share' has no value"),
        ({"grid": []}, ValueError, "grid has no candidate: pass a dict of lists"),
        ({"grid": [{"share": [0.5]}, {"share": []}]}, ValueError, "grid has no candidate: 'share' has no value"),
        ({"grid": [3]}, TypeError, "grid holds 3: pass a dict of lists"),
        ({"grid": None}, TypeError, "grid is None: pass a dict of lists"),
        ({"grid": "share"}, TypeError, "grid is 'share': pass a dict of lists"),
        ({"grid": {3: [0.5]}}, TypeError, "grid has 3 for a parameter's name"),
        ({"grid": {"share": None}}, TypeError, "grid has 'share': None: pass its values in a list"),
        ({"grid": {"share": np.array(0.5)}}, TypeError, r"grid has 'share': array\(0.5\): pass its values in a list"),
        ({"grid": {"share": {0.5, 0.6}}}, TypeError, "grid has 'share': {.*}: pass its values in a list"),
        ({"grid": {"share": {"a": 0.5}}}, TypeError, "grid has 'share': {'a': 0.5}: pass its values in a list"),
        ({"grid": {"share": itertools.count()}}, ValueError, "grid has more than 100000 candidates"),
        ({"grid": {"share": range(10**5), "k": [1, 2]}}, ValueError, "grid has more than 100000 candidates"),
        ({"grid": {"shre": [0.5]}}, ValueError, "cannot be called with the parameters shre=0.5: .*; it takes share"),
        ({"grid": {"share": [0.5], "k" * 999: [1]}}, ValueError, r"share=0.5, k{80}\.\.\.=1: .*; it takes share"),
        ({"grid": {}}, ValueError, "cannot be called with the parameters of an empty grid: missing .* 'share'"),
        ({"n_jobs": 0}, ValueError, "n_jobs is 0: pass a whole number, 1 or more, or -1"),
        ({"n_jobs": -2}, ValueError, "n_jobs is -2: pass a whole number"),
        ({"n_jobs": True}, ValueError, "n_jobs is True: pass a whole number"),
        ({"n_jobs": "2"}, ValueError, "n_jobs is '2': pass a whole number"),
        ({"refit": "yes"}, TypeError, "refit is 'yes': pass True or False"),
        ({"rule": np.array(["least", "best"])}, ValueError, r"rule is array\(.*: pass one of least"),
        ({"prefer": None}, ValueError, "prefer is None: pass one of processes, threads"),
        ({"transform": ["log1p"]}, ValueError, r"transform is \['log1p'\]: pass one of log1p, sqrt, none"),
        ({"loss": np.ones(2)}, ValueError, r"loss is array\(.*: pass one of poisson"),
        ({"partition": np.ones(2)}, TypeError, r"partition is array\(.*: pass 'molecules', 'genes', 'blocks'"),
        ({"partition": {"a": 3}}, ValueError, "pathway 'a' is 3: pass a list of gene names"),
        (
            {"denoiser": PCAEstimator},
            TypeError,
            r"denoiser is the class PCAEstimator: pass an object",
        ),
        ({"denoiser": 3}, TypeError, "denoiser is of type int"),
        ({"denoiser": PCAEstimator(), "grid": {"k": [3]}}, ValueError, "PCAEstimator has no parameter k: it takes"),
        ({"denoiser": PCAEstimator(), "transform": "log1p"}, ValueError, "estimators take counts"),
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
    with pytest.raises(ValueError, match="the partition hides nothing: folds of Masks returned no fold"):
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


def test_a_grid_may_hold_any_iterable_and_repeat_itself(counts):
    values = [0.5, 0.7, 0.9]
    expected = n2s.calibrate(counts, toward_mean, {"share": values}).table["loss"]
    for given in (
        tuple(values),
        np.array(values),
        (value for value in values),
        pd.Series(values),
        dict.fromkeys(values).keys(),
    ):
        found = n2s.calibrate(counts, toward_mean, {"share": given}).table["loss"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    twice = n2s.calibrate(counts, toward_mean, [{"share": values}, {"share": values}]).table
    np.testing.assert_array_equal(twice["loss"], [*expected, *expected])
    assert twice["chosen"].sum() == 1


def test_values_may_be_lists_or_no_number(counts):
    def of(counts, share):
        return toward_mean(counts, {"None": 0.7, "[1, 2]": 0.5, "nan": 0.8}.get(str(share), share))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = n2s.calibrate(counts, of, {"share": [0.1, None, [1, 2], np.nan, 0.2, 0.3]})
    expected = n2s.calibrate(counts, toward_mean, {"share": [0.1, 0.7, 0.5, 0.8, 0.2, 0.3]})
    np.testing.assert_array_equal(found.table["loss"], expected.table["loss"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", ["least", "one_standard_error"])
def test_a_loss_that_is_no_number_is_a_failure_and_never_chosen(counts, value, rule):
    def loss(expected, observed):
        of_cells = np.square(expected - observed).sum(axis=1)
        if np.ptp(expected / expected.sum(axis=1, keepdims=True), axis=0).max() < 1e-5:  # one profile for all cells
            of_cells[3] = value
        return of_cells

    grid = {"share": [1.0, 0.9, 0.5, 0.2]}
    plain = n2s.calibrate(counts, toward_mean, grid, loss=lambda m, x: np.square(m - x).sum(axis=1), rule=rule)
    with pytest.warns(
        UserWarning, match=r"1 of 4 candidates failed and were left out: share=1.0: ValueError: the loss is NaN or"
    ):
        found = n2s.calibrate(counts, toward_mean, grid, loss=loss, rule=rule)
    failed = found.table["failure"] != ""
    assert list(failed) == [True, False, False, False]
    assert not found.table["chosen"][failed].any()
    assert found.table["loss"][failed].isna().all()
    assert np.isnan(found.split_losses[failed]).all()
    np.testing.assert_array_equal(found.table["loss"][~failed], plain.table["loss"][~failed])
    with pytest.raises(ValueError, match="every candidate failed; .*the loss is NaN or infinite .* in 400 of 400"):
        n2s.calibrate(counts, toward_mean, grid, loss=lambda m, x: np.full(len(m), value), rule=rule)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, x: np.ones(len(m)) + 1j, "the loss returned values of type complex128"),
        (lambda m, x: np.full(len(m), "a"), "the loss returned values of type <U1"),
        (lambda m, x: np.ma.masked_equal(np.arange(len(m)), 3), "the loss returned masked values"),
        (lambda m: m, "takes 1 positional argument but 2 were given"),
    ],
)
def test_a_loss_of_another_kind_is_refused(counts, loss, message):
    with pytest.raises(ValueError, match=message):
        n2s.calibrate(counts, toward_mean, {"share": [0.5]}, loss=loss)


def ends_its_process(counts, share):
    if share == 0.4:
        os._exit(3)
    if share == 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
    return toward_mean(counts, share)


class EndsItsProcess:
    """One fit serves all values, so they share a process until one ends it."""

    def fit(self, counts):
        self.counts = counts
        return self

    def predict(self, counts, share):
        return ends_its_process(counts, share)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
@pytest.mark.parametrize("denoiser", [ends_its_process, EndsItsProcess()], ids=["function", "estimator"])
def test_a_candidate_that_ends_its_process_fails_alone(counts, denoiser):
    grid = {"share": [0.2, 0.4, 0.5, 0.8, 1.0]}
    partition = n2s.partitions.Molecules(fraction=0.5)
    with pytest.warns(
        UserWarning, match="2 of 5 candidates failed .*: share=0.4: ChildProcessError: its process ended"
    ):
        found = n2s.calibrate(counts, denoiser, grid, n_jobs=2, partition=partition)
    assert list(found.table["failure"].str.contains("its process ended")) == [False, True, True, False, False]
    plain = n2s.calibrate(counts, toward_mean, {"share": [0.2, 0.8, 1.0]}, partition=partition)
    np.testing.assert_array_equal(found.table["loss"][[0, 3, 4]], plain.table["loss"])
    assert found.best == plain.best


def test_what_cannot_be_sent_to_a_process_is_said(counts):
    lock = threading.Lock()

    def locked(counts, share):
        with lock:
            return toward_mean(counts, share)

    with pytest.raises(ValueError, match="cannot be sent to another process, so pass prefer='threads'"):
        n2s.calibrate(counts, locked, {"share": [0.5, 0.6]}, n_jobs=2)
    n2s.calibrate(counts, locked, {"share": [0.5, 0.6]}, n_jobs=2, prefer="threads")


class Unspeakable(Exception):
    """Its message cannot be read, and it cannot be pickled."""

    def __str__(self):
        raise RuntimeError("no words")

    def __reduce__(self):
        raise TypeError("no pickle")


def raises_oddly(counts, how):
    if how == "unspeakable":
        raise Unspeakable
    if how == "empty":
        raise RuntimeError("  ")
    if how == "long":
        raise RuntimeError("a\0b" * 10**6)
    if how == "many lines":
        raise RuntimeError("\n\nfirst\nsecond")
    if how == "surrogate":
        raise RuntimeError("\ud800")
    if how == "exit":
        raise SystemExit(7)
    return toward_mean(counts, 0.7)


@pytest.mark.parametrize("prefer", ["processes", "threads", None])
def test_any_error_is_a_line_of_the_table(adata, tmp_path, prefer):
    jobs = {} if prefer is None else {"n_jobs": 2, "prefer": prefer}
    grid = {"how": ["unspeakable", "empty", "long", "many lines", "surrogate", "exit", "well"]}
    with pytest.warns(UserWarning, match="6 of 7 candidates failed"):
        table = n2s.calibrate(adata, raises_oddly, grid, **jobs).table
    assert table["chosen"].tolist() == [False] * 6 + [True]
    failures = table["failure"].tolist()
    assert failures[:2] == ["Unspeakable", "RuntimeError"]
    assert failures[2].startswith("RuntimeError: a ba b")
    assert len(failures[2]) < 400
    assert failures[3:] == ["RuntimeError: first", "RuntimeError:  ", "SystemExit: 7", ""]
    adata.write_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize("jobs", [{}, {"n_jobs": 2, "prefer": "threads"}, {"n_jobs": 2}])
@pytest.mark.parametrize("refit", [False, True])
def test_an_interrupt_stops_everything_and_writes_nothing(adata, jobs, refit):
    n2s.calibrate(adata, toward_mean, {"share": [0.7]}, refit=True)
    before = adata.copy()

    def interrupted(counts, share):
        if share == 0.5 and (not refit or counts.sum() == adata.X.sum()):
            raise KeyboardInterrupt
        return toward_mean(counts, share)

    with pytest.raises(KeyboardInterrupt):
        n2s.calibrate(adata, interrupted, {"share": [0.5, 1.0]}, refit=refit, **jobs)
    assert adata.uns["calibrate"]["best"] == {"share": 0.7}
    np.testing.assert_array_equal(adata.layers["calibrate"], before.layers["calibrate"])
    np.testing.assert_array_equal(adata.X.data, before.X.data)


def test_what_fails_on_all_of_the_data_is_said_with_the_choice(adata):
    def fails_on_much(counts, share):
        if counts.sum() == adata.X.sum():
            raise MemoryError("too much")
        return toward_mean(counts, share)

    with pytest.raises(ValueError, match="share=0.7 was chosen, and failed on all of the data: MemoryError: too much"):
        n2s.calibrate(adata, fails_on_much, {"share": [0.7]}, refit=True)
    assert not adata.uns


class Subclass(np.ndarray):
    pass


def read_only(values):
    values.flags.writeable = False
    return values


RESULTS = {
    "subclass": lambda x: x.view(Subclass),
    "nothing masked": np.ma.array,
    "read-only": read_only,
    "Fortran": np.asfortranarray,
    "longdouble": lambda x: x.astype(np.longdouble),
    "array of SciPy": sp.csr_array,
    "lil": sp.lil_matrix,
    "dok": sp.dok_array,
    "coo": sp.coo_matrix,
    "AnnData": ad.AnnData,
    "scaled": lambda x: x * np.geomspace(1e-6, 1e6, len(x))[:, None],
}


@pytest.mark.parametrize("kind", list(RESULTS))
def test_results_of_any_kind_are_the_same(counts, kind):
    expected = n2s.calibrate(counts, toward_mean, {"share": [0.5, 0.9]}, refit=True)
    found = n2s.calibrate(
        counts, lambda counts, share: RESULTS[kind](toward_mean(counts, share)), {"share": [0.5, 0.9]}, refit=True
    )
    np.testing.assert_allclose(found.table["loss"], expected.table["loss"], rtol=1e-5)
    np.testing.assert_allclose(found.denoised, expected.denoised, rtol=1e-5)
    assert type(found.denoised) is np.ndarray


def test_a_memory_map_and_half_precision_are_taken(counts, tmp_path):
    def mapped(counts, share):
        out = np.memmap(tmp_path / "values", np.float32, "w+", shape=counts.shape)
        out[:] = toward_mean(counts, share)
        return out

    expected = n2s.calibrate(counts, toward_mean, {"share": [0.8]}).table["loss"][0]
    assert n2s.calibrate(counts, mapped, {"share": [0.8]}).table["loss"][0] == pytest.approx(expected)
    half = n2s.calibrate(counts, lambda counts, share: toward_mean(counts, share).astype(np.float16), {"share": [0.8]})
    assert half.table["loss"][0] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda x: np.ma.masked_less(x, 0.1), "returned masked values: .*fill it first"),
        (lambda x: x.astype(complex), "returned values of type complex128"),
        (lambda x: x.astype(object), "returned values of type object"),
        (lambda x: sp.csr_matrix(x.astype(complex)), "returned values of type complex128"),
        (lambda x: x * 1e300, r"returned NaN or infinite values, or values beyond 1e\+30"),
        (lambda x: np.where(x > x.mean(), np.inf, x), "returned NaN or infinite values"),
    ],
)
def test_values_that_are_no_finite_numbers_are_refused(counts, values, message):
    with pytest.raises(ValueError, match=message):
        n2s.calibrate(counts, lambda counts: values(toward_mean(counts, 0.8).astype(np.float64)), {})
    with pytest.raises(ValueError, match=message.replace("complex128", "(complex128|object)")):
        n2s.calibrate(np.ones((6, 6)), lambda z: values(np.arange(36.0).reshape(6, 6)), {}, partition=checkerboard(6))


def checkerboard(n):
    return n2s.partitions.Masks([np.add.outer(np.arange(n), np.arange(n)) % 2 == i for i in (0, 1)], np.zeros_like)


def test_a_square_matrix_that_is_transposed_is_noticed(counts):
    with pytest.warns(UserWarning, match="worse than one mean profile: check that cells and genes are returned in the"):
        n2s.calibrate(counts[:150], lambda counts: toward_mean(counts, 0.8).T.copy(), {})


def test_a_cell_of_which_nothing_is_predicted_gets_the_mean_profile(counts):
    def forgets(counts):
        out = toward_mean(counts, 0.8)
        out[:5] = 0
        return out

    layer = n2s.calibrate(counts, forgets, {}, refit=True).denoised
    share = counts.sum(axis=0).A1 / counts.sum()
    np.testing.assert_allclose(layer[:5], np.outer(counts[:5].sum(axis=1).A1, share), rtol=1e-5)


def test_an_estimator_is_fitted_anew_whatever_it_holds(counts):
    class Drifting:
        """Each fit smooths more than the one before it."""

        def __init__(self):
            self.shares = [0.5]

        def fit(self, counts):
            self.shares.append(self.shares[-1] + 0.1)
            return self

        def predict(self, counts):
            return toward_mean(counts, self.shares[-1])

    drifting = Drifting()
    found = n2s.calibrate(counts, drifting, {}, n_splits=2)
    assert drifting.shares == [0.5]
    expected = n2s.calibrate(counts, toward_mean, {"share": [0.6]}, n_splits=2)
    np.testing.assert_array_equal(found.split_losses, expected.split_losses)


def test_parameters_are_set_as_scikit_learn_sets_them(counts):
    """Those of the steps of a pipeline have names of their own, which no attribute of it has."""

    class Steps:
        def __init__(self):
            self.step = {"share": 0.5}

        def get_params(self):
            return {f"step__{name}": value for name, value in self.step.items()}

        def set_params(self, **given):
            self.step = {name.removeprefix("step__"): value for name, value in given.items()}

        def fit(self, counts):
            return self

        def predict(self, counts):
            return toward_mean(counts, self.step["share"])

    found = n2s.calibrate(counts, Steps(), {"step__share": [0.2, 0.6]})
    expected = n2s.calibrate(counts, toward_mean, {"share": [0.2, 0.6]})
    np.testing.assert_array_equal(found.split_losses, expected.split_losses)
    with pytest.raises(ValueError, match="has no parameter share: it takes step__share"):
        n2s.calibrate(counts, Steps(), {"share": [0.2]})


def test_a_fit_that_returns_nothing_is_refused(counts):
    class Forgetful:
        def fit(self, counts):
            pass

        def predict(self, counts):
            return counts

    with pytest.raises(ValueError, match="fit of .*Forgetful returned NoneType: return self"):
        n2s.calibrate(counts, Forgetful(), {})


class Own:
    """A partition of somebody else's."""

    def __init__(self, folds):
        self._folds = folds

    def folds(self, data, rng):
        return self._folds(data, rng)


class NoScore:
    seen = None


def doubles(data, rng):
    folds = n2s.partitions.Molecules().folds(data, rng)
    data.data *= 2
    return folds


@pytest.mark.parametrize(
    ("folds", "error", "message"),
    [
        (lambda data, rng: [], ValueError, "the partition hides nothing: folds of Own returned no fold"),
        (lambda data, rng: None, TypeError, "folds of Own returned NoneType: return a list of"),
        (lambda data, rng: [data], TypeError, "folds of Own holds a csr_matrix without seen, score, is_blind: return"),
        (
            lambda data, rng: [NoScore()],
            TypeError,
            "folds of Own holds a NoScore without score, is_blind: return a list",
        ),
        (
            lambda data, rng: [n2s.partitions.Fold(data, data, np.ones(3), np.ones(150))],
            ValueError,
            r"size of a Fold has shape \(3,\): seen has \(400, 150\), so it needs \(400,\)",
        ),
    ],
)
def test_folds_that_are_none_are_refused(counts, folds, error, message):
    with pytest.raises(error, match=message):
        n2s.calibrate(counts, toward_mean, {"share": [0.5]}, partition=Own(folds))


def test_what_has_folds_that_cannot_be_called_is_no_partition(counts):
    partition = Own(None)
    partition.folds = []
    with pytest.raises(TypeError, match="partition is .*Own object.*: pass 'molecules', 'genes', 'blocks'"):
        n2s.calibrate(counts, toward_mean, {"share": [0.5]}, partition=partition)


def test_the_input_is_bit_identical_afterwards(adata):
    before = adata.copy()

    def rude(expected, observed):
        loss = np.square(expected - observed).sum(axis=1)
        expected[:] = observed[:] = -1
        return loss

    n2s.calibrate(adata, toward_mean, {"share": [0.5, 0.9]}, partition=Own(doubles), loss=rude, refit=True)
    matrix = adata.X.copy()
    n2s.calibrate(matrix, toward_mean, {"share": [0.5, 0.9]}, partition=Own(doubles))
    for after in (adata.X, matrix):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(after, part), getattr(before.X, part))

    def erase(image):
        image[:] = 0
        return image

    image = np.random.default_rng(0).normal(size=(6, 6))
    original = image.copy()
    masks = n2s.partitions.Masks(checkerboard(6).masks, erase)
    n2s.calibrate(image, lambda z: z / 2, {}, partition=masks)
    np.testing.assert_array_equal(image, original)


def test_an_array_may_have_any_number_of_dimensions():
    for shape in ((40,), (5, 4, 3)):
        data = np.random.default_rng(0).normal(size=shape)
        masks = [np.arange(data.size).reshape(shape) % 2 == i for i in (0, 1)]
        partition = n2s.partitions.Masks(masks, np.zeros_like)
        found = n2s.calibrate(data, lambda z, k: z / k, {"k": [1, 2]}, partition=partition, refit=True)
        np.testing.assert_array_equal(found.denoised, data / found.best["k"])


def test_an_image_with_nan_is_refused():
    with pytest.raises(ValueError, match="the data hold NaN or infinite values"):
        n2s.calibrate(np.full((6, 6), np.nan), lambda z: z + 1, {}, partition=checkerboard(6))
    with pytest.raises(ValueError, match="the data hold masked values"):
        n2s.calibrate(np.ma.masked_equal(np.eye(6), 1), lambda z: z + 1, {}, partition=checkerboard(6))


PARTITIONS = {
    "molecules": "molecules",
    "fifths": n2s.partitions.Molecules(5),
    "genes": n2s.partitions.Genes(2, 2),
    "blocks": n2s.partitions.Blocks(2, 2),
}


@pytest.mark.parametrize("rule", ["least", "one_standard_error"])
@pytest.mark.parametrize("partition", list(PARTITIONS))
def test_tiny_data_have_finite_tables_or_are_refused(partition, rule):
    refusals = (
        "holds no molecule|nothing that was hidden can be scored|a fold hides every molecule|"
        "cannot be dealt to 2 groups|the loss is that of one cell or value|there is 1 (cell|gene)"
    )
    done = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = sp.csr_matrix(rng.poisson(rng.choice([0.1, 0.3, 1, 10]), rng.integers(1, 6, 2)).astype(np.float32))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of no gain, but not of a division
                found = n2s.calibrate(
                    x, toward_mean, {"share": [0.5, 0.9]}, partition=PARTITIONS[partition], rule=rule, refit=True
                )
        except ValueError as error:
            assert re.search(refusals, str(error)), seed  # noqa: PT017
            continue
        done += 1
        assert np.isfinite(found.table[["loss", "gain"]]).all(axis=None)
        assert (found.table["error"] >= 0).all()  # infinite where one cell tells
        assert np.isfinite(found.split_losses).all()
        np.testing.assert_allclose(found.denoised.sum(axis=1), x.sum(axis=1).A1, rtol=1e-5)
    assert done > 10


@pytest.mark.parametrize("values", [["auto", None, 0.3], [None, 0.3], [1, 2.5], [True, "yes"], [(1, 2), [3]]])
def test_values_of_any_kinds_stay_what_they_are_and_go_to_files(adata, values, tmp_path):
    def shrunken(counts, k):
        return 0.5 * counts.toarray() + counts.mean(axis=0).A1 * (0.5 + 0.1 * values.index(k))

    found = n2s.calibrate(adata, shrunken, {"k": values})
    assert all(kept is given or kept == given for kept, given in zip(found.table["k"], values, strict=True))
    adata.write_h5ad(tmp_path / "a.h5ad")
    table = ad.read_h5ad(tmp_path / "a.h5ad").uns["calibrate"]["table"]
    assert [str(kept) for kept in table["k"]] == [str(kept) for kept in found.table["k"]]


def losses(*means, n_cells=50, noise=0.0, seed=0):
    """Scores of these means: cells share what they lose, and differ between scores by the noise."""
    rng = np.random.default_rng(seed)
    shared = rng.gamma(2, size=n_cells)
    out = []
    for mean in means:
        sums = shared + noise * rng.normal(size=n_cells)
        out.append(Score(sums - sums.mean() + mean, np.ones(n_cells)))
    return out


def compared(scores, name="k"):
    out = Comparison()
    for i, score in enumerate(scores):
        out.add({name: i}, score)
    return out


def test_the_least_loss_is_chosen_and_the_first_of_a_tie():
    assert compared(losses(3.0, 1.0, 2.0)).best() == 1
    assert compared([losses(2.0)[0], *[losses(1.0)[0]] * 2]).best() == 1
    assert compared([-Gain(np.array([1.0, 2.0]), np.ones(2)), -Gain(np.array([3.0, 2.0]), np.ones(2))]).best() == 1


def test_one_standard_error_takes_the_first_row_within_it():
    scores = losses(1.2, 1.04, 1.0, 1.01, noise=0.2)
    errors = [score.error_of_difference(scores[2]) for score in scores]
    assert errors[0] < 0.2
    first = next(i for i, score in enumerate(scores) if score.mean <= scores[2].mean + errors[i])
    assert compared(scores).best("one_standard_error") == first > 0
    exact = compared(losses(1.2, 1.04, 1.0, 1.01))  # pairs of cells differ by as much in all: no error
    assert exact.best("one_standard_error") == 2


def test_rows_that_failed_or_were_not_measured_everywhere_are_never_chosen():
    out = Comparison()
    out.add({"k": 1}, None, failure="RuntimeError: no")
    with pytest.raises(ValueError, match="every candidate failed; the first, k=1: RuntimeError: no"):
        out.best()
    first, second, third = losses(5.0, 4.0, 1.0)
    assert [out.add({"k": k}, score) for k, score in ((2, first), (3, second), (4, third))] == [1, 2, 3]
    for k, score in ((2, first), (3, second)):
        out.add({"k": k}, score, fold=1)
    out.add({"k": 1}, losses(0.0)[0], fold=1)
    assert [score is None for score in out.scores()] == [True, False, False, True]
    assert out.best() == 2
    table = out.table(gain=True)
    assert list(table.columns) == ["k", *COLUMNS]
    assert list(table["failure"]) == ["RuntimeError: no", "", "", ""]
    assert list(table["chosen"]) == [False, False, True, False]
    np.testing.assert_array_equal(np.isnan(table["loss"]), [True, False, False, True])
    np.testing.assert_array_equal(table["gain"], -table["loss"])


def test_a_table_does_not_depend_on_the_order_of_measuring():
    measured = [
        ({"k": k, "loss": name}, score, {"split": split, "fold": fold, "seconds": 1.0})
        for split in range(2)
        for fold in range(3)
        for (k, name), score in zip(
            ((1, "a"), (2, None), (3, "a")), losses(0.1, 0.3, 0.2, noise=1 / 3, seed=3 * split + fold), strict=True
        )
    ]
    candidates = [parameters for parameters, _, _ in measured[:3]]
    tables, splits = [], []
    for order in (range(18), reversed(range(18)), np.random.default_rng(0).permutation(18)):
        out = Comparison(candidates)
        for i in order:
            parameters, score, where = measured[i]
            assert out.add(dict(parameters), score, **where) == candidates.index(parameters)
        tables.append(out.table("one_standard_error"))
        splits.append(out.split_losses())
    for table, of_splits in zip(tables[1:], splits[1:], strict=True):
        pd.testing.assert_frame_equal(table, tables[0], check_exact=True)
        np.testing.assert_array_equal(of_splits, splits[0])
    assert list(tables[0].columns) == ["k", "param_loss", "loss", "error", "seconds", "failure", "chosen"]
    assert list(tables[0]["seconds"]) == [6.0] * 3
    np.testing.assert_allclose(tables[0]["loss"], splits[0].mean(axis=1))
    assert tables[0]["param_loss"][1] is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrinkage(Method):
    """Mix each cell with the mean profile, and with noise of its own."""

    name = "shrinkage"
    title = "a mean with the mean profile"
    has_factors = False
    share: float = 0.5
    noise: float = 0.0

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}: pass a number from 0 to 1.")

    def denoise_counts(self, counts, rng):
        x = counts.in_memory()
        assert len(counts.cell_names) == x.shape[0]
        out = toward_mean(x, self.share)
        return TableProfiles.of(
            out * np.exp(self.noise * rng.normal(size=out.shape)), counts.size, counts.totals / counts.totals.sum()
        ).scaled(0)


def test_a_method_object_is_calibrated_by_its_fields(adata):
    grid = {"share": [0.2, 0.6, 1.0]}
    by_function = n2s.calibrate(adata, toward_mean, grid)
    found = n2s.calibrate(adata, Shrinkage(), grid, refit=True, key_added="method")
    np.testing.assert_allclose(found.table["loss"], by_function.table["loss"], rtol=1e-5, atol=1e-9)
    assert found.best == by_function.best
    np.testing.assert_allclose(found.denoised, toward_mean(adata.X, **found.best), rtol=1e-4, atol=1e-5)
    assert adata.uns["method"]["denoiser"] == "shrinkage"
    two = {"share": [0.2, 0.6]}
    noisy = [
        n2s.calibrate(adata.X, Shrinkage(noise=0.1), two, n_jobs=jobs, prefer="threads").table["loss"]
        for jobs in (1, 2)
    ]
    np.testing.assert_array_equal(*noisy)
    assert (noisy[0] > found.table["loss"][:2]).all()


def test_a_function_object_is_calibrated_as_the_function_is(adata):
    def mixed(counts, share, power):
        return toward_mean(counts, share) ** power

    grid = {"share": [0.2, 0.6]}
    expected = n2s.calibrate(adata, lambda counts, share: mixed(counts, share, 1.1), grid, transform="log1p")
    function = Function(mixed, transform="log1p", parameters={"power": 1.1, "share": 0.9})
    found = n2s.calibrate(adata, function, grid)
    np.testing.assert_array_equal(found.table["loss"], expected.table["loss"])
    assert adata.uns["calibrate"]["params"]["transform"] == "log1p"
    assert adata.uns["calibrate"]["denoiser"].endswith("mixed")
    refitted = n2s.calibrate(adata, function, {}, refit=True).denoised
    np.testing.assert_allclose(refitted.sum(axis=1), adata.X.sum(axis=1).A1, rtol=1e-5)
    profiles = function.denoise_counts(Counts.of(adata.X), np.random.default_rng(0))
    np.testing.assert_allclose(profiles.counts().sum(axis=0), adata.X.sum(axis=0).A1, rtol=0.02)
    np.testing.assert_array_equal(profiles.counts(slice(3, 9), np.arange(5)), profiles.counts()[3:9, :5])
    assert function == dataclasses.replace(function)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda adata: Function(toward_mean, transform="log"), ValueError, "transform is 'log': pass one of log1p, sq"),
        (lambda adata: Function(Shrinkage), TypeError, "denoiser is the class Shrinkage: pass an object"),
        (lambda adata: Function(toward_mean, parameters=3), TypeError, "parameters is 3: pass a dictionary"),
        (
            lambda adata: n2s.denoise(adata, Function(toward_mean, parameters={"shre": 1})),
            ValueError,
            "toward_mean cannot be called with the parameters shre=1: .*; it takes share",
        ),
        (
            lambda adata: n2s.calibrate(adata, Function(toward_mean), {"share": [0.5]}, transform="log1p"),
            ValueError,
            "transform='log1p' was given with the method Function: set it on the method object",
        ),
        (
            lambda adata: n2s.calibrate(adata, Shrinkage(), {"shre": [0.5]}),
            ValueError,
            "Shrinkage has no field shre: its fields are share, noise",
        ),
        (lambda adata: n2s.calibrate(adata, Shrinkage(), {"share": [0.5, 2]}), ValueError, "share is 2: pass a number"),
        (lambda adata: n2s.calibrate(adata, Shrinkage, {}), TypeError, r"class Shrinkage: pass an object, e.g. Shr"),
        (lambda adata: n2s.calibrate(adata, "smooth", {}), ValueError, "'smooth'"),
        (
            lambda adata: n2s.calibrate(np.eye(6), Shrinkage(), {}, partition=checkerboard(6)),
            ValueError,
            "Masks hides entries of an array: pass one, and a function of it",
        ),
    ],
)
def test_methods_that_cannot_be_calibrated_are_refused(adata, make, error, message):
    with pytest.raises(error, match=message):
        make(adata)
    assert not adata.uns


def test_a_notebook_shows_what_was_chosen_and_the_table():
    best, table = {"what": "<b>"}, pd.DataFrame({"what": ["<b>", "c"], "loss": [0.5, 0.75], "chosen": [True, False]})
    shown = Calibration(best, table, np.array([[0.5], [0.75]]))._repr_html_()
    assert shown.startswith("<p>Best: <b>what=&#x27;&lt;b&gt;&#x27;</b></p>")
    assert shown.count("<b>") == 1
    assert shown.count("<tr") == 3
    assert "0.75" in shown


def test_a_method_is_told_its_batches(counts):
    pytest.importorskip("torch")
    method = n2s.Autoencoder(width=4, n_hidden=16, n_components=5, n_epochs=2, device="cpu", batch_key="batch")
    adata = ad.AnnData(counts.copy())
    adata.obs["batch"] = pd.Categorical(np.where(np.arange(adata.n_obs) % 2, "a", "b"))
    found = n2s.calibrate(adata, method, {"width": [2, 4]})
    assert (found.table["failure"] == "").all()
    with pytest.raises(ValueError, match="batch_key is 'batch', a column of obs: pass an AnnData object"):
        n2s.calibrate(counts, method, {"width": [2, 4]})
