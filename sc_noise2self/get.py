"""Read what `denoise` wrote: a DataFrame, an AnnData object, or a lazy matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd
from anndata import AnnData

from ._blocks import Counts, InMemory
from ._checks import check_flag, check_number, check_one_of
from ._read import (
    Source,
    beliefs,
    gene_factors,
    gene_positions,
    has_all_genes,
    positions,
    profiles,
    record,
    sizes,
    values_of,
)
from ._result import GeneFactors, Result
from ._slots import as_array, in_memory
from ._threads import in_threads
from .methods._profiles import MixedProfiles, Profiles
from .scales import Scale, as_scale

if TYPE_CHECKING:
    import dask.array

_CHUNKS = (4096, 256)  # cells, genes of a lazy matrix: 4 MB


def denoised(
    adata: AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    cells: Sequence[str] | None = None,
    key: str = "denoised",
    scale: str | Scale = "counts",
    source: Source | None = None,
    gene_symbols: str | None = None,
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
    scale
        As in `denoise`, whatever the scale of the layer.
    source
        `"factors"` rebuilds the values; no layer is needed or made, and counts that were mixed in are read where they
        are. `"layer"` reads `.layers[key]`, for a result whose factors, or whose counts that were mixed in, are gone.
        None takes factors, or the layer where a method gives values and no factors.
    gene_symbols
        Column of `var` by which `genes` are named here and in what is returned, as in scanpy; None takes `var_names`.

    Returns
    -------
    Cells x genes, float32.

    Raises
    ------
    KeyError
        If there is no such result or column, if a gene or a cell is not in `adata`, or if a symbol that is asked for
        stands for several genes.
    ValueError
        If counts were mixed in and are no longer where they were, if the layer was written on another scale than
        `"counts"` and than the one asked for, or if factors are asked for where there are none.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata, write_layer=False)
    >>> n2s.get.denoised(adata, ["CD79A", "NKG7"]).shape
    (700, 2)
    """
    own_scale = as_scale(scale)
    _check_source(source)
    (columns, names), rows = gene_positions(adata, genes, gene_symbols), positions(adata.obs_names, cells, "cell")
    values = values_of(adata, key, rows, columns, own_scale, source=source)
    return pd.DataFrame(values, index=adata.obs_names[rows], columns=names, copy=False)


