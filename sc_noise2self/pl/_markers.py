"""Genes before and after: against each other, and on an embedding of the cells."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import scanpy as sc
from anndata import AnnData
from matplotlib.axes import Axes

from .._checks import check_name
from .._read import observed, positions, profiles, record, sizes, values_of
from ..methods._profiles import LowRankProfiles
from ..scales import Log1pCP10k, Scale, as_scale
from ._style import BLUE, CMAP, finish, groups_and_colors, several_axes

Panel = Literal["raw", "under", "denoised", "over"]
_PANELS: tuple[Panel, ...] = ("raw", "under", "denoised", "over")
_OVER_CORRECTED = 2  # components, as in Noise2Self, Figure 3
_LOG = Log1pCP10k()


def markers(
    adata: AnnData,
    genes: Sequence[str],
    *,
    key: str = "denoised",
    layer: str | None = None,
    color: str | None = None,
    panels: Sequence[Panel | int] = ("raw", "denoised"),
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
) -> np.ndarray:
    """Plot two genes against each other, coloured by a third or by a group of cells, before and after.

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
        With two genes: a categorical column of `obs`.
    panels
        What to show, in this order: `"raw"`, the counts; `"denoised"`, the result; `"over"`, over-corrected to two
        components, and `"under"`, under-corrected: all components, not shrunk (Noise2Self, Figure 3); or a number
        of components. The last three need `method="pca"`.
    ax
        As many Axes as panels.
    show
        As in `loss`.

    Returns
    -------
    An array of Axes, one a panel, on the same scales: log1p of molecules per 10 000 of the cell. Raw values are whole
    numbers of molecules, so many cells lie on one point: they are drawn translucent.

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
    columns = positions(adata.var_names, genes, "gene")
    shown = [_panel(adata, key, columns, panel, layer) for panel in panels]
    groups, colors = (None, {}) if color is None else groups_and_colors(adata, color)
    axes = several_axes(ax, 1, len(panels), 3.5 if groups is None and len(genes) == 2 else 3.9, sharing=True)
    points = None
    top = max(float(np.quantile(values[:, -1], 0.99)) for values, _ in shown)
    for own, (values, title) in zip(axes, shown, strict=True):
        style = {"s": 9, "linewidth": 0, "rasterized": len(values) > 10_000}
        if len(genes) == 3:
            order = np.argsort(values[:, 2], kind="stable")  # the highest on top, as in scanpy
            x, y, z = values[order].T
            points = own.scatter(x, y, c=z, cmap=CMAP, vmin=0, vmax=top or 1, alpha=0.8, **style)
        elif groups is None:
            own.scatter(*values.T, color=BLUE, alpha=0.35, **style)
        else:
            if groups.isna().any():
                own.scatter(*values[groups.isna().to_numpy()].T, color="lightgray", label="no value", **style)
            for name, of_name in colors.items():
                of_group = (groups == name).to_numpy()
                own.scatter(*values[of_group].T, color=of_name, alpha=0.55, label=str(name), **style)
        own.set(title=title, xlabel=f"{genes[0]}, {_LOG.unit}")
    axes[0].set_ylabel(f"{genes[1]}, {_LOG.unit}")
    if points is not None:
        axes[-1].figure.colorbar(points, ax=axes[-1], label=f"{genes[2]}, {_LOG.unit}", extend="max")
    if groups is not None:
        beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "ncols": 1 + len(colors) // 16}
        axes[-1].legend(frameon=False, fontsize="small", markerscale=2, title=color, **beside)
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
        One name or several: a row each.
    basis
        Of `scanpy.pl.embedding`: `"umap"`, `"pca"`, ... . Where it was computed from the counts it does not change.
    key
        The `key_added` of `denoise`.
    layer
        As in `markers`.
    scale
        As in `denoise`. The counts are shown on it as they are.
    ax
        Two Axes a gene.
    show
        As in `loss`.
    **options
        Of `scanpy.pl.embedding`, e.g. `size`, `frameon`, `cmap`.

    Returns
    -------
    An array of Axes of shape (genes, 2). A gene's colours end at the 99th percentile of its counts or of its denoised
    values, whichever is higher.

    Raises
    ------
    KeyError, ValueError
        If there is no such result, gene or embedding, or if the counts are not those that were denoised.
    """
    own_scale = as_scale(scale)
    record(adata, key)
    genes = [genes] if isinstance(genes, str) else list(genes)
    if not genes:
        raise ValueError("genes is empty: pass a name or several.")
    check_name("basis", basis)
    basis = basis.removeprefix("X_")
    name = f"X_{basis}" if f"X_{basis}" in adata.obsm else basis
    if name not in adata.obsm:
        raise KeyError(f"there is no embedding {basis!r}: adata.obsm has {list(adata.obsm)}. Run sc.tl.{basis} first.")
    columns = positions(adata.var_names, genes, "gene")
    raw = _raw(adata, key, columns, own_scale, layer)
    denoised = values_of(adata, key, slice(None), columns, own_scale, layer=layer)
    own = several_axes(ax, len(genes), 2, 3.4, sharing=False).reshape(len(genes), 2)
    for row, gene, before, after in zip(own, genes, raw.T, denoised.T, strict=True):
        top = max(float(np.quantile(before, 0.99)), float(np.quantile(after, 0.99))) or 1.0
        small = AnnData(np.column_stack([before, after]), obsm={name: adata.obsm[name]})
        small.var_names = ["raw", "denoised"]
        for single, what in zip(row, small.var_names, strict=True):
            given = {"cmap": CMAP, "colorbar_loc": "right" if what == "denoised" else None, **options}
            title = f"{gene}, {'raw counts' if what == 'raw' else what}"
            sc.pl.embedding(small, basis, color=what, vmin=0, vmax=top, ax=single, show=False, title=title, **given)
        bar = row[1].collections[-1].colorbar
        if bar is not None:
            bar.set_label(own_scale.unit)
    finish(ax, show)
    return own


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
    return values, f"{what}{n_components} components"


def _raw(adata: AnnData, key: str, columns: np.ndarray, scale: Scale, layer: str | None) -> np.ndarray:
    """Return the counts of genes as they are on a scale, shape (cells, genes)."""
    counts = observed(adata, key, layer).part(slice(None), columns)
    return scale.of_observed().apply(counts.toarray(), sizes(adata, key))
