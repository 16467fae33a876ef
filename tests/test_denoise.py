"""`denoise` and `select_rank` on AnnData: what is written, what is left alone, what is refused and how."""

import tracemalloc
from contextlib import nullcontext
from types import SimpleNamespace

import anndata as ad
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import layer_names, said_by_scanpy

import sc_noise2self as n2s
from sc_noise2self._anndata import as_counts
from sc_noise2self._counts import column_sums
from sc_noise2self._memory import available_memory
from sc_noise2self._read import profiles
from sc_noise2self.get import layer_of
from sc_noise2self.methods._populations import clusters_of

SLOTS = ("layers", "obsm", "varm", "obs", "var", "uns", "obsp", "varp")

PCA_ENSEMBLE = {"method": [n2s.PCA()]}


def contents(adata):
    """Names in every slot, to tell what a call added."""
    return {slot: set(getattr(adata, slot).keys()) for slot in SLOTS}


def digest(matrix):
    arrays = (matrix.data, matrix.indices, matrix.indptr) if sp.issparse(matrix) else (matrix,)
    return [np.asarray(array).tobytes() for array in arrays]


def test_what_is_written_and_nothing_else(adata):
    before, x = contents(adata), digest(adata.X)
    assert n2s.denoise(adata) is None
    added = {slot: names - before[slot] for slot, names in contents(adata).items()}
    assert added == {
        "layers": {"denoised"},
        "obsm": {"denoised", "denoised_scale"},
        "varm": {"denoised", "denoised_scale"},
        "obs": {"denoised_size", "denoised_gain", "denoised_coverage"},
        "var": {"denoised_gain", "denoised_gain_error", "denoised_total", "denoised_phi"},
        "uns": {"denoised"},
        "obsp": set(),
        "varp": set(),
    }
    assert digest(adata.X) == x
    layer = adata.layers["denoised"]
    assert layer.dtype == np.float32
    assert layer.flags.c_contiguous
    assert np.isfinite(layer).all()
    assert (layer >= 0).all()
    np.testing.assert_allclose(layer.sum(axis=1), np.asarray(adata.X.sum(axis=1)).ravel(), rtol=1e-5)
    np.testing.assert_allclose(layer.sum(axis=0), np.asarray(adata.X.sum(axis=0)).ravel(), rtol=1e-2)


def test_the_record_says_what_was_chosen_and_gained(adata):
    n2s.denoise(adata, n2s.PCA(n_components=20))
    record = adata.uns["denoised"]
    assert record["method"] == "pca"
    assert "layer" not in record["params"]
    assert record["gain"] == pytest.approx(record["candidates"]["gain"].max(), rel=5e-3)
    best = record["candidates"]["gain"].argmax()
    members = record["members"]
    assert list(members["name"]) == [f"pca {members['link'][0]}"]
    assert record["candidates"]["label"][best] == f"{members['name'][0]}, {members['setting'][0]}"
    assert list(members["weight"]) == [1]
    assert record["candidates"]["error"][best] == 0
    assert record["gain"] > 5 * record["gain_error"] > 0
    assert record["gain_molecules"] == adata.X.sum()
    components = record["learned"][members["name"][0]]
    assert components["weights"].shape == components["worth"].shape == (20,)
    assert ((components["weights"] >= 0) & (components["weights"] <= 1)).all()
    assert 3 <= members["rank"][0] <= 5  # five programmes: four components beyond the mean


def test_denoising_nears_the_truth(pbmc):
    """Marker genes after denoising tell apart the cell types that experts had labelled."""
    n2s.denoise(pbmc)
    b_cells = (pbmc.obs["bulk_labels"] == "CD19+ B").to_numpy()
    raw, denoised = (
        np.asarray(pbmc[:, "CD79A"].X.todense()).ravel(),
        n2s.get.denoised(pbmc, "CD79A").to_numpy().ravel(),
    )
    size = np.asarray(pbmc.X.sum(axis=1)).ravel()

    def overlap(values):
        """Share of pairs of a B cell and another cell in which the other has at least as much."""
        values = values / size
        return (values[b_cells][:, None] <= values[~b_cells]).mean()

    assert overlap(denoised) < 0.02
    assert overlap(raw) > 5 * overlap(denoised)


