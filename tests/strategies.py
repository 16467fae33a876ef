"""Random counts in every shape that the package takes, for Hypothesis and for `benchmarks/fuzz.py`.

A `Data` says in a few words what is made; the same words make the same object, so a failure can be read and run again.
`on_examples` says how many of them a test sees.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

KINDS = ("programmes", "sparse", "single molecules", "equal", "duplicates", "huge", "one deep cell", "one gene")
FORMATS = (
    "csr_matrix",
    "csc_matrix",
    "csr_array",
    "csc_array",
    "dense",
    "fortran",
    "stored zeros",
    "all zeros of a cell stored",
    "unsorted",
    "repeated",
    "read-only dense",
    "read-only csr",
)
DTYPES = ("float32", "float64", "int64", "int32", "uint32", "uint16", "int16", "uint8", "int8", "bool")
NAMES = ("plain", "digits", "integers", "duplicated", "unicode", "empty")
HUGE = 10**6


@dataclass(frozen=True)
class Data:
    """What random counts are made of."""

    n_cells: int = 20
    n_genes: int = 15
    kind: str = "programmes"
    depth: int = 100
    empty_cells: int = 0
    empty_genes: int = 0
    format: str = "csr_matrix"
    dtype: str = "float32"
    names: str = "plain"
    layer: str | None = None
    is_view: bool = False
    has_extras: bool = False
    seed: int = 0

    def counts(self) -> np.ndarray:
        """Return the counts alone, dense, int64; one molecule at least."""
        rng = np.random.default_rng(self.seed)
        counts = np.minimum(_MAKERS[self.kind](self, rng), _largest(self.dtype)).astype(np.int64)
        counts[rng.permutation(self.n_cells)[: min(self.empty_cells, self.n_cells - 1)]] = 0
        counts[:, rng.permutation(self.n_genes)[: min(self.empty_genes, self.n_genes - 1)]] = 0
        if not counts.any():
            counts[rng.integers(self.n_cells), rng.integers(self.n_genes)] = 1
        return counts

    def matrix(self) -> Any:
        """Return the counts in their format and type."""
        return in_format(self.counts(), self.format, self.dtype, self.seed)

    def adata(self) -> ad.AnnData:
        """Return the counts in an AnnData object; another matrix stands in `X` where a layer holds them."""
        if self.is_view and self.names != "integers":  # anndata takes no part of an object with such names
            return self._view()
        matrix = self.matrix()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anndata's, on names
            out = ad.AnnData(matrix)
            out.obs_names, out.var_names = _names(self.names, self.n_cells, "c"), _names(self.names, self.n_genes, "g")
        if self.layer is not None:
            out.layers[self.layer] = matrix
            out.X = in_format(self.counts(), "csr_matrix", "float32", self.seed) * np.float32(0.37)
        if self.has_extras:
            _add_extras(out, self.seed)
        return out

    def _view(self) -> ad.AnnData:
        """Return the first half of the cells of an object that holds each twice."""
        whole = replace(self, is_view=False).adata()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twice = whole[np.tile(np.arange(self.n_cells), 2)].copy()
            others = _names(self.names, 2 * self.n_cells, "c")[self.n_cells :]
            twice.obs_names = whole.obs_names.append(others)
            return twice[np.arange(2 * self.n_cells) < self.n_cells]


def in_format(counts: np.ndarray, format: str, dtype: str, seed: int = 0) -> Any:
    """Return counts in one of `FORMATS`."""
    x = counts.astype(dtype)
    rng = np.random.default_rng(seed)
    if format in ("dense", "read-only dense", "fortran"):
        x = np.asfortranarray(x) if format == "fortran" else np.ascontiguousarray(x)
        x.flags.writeable = format != "read-only dense"
        return x
    if format in ("csr_matrix", "csc_matrix", "csr_array", "csc_array"):
        return getattr(sp, format)(x)
    csr = sp.csr_matrix(x)
    if format == "read-only csr":
        for part in (csr.data, csr.indices, csr.indptr):
            part.flags.writeable = False
        return csr
    rows, columns = np.repeat(np.arange(x.shape[0]), np.diff(csr.indptr)), csr.indices
    values = csr.data
    if format == "stored zeros":
        more = np.argwhere((counts == 0) & (rng.random(counts.shape) < 0.3))
    elif format == "all zeros of a cell stored":
        more = np.argwhere((counts == 0) & (counts.sum(axis=1, keepdims=True) == counts.sum(axis=1).min()))
    elif format == "repeated":
        part = (values > 0) & (rng.random(values.size) < 0.5)
        taken = np.where(part, values.astype(np.int64) // 2, 0)
        more = np.column_stack([rows, columns])
        return _csr(
            np.concatenate([rows, rows]),
            np.concatenate([columns, columns]),
            np.concatenate([values.astype(np.int64) - taken, taken]).astype(dtype),
            x.shape,
            rng.permutation(2 * values.size),
        )
    else:
        more = np.empty((0, 2), dtype=int)
    rows, columns = np.concatenate([rows, more[:, 0]]), np.concatenate([columns, more[:, 1]])
    values = np.concatenate([values, np.zeros(len(more), dtype)])
    return _csr(rows, columns, values, x.shape, rng.permutation(len(rows)))


def _csr(
    rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, ...], order: np.ndarray
) -> sp.csr_matrix:
    """Return a CSR matrix with its entries in this order within each row, as they are."""
    order = order[np.argsort(rows[order], kind="stable")]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    return sp.csr_matrix((values[order], columns[order].astype(np.int32), indptr.astype(np.int32)), shape=shape)


def _largest(dtype: str) -> int:
    if dtype == "bool":
        return 1
    return min(HUGE, np.iinfo(dtype).max) if np.dtype(dtype).kind in "iu" else HUGE


def _programmes(data: Data, rng: np.random.Generator) -> np.ndarray:
    programmes = rng.gamma(0.3, size=(3, data.n_genes)) + 0.02
    profiles = rng.dirichlet(np.full(3, 0.5), size=data.n_cells) @ (programmes / programmes.sum(axis=1, keepdims=True))
    return rng.poisson(profiles * data.depth * rng.gamma(4, 0.25, size=(data.n_cells, 1)))


def _sparse(data: Data, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(data.depth, size=(data.n_cells, data.n_genes)) * (
        rng.random((data.n_cells, data.n_genes)) < rng.choice([0.02, 0.1, 0.5])
    )


def _huge(data: Data, rng: np.random.Generator) -> np.ndarray:
    counts = _programmes(data, rng)
    counts[rng.random(counts.shape) < 0.05] = HUGE
    return counts


def _one_deep_cell(data: Data, rng: np.random.Generator) -> np.ndarray:
    counts = _programmes(data, rng)
    counts[rng.integers(data.n_cells)] *= 1000
    return counts


def _one_gene(data: Data, rng: np.random.Generator) -> np.ndarray:
    counts = np.zeros((data.n_cells, data.n_genes), np.int64)
    counts[:, rng.integers(data.n_genes)] = rng.poisson(data.depth, size=data.n_cells)
    return counts


def _duplicates(data: Data, rng: np.random.Generator) -> np.ndarray:
    return _programmes(data, rng)[rng.integers(2, size=data.n_cells) % data.n_cells]


_MAKERS = {
    "programmes": _programmes,
    "sparse": _sparse,
    "single molecules": lambda data, rng: (rng.random((data.n_cells, data.n_genes)) < 0.1).astype(np.int64),
    "equal": lambda data, rng: np.tile(rng.poisson(data.depth / data.n_genes + 1, data.n_genes), (data.n_cells, 1)),
    "duplicates": _duplicates,
    "huge": _huge,
    "one deep cell": _one_deep_cell,
    "one gene": _one_gene,
}


def _names(kind: str, n: int, letter: str) -> pd.Index:
    if kind == "integers":
        return pd.Index(np.arange(n))
    letter = "" if kind == "digits" else letter
    names = [f"{letter}{i}" for i in range(n)]
    if kind == "duplicated":
        names[-1] = names[0]
    if kind == "unicode":
        names = [f"é{name} β/\u2009x" for name in names]
    if kind == "empty":
        names[0] = ""
    return pd.Index(names)


def _add_extras(adata: ad.AnnData, seed: int) -> None:
    """Add something to every slot."""
    rng = np.random.default_rng(seed)
    n_cells, n_genes = adata.shape
    adata.obs["group"] = pd.Categorical(rng.choice(["a", "b"], n_cells), categories=["b", "a", "none has this"])
    adata.obs["lane"] = np.where(np.arange(n_cells) % 2, "l1", "l2")
    adata.var["chosen"] = np.arange(n_genes) % 3 != 2
    adata.obsm["X_umap"] = rng.normal(size=(n_cells, 2))
    adata.varm["more"] = rng.normal(size=(n_genes, 3))
    adata.obsp["graph"] = sp.identity(n_cells, format="csr")
    adata.uns["note"] = {"by": "hand", "nested": {"values": np.arange(3)}}


CHOICES: dict[str, tuple[Any, ...]] = {
    "kind": KINDS,
    "depth": (1, 10, 100, 1000),
    "empty_cells": (0, 0, 1, 5),
    "empty_genes": (0, 0, 1, 5),
    "format": FORMATS,
    "dtype": DTYPES,
    "names": NAMES,
    "layer": (None, None, "counts", "é .x"),
    "is_view": (False, False, True),
    "has_extras": (True, False),
}
assert set(CHOICES) | {"n_cells", "n_genes", "seed"} == {field.name for field in fields(Data)}


def data(smallest: int = 2, largest: int = 30, **fixed: Any) -> st.SearchStrategy[Data]:
    """Return a strategy of `Data`, some of its words fixed."""
    size = st.integers(smallest, largest)
    drawn = {name: st.sampled_from(values) for name, values in CHOICES.items()}
    given = {name: st.just(value) for name, value in fixed.items()}
    return st.builds(Data, **{"n_cells": size, "n_genes": size, "seed": st.integers(0, 999), **drawn, **given})


def random_data(rng: np.random.Generator, smallest: int = 2, largest: int = 30, **fixed: Any) -> Data:
    """Return one `Data` drawn by a generator."""
    drawn = {name: values[rng.integers(len(values))] for name, values in CHOICES.items()}
    shape = {name: int(rng.integers(smallest, largest + 1)) for name in ("n_cells", "n_genes")}
    return Data(**{**shape, "seed": int(rng.integers(1000)), **drawn, **fixed})


def on_examples(
    *drawn: st.SearchStrategy[Any], few: int = 8, many: int = 100
) -> Callable[[Callable[..., None]], Callable[[int], None]]:
    """Return a decorator that runs a test on a few examples, always the same, and on many with `-m slow`.

    What failed is told in a few words as it is (`Data`); making it smaller would take minutes.
    """

    def decorate(test: Callable[..., None]) -> Callable[[int], None]:
        @pytest.mark.parametrize("n_examples", [few, pytest.param(many, marks=pytest.mark.slow)])
        def on_random(n_examples: int) -> None:
            on_so_many = settings(
                derandomize=True,
                deadline=None,
                max_examples=n_examples,
                phases=(Phase.explicit, Phase.generate),
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            )
            on_so_many(given(*drawn)(test))()

        on_random.__name__, on_random.__doc__ = test.__name__, test.__doc__
        return on_random

    return decorate
