"""Counts out of an AnnData object, checked once and named in every message; results into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from ._blocks import Block, Chunks, Counts, InMemory, OnDask, OnDisk, Partial, block_of
from ._checks import by_gene, check_name, read_mask
from ._counts import SINGLE, CountMatrix, NotACount, check_counts, check_format, check_values, column_sums, row_sums
from ._errors import NotThere
from ._random import RandomState
from ._slots import in_memory, without_results
from ._split import split_matrix
from ._warnings import warn

_LARGE = 10_000  # a count, and the end of a histogram
_SAMPLED = 100_000  # entries, of a block
_FEW_GENES = 50  # of a cell
_READS = 10  # a median non-zero count above this is not seen with UMIs
_BARCODE = re.compile(r"[ACGT]{12,}(-\d+)?")
_HOUSEKEEPING = {"ACTB", "GAPDH", "MALAT1", "Actb", "Gapdh", "Malat1"}

Countable = TypeVar("Countable", bound="AnnData | CountMatrix")


def split_molecules(
    counts: Countable,
    fraction: float = 0.5,
    *,
    folds: int | None = None,
    capture: float | None = None,
    overdispersion: float | np.ndarray | None = None,
    layer: str | None = None,
    random_state: RandomState = 0,
) -> tuple[Countable, ...]:
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
        phi >= 0 in variance = mean + phi mean^2, one number or one per gene; a Series goes by its index. Counts are
        dealt by a Dirichlet-multinomial, so that parts of a negative binomial count are independent around the mean
        that cells share. The default, binomial, makes them independent around each cell's own rate, which is what
        denoising needs.
    layer
        The layer of an AnnData object to split; None splits `X`.
    random_state
        Seed or generator.

    Returns
    -------
    Two parts, or as many as `folds`. A matrix gives matrices of its own type and dtype (of a wider one if it repeats
    entries that add up to more than the dtype holds); an AnnData object gives AnnData objects with the part in `X` and
    the same `obs` and `var` (what `denoise` wrote there left out). Disjoint parts add up to the counts exactly. An
    entry is dealt by the seed, its cell (number and counts) and its gene alone: the same seed splits a matrix of any
    format and dtype, and its first rows alone, in the same way, while other counts are split independently. The input
    is not modified.

    Raises
    ------
    ValueError, TypeError
        If the counts are not whole, non-negative numbers up to 2^53 (2^24 in float32, which holds no more digits), or a
        parameter is out of range.

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
    matrix = read_matrix(counts, layer)
    if isinstance(counts, AnnData):
        overdispersion = by_gene("overdispersion", overdispersion, counts.var_names)
    parts = split_matrix(
        matrix, fraction, folds=folds, capture=capture, overdispersion=overdispersion, random_state=random_state
    )
    return tuple(with_counts(counts, part) for part in parts)


def read_matrix(counts: AnnData | CountMatrix, layer: str | None) -> CountMatrix:
    """Return the checked counts of an AnnData object, or of a matrix, which has no layers."""
    if isinstance(counts, AnnData):
        return read_counts(counts, layer)
    if layer is not None:
        raise ValueError(f"layer={layer!r} was given with a matrix: it names a layer of an AnnData object.")
    return check_counts(counts)


def with_counts(like: Countable, counts: CountMatrix) -> Countable:
    """Return counts as what they were read from: a matrix, or `X` with the same `obs` and `var` without results."""
    if not isinstance(like, AnnData):
        return cast("Countable", counts)
    obs, var = without_results(like)
    return AnnData(counts, obs=obs, var=var)


def read_counts(adata: AnnData, layer: str | None, largest: int = 2**53) -> CountMatrix:
    """Return the checked counts of `X` or a layer in memory; nothing is copied unless the matrix repeats entries."""
    matrix, name = _matrix(adata, layer)
    if not sp.issparse(matrix) and not isinstance(matrix, np.ndarray):
        raise ValueError(f"{name} is not in memory: load it first, adata = adata.to_memory().")
    counts = check_counts(matrix, name=name, cells=adata.obs_names, genes=adata.var_names, largest=largest)
    _warn_if_transposed(adata)
    values: Any = counts.data if sp.issparse(counts) else counts
    _warn_if_reads(_histogram(values), name)
    return counts


def read_csr(adata: AnnData, layer: str | None) -> sp.csr_matrix:
    """Return the counts as a CSR float32 matrix for a denoiser, and warn of cells that hold no molecule."""
    counts = read_counts(adata, layer, SINGLE)
    _check_shape(counts.shape)
    out = sp.csr_matrix(counts, dtype=np.float32)
    if out.count_nonzero() < out.nnz:
        out = out.copy()
        out.eliminate_zeros()
    _warn_if_empty(row_sums(out))
    return out


def as_counts(
    adata: AnnData,
    layer: str | None,
    mask_var: str | np.ndarray | Sequence[bool] | None = None,
    columns: Iterable[str] = (),
    argument: str = "batch_key",
) -> Counts:
    """Return the counts of `X` or a layer wherever they are, checked in one pass that counts their molecules.

    `columns` are those of `obs` that are wanted with them, which an `argument` named.
    """
    matrix, name = _matrix(adata, layer)
    chunks = chunks_of(matrix, name)
    if chunks.shape != adata.shape:
        raise ValueError(
            f"{name} has shape {chunks.shape}, and adata {adata.shape}: the file is damaged, write it again."
        )
    _check_shape(chunks.shape)
    try:
        (totals, histogram, n_entries), (size, digest) = chunks.run(_counted, checked_block)
    except NotACount as error:
        raise error.named(name, adata.obs_names, adata.var_names) from None
    if not totals.any():
        raise ValueError(f"{name} holds no molecule (shape {chunks.shape}): there is nothing to denoise.")
    _warn_if_transposed(adata)
    _warn_if_reads(histogram, name)
    _warn_if_empty(size)
    _warn_if_repeated(digest, adata.obs_names)
    read = {each: read_labels(adata, each, argument) for each in columns}
    used = read_mask(adata, mask_var)
    if used is not None and not totals[used].any():
        raise ValueError(f"mask_var keeps {used.sum()} genes, none of which has a molecule: cells cannot be compared.")
    names = adata.obs_names, adata.var_names
    return Counts(chunks, size, totals, int(n_entries[0]), *names, used, read)


def _counted(block: Block) -> Partial:
    """Return totals of genes, a histogram of counts, the number of entries, and sizes and digests of cells."""
    counts = block.counts
    rows = row_sums(counts), _digests(counts)
    return Partial((column_sums(counts), _histogram(counts.data), np.array([counts.nnz])), rows)


def _digests(counts: sp.csr_matrix) -> np.ndarray:
    """Return a number for each cell that only equal counts share; 0 for cells of few genes, which chance may repeat."""
    of_genes = np.random.default_rng(0).integers(1 << 63, size=counts.shape[1], dtype=np.uint64)
    found = sp.csr_matrix((counts.data.astype(np.uint64), counts.indices, counts.indptr), counts.shape) @ of_genes
    return np.where(np.diff(counts.indptr) < _FEW_GENES, np.uint64(0), found)


def checked_block(start: int, rows: Any) -> Block:
    """Return a block whose entries are counts, before and after repeated entries were added up."""
    try:
        check_values(rows, SINGLE)
        block = block_of(start, rows)
        check_values(block.counts, SINGLE)
    except NotACount as error:
        cell, *rest = error.args
        raise NotACount(start + cell, *rest) from None
    return block


def _matrix(adata: AnnData, layer: str | None) -> tuple[Any, str]:
    """Return what should hold counts, and what it is called in messages."""
    if not isinstance(adata, AnnData):
        raise TypeError(f"adata is of type {type(adata).__name__}: pass an AnnData object.")
    if layer is not None and not isinstance(layer, str):
        raise TypeError(f"layer is {layer!r}: pass the name of the layer that holds raw counts, or None for X.")
    if layer is not None and layer not in adata.layers:
        names = [name for name in adata.layers if name is not None]  # None is X since anndata 0.13
        hint = "" if names else " If X holds the raw counts, leave layer out."
        raise NotThere(f"layer {layer!r} is missing: adata.layers has {names}.{hint}")
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError('adata.X is empty: pass the layer that holds raw counts, e.g. layer="counts".')
    return matrix, "X" if layer is None else f'layer "{layer}"'


def chunks_of(matrix: Any, name: str) -> Chunks:
    """Return counts as they can be read by blocks of cells."""
    if hasattr(matrix, "__dask_graph__"):
        if np.isnan(matrix.shape[0]):
            raise ValueError(f"{name} is a Dask array of unknown length: call its compute_chunk_sizes() first.")
        return OnDask(matrix)
    if sp.issparse(matrix) or isinstance(matrix, np.ndarray):
        matrix = check_format(matrix, name)
        return InMemory(matrix.tocsr() if sp.issparse(matrix) else matrix)
    if hasattr(matrix, "device"):
        raise TypeError(
            f"{name} is of type {type(matrix).__name__}, on a device: bring it to the host, e.g. "
            "rapids_singlecell.get.anndata_to_CPU(adata). The autoencoder takes counts to its device itself."
        )
    if getattr(matrix, "format", "csr") != "csr":
        raise ValueError(
            f"{name} is stored as {matrix.format.upper()}, by gene: reading cells of it would read all of it every "
            "time. Load it, adata = adata.to_memory(), or store it as CSR."
        )
    if not hasattr(matrix, "shape") or not hasattr(matrix, "__getitem__"):
        raise TypeError(
            f"{name} is of type {type(matrix).__name__}: pass a NumPy array, a SciPy CSR or CSC matrix, one of them on "
            "disk, or a Dask array of them, cells x genes."
        )
    return OnDisk(matrix)


def _check_shape(shape: tuple[int, int]) -> None:
    for n, what in zip(shape, ("cell", "gene"), strict=True):
        if n < 2:
            raise ValueError(f"there is {n} {what}: at least 2 are needed, to learn from and to measure over.")


def _warn_if_empty(size: np.ndarray) -> None:
    if n := int((size == 0).sum()):
        warn(f"{n} cell(s) hold no molecule and stay zero: remove them with sc.pp.filter_cells(adata, min_counts=1).")


def _warn_if_repeated(digest: np.ndarray, names: pd.Index) -> None:
    found = pd.Series(digest[digest > 0])
    again = found.duplicated().to_numpy()
    if again.any():
        of_first = np.flatnonzero(digest == found[again].iloc[0])
        first, second = (names[i] for i in of_first[:2])
        warn(
            f'{int(again.sum())} cell(s) have exactly the counts of another, such as "{second}" of "{first}": each '
            "predicts its copy, so the gain and the rank come out too high. Was a sample read twice? Keep one of each."
        )


def read_labels(adata: AnnData, key: str, argument: str) -> pd.Series:
    """Return the batch or group of each cell, categorical, without categories that no cell has."""
    check_name(argument, key)
    if key not in adata.obs:
        raise NotThere(f"{argument} {key!r} is missing: adata.obs has {list(adata.obs.columns)}.")
    labels = in_memory(adata.obs)[key].astype("category").cat.remove_unused_categories()
    if labels.isna().any():
        raise ValueError(f"adata.obs[{key!r}] has {int(labels.isna().sum())} missing values: every cell needs one.")
    if (names := labels.cat.categories.astype(str)).has_duplicates:
        again = names[names.duplicated()][0]
        raise ValueError(f"adata.obs[{key!r}] holds {again!r} as text and as a number: make all of it text.")
    return labels


def _warn_if_transposed(adata: AnnData) -> None:
    genes, cells = adata.var_names[:50], adata.obs_names
    if all(_BARCODE.fullmatch(str(name)) for name in genes) or not _HOUSEKEEPING.isdisjoint(cells):
        warn(
            "adata looks transposed (cell barcodes in var_names, or genes in obs_names): counts are cells x genes, "
            "so pass adata.T."
        )


def _histogram(values: np.ndarray) -> np.ndarray:
    """Return how many of a sample of the counts are 0, 1, ..., and as large as the last or larger."""
    step = max(1, values.size // _SAMPLED)
    some = np.arange(0, values.size, step)
    some += np.arange(len(some)) % step  # not the same genes of every cell of a dense matrix
    sample = values.reshape(-1)[np.minimum(some, values.size - 1)]
    return np.bincount(np.minimum(sample.astype(np.float64), _LARGE).astype(np.intp), minlength=_LARGE + 1)


def _warn_if_reads(histogram: np.ndarray, name: str) -> None:
    """Warn by the median count that is not 0."""
    up_to = np.cumsum(histogram[1:])
    median = 1 + int(np.searchsorted(up_to, up_to[-1] / 2))
    if median > _READS:
        warn(
            f"{name} looks like reads, not molecules (median non-zero count {median}): copies of one molecule fall "
            "into both halves, so the loss takes them for signal. Use UMI counts."
        )