def test_layer_input_and_key(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    x, counts = digest(adata.X), digest(adata.layers["counts"])
    n2s.denoise(adata, layer="counts", key_added="n2s")
    assert (digest(adata.X), digest(adata.layers["counts"])) == (x, counts)
    assert adata.uns["n2s"]["params"]["layer"] == "counts"
    assert layer_names(adata) == {"counts", "n2s"}


def test_copy(adata):
    before = contents(adata)
    out = n2s.denoise(adata, copy=True)
    assert contents(adata) == before
    assert "denoised" in out.layers


def test_factors_alone_rebuild_the_layer(adata):
    whole = n2s.denoise(adata, copy=True)
    n2s.denoise(adata, write_layer=False)
    assert "denoised" not in adata.layers
    genes = ["gene-3", "gene-99"]
    found = n2s.get.denoised(adata, genes, cells=["cell-9", "cell-0"])
    assert list(found.columns) == genes
    assert list(found.index) == ["cell-9", "cell-0"]
    np.testing.assert_allclose(found, whole[["cell-9", "cell-0"], genes].layers["denoised"], rtol=1e-5)


@pytest.mark.parametrize("options", [PCA_ENSEMBLE, {"mix": True}, PCA_ENSEMBLE | {"mix": True}])
def test_ensembles_and_mixtures_are_rebuilt_from_factors(adata, options):
    n2s.denoise(adata, **options)
    layer = adata.layers["denoised"]
    np.testing.assert_allclose(n2s.get.denoised(adata, list(adata.var_names)), layer, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.sum(axis=1), np.asarray(adata.X.sum(axis=1)).ravel(), rtol=1e-4)
    assert (layer >= 0).all()
    part = adata[5:20].copy()
    np.testing.assert_allclose(n2s.get.denoised(part, ["gene-3"]), layer[5:20, 3:4], rtol=1e-4)
    members = adata.uns["denoised"]["members"]
    assert members["weight"].sum() == pytest.approx(1)
    if "method" in options:
        assert len(members["name"]) > 1
    if "mix" in options:
        assert adata.var["denoised_phi"].between(0, 100).all()
        assert adata.var["denoised_mixed"].between(0, 1).all()
        assert "unmixed_gain" in adata.uns["denoised"]


def test_a_mixture_needs_the_counts_that_were_mixed_in(adata):
    adata.layers["counts"] = adata.X.copy()
    n2s.denoise(adata, mix=True, layer="counts", write_layer=False)
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray()))
    assert n2s.get.denoised(adata, "gene-1").shape == (300, 1)
    adata.layers["counts"] = adata.layers["counts"] * 2
    with pytest.raises(
        ValueError, match="layer 'counts' does not hold the counts that were denoised to 'denoised' any more"
    ):
        n2s.get.denoised(adata, "gene-1")


def test_scales(adata):
    n2s.denoise(adata)
    size = np.asarray(adata.X.sum(axis=1))
    rates = adata.layers["denoised"] / size
    assert adata.uns["denoised"]["scale_meaning"] == "expected counts at each cell's own depth"
    expected = {
        "rates": rates,
        "log1p_cp10k": np.log1p(1e4 * rates),
        "expected_log1p_cp10k": None,
    }
    for scale, values in expected.items():
        other = n2s.denoise(adata, scale=scale, key_added="other", copy=True)
        assert other.uns["other"]["scale"] == scale
        assert other.layers["other"].dtype == np.float32
        if values is not None:
            np.testing.assert_allclose(other.layers["other"], values, rtol=1e-4)
        found = n2s.get.denoised(adata, list(adata.var_names), scale=scale)
        np.testing.assert_allclose(found, other.layers["other"], rtol=1e-4, atol=1e-6)
    # What log1p(CP10k) of fresh samples of 200 molecules averages.
    found = n2s.get.denoised(adata, list(adata.var_names), scale=n2s.scales.ExpectedLog1pCP10k(200)).to_numpy()
    rng = np.random.default_rng(0)
    samples = [np.log1p(rng.poisson(rates[:20] * 200) * (1e4 / 200)) for _ in range(2000)]
    error = np.std(samples, axis=0) / np.sqrt(2000)
    assert (np.abs(np.mean(samples, axis=0) - found[:20]) < 6 * error + 2e-3).all()


