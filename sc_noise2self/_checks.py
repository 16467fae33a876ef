"""Arguments that several functions share: checked in one place, with one sentence each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from ._errors import NotThere
from ._random import RandomState
from ._warnings import warn


def read_mask(adata: AnnData, mask_var: str | np.ndarray | Sequence[bool] | None) -> np.ndarray | None:
    """Return the genes that `mask_var` keeps, boolean of shape (genes,); None for all."""
    if mask_var is None:
        return None
    if isinstance(mask_var, str) and mask_var not in adata.var:
        raise NotThere(f"mask_var {mask_var!r} is missing: adata.var has {list(adata.var.columns)}.")
    values = adata.var[mask_var] if isinstance(mask_var, str) else by_gene("mask_var", mask_var, adata.var_names)
    try:
        mask = np.asarray(values)
    except ValueError:  # lists of unequal lengths
        mask = np.zeros(0, object)
    if mask.dtype != bool or mask.shape != (adata.n_vars,):
        raise ValueError(
            f"mask_var holds {mask.dtype} of shape {mask.shape}: pass booleans, one for each of {adata.n_vars} genes."
        )
    if mask.sum() < 2:
        raise ValueError(f"mask_var keeps {mask.sum()} gene(s): keep at least 2.")
    return mask


def by_gene(name: str, values: Any, genes: pd.Index) -> Any:
    """Return values in the order of genes: those of a pandas Series go by its index, unless that is mere numbers."""
    if not isinstance(values, pd.Series) or isinstance(values.index, pd.RangeIndex) or values.index.equals(genes):
        return values
    if not (
        values.index.is_unique and genes.is_unique and len(values) == len(genes) and genes.isin(values.index).all()
    ):
        raise ValueError(f"{name} is a Series of other genes, or names some twice: index it by adata.var_names.")
    return values.reindex(genes)


def warn_of_unused_genes(adata: AnnData, mask_var: object) -> None:
    """Say when components of all genes are asked about, and `sc.pp.pca` would take those of some."""
    marked = adata.var.get("highly_variable")
    if mask_var is None and marked is not None and not np.all(marked):
        warn(
            'adata.var["highly_variable"] was not used, and sc.pp.pca would use it: pass mask_var="highly_variable" '
            "for the components that it will find, or call sc.pp.pca with mask_var=None."
        )


def bounded(name: str, value: int | None, default: int, n_cells: int, n_genes: int) -> int:
    """Return the number of components: as asked, or the default cut to what so many cells and genes have."""
    bound = min(n_cells, n_genes) - 1
    if value is None:
        return min(default, bound)
    if as_whole(name, value) > bound:
        raise ValueError(
            f"{name} is {value}: {n_cells} cells x {n_genes} genes have at most {bound} components beyond the mean."
        )
    return int(value)


def check_one_of(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}: pass one of {', '.join(choices)}.")


def as_whole(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number that is not below the least as it is; raise for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} is {value!r}: pass a whole number, {least} or more.")
    return int(value)


def check_number(name: str, value: Any, least: float, most: float, *, open_below: bool = False) -> None:
    """Raise unless the value is a number from `least`, or above it, to below `most`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    number = value.item() if isinstance(value, np.generic) else value  # NumPy compares in its own precision
    if not is_number or not least <= number < min(most, sys.float_info.max) or (open_below and number == least):
        above = f"above {least:g}" if open_below else f"{least:g} or more"
        raise ValueError(
            f"{name} is {value!r}: pass a number {above}{'' if most == np.inf else f' and below {most:g}'}."
        )


def check_flag(name: str, value: object) -> None:
    """Raise unless the value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {value!r}: pass True or False.")


def check_name(name: str, value: object, hint: str = "") -> None:
    """Raise unless the value is a string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}: pass a name, a string.{hint}")


def check_path(name: str, value: object) -> None:
    """Raise unless the value is the path of a file."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} is of type {type(value).__name__}: pass the path of a file.")


def describe_counts(adata: AnnData, layer: str | None) -> str:
    """Return where the counts are and how many, for a message."""
    return f"{'X' if layer is None else f'layer {layer!r}'} ({adata.n_obs} cells x {adata.n_vars} genes)"


def seed_of(random_state: RandomState) -> int | str:
    """Return the seed as it is written down."""
    return int(random_state) if isinstance(random_state, Integral) else "generator"


def describe_mask(mask_var: object) -> str:
    """Return which genes were used, as it is written down."""
    return mask_var if isinstance(mask_var, str) else ("none" if mask_var is None else "array")
