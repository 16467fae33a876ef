"""The autoencoder on AnnData, the files that models are saved to, and cells that a model was not fitted to."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
from helpers import dense, divergence, low_rank_profiles, poisson_counts
from model_files import claims, read_parts, write_parts

import sc_noise2self as n2s
from sc_noise2self import _model
from sc_noise2self._model import Saved, State
from sc_noise2self._read import profiles

torch = pytest.importorskip("torch")

METHOD = n2s.Autoencoder(width=16, n_components=10, n_hidden=32, n_epochs=40, device="cpu")
TINY = n2s.Autoencoder(width=16, n_components=10, n_epochs=8, device="cpu")
PCAS = [n2s.PCA(transform=name) for name in ("log1p", "sqrt", "none")]


def cells(n, seed, batch_effect=0.0):
    truth = low_rank_profiles(400, 120, 5, seed=0)[seed * 100 :][:n]
    batch = np.arange(n) % 2
    truth = truth * np.exp(batch_effect * np.random.default_rng(9).normal(size=120) * batch[:, None])
    out = ad.AnnData(poisson_counts(truth / truth.sum(axis=1, keepdims=True), depth=600, seed=seed))
    out.var_names = [f"gene-{i}" for i in range(120)]
    out.obs_names = [f"cell-{seed}-{i}" for i in range(n)]
    out.obs["batch"] = np.array(["a", "b"])[batch]
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.npz"
    n2s.denoise(cells(300, 0), METHOD, save_model=path)
    return path


@pytest.fixture(scope="module")
def batch_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.npz"
    n2s.denoise(cells(300, 0, batch_effect=1), replace(METHOD, batch_key="batch"), save_model=path)
    return path


def test_writes_what_every_method_writes(tmp_path):
    adata = cells(300, 0)
    before = adata.X.copy()
    n2s.denoise(adata, METHOD)
    assert (before != adata.X).nnz == 0
    layer = adata.layers["denoised"]
    assert layer.dtype == np.float32
    assert layer.flags.c_contiguous
    assert (layer >= 0).all()
    assert np.allclose(layer.sum(axis=1), dense(adata.X).sum(axis=1), rtol=1e-4)
    assert np.allclose(layer.sum(axis=0), dense(adata.X).sum(axis=0), rtol=0.05)
    record = adata.uns["denoised"]
    assert record["gain"] > 5 * record["gain_error"]
    assert set(record["members"]["setting"]) == {"width 16"}
    learned = record["learned"]["autoencoder"]
    assert list(learned["table"]["width"]) == [16]
    assert len(learned["epoch_losses"]) == 40
    assert learned["checked_gains"][-1] > learned["checked_gains"][0]
    rebuilt = n2s.get.denoised(adata, list(adata.var_names)).to_numpy()
    assert np.allclose(rebuilt, layer, rtol=1e-4, atol=1e-6)
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    assert np.allclose(n2s.get.denoised(again, ["gene-3"]), layer[:, [3]], rtol=1e-4, atol=1e-6)


def test_one_molecule_is_refused(model):
    adata = cells(5, 0)
    adata.X.data[:] = 0
    adata.X.data[0] = 1
    with (
        pytest.warns(UserWarning, match="hold no molecule"),
        pytest.raises(ValueError, match=r"1 molecule\(s\) in 5 cells: too few to split into halves"),
    ):
        n2s.denoise_with(adata, model, device="cpu")
    assert not adata.uns


def test_same_seed_same_bytes():
    first, second, other = (cells(120, 0) for _ in range(3))
    for adata, seed in ((first, 0), (second, 0), (other, 1)):
        n2s.denoise(adata, METHOD, random_state=seed)
    assert first.layers["denoised"].tobytes() == second.layers["denoised"].tobytes()
    assert first.layers["denoised"].tobytes() != other.layers["denoised"].tobytes()


def test_the_width_is_chosen_and_recorded():
    adata = cells(300, 0)
    n2s.denoise(adata, replace(METHOD, width=[16, 1]))
    learned = adata.uns["denoised"]["learned"]["autoencoder"]
    table = learned["table"]
    assert list(table["width"]) == [16, 1]
    assert table["gain"][0] > table["gain"][1] + table["error"][1]
    assert set(adata.uns["denoised"]["members"]["rank"]) == {16}
    ax = n2s.pl.loss(adata, key="denoised", show=False)
    assert ax.get_xlabel() == "width"
    assert list(ax.lines[0].get_xdata()) == [1, 16]


def test_of_very_many_cells_some_choose_and_all_are_fitted(monkeypatch):
    """The limit is lowered, so that a few hundred cells are very many."""
    from sc_noise2self.methods import _autoencoder

    monkeypatch.setattr(_autoencoder, "_LEARNED_CELLS", 150)
    adata = cells(300, 0, batch_effect=1)
    n2s.denoise(adata, replace(METHOD, width=[16, 1], batch_key="batch"))
    record = adata.uns["denoised"]
    assert list(record["learned"]["autoencoder"]["table"]["width"]) == [16, 1]
    assert len(record["learned"]["autoencoder"]["epoch_losses"]) == 40
    assert record["gain_cells"] == record["n_cells"] == 300  # and all are measured
    assert adata.layers["denoised"].shape == adata.shape
    assert np.allclose(adata.layers["denoised"].sum(axis=1), dense(adata.X).sum(axis=1), rtol=1e-4)


def test_several_seeds_are_averaged():
    adata = cells(300, 0)
    n2s.denoise(adata, replace(METHOD, n_seeds=2))
    record = adata.uns["denoised"]
    assert list(record["members"]["name"]) == ["autoencoder", *(f"autoencoder {i}" for i in range(2, 7))]
    assert record["members"]["weight"].sum() == pytest.approx(1)
    assert record["gain"] > record["candidates"]["gain"].max()


def test_networks_of_halves_join_that_of_all_and_are_together_nearer_to_the_truth_than_on_average():
    truth = low_rank_profiles(300, 120, 5, seed=0)
    adata = ad.AnnData(poisson_counts(truth, depth=600, seed=1))
    n2s.denoise(adata, METHOD)
    record = adata.uns["denoised"]
    assert list(record["members"]["name"]) == ["autoencoder", "autoencoder 2", "autoencoder 3"]
    np.testing.assert_allclose(record["members"]["weight"], [0.5, 0.25, 0.25])  # by the molecules they learned from
    assert "An autoencoder (width 16), the mean of 3 fits of the counts" in str(n2s.report(adata))
    each = [divergence(truth, member.counts()) for member in profiles(adata).members]
    assert divergence(truth, adata.layers["denoised"]) < np.average(each, weights=record["members"]["weight"])


def test_it_joins_the_ensemble_and_mixing():
    adata = cells(300, 0)
    n2s.denoise(adata, ["pca", METHOD, "diffusion"], mix=True)
    record = adata.uns["denoised"]
    weights = dict(zip(record["members"]["name"], record["members"]["weight"], strict=True))
    assert weights["autoencoder"] == pytest.approx(2 * weights["autoencoder 2"])
    assert weights["autoencoder"] == pytest.approx(2 * weights["autoencoder 3"])
    assert sum(weights.values()) == pytest.approx(1)
    assert record["unmixed_gain"] >= record["candidates"]["gain"].max() - 1e-4
    rebuilt = n2s.get.denoised(adata, list(adata.var_names)).to_numpy()
    assert np.allclose(rebuilt, adata.layers["denoised"], rtol=1e-4, atol=1e-6)


def test_counts_without_structure_get_the_mean_profile_and_no_model(tmp_path):
    profile = np.random.default_rng(0).dirichlet(np.full(120, 0.5))
    adata = ad.AnnData(poisson_counts(np.tile(profile, (300, 1)), depth=600, seed=0))
    with pytest.warns(UserWarning, match=r"the mean profile is written.*No model is saved"):
        n2s.denoise(adata, METHOD, save_model=tmp_path / "model.npz")
    assert list(adata.uns["denoised"]["members"]["name"]) == ["mean"]
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_everything_as_it_was(tmp_path, monkeypatch):
    from sc_noise2self.methods import _training as training

    adata, calls = cells(120, 0), []
    compare = training.torch.optim.Adam.step

    def interrupt(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return compare(self, *args, **kwargs)

    monkeypatch.setattr(training.torch.optim.Adam, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        n2s.denoise(adata, METHOD, save_model=tmp_path / "model.npz")
    assert not adata.uns
    assert not adata.obsm
    assert "denoised" not in adata.layers
    assert not list(tmp_path.iterdir())


def test_an_existing_model_is_not_overwritten(model):
    before = model.read_bytes()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        n2s.denoise(cells(120, 0), METHOD, save_model=model)
    assert model.read_bytes() == before


def test_new_cells_are_denoised_and_told_what_it_gained(model):
    adata = cells(100, 3)
    before = adata.X.copy()
    n2s.denoise_with(adata, model, device="cpu")
    assert (before != adata.X).nnz == 0
    record = adata.uns["denoised"]
    assert record["gain"] > 4 * record["gain_error"]
    assert np.allclose(adata.layers["denoised"].sum(axis=1), dense(adata.X).sum(axis=1), rtol=1e-4)
    rebuilt = n2s.get.denoised(adata, ["gene-7", "gene-0"]).to_numpy()
    assert np.allclose(rebuilt, adata.layers["denoised"][:, [7, 0]], rtol=1e-4, atol=1e-6)


def test_genes_are_matched_by_name(model):
    adata = cells(100, 3)
    order = np.random.default_rng(0).permutation(120)
    shuffled = adata[:, order].copy()
    n2s.denoise_with(adata, model, device="cpu")
    result = n2s.denoise_with(shuffled, model, device="cpu", copy=True)
    assert not shuffled.uns
    assert np.allclose(result.layers["denoised"], adata.layers["denoised"][:, order], rtol=1e-4, atol=1e-6)
    n2s.denoise_with(shuffled, model, device="cpu", write_layer=False, scale="rates")
    assert "denoised" not in shuffled.layers


def test_missing_and_extra_genes_are_named(model):
    adata = cells(100, 3)
    adata.var_names = ["other", *adata.var_names[1:]]
    message = r"1 of them are missing here \(gene-0\), and 1 here are not in it \(other\)"
    with pytest.raises(ValueError, match=message):
        n2s.denoise_with(adata, model)
    assert not adata.uns


def test_cells_unlike_those_fitted_are_warned_of(model):
    other = ad.AnnData(poisson_counts(low_rank_profiles(100, 120, 3, seed=77), depth=600, seed=0))
    other.var_names = [f"gene-{i}" for i in range(120)]
    with pytest.warns(UserWarning, match="no better than their own mean profile"):
        n2s.denoise_with(other, model, device="cpu")


def test_batches_are_matched_by_name(batch_model):
    adata = cells(100, 3, batch_effect=1)
    n2s.denoise_with(adata, batch_model, batch_key="batch", device="cpu")
    right = adata.uns["denoised"]["gain"]
    adata.obs["batch"] = np.where(adata.obs["batch"] == "a", "b", "a")
    n2s.denoise_with(adata, batch_model, batch_key="batch", device="cpu")
    assert adata.uns["denoised"]["gain"] < right
    adata.obs["batch"] = "b"  # one of the batches alone
    n2s.denoise_with(adata, batch_model, batch_key="batch", device="cpu")


def test_batches_that_do_not_fit_are_refused(model, batch_model):
    adata = cells(100, 3)
    with pytest.raises(ValueError, match=r"fitted with batches \(a, b\): pass batch_key"):
        n2s.denoise_with(adata, batch_model)
    with pytest.raises(ValueError, match="fitted without batches: leave it out"):
        n2s.denoise_with(adata, model, batch_key="batch")
    adata.obs["batch"] = ["c"] * 50 + ["a"] * 50
    with pytest.raises(ValueError, match=r"batches unknown to the model: c\. It knows a, b"):
        n2s.denoise_with(adata, batch_model, batch_key="batch")
    adata.obs["batch"] = "a"
    with pytest.raises(ValueError, match="has one batch: leave batch_key out"):
        n2s.denoise(adata, replace(METHOD, batch_key="batch"))


def test_without_torch_it_says_how_to_get_it(monkeypatch, model):
    from sc_noise2self.methods import _autoencoder as autoencoder

    monkeypatch.setattr(autoencoder, "find_spec", lambda name: None)
    for call in (lambda a: n2s.denoise(a, method="ensemble"), lambda a: n2s.denoise_with(a, model)):
        with pytest.raises(ImportError, match=r"pip install .sc-noise2self\[autoencoder\]"):
            call(cells(100, 0))


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
import anndata as ad, sc_noise2self as n2s

adata = ad.read_h5ad(sys.argv[1])
n2s.denoise_with(adata, sys.argv[2])
adata.write_h5ad(sys.argv[1])
"""