def test_an_earlier_result_is_replaced_whole(adata):
    n2s.denoise(adata)
    n2s.denoise(adata, n2s.PCA(transform="sqrt"), write_layer=False)
    assert "denoised" not in adata.layers
    assert list(adata.uns["denoised"]["members"]["link"]) == ["sqrt"]
    assert set(adata.uns["denoised"]["candidates"]["label"]) >= {"pca sqrt, cut", "pca sqrt, shrinkage 1"}
    n2s.denoise(adata, mix=True)
    assert "denoised_mixed" in adata.var
    n2s.denoise(adata)
    assert "denoised_mixed" not in adata.var


@pytest.mark.parametrize("kind", ["csr_array", "csc_matrix", "dense", "fortran", "int64", "uint16", "float64"])
def test_the_same_counts_in_any_form_give_the_same_result(adata, kind):
    n2s.denoise(adata)
    forms = {"csr_array": sp.csr_array, "csc_matrix": sp.csc_matrix, "dense": lambda x: x.toarray()}
    forms["fortran"] = lambda x: np.asfortranarray(x.toarray())
    x = forms[kind](adata.X) if kind in forms else adata.X.astype(kind)
    other = ad.AnnData(x, obs=adata.obs[[]], var=adata.var[[]])
    # anndata brings `X` to C order; a layer keeps what it is given.
    other.layers["counts"] = x
    before = digest(other.layers["counts"])
    n2s.denoise(other, layer="counts")
    assert digest(other.layers["counts"]) == before
    np.testing.assert_allclose(other.layers["denoised"], adata.layers["denoised"], rtol=1e-4, atol=1e-6)


def test_same_seed_same_bytes(adata):
    first, second, other = (n2s.denoise(adata, copy=True, random_state=seed) for seed in (3, 3, 4))
    assert digest(first.layers["denoised"]) == digest(second.layers["denoised"])
    assert digest(first.obsm["denoised"]) == digest(second.obsm["denoised"])
    assert digest(first.layers["denoised"]) != digest(other.layers["denoised"])


def test_global_random_state_is_left_alone(adata):
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    n2s.denoise(adata)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_view_is_made_actual_with_a_warning_and_its_parent_left_alone(adata):
    before = contents(adata)
    view = adata[adata.obs_names[:200]]
    with pytest.warns(ad.ImplicitModificationWarning):
        n2s.denoise(view)
    assert not view.is_view
    assert view.layers["denoised"].shape == (200, 120)
    assert contents(adata) == before


def test_a_series_names_its_genes(adata):
    """It is found by its index, in whatever order; without names it goes by position."""
    chosen = pd.Series(np.arange(120) % 3 > 0, index=adata.var_names)
    expected = n2s.denoise(adata, mask_var=chosen.to_numpy(), copy=True).layers["denoised"]
    for given in (chosen, chosen[::-1], chosen.reset_index(drop=True)):
        found = n2s.denoise(adata, mask_var=given, copy=True).layers["denoised"]
        np.testing.assert_array_equal(found, expected)
    phi = pd.Series(np.linspace(0, 3, 120), index=adata.var_names)
    one, _ = n2s.split_molecules(adata, overdispersion=phi[::-1])
    np.testing.assert_array_equal(
        one.X.toarray(), n2s.split_molecules(adata, overdispersion=phi.to_numpy())[0].X.toarray()
    )
    for other in (chosen[:60], chosen.rename(index=lambda name: name + "x")):
        with pytest.raises(ValueError, match="mask_var is a Series of other genes, or names some twice"):
            n2s.denoise(adata, mask_var=other)
    with pytest.raises(ValueError, match="overdispersion is a Series of other genes"):
        n2s.select_rank(adata, overdispersion=phi[:60])


