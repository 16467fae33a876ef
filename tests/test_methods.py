"""One suite for every method and every public function: what each promises, on one data set and on random ones.

A method is fitted once, and all promises are checked of it (`promises`); what needs other fits follows. Random data
are those of `strategies`. Some of it is seen of a few methods here, and of all of them with `-m slow`.
`benchmarks/fuzz.py` checks the same promises on thousands of calls.
"""

import os
import signal
import sys
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from contributed import Centroids
from hypothesis import assume
from hypothesis import strategies as st
from promises import (
    SLOTS,
    Result,
    cells_keep_their_sizes,
    check,
    check_all,
    difference,
    documented_warnings,
    factors_rebuild_the_layer,
    fingerprint,
    refused_for_few,
)
from strategies import DTYPES, FORMATS, Data, data, in_format, on_examples

import sc_noise2self as n2s
from sc_noise2self.methods import REGISTRY, as_methods


def truncated(counts, rank=3):
    """A denoiser: the first singular vectors."""
    u, s, v = np.linalg.svd(counts.toarray(), full_matrices=False)
    return np.maximum((u[:, :rank] * s[:rank]) @ v[:rank], 0)


def shrunken(counts, share):
    """A denoiser: rates between a cell's own and those of all."""
    size = np.asarray(counts.sum(axis=1)).reshape(-1, 1)
    mean = np.asarray(counts.sum(axis=0)).reshape(1, -1) / counts.sum()
    return (1 - share) * counts.toarray() + share * size * mean


SMALL = {n2s.Autoencoder: {"width": 4, "n_epochs": 2}}
HAS_TORCH = find_spec("torch") is not None


def registered():
    """Return the methods that have names, at settings that take no time."""
    small = {name: [each(**SMALL.get(each, {})) for each in several] for name, several in REGISTRY.items()}
    return {name: several if len(several) > 1 else several[0] for name, several in small.items()}


METHODS = {
    **registered(),
    "pca log1p": n2s.PCA(transform="log1p"),
    "pca sqrt": n2s.PCA(transform="sqrt"),
    "pca none": n2s.PCA(transform="none"),
    "pca and diffusion": ["pca", n2s.Diffusion()],
    "all": [one for several in registered().values() if not isinstance(several, list) for one in [several]],
    "function": n2s.Function(truncated, transform="sqrt", parameters={"rank": 2}),
    "pca and function": [n2s.PCA(transform="log1p"), n2s.Function(truncated, transform="sqrt")],
    "contributed": Centroids(),
}
if not HAS_TORCH:
    METHODS = {
        name: method
        for name, method in METHODS.items()
        if not any(isinstance(each, n2s.Autoencoder) for each in as_methods(method)[1])
    }
SCALES = tuple(n2s.scales.SCALES)
EXAMPLE = Data(n_cells=60, n_genes=40, depth=300, empty_cells=2, empty_genes=3, has_extras=True, seed=1)
SEEDS = (1, 2, 3, 4)


def of_methods(*few):
    """Run a test on a few methods, and on the others with -m slow."""
    methods = [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
    return pytest.mark.parametrize("method", methods)


# Of each kind one; or of those that take no time, where all counts are read in one place.
few_methods = of_methods("pca log1p", "knn", "autoencoder", "pca and diffusion", "function")
quick_methods = of_methods("pca log1p", "knn")
two_methods = pytest.mark.parametrize("method", ["pca log1p", "knn"])  # of formats: no method sees what counts came in
every_method = pytest.mark.parametrize("method", METHODS)
mix_slowly = pytest.mark.parametrize("mix", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "mix"])
with_and_without_mix = pytest.mark.parametrize("mix", [False, True], ids=["plain", "mix"])


def denoised(adata, method, **options):
    with documented_warnings():
        return n2s.denoise(adata, METHODS[method], copy=True, **options)


@cache
def fitted(method, mix=False, scale="counts", seed=0):
    """The example, denoised; nobody may write to it."""
    adata = EXAMPLE.adata()
    before = fingerprint(adata)
    found = denoised(adata, method, mix=mix, scale=scale, random_state=seed)
    assert not difference(before, fingerprint(adata)), "a copy was asked for, and the input has changed"
    return found


def record(adata):
    return adata.uns["denoised"]


def layer(adata):
    return np.asarray(adata.layers["denoised"])


def assert_same(a, b):
    found = difference(fingerprint(a), fingerprint(b))
    assert not found, found


# Promises of a result


@every_method
@with_and_without_mix
def test_promises(method, mix):
    check_all(Result(fitted(method, mix), EXAMPLE.counts().astype(float)))


