"""Genes before and after: against each other, and on an embedding of the cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes

from .._checks import as_whole, check_name, check_number
from .._errors import NotThere
from .._read import gene_names, gene_positions, observed, profiles, record, sizes, values_of
from .._slots import in_memory
from ..methods._profiles import LowRankProfiles
from ..scales import Log1pCP10k, Scale, as_scale
from ._style import (
    MANY,
    blue,
    finish,
    groups_and_colors,
    ink,
    legend_beside,
    point_size,
    scanpy_plots,
    several_axes,
    wrapped,
)

Panel = Literal["raw", "under", "denoised", "over"]
_PANELS: tuple[Panel, ...] = ("raw", "under", "denoised", "over")
_OVER_CORRECTED = 2  # components, as in Noise2Self, Figure 3
_LOG = Log1pCP10k()
# Of scanpy.pl.embedding.
_NOT_PASSED_ON = {"color", "layer", "return_fig", "save", "title", "vmax", "vmin"}


def markers(
    adata: AnnData,
    genes: Sequence[str],
    *,
    key: str = "denoised",
    layer: str | None = None,
    color: str | None = None,
    gene_symbols: str | None = None,
    panels: Sequence[Panel | int] = ("raw", "denoised"),
    ncols: int | None = None,
    size: float | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
) -> np.ndarray:
    """Plot two genes against each other, coloured by a third or by a column of `obs`, before and after.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` wrote to.
    genes
        Two names, x and y, or three, x, y and colour.
    key
        Its `key_added`.
    layer
        The layer with the raw counts, if they are not where they were denoised, as after `sc.pp.normalize_total`.
    color
        With two genes: a column of `obs`, of groups or of numbers, or a third gene.
    gene_symbols
        Column of `var` by which genes are named, as in scanpy; None takes `var_names`.
    panels
        What to show, in this order: `"raw"`, the counts; `"denoised"`, the result; `"over"`, over-corrected to two
        components, and `"under"`, under-corrected: all components, not shrunk (Noise2Self, Figure 3); or a number
        of components. The last three need `method="pca"`.
    ncols
        Panels in a row of a new figure; None puts all in one.
    size
        Area of a point; None takes 9, or less for more than 13 000 cells, as scanpy does.
    ax
        As many Axes as panels.
    show
        As in `loss`.

    Returns
    -------
    An array of Axes, one a panel, on the same scales: log1p of molecules per 10 000 of the cell. Raw values are whole
    numbers of molecules, so many cells lie on one point: they are drawn translucent. From 20 000 cells on points are an
    image, in a PDF or SVG too.

    Raises
    ------
    KeyError, ValueError
        If there is no such result, gene or column, if a panel does not belong to the result, or if the counts are
        not those that were denoised.
    """
    record(adata, key)
    genes = [genes] if isinstance(genes, str) else list(genes)
    if len(genes) not in (2, 3):
        raise ValueError(f"genes has {len(genes)} name(s), {genes}: pass two, x and y, or three, x, y and colour.")
    if color is not None and len(genes) == 3:
        raise ValueError("color was given with three genes: the third is the colour, so pass two.")
    if not panels:
        raise ValueError(f"panels is empty: pass some of {', '.join(_PANELS)}.")
    _check_drawing(adata, ncols, size)
    if color is not None and color not in adata.obs and color in gene_names(adata, gene_symbols):
        genes, color = [*genes, color], None
    columns, genes = gene_positions(adata, genes, gene_symbols)
    shown = [_panel(adata, key, columns, panel, layer) for panel in panels]
    numbers = _numbers(adata, genes, color, [values for values, _ in shown])
    groups, colors = (None, {}) if color is None or numbers is not None else groups_and_colors(adata, color)
    width = 3.5 if numbers is None else 3.9
    axes = several_axes(ax, len(panels), width, ncols=ncols, sharing=True)
    style = {"s": point_size(adata.n_obs, size, 9), "linewidth": 0, "rasterized": adata.n_obs >= MANY}
    for i, (own, (values, title)) in enumerate(zip(axes, shown, strict=True)):
        if numbers is not None:
            _scatter_numbers(own, values[:, :2], numbers, i, style)
        elif groups is not None:
            _scatter_groups(own, values[:, :2], groups, colors, style)
        else:
            own.scatter(*values.T, color=blue(), alpha=0.35, **style)
        own.set_title(title)
    n_columns = len(panels) if ncols is None or ax is not None else ncols
    for lowest in axes[-n_columns:]:
        lowest.set_xlabel(wrapped(f"{genes[0]}, {_LOG.unit}"))
    for leftmost in axes[::n_columns]:
        leftmost.set_ylabel(wrapped(f"{genes[1]}, {_LOG.unit}"))
    if numbers is not None:
        bar = {"label": wrapped(numbers.label), "extend": "max" if numbers.is_cut else "neither"}
        axes[-1].figure.colorbar(axes[-1].collections[-1], ax=axes[-1], **bar)
    if groups is not None:
        legend_beside(axes[-1], widen=ax is None, markerscale=2, title=color, ncols=1 + len(colors) // 16)
    finish(ax, show)
    return axes


def embedding(
    adata: AnnData,
    genes: str | Sequence[str],
    basis: str = "umap",
    *,
    key: str = "denoised",
    layer: str | None = None,
    scale: str | Scale = "log1p_cp10k",
    gene_symbols: str | None = None,
    ncols: int = 2,
    size: float | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    **options: Any,
) -> np.ndarray:
    """Plot genes on an embedding of the cells, the counts beside the denoised values on one colour scale.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` wrote to.
    genes
        One name or several: two panels each.
    basis
        Of `scanpy.pl.embedding`: `"umap"`, `"pca"`, ... . Where it was computed from the counts it does not change.
    key
        The `key_added` of `denoise`.
    layer, gene_symbols
        As in `markers`.
    scale
        As in `denoise`. The counts are shown on it as they are.
    ncols
        Panels in a row of a new figure, an even number: 4 puts two genes beside each other.
    size
        Area of a point; None takes 30, or less for more than 4 000 cells, as scanpy does.
    ax
        Two Axes a gene.
    show
        As in `loss`.
    **options
        Of `scanpy.pl.embedding`, e.g. `frameon`, `cmap`, `alpha`.

    Returns
    -------
    An array of Axes of shape (genes, 2). A gene's colours end at the 99th percentile of its counts or of its denoised
    values, whichever is higher.

    Raises
    ------
    KeyError, ValueError
        If there is no such result, gene or embedding, or if the counts are not those that were denoised.
    TypeError
        If an option of scanpy's is set for each panel here, or saves the figure.
    """
    if refused := sorted(options.keys() & _NOT_PASSED_ON):
        raise TypeError(
            f"embedding takes no {', '.join(refused)}: it sets what each panel shows. To save, call savefig of the "
            "figure that the Axes returned are on."
        )
    _check_drawing(adata, ncols, size)
    if ncols % 2:
        raise ValueError(f"ncols is {ncols}: pass an even number, for a gene takes two panels.")
    own_scale = as_scale(scale)
    record(adata, key)
    genes = [genes] if isinstance(genes, str) else list(genes)
    if not genes:
        raise ValueError("genes is empty: pass a name or several.")
    check_name("basis", basis)
    basis = basis.removeprefix("X_")
    name = f"X_{basis}" if f"X_{basis}" in adata.obsm else basis
    if name not in adata.obsm:
        raise NotThere(f"there is no embedding {basis!r}: adata.obsm has {list(adata.obsm)}. Run sc.tl.{basis} first.")
    columns, genes = gene_positions(adata, genes, gene_symbols)
    raw = _raw(adata, key, columns, own_scale, layer)
    denoised = values_of(adata, key, slice(None), columns, own_scale, layer=layer)
    own = several_axes(ax, 2 * len(genes), 3.4, ncols=ncols, sharing=False).reshape(len(genes), 2)
    area = point_size(adata.n_obs, size, 30)
    for row, gene, before, after in zip(own, genes, raw.T, denoised.T, strict=True):
        top = max(float(np.quantile(before, 0.99)), float(np.quantile(after, 0.99))) or 1.0
        small = AnnData(np.column_stack([before, after]), obsm={name: np.asarray(adata.obsm[name])})
        small.var_names = ["raw", "denoised"]
        for single, what in zip(row, small.var_names, strict=True):
            given = {"colorbar_loc": "right" if what == "denoised" else None, "size": area, **options}
            title = wrapped(f"{gene}, {'raw counts' if what == 'raw' else what}")
            scanpy_plots().embedding(
                small, basis, color=what, vmin=0, vmax=top, ax=single, show=False, title=title, **given
            )
            for points in single.collections:
                points.set_rasterized(points.get_rasterized() or adata.n_obs >= MANY)
        bar = row[1].collections[-1].colorbar
        if bar is not None:
            bar.set_label(own_scale.unit)
    finish(ax, show)
    return own


def _check_drawing(adata: AnnData, ncols: int | None, size: float | None) -> None:
    if not adata.n_obs:
        raise ValueError("adata has no cells: there is nothing to draw.")
    if ncols is not None:
        as_whole("ncols", ncols)
    if size is not None:
        check_number("size", size, 0, np.inf, open_below=True)


@dataclass(frozen=True)
class _Numbers:
    """What colours the cells, panel by panel, where that is a number."""

    of_panels: list[np.ndarray]
    low: float
    high: float
    label: str
    is_cut: bool  # whether some are above `high`


def _numbers(adata: AnnData, genes: list[str], color: str | None, shown: list[np.ndarray]) -> _Numbers | None:
    """Return the third gene's values as each panel shows it, or those of a column, or None if there are none."""
    if len(genes) == 3:
        of_panels = [values[:, 2] for values in shown]
        top = max(float(np.quantile(values, 0.99)) for values in of_panels) or 1.0
        return _Numbers(of_panels, 0.0, top, f"{genes[2]}, {_LOG.unit}", is_cut=True)
    if color is None:
        return None
    if color not in adata.obs:
        raise NotThere(f"there is no column or gene {color!r}: adata.obs has {list(adata.obs.columns)}.")
    column = in_memory(adata.obs[[color]])[color]
    if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return None
    values = column.to_numpy(dtype=float, na_value=np.nan)
    finite = values[np.isfinite(values)]
    if not len(finite):
        raise ValueError(f"adata.obs[{color!r}] holds no number: pass another column.")
    return _Numbers([values] * len(shown), float(finite.min()), float(finite.max()), str(color), is_cut=False)


