"""Which genes gained from denoising, and which did not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from adjustText import adjust_text
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter

from .._read import clear_gains, gains_of_genes, gene_names, gene_positions
from ._style import MANY, RED, blue, finish, ink, new_axes

_N_LABELLED = 15


def gain_per_gene(
    adata: AnnData,
    *,
    key: str = "denoised",
    genes: str | Sequence[str] | None = None,
    gene_symbols: str | None = None,
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
        Names to label, with their error bars; None labels the fifteen that gained most, an empty list none.
    gene_symbols
        As in `markers`.
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
    own = new_axes(ax, 6.0, 4.4)
    clear = clear_gains(adata, key)
    for kind, name, color, area, marker in (
        ("unclear", "no difference seen", ink(0.3), 4, "o"),
        ("lost", "predicted worse", RED, 11, "v"),
        ("gained", "predicted better", blue(), 9, "o"),
    ):
        x, y, label = molecules[clear[kind]], gain[clear[kind]], f"{name} ({clear[kind].sum():,})"
        own.scatter(x, y, linewidth=0, label=label, color=color, s=area, marker=marker, rasterized=len(gain) >= MANY)
    own.axhline(0, color=ink(0.7), linewidth=0.8)
    own.set_xscale("log")
    if np.isnan(gain).all():
        own.set_xlim(1, 10 * max(1.0, molecules.max(initial=0)))  # an empty axis has no logarithm
    elif np.ptp(np.log10(molecules[molecules > 0])) > 1:
        own.xaxis.set_minor_formatter(NullFormatter())
    own.set(xlabel="molecules of the gene", ylabel="gain (nats per held-out molecule)")
    own.set_title("What each gene gained over its mean")
    if genes is None:
        most = np.where(clear["gained"], gain - 2 * error, -np.inf)
        labelled = [i for i in np.argsort(-most)[:_N_LABELLED] if clear["gained"][i]]
    else:
        labelled = list(gene_positions(adata, genes, gene_symbols)[0])
        bars = np.nan_to_num(2 * error[labelled])
        own.errorbar(molecules[labelled], gain[labelled], bars, fmt="o", color=ink(), markersize=3, linewidth=1)
    handles, labels = own.get_legend_handles_labels()
    below: dict[str, Any] = {
        "loc": "upper center",
        "bbox_to_anchor": (0.5, 0),
        "borderaxespad": 4.5,
    }  # in heights of its text
    own.legend(
        handles[::-1],
        labels[::-1],
        ncols=3,
        frameon=False,
        fontsize="small",
        markerscale=2,
        handletextpad=0,
        columnspacing=1,
        **below,
    )
    own.margins(x=0.12, y=0.1)
    _label(own, molecules[labelled], gain[labelled], gene_names(adata, gene_symbols)[labelled])
    finish(ax, show)
    return own


def _label(ax: Axes, x: np.ndarray, y: np.ndarray, names: Sequence[str]) -> None:
    """Write names beside points, moved apart; a line leads from each that had to go far."""
    around = [withStroke(linewidth=2, foreground=ink(0))]  # read on top of points
    drawn = np.isfinite(x) & np.isfinite(y) & (x > 0)  # a gene without molecules has no gain
    texts = [
        ax.text(x[i], y[i], name, fontsize="small", zorder=4, path_effects=around)
        for i, name in enumerate(names)
        if drawn[i]
    ]
    if texts:
        adjust_text(texts, ax=ax, iter_lim=500, arrowprops={"arrowstyle": "-", "color": ink(0.5), "linewidth": 0.6})
