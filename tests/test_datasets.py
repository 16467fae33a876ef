"""Counts that come with scanpy, and a file that is downloaded once and checked."""

import hashlib

import numpy as np
import pytest
import scanpy as sc
from helpers import scanpy_settings

import sc_noise2self as n2s
from sc_noise2self import datasets


def test_bundled_counts(pbmc, real_data):
    reference = real_data("tiny_pbmc68k_reduced_700")
    assert list(pbmc.obs_names) == list(reference.obs_names)
    assert list(pbmc.var_names) == list(reference.var_names)
    assert (pbmc.X != reference.X).nnz == 0


def test_bundled_counts_are_counts(pbmc):
    assert pbmc.shape == (700, 765)
    assert (pbmc.X.data == np.rint(pbmc.X.data)).all()
    assert pbmc.X.data.min() == 1


def test_bundled_counts_are_the_layer_where_scanpy_has_one(pbmc, monkeypatch):
    """As in scanpy 1.13, which keeps counts; `raw` goes there once its next presets come."""
    newer = sc.datasets.pbmc68k_reduced()
    newer.layers["counts"] = pbmc.X.astype(np.int32)
    del newer.raw
    monkeypatch.setattr(sc.datasets, "pbmc68k_reduced", lambda: newer)
    found = n2s.datasets.pbmc68k_reduced()
    assert (found.X != pbmc.X).nnz == 0
    assert found.X.dtype == np.float32
    assert list(found.var_names) == list(pbmc.var_names)
    assert list(found.obs.columns) == list(pbmc.obs.columns)


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A small file of the layout of paul15.h5, where scanpy keeps its own."""
    h5py = pytest.importorskip("h5py")
    pytest.importorskip("pooch")
    path = tmp_path / "paul15" / "paul15.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["data"] = np.arange(6, dtype=np.int32).reshape(3, 2)
        file["data.debatched"] = np.full((3, 2), 0.5)
        file["data_rownames"] = [b"Mpo", b"Klf1;Eklf", b"Ifitm1"]
        file["data_colnames"] = [b"W1", b"W2"]
        file["cluster.id"] = [[7.0], [15.0]]
    monkeypatch.delenv("SC_NOISE2SELF_DATA", raising=False)
    monkeypatch.setattr(datasets, "_PAUL15_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(datasets, "_PAUL15", "https://localhost:1/nowhere")
    with scanpy_settings(datasetdir=tmp_path):
        yield path


def test_paul15_reads_the_raw_counts_of_the_file(downloaded):
    found = n2s.datasets.paul15()
    np.testing.assert_array_equal(found.X.toarray(), [[0, 2, 4], [1, 3, 5]])
    assert found.X.dtype == np.float32
    assert list(found.var_names) == ["Mpo", "Klf1", "Ifitm1"]
    assert list(found.obs["paul15_clusters"]) == ["7MEP", "15Mo"]


def test_paul15_does_not_take_another_file(downloaded):
    downloaded.write_bytes(downloaded.read_bytes() + b"x")
    with pytest.raises(OSError, match="localhost"):  # it would be downloaded again
        n2s.datasets.paul15()


def test_paul15_says_what_a_download_needs(downloaded, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(ImportError, match="pip install pooch"):
        n2s.datasets.paul15()


def test_paul15_from_the_folder_of_real_counts(real_data):
    found, reference = n2s.datasets.paul15(), real_data("paul15_myeloid")
    assert (found.X != reference.X).nnz == 0
    assert list(found.obs["paul15_clusters"]) == list(reference.obs["paul15_clusters"])
    assert list(found.obs["paul15_clusters"].cat.categories)[:2] == ["1Ery", "2Ery"]
