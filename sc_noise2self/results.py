"""What `denoise` wrote, read back as profiles and values by position."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from .annotated import read_csr
from .counts import row_sums
from .denoisers.profiles import Index, LowRankProfiles, MixedProfiles, Profiles
from .scale import Scale, sample_depth, to_scale
from .selection import combine

Source = Literal["factors", "layer"]


def record(adata: AnnData, key: str) -> Mapping[str, Any]:
    """Return what `sc_noise2self.denoise` wrote to `.uns[key]`.

    Raises
    ------
    KeyError
        If it wrote nothing there.
    """
    found = adata.uns.get(key)
    if not isinstance(found, Mapping) or "scale_meaning" not in found:
        raise KeyError(f"there is no result {key!r}: run sc_noise2self.denoise(adata, key_added={key!r}).")
    return found


def sizes(adata: AnnData, key: str) -> np.ndarray:
    """Return the molecules of each cell as `denoise` saw them, shape (cells,)."""
    record(adata, key)
    return adata.obs[f"{key}_size"].to_numpy()


def profiles(adata: AnnData, key: str = "denoised") -> Profiles:
    """Return the profiles that `sc_noise2self.denoise` wrote in factors under `key`.

    Raises
    ------
    KeyError
        If there is no such result.
    ValueError
        If counts were mixed in and are no longer where they were.
    """
    written = record(adata, key)
    if key not in adata.obsm or key not in adata.varm:
        raise KeyError(f"the factors of {key!r} are gone from adata.obsm or adata.varm: pass source='layer'.")
    size = adata.obs[f"{key}_size"].to_numpy()
    combined = rebuilder(adata, key)(np.asarray(adata.obsm[key]), np.asarray(adata.obsm[f"{key}_scale"]), size)
    if not written["params"]["mix"]:
        return combined
    layer = written["params"]["layer"]
    counts = read_csr(adata, None if layer == "X" else layer)
    if (row_sums(counts) > adata.obs[f"{key}_size"] * (1 + 1e-6)).any():
        raise ValueError(f"the counts in {layer!r} have changed since they were mixed in: run denoise again.")
    return MixedProfiles(
        combined, counts, adata.var[f"{key}_phi"].to_numpy(), adata.obs[f"{key}_cell_scale"].to_numpy()
    )


def rebuilder(adata: AnnData, key: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Profiles]:
    """Return the function that makes profiles of cells from their rows of `.obsm[key]` and its scale, and their sizes.

    It holds nothing of `adata` but what belongs to genes.
    """
    members = record(adata, key)["members"]
    loadings, gene_scales = np.asarray(adata.varm[key]), np.asarray(adata.varm[f"{key}_scale"])
    links, weights = [str(link) for link in members["link"]], [float(weight) for weight in members["weight"]]
    ends = [int(end) for end in np.cumsum(members["n_factors"])]

    def profiles(scores: np.ndarray, scales: np.ndarray, size: np.ndarray) -> Profiles:
        fitted = [
            LowRankProfiles(
                link,  # type: ignore[arg-type]  # one of the links, as written
                scores[:, start:end],
                loadings[:, start:end],
                gene_scales[:, i],
                scales[:, 2 * i],
                scales[:, 2 * i + 1],
                gene_scales[:, -1],
                size.astype(np.float32),
            )
            for i, (link, start, end) in enumerate(zip(links, [0, *ends[:-1]], ends, strict=True))
        ]
        return combine(fitted, weights)

    return profiles


def values_of(
    adata: AnnData,
    key: str,
    rows: Index,
    columns: Index,
    scale: Scale,
    scale_depth: float | None = None,
    source: Source = "factors",
) -> np.ndarray:
    """Return denoised values by position, float32 of shape (cells asked, genes asked); see `denoised`."""
    size = sizes(adata, key)
    depth = sample_depth(scale, scale_depth, size)
    if source == "factors":
        return to_scale(profiles(adata, key).counts(rows, columns), size[rows], scale, depth)
    if key not in adata.layers:
        raise KeyError(f"there is no layer {key!r}: pass source='factors'.")
    written, params = adata.uns[key]["scale"], adata.uns[key]["params"]
    values = np.array(adata.layers[key][rows][:, columns], dtype=np.float32)
    if written == "counts":
        return to_scale(values, size[rows], scale, depth)
    if written != scale or (depth is not None and depth != params["scale_depth"]):
        raise ValueError(f"the layer {key!r} is on the scale {written!r}: pass that scale, or source='factors'.")
    return values


def observed(adata: AnnData, key: str, columns: Index) -> np.ndarray:
    """Return the counts that were denoised, dense of shape (cells, genes asked)."""
    layer = record(adata, key)["params"]["layer"]
    if layer != "X" and layer not in adata.layers:
        raise KeyError(
            f"layer {layer!r}, which was denoised to {key!r}, is gone: there are no counts to show beside it."
        )
    counts = (adata.X if layer == "X" else adata.layers[layer])[:, columns]
    return counts.toarray() if sp.issparse(counts) else np.asarray(counts)


def gains_of_genes(adata: AnnData, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the gain of each gene and its error, shape (genes,) each."""
    record(adata, key)
    columns = [f"{key}_gain", f"{key}_gain_error"]
    if not set(columns) <= set(adata.var):
        raise KeyError(f"the gains of genes of {key!r} are gone from adata.var: run denoise again.")
    gain, error = adata.var[columns].to_numpy().T
    return gain, error


def clear_gains(adata: AnnData, key: str) -> dict[str, np.ndarray]:
    """Return which genes gained and which lost by more than two standard errors, boolean of shape (genes,).

    `"gained"`, `"lost"`, and `"unclear"`: no difference to the mean profile was seen, or too few molecules to see one.
    Genes without molecules are in none.
    """
    gain, error = gains_of_genes(adata, key)
    gained, lost = gain > 2 * error, gain < -2 * error
    return {"gained": gained, "unclear": ~(gained | lost) & ~np.isnan(gain), "lost": lost}


def positions(names: pd.Index, wanted: Sequence[str] | None, what: str) -> np.ndarray:
    """Return where these names of genes or cells stand; None for all.

    Raises
    ------
    KeyError
        If one is not there, or names are not unique.
    """
    if wanted is None:
        return np.arange(len(names))
    if not names.is_unique:
        axis = "var" if what == "gene" else "obs"
        raise KeyError(f"{what} names are not unique: call adata.{axis}_names_make_unique().")
    positions = names.get_indexer(wanted)
    if (positions < 0).any():
        missing = [name for name, position in zip(wanted, positions, strict=True) if position < 0]
        raise KeyError(f"{what}(s) not in adata: {', '.join(map(repr, missing[:5]))}.")
    return positions