def test_models_without_a_network_need_no_torch(tmp_path):
    n2s.denoise(cells(300, 0), ["pca"], save_model=tmp_path / "m.npz")
    new = cells(100, 3)
    new.write_h5ad(tmp_path / "new.h5ad")
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, tmp_path / "new.h5ad", tmp_path / "m.npz"], check=True)
    n2s.denoise_with(new, tmp_path / "m.npz")
    np.testing.assert_array_equal(ad.read_h5ad(tmp_path / "new.h5ad").layers["denoised"], new.layers["denoised"])


TRANSFERRED = {
    **{f"pca {method.transform}": method for method in PCAS},
    "components and genes used": n2s.PCA(transform="log1p", n_components=7),
    "an ensemble": [n2s.PCA(), n2s.Autoencoder(width=4, n_epochs=3, device="cpu")],
    "two of one name": [n2s.PCA(transform="log1p", n_components=5), n2s.PCA(transform="log1p", n_components=20)],
    "batches": replace(TINY, batch_key="batch"),
    "a squared error": replace(TINY, loss="mse_sqrt"),
}


@pytest.mark.parametrize("method", TRANSFERRED.values(), ids=TRANSFERRED)
def test_every_model_gives_its_own_cells_their_result_and_others_one_by_one(tmp_path, method):
    """A model keeps the scales of genes that its result has, so its own cells get the same numbers.

    Cells do not learn from each other: a few of them, the genes in another order, get what they get among all. Sums
    over genes are then taken in another order, and matrix products of other sizes, which moves the last digits.
    """
    path, old, again = tmp_path / "m.npz", cells(300, 0, batch_effect=1), cells(300, 0, batch_effect=1)
    given = {"batch_key": "batch"} if getattr(method, "batch_key", None) else {}
    mask = np.arange(120) < 100 if method == TRANSFERRED["components and genes used"] else None
    n2s.denoise(old, method, mask_var=mask, save_model=path)
    with pytest.warns(UserWarning, match="the model was fitted to these very cells.*the gain is too high"):
        n2s.denoise_with(again, path, **given)
    np.testing.assert_allclose(again.layers["denoised"], old.layers["denoised"], rtol=1e-5, atol=1e-7)
    members, record = old.uns["denoised"]["members"], again.uns["denoised"]
    for name in ("name", "weight", "link", "n_factors"):
        np.testing.assert_array_equal(record["members"][name], members[name])
    assert set(record["learned"]) == set(members["name"])
    new = cells(100, 3, batch_effect=1)
    few = new[::-7, np.random.default_rng(0).permutation(120)].copy()
    for adata in (new, few):
        n2s.denoise_with(adata, path, **given)
    assert new.uns["denoised"]["gain"] > 4 * new.uns["denoised"]["gain_error"]
    one = few.to_df("denoised")
    np.testing.assert_allclose(one, new.to_df("denoised").loc[one.index, one.columns], rtol=1e-3, atol=1e-5)