def test_mask_var(adata):
    adata.var["chosen"] = np.arange(120) < 60
    by_name = n2s.denoise(adata, mask_var="chosen", copy=True)
    by_array = n2s.denoise(adata, mask_var=adata.var["chosen"].to_numpy(), copy=True)
    assert digest(by_name.layers["denoised"]) == digest(by_array.layers["denoised"])
    assert by_name.layers["denoised"].shape == (300, 120)
    assert by_name.uns["denoised"]["params"]["mask_var"] == "chosen"
    # Scanpy's habit of using this column unasked is not followed.
    adata.var["highly_variable"] = np.arange(120) < 10
    plain = n2s.denoise(adata, copy=True)
    del adata.var["highly_variable"]
    assert digest(plain.layers["denoised"]) == digest(n2s.denoise(adata, copy=True).layers["denoised"])


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("format", ["h5ad", "zarr"])
def test_files_keep_everything(adata, tmp_path, format):
    if format == "zarr":
        pytest.importorskip("zarr")
    n2s.denoise(adata)
    n2s.select_rank(adata, max_rank=20)
    path = tmp_path / f"x.{format}"
    getattr(adata, f"write_{format}")(path)
    back = getattr(ad, f"read_{format}")(path)
    np.testing.assert_array_equal(back.layers["denoised"], adata.layers["denoised"])
    assert_same(back.uns["denoised"], adata.uns["denoised"])
    assert_same(back.uns["select_rank"], adata.uns["select_rank"])
    found, expected = (n2s.get.denoised(a, ["gene-1", "gene-2"]) for a in (back, adata))
    np.testing.assert_array_equal(found, expected)
    n2s.denoise(back)  # a result read from a file is known as one, and replaced


def assert_same(a, b):
    if isinstance(b, dict):
        assert set(a) == set(b)
        for key in b:
            assert_same(a[key], b[key])
    else:
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{}, PCA_ENSEMBLE, PCA_ENSEMBLE | {"mix": True}])
def test_molecules_dealt_at_random_gain_nothing(adata, options):
    """The genes of all molecules shuffled: what is left to predict is one mean profile."""
    x = adata.X.toarray()
    adata = n2s.null_counts(adata)
    with pytest.warns(UserWarning, match="no candidate predicts held-out molecules better than one mean profile"):
        n2s.denoise(adata, **options)
    # Rounding in single precision may be told apart from 0.
    assert adata.uns["denoised"]["gain"] <= max(2 * adata.uns["denoised"]["gain_error"], 1e-5)
    assert list(adata.uns["denoised"]["members"]["name"]) == ["mean"]
    profiles = adata.layers["denoised"] / adata.layers["denoised"].sum(axis=1, keepdims=True)
    share = x.sum(axis=0) / x.sum()
    if "mix" not in options:
        assert not adata.var["denoised_gain"].any()
    np.testing.assert_allclose(profiles, np.tile(share, (300, 1)), rtol=0.1 if "mix" in options else 1e-3, atol=1e-3)
    with pytest.warns(UserWarning, match="no rank predicts held-out molecules better than rank 0"):
        n2s.select_rank(adata, max_rank=20)


def test_select_rank(adata):
    before = contents(adata)
    rank = n2s.select_rank(adata, max_rank=20)
    assert 3 <= rank <= 5
    added = {slot: names - before[slot] for slot, names in contents(adata).items()}
    assert added.pop("uns") == {"select_rank"}
    assert not any(added.values())
    found = adata.uns["select_rank"]
    curve = found["table"]
    assert found["rank"] == rank == curve["rank"][curve["chosen"]].item()
    assert curve["loss"].shape == curve["error"].shape == curve["rank"].shape == (21,)
    assert curve["rank"][curve["loss"].argmin()] == found["split_rank"]
    assert n2s.select_rank(adata, max_rank=20) == rank
    assert n2s.select_rank(adata, max_rank=20, protocol="mcv", center=True) in range(2, 7)
    # Uncentred, the mean takes one component of its own.
    assert n2s.select_rank(adata, max_rank=20, protocol="noise2self") in range(4, 8)
    with pytest.warns(UserWarning, match="the loss still falls at the largest rank tried, 2"):
        n2s.select_rank(adata, max_rank=2)


