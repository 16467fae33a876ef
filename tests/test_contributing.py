"""The denoiser that the page for contributors shows works wherever a method does, with the one line that it says."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.sparse as sp
from contributed import Centroids, blocks
from promises import Result, check_all, difference, documented_warnings, fingerprint
from strategies import Data

import sc_noise2self as n2s
from sc_noise2self.methods import REGISTRY

EXAMPLE = Data(n_cells=60, n_genes=40, depth=300, has_extras=True, seed=1)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(REGISTRY, "centroids", [Centroids])
    yield
    plt.close("all")


@pytest.fixture
def adata():
    return EXAMPLE.adata()


def test_a_name_stands_for_the_object(adata):
    by_object = n2s.denoise(adata, Centroids(), copy=True)
    n2s.denoise(adata, "centroids")
    assert not difference(fingerprint(by_object), fingerprint(adata))
    record = adata.uns["denoised"]
    assert record["method"] == "centroids"
    assert list(record["members"]["name"]) == ["centroids"]
    assert record["gain"] > 5 * record["gain_error"]
    table = record["learned"]["centroids"]["table"]
    assert list(table["n_clusters"]) == [2, 5, 10, 20]
    assert record["members"]["setting"][0] == f"n_clusters={table['n_clusters'][table['chosen']].item()}"
    check_all(Result(adata, EXAMPLE.counts().astype(float)))


@pytest.mark.parametrize("mix", [False, True])
def test_it_joins_an_ensemble(adata, mix):
    n2s.denoise(adata, [n2s.PCA(), Centroids(n_clusters=8)], mix=mix)
    members = adata.uns["denoised"]["members"]
    assert any(name.startswith("pca") for name in members["name"])
    check_all(Result(adata, EXAMPLE.counts().astype(float)))


def test_a_method_that_writes_into_its_counts_changes_nothing_of_anybody_else():
    """Canonical float32 counts are given to methods as they are in memory."""

    class Careless(Centroids):
        name = "careless"

        def denoise_counts(self, counts, rng):
            found = super().denoise_counts(counts, rng)
            counts.in_memory().data[:] += 1
            return found

    adata = EXAMPLE.adata()
    adata.X = sp.csr_matrix(np.asarray(EXAMPLE.counts(), np.float32))
    before = adata.X.toarray()
    both = [Careless(n_clusters=4), Centroids(n_clusters=4)]
    found, expected = (n2s.denoise(adata, methods, copy=True) for methods in (both, [both[1], both[1]]))
    np.testing.assert_array_equal(adata.X.toarray(), before)
    assert found.uns["denoised"]["gain"] == pytest.approx(expected.uns["denoised"]["gain"])


def test_of_several_numbers_of_clusters_the_loss_chooses(adata):
    found = n2s.calibrate(adata, Centroids(), {"n_clusters": [2, 4, 8, 16]})
    assert list(found.table["n_clusters"]) == [2, 4, 8, 16]
    assert found.table["loss"].idxmin() == found.table["chosen"].idxmax()
    assert found.best["n_clusters"] in (2, 4, 8, 16)


def test_a_file_is_denoised_by_its_name(adata, tmp_path):
    adata.write_h5ad(tmp_path / "in.h5ad")
    said = n2s.denoise_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", method="centroids")
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    n2s.denoise(adata, "centroids")
    np.testing.assert_allclose(found.layers["denoised"], adata.layers["denoised"], rtol=1e-4, atol=1e-5)
    assert said == n2s.report(adata)


def test_it_is_reported_and_drawn(adata):
    n2s.denoise(adata, "centroids")
    with documented_warnings():
        assert n2s.report(adata).startswith("The mean of a cell's cluster (n_clusters=")
        axes = n2s.pl.loss(adata, key="denoised", show=False)
        assert axes.has_data()
        assert "n_clusters" in axes.get_xlabel()
        assert n2s.pl.gain_per_gene(adata, show=False).has_data()


def test_options_are_checked_against_the_counts(adata):
    with pytest.raises(ValueError, match="n_clusters is 61: 60 is the most that 60 cells allow"):
        n2s.denoise(adata, Centroids(n_clusters=61))
    assert "denoised" not in adata.uns


def test_the_calls_of_the_page_run(adata, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adata.write_h5ad("in.h5ad")
    exec(blocks()[1], {"n2s": n2s, "Centroids": Centroids, "adata": adata})
    assert (tmp_path / "out.h5ad").exists()
