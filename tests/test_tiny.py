"""Tiny and extreme counts: every method works from 2 x 2 on, or refuses in one sentence."""

from __future__ import annotations

import threading
import tracemalloc
import warnings
from importlib.util import find_spec

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import strategies as st
from strategies import on_examples
from threadpoolctl import threadpool_info

import sc_noise2self as n2s

TOO_FEW = "too few to split into halves"
NONE_KEPT = "none of which has a molecule"
NETWORK = n2s.Autoencoder(width=2, n_epochs=2, device="cpu")
METHODS = {
    "pca": n2s.PCA(),
    "knn": n2s.KNN(),
    "diffusion": n2s.Diffusion(),
    "clusters": n2s.Clusters(),
    "autoencoder": NETWORK,
    "ensemble": [n2s.PCA(), NETWORK, n2s.Diffusion()],
}
NEEDS_TORCH = ("autoencoder", "ensemble")
HAS_TORCH = find_spec("torch") is not None


@st.composite
def tiny_counts(draw) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(st.integers(2, 12), st.integers(2, 12)))
    x = rng.poisson(draw(st.sampled_from([0.05, 0.2, 1.0, 5.0])), size=shape)
    change = draw(st.sampled_from(["none", "empty", "huge", "constant", "one"]))
    if change == "empty":
        x[rng.integers(shape[0])], x[:, rng.integers(shape[1])] = 0, 0
    if change == "huge":
        x[rng.integers(shape[0])] *= 10_000
    if change == "constant":
        x[:, rng.integers(shape[1])] = 3
    if change == "one" or not x.any():
        x[:] = 0
        x[rng.integers(shape[0]), rng.integers(shape[1])] = draw(st.integers(1, 4))
    return x.astype(np.float32)


def denoised(x: np.ndarray, method: str, mask_var: np.ndarray | None = None, **options) -> ad.AnnData | None:
    """Denoise, with warnings of arithmetic as errors; None where there are too few molecules."""
    adata = ad.AnnData(sp.csr_matrix(x))
    options |= {"method": METHODS[method], "mask_var": mask_var}
    if mask_var is not None and not x[:, mask_var].any():
        assert _refused(n2s.denoise, adata, NONE_KEPT, **options)
        return None
    refused = _refused(n2s.denoise, adata, **options)
    assert not refused or x.sum() < 50
    return None if refused else adata


