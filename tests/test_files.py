"""Files in, files out: the same result as in memory, and never half of one."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from helpers import low_rank_profiles, poisson_counts

import sc_noise2self as n2s
from sc_noise2self import files
from sc_noise2self.__main__ import main

pytest.importorskip("dask.array")
pytest.importorskip("zarr")


@pytest.fixture
def source(tmp_path):
    counts = poisson_counts(low_rank_profiles(150, 40, 3, seed=0), 300, seed=1)
    adata = ad.AnnData(counts.copy(), obs=pd.DataFrame({"batch": ["a", "b"] * 75}, index=[f"c{i}" for i in range(150)]))
    adata.var_names = [f"g{i}" for i in range(40)]
    adata.layers["counts"] = counts
    adata.X = counts * 0.5
    adata.obsm["X_pca"] = np.ones((150, 2))
    adata.obsp["distances"] = counts @ counts.T
    adata.uns["note"] = {"by": "hand"}
    adata.raw = adata
    adata.write_h5ad(tmp_path / "in.h5ad")
    return tmp_path / "in.h5ad"


def read(path):
    return ad.read_h5ad(path) if path.suffix == ".h5ad" else ad.read_zarr(path)


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
@pytest.mark.parametrize("write_layer", [True, False])
def test_a_file_holds_what_was_there_and_the_result(source, suffix, write_layer):
    before = source.read_bytes()
    target = source.with_name(f"out{suffix}")
    said = n2s.denoise_file(source, target, layer="counts", write_layer=write_layer, scale="rates")
    expected = ad.read_h5ad(source)
    n2s.denoise(expected, layer="counts", scale="rates")
    found = read(target)
    assert said == n2s.report(found) == n2s.report(expected)
    assert source.read_bytes() == before
    assert listed(source.parent) == ["in.h5ad", target.name]
    for slot in ("obsm", "varm"):
        for key in ("denoised", "denoised_scale"):
            np.testing.assert_array_equal(getattr(found, slot)[key], getattr(expected, slot)[key])
    assert ("denoised" in found.layers) is write_layer
    if write_layer:
        np.testing.assert_allclose(found.layers["denoised"], expected.layers["denoised"], rtol=1e-5)
        assert found.layers["denoised"].dtype == np.float32
    np.testing.assert_allclose(n2s.get.denoised(found, ["g3"]), n2s.get.denoised(expected, ["g3"]), rtol=1e-5)
    for a, b in (
        (found.X, expected.X),
        (found.layers["counts"], expected.layers["counts"]),
        (found.obsp["distances"], expected.obsp["distances"]),
        (found.raw.X, expected.raw.X),
    ):
        assert (a != b).nnz == 0
    np.testing.assert_array_equal(found.obsm["X_pca"], 1)
    assert list(found.obs["batch"]) == list(expected.obs["batch"])
    assert found.uns["note"]["by"] == "hand"


def test_zarr_to_h5ad_and_methods_that_load_the_counts(source):
    middle, target = source.with_name("middle.zarr"), source.with_name("out.h5ad")
    n2s.denoise_file(source, middle, layer="counts", write_layer=False)
    n2s.denoise_file(middle, target, layer="counts", key_added="mixed", mix=True, transform="log1p")
    expected, found = ad.read_h5ad(source), ad.read_h5ad(target)
    n2s.denoise(expected, layer="counts", key_added="mixed", mix=True, transform="log1p")
    np.testing.assert_allclose(found.layers["mixed"], expected.layers["mixed"], rtol=1e-4, atol=1e-6)
    assert "denoised" in found.obsm


def test_an_earlier_target_is_replaced_only_when_asked(source):
    target = source.with_name("out.h5ad")
    n2s.denoise_file(source, target, layer="counts", write_layer=False)
    first = target.read_bytes()
    with pytest.raises(FileExistsError, match=r"out.h5ad exists: nothing is overwritten, so choose another name"):
        n2s.denoise_file(source, target, layer="counts")
    assert target.read_bytes() == first
    n2s.denoise_file(source, target, layer="counts", overwrite=True)
    assert "denoised" in ad.read_h5ad(target).layers
    again = source.with_name("again.h5ad")
    n2s.denoise_file(target, again, layer="counts", write_layer=False)  # an earlier result is replaced whole
    assert n2s.report(ad.read_h5ad(again)) == n2s.report(ad.read_h5ad(target))
    assert "denoised" not in ad.read_h5ad(again).layers


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"source": "no.h5ad"}, FileNotFoundError, "no.h5ad does not exist: pass an .h5ad or .zarr file"),
        ({"target": "out.csv"}, ValueError, "out.csv does not end in .h5ad or .zarr: those are the formats written"),
        ({"target": "no/out.h5ad"}, FileNotFoundError, "no is not a folder: make it first"),
        ({"target": "in.h5ad", "overwrite": True}, FileExistsError, "in.h5ad is the source: choose another name"),
        ({"layer": "raw"}, ValueError, r"layer 'raw' is missing: the file has \['counts'\]"),
        ({"layer": None}, ValueError, 'X holds [0-9.]*5 at cell "c0", gene "g'),
        ({"key_added": "counts", "layer": "counts"}, ValueError, "key_added is 'counts'|layer 'counts' exists"),
        ({"n_splits": 0}, ValueError, "n_splits is 0"),
        ({"copy": True}, TypeError, "copy was given: the target is the copy"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(source, given, error, message):
    before = listed(source.parent)
    given = {"source": "in.h5ad", "target": "out.h5ad", "layer": "counts", **given}
    paths = [source.parent / given.pop(name) for name in ("source", "target")]
    with pytest.raises(error, match=message):
        n2s.denoise_file(*paths, **given)
    assert listed(source.parent) == before


def test_a_zarr_folder_is_not_replaced(source):
    target = source.with_name("out.zarr")
    n2s.denoise_file(source, target, layer="counts", write_layer=False)
    with pytest.raises(FileExistsError, match="is a folder, which cannot be replaced in one step"):
        n2s.denoise_file(source, target, layer="counts", overwrite=True)


def test_a_layer_too_large_for_the_disk_is_refused_with_its_gigabytes(source, monkeypatch):
    monkeypatch.setattr("sc_noise2self.memory.shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"the result takes 0.0 GB and 0.0 GB are free in .*: write the factors alone"):
        n2s.denoise_file(source, source.with_name("out.h5ad"), layer="counts")


def test_an_error_while_writing_leaves_nothing(source, monkeypatch):
    def fails(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(files.ad.io, "write_elem", fails)
    with pytest.raises(OSError, match="disk full"):
        n2s.denoise_file(source, source.with_name("out.h5ad"), layer="counts")
    assert listed(source.parent) == ["in.h5ad"]


KILLED = """
import sys
import sc_noise2self as n2s
from sc_noise2self import files

