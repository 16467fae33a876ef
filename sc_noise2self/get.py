"""Read what `denoise` wrote: a DataFrame, an AnnData object, or a lazy matrix."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd
from anndata import AnnData

from ._checks import check_one_of
from ._factors import GeneFactors, as_array
from ._result import Source, gene_factors, positions, profiles, record, sizes, values_of
from ._scale import Scale, check_scale, sample_depth, to_scale
from ._slots import in_memory
from .methods._profiles import Profiles

if TYPE_CHECKING:
    import dask.array

_CHUNKS = (4096, 256)  # cells, genes of a lazy matrix: 4 MB


def denoised(
    adata: AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    cells: Sequence[str] | None = None,
    key: str = "denoised",
    scale: Scale = "counts",
    scale_depth: float | None = None,
    source: Source = "factors",
) -> pd.DataFrame:
    """Return denoised values of some genes and cells.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` wrote to.
    genes, cells
        Names; None takes every gene, every cell.
    key
        The `key_added` of `denoise`.
    scale, scale_depth
        As in `denoise`, whatever the scale of the layer.
    source
        `"factors"` rebuilds the values; no layer is needed or made. `"layer"` reads them from `.layers[key]`, for a
        result whose factors, or whose counts that were mixed in, are gone.

    Returns
    -------
    Cells x genes, float32.

    Raises
    ------
    KeyError
        If there is no such result, or a gene or a cell is not in `adata`.
    ValueError
        If counts were mixed in and are no longer where they were, or if the layer was written on another scale than
        `"counts"` and than the one asked for.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata, write_layer=False)
    >>> n2s.get.denoised(adata, ["CD79A", "NKG7"]).shape
    (700, 2)
    """
    check_scale(scale, scale_depth)
    check_one_of("source", source, get_args(Source))
    genes = [genes] if isinstance(genes, str) else genes
    columns = positions(adata.var_names, genes, "gene")
    rows = positions(adata.obs_names, cells, "cell")
    values = values_of(adata, key, rows, columns, scale, scale_depth, source)
    return pd.DataFrame(values, index=adata.obs_names[rows], columns=list(adata.var_names[columns]))


def adata(
    adata: AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    cells: Sequence[str] | None = None,
    key: str = "denoised",
    scale: Scale = "counts",
    scale_depth: float | None = None,
    source: Source = "factors",
) -> AnnData:
    """Return denoised values of some genes and cells as an AnnData object of its own, for any function of scanpy.

    Parameters
    ----------
    adata, genes, cells, key, scale, scale_depth, source
        As in `denoised`.

    Returns
    -------
    The values in `X`, float32, with the `obs`, `var`, `obsm` and `uns` that belong to these cells and genes; no layers.
    Without `genes` it is dense, cells x all genes.

    Raises
    ------
    KeyError, ValueError
        As `denoised`.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata, write_layer=False)
    >>> n2s.get.adata(adata, ["CD79A", "NKG7"], scale="log1p_cp10k").shape
    (700, 2)
    """
    values = denoised(adata, genes, cells=cells, key=key, scale=scale, scale_depth=scale_depth, source=source)
    rows, columns = positions(adata.obs_names, cells, "cell"), positions(adata.var_names, genes, "gene")
    obs, var = in_memory(adata.obs).iloc[rows].copy(), in_memory(adata.var).iloc[columns].copy()
    obs.index, var.index = obs.index.astype(str), var.index.astype(str)  # anndata takes no other
    obsm = {name: value.iloc[rows] if hasattr(value, "iloc") else value[rows] for name, value in adata.obsm.items()}
    return AnnData(values.to_numpy(), obs=obs, var=var, obsm=obsm, uns=deepcopy(dict(adata.uns)))


def lazy(
    adata: AnnData,
    *,
    key: str = "denoised",
    scale: Scale = "counts",
    scale_depth: float | None = None,
) -> dask.array.Array:
    """Return the denoised matrix as a dask array that is computed from factors where it is read.

    As a layer it serves scanpy's own plots on a matrix that would not fit in memory: a plot of two genes computes
    two genes.

    Parameters
    ----------
    adata, key, scale, scale_depth
        As in `denoised`.

    Returns
    -------
    Cells x genes, float32, in chunks of a few cells and genes. It keeps the factors of `adata` as they are now.

    Raises
    ------
    ImportError
        Without dask: `pip install "sc-noise2self[lazy]"`.
    KeyError, ValueError
        As `denoised`.

    Examples
    --------
    >>> import scanpy as sc, sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata, write_layer=False)
    >>> adata.layers["denoised"] = n2s.get.lazy(adata)
    >>> axes = sc.pl.dotplot(adata, ["CD79A", "NKG7"], "bulk_labels", layer="denoised", show=False)
    """
    require_dask()
    check_scale(scale, scale_depth)
    size = sizes(adata, key)
    depth = sample_depth(scale, scale_depth, size)
    if record(adata, key)["params"]["mix"]:
        return _lazy(profiles(adata, key), size, scale, depth)
    scores, scales = (as_array(adata.obsm[name]) for name in (key, f"{key}_scale"))
    return lazy_of(gene_factors(adata, key), scores, scales, size, scale, depth)


def lazy_of(
    of_genes: GeneFactors, scores: Any, scales: Any, size: np.ndarray, scale: Scale, depth: float | None
) -> dask.array.Array:
    """Return the denoised matrix as a dask array from factors, which may be dask arrays themselves; see `lazy`."""
    da = require_dask()
    if not isinstance(scores, da.Array):
        return _lazy(of_genes.profiles(scores, scales, size), size, scale, depth)

    def of_block(scores: np.ndarray, scales: np.ndarray, size: np.ndarray) -> np.ndarray:
        size = size[:, 0]
        return to_scale(of_genes.profiles(scores, scales, size).counts(), size, scale, depth)

    scores, scales = scores.rechunk({1: -1}), scales.rechunk({1: -1})
    column = da.from_array(size[:, None], chunks=(scores.chunks[0], 1))
    n_genes = (len(of_genes.loadings),)
    return da.map_blocks(of_block, scores, scales, column, chunks=(scores.chunks[0], n_genes), dtype=np.float32)


def _lazy(profiles: Profiles, size: np.ndarray, scale: Scale, depth: float | None) -> dask.array.Array:
    rebuilt = _Rebuilt(profiles, size, scale, depth)
    meta = np.empty((0, 0), np.float32)
    return require_dask().from_array(rebuilt, chunks=_CHUNKS, name=False, asarray=False, meta=meta)


def require_dask() -> ModuleType:
    """Return `dask.array`.

    Raises
    ------
    ImportError
        Without dask, saying how to get it.
    """
    try:
        import dask.array
    except ImportError as error:
        raise ImportError('a lazy layer needs dask: pip install "sc-noise2self[lazy]".') from error
    return dask.array


class _Rebuilt:
    """An array whose parts are rebuilt as they are read; what dask needs of one."""

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, profiles: Profiles, size: np.ndarray, scale: Scale, depth: float | None) -> None:
        self.shape = profiles.shape
        self._profiles = profiles
        self._size = size
        self._scale: Scale = scale
        self._depth = depth

    def __getitem__(self, index: tuple[Any, Any]) -> np.ndarray:
        """Return what NumPy does for an index of cells and one of genes, of which one may be an array."""
        found = [np.arange(n)[each] for n, each in zip(self.shape, index, strict=True)]
        if all(each.ndim for each in found) and not any(isinstance(each, slice) for each in index):
            raise IndexError("two arrays were given: index cells first, then genes.")
        rows, columns = (i if isinstance(i, slice) else np.atleast_1d(at) for i, at in zip(index, found, strict=True))
        values = to_scale(self._profiles.counts(rows, columns), self._size[rows], self._scale, self._depth)
        return values.reshape(found[0].shape + found[1].shape)