def _refused(function, adata: ad.AnnData, words: str = TOO_FEW, /, **options) -> bool:
    """Whether a function refuses the counts, in these words; any other error is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            function(adata, **options)
    except ValueError as error:
        if words not in str(error) or adata.uns:
            raise
        return True
    return False


def check(x: np.ndarray, adata: ad.AnnData) -> None:
    layer, record = adata.layers["denoised"], adata.uns["denoised"]
    assert np.isfinite(layer).all()
    assert (layer >= 0).all()
    np.testing.assert_allclose(layer.sum(axis=1), x.sum(axis=1), rtol=1e-3)
    assert (layer[:, x.sum(axis=0) == 0] == 0).all()
    assert np.isfinite(record["gain"])
    assert np.isfinite(record["candidates"]["gain"]).all()
    assert not np.isnan(record["gain_error"])
    assert record["gain_cells"] <= record["n_cells"] == len(x)
    for said in (n2s.report(adata), n2s.report(adata, detail=True)):
        assert "nan" not in said
        assert "inf" not in said


@on_examples(
    st.sampled_from([name for name in METHODS if HAS_TORCH or name not in NEEDS_TORCH]),
    tiny_counts(),
    st.booleans(),
    st.integers(1, 2),
    st.booleans(),
    few=12,
    many=60,
)
def test_every_method_works_on_tiny_counts_or_refuses(method, x, mix, n_splits, masked):
    mask = np.arange(x.shape[1]) < max(2, x.shape[1] // 2) if masked else None
    adata = denoised(x, method, mix=mix, n_splits=n_splits, mask_var=mask)
    if adata is not None:
        check(x, adata)


@on_examples(st.sampled_from(["loo", "noise2self", "mcv", "bcv"]), tiny_counts(), st.integers(1, 2), few=30, many=100)
def test_every_protocol_ranks_tiny_counts_or_refuses(protocol, x, n_splits):
    adata = ad.AnnData(x)
    if _refused(n2s.select_rank, adata, protocol=protocol, n_splits=n_splits):
        return
    found = adata.uns["select_rank"]
    assert np.isfinite(found["table"]["loss"]).all()
    assert np.isfinite(found["splits"]).all()
    assert found["rank"] in found["table"]["rank"]
    assert len(found["within_one_error"])


def test_sparse_cells_train_an_autoencoder():
    """Some cells have all their molecules set aside by chance."""
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(0.3, 0.06, size=262), size=(349, 262))
    x[:, 0] += x.sum(axis=1) == 0
    check(x, denoised(x.astype(np.float32), "autoencoder"))


@pytest.mark.parametrize("method", METHODS)
def test_one_molecule_is_refused(method):
    if method in NEEDS_TORCH:
        pytest.importorskip("torch")
    x = np.zeros((5, 4), np.float32)
    x[2, 1] = 1
    adata = ad.AnnData(x)
    with (
        pytest.warns(UserWarning, match="hold no molecule"),
        pytest.raises(ValueError, match=r"hold 1 molecule\(s\) in 5 cells: too few"),
    ):
        n2s.denoise(adata, method=method)
    assert not adata.uns


def test_molecules_in_one_cell_alone_leave_the_mean_profile():
    x = np.zeros((4, 3), np.float32)
    x[1] = [9, 7, 5]
    adata = ad.AnnData(x)
    with (
        pytest.warns(UserWarning, match="hold no molecule"),
        pytest.warns(UserWarning, match="the mean profile is written"),
    ):
        n2s.denoise(adata)
    np.testing.assert_allclose(adata.layers["denoised"], x, rtol=1e-5)
    assert "Too few cells (1 of 4 cells)" in n2s.report(adata, detail=True)


def test_a_long_walk_ends_where_it_stands_still():
    """Cells of two kinds have no way from one to the other."""
    rng = np.random.default_rng(0)
    x = rng.poisson(np.repeat(rng.gamma(0.5, 4, size=(2, 40)), 30, axis=0)).astype(np.float32)
    layers = []
    for t in (10**5, 10**9):
        adata = ad.AnnData(x.copy())
        tracemalloc.start()
        n2s.denoise(adata, n2s.Diffusion(t=t, n_neighbors=20, n_pcs=3))
        assert tracemalloc.get_traced_memory()[1] < 100e6
        tracemalloc.stop()
        layers.append(adata.layers["denoised"])
    np.testing.assert_array_equal(*layers)


@pytest.mark.parametrize("method", ["pca", "diffusion"])
def test_threads_that_call_at_once_get_the_bytes_of_one_alone(simulated, method):
    together = [ad.AnnData(simulated.copy()) for _ in range(4)]
    threads = [threading.Thread(target=n2s.denoise, args=(adata, method)) for adata in together]
    alone = ad.AnnData(simulated.copy())
    limits = [library["num_threads"] for library in threadpool_info()]
    n2s.denoise(alone, method)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {adata.layers["denoised"].tobytes() for adata in together} == {alone.layers["denoised"].tobytes()}
    assert [library["num_threads"] for library in threadpool_info()] == limits


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mix": "yes"}, TypeError, "mix is 'yes': pass True or False"),
        ({"write_layer": 1}, TypeError, "write_layer is 1: pass True or False"),
        ({"copy": None}, TypeError, "copy is None: pass True or False"),
        ({"layer": ["a"]}, TypeError, r"layer is \['a'\]: pass a name"),
        ({"method": ["magic"]}, ValueError, "method is 'magic': pass one of pca"),
        ({"method": []}, ValueError, "method is empty: pass a name, a method such as"),
        ({"method": 3}, TypeError, "method is 3: pass one of pca, .* a function goes in n2s.Function"),
        (
            {"method": type("Mine", (n2s.methods.Method,), {"name": "mine"})()},
            TypeError,
            r"put @dataclass\(frozen=True\)",
        ),
        ({"method": n2s.PCA}, TypeError, r"method is the class PCA: pass an object, e.g. PCA\(\)"),
        ({"method": [n2s.PCA(), sum]}, TypeError, "method is <built-in function sum>: pass one of pca"),
        ({"scale": ["rates"]}, ValueError, r"scale is \['rates'\]: pass one of counts"),
        ({"method": n2s.PCA(n_components=True)}, ValueError, "n_components is True: pass a whole number"),
        ({"method": n2s.KNN(n_neighbors=())}, ValueError, "n_neighbors is empty: pass a whole number"),
        ({"method": n2s.Diffusion(n_pcs="5")}, ValueError, "n_pcs is '5': pass a whole number"),
        ({"save_model": 1}, TypeError, "save_model is of type int: pass the path of a file"),
        ({"mask_var": [[True], [True, False]]}, ValueError, "pass booleans, one for each of 120 genes"),
        ({"mask_var": 5}, ValueError, "pass booleans, one for each of 120 genes"),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused_in_a_sentence(adata, options, error, message):
    with pytest.raises(error, match=message):
        n2s.denoise(adata, **options)
    assert not adata.uns


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: n2s.PCA(transform="cp10k"), ValueError, "transform is 'cp10k': pass one of"),
        (lambda: n2s.Diffusion(t=-1), ValueError, "t is -1: pass a whole number"),
        (lambda: n2s.Diffusion(t=()), ValueError, "t is empty: pass a whole number, or several"),
        (lambda: n2s.Autoencoder(batch_key=["a"]), TypeError, r"batch_key is \['a'\]: pass a name"),
        (lambda: n2s.Autoencoder(n_epochs=0), ValueError, "n_epochs is 0: pass a whole number"),
        (lambda: n2s.Autoencoder(learning_rate=0), ValueError, "learning_rate is 0: pass a number above"),
        (lambda: n2s.Autoencoder(loss="zinb"), ValueError, "loss is 'zinb': pass one of multinomial, poisson"),
        (lambda: n2s.Autoencoder(n_seeds=0), ValueError, "n_seeds is 0: pass a whole number"),
        (lambda: n2s.Autoencoder(epochs=5), TypeError, "unexpected keyword argument 'epochs'"),
    ],
)
def test_options_of_a_wrong_kind_are_refused_where_a_method_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_several_methods_are_any_sequence_of_names_and_objects(adata):
    again = adata.copy()
    n2s.denoise(adata, ("pca", n2s.Diffusion()))
    n2s.denoise(again, [n2s.PCA(), "diffusion"])
    np.testing.assert_array_equal(adata.layers["denoised"], again.layers["denoised"])
    assert set(adata.uns["denoised"]["members"]["name"]) - {"mean"}


def test_the_gain_is_measured_on_all_cells():
    """Candidates are compared on some; the choice is measured on all, or the sample is said."""
    rng = np.random.default_rng(0)
    programmes = rng.dirichlet(np.full(200, 0.2), size=3)
    x = sp.csr_matrix(rng.poisson(300 * programmes[rng.integers(3, size=6000)]).astype(np.float32))
    adata = ad.AnnData(x)
    n2s.denoise(adata, n2s.PCA(transform="log1p", n_components=5), write_layer=False)
    record = adata.uns["denoised"]
    assert record["gain_cells"] == record["n_cells"] == 6000
    assert record["gain_molecules"] == pytest.approx(x.sum(), rel=1e-4)  # but those of genes that one half lacks
    weights = np.asarray(x.sum(axis=0)).ravel() / x.sum()
    assert np.nansum(weights * adata.var["denoised_gain"]) == pytest.approx(record["gain"], rel=1e-3)
    assert "6,000 cells" in n2s.report(adata)
