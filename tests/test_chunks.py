"""Counts in memory, on disk and in Dask arrays: the same passes, the same splits, the same result."""

import os
import subprocess
import sys
import textwrap

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import dense, low_rank_profiles, poisson_counts, scanpy_settings

import sc_noise2self as n2s
from sc_noise2self import _blocks, _progress
from sc_noise2self._anndata import chunks_of
from sc_noise2self._blocks import InMemory, OnDask, OnDisk, Partial, block_rows
from sc_noise2self._counts import column_sums, row_sums
from sc_noise2self._split import halves, split_matrix

da = pytest.importorskip("dask.array")


@pytest.fixture(scope="module")
def counts():
    return poisson_counts(low_rank_profiles(230, 40, 4, seed=0), 300, seed=1)


@pytest.fixture
def few_cells(monkeypatch):
    """Blocks of 50 cells, and settings compared on 100: what otherwise needs thousands."""
    monkeypatch.setattr("sc_noise2self._blocks._ENTRIES", 50 * 40)
    monkeypatch.setattr("sc_noise2self.methods._pca.PCALearner.enough_cells", 100)
    monkeypatch.setattr("sc_noise2self.methods._base.TrialLearner.enough_cells", 100)


def on_disk(counts, path, suffix):
    adata = ad.AnnData(counts, obs=pd.DataFrame(index=[f"c{i}" for i in range(counts.shape[0])]))
    adata.var_names = [f"g{i}" for i in range(counts.shape[1])]
    if suffix == ".h5ad":
        adata.write_h5ad(path / "x.h5ad")
        return ad.read_h5ad(path / "x.h5ad", backed="r")
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(path / "x.zarr", mode="w", zarr_format=2)
    ad.io.write_elem(group, "X", counts)
    adata.X = ad.io.sparse_dataset(group["X"])
    return adata


def of_all(block):
    return Partial([column_sums(block.counts), np.array(block.counts.nnz)], [row_sums(block.counts), block.cells])


@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("kind", ["csr", "dense", "disk", "dask", "dask of dense"])
def test_every_source_gives_the_same_sums_and_rows(counts, kind, rows):
    chunks = {
        "csr": lambda: InMemory(counts, rows),
        "dense": lambda: InMemory(counts.toarray(), rows),
        "disk": lambda: OnDisk(counts.toarray(), rows),
        "dask": lambda: OnDask(da.from_array(counts, chunks=(33, 40), asarray=False), rows),
        "dask of dense": lambda: OnDask(da.from_array(counts.toarray(), chunks=(100, 13)), rows),
    }[kind]()
    (totals, nnz), (size, cells) = chunks.run(of_all)
    np.testing.assert_array_equal(totals, column_sums(counts))
    assert nnz == counts.nnz
    np.testing.assert_array_equal(size, row_sums(counts))
    np.testing.assert_array_equal(cells, np.arange(230))
    some = np.array([0, 6, 7, 100, 229])
    taken = chunks.take(some)
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken.toarray(), counts[some].toarray())
    np.testing.assert_array_equal(chunks.in_memory().toarray(), counts.toarray())
    genes = np.arange(40) % 3 == 0
    np.testing.assert_array_equal(chunks.of_genes(genes).run(of_all).sums[0], totals[genes])


@pytest.mark.parametrize("kept", [True, False])
def test_some_genes_are_those_of_the_whole_kept_or_not(counts, kept, monkeypatch):
    monkeypatch.setattr(_blocks, "available_memory", lambda: 10**9 if kept else 0)
    genes = np.arange(40) % 3 == 0
    own, chunks = counts[:, genes], InMemory(counts, 50).of_genes(genes)
    assert isinstance(chunks, _blocks.OfGenes) != kept
    np.testing.assert_array_equal(chunks.run(of_all).sums[0], column_sums(own))
    np.testing.assert_array_equal(chunks.in_memory().toarray(), own.toarray())
    for start, stop in [(0, 50), (10, 20), (40, 130), (200, 230), (0, 230)]:
        np.testing.assert_array_equal(sp.csr_matrix(chunks.stored(start, stop)).toarray(), own[start:stop].toarray())
        np.testing.assert_array_equal(
            chunks.part(slice(start, stop), np.arange(5)).toarray(), own[start:stop, :5].toarray()
        )
    cells = np.array([3, 49, 50, 229])
    np.testing.assert_array_equal(chunks.take(cells).toarray(), own[cells].toarray())


