"""What is written to AnnData, under which names, whole or not at all, and how it is removed.

`denoise` writes a layer, factors, and a record of what was compared and chosen; `calibrate` and `select_rank` a record.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning

from ._choose import Choice, Selection
from ._factors import GeneFactors, has_stamps
from ._loss import Gain
from ._scale import MEANING, Scale
from .methods._profiles import LowRankProfiles

Kind = Literal["denoise", "calibrate", "select_rank"]
Changes = Mapping[str, Mapping[str, Any]]
"""By slot and name, what to set there; None for what to remove."""

# What each function's record in `.uns` has, and what others write has not, all together.
_MARKS: dict[Kind, set[str]] = {
    "denoise": {"method", "version", "params", "scale", "scale_meaning"},
    "calibrate": {"best", "table", "split_losses", "denoiser", "params"},
    "select_rank": {"rank", "split_rank", "ranks", "loss", "params"},
}

_LONGEST = 200  # bytes of a key: zarr makes files of names with what follows the key, of 255 bytes at most

# Names that scanpy's functions write to without being asked: they would overwrite a result of that name.
_OF_SCANPY = {
    "pca": "sc.pp.pca",
    "PCs": "sc.pp.pca",
    "log1p": "sc.pp.log1p",
    "hvg": "sc.pp.highly_variable_genes",
    "scrublet": "sc.pp.scrublet",
    "neighbors": "sc.pp.neighbors",
    "umap": "sc.tl.umap",
    "tsne": "sc.tl.tsne",
    "diffmap_evals": "sc.tl.diffmap",
    "draw_graph": "sc.tl.draw_graph",
    "leiden": "sc.tl.leiden",
    "louvain": "sc.tl.louvain",
    "paga": "sc.tl.paga",
    "iroot": "sc.tl.dpt",
    "dpt_changepoints": "sc.tl.dpt",
    "dpt_grouptips": "sc.tl.dpt",
    "rank_genes_groups": "sc.tl.rank_genes_groups",
    "rank_genes_groups_filtered": "sc.tl.filter_rank_genes_groups",
    "spatial": "sc.read_visium",
}


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


def changes_of(
    key: str,
    record: Mapping[str, Any],
    of_genes: GeneFactors,
    fitted: Sequence[LowRankProfiles],
    size: np.ndarray,
    totals: np.ndarray,
    gene_gains: tuple[np.ndarray, np.ndarray],
    layer: Any = None,
    more: Changes | None = None,
) -> dict[str, dict[str, Any]]:
    """Return all that `committed` should set for a result of `denoise` under `key`, and remove of an earlier one.

    Parameters
    ----------
    size, totals
        Molecules of each cell and of each gene, by which the counts are known again.
    layer
        The denoised layer, if one is written.
    more
        Further columns of `obs` and `var`.
    """
    written: dict[str, dict[str, Any]] = {
        "layers": {key: layer},
        "obsm": {
            key: np.hstack([profiles.scores for profiles in fitted]),
            f"{key}_scale": of_genes.cell_scales(fitted),
        },
        "varm": {key: of_genes.loadings, f"{key}_scale": of_genes.scales},
        "obs": {f"{key}_size": size},
        "var": {f"{key}_gain": gene_gains[0], f"{key}_gain_error": gene_gains[1], f"{key}_total": totals},
        "uns": {
            key: {
                **record,
                "fingerprint": of_genes.fingerprint,
                "n_genes": len(totals),
            }
        },
    }
    for slot, columns in (more or {}).items():
        written[slot] |= columns
    return {slot: dict.fromkeys(names) | written[slot] for slot, names in _slots(key).items()}


@contextmanager
def committed(adata: AnnData, changes: Changes) -> Iterator[None]:
    """Set slots for as long as the block and nothing before it fails; else, an interrupt too, set all of them back."""
    if adata.is_view:
        what = "adata is a view: it is made an object of its own, and its parent left alone."
        warnings.warn(what, ImplicitModificationWarning, stacklevel=4)
        adata.obs = adata.obs.copy()  # does that, as any assignment to a view
    for slot in {"obs", "var"} & set(changes):
        frame = getattr(adata, slot)
        if any(value is None and name in frame for name, value in changes[slot].items()):
            setattr(adata, slot, in_memory(frame))  # a lazily read table gives up no column
    frames = {slot: getattr(adata, slot).copy(deep=False) for slot in ("obs", "var") if slot in changes}
    before = {
        slot: {name: getattr(adata, slot).get(name) for name in names}
        for slot, names in changes.items()
        if slot not in frames
    }
    try:
        for slot, names in changes.items():
            _set(getattr(adata, slot), names)
        yield
    except BaseException:
        for slot, frame in frames.items():
            setattr(adata, slot, frame)
        for slot, names in before.items():
            _set(getattr(adata, slot), names)
        raise


def _set(target: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is not None:
            target[name] = value
        elif name in target:
            del target[name]


def _slots(key: str) -> dict[str, list[str]]:
    """Return the names that a result of `denoise` under `key` may take."""
    return {
        "layers": [key],
        "obsm": [key, f"{key}_scale"],
        "varm": [key, f"{key}_scale"],
        "obs": [f"{key}_size", f"{key}_cell_scale"],
        "var": [f"{key}_gain", f"{key}_gain_error", f"{key}_total", f"{key}_phi", f"{key}_mixed"],
        "uns": [key],
    }


def kind_of(adata: AnnData, key: str) -> Kind | None:
    """Return which function wrote the record under `key`, if any did."""
    found = adata.uns.get(key)
    if not isinstance(found, Mapping) or not isinstance(found.get("params"), Mapping):
        return None
    return next((kind for kind, marks in _MARKS.items() if marks <= set(found)), None)


def in_memory(values: Any) -> Any:
    """Return a table or a record with all that was read lazily loaded, as after `anndata.experimental.read_lazy`."""
    if isinstance(values, Mapping) and not hasattr(values, "to_memory"):
        return {name: in_memory(value) for name, value in values.items()}
    if hasattr(values, "__dask_graph__"):
        return np.asarray(values)
    return values.to_memory() if hasattr(values, "to_memory") else values


def check_not_transposed(adata: AnnData, key: str) -> None:
    """Refuse a result whose cells are in `var` and genes in `obs`."""
    if f"{key}_size" in adata.var and f"{key}_gain" in adata.obs:
        raise ValueError(f"adata was transposed after it was denoised to {key!r}: pass adata.T, cells x genes.")


def results_in(adata: AnnData, *kinds: Kind) -> str:
    """Return the keys of results of some functions, or of all, for a message."""
    keys = [repr(key) for key in adata.uns if kind_of(adata, key) in (kinds or _MARKS)]
    return ", ".join(keys) or "none"


def owned(adata: AnnData, key: str) -> list[tuple[str, str]]:
    """Return (slot, name) of all that is there of a result under `key`, also where its record is gone."""
    kind = kind_of(adata, key)
    has_factors = any(has_stamps(getattr(adata, slot).get(f"{key}_scale")) for slot in ("varm", "obsm"))
    slots = _slots(key) if kind == "denoise" or has_factors else {"uns": [key]}
    if kind == "calibrate" and adata.uns[key]["params"].get("refit"):
        slots["layers"] = [key]
    return [
        (slot, name)
        for slot, names in slots.items()
        for name in names
        if name in getattr(adata, slot) and (slot != "uns" or kind is not None)
    ]


def remove(adata: AnnData, key: str = "denoised") -> None:
    """Remove a result of `denoise`, `denoise_with`, `calibrate` or `select_rank`, and nothing else.

    Parameters
    ----------
    adata
        Object with the result, or with what is left of one, as after `anndata.concat`.
    key
        Its `key_added`.

    Raises
    ------
    KeyError
        If there is no such result.
    ValueError
        If `adata` was transposed since.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata)
    >>> n2s.remove(adata)
    >>> "denoised" in adata.layers
    False
    """
    check_not_transposed(adata, key)
    found = owned(adata, key)
    if not found:
        raise KeyError(f"there is nothing of a result {key!r} to remove: the results in adata are {results_in(adata)}.")
    changes: dict[str, dict[str, None]] = {}
    for slot, name in found:
        changes.setdefault(slot, {})[name] = None
    with committed(adata, changes):
        pass


def without_results(adata: AnnData) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return copies of `obs` and `var` without the columns of results, which would not hold for other counts."""
    keys = [key for key in adata.uns if kind_of(adata, key) == "denoise"]
    obs, var = (
        in_memory(frame).drop(columns=[name for key in keys for name in _slots(key)[slot]], errors="ignore")
        for slot, frame in (("obs", adata.obs), ("var", adata.var))
    )
    return obs, var


