"""A result is whole or not there, knows what it belongs to, and is read only where that holds."""

import sys
import warnings

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import layer_names, low_rank_profiles, poisson_counts

import sc_noise2self as n2s
from sc_noise2self import _result
from sc_noise2self._blocks import OnDask, OnDisk
from sc_noise2self._intervals import Coverage
from sc_noise2self._loss import Gain
from sc_noise2self._result import Member, Result
from sc_noise2self.methods._base import Learned
from sc_noise2self.methods._dispersion import Dispersion
from sc_noise2self.methods._profiles import TableProfiles

SLOTS = ("layers", "obsm", "varm", "obs", "var", "uns")
TINY = {"width": 2, "n_components": 3, "device": "cpu", "n_hidden": 16, "n_epochs": 40}
QUICK = {"method": n2s.PCA(transform="none", n_components=3)}
PACKAGE = str(next(iter(n2s.__path__)))


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def cells(n=60, seed=0, rank=3):
    out = ad.AnnData(poisson_counts(low_rank_profiles(n, 20, rank, seed=9), 300, seed=seed))
    out.obs_names = [f"cell-{seed}-{i}" for i in range(n)]
    out.var_names = [f"gene-{i}" for i in range(20)]
    return out


def denoised(n=60, seed=0, **options):
    out = cells(n, seed)
    n2s.denoise(out, **{**QUICK, **options})
    return out


def identity(counts, share):
    mean = np.asarray(counts.sum(axis=0)) / counts.sum()
    return share * counts.toarray() + (1 - share) * np.asarray(counts.sum(axis=1)) @ mean


def names(adata):
    return {slot: set(getattr(adata, slot)) - {None} for slot in SLOTS}


READERS = {
    "get.denoised": lambda adata: n2s.get.denoised(adata, "gene-1"),
    "get.layer": lambda adata: n2s.get.denoised(adata, "gene-1", source="layer"),
    "get.adata": lambda adata: n2s.get.adata(adata, "gene-1"),
    "get.lazy": lambda adata: n2s.get.lazy(adata),
    "report": lambda adata: n2s.report(adata),
    "markers": lambda adata: n2s.pl.markers(adata, ["gene-0", "gene-1"]),
    "gain_per_gene": lambda adata: n2s.pl.gain_per_gene(adata),
    "spectrum": lambda adata: n2s.pl.spectrum(adata),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("model") / "m.pt"
    n2s.denoise(cells(300), n2s.Autoencoder(**TINY), save_model=path)
    return path


@pytest.fixture(scope="module")
def merged():
    return ad.concat([denoised(seed=0), denoised(seed=1)], merge="first", uns_merge="first")


def test_factors_that_were_cut_are_refused():
    adata = denoised()
    adata.obsm["denoised"] = adata.obsm["denoised"][:, :1]
    with pytest.raises(ValueError, match=r"factors of cells have the shape \(\d+, 1\), and those of genes \d+ columns"):
        n2s.get.denoised(adata)
    with pytest.raises(ValueError, match="adata has no cells: there is nothing to draw"):
        n2s.pl.markers(denoised()[:0].copy(), ["gene-0", "gene-1"], show=False)


def test_groups_that_differ_by_type_alone_are_refused():
    adata = cells()
    adata.obs["lane"] = pd.Categorical(["1", 1] * (adata.n_obs // 2))
    with pytest.raises(ValueError, match=r"adata.obs\['lane'\] holds '1' as text and as a number"):
        n2s.overdispersion(adata, "lane")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda adata: n2s.get.denoised(adata, "nobody"), "gene(s) not in adata: 'nobody'."),
        (lambda adata: n2s.get.denoised(adata, key="other"), "there is no result 'other': run"),
        (lambda adata: n2s.denoise(adata, layer="counts"), "layer 'counts' is missing: adata.layers has"),
        (lambda adata: n2s.select_rank(adata, mask_var="hvg"), "mask_var 'hvg' is missing: adata.var has"),
        (lambda adata: n2s.overdispersion(adata, "kind"), "groupby 'kind' is missing: adata.obs has"),
        (lambda adata: n2s.report(adata, groupby="kind"), "there is no column 'kind' in adata.obs"),
        (lambda adata: n2s.remove(adata, "other"), "there is nothing of a result 'other' to remove"),
    ],
)
def test_a_name_that_is_not_there_is_one_error_and_its_message_no_literal(call, message):
    adata = denoised()
    for kind in (KeyError, ValueError):
        with pytest.raises(kind) as raised:
            call(adata)
        assert str(raised.value).startswith(message)


