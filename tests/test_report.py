"""The honesty aids: what each gene gained, and the paragraph that says what a result is worth."""

import anndata as ad
import numpy as np
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
    text, record = n2s.report(pbmc), pbmc.uns["denoised"]
    assert "\n" not in text
    assert text.startswith(f"PCA of log1p ({record['members']['rank'][0]} components worth more than noise")
    assert f"{record['gain']:.3f} +- {record['gain_error']:.3f} nats per molecule" in text
    assert f"{record['gain_molecules']:,} held-out molecules of 700 cells" in text
    gained = (pbmc.var["denoised_gain"] > 2 * pbmc.var["denoised_gain_error"]).sum()
    assert f"Of {pbmc.var['denoised_gain'].notna().sum()} genes {gained} are predicted better" in text
    assert "circular" in text
    assert "Warnings" not in text


def test_report_of_mixing_layers_scales_and_ensembles(adata):
    adata.layers["counts"], adata.X = adata.X, None
    n2s.denoise(adata, ["pca", "knn"], layer="counts", mix=True, scale="rates", key_added="m")
    text = n2s.report(adata, key="m")
    assert "of the counts in layer 'counts', with each cell's own count of a gene mixed back in" in text
    assert "share of each gene in the cell's molecules" in text
    assert f"{adata.uns['m']['unmixed_gain']:.3f} without mixing" in text
    assert "compare with mix=False" in text
    assert "% PCA of" in text


def test_report_repeats_the_warnings_and_survives_a_file(adata, tmp_path):
    adata.X = sp.diags_array(np.float32(np.arange(300) != 3)) @ adata.X
    with pytest.warns(UserWarning, match="hold no molecule"):
        n2s.denoise(adata, write_layer=False)
    assert "Warnings: 1 cell(s) hold no molecule and stay zero" in n2s.report(adata)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert n2s.report(ad.read_h5ad(tmp_path / "a.h5ad")) == n2s.report(adata)


def test_report_of_nothing_gained(adata):
    null = n2s.null_counts(adata)
    with pytest.warns(UserWarning, match="no candidate"):
        n2s.denoise(null)
    text = n2s.report(null)
    assert text.startswith("The mean profile of the counts in X, which none of 9 candidates beats")
    assert "predicted no better than by one mean profile" in text
    assert "No gene is predicted better than its mean." in text
    with pytest.raises(KeyError, match="there is no result 'denoised'"):
        n2s.report(adata)


def test_report_goes_by_what_was_written(adata):
    null = n2s.null_counts(adata)
    with pytest.warns(UserWarning, match="no candidate"):
        n2s.denoise(null)
    null.uns["denoised"]["gain"], null.uns["denoised"]["gain_error"] = 1e-6, 1e-7  # clear, and no more than rounding
    text = n2s.report(null)
    assert "predicted no better than by one mean profile" in text
    assert "it predicts the other half" not in text


def test_report_of_some_cells_and_of_genes_that_are_not_scored(adata):
    adata.X = adata.X @ sp.diags_array(np.float32(np.arange(120) >= 7))
    n2s.denoise(adata, write_layer=False)
    gain, error = adata.var["denoised_gain"], adata.var["denoised_gain_error"]
    n_unclear = int((gain.abs() <= 2 * error).sum() + (gain.notna() & error.isna()).sum())
    text = n2s.report(adata[:50].copy())
    assert "held-out molecules of the 300 cells that were denoised, of which 50 are here" in text
    assert f"The other {gain.isna().sum()} of 120 genes have too few molecules to be scored." in text
    adata.var["denoised_gain"] = gain.abs()
    text = n2s.report(adata)
    assert "are predicted worse" not in text
    assert f"for {n_unclear} the molecules do not tell: do not trust the pattern of these." in text
    adata.var["denoised_gain"] = np.where(np.arange(120) < 20, -1, gain.abs())
    assert "are predicted worse: do not trust the pattern of either." in n2s.report(adata)


def test_report_of_a_model_applied_to_other_cells(adata, tmp_path):
    pytest.importorskip("torch")
    old, new = adata[:200].copy(), adata[200:].copy()
    network = n2s.Autoencoder(width=8, device="cpu", n_hidden=32, n_epochs=40)
    n2s.denoise(old, network, save_model=tmp_path / "m.pt")
    assert n2s.report(old).startswith("An autoencoder (width 8) of the counts in X")
    n2s.denoise_with(new, tmp_path / "m.pt", device="cpu")
    text = n2s.report(new)
    assert text.startswith("A model fitted to other cells, an autoencoder (width 8), applied to the counts in X")
    assert "From half of these cells' molecules" in text
    molecules = np.asarray(new.X.sum(axis=0)).ravel()
    mean = np.nansum(new.var["denoised_gain"] * molecules) / molecules.sum()
    assert mean == pytest.approx(new.uns["denoised"]["gain"], rel=0.02)
