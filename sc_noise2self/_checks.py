"""Arguments that several functions share: checked in one place, with one sentence each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral

import numpy as np
from anndata import AnnData
from scanpy import settings
from tqdm.auto import tqdm

from ._random import RandomState


def read_mask(adata: AnnData, mask_var: str | np.ndarray | Sequence[bool] | None) -> np.ndarray | None:
    """Return the genes that `mask_var` keeps, boolean of shape (genes,); None for all."""
    if mask_var is None:
        return None
    if isinstance(mask_var, str) and mask_var not in adata.var:
        raise ValueError(f"mask_var {mask_var!r} is missing: adata.var has {list(adata.var.columns)}.")
    try:
        mask = np.asarray(adata.var[mask_var] if isinstance(mask_var, str) else mask_var)
    except ValueError:  # lists of unequal lengths
        mask = np.zeros(0, object)
    if mask.dtype != bool or mask.shape != (adata.n_vars,):
        raise ValueError(
            f"mask_var holds {mask.dtype} of shape {mask.shape}: pass booleans, one for each of {adata.n_vars} genes."
        )
    if mask.sum() < 2:
        raise ValueError(f"mask_var keeps {mask.sum()} gene(s): keep at least 2.")
    return mask


def bounded(name: str, value: int | None, default: int, n_cells: int, n_genes: int) -> int:
    """Return the number of components: as asked, or the default cut to what so many cells and genes have."""
    bound = min(n_cells, n_genes) - 1
    if value is None:
        return min(default, bound)
    check_positive(name, value)
    if value > bound:
        raise ValueError(
            f"{name} is {value}: {n_cells} cells x {n_genes} genes have at most {bound} components beyond the mean."
        )
    return int(value)


def check_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}: pass one of {', '.join(choices)}.")


def check_positive(name: str, value: int) -> None:
    """Raise unless the value is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}: pass a whole number, 1 or more.")


def check_flag(name: str, value: object) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {value!r}: pass True or False.")


def check_name(name: str, value: object, hint: str = "") -> None:
    """Raise unless the value is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}: pass a name, a string.{hint}")


def check_mapping(name: str, value: object, keys: Collection[str]) -> None:
    """Raise unless the value maps some of these names to values."""
    known = ", ".join(keys)
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r}: pass a dictionary, with any of {known}.")
    if unknown := [key for key in value if key not in keys]:
        raise ValueError(f"{name} has {', '.join(sorted(map(str, unknown)))}: it takes {known}.")


def read_names(name: str, value: object, choices: Sequence[str]) -> tuple[str, ...]:
    """Return some of the choices, at least one, each once; from any iterable, which is read once."""
    names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if not names or not all(isinstance(each, str) and each in choices for each in names):
        raise ValueError(f"{name} is {names or value!r}: pass some of {', '.join(choices)}.")
    return tuple(dict.fromkeys(names))


def describe_counts(adata: AnnData, layer: str | None) -> str:
    """Return where the counts are and how many, for a message."""
    return f"{'X' if layer is None else f'layer {layer!r}'} ({adata.n_obs} cells x {adata.n_vars} genes)"


def progress_bar(name: str, total: int) -> tqdm:
    """Return a bar for what lasts over two seconds, silent below verbosity 2 (info)."""
    return tqdm(total=total, desc=name, delay=2, disable=int(settings.verbosity) < 2, leave=False)


def seed_of(random_state: RandomState) -> int | str:
    """Return the seed as it is written down."""
    return "generator" if isinstance(random_state, np.random.Generator) else int(random_state)