class TestParts:
    """What `anndata.concat` puts together from results of several objects."""

    @pytest.mark.parametrize("reader", READERS)
    def test_two_results_in_one_are_refused(self, merged, reader):
        with pytest.raises(ValueError, match=r"was put together from several.*sc_noise2self.remove\(adata, 'denoised'"):
            READERS[reader](merged)

    def test_they_are_removed_and_denoised_again(self, merged):
        joined = merged.copy()
        n2s.remove(joined)
        assert not any(names(joined).values())
        n2s.denoise(joined, **QUICK)
        assert n2s.get.denoised(joined).shape == (120, 20)

    def test_loadings_of_another_result_are_refused(self):
        one, other = denoised(seed=0), denoised(seed=1)
        one.varm = other.varm
        with pytest.raises(ValueError, match=r"its genes \(adata.varm\) do not belong to the record"):
            n2s.get.denoised(one)

    def test_what_concat_leaves_names_the_way_out(self):
        left = ad.concat([denoised(seed=0), denoised(seed=1)])
        for call in (n2s.denoise, n2s.get.denoised, n2s.report):
            with pytest.raises((KeyError, ValueError), match=r"obsm\['denoised'\].*sc_noise2self.remove\(adata, 'deno"):
                call(left)
        n2s.remove(left, "denoised")
        assert not any(names(left).values())
        n2s.denoise(left, **QUICK)

    def test_one_result_in_parts_and_together_again(self, tmp_path):
        whole = denoised()
        expected = n2s.get.denoised(whole)
        back = ad.concat([whole[:25].copy(), whole[25:].copy()], merge="same", uns_merge="same")
        pd.testing.assert_frame_equal(n2s.get.denoised(back), expected)
        part = whole[10:30, ::2].copy()
        part.write_h5ad(tmp_path / "part.h5ad")
        np.testing.assert_allclose(n2s.get.denoised(ad.read_h5ad(tmp_path / "part.h5ad")), expected.iloc[10:30, ::2])

    @pytest.mark.filterwarnings("ignore:Writing zarr v2")
    @pytest.mark.parametrize("kind", ["lazy", "DataFrame"])
    @pytest.mark.parametrize("source", ["factors", "layer"])
    def test_two_results_are_told_apart_wherever_their_scales_are(self, kind, source, tmp_path):
        parts = [denoised(seed=0), denoised(seed=1, scale="rates")]
        for i, part in enumerate(parts):
            if kind == "DataFrame":
                part.obsm["denoised_scale"] = pd.DataFrame(part.obsm["denoised_scale"], part.obs_names).add_prefix("s")
            else:
                pytest.importorskip("xarray"), pytest.importorskip("zarr")
                part.write_zarr(tmp_path / f"{i}.zarr")
                parts[i] = ad.experimental.read_lazy(tmp_path / f"{i}.zarr")
        assert n2s.get.denoised(parts[0], source=source).shape == (60, 20)
        assert n2s.get.denoised(parts[0][:25], source=source).shape == (25, 20)
        joined = ad.concat(parts, merge="first", uns_merge="first")
        with pytest.raises(ValueError, match=r"put together from several: its cells \(adata.obsm\)"):
            n2s.get.denoised(joined, source=source, scale="counts")

    @pytest.mark.parametrize("how", ["same", "unique"])
    def test_a_record_of_what_two_results_share_is_not_one(self, how):
        joined = ad.concat([denoised(seed=0), denoised(seed=1)], merge="same", uns_merge=how)
        with pytest.raises(ValueError, match=r"was put together from several: its record .*remove\(adata, 'denoised'"):
            n2s.get.denoised(joined)

    def test_halves_of_one_result_are_told_how_to_be_joined(self):
        whole = denoised()
        with pytest.raises(KeyError, match=r"are left: join parts .* merge='same', uns_merge='same'.*remove\(adata, "):
            n2s.get.denoised(ad.concat([whole[:25], whole[25:]]))

    @pytest.mark.filterwarnings("ignore:Writing zarr v2")
    def test_what_is_read_lazily_is_read_and_replaced(self, tmp_path):
        pytest.importorskip("xarray"), pytest.importorskip("zarr")
        expected = denoised(mix=True)
        expected.write_zarr(tmp_path / "a.zarr")
        lazy = ad.experimental.read_lazy(tmp_path / "a.zarr")
        assert n2s.report(lazy) == n2s.report(expected)
        assert len(n2s.pl.gain_per_gene(lazy).collections) == 3
        assert n2s.pl.spectrum(lazy).get_title() == "Spectrum, PCA of counts"
        for of_lazy, of_whole in zip(
            *(n2s.get.interval(each, each.var_names) for each in (lazy, expected)), strict=True
        ):
            pd.testing.assert_frame_equal(of_lazy, of_whole, check_names=False)
        n2s.denoise(lazy, **QUICK)
        assert "denoised_mixed" not in lazy.var
        assert n2s.get.denoised(lazy).shape == (60, 20)
        n2s.remove(lazy)
        assert not any(names(lazy).values())

    def test_a_transposed_result_is_refused(self):
        adata = denoised()
        for call in (n2s.remove, n2s.get.denoised, n2s.report):
            with pytest.raises(ValueError, match="was transposed after it was denoised to 'denoised': pass adata.T"):
                call(adata.T)
        n2s.remove(adata.T.T)

    def test_cells_denoised_with_one_model_are_joined(self, model):
        parts = [cells(50, seed=3), cells(50, seed=4)[:, ::-1].copy()]
        for part in parts:
            n2s.denoise_with(part, model, device="cpu")
        joined = ad.concat(parts, merge="first", uns_merge="first")
        expected = pd.concat([n2s.get.denoised(part)[joined.var_names] for part in parts])
        pd.testing.assert_frame_equal(n2s.get.denoised(joined), expected, rtol=1e-5)

    def test_a_record_that_something_else_overwrote_is_missed_in_one_sentence(self):
        adata = denoised()
        adata.uns["denoised"] = {"params": {}}
        with pytest.raises(KeyError, match=r"record of result 'denoised' is gone from adata.uns.*remove\(adata, 'den"):
            n2s.get.denoised(adata)
        n2s.remove(adata)
        assert names(adata)["uns"] == {"denoised"}  # which is not of a result
        assert not names(adata)["obsm"]

    def test_a_record_in_part_is_refused(self):
        adata = denoised()
        del adata.uns["denoised"]["gain"], adata.uns["denoised"]["params"]["mix"]
        with pytest.raises(ValueError, match="record of result 'denoised' in adata.uns has lost gain, mix"):
            n2s.report(adata)