def test_genes_that_determine_the_scores_are_read_once_and_give_the_same_bytes(counts, few_cells, monkeypatch):
    adata, genes = ad.AnnData(counts), np.arange(40) < 25
    reads, found = [], []
    stored = InMemory.stored
    monkeypatch.setattr(InMemory, "stored", lambda self, *rows: reads.append(rows) or stored(self, *rows))
    for memory in (10**9, 0):
        monkeypatch.setattr(_blocks, "available_memory", lambda free=memory: free)
        reads.clear()
        rank = n2s.select_rank(adata, mask_var=genes)
        n2s.denoise(adata, mask_var=genes, write_layer=False)
        found.append((rank, *(adata.obsm[key].tobytes() for key in ("denoised", "denoised_scale")), len(reads)))
    assert found[0][:-1] == found[1][:-1]
    assert found[0][-1] < found[1][-1]


def test_blocks_hold_no_zeros_and_repeat_no_entries():
    x = sp.csr_matrix((np.array([1, 2, 0, 3]), np.array([0, 0, 1, 2]), np.array([0, 3, 4])), shape=(2, 3))
    before = x.data.copy()
    seen = InMemory(x).run(lambda block: Partial(rows=[block.counts])).rows[0]
    assert (seen.nnz, seen.dtype) == (2, np.float32)
    np.testing.assert_array_equal(seen.toarray(), [[3, 0, 0], [0, 0, 3]])
    np.testing.assert_array_equal(x.data, before)


def test_the_length_of_a_block_depends_on_the_genes_alone():
    assert [block_rows(n) for n in (100, 2000, 20_000, 60_000)] == [20_000, 10_000, 1000, 500]
    assert block_rows(10**9) == 1


def test_an_error_in_a_block_is_raised(counts):
    def fails(block):
        if block.start > 100:
            raise RuntimeError(f"at {block.start}")
        return of_all(block)

    for chunks in (InMemory(counts, 50), OnDask(da.from_array(counts, chunks=(50, 40), asarray=False), 50)):
        with pytest.raises(RuntimeError, match="at (150|200)"):
            chunks.run(fails)


@pytest.mark.parametrize("step", [1, 7, 64])
def test_any_piece_of_a_matrix_is_split_as_in_the_whole(counts, step):
    whole = halves(counts, 5, np.arange(230))
    pieces = [halves(counts[i : i + step], 5, np.arange(i, min(i + step, 230))) for i in range(0, 230, step)]
    for each, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        np.testing.assert_array_equal(sp.vstack(parts).toarray(), each.toarray())
    some = np.array([3, 70, 200])
    np.testing.assert_array_equal(halves(counts[some], 5, some)[0].toarray(), whole[0][some].toarray())
    assert (halves(counts, 6, np.arange(230))[0] != whole[0]).nnz > 0


def test_all_formats_are_split_alike(counts, array_type):
    expected = split_matrix(counts, 0.3)[0].toarray()
    np.testing.assert_array_equal(dense(split_matrix(array_type(counts.toarray()), 0.3)[0]), expected)


def in_dask(counts, length=50, **names):
    return ad.AnnData(da.from_array(counts, chunks=(length, -1), asarray=False), **names)


def results(adata, method="pca", **options):
    """The gain and the factors, and the dispersions of genes where counts are mixed in."""
    n2s.denoise(adata, method, write_layer=False, **options)
    factors = [np.asarray(slot["denoised" + name]) for slot in (adata.obsm, adata.varm) for name in ("", "_scale")]
    record, phi = adata.uns["denoised"], adata.var.get("denoised_phi", np.zeros(1))
    gains = [record["gain"], record["gain_error"], record["members"]["weight"], adata.var["denoised_gain"], phi]
    # the last column of factors is the fingerprint of their numbers, which differ in rounding
    return gains, [each[:, :-1] for each in factors]


