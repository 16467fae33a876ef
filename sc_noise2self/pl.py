"""Plots of what `select_rank`, `calibrate` and `denoise` wrote. They take `ax` and `show` as scanpy's do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from matplotlib.axes import Axes

from . import get
from .counts import row_sums


def loss(adata: AnnData, *, key: str = "select_rank", ax: Axes | None = None, show: bool | None = None) -> Axes:
    """Plot the loss of every rank or of every candidate of a calibration, or the gain of every width of an autoencoder.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.select_rank` or `calibrate` wrote to, or `denoise` with an autoencoder.
    key
        Its `key_added`; `"calibrate"` for `calibrate`, `"denoised"` for `denoise`.
    ax
        Axes to draw on.
    show
        Whether to call `matplotlib.pyplot.show`; None does so where scanpy would (an interactive backend, no `ax`).

    Returns
    -------
    The Axes. Ranks: loss above its least value, at the depth of a half and, where it was corrected, at full depth;
    ranks within one paired standard error of the least are shaded. Widths: gain on the molecules that were set aside,
    with the paired standard error of its difference to the best. Calibrations: loss over the first parameter that has
    several values, with that error, a line for every combination of the others; the choice is marked.
    """
    if key not in adata.uns:
        raise KeyError(f"there is no result {key!r}: run sc_noise2self.select_rank(adata, key_added={key!r}).")
    curve = adata.uns[key]
    if not {"ranks", "table"} & set(curve) and "autoencoder" not in curve.get("learned", {}):
        raise KeyError(
            f"result {key!r} has no curve: it is that of select_rank, of calibrate, or of denoise with an autoencoder."
        )
    own_axes = ax is None
    ax = plt.subplots(figsize=(5.2, 3.6), layout="constrained")[1] if ax is None else ax
    if "table" in curve:
        _candidates(ax, curve["table"], curve["loss"])
        return _finish(ax, own_axes, show)
    if "ranks" not in curve:
        chosen = curve["members"]["rank"][list(curve["members"]["name"]).index("autoencoder")]
        _widths(ax, curve["learned"]["autoencoder"], int(chosen))
        return _finish(ax, own_axes, show)
    ranks, scale = np.asarray(curve["ranks"]), 100 / curve["loss"][0]
    best = float(np.min(curve["loss"]))
    height, error = (curve["loss"] - best) * scale, curve["error"] * scale
    ax.fill_between(ranks, height - error, height + error, color="C0", alpha=0.25, linewidth=0)
    ax.plot(ranks, height, color="C0", label="on the other half")
    if "full_depth_loss" in curve:
        full = curve["full_depth_loss"]
        ax.plot(ranks, (full - full.min()) * scale, color="C1", linestyle="--", label="corrected to full depth")
    within = np.asarray(curve["within_one_error"])
    ax.axvspan(within.min() - 0.5, within.max() + 0.5, color="0.85", zorder=0, label="within one standard error")
    ax.axvline(curve["rank"], color="0.2", linewidth=1, linestyle=":", label=f"chosen: {curve['rank']}")
    # The first ranks gain most: show the basin, up to a tenth of the fall or the last rank's height.
    top = max(float(height[-1]) * 1.3, 0.1 * float(height[0]))
    ax.set(
        xlabel="principal components",
        ylabel="loss above its least (% of rank 0)",
        ylim=(-0.05 * top, top),
        xlim=(0, ranks[-1]),
        title="Self-supervised loss",
    )
    ax.legend(frameon=False, fontsize="small")
    return _finish(ax, own_axes, show)


def markers(
    adata: AnnData,
    genes: Sequence[str],
    *,
    key: str = "denoised",
    color: str | None = None,
    show: bool | None = None,
) -> np.ndarray:
    """Plot two genes against each other, the counts beside the denoised counts.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` wrote to.
    genes
        Two names: x and y.
    key
        Its `key_added`.
    color
        A categorical column of `obs` that colours the cells.
    show
        As in `loss`.

    Returns
    -------
    Two Axes, raw and denoised, both as molecules per 10 000 of the cell, `log1p`, on one scale. Raw values are whole
    numbers of molecules, so many cells lie on one point: they are drawn translucent.
    """
    genes = list(genes)
    if len(genes) != 2:
        raise ValueError(f"genes has {len(genes)} name(s): pass two, x and y.")
    denoised = get.denoised(adata, genes, key=key)
    layer = adata.uns[key]["params"]["layer"]
    matrix = adata.X if layer == "X" else adata.layers[layer]
    raw = matrix[:, adata.var_names.get_indexer(genes)]
    raw = pd.DataFrame(raw.toarray() if sp.issparse(raw) else np.asarray(raw), columns=genes)
    per_cell = 1e4 / np.maximum(row_sums(matrix), 1)[:, None]
    _, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), sharex=True, sharey=True, layout="constrained")
    for ax, values, title in zip(axes, (raw, denoised), ("raw counts", "denoised"), strict=True):
        x, y = np.log1p(values.to_numpy() * per_cell).T
        if color is None:
            ax.scatter(x, y, s=8, alpha=0.4, linewidth=0)
        else:
            groups = adata.obs[color].astype("category")
            names = groups.cat.categories
            palette = plt.get_cmap("tab20")(np.arange(len(names)) % 20)
            for name, group_color in zip(names, adata.uns.get(f"{color}_colors", palette), strict=False):
                cells = (groups == name).to_numpy()
                ax.scatter(x[cells], y[cells], s=8, alpha=0.5, linewidth=0, color=group_color, label=name)
        ax.set(title=title, xlabel=f"{genes[0]}, log1p(counts per 10k)")
    axes[0].set_ylabel(f"{genes[1]}, log1p(counts per 10k)")
    if color is not None:
        axes[1].legend(
            frameon=False,
            fontsize="small",
            markerscale=2,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            title=color,
        )
    _finish(axes[0], True, show)
    return axes


def _widths(ax: Axes, learned: Mapping[str, np.ndarray], chosen: int) -> None:
    """Plot the gain of each width that was tried."""
    order = np.argsort(learned["widths"])
    widths = np.asarray(learned["widths"])[order]
    ax.errorbar(widths, learned["gains"][order], learned["errors"][order], marker="o", color="C0", capsize=3)
    ax.axvline(chosen, color="0.2", linewidth=1, linestyle=":", label=f"chosen: {chosen}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(widths, labels=[str(width) for width in widths])
    ax.minorticks_off()
    ax.set(
        xlabel="width of the bottleneck",
        ylabel="gain (nats per molecule set aside)",
        title="Self-supervised gain",
    )
    ax.legend(frameon=False, fontsize="small")


def _candidates(ax: Axes, table: pd.DataFrame, loss: str) -> None:
    """Plot the loss of each candidate over the first parameter that has several values."""
    parameters = list(table.columns[: table.columns.get_loc("loss")])
    several = [name for name in parameters if table[name].nunique() > 1] or list(parameters[:1])
    if not several:
        raise ValueError("the calibration had one candidate without parameters: there is no curve.")
    x, *others = several
    is_number = pd.api.types.is_numeric_dtype(table[x])
    position = table[x] if is_number else pd.Series(pd.factorize(table[x])[0], index=table.index)
    groups = table.groupby(others, sort=False) if others else [((), table)]
    for i, (values, rows) in enumerate(groups):
        label = ", ".join(f"{name} {value}" for name, value in zip(others, values, strict=True))
        where = position[rows.index]
        marker, color = "osD^v"[i % 5], f"C{i % 10}"
        ax.errorbar(where, rows["loss"], rows["error"], marker=marker, color=color, capsize=3, label=label or None)
    chosen = table[table["chosen"]].iloc[0]
    ax.axvline(position[chosen.name], color="0.2", linewidth=1, linestyle=":", label=f"chosen: {x} {chosen[x]}")
    if not is_number:
        ax.set_xticks(range(table[x].nunique()), labels=pd.unique(table[x]))
    unit = "nats per held-out molecule; the mean profile is 0" if loss == "poisson" else loss
    ax.set(xlabel=x, ylabel=f"loss ({unit})", title="Self-supervised loss")
    ax.legend(frameon=False, fontsize="small")


def _finish(ax: Axes, own_axes: bool, show: bool | None) -> Axes:
    if show or (show is None and own_axes and plt.isinteractive()):
        plt.show()
    return ax