def test_select_rank_uses_the_masked_genes_alone(adata):
    mask = np.arange(120) < 60
    found = n2s.select_rank(adata, max_rank=20, mask_var=mask)
    alone = adata[:, mask].copy()
    assert found == n2s.select_rank(alone, max_rank=20)
    np.testing.assert_array_equal(adata.uns["select_rank"]["table"]["loss"], alone.uns["select_rank"]["table"]["loss"])


@pytest.mark.parametrize("call", [n2s.denoise, n2s.select_rank])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda a: sc.pp.normalize_total(a, target_sum=1e3),
            ValueError,
            'X holds .* at cell "cell-0", gene "gene',
        ),
        (lambda a: sc.pp.log1p(a), ValueError, 'raw counts. Pass the matrix .* layer="counts"'),
        (lambda a: a.X.data.__setitem__(5, -1), ValueError, "X holds -1"),
        (lambda a: a.X.data.__setitem__(5, np.nan), ValueError, "X holds nan"),
        (lambda a: a.X.data.__setitem__(slice(None), 0), ValueError, "X holds no molecule"),
        (lambda a: setattr(a, "X", None), ValueError, "adata.X is empty"),
    ],
)
def test_refuses_what_is_not_counts_and_writes_nothing(adata, call, change, error, message):
    change(adata)
    before = contents(adata)
    with pytest.raises(error, match=message):
        call(adata)
    assert contents(adata) == before


@pytest.mark.parametrize("call", [n2s.denoise, n2s.select_rank])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"layer": "counts"},
            ValueError,
            r"layer 'counts' is missing: adata.layers has \[\]. If X holds the raw counts, leave",
        ),
        ({"random_state": "seed"}, TypeError, "random_state is 'seed': pass a whole number"),
        ({"n_splits": 0}, ValueError, "n_splits is 0: pass a whole number, 1 or more"),
        ({"mask_var": "hvg"}, ValueError, "mask_var 'hvg' is missing: adata.var has"),
        ({"mask_var": np.ones(7, bool)}, ValueError, "one for each of 120 genes"),
        ({"mask_var": np.arange(120) < 1}, ValueError, "mask_var keeps 1 gene"),
    ],
)
def test_refuses_options_and_writes_nothing(adata, call, options, error, message):
    before = contents(adata)
    with pytest.raises(error, match=message):
        call(adata, **options)
    assert contents(adata) == before


@pytest.mark.parametrize(
    ("call", "options", "message"),
    [
        (
            n2s.denoise,
            {"method": "magic"},
            "method is 'magic': pass one of pca, autoencoder, diffusion, knn, clusters, ensemble",
        ),
        (n2s.denoise, {"key_added": "a/b"}, "pass a name without '/'"),
        (n2s.denoise, {"scale": "cpm"}, "scale is 'cpm': pass one of counts, rates, log1p_cp10k, expected_log1p"),
        (n2s.denoise, {"scale": 3}, "scale is 3: pass one of counts, .* or an object such as sc_noise2self.scales"),
        (n2s.denoise, {"layer": False}, "To write none, pass write_layer=False"),
        (n2s.denoise, {"width": 8}, "unexpected keyword argument 'width'"),
        (n2s.denoise, {"method": n2s.PCA(n_components=120)}, "n_components is 120: 300 cells x 120 genes have at most"),
        (n2s.denoise, {"method": n2s.Autoencoder(width=500)}, "width is 500: 120 is the most that 120 genes allow"),
        (n2s.denoise, {"method": n2s.Autoencoder(width=[8, 0])}, "width is 0: pass a whole number"),
        (n2s.denoise, {"method": n2s.Autoencoder(batch_key="lane")}, "batch_key 'lane' is missing"),
        (
            n2s.denoise,
            {"method": "knn", "save_model": "x.npz"},
            "save_model was given with 'knn', which knows no cells",
        ),
        (
            n2s.denoise,
            {"method": n2s.Function(sum), "write_layer": False},
            "write_layer=False was given with a function",
        ),
        (n2s.select_rank, {"transform": "cp10k"}, "transform is 'cp10k': pass one of"),
        (n2s.select_rank, {"max_rank": 120}, "max_rank is 120: 300 cells x 120 genes have at most 119"),
        (n2s.select_rank, {"max_rank": 2.5}, "max_rank is 2.5: pass a whole number"),
        (n2s.select_rank, {"protocol": "kfold"}, "protocol is 'kfold': pass one of loo, noise2self, mcv"),
    ],
)
def test_refuses_options_of_one(adata, call, options, message):
    if message.startswith("width"):
        pytest.importorskip("torch")
    with pytest.raises((ValueError, TypeError), match=message):
        call(adata, **options)


