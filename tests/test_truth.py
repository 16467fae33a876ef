"""Nothing is invented, on real counts: genes of another species, and strict markers in cells of another type."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

import sc_noise2self as n2s

pytestmark = [pytest.mark.real, pytest.mark.slow]
MORE = 1.2  # times what was counted


@pytest.fixture(scope="module")
def two_species(real_data):
    """Return human blood beside mouse marrow, on genes of their own, shuffled; the species of cells and of genes."""
    parts = [real_data(name).X[:1200] for name in ("pbmc3k_10x", "paul15_myeloid")]
    parts = [x[:, np.asarray((x > 0).sum(axis=0)).ravel() >= 3] for x in parts]
    species = np.repeat([0, 1], [x.shape[0] for x in parts])
    order = np.random.default_rng(0).permutation(len(species))
    counts = sp.block_diag(parts).tocsr().astype(np.float32)[order]
    return ad.AnnData(counts), species[order], np.repeat([0, 1], [x.shape[1] for x in parts])


@pytest.mark.parametrize("method", ["pca", "diffusion", "autoencoder"])
def test_no_cell_is_given_genes_of_another_species(two_species, method):
    if method == "autoencoder":
        pytest.importorskip("torch")
    adata, cells, genes = two_species
    n2s.denoise(adata, method)
    values = adata.layers["denoised"]
    for kind in (0, 1):
        own = values[cells == kind]
        assert own[:, genes != kind].sum() < 1e-4 * own.sum()


def test_strict_markers_are_not_raised_in_other_cells(real_data):
    adata = real_data("baron_human1_pancreas")
    n2s.denoise(adata)
    home = {"INS": "beta", "GCG": "alpha", "SST": "delta"}
    for gene in home:
        j = adata.var_names.get_loc(gene)
        for kind in set(home.values()) - {home[gene]}:
            cells = (adata.obs["cell_type"] == kind).to_numpy()
            assert adata.layers["denoised"][cells, j].mean() < MORE * adata.X[cells][:, j].mean()