def test_an_ensemble_with_the_mean_profile_is_transferred(tmp_path):
    """Its weight is set, because on cells this different the mean profile is left out of the mean."""
    share = np.random.default_rng(0).dirichlet(np.ones(120))
    names = np.array([f"gene-{i}" for i in range(120)])
    n2s.denoise(cells(300, 0), PCAS[0], save_model=tmp_path / "pca.npz")
    (state,) = _model.load(tmp_path / "pca.npz").states
    mean = State("mean", {}, {"gene_share": share})
    _model.save(tmp_path / "both.npz", Saved((state, mean), (0.75, 0.25), names))
    both, pca = cells(100, 3), cells(100, 3)
    n2s.denoise_with(both, tmp_path / "both.npz")
    n2s.denoise_with(pca, tmp_path / "pca.npz")
    assert list(both.uns["denoised"]["members"]["name"]) == ["pca log1p", "mean"]
    expected = 0.75 * pca.layers["denoised"] + 0.25 * dense(both.X).sum(axis=1, keepdims=True) * share
    np.testing.assert_allclose(both.layers["denoised"], expected, rtol=1e-4)
    assert "A model fitted to other cells" in n2s.report(both)


def test_counts_on_disk_and_of_dask_are_read_in_blocks(model, tmp_path, monkeypatch):
    da = pytest.importorskip("dask.array")
    expected = cells(100, 3)
    expected.write_h5ad(tmp_path / "new.h5ad")
    n2s.denoise_with(expected, model, device="cpu")
    monkeypatch.setattr("sc_noise2self._blocks.block_rows", lambda n_genes: 20)
    backed, lazy = ad.read_h5ad(tmp_path / "new.h5ad", backed="r"), cells(100, 3)
    lazy.X = da.from_array(lazy.X.toarray(), chunks=(40, 120))
    for adata in (backed, lazy):
        n2s.denoise_with(adata, model, device="cpu")
        assert hasattr(adata.layers["denoised"], "__dask_graph__")
        np.testing.assert_allclose(
            adata.layers["denoised"].compute(), expected.layers["denoised"], rtol=1e-4, atol=1e-6
        )
        assert adata.uns["denoised"]["gain"] == pytest.approx(expected.uns["denoised"]["gain"], rel=1e-4)
    with pytest.raises(ValueError, match="copy=True was given with a backed object"):
        n2s.denoise_with(backed, model, copy=True, device="cpu")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.npz"
    n2s.denoise(cells(300, 0), TINY, save_model=path)
    return path


