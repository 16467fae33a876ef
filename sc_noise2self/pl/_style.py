"""What the plots share: colours that fit the theme, Axes, legends beside them, and when to show.

Text, lines and greys take the theme's own colours (`matplotlib.rcParams`), so that they are seen on any background, and
figures grow with its font. Colours of the rest are those that the colour-blind and a grey print keep apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scanpy as sc
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb, to_rgba
from matplotlib.legend import Legend

from .._slots import in_memory

# Okabe & Ito (2008), dark and light in turn, without black.
BLUE, ORANGE, SKY, RED = "#0072B2", "#E69F00", "#56B4E9", "#D55E00"
_COLORS = (ORANGE, SKY, RED, "#CC79A7", "#009E73")
MARKERS = "osD^vPX"
MANY = 20_000  # points from which on they are drawn as an image, in files of vectors too
_LONGEST_LINE = 32  # characters that a panel has room for


def ink(share: float = 1.0) -> str:
    """Return the theme's colour of text; a share below 1 is a grey between it and the background, which has 0."""
    themed = [mpl.rcParams[name] for name in ("axes.facecolor", "figure.facecolor")]
    background = next((color for color in themed if to_rgba(color)[3] > 0), "white")
    text, behind = np.array(to_rgb(mpl.rcParams["text.color"])), np.array(to_rgb(background))
    return to_hex(tuple(share * text + (1 - share) * behind))


def blue() -> str:
    """Return the first colour of `palette`."""
    dark = sum(to_rgb(mpl.rcParams["text.color"])) > 1.5  # light text is for a dark background
    return SKY if dark else BLUE


def palette() -> list[str]:
    """Return colours of lines, those first that stand out most from the background."""
    first = blue()
    rest = [BLUE if color == first else color for color in _COLORS]
    return [first, rest[0], ink(), *rest[1:]]


def point_size(n: int, size: float | None, largest: float) -> float:
    """Return the area of a point in squared points of typography, as given, or as scanpy has it up to the largest."""
    return min(largest, 120_000 / max(n, 1)) if size is None else size


def wrapped(text: str) -> str:
    """Break a label, such as a long name of a gene, into lines that a panel has room for."""
    return textwrap.fill(text, _LONGEST_LINE)


def new_axes(ax: Axes | None, width: float = 5.2, height: float = 3.7) -> Axes:
    """Return the Axes given, or those of a new figure of this size in inches, for text of 10 points."""
    if ax is not None:
        return ax
    return plt.subplots(figsize=(width * _font(), height * _font()), layout="constrained")[1]


def several_axes(
    ax: Axes | Sequence[Axes] | None, n: int, width: float, *, ncols: int | None, sharing: bool
) -> np.ndarray:
    """Return a flat array of Axes, one for each panel: those given, or new ones of this width in inches."""
    if ax is None:
        n_columns = min(n, n if ncols is None else ncols)
        n_rows = -(-n // n_columns)
        size = (width * n_columns + 0.8) * _font(), (3.6 if n_rows == 1 else 3.1 * n_rows) * _font()
        options: dict[str, Any] = {"sharex": sharing, "sharey": sharing, "layout": "constrained", "squeeze": False}
        axes = plt.subplots(n_rows, n_columns, figsize=size, **options)[1].ravel()
        for unused in axes[n:]:
            unused.remove()
        for lowest in axes[max(0, n - n_columns) : n]:
            lowest.xaxis.set_tick_params(labelbottom=True)  # also above a place that is left empty
        return axes[:n]
    axes = np.array([ax] if isinstance(ax, Axes) else ax, dtype=object).ravel()
    if len(axes) != n:
        raise ValueError(f"ax holds {len(axes)} Axes: pass {n}, one for each panel.")
    return axes


def legend_beside(axes: Axes, *, widen: bool, **options: Any) -> Legend:
    """Put a legend to the right of Axes, and widen the figure by as much, so that long names narrow no panel."""
    legend = axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), **options)
    figure = axes.get_figure(root=True)
    if widen and figure is not None:
        box = np.asarray(legend.get_window_extent().size) / figure.dpi
        width, height = figure.get_size_inches()
        figure.set_size_inches(width + box[0], max(height, box[1] + 0.2))
    return legend


def finish(ax: object, show: bool | None) -> None:
    """Show the figure if asked to, or, with None, where scanpy would: by its setting, and if no Axes were given."""
    if show or (show is None and ax is None and sc.settings.autoshow):
        plt.show()


def scanpy_plots() -> ModuleType:
    """Return scanpy's plots by Matplotlib; in its preview of version 2 `sc.pl` holds others."""
    return getattr(sc.pl, "legacy", sc.pl)


def groups_and_colors(adata: AnnData, column: str) -> tuple[pd.Series, dict[str, str]]:
    """Return a categorical column of `obs`, and the colour of each category that a cell has.

    Colours are those of `.uns`, as scanpy keeps them, or scanpy's own.
    """
    groups = in_memory(adata.obs[[column]])[column].astype("category")
    names = list(groups.cat.categories)
    colors = list(adata.uns.get(f"{column}_colors", ()))
    if len(colors) < len(names):
        own = scanpy_plots().palettes
        palettes = (own.default_20, own.default_28, own.default_102)
        colors = next((colors for colors in palettes if len(colors) >= len(names)), palettes[-1])
    groups = groups.cat.remove_unused_categories()
    return groups, {name: colors[names.index(name) % len(colors)] for name in groups.cat.categories}


def _font() -> float:
    return mpl.rcParams["font.size"] / 10
