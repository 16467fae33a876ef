"""The names under which results stand in AnnData: which are whose, set whole or not at all, and removed.

`denoise` writes a layer, factors, and a record of what was compared and chosen; every other function a record, and
`calibrate` a layer, `cluster_support` labels. Subsets, concatenations and files carry cells, genes and the record along
each on its own, so the scales in `.obsm` and `.varm` carry a fingerprint of the result in their last column, the record
the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
from anndata import AnnData, ImplicitModificationWarning

from ._errors import NotThere
from ._version import __version__

Kind = Literal["denoise", "calibrate", "select_rank", "select_resolution", "cluster_support", "rank_genes_groups"]
_IN_WORDS = {"denoise": "result", "calibrate": "calibration", "select_rank": "rank"}
_IN_WORDS |= {"select_resolution": "resolution", "cluster_support": "support of clusters"}
_WITH_LABELS = ("cluster_support", "rank_genes_groups")
Changes = Mapping[str, Mapping[str, Any]]
"""By slot and name, what to set there; None for what to remove."""

LEAST_STAMP = 1 << 23  # whole numbers from here to twice as much are exact in float32, and no scale of a cell or gene
_LONGEST = 200  # bytes of a key: zarr makes files of names with what follows the key, of 255 bytes at most

# Names that scanpy's functions write to without being asked: they would overwrite a result of that name.
_OF_SCANPY = {
    **{name: f"sc.pp.{name}" for name in ("pca", "log1p", "scrublet", "neighbors")},
    **{name: f"sc.tl.{name}" for name in ("umap", "tsne", "draw_graph", "leiden", "louvain", "paga")},
    **dict.fromkeys(("iroot", "dpt_changepoints", "dpt_grouptips"), "sc.tl.dpt"),
    "PCs": "sc.pp.pca",
    "hvg": "sc.pp.highly_variable_genes",
    **dict.fromkeys(("diffmap", "diffmap_evals"), "sc.tl.diffmap"),
    "rank_genes_groups": "sc.tl.rank_genes_groups",
    "rank_genes_groups_filtered": "sc.tl.filter_rank_genes_groups",
    "spatial": "sc.read_visium",
}


def marked(kind: Kind, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record for `.uns` that says which function wrote it; it needs `params`."""
    return {"kind": kind, "version": __version__, **record}


def kind_of(adata: AnnData, key: str) -> Kind | None:
    """Return which function wrote the record under `key`, if any did."""
    found = adata.uns.get(key)
    if not isinstance(found, Mapping) or not isinstance(found.get("params"), Mapping) or "version" not in found:
        return None
    kind = str(in_memory(found.get("kind")))
    return cast("Kind", kind) if kind in get_args(Kind) else None


def in_memory(values: Any) -> Any:
    """Return a table or a record with all that was read lazily loaded, as after `anndata.experimental.read_lazy`."""
    if isinstance(values, Mapping) and not hasattr(values, "to_memory"):
        return {name: in_memory(value) for name, value in values.items()}
    if hasattr(values, "__dask_graph__"):
        return np.asarray(values)
    return values.to_memory() if hasattr(values, "to_memory") else values


def as_array(values: Any) -> Any:
    """Return an array, NumPy's or Dask's, of a slot that may hold a DataFrame, in memory or not, instead."""
    if hasattr(values, "to_memory"):
        values = values.to_memory()
    return values if hasattr(values, "__dask_graph__") else np.asarray(values)


def stamped(scales: Any, fingerprint: int) -> Any:
    """Return scales, float32, with a last column more, the same for every row; a Dask array stays one."""
    stamp = np.full((len(scales), 1), fingerprint, np.float32)
    if hasattr(scales, "__dask_graph__"):
        stamp = np.full_like(scales[:, :1], fingerprint)  # a Dask array too
    return np.concatenate([scales, stamp], axis=1)


def is_stamped(scales: Any, fingerprint: int) -> bool:
    """Whether every row of scales has this fingerprint; of a Dask array its last column alone is computed."""
    scales = as_array(scales)
    return scales.ndim == 2 and bool((np.asarray(scales[:, -1]) == fingerprint).all())


