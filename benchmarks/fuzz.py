"""Random public calls on random small data: how many end well, are refused in a sentence, or are wrong.

    python benchmarks/fuzz.py --calls 10000 --seed 0 --jobs 2
    python benchmarks/fuzz.py --only 4711

A call is *ok* if all that is promised holds of what it returned and wrote (`tests/promises.py`), *refused* if the
package itself raised an error of one sentence and nothing was written, and *WRONG* otherwise: another value than
promised, an argument accepted that means nothing, an input changed, an error from the depths, a warning that no page
names, a hang or a crash. Each call is made by its seed alone. Calls run in processes of their own, which may die.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from multiprocessing.connection import Connection, wait
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

_SECONDS = 60  # a call that lasts longer hangs
_GIGABYTES = 12  # of address space beyond what the imports take
_REFUSALS = (ValueError, TypeError, KeyError, OSError, ImportError, MemoryError)
_HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    10**6,
    2**31,
    2**64,
    float("nan"),
    float("inf"),
    "",
    "yes",
    "/",
    ".",
    "é",
    b"x",
    (),
    [],
    ["a"],
    [1],
    {},
    {"a": 1},
    np.array([1, 2]),
    object(),
)
_REPEATS = ("folds", "n_splits", "n_seeds")


# What arguments may be


@dataclass(frozen=True)
class Kind:
    """What an argument may be: values to draw from, and whether any value is one that it may take."""

    values: tuple[Any, ...]
    takes: Callable[[Any], bool]

    def may_be(self, value: Any) -> bool:
        """Return whether this is a value that it may take."""
        try:
            return bool(self.takes(value))
        except Exception:  # what the question itself does not take
            return False


def _is_whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


def _whole(*values: int, least: int = 1) -> Kind:
    return Kind(values, lambda v: _is_whole(v, least))


def _one_of(*values: Any) -> Kind:
    return Kind(values, lambda v: isinstance(v, str | None) and v in values)


def _optional(kind: Kind) -> Kind:
    return Kind((None, *kind.values), lambda v: v is None or kind.may_be(v))


_FLAG = Kind((False, True), lambda v: isinstance(v, bool | np.bool_) or (isinstance(v, Integral) and v in (0, 1)))
_SHARE = Kind((0.1, 0.5, 0.9), lambda v: isinstance(v, Real) and not isinstance(v, bool) and 0 < v < 1)
_NAME = Kind(("denoised", "other", "é key"), lambda v: isinstance(v, str) and v not in ("", ".", "..") and "/" not in v)
_SEED = _whole(0, 1, 12345, least=0)
_SCALE = _one_of("counts", "rates", "log1p_cp10k", "expected_log1p_cp10k")

_DENOISE = {
    "scale": _SCALE,
    "mix": _FLAG,
    "write_layer": _FLAG,
    "key_added": _NAME,
    "n_splits": _whole(1, 2),
    "mask_var": _optional(_one_of("chosen")),
    "random_state": _SEED,
}
_COMPONENTS = _optional(_whole(1, 2, 5))


def _several(*values: Any) -> Kind:
    """Return a whole number from 1, or some of them to choose from."""
    return Kind(values, lambda v: _is_whole(v) or (_is_some(v) and all(map(_is_whole, v))))


def _is_some(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and len(value) > 0


def _is_level(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < np.inf


_OF_METHOD: dict[str, dict[str, Kind]] = {
    "PCA": {"transform": _one_of("auto", "log1p", "sqrt", "none"), "n_components": _COMPONENTS},
    "KNN": {"n_neighbors": _several(3, [2, 4]), "n_pcs": _several(1, [1, 2]), "n_components": _COMPONENTS},
    "Diffusion": {
        "n_neighbors": _several(3, [2, 4]),
        "n_pcs": _several(1, [1, 2]),
        "t": Kind((0, 3, [1, 2]), lambda v: _is_whole(v, 0) or (_is_some(v) and all(_is_whole(t, 0) for t in v))),
        "n_components": _COMPONENTS,
    },
    "Autoencoder": {
        "width": _several(1, 2),
        "n_seeds": _whole(1, 2),
        "batch_key": _optional(_one_of("lane")),
        "loss": _one_of(
            "multinomial", "poisson", "negative_binomial", "masked_multinomial", "mse_log1p", "noise2same_sqrt"
        ),
        "device": _one_of("auto", "cpu"),
        "n_components": _COMPONENTS,
        "n_epochs": _optional(_whole(2)),
    },
    "Clusters": {
        "resolution": Kind((0, 1.0, [0, 0.5, 2]), lambda v: _is_level(v) or (_is_some(v) and all(map(_is_level, v)))),
        "n_pcs": _optional(_whole(1, 2)),
        "n_neighbors": _several(3, [2, 4]),
    },
    "Function": {
        "transform": _one_of("none", "log1p", "sqrt"),
        "parameters": Kind(({"share": 0.3},), lambda v: isinstance(v, dict) and set(v) <= {"share"}),
    },
}
_METHODS = ("PCA", "PCA", "PCA", "KNN", "Diffusion", "Clusters", "Function", "Autoencoder")
_OVERDISPERSION = Kind(
    (None, 0, 0.5, 5), lambda v: not isinstance(v, str | bytes | dict) and not np.any(np.equal(v, -1))
)
_SPLIT = {
    "fraction": _SHARE,
    "folds": _optional(_whole(2, 3, 7, 12, least=2)),
    "capture": _optional(_SHARE),
    "overdispersion": _OVERDISPERSION,
    "random_state": _SEED,
}
_RANK = {
    "protocol": _one_of("loo", "noise2self", "mcv", "bcv"),
    "max_rank": _optional(_whole(1, 2, 4)),
    "transform": _optional(_one_of("log1p", "sqrt", "none")),
    "center": _optional(_FLAG),
    "n_splits": _whole(1, 2),
    "key_added": _NAME,
    "mask_var": _optional(_one_of("chosen")),
    "random_state": _SEED,
}
_OF_CLUSTERS = {
    "n_pcs": _optional(_whole(1, 2)),
    "n_neighbors": _whole(2, 5),
    "overdispersion": _OVERDISPERSION,
    "mask_var": _optional(_one_of("chosen")),
    "random_state": _SEED,
}
_RESOLUTION = {
    "resolutions": _optional(
        Kind(([0.1, 1], (2, 1, 1), np.array([0.5])), lambda v: _is_level(v) or (_is_some(v) and all(map(_is_level, v))))
    ),
    "rule": _one_of("least", "one_standard_error"),
    "n_splits": Kind((1, 2, 10), lambda v: _is_whole(v) and v <= 10),
    "key_added": _NAME,
    **_OF_CLUSTERS,
}
_SUPPORT = {"resolution": Kind((0.5, 1, 8.0), _is_level), "key_added": _NAME, **_OF_CLUSTERS}
_GROUPS = {**_SUPPORT, "groups_added": Kind(("n2s_groups", "clusters"), _NAME.takes)}
_PARTITIONS = ("molecules", "genes", "blocks", {"a": ["g0", "g1"]})
_CALIBRATE = {
    "partition": Kind(_PARTITIONS, lambda v: isinstance(v, str | dict) and v in _PARTITIONS),
    "n_splits": _whole(1, 2),
    "loss": _optional(_one_of("poisson", "mse", "mse_sqrt", "mse_log1p")),
    "rule": _one_of("least", "one_standard_error"),
    "transform": _one_of("none", "log1p", "sqrt"),
    "key_added": _NAME,
    "refit": _FLAG,
    "random_state": _SEED,
}


class Wrong(Exception):
    """A promise that does not hold."""


@dataclass
class Call:
    """One call: its generator, a folder of its own, and what it was made of."""

    rng: np.random.Generator
    folder: Path
    made: dict[str, Any] = field(default_factory=dict)
    hostile: str = ""  # what must be refused

    def choose(self, values: Any) -> Any:
        """Return one of the values."""
        return values[int(self.rng.integers(len(values)))]

    def likely(self, share: float) -> bool:
        """Return True that often."""
        return bool(self.rng.random() < share)

    def options(self, kinds: dict[str, Kind], share: float = 0.25) -> dict[str, Any]:
        """Return some of the options, and now and then a hostile value for one of them."""
        out = {name: self.choose(kind.values) for name, kind in kinds.items() if self.likely(share)}
        if self.likely(0.15):
            name = self.choose(list(kinds))
            value = self.choose(_HOSTILE)
            # A million splits are what was asked for, and last as long.
            if not (name in _REPEATS and isinstance(value, int) and value > 10):
                out[name] = value
                self.hostile += "" if kinds[name].may_be(value) else f"{name}={value!r} "
        self.made |= out
        return out

    def data(self, **fixed: Any) -> Any:
        """Return the words that random counts are made of."""
        from strategies import random_data

        words = random_data(self.rng, **{"smallest": 2, "largest": self.choose((3, 8, 30)), **fixed})
        self.made["data"] = words
        return words

    def spoiled(self, adata: Any, layer: str | None) -> None:
        """Now and then put what is not a count among the counts."""
        if adata.is_view or not self.likely(0.08):
            return
        value = self.choose((-1, 0.5, np.nan, np.inf, 1e-300, 1.0000001))
        counts = adata.X if layer is None else adata.layers[layer]
        matrix = np.array(counts.toarray() if hasattr(counts, "toarray") else counts, dtype=np.float64)
        matrix[self.rng.integers(matrix.shape[0]), self.rng.integers(matrix.shape[1])] = value
        if layer is None:
            adata.X = matrix
        else:
            adata.layers[layer] = matrix
        self.made["spoiled"] = value
        self.hostile += f"counts with {value} "


# The calls


def _denoised(call: Call, adata: Any, words: Any, **fixed: Any) -> tuple[Any, dict[str, Any]]:
    """Denoise a copy, check all that is promised of it, and return it with the options."""
    from promises import Result, check_all

    import sc_noise2self as n2s

    options = {**call.options(_DENOISE), **fixed}
    method = _method(call)
    if call.likely(0.2):
        method = [method, *(_method(call) for _ in range(call.choose((1, 2))))]
    call.made["method"] = method
    found = n2s.denoise(adata, method, layer=words.layer, copy=True, **options)
    key = options.get("key_added", "denoised")
    if options.get("write_layer", True) is True and not call.hostile:
        check_all(Result(found, words.counts().astype(float), key))
    return found, options


def _method(call: Call) -> Any:
    """Return a name, or a method object with some options."""
    import sc_noise2self as n2s

    name = call.choose(_METHODS)
    if name in ("PCA", "KNN", "Diffusion", "Clusters") and call.likely(0.3):
        return name.lower()
    options = call.options(_OF_METHOD[name])
    if name == "Autoencoder":
        return n2s.Autoencoder(**{"n_epochs": 2, "width": 2, **options})
    if name == "Function":
        return n2s.Function(shrunken, **{"parameters": {"share": 0.5}, **options})
    return getattr(n2s, name)(**options)


def denoise(call: Call) -> None:
    """Denoise a copy by any method."""
    words = call.data()
    adata = words.adata()
    call.spoiled(adata, words.layer)
    with _unchanged(adata):
        _denoised(call, adata, words)


def denoise_in_place(call: Call) -> None:
    """Denoise where a result stands already; a refusal leaves it."""
    from promises import difference, fingerprint

    import sc_noise2self as n2s

    words = call.data(is_view=False)
    adata = words.adata()
    n2s.denoise(adata, n2s.PCA(transform="log1p"), layer=words.layer, mix=call.likely(0.5))
    call.spoiled(adata, words.layer)
    options = call.options(_DENOISE)
    before = fingerprint(adata)
    try:
        n2s.denoise(adata, layer=words.layer, **options)
    except BaseException:
        found = difference(before, fingerprint(adata))
        if found:
            raise Wrong(f"written before a refusal: {found}") from None
        raise
    n2s.report(adata, key=options.get("key_added", "denoised"))


def select_rank(call: Call) -> None:
    """Choose a rank."""
    import sc_noise2self as n2s

    words = call.data(is_view=False)
    adata = words.adata()
    call.spoiled(adata, words.layer)
    options = call.options(_RANK)
    copied = adata.copy()
    with _unchanged(adata):
        rank = n2s.select_rank(copied, layer=words.layer, **options)
    found = copied.uns[options.get("key_added", "select_rank")]
    curve = found["table"]
    _demand(rank == found["rank"] and 0 <= rank <= curve["rank"].max(), f"rank {rank} of {curve['rank'].max()}")
    _demand(np.isfinite(curve["loss"]).all() and np.isfinite(found["splits"]).all(), "a loss is not finite")
    _demand(np.isfinite(curve.get("full_depth_loss", 0)).all(), "full_depth_loss is not finite")
    _demand((curve["error"] >= 0).all(), "error is no error")  # infinite where one cell was scored


def select_resolution(call: Call) -> None:
    """Choose a resolution, and draw what was compared."""
    import matplotlib.pyplot as plt

    import sc_noise2self as n2s

    with _on_a_copy(call, _RESOLUTION) as (copied, options):
        found = n2s.select_resolution(copied, **options)
        key = options.get("key_added", "select_resolution")
        table = copied.uns[key]["table"]
        chosen = table[table["chosen"]]
        _demand(
            len(chosen) == 1 and chosen["resolution"].item() == found == copied.uns[key]["resolution"], "the choice"
        )
        _demand(table["resolution"].is_monotonic_increasing and table["resolution"][0] == 0, "resolutions do not rise")
        _demand(np.isfinite(table["gain"]).all() and (table["error"] >= 0).all(), "a gain is not finite")
        _demand((table["n_clusters"] >= 1).all() and table["n_clusters"][0] == 1, "numbers of clusters")
        n2s.pl.loss(copied, key=key, show=False).figure.canvas.draw()
        plt.close("all")
        n2s.remove(copied, key)


def cluster_support(call: Call) -> None:
    """Ask which clusters are two, and draw the tree."""
    import matplotlib.pyplot as plt
    from scipy.cluster.hierarchy import is_valid_linkage

    import sc_noise2self as n2s

    with _on_a_copy(call, _SUPPORT) as (copied, options):
        table = n2s.cluster_support(copied, **options)
        key = options.get("key_added", "cluster_support")
        clusters, linkage = copied.obs[key], copied.uns[key]["linkage"]
        _demand(len(table) == len(linkage) == len(clusters.cat.categories) - 1, "a join is missing")
        _demand(is_valid_linkage(linkage) and linkage[-1, 3] == len(table) + 1, "the linkage is none")
        _demand(np.isfinite(table[["distance", "gain"]]).all(axis=None) and (table["error"] >= 0).all(), "a gain")
        _demand(table["n_cells"].iloc[-1] + table["n_cells_other"].iloc[-1] == copied.n_obs, "cells are missing")
        if len(table) < 50:
            n2s.pl.cluster_support(copied, key=key, show=False).figure.canvas.draw()
            plt.close("all")
        n2s.remove(copied, key)


def rank_genes_groups(call: Call) -> None:
    """Test genes between clusters of one half, and read the ranking."""
    import scanpy as sc

    import sc_noise2self as n2s

    with _on_a_copy(call, _GROUPS) as (copied, options):
        n2s.rank_genes_groups(copied, **options)
        key, name = options.get("key_added", "rank_genes_groups"), options.get("groups_added", "n2s_groups")
        groups = copied.obs[name].cat.categories
        table = sc.get.rank_genes_groups_df(copied, None, key=key)
        _demand(len(table) == len(groups) * copied.n_vars, "a gene is missing")
        numbers = table[["scores", "pvals", "pvals_adj", "logfoldchanges"]]
        _demand(np.isfinite(numbers).all(axis=None), "a number is not finite")
        _demand(((numbers["pvals"] >= 0) & (numbers["pvals"] <= numbers["pvals_adj"] * (1 + 1e-9))).all(), "a p-value")
        _demand((numbers["pvals_adj"] <= 1).all(), "a p-value above 1")
        del copied.uns[key]
        n2s.remove(copied, name)


def overdispersion(call: Call) -> None:
    """Measure how much genes vary."""
    import sc_noise2self as n2s

    adata, words = _counts_for_clusters(call)
    groups = [name for name in ("group", "lane") if name in adata.obs]
    options = call.options({"groupby": Kind((None, *groups), lambda v: v is None or v in groups)}, 0.5)
    with _unchanged(adata):
        phi = n2s.overdispersion(adata, layer=words.layer, **options)
    _demand(phi.shape == (adata.n_vars,) and np.isfinite(phi).all() and (phi >= 0).all(), "phi")


@contextmanager
def _on_a_copy(call: Call, kinds: Mapping[str, Kind]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Give a copy of counts, and options with the layer; at the end the copy must be as it was, the results removed."""
    adata, words = _counts_for_clusters(call)
    options, copied = call.options(kinds), adata.copy()
    with _unchanged(adata):
        yield copied, {"layer": words.layer, **options}
    _demand_same(adata, copied)


