"""Read what `denoise` wrote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from anndata import AnnData

from .denoisers.profiles import LowRankProfiles


def denoised(
    adata: AnnData, genes: str | Sequence[str], *, cells: Sequence[str] | None = None, key: str = "denoised"
) -> pd.DataFrame:
    """Return denoised counts of a few genes, rebuilt from the factors; no dense layer is needed or made.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` wrote to.
    genes, cells
        Names; None takes every cell.
    key
        The `key_added` of `denoise`.

    Returns
    -------
    Expected counts at each cell's own depth, cells x genes, float32.

    Raises
    ------
    KeyError
        If there is no such result, or a gene or a cell is not in `adata`.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata, write_layer=False)
    >>> n2s.get.denoised(adata, ["CD79A", "NKG7"]).shape
    (700, 2)
    """
    genes = [genes] if isinstance(genes, str) else list(genes)
    rows = np.arange(adata.n_obs) if cells is None else _positions(adata.obs_names, cells, "cell")
    columns = _positions(adata.var_names, genes, "gene")
    return pd.DataFrame(profiles(adata, key).counts(rows, columns), index=adata.obs_names[rows], columns=genes)


def profiles(adata: AnnData, key: str = "denoised") -> LowRankProfiles:
    """Return the factors that `sc_noise2self.denoise` wrote under `key`.

    Raises
    ------
    KeyError
        If there is no such result.
    """
    if key not in adata.uns or key not in adata.obsm or key not in adata.varm:
        raise KeyError(f"there is no result {key!r}: run sc_noise2self.denoise(adata, key_added={key!r}).")
    return LowRankProfiles(
        str(adata.uns[key]["transform"]),  # type: ignore[arg-type]  # one of the transforms, as written
        np.asarray(adata.obsm[key]),
        np.asarray(adata.varm[key]),
        adata.var[f"{key}_scale"].to_numpy(),
        adata.obs[f"{key}_scale"].to_numpy(),
    )


def _positions(names: pd.Index, wanted: Sequence[str], what: str) -> np.ndarray:
    if not names.is_unique:
        raise KeyError(
            f"{what} names are not unique: call adata.{'var' if what == 'gene' else 'obs'}_names_make_unique()."
        )
    positions = names.get_indexer(wanted)
    if (positions < 0).any():
        missing = [name for name, position in zip(wanted, positions, strict=True) if position < 0]
        raise KeyError(f"{what}(s) not in adata: {', '.join(map(repr, missing[:5]))}.")
    return positions
