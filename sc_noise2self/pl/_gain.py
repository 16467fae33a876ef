"""Which genes gained from denoising, and which did not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Bbox

from .._read import clear_gains, gains_of_genes, positions
from ._style import BLUE, GREY, RED, finish, new_axes


def gain_per_gene(
    adata: AnnData,
    *,
    key: str = "denoised",
    genes: str | Sequence[str] | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot what each gene gained against its molecules.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` wrote to.
    key
        Its `key_added`.
    genes
        Names to label, with their error bars; None labels those that gained most.
    ax, show
        As in `loss`.

    Returns
    -------
    The Axes. The gain is in nats per held-out molecule of the gene above its mean (`.var["denoised_gain"]`). Genes that
    gained or lost more than two standard errors stand out; between them are those whose molecules do not tell. Do not
    trust the pattern of a gene that did not gain.

    Raises
    ------
    KeyError
        If there is no such result or gene.
    """
    gain, error, molecules = gains_of_genes(adata, key)
    own = new_axes(ax, 6.0, 4.0)
    clear = clear_gains(adata, key)
    for kind, name, color, area, marker in (
        ("unclear", "no difference seen", GREY, 4, "o"),
        ("lost", "predicted worse", RED, 11, "v"),
        ("gained", "predicted better", BLUE, 9, "o"),
    ):
        x, y, label = molecules[clear[kind]], gain[clear[kind]], f"{name} ({clear[kind].sum():,})"
        own.scatter(x, y, linewidth=0, alpha=0.7, label=label, color=color, s=area, marker=marker)
    own.axhline(0, color="0.3", linewidth=0.8)
    own.set_xscale("log")
    if np.isnan(gain).all():
        own.set_xlim(1, 10 * max(1.0, molecules.max(initial=0)))  # an empty axis has no logarithm
    elif np.ptp(np.log10(molecules[molecules > 0])) > 1:
        own.xaxis.set_minor_formatter(NullFormatter())
    own.set(xlabel="molecules of the gene", ylabel="gain (nats per held-out molecule)")
    own.set_title("What each gene gained over its mean")
    if genes is None:
        most = np.where(clear["gained"], gain - 2 * error, -np.inf)
        labelled = [i for i in np.argsort(-most)[:30] if clear["gained"][i]]
    else:
        labelled = list(positions(adata.var_names, genes, "gene"))
        bars = np.nan_to_num(2 * error[labelled])
        own.errorbar(molecules[labelled], gain[labelled], bars, fmt="o", color="0.1", markersize=3, linewidth=1)
    handles, labels = own.get_legend_handles_labels()
    below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 3, "columnspacing": 1}
    own.legend(handles[::-1], labels[::-1], frameon=False, fontsize="small", markerscale=2, handletextpad=0, **below)
    own.margins(x=0.06, y=0.08)
    own.figure.canvas.draw()
    _label(own, molecules[labelled], gain[labelled], adata.var_names[labelled], all_of_them=genes is not None)
    finish(ax, show)
    return own


def _label(ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str], *, all_of_them: bool) -> None:
    """Write names beside points: all, or those that do not overlap."""
    taken: list[Bbox] = []
    for name, at_x, at_y in zip(names, x, y, strict=True):
        at_edge = ax.transAxes.inverted().transform(ax.transData.transform((at_x, at_y)))[0] > 0.85
        side = {"xytext": (-4, 3), "ha": "right"} if at_edge else {"xytext": (4, 3)}
        text = ax.annotate(name, (at_x, at_y), textcoords="offset points", fontsize="small", zorder=4, **side)
        if all_of_them:
            continue
        box = text.get_window_extent()
        if not ax.get_window_extent().contains(box.x1, box.y1) or any(box.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(box)
