"""Getters give what was written: as a table, an AnnData object, or a lazy matrix."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from helpers import layer_names

import sc_noise2self as n2s

GENES = ["NKG7", "CD79A"]


@pytest.fixture(scope="module")
def _written():
    pbmc = n2s.datasets.pbmc68k_reduced()
    n2s.denoise(pbmc)
    return pbmc


@pytest.fixture
def written(_written):
    return _written.copy()


@pytest.mark.parametrize("source", ["factors", "layer"])
def test_denoised_gives_what_the_layer_holds(written, source):
    found = n2s.get.denoised(written, GENES, source=source)
    expected = written[:, GENES].layers["denoised"]
    pd.testing.assert_frame_equal(found, pd.DataFrame(expected, index=written.obs_names, columns=GENES), rtol=1e-4)
    assert n2s.get.denoised(written, "NKG7").shape == (700, 1)
    assert n2s.get.denoised(written, cells=written.obs_names[:3]).shape == (3, 765)


@pytest.mark.parametrize("scale", ["rates", "log1p_cp10k", "expected_log1p_cp10k"])
def test_every_scale_from_either_source(written, scale):
    before = written.layers["denoised"].copy()
    a, b = (n2s.get.denoised(written, GENES, scale=scale, source=source) for source in ("factors", "layer"))
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)
    np.testing.assert_array_equal(written.layers["denoised"], before)


def test_a_layer_on_another_scale_is_read_as_it_is_or_not_at_all(adata):
    n2s.denoise(adata, scale="log1p_cp10k")
    found = n2s.get.denoised(adata, "gene-3", scale="log1p_cp10k", source="layer")
    np.testing.assert_array_equal(found, adata.layers["denoised"][:, [3]])
    with pytest.raises(ValueError, match="is on the scale 'log1p_cp10k': pass that scale, or source='factors'"):
        n2s.get.denoised(adata, source="layer")
    n2s.denoise(adata, scale=n2s.scales.ExpectedLog1pCP10k(depth=500))
    with pytest.raises(ValueError, match="is on the scale 'expected_log1p_cp10k' of depth 500: pass that scale"):
        n2s.get.denoised(adata, scale=n2s.scales.ExpectedLog1pCP10k(depth=600), source="layer")
    assert n2s.get.denoised(adata, scale=n2s.scales.ExpectedLog1pCP10k(500), source="layer").shape == adata.shape


@pytest.mark.parametrize("depth", [float("inf"), float("nan"), 0, -1, "deep", True])
def test_a_depth_that_is_none_is_refused(depth):
    with pytest.raises(ValueError, match="depth is .*: pass a number of molecules above 0"):
        n2s.scales.ExpectedLog1pCP10k(depth=depth)


class PerThousand(n2s.scales.Scale):
    name, meaning, unit = "per_thousand", "molecules per thousand of the cell", "molecules per thousand"

    def apply(self, counts, size):
        return 1e3 * n2s.scales.Rates().apply(counts, size)


def test_a_scale_of_ones_own(adata, tmp_path):
    n2s.denoise(adata, scale=PerThousand())
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata = ad.read_h5ad(tmp_path / "a.h5ad")
    np.testing.assert_allclose(adata.layers["denoised"].sum(axis=1), 1000, rtol=1e-4)
    assert "Values are molecules per thousand of the cell." in n2s.report(adata, detail=True)
    a, b = (n2s.get.denoised(adata, scale=PerThousand(), source=source) for source in ("factors", "layer"))
    pd.testing.assert_frame_equal(a, b, rtol=1e-4)


def test_a_subset_is_followed(written):
    part = written[::2, ::3].copy()
    gene = part.var_names[0]
    np.testing.assert_allclose(n2s.get.denoised(part, gene), part[:, gene].layers["denoised"], rtol=1e-4)


def test_adata_carries_what_belongs_to_cells_and_genes(written):
    cells = list(written.obs_names[5:15])
    found = n2s.get.adata(written, GENES, cells=cells, scale="log1p_cp10k")
    assert list(found.obs_names) == cells
    assert list(found.var_names) == GENES
    np.testing.assert_array_equal(found.X, n2s.get.denoised(written, GENES, cells=cells, scale="log1p_cp10k"))
    assert "X_umap" in found.obsm
    assert not layer_names(found)
    axes = sc.pl.violin(n2s.get.adata(written, GENES), GENES, "bulk_labels", show=False)
    assert len(axes) == 2


def test_what_is_missing_is_named(written):
    with pytest.raises(KeyError, match=r"gene\(s\) not in adata: 'Xist'"):
        n2s.get.denoised(written, ["NKG7", "Xist"])
    with pytest.raises(KeyError, match=r"cell\(s\) not in adata: 'nobody'"):
        n2s.get.denoised(written, ["NKG7"], cells=["nobody"])
    for get in (n2s.get.denoised, n2s.get.adata, n2s.get.lazy):
        with pytest.raises(KeyError, match="there is no result 'other': run sc_noise2self.denoise"):
            get(written, key="other")
    with pytest.raises(ValueError, match="source is 'x': pass one of factors, layer"):
        n2s.get.denoised(written, source="x")
    del written.obsm["denoised"]
    with pytest.raises(KeyError, match="factors of 'denoised' are gone .* pass source='layer'"):
        n2s.get.denoised(written, GENES)
    assert n2s.get.denoised(written, GENES, source="layer").shape == (700, 2)
    del written.layers["denoised"]
    with pytest.raises(KeyError, match="there is no layer 'denoised': pass source='factors'"):
        n2s.get.denoised(written, GENES, source="layer")
    written.var_names = ["NKG7", *written.var_names[:-1]]
    with pytest.raises(KeyError, match="var_names_make_unique"):
        n2s.get.denoised(written, ["NKG7"])


class TestLazy:
    """A dask array in place of the layer."""

    @pytest.fixture
    def lazy(self, written):
        pytest.importorskip("dask")
        written.uns["dense"] = written.layers["denoised"].copy()
        written.layers["denoised"] = n2s.get.lazy(written)
        return written

    def test_it_is_the_layer(self, lazy):
        layer = lazy.layers["denoised"]
        assert layer.shape == (700, 765)
        assert layer.dtype == np.float32
        np.testing.assert_allclose(layer.compute(), lazy.uns["dense"], rtol=1e-4)
        np.testing.assert_allclose(
            layer[[5, 3], :][:, [700, 2]].compute(), lazy.uns["dense"][[5, 3]][:, [700, 2]], 1e-4
        )
        part = lazy[lazy.obs["bulk_labels"] == "Dendritic", GENES]
        expected = n2s.get.denoised(part, GENES)
        np.testing.assert_allclose(part.layers["denoised"].compute(), expected, rtol=1e-4)

    @pytest.mark.parametrize("scale", ["rates", "log1p_cp10k", "expected_log1p_cp10k"])
    def test_every_scale(self, lazy, scale):
        expected = n2s.get.denoised(lazy, scale=scale)
        np.testing.assert_allclose(n2s.get.lazy(lazy, scale=scale).compute(), expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("plot", ["dotplot", "matrixplot", "stacked_violin", "heatmap", "violin"])
    def test_scanpy_plots_it(self, lazy, plot):
        getattr(sc.pl, plot)(lazy, GENES, groupby="bulk_labels", layer="denoised", show=False)

    def test_only_what_is_asked_is_computed(self, lazy, monkeypatch):
        from sc_noise2self.methods._profiles import LowRankProfiles

        asked = []
        counts = LowRankProfiles.counts
        monkeypatch.setattr(LowRankProfiles, "counts", lambda *a: asked.append(counts(*a)) or asked[-1])
        sc.get.obs_df(lazy, GENES, layer="denoised")
        assert 0 < sum(block.size for block in asked) <= 2 * 700 * 256

    def test_it_is_written_as_a_layer(self, lazy, tmp_path):
        lazy.write_h5ad(tmp_path / "lazy.h5ad")
        back = ad.read_h5ad(tmp_path / "lazy.h5ad")
        np.testing.assert_allclose(back.layers["denoised"], lazy.uns["dense"], rtol=1e-4)

    def test_mixed_counts(self, pbmc):
        pytest.importorskip("dask")
        n2s.denoise(pbmc, mix=True)
        np.testing.assert_allclose(n2s.get.lazy(pbmc)[:, :5].compute(), pbmc.layers["denoised"][:, :5], rtol=1e-4)


# What scanpy sorts by colour it sorts with NumPy, for which dask computes the gene and says that it does.
@pytest.mark.filterwarnings("ignore:The `numpy.argsort` function is not implemented by Dask array:FutureWarning")
@pytest.mark.parametrize("source", ["lazy", "backed", "dask"])
def test_scanpy_plots_a_lazy_layer_like_a_dense_one(source, pbmc, written, tmp_path):
    da = pytest.importorskip("dask.array")
    if source == "backed":
        pbmc.write_h5ad(tmp_path / "a.h5ad")
        pbmc = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    elif source == "dask":
        pbmc.X = da.from_array(pbmc.X, chunks=(300, -1))
    n2s.denoise(pbmc, write_layer=source != "lazy")
    if source == "lazy":
        pbmc.layers["denoised"] = n2s.get.lazy(pbmc)
    assert isinstance(pbmc.layers["denoised"], da.Array)
    plots = {
        "umap": lambda a: sc.pl.umap(a, color="NKG7", layer="denoised", show=False),
        "embedding": lambda a: sc.pl.embedding(a, "umap", color="CD79A", layer="denoised", show=False),
        "scatter": lambda a: sc.pl.scatter(a, *GENES, layers="denoised", show=False),
        "scatter on a basis": lambda a: sc.pl.scatter(a, basis="umap", color="NKG7", layers="denoised", show=False),
    }
    for plot in plots.values():
        found, expected = (plot(each).collections[0] for each in (pbmc, written))
        np.testing.assert_allclose(found.get_offsets(), expected.get_offsets(), rtol=1e-4)
        if expected.get_array() is not None:
            np.testing.assert_allclose(found.get_array(), expected.get_array(), rtol=1e-4)
    axes = sc.pl.dotplot(pbmc, GENES, "bulk_labels", layer="denoised", show=False)
    assert "mainplot_ax" in axes
    plt.close("all")


def test_booleans_are_no_names(written):
    with pytest.raises(TypeError, match=r"cells were given as booleans: pass their names, as adata.obs_names\[mask\]"):
        n2s.get.denoised(written, cells=written.obs_names == written.obs_names[0])


def test_a_lazy_layer_is_indexed_as_numpy_does(written):
    pytest.importorskip("dask")
    lazy, dense = n2s.get.lazy(written), n2s.get.denoised(written).to_numpy()
    genes, cells = np.arange(765) % 7 == 0, np.arange(700) % 5 == 0
    for index in (
        (3, 5),
        (slice(None), 5),
        (-1, slice(4, 9)),
        (slice(None), np.int64(700)),
        ([9, 2, 2], slice(None)),
        (slice(None), [700, 3]),
        (cells, slice(2, 4)),
        (slice(3), genes),
        (cells, 5),
        (5, genes),
        ([9, 2], 5),
        (slice(None, None, -3), slice(None, None, 100)),
    ):
        found = lazy[index].compute()
        assert found.shape == dense[index].shape
        np.testing.assert_allclose(found, dense[index], rtol=1e-5)
    np.testing.assert_allclose(lazy[cells][:, genes][2:4].compute(), dense[cells][:, genes][2:4], rtol=1e-5)


def test_adata_of_names_that_repeat_or_are_numbers(written):
    repeated = written[:, :5].copy()
    expected = n2s.get.denoised(repeated).to_numpy()
    repeated.var_names = ["a", "a", "b", "c", "d"]
    with pytest.warns(UserWarning, match="Variable names are not unique"):
        found = n2s.get.adata(repeated)
    np.testing.assert_array_equal(found.X, expected)
    numbered = written[:6, :5].copy()
    numbered.obs.index, numbered.var.index = range(6)[::-1], [4, 3, 2, 1, 0]
    found = n2s.get.adata(numbered, genes=[3, 0], cells=[5, 0])
    np.testing.assert_allclose(found.X, expected[:6][[0, 5]][:, [1, 4]], rtol=1e-5)
    assert list(found.var_names) == ["3", "0"]


def test_a_name_that_is_nearly_right(written):
    with pytest.raises(KeyError, match=r"gene\(s\) not in adata: 'nkg7'; near 'nkg7' are 'NKG7'"):
        n2s.get.denoised(written, "nkg7")
    assert n2s.get.denoised(written, "NKG7", cells=written.obs_names[3]).shape == (1, 1)


def test_without_dask_it_says_what_to_install(written, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dask.array", None)
    with pytest.raises(ImportError, match=r'pip install "sc-noise2self\[lazy\]"'):
        n2s.get.lazy(written)


def test_an_object_shares_nothing_that_is_nested_with_the_one_it_is_from(adata):
    adata.uns["mine"] = {"a": [1]}
    n2s.denoise(adata, write_layer=False)
    own = n2s.get.adata(adata, "gene-1")
    own.uns["mine"]["a"].append(2)
    own.uns["denoised"]["params"]["mix"] = True
    assert adata.uns["mine"] == {"a": [1]}
    assert n2s.get.denoised(adata, "gene-1").shape == (300, 1)


def test_lazy_takes_factors_in_data_frames(adata):
    n2s.denoise(adata)
    for name in ("denoised", "denoised_scale"):
        adata.obsm[name] = pd.DataFrame(adata.obsm[name], adata.obs_names).add_prefix("factor")
    np.testing.assert_allclose(n2s.get.lazy(adata).compute(), adata.layers["denoised"], rtol=1e-4)


class TestGeneSymbols:
    """Genes named by a column of `var`, as in scanpy."""

    @pytest.fixture
    def by_identifier(self, written):
        """The genes have identifiers for names."""
        symbols = list(written.var_names)
        written.var["symbol"] = pd.Categorical(symbols)
        written.var_names = [f"ENSG{i:011d}" for i in range(written.n_vars)]
        return written

    def test_they_name_genes_in_every_getter(self, by_identifier):
        named = by_identifier.copy()
        named.var_names = named.var["symbol"].astype(str)
        expected = n2s.get.denoised(named, GENES)
        pd.testing.assert_frame_equal(n2s.get.denoised(by_identifier, GENES, gene_symbols="symbol"), expected)
        found = n2s.get.interval(by_identifier, GENES, gene_symbols="symbol")
        for end, of_names in zip(found, n2s.get.interval(named, GENES), strict=True):
            pd.testing.assert_frame_equal(end, of_names)
        own = n2s.get.adata(by_identifier, GENES, gene_symbols="symbol")
        assert list(own.var["symbol"]) == GENES
        assert own.var_names.str.startswith("ENSG").all()
        np.testing.assert_array_equal(own.X, expected)
        axes = sc.pl.dotplot(own, GENES, "bulk_labels", gene_symbols="symbol", show=False)
        assert "mainplot_ax" in axes

    def test_all_genes_have_their_symbols_for_names(self, by_identifier):
        found = n2s.get.denoised(by_identifier, cells=by_identifier.obs_names[:2], gene_symbols="symbol")
        assert list(found.columns) == list(by_identifier.var["symbol"])

    def test_a_symbol_of_several_genes_is_refused_where_it_is_asked_for(self, by_identifier):
        symbols = by_identifier.var["symbol"].astype(str).to_numpy()
        others = [i for i, name in enumerate(symbols) if name not in GENES][:5]
        symbols[others] = ["twice", "twice", "", "", ""]
        by_identifier.var["symbol"] = symbols
        assert n2s.get.denoised(by_identifier, GENES, gene_symbols="symbol").shape == (700, 2)
        with pytest.raises(KeyError, match="'twice' stands for several genes in adata.var.*: name them by adata.var_n"):
            n2s.get.denoised(by_identifier, ["CD79A", "twice"], gene_symbols="symbol")

    def test_what_is_missing_is_named(self, by_identifier):
        with pytest.raises(KeyError, match="there is no column 'name' in adata.var: it has"):
            n2s.get.denoised(by_identifier, GENES, gene_symbols="name")
        with pytest.raises(KeyError, match=r"gene\(s\) not in adata: 'nkg7'; near 'nkg7' are 'NKG7'"):
            n2s.get.denoised(by_identifier, "nkg7", gene_symbols="symbol")