def _counts_for_clusters(call: Call) -> tuple[Any, Any]:
    """Return counts, now and then spoiled, and the words that they are made of."""
    words = call.data(is_view=False)
    adata = words.adata().copy()  # which makes strings of names
    call.spoiled(adata, words.layer)
    return adata, words


def _demand_same(before: Any, after: Any) -> None:
    from promises import difference, fingerprint

    found = difference(fingerprint(before), fingerprint(after))
    _demand(not found, f"more has changed: {found}")


def split(call: Call) -> None:
    """Split a matrix or an object."""
    import scipy.sparse as sp

    import sc_noise2self as n2s

    words = call.data(smallest=1)
    whole = words.matrix() if call.likely(0.7) else words.adata()
    is_matrix = not hasattr(whole, "obs")
    options = call.options(_SPLIT)
    with _unchanged(whole):
        parts = n2s.split_molecules(whole, **options, **({} if is_matrix else {"layer": words.layer}))
    values = [part if is_matrix else part.X for part in parts]
    values = [(each.toarray() if sp.issparse(each) else np.asarray(each)).astype(np.int64) for each in values]
    _demand(len(parts) == (options.get("folds") or 2), f"{len(parts)} parts")
    counts = words.counts()
    _demand(all((each >= 0).all() and (each <= counts).all() for each in values), "a part is no part of the counts")
    if options.get("capture") is None:
        _demand((sum(values) == counts).all(), "the parts do not add up to the counts")