@of_methods("pca log1p", "knn", "pca and diffusion", "function")
@mix_slowly
@pytest.mark.parametrize("scale", SCALES[1:])
def test_scales_are_of_one_result(method, mix, scale):
    found = fitted(method, mix, scale)
    check_all(Result(found, EXAMPLE.counts().astype(float)))
    with documented_warnings():
        expected = n2s.get.denoised(fitted(method, mix), scale=scale).to_numpy()
    np.testing.assert_allclose(layer(found), expected, rtol=1e-4, atol=1e-6)


@every_method
@mix_slowly
def test_the_same_seed_gives_the_same_bytes_and_leaves_the_rest(method, mix):
    adata = EXAMPLE.adata()
    before = fingerprint(adata)
    with documented_warnings():
        assert n2s.denoise(adata, METHODS[method], mix=mix) is None
    assert_same(adata, fitted(method, mix))
    assert_kept(before, fingerprint(adata))


@few_methods
def test_factors_alone_are_those_of_the_layer(method):
    adata = EXAMPLE.adata()
    before = fingerprint(adata)
    if not all(each.has_factors for each in as_methods(METHODS[method])[1]):
        with documented_warnings(), pytest.raises(ValueError, match="write_layer=False was given with a function"):
            n2s.denoise(adata, METHODS[method], write_layer=False)
        assert not difference(before, fingerprint(adata))
        return
    with documented_warnings():
        n2s.denoise(adata, METHODS[method], write_layer=False)
    assert_kept(before, fingerprint(adata))
    whole = fitted(method).copy()
    del whole.layers["denoised"]
    assert_same(adata, whole)


def assert_kept(before, after):
    """All that stood in an object is there as it was."""
    for slot, names in before.items():
        if slot in ("obs", "var"):
            assert {name: after[slot]["columns"][name] for name in names["columns"]} == names["columns"], slot
        elif slot in SLOTS:
            assert {name: after[slot][name] for name in names} == names, slot
        else:
            assert after[slot] == names, slot


def on_logarithms(adata):
    """log1p of rates, per 10 000, from a layer of expected counts."""
    size = np.maximum(EXAMPLE.counts().sum(axis=1, keepdims=True), 1)
    return np.log1p(1e4 * layer(adata) / size)


@few_methods
@mix_slowly
def test_another_seed_differs_a_little(method, mix):
    one, other = (fitted(method, mix, seed=seed) for seed in (0, 1))
    assert record(one)["gain"] != record(other)["gain"]
    if record(one)["has_factors"]:  # what a function returns has no seed
        assert layer(one).tobytes() != layer(other).tobytes()
    assert np.corrcoef(on_logarithms(one).ravel(), on_logarithms(other).ravel())[0, 1] > 0.9


@of_methods("pca log1p", "knn", "pca and diffusion")
@pytest.mark.parametrize("axis", ["cells", "genes"])
def test_permuted_data_give_the_permuted_result(method, axis):
    """A split belongs to places, so a permutation deals another: it may move the result as far as a seed does.

    How far is 1 - correlation of the layers on the logarithm. Four seeds say it to a factor of two, so three times the
    farthest is far outside; .01 is for four seeds that agree on a choice between candidates where another might not.
    """
    data = EXAMPLE.adata()
    order = np.random.default_rng(0).permutation(data.shape[axis == "genes"])
    back = np.argsort(order)
    permuted = data[order].copy() if axis == "cells" else data[:, order].copy()
    found = denoised(permuted, method)
    found = found[back].copy() if axis == "cells" else found[:, back].copy()
    found, expected = on_logarithms(found), on_logarithms(fitted(method))

    def moved(values):
        return 1 - np.corrcoef(values.ravel(), expected.ravel())[0, 1]

    by_seed = max(moved(on_logarithms(fitted(method, seed=seed))) for seed in SEEDS)
    assert moved(found) <= 3 * by_seed + 0.01


@every_method
@with_and_without_mix
def test_nothing_is_gained_on_null_counts(method, mix):
    adata = n2s.null_counts(EXAMPLE.adata())
    with documented_warnings() as warned:
        n2s.denoise(adata, METHODS[method], mix=mix)
    found = record(adata)
    assert found["gain"] <= 3 * found["gain_error"]
    said = [str(each.message) for each in warned]
    names = list(found["members"]["name"])
    if found["gain"] <= 0:
        assert names == ["mean"]
    assert (names == ["mean"]) == any("the mean profile is written" in each for each in said)
    if names == ["mean"] and not mix:
        counts = EXAMPLE.counts()
        expected = np.outer(counts.sum(axis=1), counts.sum(axis=0)) / counts.sum()
        np.testing.assert_allclose(layer(adata), expected, rtol=1e-4)


# What goes in


