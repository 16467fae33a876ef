"""Getters give what was written: as a table, an AnnData object, or a lazy matrix."""

import anndata as ad
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
    n2s.denoise(adata, scale="expected_log1p_cp10k", scale_depth=500)
    with pytest.raises(ValueError, match="is on the scale 'expected_log1p_cp10k'"):
        n2s.get.denoised(adata, scale="expected_log1p_cp10k", scale_depth=600, source="layer")
    assert n2s.get.denoised(adata, scale="expected_log1p_cp10k", scale_depth=500, source="layer").shape == adata.shape


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
        from sc_noise2self.denoisers.profiles import LowRankProfiles

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


def test_without_dask_it_says_what_to_install(written, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dask.array", None)
    with pytest.raises(ImportError, match=r'pip install "sc-noise2self\[lazy\]"'):
        n2s.get.lazy(written)