def test_never_writes_over_what_it_did_not_write(adata):
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(ValueError, match="the layer that holds the counts: choose another name"):
        n2s.denoise(adata, layer="counts", key_added="counts")
    adata.obsm["denoised"] = np.ones((300, 2))
    with pytest.raises(ValueError, match="exists and is not an earlier result: choose another key_added"):
        n2s.denoise(adata)
    assert "denoised" not in adata.layers
    np.testing.assert_array_equal(adata.obsm["denoised"], 1)


@pytest.mark.parametrize(("shape", "what"), [((1, 120), "1 cell"), ((300, 1), "1 gene")])
def test_refuses_one_cell_and_one_gene(adata, shape, what):
    small = adata[: shape[0], : shape[1]].copy()
    with pytest.raises(ValueError, match=f"there is {what}: at least 2 are needed"):
        n2s.denoise(small)


def test_two_cells_and_three_genes_run(recwarn):
    x = sp.csr_matrix(np.array([[5, 0, 2], [1, 7, 3]], dtype=np.float32))
    small = ad.AnnData(x)
    n2s.denoise(small)
    assert np.isfinite(small.layers["denoised"]).all()


def test_empty_cells_and_unexpressed_genes_stay_zero(adata):
    x = adata.X.toarray()
    x[4] = 0
    x[:, 7] = 0
    adata.X = sp.csr_matrix(x)
    with pytest.warns(UserWarning, match="1 cell.s. hold no molecule and stay zero: .*sc.pp.filter_cells"):
        n2s.denoise(adata)
    layer = adata.layers["denoised"]
    assert np.isfinite(layer).all()
    assert (layer[4] == 0).all()
    assert (layer[:, 7] == 0).all()
    with pytest.warns(UserWarning, match="hold no molecule"):
        n2s.select_rank(adata, max_rank=10)


def test_stored_zeros_are_not_counts(adata):
    n2s.denoise(adata)
    other = adata.copy()
    x = sp.csr_matrix(adata.X, copy=True)
    padded = sp.csr_matrix(x + sp.csr_matrix(np.eye(300, 120)))
    padded.data -= (padded != x).toarray()[padded.nonzero()]
    assert padded.nnz > x.nnz
    other.X = padded.astype(np.float32)
    n2s.denoise(other)
    np.testing.assert_array_equal(other.layers["denoised"], adata.layers["denoised"])