@two_methods
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_layer(method, format):
    adata = EXAMPLE.adata()
    adata.layers["counts"] = in_format(EXAMPLE.counts(), format, "float32")
    adata.X = adata.X * 0.5
    before = fingerprint(adata)
    np.testing.assert_allclose(layer(denoised(adata, method, layer="counts")), layer(fitted(method)), rtol=1e-4)
    assert not difference(before, fingerprint(adata))


@two_methods
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_gives_the_same_layer(method, dtype):
    few = np.minimum(EXAMPLE.counts(), 1 if dtype == "bool" else 120)
    adata = ad.AnnData(in_format(few, "csr_matrix" if dtype in DTYPES[::2] else "dense", dtype))
    before = fingerprint(adata)
    np.testing.assert_allclose(layer(denoised(adata, method)), layer(of_few(method, few.max())), rtol=1e-4)
    assert not difference(before, fingerprint(adata))


@cache
def of_few(method, largest):
    return denoised(ad.AnnData(sp.csr_matrix(np.minimum(EXAMPLE.counts(), largest), dtype=np.float32)), method)


@quick_methods
def test_a_view_is_denoised_as_its_copy_is(method):
    adata = EXAMPLE.adata()
    before = fingerprint(adata)
    view = adata[10:50, 5:]
    expected = denoised(view.copy(), method)
    found = denoised(view, method)
    assert view.is_view
    np.testing.assert_array_equal(layer(found), layer(expected))
    with documented_warnings():
        n2s.denoise(view, METHODS[method])
    np.testing.assert_array_equal(layer(view), layer(expected))
    assert not difference(before, fingerprint(adata))


def elsewhere(where, folder):
    """The example's counts on disk or in Dask."""
    adata = EXAMPLE.adata()
    if where == "dask":
        da = pytest.importorskip("dask.array")
        adata.X = da.from_array(adata.X, chunks=(17, -1), asarray=False)
        return adata
    if where == "backed":
        adata.write_h5ad(folder / "x.h5ad")
        return ad.read_h5ad(folder / "x.h5ad", backed="r")
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(folder / "x.zarr", mode="w", zarr_format=2)
    ad.io.write_elem(group, "X", adata.X)
    adata.X = ad.io.sparse_dataset(group["X"])
    return adata