def interval(
    adata: AnnData,
    genes: str | Sequence[str],
    *,
    cells: Sequence[str] | None = None,
    level: float = 0.9,
    scale: str | Scale = "counts",
    key: str = "denoised",
    predictive: bool = False,
    gene_symbols: str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the interval in which a cell's expected count lies, or, with `predictive=True`, a fresh count of it.

    The model: the true rate is Gamma distributed around the denoised value, as widely as held-out molecules say, with
    the squared coefficient of variation `phi * (value / mean) ** power`: `.var["denoised_phi"]` of the gene, its mean
    denoised count over all cells, and one `.uns["denoised"]["phi_power"]`. Where counts were mixed in, the share
    `.uns["denoised"]["evidence"]` of the cell's own count is evidence too.

    Parameters
    ----------
    adata, genes, cells, scale, key, gene_symbols
        As in `denoised`.
    level
        Probability, above 0 and below 1; the interval leaves half of the rest on each side.
    predictive
        The interval of a fresh count of the cell at its own depth instead, which adds the noise of counting. Its ends
        are whole numbers, so it holds one with a probability of `level` or more; with `scale="counts"` alone.

    Returns
    -------
    The low and the high end, two DataFrames, cells x genes, float64.

    Raises
    ------
    KeyError, ValueError, TypeError
        As `denoised`, if `level` is out of range, or if counts were mixed into a result that has no factors.

    Notes
    -----
    The coverage that intervals had on molecules held out is in `.uns["denoised"]["coverage"]`, by expression and depth;
    `sc_noise2self.pl.calibration` draws it. It is that of fresh counts, which are spread evenly between whole numbers
    (Smith 1985). Expected counts are never observed. Of deep counts of which a fifth or less was denoised, 90 %
    intervals held 88 to 90 % of the rest; in simulations of genes that are not rare, 91 to 96 % of expected counts,
    with `mix=True` 87 to 96 %. Of rare genes they hold fewer, down to a quarter where a gene has less than 30 molecules
    in all: how many there should be is then itself unsure (`docs/method.md`). A rate's distribution is skewed, and the
    value is its mean: it can lie above the high end, as 2 % of values do at 90 %.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata)
    >>> low, high = n2s.get.interval(adata, ["CD79A", "NKG7"])
    >>> bool((low < high).all(axis=None))
    True
    """
    check_number("level", level, 0, 1, open_below=True)
    check_flag("predictive", predictive)
    own_scale = as_scale(scale)
    if predictive and own_scale != as_scale("counts"):
        raise ValueError("predictive=True is of counts: leave scale out.")
    (columns, names), rows = gene_positions(adata, genes, gene_symbols), positions(adata.obs_names, cells, "cell")
    belief = beliefs(adata, key, rows, columns)
    size = sizes(adata, key)
    own_scale = own_scale.settled(record(adata, key)["depth"])
    ends = [own_scale.apply(end, size[rows]) for end in belief.interval(level, predictive=predictive)]
    low, high = (pd.DataFrame(end, index=adata.obs_names[rows], columns=names) for end in ends)
    return low, high


def adata(
    adata: AnnData,
    genes: str | Sequence[str] | None = None,
    *,
    cells: Sequence[str] | None = None,
    key: str = "denoised",
    scale: str | Scale = "counts",
    source: Source | None = None,
    gene_symbols: str | None = None,
) -> AnnData:
    """Return denoised values of some genes and cells as an AnnData object of its own, for any function of scanpy.

    Parameters
    ----------
    adata, genes, cells, key, scale, source, gene_symbols
        As in `denoised`; the object keeps its `var_names`, and the column.

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
    own_scale = as_scale(scale)
    _check_source(source)
    (columns, _), rows = gene_positions(adata, genes, gene_symbols), positions(adata.obs_names, cells, "cell")
    values = values_of(adata, key, rows, columns, own_scale, source=source)
    obs, var = in_memory(adata.obs).iloc[rows].copy(), in_memory(adata.var).iloc[columns].copy()
    obs.index, var.index = obs.index.astype(str), var.index.astype(str)  # anndata takes no other
    obsm = {name: value.iloc[rows] if hasattr(value, "iloc") else value[rows] for name, value in adata.obsm.items()}
    return AnnData(values, obs=obs, var=var, obsm=obsm, uns=deepcopy(dict(adata.uns)))


def lazy(adata: AnnData, *, key: str = "denoised", scale: str | Scale = "counts") -> dask.array.Array:
    """Return the denoised matrix as a dask array that is computed from factors where it is read.

    As a layer it serves scanpy's own plots on a matrix that would not fit in memory: a plot of two genes computes
    two genes.

    Parameters
    ----------
    adata, key, scale
        As in `denoised`.

    Returns
    -------
    Cells x genes, float32, in chunks of a few cells and genes, or of all genes where counts are mixed in. It holds the
    factors of `adata`, not a copy of them; counts that were mixed in are read where they are, and a part whose cells
    have other counts by then is an error.

    Raises
    ------
    ImportError
        Without dask: `pip install "sc-noise2self[lazy]"`.
    KeyError, ValueError
        As `denoised`, and if there are no factors.

    Examples
    --------
    >>> import scanpy as sc, sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata, write_layer=False)
    >>> adata.layers["denoised"] = n2s.get.lazy(adata)
    >>> axes = sc.pl.dotplot(adata, ["CD79A", "NKG7"], "bulk_labels", layer="denoised", show=False)
    """
    require_dask()
    size = sizes(adata, key)
    own_scale = as_scale(scale).settled(record(adata, key)["depth"])
    if record(adata, key)["params"]["mix"]:
        mixed = profiles(adata, key)
        assert isinstance(mixed, MixedProfiles)
        return _lazy(mixed, size, own_scale, size if has_all_genes(adata, key) else mixed.sums_of_counts())
    factors = gene_factors(adata, key)
    scores, scales = (as_array(adata.obsm[name]) for name in (key, f"{key}_scale"))
    return _lazy_factors(factors, scores, scales, size, own_scale)


def _check_source(source: Source | None) -> None:
    if source is not None:
        check_one_of("source", source, get_args(Source))