def assert_alike(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("source", [".h5ad", ".zarr", "dask 50", "dask 33", "dask whole", "read_lazy"])
def test_disk_and_dask_give_what_memory_gives(counts, source, tmp_path, few_cells):
    inside = ad.AnnData(counts.copy())
    if source.startswith("dask"):
        adata = in_dask(counts, {"50": 50, "33": 33, "whole": 230}[source.split()[1]])
    elif source == "read_lazy":
        pytest.importorskip("xarray")
        on_disk(counts, tmp_path, ".h5ad").file.close()
        adata = ad.experimental.read_lazy(tmp_path / "x.h5ad")
        assert isinstance(adata.X, da.Array)
    else:
        adata = on_disk(counts, tmp_path, source)
    before = adata.X
    assert n2s.select_rank(adata, max_rank=12) == n2s.select_rank(inside, max_rank=12)
    found, expected = (each.uns["select_rank"]["table"].drop(columns="chosen") for each in (adata, inside))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5)
    assert_alike(results(adata), results(inside))
    assert type(adata.X) is type(before)


METHODS = {
    "knn": n2s.KNN(n_pcs=(5, 10), n_neighbors=(5, 10)),
    "diffusion": n2s.Diffusion(n_pcs=5, n_neighbors=(5, 10), t=(1, 2, 3)),
    "ensemble": ["pca", n2s.Diffusion(n_pcs=5, n_neighbors=8, t=2)],
}


@pytest.fixture(scope="module")
def memory_gives(counts):
    """Return what a method gives in memory, computed once."""
    found = {}

    def results_of(method, mix):
        if (method, mix) not in found:
            found[method, mix] = results(ad.AnnData(counts.copy()), METHODS.get(method, method), mix=mix)
        return found[method, mix]

    return results_of


@pytest.mark.parametrize("source", [".h5ad", "dask"])
@pytest.mark.parametrize(
    ("method", "mix"), [("knn", False), ("diffusion", False), ("ensemble", False), ("pca", True), ("ensemble", True)]
)
def test_every_method_reads_counts_where_they_are(counts, memory_gives, method, mix, source, tmp_path, few_cells):
    adata = in_dask(counts) if source == "dask" else on_disk(counts, tmp_path, source)
    assert_alike(results(adata, METHODS.get(method, method), mix=mix), memory_gives(method, mix))


def test_what_needs_memory_is_refused_elsewhere(counts, tmp_path):
    for adata in (on_disk(counts, tmp_path, ".h5ad"), in_dask(counts)):
        with pytest.raises(ValueError, match=r"'function' needs all counts in memory, and these are not: load them"):
            n2s.denoise(adata, ["pca", n2s.Function(lambda counts: counts)])
        with pytest.raises(ValueError, match=r"X is not in memory: load it first, adata = adata.to_memory\(\)"):
            n2s.split_molecules(adata)
        assert not adata.uns


def test_more_splits_and_a_mask_out_of_memory(counts, tmp_path, few_cells):
    options = {"n_splits": 2, "mask_var": np.arange(40) % 4 > 0}
    expected = results(ad.AnnData(counts.copy()), n2s.PCA(transform="sqrt"), **options)
    assert_alike(results(on_disk(counts, tmp_path, ".h5ad"), n2s.PCA(transform="sqrt"), **options), expected)


def test_learning_from_all_cells_gains_over_those_compared(monkeypatch):
    counts = poisson_counts(low_rank_profiles(3000, 60, 8, seed=0), 60, seed=1)
    gains = []
    for enough in (3000, 150):
        monkeypatch.setattr("sc_noise2self.methods._pca.PCALearner.enough_cells", enough)
        adata = ad.AnnData(counts.copy())
        n2s.denoise(adata, n2s.PCA(transform="log1p"), write_layer=False)
        gains.append((adata.uns["denoised"]["gain"], adata.uns["denoised"]["gain_error"]))
    # Scored on other cells, but what was learned is the same: halves of all 3000 cells.
    assert abs(gains[0][0] - gains[1][0]) < 3 * np.hypot(gains[0][1], gains[1][1])
    few = ad.AnnData(counts[:150].copy())
    n2s.denoise(few, n2s.PCA(transform="log1p"), write_layer=False)
    assert gains[1][0] > 1.1 * few.uns["denoised"]["gain"]