class TestRemove:
    def test_it_leaves_everything_else(self):
        adata = cells()
        adata.layers["other"], adata.obs["denoised_by"], adata.uns["x"] = adata.X.copy(), "me", 1
        before = names(adata)
        n2s.denoise(adata, mix=True, **QUICK)
        n2s.denoise(adata, key_added="second", **QUICK)
        assert n2s.remove(adata) is None
        assert n2s.get.denoised(adata, key="second").shape == adata.shape
        n2s.remove(adata, "second")
        assert names(adata) == before

    def test_results_of_other_functions(self):
        adata = cells()
        n2s.select_rank(adata, max_rank=3)
        n2s.calibrate(adata, identity, {"share": [0.5, 0.9]}, refit=True)
        for key in ("select_rank", "calibrate"):
            n2s.remove(adata, key)
        assert not any(names(adata).values())

    def test_results_of_other_functions_are_read_elsewhere(self):
        adata = cells()
        n2s.select_rank(adata, max_rank=3)
        n2s.calibrate(adata, identity, {"share": [0.5, 0.9]}, refit=True)
        for key, where in (("calibrate", "layers"), ("select_rank", "uns")):
            for read in (n2s.get.denoised, n2s.report, n2s.pl.gain_per_gene):
                with pytest.raises(
                    KeyError, match=rf"'{key}' is a result of {key}, not of denoise: read adata.{where}"
                ):
                    read(adata, key=key)

    @pytest.mark.parametrize("foreign", [{"split_losses": 1}, {"scale_meaning": 3}, {"split_rank": 2, "params": 1}])
    def test_a_record_is_not_known_by_one_name(self, foreign):
        adata = cells()
        adata.uns["x"] = foreign
        with pytest.raises(KeyError, match="nothing of a result 'x' to remove"):
            n2s.remove(adata, "x")
        for write in TO_KEYS.values():
            with pytest.raises(ValueError, match=r"adata.uns\['x'\] exists and is not an earlier"):
                write(adata, "x")
        assert adata.uns["x"] == foreign

    def test_nothing_of_others_is_removed(self):
        adata = denoised(key_added="mine")
        adata.layers["counts"], adata.uns["counts"] = adata.X.copy(), {"a": 1}
        adata.obs["cell_size"], adata.obsm["cell"], adata.obsm["cell_scale"] = 1.0, np.ones((60, 2)), np.ones((60, 3))
        before = names(adata)
        for key in ("counts", "cell", "denoised"):
            with pytest.raises(
                KeyError, match=rf"nothing of a result '{key}' to remove: the results in adata are 'min"
            ):
                n2s.remove(adata, key)
        assert names(adata) == before