def test_transposed_counts_are_recognised(adata):
    adata.obs_names = ["ACTB", *adata.obs_names[1:]]
    with pytest.warns(UserWarning, match="adata looks transposed .* pass adata.T"):
        n2s.select_rank(adata, max_rank=10)
    adata.obs_names = [f"cell-{i}" for i in range(300)]
    adata.var_names = ["".join("ACGT"[i // 4**j % 4] for j in range(16)) + "-1" for i in range(120)]
    with pytest.warns(UserWarning, match="adata looks transposed"):
        n2s.select_rank(adata, max_rank=10)


def test_reads_are_recognised(adata):
    adata.X = adata.X * 30
    with pytest.warns(UserWarning, match="X looks like reads, not molecules .* Use UMI counts"):
        n2s.split_molecules(adata)


def test_cells_that_were_read_twice_are_noticed(adata):
    """Equal counts of many genes are no chance; a molecule that differs, or cells of few genes, are."""
    again = adata[:7].copy()
    again.obs_names = [f"{name}-copy" for name in again.obs_names]
    first = again.X[0].indices[0]
    again.X[0, first] += 1
    both = ad.concat([adata, again])
    name = adata.obs_names[1]
    message = f'6 cell.s. have exactly the counts of another, such as "{name}-copy" of "{name}": each predicts its copy'
    with pytest.warns(UserWarning, match=message):
        n2s.denoise(both, write_layer=False)
    assert any("exactly the counts" in each for each in both.uns["denoised"]["warnings"])
    both.X = da.from_array(both.X, chunks=(100, -1), asarray=False)
    with pytest.warns(UserWarning, match=message):
        n2s.select_rank(both, max_rank=10)
    shallow = ad.AnnData(sp.vstack([adata.X[:, :40]] * 2).tocsr())
    n2s.denoise(shallow, write_layer=False)  # warnings are errors


def test_refuses_what_is_not_anndata(adata):
    with pytest.raises(TypeError, match="adata is of type csr_matrix: pass an AnnData object"):
        n2s.denoise(adata.X)


def test_messages_follow_scanpy_verbosity(adata, capsys):
    with said_by_scanpy(verbosity=1) as log:
        n2s.denoise(adata)
        assert log.getvalue() == capsys.readouterr().err == ""
        sc.settings.verbosity = 2
        n2s.denoise(adata)
        n2s.select_rank(adata, max_rank=10)
        said = log.getvalue()
    assert "denoising X (300 cells x 120 genes)" in said
    assert "nats per held-out molecule" in said
    assert "rank" in said


def test_an_interrupt_writes_nothing(adata, monkeypatch):
    from sc_noise2self.methods._profiles import LowRankProfiles

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LowRankProfiles, "counts", interrupt)
    before = contents(adata)
    with pytest.raises(KeyboardInterrupt):
        n2s.denoise(adata)
    assert contents(adata) == before


# Held-out gain on real counts with nine tenths of the molecules seen: at least this, in nats per molecule.
@pytest.mark.parametrize(
    ("name", "method", "mix", "least"),
    [  # each method on some of the counts; all of them on all are in benchmarks/README.md
        ("paul15_myeloid", "pca", False, 0.103),
        ("paul15_myeloid", "autoencoder", False, 0.111),
        ("pbmc3k_10x", "pca", False, 0.136),
        ("pbmc3k_10x", "diffusion", False, 0.124),
        ("pbmc3k_10x", ["pca"], True, 0.180),
        ("baron_human1_pancreas", "pca", False, 0.457),
        ("baron_human1_pancreas", "knn", False, 0.433),
    ],
)
@pytest.mark.real
@pytest.mark.slow
def test_held_out_gain_on_real_counts(real_data, name, method, mix, least):
    from sc_noise2self._loss import held_out_gain, held_out_probabilities

    x = real_data(name).X.tocsr()
    x = x[np.asarray(x.sum(axis=1)).ravel() > 200]
    train, test = n2s.split_molecules(x, 0.9, random_state=1)
    mean = np.asarray(train.sum(axis=0)).ravel() / train.sum()
    adata = ad.AnnData(train)
    n2s.denoise(adata, method, mix=mix, write_layer=False)
    gain = held_out_gain(held_out_probabilities(profiles(adata), test), test, mean)
    assert gain.mean > least
    assert adata.uns["denoised"]["gain"] < gain.mean + 3 * gain.error  # what was promised is kept


def test_the_modality_of_a_mudata_object_is_denoised_in_place(adata):
    mudata = pytest.importorskip("mudata")
    protein = ad.AnnData(np.ones((adata.n_obs, 2), np.float32), obs=adata.obs[[]])
    # mudata 0.4 does so by itself, and has no such function.
    with mudata.set_options(pull_on_update=False) if hasattr(mudata, "set_options") else nullcontext():
        mdata = mudata.MuData({"rna": adata.copy(), "prot": protein})
    n2s.denoise(mdata["rna"])
    n2s.denoise(adata)
    np.testing.assert_array_equal(mdata["rna"].layers["denoised"], adata.layers["denoised"])
    assert n2s.get.denoised(mdata["rna"], "gene-1").shape == (300, 1)
    assert n2s.report(mdata["rna"]) == n2s.report(adata)
    assert "denoised" not in mdata["prot"].layers


def test_an_old_generator_of_numpy_is_drawn_from(adata):
    first, same, other = (
        n2s.denoise(adata, copy=True, random_state=state, write_layer=False)
        for state in (np.random.RandomState(3), np.random.RandomState(3), np.random.RandomState(4))
    )
    np.testing.assert_array_equal(first.obsm["denoised"], same.obsm["denoised"])
    assert first.uns["denoised"]["gain"] != other.uns["denoised"]["gain"]
    assert first.uns["denoised"]["params"]["random_state"] == "generator"


@pytest.mark.parametrize("n_molecules", [6, 8])
def test_cells_whose_half_is_empty_cost_nothing(n_molecules):
    rng = np.random.default_rng(0)
    profile = rng.dirichlet(np.full(30, 0.5), 2)
    kinds, alike = np.arange(2000) % 2, np.zeros(2000, int)
    adata, null = (
        ad.AnnData(sp.csr_matrix(rng.multinomial(n_molecules, profile[kind]), dtype=np.float32))
        for kind in (kinds, alike)
    )
    n2s.denoise(adata)
    assert adata.uns["denoised"]["beats_mean"]
    with pytest.warns(UserWarning, match="no candidate predicts held-out molecules better"):
        n2s.denoise(null)
    assert null.uns["denoised"]["gain"] > -0.02
    np.testing.assert_allclose(null.var["denoised_gain"].fillna(0), 0, atol=1e-5)


def test_a_scale_is_that_of_all_cells_that_were_denoised(adata):
    n2s.denoise(adata, write_layer=False)
    scale = "expected_log1p_cp10k"
    deep = np.argsort(adata.obs["denoised_size"].to_numpy())[-40:]
    some = adata[deep].copy()
    whole = n2s.get.denoised(adata, scale=scale)
    np.testing.assert_array_equal(n2s.get.denoised(some, scale=scale), whole.iloc[deep])
    low, high = n2s.get.interval(some, some.var_names[:3], scale=scale)
    low_of_all, high_of_all = n2s.get.interval(adata, adata.var_names[:3], scale=scale)
    np.testing.assert_array_equal(low, low_of_all.iloc[deep])
    np.testing.assert_array_equal(high, high_of_all.iloc[deep])


def test_totals_of_genes_are_exact_beyond_single_precision():
    counts = sp.csr_matrix(np.full((200, 3), 2**17 + 1, np.float32))
    np.testing.assert_array_equal(column_sums(counts), 200 * (2**17 + 1))


def test_reads_are_seen_in_a_dense_matrix_of_any_width():
    counts = np.full((2, 150_000), 40, np.float32).reshape(3000, 100)
    counts[:, 0] = 1
    with pytest.warns(UserWarning, match="looks like reads"):
        n2s.split_molecules(ad.AnnData(counts))


def test_clusters_are_no_more_than_cells():
    assert len(np.unique(clusters_of(np.arange(12.0).reshape(3, 4), 8))) == 3


@pytest.mark.parametrize(("limit", "free"), [("max", 10_000), ("5000", 1500)])
def test_memory_of_a_container_counts_and_files_that_were_read_do_not(limit, free, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("4500\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 1000\n")
    places = ((tmp_path, "memory.max", "memory.current", "inactive_file"),)
    monkeypatch.setattr("sc_noise2self._memory._OF_CONTAINERS", places)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert available_memory() == free


@pytest.mark.filterwarnings("ignore:.*exactly the counts of another")
def test_a_layer_takes_its_own_memory_and_no_more(adata):
    big = ad.AnnData(sp.vstack([adata.X] * 40, format="csr"))
    n2s.denoise(big, [n2s.PCA(transform="log1p"), n2s.PCA(transform="sqrt")], write_layer=False)
    counts = as_counts(big, None)
    n_bytes = 4 * big.n_obs * big.n_vars
    result = SimpleNamespace(
        profiles=profiles(big), size=counts.size, scale=n2s.scales.Log1pCP10k(), cell_scale=None, factored=True
    )
    tracemalloc.start()
    layer_of(result, counts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_bytes < peak < 1.2 * n_bytes + 60e6  # and blocks
