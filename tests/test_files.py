"""Files in, files out: the same result as in memory, and never half of one."""

import contextlib
import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from helpers import low_rank_profiles, poisson_counts

import sc_noise2self as n2s
from sc_noise2self import _files, _replace
from sc_noise2self.__main__ import main
from sc_noise2self._blocks import OnDisk
from sc_noise2self._replace import replaced
from sc_noise2self.methods import REGISTRY

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


LOG1P = n2s.PCA(transform="log1p")


def halved(counts):
    return counts.toarray() / 2 + counts.mean(axis=0)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LOG1P, {"mix": True, "scale": "rates"}),
        (n2s.KNN(n_pcs=3, n_neighbors=10), {"mix": True}),
        ([LOG1P, n2s.Diffusion(n_pcs=3, n_neighbors=10, t=2)], {}),
        (n2s.Function(halved), {"scale": "rates"}),
        pytest.param(n2s.Autoencoder(width=2, n_epochs=2, device="cpu"), {}, marks=pytest.mark.slow),
    ],
    ids=["pca mixed", "knn mixed", "ensemble", "function", "autoencoder"],
)
def test_every_method_gives_what_it_gives_in_memory(source, monkeypatch, method, options):
    """Counts stay on disk; those that are mixed in are read once for every stretch of cells that is written."""
    if isinstance(method, n2s.Autoencoder):
        pytest.importorskip("torch")
    monkeypatch.setattr(_files, "_ROWS", 60)
    monkeypatch.setattr(_files, "_COLUMNS", 15)
    part, counts_of, read, loaded = OnDisk.part, _files._counts, [], []

    def counted(chunks, cells, genes=slice(None)):
        read.append((cells[0], cells[-1] + 1, genes))
        return part(chunks, cells, genes)

    monkeypatch.setattr(OnDisk, "part", counted)
    monkeypatch.setattr(_files, "_counts", lambda *args: loaded.append(args[-1]) or counts_of(*args))
    target = source.with_name("out.h5ad")
    n2s.denoise_file(source, target, method, layer="counts", **options)
    assert loaded == [isinstance(method, n2s.Function)]
    stretches = [(0, 50, slice(None)), (50, 100, slice(None)), (100, 150, slice(None))]
    written = [each for each in read if each[1] - each[0] == 50]  # denoising takes all of so few cells at once
    assert written == (stretches if options.get("mix") else [])
    expected, found = ad.read_h5ad(source), ad.read_h5ad(target)
    n2s.denoise(expected, method, layer="counts", **options)
    np.testing.assert_allclose(found.layers["denoised"], expected.layers["denoised"], rtol=1e-4, atol=1e-6)
    assert n2s.report(found) == n2s.report(expected)