CHANGES = {
    "normalised": lambda x: sp.csr_matrix(np.log1p(x.toarray())),
    "scaled by a whole number": lambda x: x * 2,
    "fewer": lambda x: sp.csr_matrix(np.maximum(x.toarray() - 1, 0)),
    "genes in another order": lambda x: x[:, ::-1],
    "cells in another order": lambda x: x[::-1],
}


PLOTS = {
    "markers": lambda a, **more: n2s.pl.markers(a, ["gene-0", "gene-1"], **more),
    "embedding": lambda a, **more: n2s.pl.embedding(a, "gene-0", "here", **more),
}


class TestCounts:
    """The counts beside a result are those that were denoised, or there is a sentence."""

    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("plot", PLOTS)
    def test_plots_notice_a_change_and_take_a_layer(self, plot, change):
        adata = denoised(write_layer=False)
        adata.obsm["here"] = np.random.default_rng(0).normal(size=(60, 2))
        expected = drawn(PLOTS[plot](adata))
        adata.layers["kept"], adata.X = adata.X.copy(), CHANGES[change](adata.X)
        with pytest.raises(ValueError, match=r"adata.X does not hold the counts that were denoised .* pass layer="):
            PLOTS[plot](adata)
        for before, after in zip(expected, drawn(PLOTS[plot](adata, layer="kept")), strict=True):
            np.testing.assert_allclose(before, after)

    def test_the_usual_next_step(self, pbmc):
        n2s.denoise(pbmc, n2s.PCA(transform="log1p"), write_layer=False)
        pbmc.layers["counts"] = pbmc.X.copy()
        sc.pp.normalize_total(pbmc)
        sc.pp.log1p(pbmc)
        with pytest.raises(ValueError, match="normalised since"):
            n2s.pl.markers(pbmc, ["NKG7", "CD79A"])
        raw, _ = drawn(n2s.pl.markers(pbmc, ["NKG7", "CD79A"], layer="counts"))
        rates = pbmc[:, ["NKG7", "CD79A"]].layers["counts"].toarray() / pbmc.obs[["denoised_size"]].to_numpy()
        np.testing.assert_allclose(raw, np.log1p(1e4 * rates), rtol=1e-5)

    def test_a_part_of_cells_and_genes_still_has_its_counts(self):
        adata = denoised(write_layer=False)
        part = adata[5:40, ["gene-0", "gene-1", "gene-7"]].copy()
        assert len(n2s.pl.markers(part, ["gene-0", "gene-1"])) == 2
        part.X = part.X * 100
        with pytest.raises(ValueError, match="does not hold the counts"):
            n2s.pl.markers(part, ["gene-0", "gene-1"])

    def test_the_layer_that_holds_the_counts_is_named(self):
        adata = denoised(mix=True)
        adata.layers["other"], adata.layers["kept"], adata.X = adata.X * 2, adata.X.copy(), adata.X * 3
        with pytest.raises(ValueError, match=r"any more \(normalised since\?\): pass layer='kept' to the plot\.$"):
            n2s.pl.markers(adata, ["gene-0", "gene-1"])
        with pytest.raises(ValueError, match=r"layer 'other' does not .* any more: pass layer='kept' to the plot\.$"):
            n2s.pl.markers(adata, ["gene-0", "gene-1"], layer="other")
        with pytest.raises(ValueError, match=r"adata.X = adata.layers\['kept'\].copy\(\).*source='layer'"):
            n2s.get.denoised(adata)
        adata.X = adata.layers["kept"].copy()
        assert n2s.get.denoised(adata).shape == adata.shape

    @pytest.mark.filterwarnings("ignore:Observation names are not unique")
    def test_a_bootstrap_still_has_its_counts(self):
        adata = denoised(mix=True)
        chosen = np.random.default_rng(0).integers(adata.n_obs, size=adata.n_obs)
        np.testing.assert_allclose(n2s.get.denoised(adata[chosen]), n2s.get.denoised(adata).iloc[chosen], rtol=1e-5)

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_mixture_is_rebuilt_from_what_was_mixed_in_or_not_at_all(self, change):
        adata = denoised(mix=True)
        expected = n2s.get.denoised(adata)
        adata.X = CHANGES[change](adata.X)
        for read in (n2s.get.denoised, n2s.get.adata, n2s.get.lazy):
            with pytest.raises(ValueError, match=r"adata.X does not hold the counts .* source='layer'"):
                read(adata)
        np.testing.assert_allclose(n2s.get.denoised(adata, source="layer"), expected, rtol=1e-4)

    def test_a_lazy_mixture_of_counts_that_were_normalised_since_is_an_error(self):
        adata = denoised(mix=True)
        expected, layer = adata.layers["denoised"], n2s.get.lazy(adata)
        np.testing.assert_allclose(layer[:7, [3, 1]].compute(), expected[:7, [3, 1]], rtol=1e-4)
        for some in (adata[:30, 2:9].copy(), adata[:, 2:9].copy(), adata[4:30].copy()):
            np.testing.assert_allclose(n2s.get.lazy(some).compute(), some.layers["denoised"], rtol=1e-4)
        of_genes = n2s.get.lazy(some := adata[:30, 2:9].copy())
        some.X.data *= 2
        with pytest.raises(ValueError, match="the counts that this layer mixes in have changed"):
            of_genes.compute()
        adata.X.data *= 2
        for part in (layer, layer[:7, [3, 1]], layer[5]):
            with pytest.raises(ValueError, match="the counts that this layer mixes in have changed since it was made"):
                part.compute()

    def test_a_layer_called_x_is_not_x(self):
        adata = cells()
        adata.layers["X"], adata.X = adata.X, sp.csr_matrix(adata.X.toarray()[::-1])
        n2s.denoise(adata, layer="X", mix=True, key_added="mixed", **QUICK)
        np.testing.assert_allclose(n2s.get.denoised(adata, key="mixed"), adata.layers["mixed"], rtol=1e-4)
        assert "the counts in layer 'X'" in n2s.report(adata, key="mixed")
        n2s.denoise(adata, **QUICK)
        assert "the counts in X" in n2s.report(adata)
        del adata.layers["X"]
        assert len(n2s.pl.markers(adata, ["gene-0", "gene-1"])) == 2
        with pytest.raises(KeyError, match="layer 'X' with the counts .* is gone"):
            n2s.pl.markers(adata, ["gene-0", "gene-1"], key="mixed")

    @pytest.mark.parametrize("kind", ["backed", "dask", "csc", "dense"])
    def test_counts_wherever_they_are(self, kind, tmp_path):
        adata = cells()
        expected = drawn(n2s.pl.markers(denoised(write_layer=False), ["gene-0", "gene-1"]))[0]
        if kind == "backed":
            adata.write_h5ad(tmp_path / "a.h5ad")
            adata = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
        elif kind == "dask":
            adata.X = pytest.importorskip("dask.array").from_array(adata.X, chunks=(25, -1))
        else:
            adata.X = sp.csc_matrix(adata.X) if kind == "csc" else adata.X.toarray()
        n2s.denoise(adata, write_layer=False, **QUICK)
        np.testing.assert_allclose(drawn(n2s.pl.markers(adata, ["gene-0", "gene-1"]))[0], expected, rtol=1e-5)