def test_layers_of_disk_and_dask_are_lazy(counts, tmp_path, few_cells):
    expected = ad.AnnData(counts.copy())
    n2s.denoise(expected, scale="log1p_cp10k")
    backed = on_disk(counts, tmp_path, ".h5ad")
    lazy = in_dask(counts, var=backed.var)
    for adata in (backed, lazy):
        n2s.denoise(adata, scale="log1p_cp10k")
        assert isinstance(adata.layers["denoised"], da.Array)
        np.testing.assert_allclose(
            np.asarray(adata.layers["denoised"]), expected.layers["denoised"], rtol=1e-4, atol=1e-6
        )
    assert isinstance(lazy.obsm["denoised"], da.Array)
    np.testing.assert_allclose(
        n2s.get.denoised(lazy, ["g3", "g7"], scale="log1p_cp10k"),
        expected.layers["denoised"][:, [3, 7]],
        rtol=1e-4,
        atol=1e-6,
    )
    with pytest.raises(ValueError, match="copy=True was given with a backed object"):
        n2s.denoise(backed, copy=True)
    backed.layers["counts"] = counts.copy()  # in memory, as anndata keeps the layers of a backed object
    with pytest.raises(ValueError, match="copy=True was given with a backed object"):
        n2s.denoise(backed, layer="counts", copy=True)


def test_a_dask_array_may_have_empty_chunks(counts):
    array = da.from_array(counts, chunks=(46, -1), asarray=False)[da.from_array(np.arange(230) >= 92, chunks=46)]
    array.compute_chunk_sizes()
    assert array.chunks[0] == (0, 0, 46, 46, 46)
    whole, lazy = ad.AnnData(counts[92:]), ad.AnnData(array)
    for adata in (whole, lazy):
        n2s.denoise(adata, write_layer=False)
    np.testing.assert_allclose(n2s.get.denoised(lazy), n2s.get.denoised(whole), rtol=1e-4, atol=1e-6)


def test_what_is_wrong_is_named_wherever_it_is(counts, tmp_path):
    wrong = counts.copy()
    wrong[151, 7] = 2.5
    message = r'X holds 2.5 at cell "c151", gene "g7": molecule splitting needs raw counts'
    backed = on_disk(wrong, tmp_path, ".h5ad")
    lazy = in_dask(wrong, obs=backed.obs, var=backed.var)
    for adata in (backed, lazy, ad.AnnData(wrong, obs=backed.obs, var=backed.var)):
        with pytest.raises(ValueError, match=message):
            n2s.denoise(adata)
        assert not adata.obsm
        assert "denoised" not in adata.uns
    by_gene = ad.AnnData(counts.tocsc())
    by_gene.write_h5ad(tmp_path / "csc.h5ad")
    with pytest.raises(ValueError, match="X is stored as CSC, by gene: .* store it as CSR"):
        n2s.select_rank(ad.read_h5ad(tmp_path / "csc.h5ad", backed="r"))


def test_empty_cells_are_warned_of_out_of_memory(counts, tmp_path, few_cells):
    some = counts.tolil()
    some[[0, 60, 229]] = 0
    backed = on_disk(sp.csr_matrix(some), tmp_path, ".h5ad")
    with pytest.warns(UserWarning, match=r"3 cell\(s\) hold no molecule"):
        n2s.denoise(backed, write_layer=False)
    assert (n2s.get.denoised(backed, ["g1"]).to_numpy()[[0, 60, 229]] == 0).all()


def test_counts_are_read_as_often_as_is_documented(counts, few_cells, monkeypatch):
    passes, run = [], InMemory.run
    monkeypatch.setattr(InMemory, "run", lambda self, *args: passes.append(self.shape) or run(self, *args))

    def n_passes(function, counts, **options):
        passes.clear()
        function(ad.AnnData(counts.copy()), **options)
        return sum(shape == counts.shape for shape in passes)

    assert n_passes(n2s.select_rank, counts, max_rank=12) == 1 + 8
    # Checked; halves: genes, components (2), worth and noise edge;
    # all molecules: genes, components (3); their scores came with the populations below, in one pass less
    # the gain: scale of genes, totals of halves, gains; and populations in some cells, here all: of halves, of all
    assert n_passes(n2s.denoise, counts, write_layer=False) == 1 + 4 + 4 + 3 + 3