def null_counts(call: Call) -> None:
    """Make null counts."""
    import scipy.sparse as sp

    import sc_noise2self as n2s

    words = call.data(smallest=1)
    whole = words.matrix()
    options = call.options({"kind": _one_of("shuffled", "permuted"), "random_state": _SEED})
    with _unchanged(whole):
        null = n2s.null_counts(whole, **options)
    values = (null.toarray() if sp.issparse(null) else np.asarray(null)).astype(np.int64)
    _demand((values.sum(axis=0) == words.counts().sum(axis=0)).all(), "a gene's total has changed")
    if options.get("kind", "shuffled") == "shuffled":
        _demand((values.sum(axis=1) == words.counts().sum(axis=1)).all(), "a cell's size has changed")


def shrunken(counts: Any, share: float) -> np.ndarray:
    """Return rates between a cell's own and those of all."""
    size = np.asarray(counts.sum(axis=1)).reshape(-1, 1)
    return (1 - share) * counts.toarray() + share * size * np.asarray(counts.sum(axis=0)).reshape(1, -1) / counts.sum()


def fails(counts: Any, share: float) -> np.ndarray:
    """Fail, in one way or another."""
    if share > 0.5:
        raise RuntimeError("no")
    return counts.toarray()[:, :-1] if share < 0.3 else counts.toarray() * np.nan