def with_values(scale="counts", seed=0):
    """What a method leaves that returns a matrix, and no factors."""
    adata, scale = cells(seed=seed), n2s.scales.SCALES[scale]()
    size, totals = adata.X.sum(axis=1).A1, adata.X.sum(axis=0).A1
    values, ones = identity(adata.X, 0.5), np.full(20, 0.1)
    table = pd.DataFrame({"by": ["a", None], "loss": [-0.1, 0.0], "error": [0.0, 0.1], "chosen": [True, False]})
    result = Result(
        method="function",
        params={"mix": False, "random_state": 0},
        scale=scale,
        members=[
            Member(
                "identity",
                "",
                1.0,
                TableProfiles.of(values, size, totals / totals.sum()).scaled(),
                Learned("identity", "identity (share 0.5)", 0, {"table": table}),
            )
        ],
        gain=Gain(0.1 * size, size),
        measured=np.arange(len(size)),
        dispersion=Dispersion(0.1 * ones, ones, 0.0),
        coverage=Coverage(np.arange(1), np.full((1, 10, 1), 0.5), size[:1]),
        gene_gains=(ones, 0.1 * ones),
        size=size,
        totals=totals,
        depth=float(np.median(size)),
        warnings=[],
        layer=scale.apply(values.astype(np.float32), size),
    )
    with _result.write(adata, "denoised", result):
        pass
    return adata, values