class Bars:
    """Stands in for tqdm: no bar waits for two seconds before it shows."""

    def __init__(self, monkeypatch):
        self.shown, self.delays, self.made, tqdm = [], [], [], _progress.tqdm

        def at_once(*args, **options):
            bar = tqdm(*args, **{**options, "delay": 0})
            if not options["disable"]:
                self.shown.append(options["desc"])
                self.delays.append(options["delay"])
                self.made.append(bar)
            return bar

        monkeypatch.setattr(_progress, "tqdm", at_once)


@pytest.mark.parametrize("verbosity", [0, 1, 2])
def test_bars_say_what_is_being_done(counts, verbosity, few_cells, monkeypatch, capsys, tmp_path):
    bars = Bars(monkeypatch)
    adata = on_disk(counts, tmp_path, ".h5ad")
    with scanpy_settings(verbosity=verbosity):
        n2s.denoise(adata, ["pca", n2s.KNN(n_pcs=5, n_neighbors=8)], write_layer=False)
    said = capsys.readouterr()
    if verbosity < 1:
        assert (said.out, said.err, bars.shown) == ("", "", [])
    else:
        assert {"reading counts", "comparing denoisers"} <= set(bars.shown)
        assert "reading counts" in said.err
        assert set(bars.delays) == {5 if verbosity == 1 else 2}
        ends = {bar.desc.removesuffix(": "): (bar.n, bar.total) for bar in bars.made}
        assert ends["comparing denoisers"][0] == ends["comparing denoisers"][1]  # the time left ends at 0


def test_a_layer_that_does_not_fit_is_refused_with_its_gigabytes(counts, monkeypatch):
    monkeypatch.setattr("sc_noise2self._memory.available_memory", lambda: 10_000)
    adata = ad.AnnData(counts.copy())
    with pytest.raises(MemoryError, match=r"layer of 230 cells x 40 genes takes 0.0 GB and 0.0 GB of memory are free"):
        n2s.denoise(adata)
    n2s.denoise(adata, write_layer=False)


CLUSTER = """
import os, signal, sys, threading
import anndata as ad, dask.array as da, numpy as np, scipy.sparse as sp
import sc_noise2self as n2s
from distributed import Client, LocalCluster
from sc_noise2self._blocks import OnDask

if __name__ == "__main__":
    counts = sp.load_npz(sys.argv[1])
    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster:
        with Client(cluster) as client:
            adata = ad.AnnData(da.from_array(counts, chunks=(500, -1), asarray=False))
            run, passes = OnDask.run, []

            def killing(self, *args):
                passes.append(1)
                if len(passes) == 5:
                    victim = next(iter(client.run(os.getpid).values()))
                    threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()
                return run(self, *args)

            OnDask.run = killing
            n2s.denoise(adata, n2s.PCA(transform="log1p", n_components=8), write_layer=False)
            rank = n2s.select_rank(adata, max_rank=10)
            scores, gain = np.asarray(adata.obsm["denoised"]), adata.uns["denoised"]["gain"]
            np.savez(sys.argv[2], scores=scores, gain=gain, rank=rank)
"""