def put(name, value):
    """Return the edit of a saved model that puts another value in place of one."""

    def edit(text, arrays):
        text["states"][0]["values"][name] = value

    return edit


def array(name, value):
    """Return the edit that puts an array, or what a function makes of the old one, in place of one."""

    def edit(text, arrays):
        name_of_state = f"0/{name}"
        arrays[name_of_state] = value(arrays[name_of_state]) if callable(value) else value

    return edit


def fill(value):
    return lambda values: np.full_like(values, value)


def lack(name):
    def edit(text, arrays):
        del arrays[f"0/{name}"]

    return edit


def units(n, stored):
    """Return the edit that says that the network has so many hidden units."""

    def edit(text, arrays):
        for name, value in arrays.items():
            shape = tuple(n if length == 64 else length for length in value.shape)
            if shape != value.shape:
                arrays[name] = np.zeros(shape, np.float32) if stored else claims(shape)

    return edit


HOSTILE = {
    "an unknown loss": (put("loss", "mse"), "its loss is 'mse'"),
    "a loss of a wrong type": (put("loss", ["multinomial"]), "its loss is of type list"),
    "a method among values": (put("predict", 3), "its autoencoder has in excess 'predict'"),
    "a method among arrays": (array("save", np.zeros(120)), "the file has in excess '0/save'"),
    "a width that is huge": (put("width", 10**30), "its width is 10000"),
    "a width that is another": (put("width", 17), r"code.weight has shape \(16, 64\) instead of \(17, 64\)"),
    "a width that is no number": (put("width", "16"), "its width is '16'"),
    "a width that is true": (put("width", True), "its width is True"),
    "batches without names": (put("n_batches", 10**9), "it names 0 batches and has 1000000000"),
    "a huge number": (put("depth", 10**400), "its depth is 1000"),
    "a depth": (put("depth", 0.0), "its depth is 0.0"),
    "no weights": (lack("encoder.weight"), "the file lacks '0/encoder.weight'"),
    "weights that are text": (array("encoder.weight", np.array(["a"])), "its encoder.weight is of type <U1"),
    "weights that are whole": (array("code.bias", np.zeros(16, np.int64)), "its code.bias is of type int64"),
    "weights of double precision": (array("code.bias", np.full(16, 1e300)), "its code.bias is of type float64"),
    "weights of a wrong shape": (array("genes.bias", np.zeros(119, np.float32)), r"shape \(119,\) instead of \(120,\)"),
    "no units": (units(0, stored=True), r"encoder.weight has shape \(0, 10\), and its n_hidden must be 1"),
    "units without room": (units(10**9, stored=False), "stores 0 bytes for shape"),
    "nan": (array("genes.weight", fill(np.nan)), "its genes.weight holds values that are not finite"),
    "infinite": (array("gene_scale", fill(np.inf)), "its gene_scale holds values that are not finite"),
    "1e30": (array("genes.weight", fill(1e30)), "output for these cells reaches .*: its weights, or these"),
    "1e30 at the start": (array("encoder.weight", fill(1e30)), "output for these cells reaches"),
    "1e6": (array("genes.bias", fill(1e6)), "output for these cells reaches 1e\\+"),
    "negative shares": (array("gene_share", lambda x: -x), "its gene_share holds values that are not from 0 to 1"),
    "no shares": (array("gene_share", fill(0)), "its gene_share does not add up to 1"),
    "no depth of the scores": (array("scores.depth", fill(0)), "its scores.depth holds values that are not from"),
    "no scale of the scores": (array("scores.scale", fill(0)), "its scores.scale holds values that are not from"),
    "shares of the scores": (array("scores.share", fill(2)), "its scores.share holds values that are not from 0 to 1"),
}


