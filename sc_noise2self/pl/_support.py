"""Clusters as a tree of joins, and what each join would cost."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from matplotlib.axes import Axes
from scipy.cluster.hierarchy import dendrogram

from .._errors import NotThere
from .._slots import in_memory, kind_of, results_in
from ._style import finish, ink, new_axes, palette


def cluster_support(
    adata: AnnData, *, key: str = "cluster_support", ax: Axes | None = None, show: bool | None = None
) -> Axes:
    """Plot the joins of clusters as a tree, with what keeping the two apart gains on held-out molecules at each.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.cluster_support` wrote to.
    key
        Its `key_added`.
    ax, show
        As in `loss`.

    Returns
    -------
    The Axes. A join stands at the distance of the two in the half that cells were clustered by, made to rise. Beside it
    are the gain and its standard error, in thousandths of a nat per held-out molecule. Joins that are not supported,
    whose gain is not above two errors, are dashed.

    Raises
    ------
    KeyError
        If there is no such result.
    """
    if kind_of(adata, key) != "cluster_support":
        raise NotThere(
            f"there is no support of clusters {key!r}: run sc_noise2self.cluster_support, or pass key: the results in "
            f"adata are {results_in(adata, 'cluster_support')}."
        )
    written = in_memory(adata.uns[key])
    table, linkage = written["table"], np.array(written["linkage"])
    # Joins are told apart by their heights, so equal ones are drawn in their order.
    order, highest = np.arange(len(linkage)), linkage[-1, 2] or 1.0  # all are 0 where clusters differ by chance alone
    linkage[:, 2] += 1e-6 * highest * order
    names = [str(i) for i in range(len(linkage) + 1)]
    tree = dendrogram(linkage, no_plot=True, labels=names)
    own = new_axes(ax, width=1.5 + 0.7 * len(names), height=3.7)
    colors = palette()
    for x, y in zip(tree["icoord"], tree["dcoord"], strict=True):
        row = table.iloc[int(np.argmin(np.abs(linkage[:, 2] - y[1])))]
        color, line = (colors[0], "-") if row["supported"] else (ink(0.6), "--")
        own.plot(x, y, color=color, linestyle=line, linewidth=1.4)
        label = f"{1000 * row['gain']:.1f} \u00b1 {1000 * row['error']:.1f}"
        own.annotate(
            label, ((x[1] + x[2]) / 2, y[1]), (0, 2), textcoords="offset points", ha="center", fontsize="x-small"
        )
    own.plot([], [], color=colors[0], label="two clusters")
    own.plot([], [], color=ink(0.6), linestyle="--", label="not told apart")
    own.set_xticks(5 + 10 * np.arange(len(names)), labels=tree["ivl"])
    own.set_yscale("function", functions=(lambda y: np.sqrt(np.maximum(y, 0)), np.square))  # small ones are seen too
    own.set(
        xlabel="cluster",
        ylabel="distance (nats per molecule seen)",
        title="Gain of keeping apart (nats / 1000)",
        ylim=(0, 1.12 * highest),
    )
    own.legend(fontsize="small", frameon=False)
    finish(ax, show)
    return own
