"""Read what `denoise` wrote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from .annotated import read_csr
from .counts import row_sums
from .denoisers.profiles import LowRankProfiles, MixedProfiles, Profiles
from .scale import Scale, check_scale, sample_depth, to_scale
from .selection import combine


def denoised(
    adata: AnnData,
    genes: str | Sequence[str],
    *,
    cells: Sequence[str] | None = None,
    key: str = "denoised",
    scale: Scale = "counts",
    scale_depth: float | None = None,
) -> pd.DataFrame:
    """Return denoised values of a few genes, rebuilt from the factors; no dense layer is needed or made.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` wrote to.
    genes, cells
        Names; None takes every cell.
    key
        The `key_added` of `denoise`.
    scale, scale_depth
        As in `denoise`, whatever the scale of the layer.

    Returns
    -------
    Cells x genes, float32.

    Raises
    ------
    KeyError
        If there is no such result, or a gene or a cell is not in `adata`.
    ValueError
        If counts were mixed in and are no longer where they were.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata, write_layer=False)
    >>> n2s.get.denoised(adata, ["CD79A", "NKG7"]).shape
    (700, 2)
    """
    check_scale(scale, scale_depth)
    genes = [genes] if isinstance(genes, str) else list(genes)
    rows = np.arange(adata.n_obs) if cells is None else _positions(adata.obs_names, cells, "cell")
    columns = _positions(adata.var_names, genes, "gene")
    counts = profiles(adata, key).counts(rows, columns)
    size = adata.obs[f"{key}_size"].to_numpy()
    values = to_scale(counts, size[rows], scale, sample_depth(scale, scale_depth, size))
    return pd.DataFrame(values, index=adata.obs_names[rows], columns=genes)


def profiles(adata: AnnData, key: str = "denoised") -> Profiles:
    """Return the profiles that `sc_noise2self.denoise` wrote in factors under `key`.

    Raises
    ------
    KeyError
        If there is no such result.
    ValueError
        If counts were mixed in and are no longer where they were.
    """
    if key not in adata.uns or key not in adata.obsm or key not in adata.varm:
        raise KeyError(f"there is no result {key!r}: run sc_noise2self.denoise(adata, key_added={key!r}).")
    record = adata.uns[key]
    members = record["members"]
    ends = np.cumsum(members["n_factors"])
    cell_scales, gene_scales = np.asarray(adata.obsm[f"{key}_scale"]), np.asarray(adata.varm[f"{key}_scale"])
    fitted = [
        LowRankProfiles(
            str(link),  # type: ignore[arg-type]  # one of the links, as written
            np.asarray(adata.obsm[key])[:, start:end],
            np.asarray(adata.varm[key])[:, start:end],
            gene_scales[:, i],
            cell_scales[:, 2 * i],
            cell_scales[:, 2 * i + 1],
            gene_scales[:, -1],
            adata.obs[f"{key}_size"].to_numpy().astype(np.float32),
        )
        for i, (link, start, end) in enumerate(zip(members["link"], [0, *ends[:-1]], ends, strict=True))
    ]
    combined = combine(fitted, [float(weight) for weight in members["weight"]])
    if not record["params"]["mix"]:
        return combined
    layer = record["params"]["layer"]
    counts = read_csr(adata, None if layer == "X" else layer)
    if (row_sums(counts) > adata.obs[f"{key}_size"] * (1 + 1e-6)).any():
        raise ValueError(f"the counts in {layer!r} have changed since they were mixed in: run denoise again.")
    return MixedProfiles(
        combined, counts, adata.var[f"{key}_phi"].to_numpy(), adata.obs[f"{key}_cell_scale"].to_numpy()
    )


def _positions(names: pd.Index, wanted: Sequence[str], what: str) -> np.ndarray:
    if not names.is_unique:
        axis = "var" if what == "gene" else "obs"
        raise KeyError(f"{what} names are not unique: call adata.{axis}_names_make_unique().")
    positions = names.get_indexer(wanted)
    if (positions < 0).any():
        missing = [name for name, position in zip(wanted, positions, strict=True) if position < 0]
        raise KeyError(f"{what}(s) not in adata: {', '.join(map(repr, missing[:5]))}.")
    return positions