@pytest.mark.slow
def test_on_a_cluster_of_processes(tmp_path):
    """The same answer as in memory from workers of their own, one of them killed in the middle."""
    pytest.importorskip("distributed")
    counts = poisson_counts(low_rank_profiles(6000, 50, 4, seed=0), 100, seed=1)
    sp.save_npz(tmp_path / "x.npz", counts)
    (tmp_path / "run.py").write_text(textwrap.dedent(CLUSTER))
    command = [sys.executable, "run.py", "x.npz", "out.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(tmp_path / "out.npz")
    adata = ad.AnnData(counts)
    n2s.denoise(adata, n2s.PCA(transform="log1p", n_components=8), write_layer=False)
    np.testing.assert_allclose(found["scores"], adata.obsm["denoised"], rtol=1e-4, atol=1e-5)
    assert found["gain"] == pytest.approx(adata.uns["denoised"]["gain"], rel=1e-4)
    assert found["rank"] == n2s.select_rank(adata, max_rank=10)


@pytest.mark.parametrize("name", ["csr_matrix", "Tensor"])
def test_counts_on_a_device_are_refused_in_one_sentence(name):
    """CuPy's matrices and PyTorch's tensors look like datasets: they have a shape, and rows."""
    on_device = type(name, (), {"device": "cuda:0", "shape": (5, 4), "format": "csr", "__getitem__": lambda *_: None})
    with pytest.raises(TypeError, match=f"X is of type {name}, on a device: bring it to the host"):
        chunks_of(on_device(), "X")


@pytest.mark.parametrize("name", ["data", "indices"])
def test_a_shard_that_is_missing_is_refused(counts, tmp_path, name):
    zarr = pytest.importorskip("zarr", minversion="3.0")
    group = zarr.open_group(tmp_path / "x.zarr", mode="w", zarr_format=3)
    ad.io.write_elem(group, "X", counts, dataset_kwargs={"chunks": (500,), "shards": (2000,)})
    dataset = ad.io.sparse_dataset(group["X"])
    np.testing.assert_array_equal(OnDisk(dataset).in_memory().toarray(), counts.toarray())
    assert group["X"][name].shards == (2000,)
    (tmp_path / "x.zarr" / "X" / name / "c" / "2").unlink()
    again = ad.io.sparse_dataset(zarr.open_group(tmp_path / "x.zarr", mode="r")["X"])
    with pytest.raises(ValueError, match=f"chunks of its {name} are missing"):
        OnDisk(again)


def test_a_matrix_of_another_shape_than_its_object_is_refused(counts, tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "x.h5ad"
    ad.AnnData(counts).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [230, 50]
    with pytest.raises(ValueError, match=r"X has shape \(230, 50\), and adata \(230, 40\): .* write it again"):
        n2s.denoise(ad.read_h5ad(path, backed="r"), write_layer=False)


def test_genes_scaled_in_some_cells_first_are_those_of_a_dask_array_too(counts, few_cells, monkeypatch):
    monkeypatch.setattr("sc_noise2self.methods._pca.SCALED", 30 * 40)
    monkeypatch.setattr("sc_noise2self.methods._profiles._STAGE", 2)
    assert_alike(results(in_dask(counts)), results(ad.AnnData(counts)))


@pytest.mark.parametrize("kind", [sp.csr_matrix, np.asarray])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_what_is_mixed_on_disk_can_be_written(counts, tmp_path, few_cells, mode, kind):
    """anndata closes the file of a backed object to write it, and reads the lazy layer then."""
    path, method = tmp_path / "x.h5ad", n2s.PCA(n_components=3, transform="log1p")
    ad.AnnData(kind(dense(counts))).write_h5ad(path)
    backed, expected = ad.read_h5ad(path, backed=mode), ad.AnnData(counts)
    n2s.denoise(expected, method, mix=True)
    n2s.denoise(backed, method, mix=True)
    backed.write_h5ad(*([tmp_path / "other.h5ad"] if mode == "r" else []))
    written, lazy = ad.read_h5ad(backed.filename).layers["denoised"], n2s.get.lazy(backed)
    for found in (written, n2s.get.denoised(backed), lazy):
        np.testing.assert_allclose(found, expected.layers["denoised"], rtol=1e-4, atol=1e-6)
    backed.file.close()
    np.testing.assert_allclose(lazy, expected.layers["denoised"], rtol=1e-4, atol=1e-6)


def test_other_counts_of_the_same_size_are_not_read_in_place_of_those_that_were_there(counts, tmp_path):
    path = tmp_path / "x.h5ad"
    ad.AnnData(counts).write_h5ad(path)
    backed = ad.read_h5ad(path, backed="r")
    chunks = OnDisk(backed.X)
    backed.file.close()
    np.testing.assert_array_equal(chunks.in_memory().toarray(), counts.toarray())
    ad.AnnData(counts[::-1]).write_h5ad(path)
    with pytest.raises(ValueError, match="cells 0 to 229 of the stored matrix cannot be read: its file holds others"):
        chunks.in_memory()