@of_methods("pca log1p", "knn", "pca and diffusion", "autoencoder", "function", "pca and function", "contributed")
@mix_slowly
@pytest.mark.parametrize("where", ["backed", "zarr", "dask"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_disk_and_dask_give_what_memory_gives_or_say_the_way_out(method, mix, where, tmp_path):
    check_elsewhere(method, mix, where, tmp_path)


@pytest.mark.parametrize("where", ["backed", "zarr", "dask"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_disk_and_dask_are_mixed_in_as_memory_is(where, tmp_path):
    check_elsewhere("pca and diffusion", True, where, tmp_path)


def check_elsewhere(method, mix, where, tmp_path):
    adata = elsewhere(where, tmp_path)
    methods = as_methods(METHODS[method])[1]
    has_factors = all(each.has_factors for each in methods)
    if any(each.needs_memory for each in methods):
        with (
            documented_warnings(),
            pytest.raises(ValueError, match=r"needs all counts in memory.* adata = adata.to_memory\(\)"),
        ):
            n2s.denoise(adata, METHODS[method], mix=mix, write_layer=not has_factors)
        assert "denoised" not in adata.uns
        assert not {"denoised", "denoised_scale"} & {*adata.obsm, *adata.varm}
        return
    with documented_warnings():
        n2s.denoise(adata, METHODS[method], mix=mix, write_layer=False)
    expected = fitted(method, mix)
    np.testing.assert_allclose(n2s.get.denoised(adata).to_numpy(), layer(expected), rtol=1e-5, atol=1e-5)
    assert record(adata)["gain"] == pytest.approx(record(expected)["gain"], rel=1e-4)


# All or nothing

REFUSED = {
    "normalised": (lambda adata: setattr(adata, "X", adata.X * 0.5), {}, 'raw counts.*layer="counts"'),
    "nan": (lambda adata: adata.X.data.__setitem__(5, np.nan), {}, "X holds nan at cell"),
    "infinite": (lambda adata: adata.X.data.__setitem__(5, np.inf), {}, "X holds inf at cell"),
    "negative": (lambda adata: adata.X.data.__setitem__(5, -1), {}, "X holds -1 at cell"),
    "nothing": (lambda adata: adata.X.data.__setitem__(slice(None), 0), {}, "holds no molecule"),
    "no such layer": (lambda adata: None, {"layer": "raw"}, "layer 'raw' is missing: adata.layers has"),
    "no such scale": (lambda adata: None, {"scale": "log"}, "scale is 'log'"),
    "negative seed": (lambda adata: None, {"random_state": -1}, "random_state is -1"),
    "taken key": (lambda adata: None, {"key_added": "note"}, r"adata.uns\['note'\] exists"),
}


@every_method
@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_writes_nothing(method, case):
    change, options, message = REFUSED[case]
    for earlier in (False, True):  # also where a result stands already
        adata = fitted(method).copy() if earlier else EXAMPLE.adata()
        change(adata)
        before = fingerprint(adata)
        with documented_warnings(), pytest.raises(ValueError, match=message):
            n2s.denoise(adata, METHODS[method], **options)
        assert not difference(before, fingerprint(adata))


BEYOND = {"n_components": 1000, "n_pcs": 1000, "n_neighbors": 1000, "width": 1000, "n_clusters": 1000}


@every_method
@pytest.mark.parametrize("option", BEYOND)
def test_options_beyond_the_counts_are_refused_and_nothing_written(method, option):
    """Of the first of several methods that has the option, too."""
    methods = as_methods(METHODS[method])[1]
    has = [i for i, each in enumerate(methods) if hasattr(each, option)]
    if not has:
        return
    methods[has[0]] = replace(methods[has[0]], **{option: BEYOND[option]})
    adata = EXAMPLE.adata()
    before = fingerprint(adata)
    with documented_warnings(), pytest.raises(ValueError, match=f"{option} is 1000"):
        n2s.denoise(adata, methods if len(methods) > 1 else methods[0])
    assert not difference(before, fingerprint(adata))


class Interrupts:
    """Ctrl-C before the `at`-th line that the package runs in this thread; None notes what stands in `watched`."""

    def __init__(self, at=None, watched=None):
        self.at, self.watched = at, watched
        self.lines, self.seen = 0, []

    def __enter__(self):
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _on_call(self, frame, event, argument):
        return self._on_line if Path(frame.f_code.co_filename).is_relative_to(HOME) else None

    def _on_line(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.watched is not None:
                self.seen.append([place(getattr(self.watched, slot)) for slot in SLOTS])
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self._on_line

    @property
    def writing(self):
        """The lines from just before the first change of what stands there to just after the last."""
        changes = [i + 2 for i, (a, b) in enumerate(pairwise(self.seen)) if a != b]
        return range(max(1, changes[0] - 1), min(self.lines, changes[-1] + 1) + 1) if changes else range(0)


def place(slot):
    """What stands in a slot, by name, and by identity where that lasts."""
    return (
        (id(slot), *slot.columns) if hasattr(slot, "columns") else [(name, id(value)) for name, value in slot.items()]
    )


HOME = Path(n2s.__file__).parent
# An ensemble of all methods is written as any ensemble is, and takes minutes.
WRITERS = {
    **{
        f"denoise {name}": lambda adata, name=name: n2s.denoise(adata, METHODS[name])
        for name in METHODS
        if name != "all"
    },
    "denoise mix": lambda adata: n2s.denoise(adata, n2s.PCA(transform="log1p"), mix=True),
    "denoise factors": lambda adata: n2s.denoise(adata, n2s.PCA(transform="sqrt"), write_layer=False),
    "select_rank": lambda adata: n2s.select_rank(adata, max_rank=5),
    "calibrate": lambda adata: n2s.calibrate(adata, shrunken, {"share": [0.1, 0.5, 0.9]}, refit=True),
    "select_resolution": lambda adata: n2s.select_resolution(adata, [0.5, 2], n_neighbors=3),
    "cluster_support": lambda adata: n2s.cluster_support(adata, 2.0, n_neighbors=3),
    "rank_genes_groups": lambda adata: n2s.rank_genes_groups(adata, 2.0, n_neighbors=3),
}


def interrupted(write, start, n_writing, n_random, seed=0):
    """Interrupt a writer while it writes and at random: what stood there, or the whole result, must be there."""
    with documented_warnings():
        write(start())  # what is done once only, such as imports, is done
        whole = start()
        with Interrupts(watched=whole) as noted:
            write(whole)
    old, new = state(start()), state(whole)
    assert old != new
    rng = np.random.default_rng(seed)
    moments = set(rng.permutation(noted.writing)[:n_writing]) | set(rng.integers(1, noted.lines + 1, n_random))
    n_hit, wrong = 0, {}
    for k in sorted(moments):
        adata = start()
        try:
            with documented_warnings(), Interrupts(k):
                write(adata)
        except KeyboardInterrupt:
            n_hit += 1
        found = state(adata)
        if found not in (old, new):
            wrong[k] = f"{difference(old, found)}; {difference(new, found)}"
    # Which thread waits for which differs from run to run, so a moment may lie beyond the end.
    assert n_hit > len(moments) / 2
    assert not wrong, f"{len(wrong)} of {len(moments)} interrupts leave half a result: {next(iter(wrong.values()))}"


def state(adata):
    """All that can be told of an object, but for the seconds that a calibration took."""
    found = fingerprint(adata)
    columns = found["uns"].get("'calibrate'", {}).get("'table'", {}).get("columns", {})
    for name in [name for name in columns if name.endswith("'seconds'")]:
        del columns[name]
    return found


TINY = Data(n_cells=14, n_genes=10, has_extras=True, seed=2)


@pytest.mark.parametrize("writer", ["denoise mix", "calibrate", "rank_genes_groups"])
def test_an_interrupt_leaves_the_old_or_the_new(writer):
    interrupted(WRITERS[writer], beginning(earlier=True), n_writing=6, n_random=1)


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("earlier", [False, True], ids=["fresh", "earlier result"])
def test_many_interrupts_leave_the_old_or_the_new(writer, earlier):
    interrupted(WRITERS[writer], beginning(earlier), n_writing=5, n_random=1)


def beginning(earlier):
    """What makes the object to write to, with an earlier result or without."""
    first = TINY.adata()
    if earlier:
        with documented_warnings():
            n2s.denoise(first, mix=True, random_state=5)
    return first.copy


# Files


@of_methods("pca log1p", "function")
@with_and_without_mix
@pytest.mark.parametrize("format", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_files_keep_everything_readable(method, mix, format, tmp_path):
    if format == "zarr":
        pytest.importorskip("zarr")
    adata = fitted(method, mix, "rates")
    path = tmp_path / f"x.{format}"
    getattr(adata.copy(), f"write_{format}")(path)
    back = getattr(ad, f"read_{format}")(path)
    for promise in (factors_rebuild_the_layer, cells_keep_their_sizes):
        check(promise, Result(back, EXAMPLE.counts().astype(float)))
    for source in ("factors", "layer") if record(back)["has_factors"] else ("layer",):
        with documented_warnings():
            found, expected = (n2s.get.denoised(each, scale="rates", source=source) for each in (back, adata))
        assert_same(found, expected)
    assert n2s.report(back) == n2s.report(adata)
    with documented_warnings():
        n2s.denoise(back, n2s.PCA(transform="log1p"))  # an earlier result is known as one, and replaced


@of_methods("pca log1p")
@pytest.mark.parametrize("source", ["h5ad", "zarr"])
@pytest.mark.parametrize("target", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_a_file_is_denoised_as_its_counts_are(method, source, target, tmp_path):
    for needed in ("zarr", "dask.array"):
        pytest.importorskip(needed)
    source, target = tmp_path / f"in.{source}", tmp_path / f"out.{target}"
    getattr(EXAMPLE.adata(), f"write_{source.suffix[1:]}")(source)
    before = contents_of(source)
    with documented_warnings():
        said = n2s.denoise_file(source, target, method=METHODS[method])
    assert contents_of(source) == before
    assert sorted(os.listdir(tmp_path)) == sorted([source.name, target.name])
    found = getattr(ad, f"read_{target.suffix[1:]}")(target)
    assert said == n2s.report(found)
    np.testing.assert_allclose(layer(found), layer(fitted(method)), rtol=1e-4, atol=1e-5)
    expected = getattr(ad, f"read_{source.suffix[1:]}")(source)
    for slot in ("obs", "var", "obsm", "varm", "obsp", "uns"):
        for name, value in getattr(expected, slot).items():
            own = getattr(found, slot)[name]
            assert fingerprint(plain(own)) == fingerprint(plain(value)), f"{slot}[{name!r}]"


def plain(value):
    return value.toarray() if sp.issparse(value) else value


def contents_of(path):
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return [(str(each), each.read_bytes()) for each in files]


# Random data


@on_examples(data(), st.sampled_from([name for name in METHODS if name != "autoencoder"]), st.booleans(), many=80)
def test_any_counts_are_denoised(words, method, mix):
    check_denoised(words, method, mix)


@pytest.mark.skipif(not HAS_TORCH, reason="needs PyTorch")
@on_examples(data(), st.booleans(), few=5, many=30)
def test_any_counts_are_denoised_by_an_autoencoder(words, mix):
    check_denoised(words, "autoencoder", mix)


@on_examples(data(largest=3), st.sampled_from(list(METHODS)), st.booleans())
def test_the_smallest_counts_are_denoised(words, method, mix):
    check_denoised(words, method, mix)


def check_denoised(words, method, mix):
    adata = words.adata()
    before = fingerprint(adata)
    methods = as_methods(METHODS[method])[1]
    # A bottleneck is no wider than the genes.
    narrow = [replace(each, width=2) if hasattr(each, "width") else each for each in methods]
    with documented_warnings(), refused_for_few(words.counts()):
        found = n2s.denoise(adata, narrow if len(narrow) > 1 else narrow[0], layer=words.layer, mix=mix, copy=True)
        assert not difference(before, fingerprint(adata))
        check_all(Result(found, words.counts().astype(float)))


SPLITS = st.sampled_from(
    [
        {},
        {"fraction": 0.1},
        {"fraction": 0.9},
        {"folds": 2},
        {"folds": 5},
        {"folds": 10},
        {"capture": 0.3},
        {"overdispersion": 0.5},
        {"overdispersion": 0.5, "folds": 4},
    ]
)


@on_examples(data(smallest=1), SPLITS, few=12)
def test_any_counts_are_split(words, options):
    matrix, counts = words.matrix(), words.counts()
    before = fingerprint(matrix)
    parts = n2s.split_molecules(matrix, random_state=words.seed, **options)
    assert not difference(before, fingerprint(matrix))
    assert len(parts) == options.get("folds", 2)
    values = []
    for part in parts:
        assert type(part) is type(matrix)
        # Repeated entries may add up to more than their own type holds.
        assert part.dtype == matrix.dtype or counts.max() > (np.iinfo(matrix.dtype).max if matrix.dtype != bool else 1)
        part = part.toarray() if sp.issparse(part) else part
        assert ((part >= 0) & (part <= counts)).all()
        values.append(part.astype(np.int64))
    if "capture" in options:
        assert (sum(values) >= counts).all()
    else:
        np.testing.assert_array_equal(sum(values), counts)
    same = n2s.split_molecules(counts, random_state=words.seed, **options)
    for value, other in zip(values, same, strict=True):
        np.testing.assert_array_equal(value, other)


@on_examples(data(smallest=1), SPLITS, few=12)
def test_any_object_is_split(words, options):
    adata = words.adata()
    before = fingerprint(adata)
    with documented_warnings():
        parts = n2s.split_molecules(adata, layer=words.layer, random_state=words.seed, **options)
    assert not difference(before, fingerprint(adata))
    alone = n2s.split_molecules(words.matrix(), random_state=words.seed, **options)
    for part, matrix in zip(parts, alone, strict=True):
        assert (np.asarray(matrix != part.X).sum() if not sp.issparse(matrix) else (matrix != part.X).nnz) == 0
        # An object of anndata takes names that are strings alone.
        assert_same(part.obs, adata.obs.set_axis(adata.obs_names.astype(str)))
        assert_same(part.var, adata.var.set_axis(adata.var_names.astype(str)))
        part.obs["new"] = part.var["new"] = 1
    assert not difference(before, fingerprint(adata))


@on_examples(data(smallest=1), st.sampled_from(["shuffled", "permuted"]))
def test_any_counts_have_null_counts(words, kind):
    matrix, counts = words.matrix(), words.counts()
    before = fingerprint(matrix)
    null = n2s.null_counts(matrix, kind)
    assert not difference(before, fingerprint(matrix))
    assert type(null) is type(matrix)
    values = (null.toarray() if sp.issparse(null) else null).astype(np.int64)
    np.testing.assert_array_equal(values.sum(axis=0), counts.sum(axis=0))
    if kind == "shuffled":
        np.testing.assert_array_equal(values.sum(axis=1), counts.sum(axis=1))
    else:
        np.testing.assert_array_equal(np.sort(values, axis=0), np.sort(counts, axis=0))
    adata = words.adata()
    before = fingerprint(adata)
    with documented_warnings():
        found = n2s.null_counts(adata, kind, layer=words.layer)
    assert not difference(before, fingerprint(adata))
    assert (null != found.X).sum() == 0


@on_examples(data(smallest=5), st.sampled_from(["loo", "noise2self", "mcv", "bcv"]), st.sampled_from([None, 1, 2]))
def test_any_counts_have_a_rank(words, protocol, max_rank):
    with documented_warnings():
        adata = words.adata().copy()
    before = fingerprint(adata)
    # Half of the genes may hold nothing, however many molecules there are.
    few = np.zeros(1) if protocol == "bcv" else words.counts()
    with documented_warnings(), refused_for_few(few):
        rank = n2s.select_rank(adata, protocol=protocol, max_rank=max_rank, layer=words.layer)
    found = adata.uns.pop("select_rank")
    curve = found["table"]
    assert not difference(before, fingerprint(adata))
    assert rank == found["rank"] == curve["rank"][curve["chosen"]].item()
    assert type(rank) is int
    assert 0 <= rank <= curve["rank"].max() < min(words.n_cells, words.n_genes)
    assert curve["rank"][curve["loss"].argmin()] == found["split_rank"]
    assert found["split_rank"] in found["within_one_error"]
    for name, values in {
        "splits": found["splits"],
        **curve[curve.columns.intersection(["loss", "full_depth_loss"])],
    }.items():
        assert np.isfinite(values).all(), name
    assert (curve["error"] >= 0).all()  # infinite where one cell is scored


OF_CLUSTERS = {
    "select_resolution": lambda adata, **options: n2s.select_resolution(adata, [0.5, 2], **options),
    "cluster_support": lambda adata, **options: n2s.cluster_support(adata, 1.0, **options),
    "rank_genes_groups": lambda adata, **options: n2s.rank_genes_groups(adata, 1.0, **options),
}
NUMBERS = ["scores", "pvals", "pvals_adj", "logfoldchanges"]


def check_numbers(name, adata):
    """Check what a function of clusters wrote."""
    if name == "rank_genes_groups":
        table = sc.get.rank_genes_groups_df(adata, None)
        assert len(table) == adata.n_vars * len(adata.obs["n2s_groups"].cat.categories)
        assert np.isfinite(table[NUMBERS]).all(axis=None)
        assert table["pvals"].between(0, 1).all()
        assert table["pvals_adj"].between(0, 1).all()
        return
    table = adata.uns[name]["table"]
    assert np.isfinite(table["gain"]).all()
    assert (table["error"] >= 0).all()  # infinite where one cell tells
    if name == "cluster_support":
        assert len(table) == len(adata.obs[name].cat.categories) - 1
        assert np.isfinite(table["distance"]).all()


@on_examples(data(), st.sampled_from(list(OF_CLUSTERS)), st.sampled_from([None, 0.5]), st.booleans(), few=12)
def test_any_counts_are_clustered(words, name, phi, has_mask):
    with documented_warnings():
        adata = words.adata().copy()
    before = fingerprint(adata)
    mask = np.arange(adata.n_vars) < max(2, adata.n_vars // 2) if has_mask else None
    try:
        with documented_warnings(), refused_for_few(words.counts()):
            OF_CLUSTERS[name](adata, overdispersion=phi, layer=words.layer, mask_var=mask)
    except ValueError as error:
        is_empty = has_mask and not words.counts()[:, mask].any()
        expected = "none of which has a molecule" if is_empty else "all cells are one cluster at resolution 1"
        assert expected in str(error)  # noqa: PT017
        assert not difference(before, fingerprint(adata))
        return
    check_numbers(name, adata)
    n2s.remove(adata, "n2s_groups" if name == "rank_genes_groups" else name)
    adata.uns.pop("rank_genes_groups", None)
    assert not difference(before, fingerprint(adata))


@on_examples(data(), st.booleans())
def test_any_counts_have_an_overdispersion(words, is_grouped):
    with documented_warnings():
        adata = words.adata().copy()
        before = fingerprint(adata)
        phi = n2s.overdispersion(adata, "group" if is_grouped and words.has_extras else None, layer=words.layer)
    assert phi.shape == (words.n_genes,)
    assert np.isfinite(phi).all()
    assert (phi >= 0).all()
    assert not difference(before, fingerprint(adata))


@pytest.mark.parametrize("name", OF_CLUSTERS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_clustered_alike(name, format):
    found = []
    for each in ("csr_matrix", format):
        adata = ad.AnnData(in_format(EXAMPLE.counts(), each, "int32"))
        with documented_warnings():
            OF_CLUSTERS[name](adata)
        found.append({"obs": fingerprint(adata.obs), "uns": fingerprint(adata.uns)})
    assert not difference(*found)


@pytest.mark.parametrize("name", OF_CLUSTERS)
@pytest.mark.parametrize("where", ["backed", "zarr", "dask"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_counts_elsewhere_are_clustered_alike(name, where, tmp_path):
    adata, same = elsewhere(where, tmp_path), EXAMPLE.adata()
    with documented_warnings():
        for each in (adata, same):
            OF_CLUSTERS[name](each)
    assert not difference(fingerprint(same.uns[name]), fingerprint(adata.uns[name]))


@on_examples(
    data(smallest=4),
    st.sampled_from(["molecules", "genes", "blocks"]),
    st.sampled_from([None, "poisson", "mse", "mse_sqrt", "mse_log1p"]),
    st.sampled_from(["least", "one_standard_error"]),
)
def test_any_counts_calibrate_a_denoiser(words, partition, loss, rule):
    assume(min(words.n_cells, words.n_genes) >= {"molecules": 1, "genes": 10, "blocks": 5}[partition])
    assume(words.kind != "one gene" or partition == "molecules")  # no other gene tells of it
    with documented_warnings():
        adata = words.adata().copy()
    before = fingerprint(adata)
    options = {"partition": partition, "loss": loss, "rule": rule, "refit": True, "layer": words.layer}
    with documented_warnings(), refused_for_few(words.counts()):
        found = n2s.calibrate(adata, shrunken, {"share": [0.1, 0.5, 0.9]}, **options)
    assert found.best == {
        "share": found.table["param_share" if "share" not in found.table else "share"][found.table["chosen"]].iloc[0]
    }
    assert found.table["chosen"].sum() == 1
    assert (found.table["failure"] == "").all()
    assert np.isfinite(found.table["loss"]).all()
    assert (found.table["error"] >= 0).all()  # infinite where one cell tells
    refitted = adata.layers.pop("calibrate")
    assert np.isfinite(refitted).all()
    np.testing.assert_allclose(refitted.sum(axis=1), words.counts().sum(axis=1), rtol=1e-4)
    del adata.uns["calibrate"]
    assert not difference(before, fingerprint(adata))


@on_examples(data(has_extras=True), st.booleans(), st.sampled_from(SCALES))
def test_any_result_is_read_by_name(words, mix, scale):
    with documented_warnings(), refused_for_few(words.counts()):
        adata = words.adata().copy()
        n2s.denoise(adata, n2s.PCA(transform="log1p"), layer=words.layer, mix=mix, scale=scale)
        before = fingerprint(adata)
        own = n2s.get.adata(adata, scale=scale)
        np.testing.assert_allclose(own.X, layer(adata), rtol=1e-4, atol=1e-5 * max(1, layer(adata).max()))
        assert_same(own.obs, adata.obs)
        genes, cells = adata.var_names[[-1, 0]], adata.obs_names[[-1, 0]]
        if words.names == "duplicated":
            with pytest.raises(KeyError, match=r"names are not unique: call adata.(var|obs)_names_make_unique"):
                n2s.get.denoised(adata, genes, cells=cells, scale=scale)
        else:
            found = n2s.get.denoised(adata, list(genes), cells=list(cells), scale=scale)
            np.testing.assert_allclose(
                found, layer(adata)[[-1, 0]][:, [-1, 0]], rtol=1e-4, atol=1e-5 * max(1, layer(adata).max())
            )
            single = n2s.get.adata(adata, [genes[0]], cells=[cells[1]], scale=scale)
            assert (single.obs_names[0], single.var_names[0]) == (cells[1], genes[0])
            with pytest.raises(KeyError, match="not in adata: 'nobody'"):
                n2s.get.denoised(adata, ["nobody"])
    with pytest.raises(KeyError, match="there is no result 'other'"):
        n2s.report(adata, key="other")
    assert not difference(before, fingerprint(adata))


PLOTS = {
    "markers": lambda adata, genes: n2s.pl.markers(adata, genes[:2], show=False),
    "markers of three": lambda adata, genes: n2s.pl.markers(adata, genes[:3], show=False),
    "markers of groups": lambda adata, genes: n2s.pl.markers(adata, genes[:2], color="group", show=False),
    "markers in panels": lambda adata, genes: n2s.pl.markers(
        adata, genes[:2], panels=("raw", "under", "denoised", "over"), show=False
    ),
    "embedding": lambda adata, genes: n2s.pl.embedding(adata, genes[:1], show=False),
    "gain_per_gene": lambda adata, genes: n2s.pl.gain_per_gene(adata, show=False),
    "spectrum": lambda adata, genes: n2s.pl.spectrum(adata, show=False),
    "loss of ranks": lambda adata, genes: n2s.pl.loss(adata, show=False),
    "loss of a calibration": lambda adata, genes: n2s.pl.loss(adata, key="calibrate", show=False),
    "caption": lambda adata, genes: n2s.pl.caption(adata, n2s.pl.gain_per_gene(adata, show=False)),
}


@on_examples(
    data(smallest=5, largest=20, names="plain", layer=None, has_extras=True, is_view=False, kind="programmes"),
    few=3,
    many=30,
)
def test_any_result_is_plotted(words):
    adata = words.adata()
    with documented_warnings():
        with refused_for_few(words.counts()):
            n2s.denoise(adata, n2s.PCA(transform="log1p"))
            n2s.select_rank(adata)
            n2s.calibrate(adata, shrunken, {"share": [0.1, 0.5, 0.9]})
        before = [fingerprint(each) for each in (adata.obs, adata.layers, adata.obsm, adata.X)]
        is_mean = list(record(adata)["members"]["name"]) == ["mean"]
        for name, plot in PLOTS.items():
            if is_mean and name in ("spectrum", "markers in panels"):
                with pytest.raises((ValueError, KeyError), match="(?i)pca"):
                    plot(adata, list(adata.var_names))
            else:
                plot(adata, list(adata.var_names))
            for number in plt.get_fignums():
                plt.figure(number).canvas.draw()
                for axes in plt.figure(number).axes:
                    assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all(), name
            plt.close("all")
    assert before == [fingerprint(each) for each in (adata.obs, adata.layers, adata.obsm, adata.X)]