ready = open(sys.argv[3], "w")
copy = files.shutil.copyfile
files.shutil.copyfile = lambda *paths: (ready.write("writing"), ready.flush(), copy(*paths))
files._ROWS, files._COLUMNS = 5, 5  # many small chunks, so that a kill falls between them
n2s.denoise_file(sys.argv[1], sys.argv[2], layer="counts", overwrite=True, transform="log1p", scale="rates")
"""


def test_a_killed_run_leaves_the_old_or_the_new(source):
    """`kill -9` at random moments of the write: the source and the old target are whole, the next run cleans up."""
    target, script = source.with_name("out.h5ad"), source.with_name("run.py")
    script.write_text(KILLED)
    n2s.denoise_file(source, target, layer="counts", write_layer=False)
    whole, old = source.read_bytes(), target.read_bytes()
    rng = np.random.default_rng(0)
    killed = 0
    for i in range(4):
        ready = source.with_name(f"ready{i}")
        run = subprocess.Popen([sys.executable, script, source, target, ready])
        while run.poll() is None and not (ready.exists() and ready.read_text()):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        run.send_signal(signal.SIGKILL)
        run.wait()
        killed += run.returncode == -signal.SIGKILL and target.read_bytes() == old
        assert source.read_bytes() == whole
        if target.read_bytes() != old:
            assert ad.read_h5ad(target).layers["denoised"].shape == (150, 40)
            target.write_bytes(old)
        ready.unlink()
    assert killed
    n2s.denoise_file(source, target, layer="counts", overwrite=True)
    assert listed(source.parent) == ["in.h5ad", "out.h5ad", "run.py"]
    np.testing.assert_array_less(0, ad.read_h5ad(target).layers["denoised"].sum(axis=1))


def test_the_command_line(source, capsys):
    target = source.with_name("out.zarr")
    assert main(["denoise", str(source), str(target), "--layer", "counts", "--factors"]) == 0
    out = capsys.readouterr()
    assert "Learned from half of the molecules" in " ".join(out.out.split())
    assert "denoised" in ad.read_zarr(target).obsm
    assert main(["denoise", str(source), str(target), "--layer", "counts"]) == 2
    assert "exists: nothing is overwritten" in capsys.readouterr().err