def _has_stamps(scales: Any) -> bool:
    """Whether some row has a fingerprint of some result, which nothing but a result has."""
    scales = as_array(scales)
    if scales.ndim != 2 or not scales.shape[1] or scales.dtype.kind != "f":
        return False
    last = np.asarray(scales[:, -1])
    return bool(((last >= LEAST_STAMP) & (last < 2 * LEAST_STAMP) & (last == np.rint(last))).any())


def slots_of(key: str, kind: Kind = "denoise", with_layer: bool = False) -> dict[str, list[str]]:
    """Return the names that a result under `key` may take, by slot; `with_layer` is of `calibrate`."""
    if kind != "denoise":
        labels = {"obs": [key]} if kind in _WITH_LABELS else {}
        return {"uns": [key], **({"layers": [key]} if with_layer else {}), **labels}
    return {
        "layers": [key],
        "obsm": [key, f"{key}_scale"],
        "varm": [key, f"{key}_scale"],
        "obs": [f"{key}_size", f"{key}_cell_scale", f"{key}_gain", f"{key}_coverage"],
        "var": [f"{key}_gain", f"{key}_gain_error", f"{key}_total", f"{key}_phi", f"{key}_mixed"],
        "uns": [key],
    }


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
    before: dict[str, Any] = {
        slot: {name: getattr(adata, slot).get(name) for name in names} for slot, names in changes.items()
    }
    frames = {slot: getattr(adata, slot).copy(deep=False) for slot in ("obs", "var") if slot in changes}
    try:
        for slot, names in changes.items():
            _set(getattr(adata, slot), names)
        yield
    except BaseException:
        for slot, names in before.items():
            if slot in frames:
                setattr(adata, slot, frames[slot])
            else:
                _set(getattr(adata, slot), names)
        raise