def calibrate(call: Call) -> None:
    """Calibrate a denoiser that works, or one that fails."""
    import sc_noise2self as n2s

    words = call.data(is_view=False, names=call.choose(("plain", "digits", "unicode")))
    adata = words.adata()
    call.spoiled(adata, words.layer)
    denoiser = call.choose((shrunken, shrunken, shrunken, fails))
    options = call.options(_CALIBRATE)
    call.made["denoiser"] = denoiser.__name__
    copied = adata.copy()
    with _unchanged(adata):
        found = n2s.calibrate(copied, denoiser, {"share": [0.1, 0.4, 0.9]}, layer=words.layer, **options)
    chosen = found.table[found.table["chosen"]]
    _demand(len(chosen) == 1 and np.isfinite(chosen["loss"]).all(), "no candidate of finite loss was chosen")
    _demand(bool((chosen["failure"] == "").all()), "a candidate that failed was chosen")


def read(call: Call) -> None:
    """Read a result by get, report and pl."""
    import matplotlib.pyplot as plt

    import sc_noise2self as n2s

    words = call.data(has_extras=True)
    adata = words.adata().copy()
    mix, method = call.likely(0.3), call.choose(("pca", "pca", "knn", ["pca"]))
    n2s.denoise(adata, method, layer=words.layer, mix=mix)
    call.made |= {"method": method, "mix": mix}
    names = [*adata.var_names, "nobody"] if call.likely(0.1) else list(adata.var_names)
    genes = [call.choose(names) for _ in range(call.choose((1, 2, 3)))]
    what = call.choose(
        ("denoised", "adata", "lazy", "report", "markers", "embedding", "gain", "spectrum", "loss", "caption")
    )
    call.made |= {"what": what, "genes": genes}
    of_get = {"scale": _SCALE, "key": _one_of("denoised")}
    quiet = {"show": False}
    with _unchanged(adata, but=("uns",)):
        if what == "denoised":
            values = n2s.get.denoised(adata, genes, **call.options(of_get)).to_numpy()
            _demand(np.isfinite(values).all() and values.shape == (adata.n_obs, len(genes)), "values of genes")
        elif what == "adata":
            own = n2s.get.adata(adata, genes if call.likely(0.5) else None, **call.options(of_get))
            _demand(np.isfinite(own.X).all(), "values of genes")
        elif what == "lazy":
            _demand(np.isfinite(np.asarray(n2s.get.lazy(adata, **call.options(of_get)))).all(), "a lazy layer")
        elif what == "report":
            _demand("nan" not in n2s.report(adata, **call.options({"key": _one_of("denoised")})), "nan in a report")
        elif what == "markers":
            kinds = {
                "panels": Kind((("raw",), ("raw", "under", "denoised", "over"), (1,)), lambda v: isinstance(v, tuple)),
                "color": _optional(_one_of("group")),
                "key": _one_of("denoised"),
            }
            n2s.pl.markers(adata, genes, **call.options(kinds), **quiet)
        elif what == "embedding":
            n2s.pl.embedding(
                adata, genes, **call.options({"basis": _one_of("umap", "X_umap"), "scale": _SCALE}), **quiet
            )
        elif what == "gain":
            n2s.pl.gain_per_gene(adata, **call.options({"key": _one_of("denoised")}), **quiet)
        elif what == "spectrum":
            n2s.pl.spectrum(
                adata, **call.options({"key": _one_of("denoised"), "member": _optional(_one_of())}), **quiet
            )
        elif what == "loss":
            n2s.pl.loss(adata, **{"key": "denoised", **call.options({"key": _one_of("denoised")}), **quiet})
        else:
            n2s.pl.caption(adata, n2s.pl.gain_per_gene(adata, **quiet))
        for number in plt.get_fignums():
            plt.figure(number).canvas.draw()