@pytest.mark.parametrize(("edit", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_model_file_that_is_none_is_refused_in_a_sentence(tiny_model, tmp_path, edit, message):
    text, arrays = read_parts(tiny_model)
    edit(text, arrays)
    write_parts(tmp_path / "model.npz", text, arrays)
    adata = cells(100, 3)
    with pytest.raises(ValueError, match=message):
        n2s.denoise_with(adata, tmp_path / "model.npz", device="cpu")
    assert not adata.uns
    assert not adata.obsm


def test_a_model_file_that_is_cut_is_refused_and_one_put_together_again_is_not(tiny_model, tmp_path):
    whole = tiny_model.read_bytes()
    cut, again, adata = tmp_path / "cut.npz", tmp_path / "again.npz", cells(100, 3)
    for n in (0, 10, len(whole) // 2, len(whole) - 10):
        cut.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="cut.npz is not a model that sc_noise2self saved"):
            n2s.denoise_with(adata, cut, device="cpu")
    write_parts(again, *read_parts(tiny_model))
    n2s.denoise_with(adata, again, device="cpu")
    assert "denoised" in adata.layers


def test_several_models_are_one_file(tiny_model, batch_model, tmp_path):
    first, second = _model.load(tiny_model), _model.load(batch_model)
    mean = State("mean", {}, {"gene_share": first.states[0].arrays["gene_share"]})
    states = (first.states[0], second.states[0], mean)
    _model.save(tmp_path / "model", Saved(states, (0.5, 0.25, 0.25), first.genes, second.batches))
    found = _model.load(tmp_path / "model")
    assert found.weights == (0.5, 0.25, 0.25)
    assert found.batches == ("a", "b")
    assert [state.method for state in found.states] == ["autoencoder", "autoencoder", "mean"]
    assert [state.values.get("n_batches") for state in found.states] == [0, 2, None]
    for one, other in zip(states, found.states, strict=True):
        for name, value in one.arrays.items():
            np.testing.assert_array_equal(value, other.arrays[name])
    with pytest.raises(ValueError, match="it names 0 batches and has 2"):
        _model.save(tmp_path / "other", Saved(states, (0.5, 0.25, 0.25), first.genes))


def test_loading_moves_no_random_numbers(tiny_model):
    before = torch.get_rng_state()
    n2s.denoise_with(cells(100, 3), tiny_model, device="cpu")
    assert (torch.get_rng_state() == before).all()


def test_the_schema_knows_every_loss_and_every_parameter_of_the_network():
    from sc_noise2self.methods._network import Network, PrincipalScores
    from sc_noise2self.methods._network_losses import LOSSES

    for name in LOSSES:
        assert _model.SCHEMAS["autoencoder"].values["loss"](name)
    assert set(_model.LINKS) == set(LOSSES)
    scores = PrincipalScores(np.ones((6, 2)), np.ones(6), np.ones(2), 5, np.ones(6), np.ones(6), 1)
    network = Network(scores, 3, 4, np.zeros(6), 2)
    arrays = network.arrays()
    populations = {f"population_{name}" for name in ("centers", "factors", "shares")}
    assert set(arrays) | populations | {"gene_share", "gene_scale"} == set(_model.SCHEMAS["autoencoder"].arrays)
    again = Network.from_arrays(arrays)
    for name, value in again.arrays().items():
        np.testing.assert_array_equal(value, arrays[name])


def test_a_model_is_written_whole_or_not_at_all_and_for_whom_the_user_says(tmp_path, monkeypatch):
    options = {"method": TINY, "save_model": tmp_path / "model.npz"}

    def interrupt(*args, **given):
        raise KeyboardInterrupt

    for owner, name in ((np, "savez"), (os, "link")):
        adata = cells(300, 0)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                n2s.denoise(adata, **options)
        assert not list(tmp_path.iterdir())
        assert not adata.uns
        assert not adata.obsm
    before = os.umask(0o027)
    try:
        n2s.denoise(cells(300, 0), **options)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
    assert stat.S_IMODE((tmp_path / "model.npz").stat().st_mode) == 0o640


def test_a_model_of_genes_whose_names_repeat_is_refused_before_it_is_fitted(tmp_path):
    adata = cells(120, 0)
    adata.var_names = ["gene"] * 120
    with pytest.raises(ValueError, match=r"gene names are not unique, and a model knows genes by name"):
        n2s.denoise(adata, METHOD, save_model=tmp_path / "model.npz")
