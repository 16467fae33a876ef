"""Counts out of an AnnData object, checked once and named in every message; results into one."""

from __future__ import annotations

import re
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from .caveats import caveat
from .counts import CountMatrix, check_counts, row_sums
from .random import RandomState
from .split import split_matrix
from .written import without_results

_READS = 10  # a median non-zero count above this is not seen with UMIs
_BARCODE = re.compile(r"[ACGT]{12,}(-\d+)?")
_HOUSEKEEPING = {"ACTB", "GAPDH", "MALAT1", "Actb", "Gapdh", "Malat1"}

Counts = TypeVar("Counts", bound="AnnData | CountMatrix")


def split_molecules(
    counts: Counts,
    fraction: float = 0.5,
    *,
    folds: int | None = None,
    capture: float | None = None,
    overdispersion: float | np.ndarray | None = None,
    layer: str | None = None,
    random_state: RandomState = 0,
) -> tuple[Counts, ...]:
    """Split the molecules of every cell at random into parts that are independent given the cell's expression.

    Parameters
    ----------
    counts
        Raw counts, cells x genes: CSR, CSC or dense, or an AnnData object.
    fraction
        The share of molecules that go to the first of two parts.
    folds
        Number of disjoint equal parts instead, e.g. 10.
    capture
        The share of the cell's molecules that the sample caught, if it is not small. The two parts then overlap, as two
        samples drawn independently from the cell would.
    overdispersion
        phi >= 0 in variance = mean + phi mean^2, one number or one per gene. Counts are dealt by a
        Dirichlet-multinomial, so that parts of a negative binomial count are independent around the mean that cells
        share. The default, binomial, makes them independent around each cell's own rate, which is what denoising needs.
    layer
        The layer of an AnnData object to split; None splits `X`.
    random_state
        Seed or generator.

    Returns
    -------
    Two parts, or as many as `folds`. A matrix gives matrices of its own type and dtype; an AnnData object gives
    AnnData objects with the part in `X` and the same `obs` and `var` (what `denoise` wrote there left out).
    Disjoint parts add up to the counts exactly. The input is not modified.

    Raises
    ------
    ValueError, TypeError
        If the counts are not whole, non-negative numbers, or a parameter is out of range.

    Notes
    -----
    X1 ~ Binomial(X, p), X2 = X - X1 (Noise2Self, Batson & Royer 2019, section 3.1). `capture`: Batson, Royer & Webber
    2019. `overdispersion`: Neufeld et al. 2023. Learn everything, highly variable genes too, from one part:
    what was chosen on all molecules has seen the other part.

    Examples
    --------
    >>> import numpy as np, sc_noise2self as n2s
    >>> x = np.array([[3, 0, 1], [0, 2, 5]])
    >>> x1, x2 = n2s.split_molecules(x)
    >>> bool((x1 + x2 == x).all())
    True
    """
    options: dict[str, Any] = {
        "fraction": fraction,
        "folds": folds,
        "capture": capture,
        "overdispersion": overdispersion,
        "random_state": random_state,
    }
    if not isinstance(counts, AnnData):
        if layer is not None:
            raise ValueError(f"layer={layer!r} was given with a matrix: it names a layer of an AnnData object.")
        return cast("tuple[Counts, ...]", split_matrix(counts, **options))
    parts = split_matrix(read_counts(counts, layer), **options)
    return tuple(with_counts(counts, part) for part in parts)


def with_counts(adata: AnnData, counts: CountMatrix) -> AnnData:
    """Return other counts in `X` with the same `obs` and `var`, without the columns of results of `denoise`."""
    obs, var = without_results(adata)
    return AnnData(counts, obs=obs, var=var)


def read_counts(adata: AnnData, layer: str | None) -> CountMatrix:
    """Return the checked counts of `X` or a layer; nothing is copied unless the matrix repeats entries.

    Raises
    ------
    ValueError, TypeError
        If `adata` is backed, the layer is missing, or what it holds is not counts.
    """
    if not isinstance(adata, AnnData):
        raise TypeError(f"adata is of type {type(adata).__name__}: pass an AnnData object.")
    if adata.isbacked:
        raise ValueError(f"adata is backed on {adata.filename}: load it first, adata = adata.to_memory().")
    if isinstance(layer, bool):
        raise TypeError(f"layer is {layer}: it names the layer with raw counts. To write none, pass write_layer=False.")
    if layer is not None and layer not in adata.layers:
        names = [name for name in adata.layers if name is not None]  # None is X since anndata 0.13
        raise ValueError(f"layer {layer!r} is missing: adata.layers has {names}.")
    matrix = adata.X if layer is None else adata.layers[layer]
    name = "X" if layer is None else f'layer "{layer}"'
    if matrix is None:
        raise ValueError('adata.X is empty: pass the layer that holds raw counts, e.g. layer="counts".')
    counts = check_counts(matrix, name=name, cells=adata.obs_names, genes=adata.var_names)
    _warn_if_transposed(adata)
    _warn_if_reads(counts, name)
    return counts


def read_csr(adata: AnnData, layer: str | None) -> sp.csr_matrix:
    """Return the counts as a CSR float32 matrix for a denoiser, and warn of cells that hold no molecule.

    Raises
    ------
    ValueError
        As `read_counts`, and if there are fewer than two cells or two genes.
    """
    counts = read_counts(adata, layer)
    for n, what in zip(counts.shape, ("cell", "gene"), strict=True):
        if n < 2:
            raise ValueError(f"there is {n} {what}: denoising learns from what {what}s share, so it needs at least 2.")
    out = sp.csr_matrix(counts, dtype=np.float32)
    if out.count_nonzero() < out.nnz:
        out = out.copy()
        out.eliminate_zeros()
    empty = int((row_sums(out) == 0).sum())
    if empty:
        caveat(
            f"{empty} cell(s) hold no molecule and stay zero: remove them with "
            "sc.pp.filter_cells(adata, min_counts=1).",
            stacklevel=3,
        )
    return out


def read_batches(adata: AnnData, key: str) -> pd.Series:
    """Return the batch of each cell, categorical, without categories that no cell has.

    Raises
    ------
    ValueError
        If `obs` has no such column, or it has missing values.
    """
    if key not in adata.obs:
        raise ValueError(f"batch_key {key!r} is missing: adata.obs has {list(adata.obs.columns)}.")
    labels = adata.obs[key].astype("category").cat.remove_unused_categories()
    if labels.isna().any():
        raise ValueError(f"adata.obs[{key!r}] has {int(labels.isna().sum())} missing values: every cell has a batch.")
    return labels


def _warn_if_transposed(adata: AnnData) -> None:
    genes, cells = adata.var_names[:50], adata.obs_names
    if all(_BARCODE.fullmatch(str(name)) for name in genes) or not _HOUSEKEEPING.isdisjoint(cells):
        caveat(
            "adata looks transposed (cell barcodes in var_names, or genes in obs_names): counts are cells x genes, "
            "so pass adata.T.",
            stacklevel=5,
        )


def _warn_if_reads(counts: CountMatrix, name: str) -> None:
    values: Any = counts.data if sp.issparse(counts) else counts[counts > 0]
    sample = values[:: max(1, values.size // 100_000)]
    median = float(np.median(sample[sample > 0])) if (sample > 0).any() else 0.0
    if median > _READS:
        caveat(
            f"{name} looks like reads, not molecules (median non-zero count {median:.0f}): copies of one molecule fall "
            "into both halves, so the loss takes them for signal. Use UMI counts.",
            stacklevel=5,
        )