def file(call: Call) -> None:
    """Denoise a file, whole or broken, in Python or at the command line."""
    import anndata as ad

    import sc_noise2self as n2s
    from sc_noise2self.__main__ import main

    words = call.data(
        is_view=False,
        names=call.choose(("plain", "digits", "unicode")),
        format=call.choose(("csr_matrix", "csc_matrix", "dense", "stored zeros", "unsorted", "repeated")),
    )
    source = call.folder / f"in.{call.choose(('h5ad', 'zarr'))}"
    target = call.folder / f"out.{call.choose(('h5ad', 'h5ad', 'zarr', 'csv'))}"
    call.made |= {"source": source.name, "target": target.name}
    adata = words.adata()
    getattr(adata, f"write_{source.suffix[1:]}")(source)
    if call.likely(0.3):
        call.made["broken"] = _break(source, call)
    before = _contents(source)
    kinds = {"write_layer": _FLAG, "key_added": _NAME, "scale": _SCALE, "mix": _FLAG, "random_state": _SEED,
             "method": _one_of("pca", "knn"), "overwrite": _FLAG}  # fmt: skip
    try:
        if call.likely(0.3):
            argv = [
                "denoise",
                str(source),
                str(target),
                *call.choose(([], ["--factors"], ["--mix"], ["--method", "no"])),
            ]
            argv += [] if words.layer is None else ["--layer", words.layer]
            call.made["argv"] = argv[3:]
            said = StringIO()
            with redirect_stdout(said), redirect_stderr(said):
                status = main(argv)
            _demand("Traceback" not in said.getvalue(), "a traceback at the command line")
            if status:
                lines = said.getvalue().splitlines(keepends=True)
                raise Refused("".join(line for line in lines if ": warning: " not in line))
            options = {}
        else:
            options = call.options(kinds)
            n2s.denoise_file(source, target, layer=words.layer, **options)
    except BaseException:
        left = sorted(os.listdir(call.folder))
        _demand(left == [source.name], f"a refusal leaves {left}")
        _demand(_contents(source) == before, "the source has changed")
        raise
    _demand(_contents(source) == before, "the source has changed")
    found = getattr(ad, f"read_{target.suffix[1:]}")(target)
    values = n2s.get.denoised(found, key=options.get("key_added", "denoised")).to_numpy()
    _demand(np.isfinite(values).all() and (values >= 0).all(), "values of a file")
    if "broken" not in call.made:
        np.testing.assert_allclose(values.sum(axis=1), words.counts().sum(axis=1), rtol=2e-4)