def test_zarr_to_h5ad_beside_an_earlier_result(source):
    middle, target = source.with_name("middle.zarr"), source.with_name("out.h5ad")
    n2s.denoise_file(source, middle, layer="counts", write_layer=False)
    n2s.denoise_file(middle, target, LOG1P, layer="counts", key_added="mixed", mix=True)
    expected, found = ad.read_h5ad(source), ad.read_h5ad(target)
    n2s.denoise(expected, LOG1P, layer="counts", key_added="mixed", mix=True)
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
        ({"method": "nonsense"}, ValueError, "method is 'nonsense': pass one of pca, "),
        ({"method": n2s.Function(len), "write_layer": False}, ValueError, "a function, which has no factors"),
        ({"copy": True}, TypeError, "copy was given: the target is the copy"),
        ({"splits": 2}, TypeError, r"denoise_file\(\) got an unexpected keyword argument 'splits'"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(source, given, error, message):
    before = listed(source.parent)
    given = {"source": "in.h5ad", "target": "out.h5ad", "layer": "counts", **given}
    paths = [source.parent / given.pop(name) for name in ("source", "target")]
    with pytest.raises(error, match=message):
        n2s.denoise_file(*paths, **given)
    assert listed(source.parent) == before


def test_what_is_no_path_is_refused_by_its_name(source):
    adata, message = ad.read_h5ad(source), "is of type {}: pass the path of a file"
    with pytest.raises(TypeError, match=f"source {message.format('AnnData')}"):
        n2s.denoise_file(adata, source.with_name("out.h5ad"))
    with pytest.raises(TypeError, match=f"target {message.format('NoneType')}"):
        n2s.denoise_file(source, None)
    with pytest.raises(TypeError, match=f"save_model {message.format('bool')}"):
        n2s.denoise_file(source, source.with_name("out.h5ad"), layer="counts", save_model=True)
    with pytest.raises(TypeError, match=f"model {message.format('NoneType')}"):
        n2s.denoise_with(adata, None, layer="counts")


def test_a_zarr_folder_is_not_replaced(source):
    target = source.with_name("out.zarr")
    n2s.denoise_file(source, target, layer="counts", write_layer=False)
    with pytest.raises(FileExistsError, match="is a folder, which cannot be replaced in one step"):
        n2s.denoise_file(source, target, layer="counts", overwrite=True)


def test_a_layer_too_large_for_the_disk_is_refused_with_its_gigabytes(source, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(OSError, match=r"the result takes 0.0 GB and 0.0 GB are free in .*: write the factors alone"):
        n2s.denoise_file(source, source.with_name("out.h5ad"), layer="counts")


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_what_is_written_without_compression_is_counted_without_it(source, monkeypatch):
    adata = ad.read_h5ad(source)
    adata.obsm["zeros"] = np.zeros((adata.n_obs, 5000), np.float32)
    packed = source.with_name("packed.zarr")
    adata.write_zarr(packed)
    size = sum(each.stat().st_size for each in packed.rglob("*"))
    least = adata.obsm["zeros"].nbytes
    assert size < least
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=(size + least) // 2))
    with pytest.raises(OSError, match="are free in"):
        n2s.denoise_file(packed, source.with_name("out.h5ad"), layer="counts", write_layer=False)


def test_an_error_while_writing_leaves_nothing(source, monkeypatch):
    def fails(*args, **options):
        raise OSError("disk full")

    monkeypatch.setattr(ad.io, "write_elem", fails)
    with pytest.raises(OSError, match="disk full"):
        n2s.denoise_file(source, source.with_name("out.h5ad"), layer="counts")
    assert listed(source.parent) == ["in.h5ad"]


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (shutil, "copyfile", (1,)),
        (h5py.Group, "create_dataset", (1, 5, 20, 40)),
        (h5py.Group, "__delitem__", (1, 4)),
        (h5py.Dataset, "__setitem__", (1,)),
        (h5py.File, "close", (1, 2)),
        (ad.io, "write_elem", (1, 2, 3, 5)),
        (os, "fsync", (1,)),
        (os, "chmod", (1,)),
        (os, "replace", (1,)),
    ],
)
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_while_writing_leaves_the_old_or_the_new(source, monkeypatch, owner, name, calls, after):
    target = source.with_name("out.h5ad")
    options = {"method": n2s.PCA(transform="log1p", n_components=3), "layer": "counts", "overwrite": True}
    n2s.denoise_file(source, target, **options)
    new = ad.read_h5ad(target)
    before, happened = source.read_bytes(), 0
    original = getattr(owner, name)
    for last in calls:
        old = b"old"
        target.write_bytes(old)
        n_calls = 0

        def interrupts(*args, last=last, **given):
            nonlocal n_calls
            n_calls += 1
            if n_calls == last and not after:
                raise KeyboardInterrupt
            out = original(*args, **given)
            if n_calls == last:
                raise KeyboardInterrupt
            return out

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(owner, name, interrupts)
            n2s.denoise_file(source, target, **options)
        happened += n_calls >= last
        assert source.read_bytes() == before
        assert listed(source.parent) == ["in.h5ad", "out.h5ad"]
        if target.read_bytes() != old:
            np.testing.assert_array_equal(ad.read_h5ad(target).layers["denoised"], new.layers["denoised"])
    assert happened == len(calls)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")
