"""What the plots share: colours that the colour-blind and a grey print keep apart, Axes, and when to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from matplotlib.axes import Axes

from .._slots import in_memory

# Okabe & Ito (2008), dark and light in turn.
COLORS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#CC79A7", "#009E73")
BLUE, ORANGE, RED, GREY = COLORS[0], COLORS[1], COLORS[4], "0.72"
MARKERS = "osD^vPX"
CMAP = "viridis"


def new_axes(ax: Axes | None, width: float = 5.2, height: float = 3.7) -> Axes:
    """Return the Axes given, or those of a new figure of this size in inches."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def several_axes(
    ax: Axes | Sequence[Axes] | None, n_rows: int, n_columns: int, width: float, sharing: bool
) -> np.ndarray:
    """Return an array of Axes, one for each panel: those given, or new ones of this width in inches."""
    n = n_rows * n_columns
    if ax is None:
        size = (width * n_columns + 0.8, 3.6 if n_rows == 1 else 3.1 * n_rows)
        options: dict[str, Any] = {"sharex": sharing, "sharey": sharing, "layout": "constrained", "squeeze": False}
        return plt.subplots(n_rows, n_columns, figsize=size, **options)[1].ravel()
    axes = np.array([ax] if isinstance(ax, Axes) else ax, dtype=object).ravel()
    if len(axes) != n:
        raise ValueError(f"ax holds {len(axes)} Axes: pass {n}, one for each panel.")
    return axes


def finish(ax: object, show: bool | None) -> None:
    """Show the figure if asked to, or, with None, where scanpy would: by its setting, and if no Axes were given."""
    if show or (show is None and ax is None and sc.settings.autoshow):
        plt.show()


def groups_and_colors(adata: AnnData, column: str) -> tuple[pd.Series, dict[str, str]]:
    """Return a categorical column of `obs`, and the colour of each category that a cell has.

    Colours are those of `.uns`, as scanpy keeps them, or scanpy's own.
    """
    if column not in adata.obs:
        raise KeyError(f"there is no column {column!r} in adata.obs: it has {list(adata.obs.columns)}.")
    values = in_memory(adata.obs[[column]])[column]
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        raise ValueError(f"adata.obs[{column!r}] holds numbers: color takes a categorical column.")
    groups = values.astype("category")
    names = list(groups.cat.categories)
    colors = list(adata.uns.get(f"{column}_colors", ()))
    if len(colors) < len(names):
        palettes = (sc.pl.palettes.default_20, sc.pl.palettes.default_28, sc.pl.palettes.default_102)
        colors = next((colors for colors in palettes if len(colors) >= len(names)), palettes[-1])
    groups = groups.cat.remove_unused_categories()
    return groups, {name: colors[names.index(name) % len(colors)] for name in groups.cat.categories}