def model(call: Call) -> None:
    """Denoise other cells by a saved model, whole or broken."""
    from promises import difference, fingerprint

    import sc_noise2self as n2s

    words = call.data(kind="programmes", depth=1000, is_view=False, smallest=20, largest=30, names="plain", layer=None,
                      empty_cells=0, empty_genes=0)  # fmt: skip
    adata, path = words.adata(), call.folder / "model.npz"
    kind = call.choose(("pca", "autoencoder"))
    n2s.denoise(adata.copy(), n2s.Autoencoder(width=2, n_epochs=2) if kind == "autoencoder" else kind, save_model=path)
    if not path.exists():  # nothing beat the mean profile
        return
    new = adata[:, call.rng.permutation(adata.n_vars)].copy()
    if call.likely(0.2):
        new = new[:, 1:].copy()
        call.hostile = "a model of other genes"
    if call.likely(0.3):
        call.made["broken"] = _break(path, call)
    options = call.options({"scale": _SCALE, "write_layer": _FLAG, "key_added": _NAME, "random_state": _SEED,
                            "device": _one_of("auto", "cpu"), "batch_key": _optional(_one_of())})  # fmt: skip
    before = fingerprint(new)
    try:
        n2s.denoise_with(new, path, **options)
    except BaseException:
        _demand(not difference(before, fingerprint(new)), "written before a refusal")
        raise
    values = n2s.get.denoised(new, key=options.get("key_added", "denoised")).to_numpy()
    _demand(np.isfinite(values).all() and (values >= 0).all(), "values of a model")