def layer_of(result: Result, counts: Counts) -> Any:
    """Return the layer of a result: dense for counts in memory, else as `lazy` does."""
    found, size, scale = result.profiles, result.size, result.scale
    if result.cell_scale is not None:
        found = MixedProfiles(found, counts.chunks, result.dispersion, result.cell_scale)
    if isinstance(counts.chunks, InMemory):
        out = np.empty(found.shape, np.float32)

        def fill(rows: slice) -> None:
            out[rows] = scale.apply(found.counts(rows), size[rows])

        for _ in in_threads(fill, found.rows()):
            pass
        return out
    if result.cell_scale is not None or not result.factored:
        return _lazy(found, size, scale, size)
    factors = GeneFactors.of(result)
    return _lazy_factors(factors, *factors.of_cells(result), size, scale)


def _lazy_factors(factors: GeneFactors, scores: Any, scales: Any, size: np.ndarray, scale: Scale) -> dask.array.Array:
    """Return the denoised matrix from factors of cells, which may be Dask arrays themselves."""
    da = require_dask()
    if not isinstance(scores, da.Array):
        return _lazy(factors.profiles(scores, scales, size), size, scale)

    def of_block(scores: np.ndarray, scales: np.ndarray, size: np.ndarray) -> np.ndarray:
        return scale.apply(factors.profiles(scores, scales, size[:, 0]).counts(), size[:, 0])

    scores, scales = scores.rechunk({1: -1}), scales.rechunk({1: -1})
    column = da.from_array(size[:, None], chunks=(scores.chunks[0], 1))
    chunks = (scores.chunks[0], (len(factors.scales),))
    return da.map_blocks(of_block, scores, scales, column, chunks=chunks, dtype=np.float32)


def _lazy(profiles: Profiles, size: np.ndarray, scale: Scale, mixed_in: np.ndarray | None = None) -> dask.array.Array:
    """Return profiles as a Dask array; `mixed_in` are the molecules of each cell that are mixed in, where any are."""
    rebuilt, meta = _Rebuilt(profiles, size, scale, mixed_in), np.empty((0, 0), np.float32)
    chunks = _CHUNKS
    if isinstance(profiles, MixedProfiles):  # every chunk reads its cells' counts
        chunks = max(1, math.prod(_CHUNKS) // profiles.shape[1]), profiles.shape[1]
    return require_dask().from_array(rebuilt, chunks=chunks, name=False, asarray=False, meta=meta)


def require_dask() -> ModuleType:
    """Return `dask.array`; without dask raise an ImportError that says how to get it."""
    try:
        import dask.array
    except ImportError as error:
        raise ImportError('a lazy layer needs dask: pip install "sc-noise2self[lazy]".') from error
    return dask.array


class _Rebuilt:
    """An array whose parts are rebuilt as they are read; what dask needs of one."""

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(self, profiles: Profiles, size: np.ndarray, scale: Scale, mixed_in: np.ndarray | None) -> None:
        self.shape = profiles.shape
        self._profiles, self._size, self._scale, self._mixed_in = profiles, size, scale, mixed_in

    def __getitem__(self, index: tuple[Any, Any]) -> np.ndarray:
        """Return what NumPy does for an index of cells and one of genes, of which one may be an array."""
        found = [np.arange(n)[each] for n, each in zip(self.shape, index, strict=True)]
        if all(each.ndim for each in found) and not any(isinstance(each, slice) for each in index):
            raise IndexError("two arrays were given: index cells first, then genes.")
        rows, columns = (i if isinstance(i, slice) else np.atleast_1d(at) for i, at in zip(index, found, strict=True))
        profiles, size = self._profiles, self._size[rows]
        if isinstance(profiles, MixedProfiles):
            assert self._mixed_in is not None
            profiles = profiles.of_cells(np.arange(self.shape[0])[rows])
            if not np.array_equal(profiles.sums_of_counts(), self._mixed_in[rows]):
                raise ValueError(
                    "the counts that this layer mixes in have changed since it was made (X normalised?): make it "
                    "again from the counts, n2s.get.lazy(adata), or keep them in a layer and denoise that."
                )
            rows = slice(None)
        values = self._scale.apply(profiles.counts(rows, columns), size)
        return values.reshape(found[0].shape + found[1].shape)
