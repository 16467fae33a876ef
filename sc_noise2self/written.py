"""What `denoise` writes to AnnData: the layer, the factors, and the record of what was compared and chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from .denoisers.profiles import LowRankProfiles
from .loss import Gain
from .scale import MEANING, Scale
from .selection import Choice, Selection


def summary(
    method: str,
    params: dict[str, Any],
    scale: Scale,
    fitted: Sequence[LowRankProfiles],
    choices: Sequence[Choice],
    gain: Gain,
    warned: Sequence[str],
) -> dict[str, Any]:
    """Return what goes to `.uns` of any result: strings, numbers and arrays that `h5ad` and `zarr` keep."""
    records = [choice.member.record(choice.setting) for choice in choices]
    return {
        "method": method,
        "version": version("sc-noise2self"),
        "params": params,
        "scale": scale,
        "scale_meaning": MEANING[scale],
        "members": {
            "name": np.array([choice.member.name for choice in choices]),
            "setting": np.array([choice.setting for choice in choices]),
            "weight": np.array([choice.weight for choice in choices]),
            "rank": np.array([record["rank"] for record in records]),
            "link": np.array([profiles.link for profiles in fitted]),
            "n_factors": np.array([profiles.scores.shape[1] for profiles in fitted]),
        },
        "learned": {
            choice.member.name: {name: value for name, value in record.items() if name != "rank"}
            for choice, record in zip(choices, records, strict=True)
        },
        "gain": gain.mean,
        "gain_error": gain.error,
        "gain_molecules": int(gain.weights.sum()),
        "gain_cells": gain.n_cells,
        "n_cells": len(fitted[0].size),
        "warnings": np.array(warned, dtype=str),
    }


def compared(selection: Selection) -> dict[str, Any]:
    """Return what goes to `.uns` of a result that was selected: the gain of every candidate."""
    gains = selection.gains
    best = max(gains.values(), key=lambda gain: gain.mean)
    return {
        **({} if selection.phi is None else {"unmixed_gain": selection.unmixed_gain.mean}),
        "candidates": {
            "label": np.array(list(gains)),
            "gain": np.array([gain.mean for gain in gains.values()]),
            "error": np.array([gain.error_of_difference(best) for gain in gains.values()]),
        },
    }


def write(
    adata: AnnData,
    key: str,
    fitted: Sequence[LowRankProfiles],
    size: np.ndarray,
    gene_gains: tuple[np.ndarray, np.ndarray],
    dense: np.ndarray | None,
) -> None:
    """Write layer, factors and gains of genes under `key`, replacing an earlier result whole."""
    for slot, names in _slots(key).items():
        for name in names:
            if slot != "uns" and name in getattr(adata, slot):
                del getattr(adata, slot)[name]
    if dense is not None:
        adata.layers[key] = dense
    adata.obsm[key] = np.hstack([profiles.scores for profiles in fitted])
    adata.varm[key] = np.hstack([profiles.loadings for profiles in fitted])
    scales = [(profiles.cell_scale, profiles.row_scale) for profiles in fitted]
    adata.obsm[f"{key}_scale"] = np.stack([column for pair in scales for column in pair], axis=1)
    adata.varm[f"{key}_scale"] = np.column_stack([*(profiles.gene_scale for profiles in fitted), fitted[0].gene_share])
    adata.obs[f"{key}_size"] = size
    adata.var[f"{key}_gain"], adata.var[f"{key}_gain_error"] = gene_gains


def _slots(key: str) -> dict[str, list[str]]:
    """Return the names that a result under `key` may take."""
    return {
        "layers": [key],
        "obsm": [key, f"{key}_scale"],
        "varm": [key, f"{key}_scale"],
        "obs": [f"{key}_size", f"{key}_cell_scale"],
        "var": [f"{key}_gain", f"{key}_gain_error", f"{key}_phi", f"{key}_mixed"],
        "uns": [key],
    }


def without_results(adata: AnnData) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return copies of `obs` and `var` without the columns of results, which would not hold for other counts."""
    keys = [key for key, value in adata.uns.items() if isinstance(value, Mapping) and "scale_meaning" in value]
    obs, var = (
        frame.drop(columns=[name for key in keys for name in _slots(key)[slot]], errors="ignore")
        for slot, frame in (("obs", adata.obs), ("var", adata.var))
    )
    return obs, var


def check_key(adata: AnnData, key: str, layer: str | None) -> None:
    """Refuse a key under which something stands that `denoise` did not write."""
    if not isinstance(key, str) or not key or "/" in key:
        raise ValueError(f"key_added is {key!r}: pass a name without '/'.")
    if key == layer:
        raise ValueError(f"key_added is {key!r}, the layer that holds the counts: choose another name.")
    if isinstance(adata.uns.get(key), Mapping) and "scale_meaning" in adata.uns[key]:
        return
    for slot, names in _slots(key).items():
        for name in names:
            if name in getattr(adata, slot):
                raise ValueError(
                    f"adata.{slot}[{name!r}] exists and is not an earlier result: choose another key_added "
                    f"than {key!r}."
                )