def _break(path: Path, call: Call) -> str:
    """Cut a file, change some of its bytes, or take one away, and say what was done."""
    files = sorted(each for each in ([path] if path.is_file() else path.rglob("*")) if each.is_file())
    victim, how = call.choose(files), call.choose(("cut", "bytes", "empty", "gone"))
    content = bytearray(victim.read_bytes())
    if how == "cut":
        victim.write_bytes(content[: int(call.rng.integers(len(content) + 1))])
    elif how == "bytes" and content:
        for _ in range(call.choose((1, 8))):
            content[int(call.rng.integers(len(content)))] = int(call.rng.integers(256))
        victim.write_bytes(content)
    elif how == "empty":
        victim.write_bytes(b"")
    elif path.is_dir():
        victim.unlink()
    return f"{how}: {victim.relative_to(call.folder)}"


CALLS: dict[Callable[[Call], None], float] = {
    denoise: 0.25,
    denoise_in_place: 0.1,
    select_rank: 0.05,
    select_resolution: 0.06,
    cluster_support: 0.05,
    rank_genes_groups: 0.06,
    overdispersion: 0.03,
    split: 0.1,
    null_counts: 0.05,
    calibrate: 0.08,
    read: 0.1,
    file: 0.09,
    model: 0.03,
}


# Judging


class Refused(Exception):
    """A refusal at the command line."""


def _demand(holds: Any, message: str) -> None:
    if not holds:
        raise Wrong(message)


def _contents(path: Path) -> list[tuple[str, bytes]]:
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return [(str(each), each.read_bytes()) for each in files]


class _unchanged:  # a context manager, named as one
    """Demand that the block leaves what it is given bit by bit as it was, also when it fails."""

    def __init__(self, value: Any, but: tuple[str, ...] = ()) -> None:
        self.value, self.but = value, but

    def _fingerprint(self) -> Any:
        from promises import fingerprint

        found = fingerprint(self.value)
        return {k: v for k, v in found.items() if k not in self.but} if isinstance(found, dict) else found

    def __enter__(self) -> None:
        self.before = self._fingerprint()

    def __exit__(self, *error: object) -> None:
        from promises import difference

        found = difference(self.before, self._fingerprint(), "the input")
        if found:
            raise Wrong(f"mutated: {found}")


def judge(seed: int, *, is_shown: bool = False) -> tuple[str, str, str, str]:
    """Return the function called, the outcome, what was said, and what the call was made of; print the traceback."""
    from promises import documented_warnings

    rng = np.random.default_rng(seed)
    shares = np.array(list(CALLS.values()))
    function = list(CALLS)[rng.choice(len(CALLS), p=shares / shares.sum())]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    call = Call(rng, folder)
    try:
        with documented_warnings():
            function(call)
        outcome, said = "ok", ""
        if call.hostile:
            outcome, said = "WRONG", f"accepted {call.hostile}"
    except Exception as error:
        outcome, said = _judged(error)
        if is_shown:
            traceback.print_exception(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
    return function.__name__, outcome, said, str(call.made)


def _judged(error: Exception) -> tuple[str, str]:
    import sc_noise2self

    home = str(Path(sc_noise2self.__file__).parent)
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(home)]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    if inside and not frames[-1].filename.startswith(home):
        where += f" from {Path(inside[-1].filename).name}:{inside[-1].lineno}"
    text = f"{type(error).__name__} at {where}: {message}"
    if isinstance(error, Refused):
        is_one_line = message.strip().count("\n") == 0 and message.startswith("sc_noise2self: ")
        return ("refused", message) if is_one_line else ("WRONG", text)
    if isinstance(error, Wrong | AssertionError):
        return "WRONG", text
    # An argument that Python itself refuses ends in the frame of the caller.
    is_ours = frames[-1].filename.startswith(home) and isinstance(error, _REFUSALS)
    is_sentence = len(message) >= 20 and "\n" not in message
    return ("refused", text) if is_ours and is_sentence else ("WRONG", text)