def test_kills_and_interrupts_at_random_moments_leave_the_old_or_the_new():
    script = Path(__file__).parents[1] / "benchmarks" / "kills.py"
    if not script.exists():
        pytest.skip("a distribution of the source has no benchmarks")
    done = subprocess.run(
        [sys.executable, script, "--kills", "4", "--interrupts", "4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "broken" not in done.stdout


DIES = """
import os, signal, sys
import sc_noise2self as n2s

os.link = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
n2s.denoise_file(sys.argv[1], sys.argv[2], layer="counts", write_layer=False)
"""


def test_what_a_killed_run_leaves_is_removed_by_the_next_and_nothing_else_is(source, tmp_path_factory, monkeypatch):
    target, precious = source.with_name("out.h5ad"), tmp_path_factory.mktemp("precious")
    (precious / "thesis").write_text("mine")
    subprocess.run([sys.executable, "-c", DIES, source, target], check=False)
    (left,) = [path for path in source.parent.iterdir() if path != source]
    assert left.is_dir()
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    others = [left.with_name(left.name.replace(socket.gethostname(), "elsewhere")), left.with_name(f"{left.name}.bak")]
    for other in others:
        shutil.copytree(left, other)
    link, inner = os.link, source.with_name("inner.h5ad")

    def another_run_meanwhile(*paths):
        monkeypatch.setattr(os, "link", link)
        n2s.denoise_file(source, inner, layer="counts", write_layer=False)
        link(*paths)

    monkeypatch.setattr(os, "link", another_run_meanwhile)
    n2s.denoise_file(source, target, layer="counts", write_layer=False)
    names = sorted([*(other.name for other in others), "in.h5ad", "inner.h5ad", "out.h5ad"])
    assert listed(source.parent) == names
    left.symlink_to(precious)
    n2s.denoise_file(source, target, layer="counts", write_layer=False, overwrite=True)
    assert listed(source.parent) == sorted([*names, left.name])
    assert (precious / "thesis").read_text() == "mine"


WRITES = """
import sys
from pathlib import Path
from sc_noise2self._replace import replaced

with replaced(Path(sys.argv[1])) as written:
    written.write_text("new")
    print(flush=True)
    sys.stdin.readline()
"""


def test_a_run_that_lives_is_left_alone_in_whatever_container_it_is(tmp_path):
    """Containers have processes of their own, by the same numbers, and may have one name and one folder."""
    apart = [shutil.which("unshare") or "", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if not apart[0] or subprocess.run([*apart, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no other processes can be set apart here")
    command = [sys.executable, "-c", WRITES]
    with subprocess.Popen([*command, tmp_path / "first"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        subprocess.run([*apart, *command, tmp_path / "second"], input=b"", check=True)
        first.communicate(b"\n")
    assert first.returncode == 0
    assert listed(tmp_path) == ["first", "second"]


@pytest.mark.parametrize("n_done", range(6))
def test_a_run_that_is_killed_while_it_removes_what_another_left_leaves_nothing_for_good(tmp_path, monkeypatch, n_done):
    left, lock = _replace._made(tmp_path)
    (left / "files" / "half").write_text("half")
    lock.close()
    n_left = n_done

    def dying(original):
        def call(*args, **options):
            nonlocal n_left
            if not n_left:
                raise Killed
            n_left -= 1
            return original(*args, **options)

        return call

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patched:
        for name in ("unlink", "rmdir"):
            patched.setattr(os, name, dying(getattr(os, name)))
        with pytest.raises(Killed), replaced(tmp_path / "first") as first:
            first.write_text("new")
    with replaced(tmp_path / "second") as second:
        second.write_text("new")
    assert set(listed(tmp_path)) - {"first"} == {"second"}


@pytest.mark.parametrize("call", ["mkdir", "open", "rename"])
def test_another_run_that_starts_at_the_same_time_does_no_harm(tmp_path, monkeypatch, call):
    """It removes a folder with nothing in it yet, as a run leaves it that is killed that early: another one is made."""
    original, others = getattr(Path, call), []

    def another_meanwhile(path, *args, **options):
        monkeypatch.setattr(Path, call, original)
        with replaced(tmp_path / "second") as second:
            second.write_text("new")
        others.append(listed(tmp_path))
        return original(path, *args, **options)

    monkeypatch.setattr(Path, call, another_meanwhile)
    with replaced(tmp_path / "first") as first:
        first.write_text("new")
    assert listed(tmp_path) == ["first", "second"]
    assert others == [["second"]] or call == "mkdir"


@pytest.mark.parametrize("lacking", ["module", "support"])
def test_without_locks_nothing_is_removed(tmp_path, monkeypatch, lacking):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*args):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    with replaced(tmp_path / "first") as first:
        left = shutil.copytree(first.parents[1], f"{first.parents[1]}"[:-8] + "12345678")
        first.write_text("new")
        monkeypatch.setattr(fcntl, "flock", no_locks)
        if lacking == "module":
            monkeypatch.setitem(sys.modules, "fcntl", None)
        with replaced(tmp_path / "second") as second, replaced(tmp_path / "third") as third:
            second.write_text("new")
            third.write_text("new")
    assert listed(tmp_path) == sorted([left.rpartition("/")[2], "first", "second", "third"])
    monkeypatch.undo()
    with replaced(tmp_path / "fourth") as fourth:
        fourth.write_text("new")
    assert listed(tmp_path) == ["first", "fourth", "second", "third"]


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_who_may_not_read_the_source_may_not_read_the_result(source, monkeypatch):
    seen, replace = [], os.replace

    def looks(written, target):
        if Path(target).parent == source.parent:
            seen.append(permissions(Path(written).parent))
        replace(written, target)

    monkeypatch.setattr(os, "replace", looks)
    for mode, of_folder in ((0o600, 0o700), (0o640, 0o750)):
        source.chmod(mode)
        targets = [
            source.with_name(f"{mode}.h5ad"),
            source.with_name(f"{mode}.zarr"),
            source.with_name(f"{mode}b.h5ad"),
        ]
        for path, given in zip(targets, (source, source, targets[1]), strict=True):
            n2s.denoise_file(given, path, layer="counts", write_layer=False)
        assert [permissions(path) for path in targets] == [mode, of_folder, mode]
    targets[0].chmod(0o604)
    n2s.denoise_file(source, targets[0], layer="counts", write_layer=False, overwrite=True)
    assert permissions(targets[0]) == 0o604
    assert set(seen) == {0o700}


def test_a_link_is_followed(source, tmp_path_factory):
    there = tmp_path_factory.mktemp("there") / "real.h5ad"
    there.write_text("old")
    link = source.with_name("out.h5ad")
    link.symlink_to(there)
    n2s.denoise_file(source, link, layer="counts", write_layer=False, overwrite=True)
    assert link.is_symlink()
    assert "denoised" in ad.read_h5ad(there).obsm
    assert listed(there.parent) == ["real.h5ad"]
    there.unlink()
    with pytest.raises(FileNotFoundError, match=r"out.h5ad is a link to .*real.h5ad, which does not exist: remove"):
        n2s.denoise_file(source, link, layer="counts", overwrite=True)


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
def test_a_store_that_anndata_wrote(source):
    """Its metadata are consolidated, and where there is no `raw` it says so."""
    adata = ad.read_h5ad(source)
    del adata.raw
    first, second, last = (source.with_name(name) for name in ("first.zarr", "second.zarr", "last.h5ad"))
    adata.write_zarr(first)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    n2s.denoise_file(first, second, layer="counts", key_added="one")
    n2s.denoise_file(second, last, layer="counts", key_added="two")
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    n2s.denoise(adata, layer="counts", key_added="one")
    for found in (ad.read_zarr(second), ad.read_h5ad(last)):
        np.testing.assert_allclose(found.layers["one"], adata.layers["one"], rtol=1e-5)
        np.testing.assert_array_equal(found.obsm["one"], adata.obsm["one"])
        assert (found.obsp["distances"] != adata.obsp["distances"]).nnz == 0
        assert found.raw is None
    np.testing.assert_array_equal(found.layers["two"], found.layers["one"])


WITHOUT_DASK = """
import sys
sys.modules["dask"] = sys.modules["dask.array"] = None
import sc_noise2self as n2s

paths = sys.argv[1:]
for i, (source, target) in enumerate(zip(paths, paths[1:])):
    n2s.denoise_file(source, target, layer="counts", key_added=f"result{i}")
"""


@pytest.mark.slow
def test_no_format_needs_dask(source):
    paths = [source, *(source.with_name(name) for name in ("b.h5ad", "c.zarr", "d.zarr", "e.h5ad"))]
    subprocess.run([sys.executable, "-c", WITHOUT_DASK, *paths], check=True)
    found = ad.read_h5ad(paths[-1])
    for i in range(4):
        assert found.layers[f"result{i}"].sum() == pytest.approx(found.layers["counts"].sum(), rel=1e-3)
    assert (found.raw.X != ad.read_h5ad(source).raw.X).nnz == 0


def edited(path, edit):
    with h5py.File(path, "a") as file:
        edit(file)


def set_entry(name, index, value):
    def edit(file):
        file[f"layers/counts/{name}"][index] = value

    return edit


def replace_counts(values):
    def edit(file):
        del file["layers/counts"]
        ad.io.write_elem(file["layers"], "counts", values)

    return edit


def remove(name):
    def edit(file):
        del file[name]

    return edit


def set_shape(file):
    file["layers/counts"].attrs["shape"] = [150, 10**12]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_entry("indices", 7, 10**8), "cells 0 to 149 of the stored matrix cannot be read: indices must be < 40"),
        (set_entry("indices", 7, -3), "cells 0 to 149 of the stored matrix cannot be read: indices must be >= 0"),
        (set_entry("indptr", 7, 10**8), "its indptr does not rise from 0 to the number of its values"),
        (set_entry("indptr", 7, -10), "its indptr does not rise from 0"),
        (set_entry("indptr", -1, 10**8), "its indptr does not rise from 0"),
        (set_entry("data", 7, np.nan), 'layer "counts" holds nan at cell "c0"'),
        (set_entry("data", 7, -1), 'layer "counts" holds -1 at cell "c0"'),
        (remove("layers/counts/indices"), "the stored matrix cannot be read: .*indices"),
        (remove("obs"), "obs is missing in the file, which has "),
        (remove("var/_index"), "in.h5ad is damaged, or holds no AnnData object: "),
        (remove("layers"), r"layer 'counts' is missing: the file has \[\]"),
        (set_shape, "in.h5ad is damaged, or holds no AnnData object: .*1000000000000"),
        (replace_counts(np.full((150, 40), "a")), "the stored matrix cannot be read: it holds object, and counts are"),
        (replace_counts(np.ones((150, 39))), "in.h5ad is damaged, or holds no AnnData object: "),
    ],
)
def test_a_damaged_h5ad_is_refused_in_a_sentence(source, edit, message, capsys):
    edited(source, edit)
    target = source.with_name("out.h5ad")
    with pytest.raises(ValueError, match=message):
        n2s.denoise_file(source, target, layer="counts")
    assert main(["denoise", str(source), str(target), "--layer", "counts", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sc_noise2self: ")
    assert said.count("\n") == 1
    assert listed(source.parent) == ["in.h5ad"]


def empty_file(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("counts")


def folder(path):
    path.mkdir()


def half(path):
    whole = path.with_name("in.h5ad").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def empty_h5(path):
    h5py.File(path, "w").close()


def store(path):
    n2s.denoise_file(path.with_name("in.h5ad"), path, layer="counts", write_layer=False)


def broken_metadata(path):
    store(path)
    for name in (".zarray", ".zattrs", "zarr.json"):
        for each in (path / "obs").rglob(name):
            each.write_text("{")


def broken_chunk(path):
    store(path)
    for each in (path / "layers" / "counts" / "data").rglob("*"):
        if each.is_file() and not each.name.startswith((".z", "zarr")):
            each.write_bytes(b"x")


def missing_chunk(path):
    store(path)
    for each in (path / "layers" / "counts" / "indices").rglob("*"):
        if each.is_file() and not each.name.startswith((".z", "zarr")):
            each.unlink()


@pytest.mark.parametrize(
    ("name", "make", "error", "message"),
    [
        ("x.h5ad", empty_file, ValueError, "x.h5ad is damaged, or holds no AnnData object: .*signature not found"),
        ("x.h5ad", text, ValueError, "x.h5ad is damaged, or holds no AnnData object: .*signature not found"),
        ("x.h5ad", half, ValueError, "x.h5ad is damaged, or holds no AnnData object: .*truncated file"),
        ("x.h5ad", empty_h5, ValueError, r"obs and var are missing in the file, which has \[\]"),
        ("x.h5ad", folder, ValueError, "x.h5ad is not a file: an .h5ad is one"),
        ("x.zarr", text, ValueError, "x.zarr is not a folder: a .zarr is one"),
        ("x.zarr", folder, ValueError, "x.zarr is damaged, or holds no AnnData object: "),
        ("x.zarr", broken_metadata, ValueError, "x.zarr is damaged, or holds no AnnData object: "),
        ("x.zarr", broken_chunk, ValueError, "cells 0 to 149 of the stored matrix cannot be read: "),
        ("x.zarr", missing_chunk, ValueError, "the stored matrix cannot be read: 1 chunks of its indices are missing"),
    ],
)
def test_what_is_no_source_is_refused_in_a_sentence(source, name, make, error, message):
    given = source.with_name(name)
    make(given)
    before = listed(source.parent)
    with pytest.raises(error, match=message):
        n2s.denoise_file(given, source.with_name("out.h5ad"), layer="counts")
    assert listed(source.parent) == before


def test_addresses_are_refused_and_home_is_found(source, monkeypatch, capsys):
    for given in ("https://example.org/in.h5ad", "s3://bucket/in.h5ad"):
        with pytest.raises(ValueError, match=f"{given} is an address: download it first"):
            n2s.denoise_file(given, source.with_name("out.h5ad"))
        with pytest.raises(ValueError, match=f"{given} is an address: download it first"):
            n2s.denoise_file(source, given)
    monkeypatch.setenv("HOME", str(source.parent))
    assert main(["denoise", "~/in.h5ad", "~/out.h5ad", "--layer", "counts", "--factors", "--quiet"]) == 0
    assert listed(source.parent) == ["in.h5ad", "out.h5ad"]


def test_what_may_not_be_read_or_written_is_said(source, tmp_path_factory):
    closed = tmp_path_factory.mktemp("closed")
    closed.chmod(0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("the superuser may write everywhere")
    with pytest.raises(PermissionError, match="closed.* may not be written to by this user: choose another folder"):
        n2s.denoise_file(source, closed / "out.h5ad", layer="counts")
    source.chmod(0o000)
    with pytest.raises(PermissionError, match="in.h5ad may not be read by this user"):
        n2s.denoise_file(source, source.with_name("out.h5ad"), layer="counts")


def test_an_interrupt_of_the_command_line_is_a_line(source, monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ad.io, "write_elem", interrupt)
    assert main(["denoise", str(source), str(source.with_name("out.h5ad")), "--layer", "counts", "--quiet"]) == 130
    assert capsys.readouterr().err == "sc_noise2self: interrupted.\n"
    assert listed(source.parent) == ["in.h5ad"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--key-added", "a/b"], "--key-added is 'a/b': pass a name"),
        (["--method", "nonsense"], "--method is 'nonsense': pass one of pca, "),
        (["--set", "width=3"], "--set width=3 is no option of pca: those are transform, "),
        (["--set", "a(b=3"], "--set a(b=3 is no option of pca: those are transform, "),
        (
            ["--method", "knn", "--set", "n_pcs"],
            "--set n_pcs: pass OPTION=VALUE, e.g. --method autoencoder --set width",
        ),
        (["--set", "transform=log"], "--set transform is 'log': pass one of auto, log1p, sqrt, none"),
        (["--set", "n_components=many"], "--set n_components is 'many': pass a whole number, 1 or more"),
        (
            ["--method", "autoencoder", "--set", "batch_key=lane"],
            "batch_key 'lane' is missing: adata.obs has ['batch']",
        ),
        (["--method", "ensemble", "--set", "width=3"], "--method ensemble stands for several, so --set cannot tell"),
        (["--scale", "expected_log1p_cp10k", "--set", "depth=-1"], "--set depth is -1: pass a number of molecules abo"),
        (["--scale", "rates", "--set", "depth=3"], "--set depth=3 is no option of rates: those are none."),
        (["--scale", "rates", "--scale", "counts"], "--scale was given 2 times: the layer has one scale"),
        (["--scale", "log"], "scale is 'log': pass one of counts, rates"),
        ([], "out.h5ad exists: nothing is overwritten, so choose another name, or pass --overwrite"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_line(source, options, message, capsys):
    target = source.with_name("out.h5ad")
    if not options:
        target.write_text("mine")
    assert main(["denoise", str(source), str(target), "--layer", "counts", "--quiet", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@dataclass(frozen=True, kw_only=True)
class Registered(n2s.PCA):
    name = "mine"
    title = "somebody's PCA"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["pca"], "pca"),
        (["--set", "transform=log1p"], LOG1P),
        (["pca", "--set", "transform=log1p"], LOG1P),
        (
            ["knn", "--set", "n_pcs=3,5", "--set", "n_neighbors=[10]", "--set", "n_components=None"],
            n2s.KNN(n_pcs=(3, 5), n_neighbors=[10]),
        ),
        (
            ["mine", "--set", "transform=sqrt", "--set", " n_components = 4"],
            Registered(transform="sqrt", n_components=4),
        ),
        (
            [
                "autoencoder",
                *(f"--set={each}" for each in ("width=8,32", "device=cuda:0", "batch_key=a lane", "prior_scale=.2")),
            ],
            n2s.Autoencoder(width=(8, 32), device="cuda:0", batch_key="a lane", prior_scale=0.2),
        ),
        (["pca", "--set", "transform=none", "--method", "diffusion"], [n2s.PCA(transform="none"), "diffusion"]),
        (["ensemble"], "ensemble"),
    ],
)
def test_methods_have_their_options_on_the_command_line(source, monkeypatch, given, expected):
    monkeypatch.setitem(REGISTRY, "mine", [Registered])
    seen = {}

    def keeps(*args, **options):
        seen.update(options, method=args[2])
        return ""

    monkeypatch.setattr(_files, "denoise_file", keeps)
    methods = given if given[0].startswith("--") else ["--method", *given]
    others = ["--scale", "expected_log1p_cp10k", "--set", "depth=200", "--mix", "--seed", "3", "--save-model", "m.npz"]
    assert main(["denoise", str(source), "out.h5ad", *methods, *others, "--quiet"]) == 0
    assert seen["method"] == expected
    assert seen["scale"] == n2s.scales.ExpectedLog1pCP10k(depth=200)
    assert (seen["mix"], seen["random_state"], seen["save_model"], seen["write_layer"]) == (
        True,
        3,
        Path("m.npz"),
        True,
    )


def test_the_command_line(source, capsys):
    target = source.with_name("out.zarr")
    assert main(["denoise", str(source), str(target), "--layer", "counts", "--factors"]) == 0
    out = capsys.readouterr()
    said = n2s.report(ad.read_zarr(target))
    assert out.out == f"{target}, result 'denoised'\n{said}\n"
    assert "denoised" in ad.read_zarr(target).obsm
    assert main(["denoise", str(source), str(target), "--layer", "counts"]) == 2
    assert "exists: nothing is overwritten" in capsys.readouterr().err


FULL = """
import os, resource, signal, sys
from sc_noise2self.__main__ import main

source, target, more = sys.argv[1:]
most = os.path.getsize(source) + int(more)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
sys.exit(main(["denoise", source, target, "--layer", "counts", "--quiet"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of file sizes")
@pytest.mark.parametrize(
    "more", [pytest.param(1000, marks=pytest.mark.slow), 15_000, pytest.param(30_000, marks=pytest.mark.slow)]
)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(source, more):
    target = source.with_name("out.h5ad")
    done = subprocess.run(
        [sys.executable, "-c", FULL, source, target, str(more)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "out.h5ad could not be written (File too large): make room" in done.stderr
    assert done.stderr.count("\n") == 1
    assert listed(source.parent) == ["in.h5ad"]


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_what_appears_at_the_target_meanwhile_stays(source, suffix, monkeypatch):
    target, flush = source.with_name(f"out{suffix}"), os.fsync

    def appears(file):
        if not target.exists():
            if suffix == ".zarr":
                target.mkdir()
            (target / "mine" if suffix == ".zarr" else target).write_text("mine")
        flush(file)

    monkeypatch.setattr(os, "fsync", appears)
    with pytest.raises(FileExistsError, match="exists: nothing is overwritten, so choose another name"):
        n2s.denoise_file(source, target, layer="counts", write_layer=False)
    assert (target / "mine" if suffix == ".zarr" else target).read_text() == "mine"
    assert listed(source.parent) == ["in.h5ad", target.name]


def test_paths_that_mean_nothing_here_are_refused(source, capsys):
    assert main(["denoise", "~nosuchuser.h5ad", str(source.with_name("out.h5ad"))]) == 2
    assert "~nosuchuser.h5ad starts with a user without a home folder" in capsys.readouterr().err
    inside = source.with_name("a.zarr")
    n2s.denoise_file(os.fsencode(source), os.fsencode(inside), layer="counts", write_layer=False)
    with pytest.raises(ValueError, match="b.zarr is inside the source, which is not changed"):
        n2s.denoise_file(inside, inside / "b.zarr", layer="counts")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_result_that_is_written_is_a_success_even_where_nothing_can_be_printed(source):
    target = source.with_name("out.h5ad")
    command = [sys.executable, "-m", "sc_noise2self", "denoise", source, target, "--layer", "counts", "--factors"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the result is written, but not all of this printed" in done.stderr
    assert target.exists()


def test_a_file_of_an_old_anndata_is_named_as_one(source):
    def old(file):
        del file["obs"]
        file["obs"] = np.zeros(150, dtype=[("index", "S4")])

    edited(source, old)
    with pytest.raises(ValueError, match=r"as anndata wrote it before 0\.7: read the file with anndata.read_h5ad"):
        n2s.denoise_file(source, source.with_name("out.h5ad"), layer="counts")


@pytest.mark.parametrize("overwrite", [True, False])
def test_the_model_is_not_written_to_the_target(source, overwrite):
    target = source.with_name("out.h5ad")
    with pytest.raises(ValueError, match=r"save_model is .*out.h5ad', the target too"):
        n2s.denoise_file(source, target, layer="counts", overwrite=overwrite, save_model=str(target))
    assert listed(source.parent) == ["in.h5ad"]


def test_a_model_goes_with_the_result_that_cannot_be_written(source, monkeypatch):
    def fails(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    target, model = source.with_name("out.h5ad"), source.with_name("m.npz")
    with pytest.raises(OSError, match="could not be written"):
        n2s.denoise_file(source, target, layer="counts", write_layer=False, save_model=model)
    monkeypatch.undo()
    assert listed(source.parent) == ["in.h5ad"]
    n2s.denoise_file(source, target, layer="counts", write_layer=False, save_model=model)
    assert model.exists()


DIES_WITH_A_MODEL = """
import os, signal, sys
import sc_noise2self as n2s
from sc_noise2self import _files

_files._write_result = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
n2s.denoise_file(sys.argv[1], sys.argv[2], layer="counts", write_layer=False, save_model=sys.argv[3])
"""


def test_a_run_that_is_killed_leaves_no_model_and_can_be_repeated(source, tmp_path_factory):
    target, model = source.with_name("out.h5ad"), tmp_path_factory.mktemp("models") / "m.npz"
    subprocess.run([sys.executable, "-c", DIES_WITH_A_MODEL, source, target, model], check=False)
    assert not target.exists()
    assert not model.exists()
    n2s.denoise_file(source, target, layer="counts", write_layer=False, save_model=model)
    assert listed(source.parent) == ["in.h5ad", "out.h5ad"]
    assert listed(model.parent) == ["m.npz"]
    again = ad.read_h5ad(source)
    with pytest.warns(UserWarning, match="the model was fitted to these very cells"):
        n2s.denoise_with(again, model, layer="counts")
    assert "denoised" in again.layers


def test_nothing_is_written_where_a_model_appears_meanwhile(source, monkeypatch):
    model, write = source.with_name("m.npz"), _files._write_result

    def appears(*args):
        model.write_text("mine")
        write(*args)

    monkeypatch.setattr(_files, "_write_result", appears)
    with pytest.raises(FileExistsError, match="m.npz exists: nothing is overwritten"):
        n2s.denoise_file(source, source.with_name("out.h5ad"), layer="counts", write_layer=False, save_model=model)
    assert model.read_text() == "mine"
    assert listed(source.parent) == ["in.h5ad", "m.npz"]


@pytest.mark.parametrize("names", [("out.h5ad",), ("out.zarr", "back.h5ad")])
def test_strings_with_missing_values_are_written_as_they_were(source, names):
    adata, ids = ad.read_h5ad(source), pd.array([pd.NA, *(f"ENSG{i}" for i in range(39))], dtype="string")
    adata.var["gene_ids"] = ids
    adata.uns["table"] = pd.DataFrame({"ids": ids})
    with ad.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(source)
    paths = [source, *(source.with_name(name) for name in names)]
    for given, target in pairwise(paths):
        n2s.denoise_file(given, target, layer="counts", write_layer=False)
        found = read(target)
        for table in (found.var["gene_ids"], found.uns["table"]["ids"]):
            assert table.isna().tolist() == [True] + [False] * 39
            assert table.tolist()[1:] == list(ids[1:])


def test_what_cannot_be_written_is_not_said_of_the_source(source, monkeypatch):
    def fails(*args, **options):
        raise TypeError("no way to write it")

    monkeypatch.setattr(ad.io, "write_elem", fails)
    with pytest.raises(ValueError, match=r"in.h5ad could not be written to .*out.zarr: no way to write it$"):
        n2s.denoise_file(source, source.with_name("out.zarr"), layer="counts")
    assert listed(source.parent) == ["in.h5ad"]