def check_key(adata: AnnData, key: str, layer: str | None, kind: Kind = "denoise", refit: bool = False) -> None:
    """Refuse a key that files do not keep, that scanpy writes to, or under which something else stands.

    Parameters
    ----------
    layer
        That holds the counts.
    kind
        The function that will write.
    refit
        Whether `calibrate` will write a layer.
    """
    check_key_name(key)
    check_not_transposed(adata, key)
    if key == layer:
        raise ValueError(f"key_added is {key!r}, the layer that holds the counts: choose another name.")
    if adata.is_view and adata.isbacked:
        raise ValueError("adata is a part of a backed object, which cannot be written to: pass its to_memory().")
    slots = _slots(key) if kind == "denoise" else {"uns": [key], **({"layers": [key]} if refit else {})}
    taken = [(slot, name) for slot, names in slots.items() for name in names if name in getattr(adata, slot)]
    ours = owned(adata, key)
    same = kind_of(adata, key) == kind
    if strange := [] if same and kind == "denoise" else [each for each in taken if each not in ours]:
        what = {"denoise": "result", "calibrate": "calibration", "select_rank": "rank"}[kind]
        raise ValueError(
            f"{named(strange, 'exists and is', 'exist and are')} not an earlier {what}: choose another key_added than "
            f"{key!r}."
        )
    if taken and not same:
        raise ValueError(
            f"{named(taken)} left of a result that was not written by {kind}, or whose record in adata.uns is "
            f"gone, as after anndata.concat: call sc_noise2self.remove(adata, {key!r}) first, or choose another "
            "key_added."
        )


def check_key_name(key: str) -> None:
    """Refuse a name that files do not keep, or that scanpy writes to."""
    is_text = isinstance(key, str) and key != "" and key.isprintable()
    if not is_text or key[0] == "." or set(key) & set("/\\") or len(key.encode()) > _LONGEST:
        raise ValueError(
            f"key_added is {key!r}: pass a name without '/' and '\\', of characters that can be printed, that does not "
            f"start with '.', and of at most {_LONGEST} bytes, because files keep no other."
        )
    by = _OF_SCANPY.get(key)
    if key.startswith(("X_", "dendrogram_")) or key.endswith("_colors"):
        by = "scanpy"
    if by is not None:
        raise ValueError(f"key_added is {key!r}, a name that {by} writes to: choose another, e.g. {f'n2s_{key}'!r}.")


def named(slots: Sequence[tuple[str, str]], one: str = "is", several: str = "are") -> str:
    """Return the names of slots and a verb, for a message."""
    names = [f"adata.{slot}[{name!r}]" for slot, name in slots]
    return f"{', '.join(names)} {one if len(names) == 1 else several}"