# Running


def _prepare() -> None:
    """Limit memory and threads, and silence what is not an outcome."""
    resource.setrlimit(resource.RLIMIT_DATA, (_GIGABYTES << 30, _GIGABYTES << 30))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    import matplotlib as mpl
    import scanpy as sc

    mpl.use("agg")
    sc.settings.verbosity = "error"
    logging.disable(logging.CRITICAL)


def _work(connection: Connection) -> None:
    """Judge the calls whose seeds come in, until none does."""
    _prepare()
    connection.send("ready")
    while (seed := connection.recv()) is not None:
        connection.send(judge(seed))


class _Worker:
    """A process that judges one call at a time and may die of it."""

    def __init__(self) -> None:
        self.seed: int | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def give(self, seed: int | None) -> None:
        self.seed, self.since = seed, time.monotonic()
        self.connection.send(seed)

    def take(self) -> tuple[str, str, str, str]:
        """Return the outcome; of a call that hangs or has ended its process, what is known of it."""
        if self.connection.poll():
            try:
                return self.connection.recv()
            except EOFError:
                self.process.join()
                said = f"the process ended, exit code {self.process.exitcode}"
        else:
            said = f"hangs: over {_SECONDS} s"
            self.process.kill()
            self.process.join()
        self._start()
        return "?", "WRONG", said, ""

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self.since > _SECONDS


def outcomes(seeds: range, jobs: int) -> Iterator[tuple[int, tuple[str, str, str, str]]]:
    """Yield each seed with its outcome, as they come."""
    waiting = iter(seeds)
    workers = [_Worker() for _ in range(min(jobs, len(seeds)))]
    busy = []
    for worker in workers:
        worker.give(next(waiting))
        busy.append(worker)
    while busy:
        ready = wait([worker.connection for worker in busy], timeout=1)
        for worker in [each for each in busy if each.connection in ready or each.is_late]:
            yield worker.seed, worker.take()  # type: ignore[misc]
            seed = next(waiting, None)
            worker.give(seed)
            if seed is None:
                worker.process.join()
                busy.remove(worker)


def main() -> int:
    """Run the calls, print the table, and return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first call; the next have the next")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--only", type=int, metavar="SEED", help="run one call and print all of it")
    parser.add_argument("--refusals", action="store_true", help="print the refusals too")
    args = parser.parse_args()
    if args.only is not None:
        _prepare()
        name, outcome, said, made = judge(args.only, is_shown=True)
        print(f"{name}({made})\n{outcome}\n{said}")
        return int(outcome == "WRONG")
    seeds = range(args.seed, args.seed + args.calls)
    start = time.monotonic()
    table, distinct = Counter[tuple[str, str]](), dict[tuple[str, str, str], list[Any]]()
    for seed, (name, outcome, said, made) in outcomes(seeds, args.jobs):
        table[name, outcome] += 1
        # The same failure with other numbers is one.
        alike = "".join("#" if each.isdigit() else each for each in said.split("\n")[0])[:110]
        seen = distinct.setdefault((outcome, name, alike), [0, seed, said, made])
        seen[0] += 1
    print(f"{'':18}{'ok':>8}{'refused':>10}{'WRONG':>8}")
    for name in sorted({name for name, _ in table}):
        print(f"{name:18}{table[name, 'ok']:8}{table[name, 'refused']:10}{table[name, 'WRONG']:8}")
    n = Counter(outcome for (_, outcome), count in table.items() for _ in range(count))
    print(f"{'all':18}{n['ok']:8}{n['refused']:10}{n['WRONG']:8}   in {time.monotonic() - start:.0f} s")
    shown = [each for each in distinct.items() if each[0][0] == "WRONG" or (args.refusals and each[0][0] == "refused")]
    for (outcome, name, _), (times, seed, said, _) in sorted(shown, key=lambda each: -each[1][0]):
        print(f"\n{outcome} {times} x {name}, --only {seed}\n    {' '.join(said.split())[:400]}")
    return int(n["WRONG"] > 0)


if __name__ == "__main__":
    sys.exit(main())
