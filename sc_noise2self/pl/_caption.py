"""The report as the text under a figure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import matplotlib as mpl
import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine, TightLayoutEngine

from .._report import report

_LEAST_WIDTH = 5.0  # inches
_LINE = 1.3  # heights of the text
_CHARACTER = 0.54  # the same, a generous mean


def caption(adata: AnnData, figure: Figure | Axes | Iterable[Axes], *, key: str = "denoised") -> Figure:
    """Write the report of a result under a figure, which grows by as much as that needs.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` wrote to.
    figure
        A figure, Axes of it, or what a plot of this package or of scanpy returned with `show=False`.
    key
        The `key_added` of `denoise`.

    Returns
    -------
    The figure.

    Raises
    ------
    KeyError
        If there is no such result.
    TypeError
        If `figure` is neither a figure nor Axes.

    Examples
    --------
    >>> import scanpy as sc, sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata)
    >>> axes = sc.pl.dotplot(adata, ["CD79A", "NKG7"], "bulk_labels", layer="denoised", show=False)
    >>> n2s.pl.caption(adata, axes).savefig("dotplot.png", bbox_inches="tight")  # doctest: +SKIP
    """
    fig = _figure(figure)
    old_width, height = fig.get_size_inches()
    width, size = max(old_width, _LEAST_WIDTH), 0.8 * mpl.rcParams["font.size"]  # inches, points
    said = report(adata, key=key, detail=True)
    lines = textwrap.wrap(said, max(20, int((width - 0.3) / (_CHARACTER * size / 72))), break_long_words=False)
    sticks_out = max(0.0, -float(fig.get_tightbbox().y0))  # scanpy leaves that to bbox_inches="tight"
    below = len(lines) * _LINE * size / 72 + 0.25 + sticks_out
    share = below / (height + below)
    positions = [(ax, ax.get_position()) for ax in fig.axes]
    fig.set_size_inches(width, height + below)
    engine = fig.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine | TightLayoutEngine):
        engine.set(rect=(0, share, 1, 1 - share))
    else:
        for ax, box in positions:
            x0, y0 = box.x0 * old_width / width, share + box.y0 * (1 - share)
            ax.set_position((x0, y0, box.width * old_width / width, box.height * (1 - share)))
    at = 0.15 / width, (below - sticks_out - 0.1) / (height + below)
    fig.text(*at, "\n".join(lines), va="top", fontsize=size, linespacing=_LINE)
    return fig


def _figure(figure: Figure | Axes | Iterable[Axes]) -> Figure:
    if isinstance(figure, dict):  # scanpy's dotplot and its like
        figure = next(iter(figure.values()))
    if isinstance(figure, (list, tuple, np.ndarray)):
        figure = figure[0]
    if isinstance(figure, Axes):
        figure = figure.get_figure()  # type: ignore[assignment]
    if not isinstance(figure, Figure):
        raise TypeError(f"figure is of type {type(figure).__name__}: pass a figure, or the Axes that a plot returned.")
    return figure
