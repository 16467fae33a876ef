"""The honesty aids: what each gene gained, and the report that says what a result is worth."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import sc_noise2self as n2s
from sc_noise2self._read import clear_gains


def half_constant(n_cells, n_genes, seed):
    """Counts of which every other gene has the same share in every cell, and which genes those are."""
    rng = np.random.default_rng(seed)
    programmes = rng.gamma(0.3, size=(4, n_genes)) + 0.02
    constant = np.arange(n_genes) % 2 == 1
    programmes[:, constant] = programmes[0, constant]
    programmes[:, ~constant] *= (programmes[0, ~constant].sum() / programmes[:, ~constant].sum(axis=1))[:, None]
    profiles = rng.dirichlet(np.full(4, 0.5), size=n_cells) @ programmes
    profiles /= profiles.sum(axis=1, keepdims=True)
    return ad.AnnData(sp.csr_matrix(rng.poisson(profiles * 800).astype(np.float32))), constant


@pytest.mark.parametrize("options", [{}, {"mix": True}, {"method": "knn"}, {"n_splits": 2}])
def test_genes_that_vary_gain_and_constant_ones_do_not(options):
    adata, constant = half_constant(600, 200, seed=0)
    n2s.denoise(adata, write_layer=False, **options)
    clear = clear_gains(adata, "denoised")
    assert clear["gained"][~constant].mean() > 0.85
    # No better prediction than the mean exists for those: 2.3 % would pass two errors by chance if it were as good.
    assert clear["gained"][constant].mean() <= 0.05
    assert not (clear["gained"] & clear["lost"]).any()


def test_gains_of_genes_add_up_to_the_gain(pbmc):
    n2s.denoise(pbmc)
    molecules = np.asarray(pbmc.X.sum(axis=0)).ravel()
    mean = (pbmc.var["denoised_gain"] * molecules).sum() / molecules.sum()
    assert mean == pytest.approx(pbmc.uns["denoised"]["gain"], rel=1e-4)


def test_a_second_result_replaces_the_gains_of_the_first(adata):
    n2s.denoise(adata)
    first = adata.var["denoised_gain"].copy()
    n2s.denoise(adata, method="knn")
    assert (adata.var["denoised_gain"] != first).any()
    assert list(adata.var.columns) == ["denoised_gain", "denoised_gain_error", "denoised_total", "denoised_phi"]


def test_report_says_what_was_done_and_what_it_gained(pbmc):
    n2s.denoise(pbmc)
    text, record = n2s.report(pbmc, detail=True), pbmc.uns["denoised"]
    assert "\n" not in text
    assert text.startswith(f"PCA of log1p ({record['members']['rank'][0]} components worth more than noise")
    assert f"{record['gain']:.3f} +- {record['gain_error']:.3f} nats per molecule" in text
    assert f"{record['gain_molecules']:,} held-out molecules of 700 cells" in text
    gained = (pbmc.var["denoised_gain"] > 2 * pbmc.var["denoised_gain_error"]).sum()
    assert f"Of {pbmc.var['denoised_gain'].notna().sum()} genes {gained} are predicted better" in text
    assert "circular" in text
    assert "Warnings" not in text


def test_a_report_says_where_components_ran_out(adata):
    n2s.denoise(adata, n2s.PCA(transform="log1p", n_components=2))
    assert n2s.report(adata).startswith("PCA of log1p (all 2 components tried worth more than noise")


def test_report_of_mixing_layers_scales_and_ensembles(adata):
    adata.layers["counts"], adata.X = adata.X, None
    n2s.denoise(adata, ["pca", "knn"], layer="counts", mix=True, scale="rates", key_added="m")
    text, share = n2s.report(adata, key="m", detail=True), adata.uns["m"]["evidence"]
    assert (
        f"of the counts in layer 'counts', with each cell's own count of a gene mixed back in ({share:.0%} of it)"
        in text
    )
    assert "share of each gene in the cell's molecules" in text
    assert f"{adata.uns['m']['unmixed_gain']:.3f} without mixing" in text
    assert "compare with mix=False" in text
    assert "% PCA of" in text


def test_report_repeats_the_warnings_and_survives_a_file(adata, tmp_path):
    adata.X = sp.diags_array(np.float32(np.arange(300) != 3)) @ adata.X
    with pytest.warns(UserWarning, match="hold no molecule"):
        n2s.denoise(adata, write_layer=False)
    assert "Warnings: 1 cell(s) hold no molecule and stay zero" in n2s.report(adata, detail=True)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert n2s.report(ad.read_h5ad(tmp_path / "a.h5ad"), detail=True) == n2s.report(adata, detail=True)


def test_report_of_nothing_gained(adata):
    null = n2s.null_counts(adata)
    with pytest.warns(UserWarning, match="no candidate"):
        n2s.denoise(null)
    text = n2s.report(null, detail=True)
    assert text.startswith("The mean profile of the counts in X, which none of 14 candidates beats")
    assert "predicted no better than by one mean profile" in text
    assert "No gene is predicted better than its mean." in text
    with pytest.raises(KeyError, match="there is no result 'denoised'"):
        n2s.report(adata, detail=True)


def test_report_goes_by_what_was_written(adata):
    null = n2s.null_counts(adata)
    with pytest.warns(UserWarning, match="no candidate"):
        n2s.denoise(null)
    null.uns["denoised"]["gain"], null.uns["denoised"]["gain_error"] = 1e-6, 1e-7  # clear, and no more than rounding
    text = n2s.report(null, detail=True)
    assert "predicted no better than by one mean profile" in text
    assert "it predicts the other half" not in text


def test_report_of_some_cells_and_of_genes_that_are_not_scored(adata):
    adata.X = adata.X @ sp.diags_array(np.float32(np.arange(120) >= 7))
    n2s.denoise(adata, write_layer=False)
    gain, error = adata.var["denoised_gain"], adata.var["denoised_gain_error"]
    n_unclear = int((gain.abs() <= 2 * error).sum() + (gain.notna() & error.isna()).sum())
    text = n2s.report(adata[:50].copy(), detail=True)
    assert "held-out molecules of the 300 cells that were denoised, of which 50 are here" in text
    assert f"The other {gain.isna().sum()} of 120 genes have too few molecules to be scored." in text
    adata.var["denoised_gain"] = gain.abs()
    text = n2s.report(adata, detail=True)
    assert "are predicted worse" not in text
    assert f"for {n_unclear} the molecules do not tell: do not trust the pattern of these." in text
    adata.var["denoised_gain"] = np.where(np.arange(120) < 20, -1, gain.abs())
    assert "are predicted worse: do not trust the pattern of either." in n2s.report(adata, detail=True)


def test_report_of_several_models_names_them_all(adata, tmp_path):
    old, new = adata[:200].copy(), adata[200:].copy()
    n2s.denoise(old, [n2s.PCA(transform="log1p"), n2s.PCA(transform="none")], save_model=tmp_path / "m.npz")
    n2s.denoise_with(new, tmp_path / "m.npz")
    members = new.uns["denoised"]["members"]
    assert len(members["described"]) > 1
    parts = [f"{weight:.0%} {part}" for weight, part in zip(members["weight"], members["described"], strict=True)]
    assert f"other cells, {', '.join(parts[:-1])} and {parts[-1]}, applied to" in n2s.report(new, detail=True)


def test_report_of_a_model_applied_to_other_cells(adata, tmp_path):
    pytest.importorskip("torch")
    old, new = adata[:200].copy(), adata[200:].copy()
    network = n2s.Autoencoder(width=8, device="cpu", n_hidden=32, n_epochs=40)
    n2s.denoise(old, network, save_model=tmp_path / "m.pt")
    said = "An autoencoder (width 8), the mean of 3 fits of the counts in X"
    assert n2s.report(old, detail=True).startswith(said)
    n2s.denoise_with(new, tmp_path / "m.pt", device="cpu")
    text = n2s.report(new, detail=True)
    assert text.startswith(
        "A model fitted to other cells, an autoencoder (width 8), the mean of 3 fits, applied to the counts in X"
    )
    assert "From half of these cells' molecules" in text
    molecules = np.asarray(new.X.sum(axis=0)).ravel()
    mean = np.nansum(new.var["denoised_gain"] * molecules) / molecules.sum()
    assert mean == pytest.approx(new.uns["denoised"]["gain"], rel=0.02)


def test_report_is_three_short_lines_that_say_what_to_do(pbmc):
    n2s.denoise(pbmc, write_layer=False)
    record = pbmc.uns["denoised"]
    done, gained, genes = n2s.report(pbmc).split("\n")
    assert max(map(len, (done, gained, genes))) < 160
    assert done.startswith("PCA of log1p (")
    assert done.endswith("of the counts in X, the best of 14 candidates.")
    assert gained.startswith(f"Gain {record['gain']:.3f} +- {record['gain_error']:.3f} nats per held-out molecule")
    assert "in 700 cells; 90 % intervals held 90." in gained
    n_gained = (pbmc.var["denoised_gain"] > 2 * pbmc.var["denoised_gain_error"]).sum()
    assert genes.startswith(f"Of 765 genes {n_gained} are predicted better than by their mean and ")
    assert genes.endswith(" Use the values to look, and test on the counts.")


def test_three_lines_of_an_ensemble_name_its_members_and_count_the_warnings(adata):
    adata.X = sp.diags_array(np.float32(np.arange(300) != 3)) @ adata.X
    with pytest.warns(UserWarning, match="hold no molecule"):
        n2s.denoise(adata, ["pca", "knn"], write_layer=False)
    done, _, genes = n2s.report(adata).split("\n")
    titles = adata.uns["denoised"]["members"]["title"]
    assert all(f"% {title}" in done for title in titles)
    assert "components" not in done
    assert " 1 warning: see detail=True. Use the values to look" in genes


def test_three_lines_of_nothing_gained_say_so(adata):
    null = n2s.null_counts(adata)
    with pytest.warns(UserWarning, match="no candidate"):
        n2s.denoise(null)
    said = n2s.report(null)
    assert "Molecules held out of 300 cells do not tell that it predicts them better than one mean profile" in said
    assert "Gain" not in said


def test_where_only_mixing_gains_every_form_says_so():
    rng = np.random.default_rng(0)
    means = 1500 * rng.gamma(8, 1 / 8, (300, 1)) * rng.dirichlet(np.full(100, 2.0))
    adata = ad.AnnData(rng.poisson(means * rng.gamma(2, 0.5, means.shape)).astype(np.float32))
    with pytest.warns(UserWarning, match="no candidate predicts") as warned:
        n2s.denoise(adata, n2s.Clusters(resolution=0, n_pcs=1), mix=True, write_layer=False)
    record = adata.uns["denoised"]
    assert record["gain"] > 0.1 > abs(record["unmixed_gain"])
    assert f"(best gain {record['unmixed_gain']:.4f}" in str(warned[0].message)
    for text in (n2s.report(adata), n2s.report(adata, detail=True)):
        assert f"{record['gain']:.3f} +- {record['gain_error']:.3f}" in text
        assert "mix" in text


def test_report_as_a_frame_has_a_row_for_each_figure(pbmc):
    n2s.denoise(pbmc, mix=True, write_layer=False)
    record, found = pbmc.uns["denoised"], n2s.report(pbmc, as_frame=True)
    assert list(found.columns) == ["value", "error", "of"]
    assert found.index.is_unique
    assert found["value"]["gain"] == record["gain"]
    assert found["error"]["gain"] == record["gain_error"]
    assert found["value"]["gain without mixing"] == record["unmixed_gain"]
    assert found["value"]["coverage"] == pytest.approx(0.9, abs=0.02)
    assert found["of"]["gain"] == "the 700 cells that were denoised"
    genes = [name for name in found.index if name.startswith("genes ")]
    assert found["value"][genes].sum() == 765
    assert (found["value"]["candidates"], found["value"]["warnings"]) == (14, 0)


def test_report_shows_its_figures_in_a_notebook(adata):
    adata.obs_names = adata.obs_names.str.replace("cell", "<b>")
    n2s.denoise(adata, write_layer=False, key_added="a<b>")
    for detail in (False, True):
        shown = n2s.report(adata, key="a<b>", detail=detail)._repr_html_()
        assert "<b>" not in shown
        assert "genes gained" in shown
        assert shown.count("<br>") == (0 if detail else 2)


@pytest.fixture(scope="module")
def whole():
    out = n2s.datasets.pbmc68k_reduced()
    n2s.denoise(out, write_layer=False)
    return out


class TestSubset:
    """Figures of a subset are true of it, or are said to be of the whole."""

    @pytest.mark.parametrize("copied", [False, True])
    def test_cells_have_their_own_gain(self, whole, copied):
        mask = (whole.obs["bulk_labels"] == "Dendritic").to_numpy()
        part = whole[mask].copy() if copied else whole[mask]
        own = np.average(whole.obs["denoised_gain"][mask], weights=whole.obs["denoised_size"][mask])
        figures = n2s.report(part, as_frame=True)
        assert figures["value"]["gain here"] == pytest.approx(own)
        assert figures["value"]["coverage here"] == pytest.approx(whole.obs["denoised_coverage"][mask].mean())
        assert figures["of"]["gain here"] == f"{mask.sum()} cells here"
        assert figures["of"]["genes gained"] == "765 genes, over all 700 cells that were denoised"
        _, gained, genes = n2s.report(part).split("\n")
        assert gained.startswith(f"Gain {own:.3f} +- ")
        assert f"in the {mask.sum()} cells here, {whole.uns['denoised']['gain']:.3f} +- " in gained
        assert "in all 700 cells" in gained
        assert "worse, over all 700 cells." in genes
        text = n2s.report(part, detail=True)
        assert f"In the cells here the gain is {own:.3f} +- " in text
        assert "Gains of genes are over all 700 cells that were denoised." in text

    def test_genes_are_counted_here(self, whole):
        part = whole[:, ::20]
        figures = n2s.report(part, as_frame=True)
        assert "gain here" not in figures.index
        assert figures["of"]["gain"] == "the 700 cells that were denoised, over all 765 genes"
        assert figures["of"]["genes gained"] == "39 genes"
        _, gained, genes = n2s.report(part).split("\n")
        assert "in 700 cells, over all 765 genes;" in gained
        assert genes.startswith("Of 39 genes ")
        assert "Gains of cells are over all 765 genes that were denoised." in n2s.report(part, detail=True)
        assert n2s.report(part, groupby="expression")["coverage"].isna().all()

    def test_one_cell_tells_no_gain_of_its_own(self, whole):
        assert "cells here" not in n2s.report(whole[:1])
        assert "inf" not in n2s.report(whole[:1], detail=True)

    def test_tenths_by_depth_are_those_of_the_cells_here(self, whole):
        part = whole[::7]
        table = n2s.report(part, groupby="depth")
        assert list(table["n"]) == [10] * 10
        deepest = part.obs["denoised_size"].to_numpy().argsort(kind="stable")[-10:]
        assert table["coverage"][10] == pytest.approx(part.obs["denoised_coverage"].iloc[deepest].mean())


def test_groups_come_in_the_order_of_their_categories_and_missing_ones_are_left_out(adata):
    n2s.denoise(adata, write_layer=False)
    labels = [None if i % 7 == 0 else str(i % 11) for i in range(adata.n_obs)]
    adata.obs["leiden"] = pd.Categorical(labels, categories=[str(i) for i in range(12)])
    assert list(n2s.report(adata, groupby="leiden").index) == [str(i) for i in range(11)]
    adata.obs["number"] = [float(i % 2) for i in range(adata.n_obs)]
    assert list(n2s.report(adata, groupby="number").index) == ["0.0", "1.0"]
    adata.obs["score"] = np.linspace(0, 1, adata.n_obs)
    with pytest.raises(ValueError, match=r"adata.obs\['score'\] holds numbers, not groups"):
        n2s.report(adata, groupby="score")
    adata.obs["depth"] = "low"
    with pytest.raises(ValueError, match="'depth' means tenths by depth, and adata.obs has a column of that name"):
        n2s.report(adata, groupby="depth")


def test_as_many_cells_of_another_sample_are_not_taken_for_those_that_were_denoised(tmp_path):
    """Samples denoised by one model and joined keep the first one's record, whose figures are not the second's."""
    whole = n2s.datasets.pbmc68k_reduced()[:400].copy()
    n2s.denoise(whole, n2s.PCA(transform="log1p", n_components=5), save_model=tmp_path / "m.npz")
    samples = {name: whole[rows].copy() for name, rows in (("a", slice(0, 200)), ("b", slice(200, 400)))}
    for each in samples.values():
        n2s.remove(each)
        n2s.denoise_with(each, tmp_path / "m.npz")
    both = ad.concat(samples, label="sample", merge="first", uns_merge="first")
    first, second = (both[both.obs["sample"] == name].copy() for name in ("a", "b"))
    assert n2s.report(first) == n2s.report(samples["a"])
    own = samples["b"].uns["denoised"]["gain"]
    assert f"Gain {own:.3f}" in n2s.report(second)
    assert "in the 200 cells here" in n2s.report(second)
    n2s.pl.markers(second, list(second.var_names[:2]), show=False)


def test_a_report_of_no_cells_or_genes_has_nothing_to_tell_and_says_so(adata):
    n2s.denoise(adata, write_layer=False)
    adata.obs["kind"] = pd.Categorical([None] * adata.n_obs, categories=["a"])
    assert f"{adata.uns['denoised']['gain']:.3f}" in n2s.report(adata[:0])
    for part, groupby in ((adata[:0], "depth"), (adata[:, :0], "expression"), (adata, "kind")):
        table = n2s.report(part, groupby=groupby)
        assert list(table) == ["n", "gain", "gain_error", "coverage"]
        assert not len(table)
    with pytest.raises(TypeError, match="groupby is"):
        n2s.report(adata, groupby=["depth"])


def test_forms_of_a_report_exclude_each_other(adata):
    n2s.denoise(adata, write_layer=False)
    for options, names in [
        ({"groupby": "depth", "detail": True}, "groupby and detail"),
        ({"detail": True, "as_frame": True}, "detail and as_frame"),
    ]:
        with pytest.raises(ValueError, match=f"{names} were given: each asks for another form"):
            n2s.report(adata, **options)
    with pytest.raises(TypeError, match="detail is 1: pass True or False"):
        n2s.report(adata, detail=1)