class TestNoFactors:
    """A method may return values that are no factors: the layer is all there is."""

    @pytest.mark.filterwarnings("ignore:Writing zarr v2")
    @pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
    def test_the_layer_is_read_by_itself(self, suffix, tmp_path):
        if suffix == "zarr":
            pytest.importorskip("zarr")
        adata, values = with_values()
        getattr(adata, f"write_{suffix}")(tmp_path / f"a.{suffix}")
        adata = getattr(ad, f"read_{suffix}")(tmp_path / f"a.{suffix}")
        rates = values / values.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(n2s.get.denoised(adata), values, rtol=1e-5)
        np.testing.assert_allclose(n2s.get.denoised(adata, "gene-3", scale="rates")["gene-3"], rates[:, 3], rtol=1e-5)
        np.testing.assert_allclose(n2s.get.adata(adata, source="layer").X, values, rtol=1e-5)
        assert n2s.report(adata, detail=True).startswith("Identity (share 0.5) of the counts in X (")
        _, shown = drawn(n2s.pl.markers(adata, ["gene-0", "gene-1"]))
        np.testing.assert_allclose(shown[:, 1], np.log1p(1e4 * rates[:, 1]), rtol=1e-5)
        assert n2s.pl.loss(adata, key="denoised").get_xticklabels()[1].get_text() == "None"
        assert len(n2s.pl.gain_per_gene(adata).collections) == 3

    def test_what_needs_factors_says_so(self):
        adata, _ = with_values("rates")
        pytest.importorskip("dask")
        for read in (lambda: n2s.get.denoised(adata, source="factors"), lambda: n2s.get.lazy(adata)):
            with pytest.raises(ValueError, match="result 'denoised' has no factors, .* its layer is all there is"):
                read()
        with pytest.raises(ValueError, match="panels has 2: other numbers of components need"):
            n2s.pl.markers(adata, ["gene-0", "gene-1"], panels=(2,))
        with pytest.raises(KeyError, match="result 'denoised' has no PCA: its members are identity"):
            n2s.pl.spectrum(adata)
        with pytest.raises(ValueError, match=r"is on the scale 'rates': pass that scale\.$"):
            n2s.get.denoised(adata)
        del adata.layers["denoised"]
        with pytest.raises(KeyError, match="there is no layer 'denoised': call sc_noise2self.remove"):
            n2s.get.denoised(adata)

    def test_two_results_in_one_are_refused_and_removed(self):
        joined = ad.concat([with_values(seed=i)[0] for i in (0, 1)], merge="first", uns_merge="first")
        with pytest.raises(ValueError, match="was put together from several"):
            n2s.get.denoised(joined)
        left = ad.concat([with_values(seed=i)[0] for i in (0, 1)])
        with pytest.raises(KeyError, match=r"the record of result 'denoised' is gone from adata.uns"):
            n2s.report(left)
        for adata in (joined, left):
            n2s.remove(adata)
            assert not any(names(adata).values())

    def test_a_result_with_factors_replaces_it_and_is_replaced(self):
        adata, _ = with_values()
        n2s.denoise(adata, mix=True, **QUICK)
        assert n2s.get.lazy(adata).shape == adata.shape
        other, _ = with_values()
        n2s.remove(other)
        assert not any(names(other).values())


def count_what_is_held(monkeypatch):
    """Return a list that gathers how many counts each reading of a part returns."""
    held = []
    for kind in (OnDisk, OnDask):
        part = kind.part
        monkeypatch.setattr(kind, "part", lambda *a, part=part: held.append(part(*a)) or held[-1])
    return held