def _set(target: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is not None:
            target[name] = value
        elif name in target:
            del target[name]


def results_in(adata: AnnData, *kinds: Kind) -> str:
    """Return the keys of results of some functions, or of all, for a message."""
    return ", ".join(repr(key) for key in adata.uns if kind_of(adata, key) in (kinds or get_args(Kind))) or "none"


def owned(adata: AnnData, key: str) -> list[tuple[str, str]]:
    """Return (slot, name) of all that is there of a result under `key`, also where its record is gone."""
    kind = kind_of(adata, key)
    if kind == "denoise" or any(_has_stamps(getattr(adata, slot).get(f"{key}_scale")) for slot in ("varm", "obsm")):
        slots = slots_of(key)
    else:
        with_layer = kind == "calibrate" and bool(adata.uns[key]["params"].get("refit"))
        slots = slots_of(key, kind or "select_rank", with_layer)
    return [(slot, name) for slot, name in _there(adata, slots) if slot != "uns" or kind is not None]


def _there(adata: AnnData, slots: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    return [(slot, name) for slot, names in slots.items() for name in names if name in getattr(adata, slot)]


def remove(adata: AnnData, key: str = "denoised") -> None:
    """Remove a result of this package that stands under a key, and nothing else.

    Parameters
    ----------
    adata
        Object with the result, or with what is left of one, as after `anndata.concat`.
    key
        Its `key_added`. Of `rank_genes_groups` it is `groups_added`: the clusters and their record are removed; the
        ranking itself is scanpy's, `del adata.uns["rank_genes_groups"]`.

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
    changes: dict[str, dict[str, None]] = {}
    for slot, name in owned(adata, key):
        changes.setdefault(slot, {})[name] = None
    if not changes:
        raise NotThere(f"there is nothing of a result {key!r} to remove: the results in adata are {results_in(adata)}.")
    with committed(adata, changes):
        pass


def without_results(adata: AnnData) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return copies of `obs` and `var` without the columns of results, which would not hold for other counts."""
    results = [slots_of(key, kind) for key in adata.uns if (kind := kind_of(adata, key)) is not None]
    obs, var = (
        in_memory(frame).drop(columns=[name for own in results for name in own.get(slot, [])], errors="ignore")
        for slot, frame in (("obs", adata.obs), ("var", adata.var))
    )
    return obs, var


def check_not_transposed(adata: AnnData, key: str) -> None:
    """Refuse a result whose cells are in `var` and genes in `obs`."""
    was_denoised = f"{key}_size" in adata.var and f"{key}_gain" in adata.obs
    if was_denoised or (kind_of(adata, key) in _WITH_LABELS and key in adata.var and key not in adata.obs):
        what = "denoised" if was_denoised else "clustered"
        raise ValueError(f"adata was transposed after it was {what} to {key!r}: pass adata.T, cells x genes.")


def check_key(adata: AnnData, key: str, layer: str | None, kind: Kind = "denoise", with_layer: bool = False) -> None:
    """Refuse a key that files do not keep, that scanpy writes to, or under which something else stands."""
    check_key_name(key)
    check_not_transposed(adata, key)
    if key == layer:
        raise ValueError(f"key_added is {key!r}, the layer that holds the counts: choose another name.")
    if adata.is_view and adata.isbacked:
        raise ValueError("adata is a part of a backed object, which cannot be written to: pass its to_memory().")
    taken, ours, same = _there(adata, slots_of(key, kind, with_layer)), owned(adata, key), kind_of(adata, key) == kind
    if strange := [] if same and kind == "denoise" else [each for each in taken if each not in ours]:
        raise ValueError(
            f"{named(strange, 'exists and is', 'exist and are')} not an earlier {_IN_WORDS[kind]}: choose another "
            f"key_added than {key!r}."
        )
    if taken and not same:
        raise ValueError(
            f"{named(taken)} left of a result that was not written by {kind}, or whose record in adata.uns is "
            f"gone, as after anndata.concat: call sc_noise2self.remove(adata, {key!r}) first, or choose another "
            "key_added."
        )


def check_ranking(adata: AnnData, key: str, groups: str, method: str) -> None:
    """Refuse names for a ranking of scanpy's form and its groups under which something else stands.

    An earlier ranking is replaced, and groups are where no other ranking by this `method` is of them.
    """
    if adata.is_view and adata.isbacked:
        raise ValueError("adata is a part of a backed object, which cannot be written to: pass its to_memory().")
    if key != "rank_genes_groups":
        check_key_name(key)
    _check_file_name(groups, "groups_added")
    if groups == key:
        raise ValueError(f"groups_added is {groups!r}, the name of the ranking too: choose another.")
    if key in adata.uns and "groupby" not in _params_of(adata.uns[key]):
        raise ValueError(
            f"{named([('uns', key)], 'exists and is')} not an earlier ranking: choose another key_added than {key!r}."
        )
    check_not_transposed(adata, groups)
    if kind_of(adata, groups) != "rank_genes_groups":
        if taken := _there(adata, slots_of(groups, "rank_genes_groups")):
            raise ValueError(
                f"{named(taken, 'exists and is', 'exist and are')} not of an earlier ranking: choose another "
                f"groups_added than {groups!r}, or delete it."
            )
        return
    earlier = str(_params_of(adata.uns[groups]).get("key_added"))
    if earlier != key and _params_of(adata.uns.get(earlier)).get("method") == method:
        raise ValueError(
            f"{named([('obs', groups)])} what the ranking {earlier!r} is of: choose another groups_added than "
            f"{groups!r}."
        )


def _params_of(record: Any) -> Mapping[str, Any]:
    """Return the parameters that a record of scanpy's form was made with, or none."""
    params = record.get("params") if isinstance(record, Mapping) else None
    return in_memory(params) if isinstance(params, Mapping) else {}


def _check_file_name(name: str, argument: str) -> None:
    """Refuse a name that files do not keep."""
    is_text = isinstance(name, str) and name != "" and name.isprintable()
    if not is_text or name[0] == "." or set(name) & set("/\\") or len(name.encode()) > _LONGEST:
        raise ValueError(
            f"{argument} is {name!r}: pass a name without '/' and '\\', of characters that can be printed, that does "
            f"not start with '.', and of at most {_LONGEST} bytes, because files keep no other."
        )


def check_key_name(key: str) -> None:
    """Refuse a name that files do not keep, or that scanpy writes to."""
    _check_file_name(key, "key_added")
    by = _OF_SCANPY.get(key)
    if key.startswith(("X_", "dendrogram_")) or key.endswith("_colors"):
        by = "scanpy"
    if by is not None:
        raise ValueError(f"key_added is {key!r}, a name that {by} writes to: choose another, e.g. {f'n2s_{key}'!r}.")


def named(slots: Sequence[tuple[str, str]], one: str = "is", several: str = "are") -> str:
    """Return the names of slots and a verb, for a message."""
    names = [f"adata.{slot}[{name!r}]" for slot, name in slots]
    return f"{', '.join(names)} {one if len(names) == 1 else several}"
