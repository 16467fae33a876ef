"""The singular values of a denoising PCA beside what noise alone reaches."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from .._errors import NotThere
from .._read import record
from ._style import RED, finish, ink, new_axes


def spectrum(
    adata: AnnData,
    *,
    key: str = "denoised",
    member: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot the singular values of the components of a PCA, their weights, and the noise edge.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` wrote to, with a PCA or an ensemble that has one.
    key
        Its `key_added`.
    member
        Name of a member of an ensemble, e.g. `"pca log1p"`; None takes the one of largest weight that has a spectrum.
    ax, show
        As in `loss`.

    Returns
    -------
    The Axes. Singular values are those of the weighted, transformed counts of a half, the mean removed. The noise
    edge is the largest that noise alone reaches (Marchenko & Pastur 1967), each gene with the variance of the
    difference of the two halves, over 2. A
    component's colour is its weight in the result: what the other half said it is worth, at the depth of all
    molecules. The line marks the rank: components that are more signal than noise.

    Raises
    ------
    KeyError
        If there is no such result, or no PCA in it.
    """
    written = record(adata, key)
    everything = written.get("learned", {})
    members = pd.DataFrame(dict(written["members"])).set_index("name")
    with_one = [name for name in members.index if "singular_values" in everything.get(name, {})]
    if not with_one or (member is not None and member not in with_one):
        raise NotThere(f"result {key!r} has no {member or 'PCA'}: its members are {', '.join(members.index)}.")
    member = member or members["weight"][with_one].idxmax()
    learned, rank = everything[member], members["rank"][member]
    values = np.asarray(learned["singular_values"])
    numbers = np.arange(1, len(values) + 1)
    own = new_axes(ax)
    own.plot(numbers, values, color=ink(0.3), linewidth=1, zorder=1)
    points = own.scatter(
        numbers, values, c=learned["weights"], vmin=0, vmax=1, s=22, edgecolor=ink(0.7), linewidth=0.4, zorder=2
    )
    own.axhline(learned["noise_edge"], color=RED, linestyle="--", linewidth=1.2, label="noise edge")
    own.axvline(rank, color=ink(0.8), linestyle=":", linewidth=1, label=f"rank: {rank}")
    own.figure.colorbar(points, ax=own, label="weight in the result")
    own.set_yscale("log")
    own.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    own.yaxis.set_major_formatter("{x:g}")
    own.yaxis.set_minor_formatter(NullFormatter())
    own.set(xlabel="component", ylabel="singular value (at half depth)", title=f"Spectrum, {members['title'][member]}")
    own.legend(frameon=False, fontsize="small")
    finish(ax, show)
    return own
