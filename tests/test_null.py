"""Counts with nothing to learn keep what they promise to keep, and nothing else."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import dense

import sc_noise2self as n2s
from sc_noise2self._read import clear_gains


@pytest.mark.parametrize("kind", ["shuffled", "permuted"])
def test_type_dtype_and_seed_are_kept_and_the_input_is_not_changed(simulated, array_type, kind):
    counts = array_type(simulated.toarray().astype(np.int32))
    before = dense(counts).copy()
    null = n2s.null_counts(counts, kind)
    assert type(null) is type(counts)
    assert null.dtype == counts.dtype
    assert null.shape == counts.shape
    np.testing.assert_array_equal(dense(counts), before)
    np.testing.assert_array_equal(dense(n2s.null_counts(counts, kind)), dense(null))
    assert (dense(n2s.null_counts(counts, kind, random_state=1)) != dense(null)).any()
    assert (dense(null) != before).any()


def test_shuffled_keeps_both_totals_and_leaves_independent_genes(simulated):
    null = n2s.null_counts(simulated)
    np.testing.assert_array_equal(null.sum(axis=0), simulated.sum(axis=0))
    np.testing.assert_array_equal(null.sum(axis=1), simulated.sum(axis=1))
    expected = np.outer(simulated.sum(axis=1), simulated.sum(axis=0)) / simulated.sum()
    dispersion = np.square(null.toarray() - expected).sum() / expected.sum()
    assert dispersion == pytest.approx(1, abs=0.05)  # Poisson; thousands of entries
    assert np.square(simulated.toarray() - expected).sum() / expected.sum() > 2


def test_permuted_keeps_each_gene_within_bins_of_depth(simulated):
    null = n2s.null_counts(simulated, "permuted").toarray()
    x = simulated.toarray()
    for cells in np.array_split(np.argsort(x.sum(axis=1), kind="stable"), 20):
        np.testing.assert_array_equal(np.sort(null[cells], axis=0), np.sort(x[cells], axis=0))
    rates = [m / m.sum(axis=1, keepdims=True) for m in (x, null)]
    spectra = [np.linalg.svd(m - m.mean(axis=0), compute_uv=False) ** 2 for m in rates]
    assert spectra[1].sum() == pytest.approx(spectra[0].sum(), rel=0.05)  # genes vary as much,
    assert spectra[1][:4].sum() < 0.5 * spectra[0][:4].sum()  # but no longer together


def test_counts_of_anndata(adata):
    adata.layers["counts"], adata.X = adata.X, adata.X * 0.5
    adata.obs["label"] = "a"
    n2s.denoise(adata, layer="counts")
    null = n2s.null_counts(adata, layer="counts")
    assert sp.issparse(null.X)
    assert list(null.obs.columns) == ["label"]
    assert not len(null.var.columns)
    with pytest.warns(UserWarning, match="no candidate predicts"):
        n2s.denoise(null)
    assert not null.var["denoised_gain"].any()


@pytest.mark.parametrize(("n_cells", "n_genes", "depth"), [(200, 1500, 500), (150, 1000, 200), (200, 300, 300)])
def test_a_floor_alone_is_no_pattern(n_cells, n_genes, depth):
    """A floor under rare genes gains 0.0001 nats, clearly, on counts without any structure: the mean is written."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        share = np.exp(rng.normal(0, 1.5, n_genes))
        size = depth * np.exp(rng.normal(0, 0.35, (n_cells, 1)))
        adata = ad.AnnData(rng.poisson(size * share / share.sum()).astype(np.float32))
        with pytest.warns(UserWarning, match="no candidate predicts"):
            n2s.denoise(adata, random_state=seed, write_layer=False)


def test_genes_without_a_pattern_are_seldom_said_to_have_gained_one():
    """Half of the genes differ between three groups; of the others one in forty is called better by chance."""
    rng = np.random.default_rng(0)
    share = np.exp(rng.normal(0, 1.2, 800))
    groups = np.stack([share, share, share])
    groups[:, :400] *= rng.gamma(1, 1, (3, 400))
    groups[:, :400] *= share[:400].sum() / groups[:, :400].sum(axis=1, keepdims=True)
    rates = groups / groups.sum(axis=1, keepdims=True)
    adata = ad.AnnData(rng.poisson(1500 * rates[np.arange(600) % 3]).astype(np.float32))
    n2s.denoise(adata, write_layer=False)
    gained = clear_gains(adata, "denoised")["gained"]
    cells = (adata.X > 0).sum(axis=0)
    assert not gained[cells < 40].any()
    assert gained[:400].mean() > 0.5
    assert gained[400:].mean() < 0.05


def test_parts_of_denoised_counts_can_be_denoised(adata):
    """Columns of a result do not go along: they would not hold, and would stand in the way."""
    n2s.denoise(adata)
    first, second = n2s.split_molecules(adata)
    assert not set(first.obs) | set(first.var)
    n2s.denoise(first)
    assert "denoised" in first.layers
    assert "denoised" not in second.layers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dealt"}, "kind is 'dealt': pass one of shuffled, permuted"),
        ({"layer": "counts"}, "layer='counts' was given with a matrix"),
    ],
)
def test_bad_arguments(simulated, arguments, message):
    with pytest.raises(ValueError, match=message):
        n2s.null_counts(simulated, **arguments)
    with pytest.raises(ValueError, match="molecule splitting needs raw counts"):
        n2s.null_counts(ad.AnnData(simulated * 0.3))