class TestMixedOutOfMemory:
    """Counts that were mixed in are read where they are, as many as are asked for."""

    @pytest.fixture(params=["backed", "dask"])
    def pair(self, request, tmp_path):
        """The result in memory, and with its counts elsewhere."""
        adata = denoised(mix=True)
        if request.param == "backed":
            adata.write_h5ad(tmp_path / "a.h5ad")
            return adata, ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
        other = adata.copy()
        other.X = pytest.importorskip("dask.array").from_array(other.X, chunks=(25, -1))
        return adata, other

    def test_getters(self, pair, monkeypatch):
        adata, other = pair
        held = count_what_is_held(monkeypatch)
        names = ["gene-7", "gene-2"]
        expected = n2s.get.denoised(adata, names, cells=adata.obs_names[[50, 3, 3]])
        np.testing.assert_array_equal(n2s.get.denoised(other, names, cells=adata.obs_names[[50, 3, 3]]), expected)
        np.testing.assert_array_equal(n2s.get.denoised(other, names), n2s.get.denoised(adata, names))
        assert [each.shape for each in held] == [(3, 2), (60, 2)]
        np.testing.assert_array_equal(n2s.get.denoised(other), n2s.get.denoised(adata))
        np.testing.assert_array_equal(n2s.get.lazy(other)[40:10:-3, 3:5].compute(), n2s.get.lazy(adata)[40:10:-3, 3:5])

    def test_plots(self, pair):
        adata, other = pair
        genes = ["gene-0", "gene-1"]
        for one, two in zip(drawn(n2s.pl.markers(adata, genes)), drawn(n2s.pl.markers(other, genes)), strict=True):
            np.testing.assert_array_equal(one, two)


def drawn(axes):
    """The points, or the colours where points are coloured, of each of the axes."""
    points = [ax.collections[0] for ax in np.ravel(axes)]
    return [np.asarray(each.get_offsets()) if each.get_array() is None else each.get_array() for each in points]


class Lines:
    """Calls a function at every line that the package runs."""

    def __init__(self, work):
        self.work = work

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.work()
        return self


def traced(write, adata, at_line):
    sys.settrace(Lines(at_line))
    try:
        write(adata)
    finally:
        sys.settrace(None)


WRITERS = {
    "denoise": lambda adata, seed: n2s.denoise(adata, key_added="key", random_state=seed, **QUICK),
    "mix": lambda adata, seed: n2s.denoise(adata, key_added="key", mix=True, random_state=seed, **QUICK),
    "select_rank": lambda adata, seed: n2s.select_rank(adata, key_added="key", max_rank=3, random_state=seed),
    "calibrate": lambda adata, seed: n2s.calibrate(
        adata, identity, {"share": [0.5, 0.9]}, key_added="key", refit=True, random_state=seed
    ),
}


def outcome(adata):
    """All that stands under the key, comparable."""

    def comparable(value):
        if isinstance(value, pd.DataFrame):
            return value.drop(columns="seconds", errors="ignore").to_csv()
        if isinstance(value, dict):
            return {name: comparable(each) for name, each in value.items()}
        return repr(value) if np.ndim(value) == 0 else np.asarray(value).tobytes()

    slots = {slot: dict(getattr(adata, slot)) for slot in SLOTS}
    return {
        f"{slot}/{name}": comparable(value)
        for slot, found in slots.items()
        for name, value in found.items()
        if name is not None
    }


def check_interrupts(write, old):
    """Interrupt at 20 lines from before the first change on: the old or the new is there, whole."""
    before, after, watched = cells(), cells(), cells()
    for adata in (before, after, watched):
        old(adata)
    write(after)
    start, new = outcome(before), outcome(after)
    assert start != new
    changes = []
    traced(write, watched, lambda: changes.append(unlike(watched, start)))
    first, n_lines = changes.index(True), len(changes)
    met = 0
    for k in np.unique(np.linspace(first - 30, n_lines, 20).astype(int)):
        adata, left = before.copy(), [int(k)]

        def interrupt(left=left):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        try:
            traced(write, adata, interrupt)
        except KeyboardInterrupt:
            met += 1
        assert outcome(adata) in (start, new)
    assert met >= 5


def unlike(adata, start):
    return {f"{slot}/{name}" for slot in SLOTS for name in getattr(adata, slot)} != start.keys()


NOTHING = {"nothing": lambda adata, seed: None}


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("denoise", "nothing"),
        ("denoise", "mix"),
        ("mix", "denoise"),
        ("select_rank", "nothing"),
        ("calibrate", "nothing"),
    ],
)
def test_an_interrupt_leaves_the_old_or_the_new(name, old):
    check_interrupts(lambda adata: WRITERS[name](adata, 0), lambda adata: (WRITERS | NOTHING)[old](adata, 1))