def _scatter_numbers(ax: Axes, xy: np.ndarray, numbers: _Numbers, panel: int, style: dict[str, Any]) -> None:
    values = numbers.of_panels[panel]
    has_one = np.isfinite(values)
    if not has_one.all():
        ax.scatter(*xy[~has_one].T, color=ink(0.2), **style)
    order = np.flatnonzero(has_one)[np.argsort(values[has_one], kind="stable")]  # the highest on top, as in scanpy
    x, y = xy[order].T
    ax.scatter(x, y, c=values[order], vmin=numbers.low, vmax=numbers.high, alpha=0.8, **style)


def _scatter_groups(ax: Axes, xy: np.ndarray, groups: pd.Series, colors: dict[str, str], style: dict[str, Any]) -> None:
    if groups.isna().any():
        ax.scatter(*xy[groups.isna().to_numpy()].T, color=ink(0.2), label="no value", **style)
    for name, of_name in colors.items():
        of_group = (groups == name).to_numpy()
        ax.scatter(*xy[of_group].T, color=of_name, alpha=0.55, label=str(name), **style)


def _panel(
    adata: AnnData, key: str, columns: np.ndarray, panel: Panel | int, layer: str | None
) -> tuple[np.ndarray, str]:
    """Return log1p(CP10k) of the genes as a panel shows them, shape (cells, genes), and its title."""
    if panel == "raw":
        return _raw(adata, key, columns, _LOG, layer), "raw counts"
    if panel == "denoised":
        return values_of(adata, key, slice(None), columns, _LOG, layer=layer), "denoised"
    if panel not in _PANELS and (isinstance(panel, bool) or not isinstance(panel, Integral) or panel < 1):
        raise ValueError(f"panels has {panel!r}: pass {', '.join(_PANELS)}, or a number of components.")
    written = record(adata, key)
    learned = written.get("learned", {}).get(str(written["members"]["name"][0]), {})
    found = profiles(adata, key) if written["has_factors"] and not written["params"]["mix"] else None
    if not isinstance(found, LowRankProfiles) or "weights" not in learned:
        raise ValueError(
            f"panels has {panel!r}: other numbers of components need a result of method='pca' without mix."
        )
    weights = np.asarray(learned["weights"])
    n_kept = found.scores.shape[1] - 1
    n_components = {"under": n_kept, "over": min(_OVER_CORRECTED, n_kept)}.get(str(panel), panel)
    if int(n_components) > n_kept:
        raise ValueError(f"panels has {panel!r}: {n_kept} components have a weight above 0.")
    # Undo the weights, keep the first components, and give genes and cells their totals again.
    scores = found.scores[:, : int(n_components) + 1].copy()
    scores[:, 1:] /= weights[weights > 0][: int(n_components)]
    loadings = np.ascontiguousarray(found.loadings[:, : scores.shape[1]])
    other = LowRankProfiles.unscaled(found.link, scores, loadings, found.size, found.gene_share).scaled(n_rounds=1)
    values = _LOG.apply(other.counts(slice(None), columns), sizes(adata, key))
    what = {"under": "under-corrected: ", "over": "over-corrected: "}.get(str(panel), "")
    return values, f"{what}{n_components} component{'' if n_components == 1 else 's'}"


def _raw(adata: AnnData, key: str, columns: np.ndarray, scale: Scale, layer: str | None) -> np.ndarray:
    """Return the counts of genes as they are on a scale, shape (cells, genes)."""
    counts = observed(adata, key, layer).part(slice(None), columns)
    return scale.of_observed().apply(counts.toarray(), sizes(adata, key))