@pytest.mark.parametrize("old", ["nothing", "mix"])
def test_an_interrupt_of_a_model_leaves_the_old_or_the_new(old, model):
    def write(adata):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the model predicts held-out molecules")
            n2s.denoise_with(adata, model, key_added="key", device="cpu")

    check_interrupts(write, lambda adata: (WRITERS | NOTHING)[old](adata, 1))


@pytest.mark.parametrize("name", WRITERS)
def test_a_view_becomes_an_object_of_its_own(name):
    parent = cells(80)
    before = outcome(parent)
    view, own = parent[:60], parent[:60].copy()
    with pytest.warns(ad.ImplicitModificationWarning, match="adata is a view: it is made an object of its own"):
        WRITERS[name](view, 0)
    WRITERS[name](own, 0)
    assert outcome(parent) == before
    assert outcome(view) == outcome(own)


def test_a_part_of_a_backed_object_is_refused(tmp_path):
    cells().write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.raises(ValueError, match="adata is a part of a backed object, which cannot be written to"):
        n2s.denoise(backed[:30])


TO_KEYS = {
    "denoise": lambda adata, key: n2s.denoise(adata, key_added=key, **QUICK),
    "select_rank": lambda adata, key: n2s.select_rank(adata, key_added=key, max_rank=3),
    "calibrate": lambda adata, key: n2s.calibrate(adata, identity, {"share": [0.5]}, key_added=key),
}


class TestKeys:
    @pytest.mark.parametrize("name", TO_KEYS)
    def test_names_that_files_do_not_keep_or_that_scanpy_writes_to(self, name):
        adata = cells()
        for key in ("", ".", "..", ".x", "a/b", "a\\b", "a\0b", "\ud800", 3, "k" * 201, "\u00e9" * 101):
            with pytest.raises(ValueError, match="because files keep no other"):
                TO_KEYS[name](adata, key)
        for key in ("pca", "neighbors", "umap", "log1p", "X_pca", "group_colors", "dendrogram_group"):
            with pytest.raises(ValueError, match=f"key_added is '{key}', a name that .* writes to: choose another"):
                TO_KEYS[name](adata, key)
        assert not any(names(adata).values())

    @pytest.mark.parametrize("name", TO_KEYS)
    def test_what_another_wrote_is_not_overwritten(self, name):
        adata = cells()
        adata.uns["mine"] = {"a": 1}
        with pytest.raises(ValueError, match=r"adata.uns\['mine'\] exists and is not an earlier"):
            TO_KEYS[name](adata, "mine")
        for other in TO_KEYS.keys() - {name}:
            TO_KEYS[other](adata, other)
            kept = outcome(adata)
            with pytest.raises(ValueError, match=rf"sc_noise2self.remove\(adata, '{other}'\) first"):
                TO_KEYS[name](adata, other)
            assert outcome(adata) == kept
        TO_KEYS[name](adata, "again")
        TO_KEYS[name](adata, "again")

    def test_results_survive_what_scanpy_writes(self):
        adata = denoised(key_added="n2s_pca")
        expected = n2s.get.denoised(adata, key="n2s_pca")
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        sc.pp.pca(adata, n_comps=3)
        pd.testing.assert_frame_equal(n2s.get.denoised(adata, key="n2s_pca"), expected)

    def test_seeds_that_files_do_not_keep(self, tmp_path):
        with pytest.raises(ValueError, match=r"a seed is below 2\*\*63"):
            n2s.denoise(cells(), random_state=2**63, **QUICK)
        adata = denoised(random_state=2**63 - 1, write_layer=False)
        adata.write_h5ad(tmp_path / "a.h5ad")
        assert ad.read_h5ad(tmp_path / "a.h5ad").uns["denoised"]["params"]["random_state"] == 2**63 - 1


def test_a_wrong_key_lists_the_results():
    adata = denoised(key_added="mine")
    n2s.select_rank(adata, max_rank=3)
    for read in (n2s.get.denoised, n2s.report, n2s.get.lazy):
        with pytest.raises(KeyError, match="there is no result 'denoised': .* the results in adata are 'mine'"):
            read(adata)
    with pytest.raises(KeyError, match="the results in adata are 'mine', 'select_rank'"):
        n2s.pl.loss(adata, key="denoised")
    assert layer_names(adata) == {"mine"}
