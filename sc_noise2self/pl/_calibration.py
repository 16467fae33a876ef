"""How often intervals of a result held molecules that it had not seen."""

from __future__ import annotations

import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes

from .._read import record
from ._style import ORANGE, blue, finish, ink, new_axes


def calibration(
    adata: AnnData, *, key: str = "denoised", by: str = "expression", ax: Axes | None = None, show: bool | None = None
) -> Axes:
    """Plot the coverage of predictive intervals on held-out molecules against their nominal level.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` or `denoise_with` wrote to.
    key
        Its `key_added`.
    by
        `"expression"`, a line for each tenth of the genes by their molecules, or `"depth"`, each tenth of the cells.
    ax, show
        As in `loss`.

    Returns
    -------
    The Axes. A line on the diagonal says that intervals of a level of 90 % hold 90 % of fresh counts; below it they are
    too narrow. Counts are discrete, so coverage is randomised (`.uns["denoised"]["coverage"]`).

    Raises
    ------
    KeyError
        If there is no such result.
    ValueError
        If `by` is another word.
    """
    if by not in ("expression", "depth"):
        raise ValueError(f"by is {by!r}: pass 'expression' or 'depth'.")
    table = pd.DataFrame(record(adata, key)["coverage"])
    own = new_axes(ax)
    own.plot([0, 1], [0, 1], color=ink(0.3), linewidth=1, zorder=0)
    tenths = table[table["by"] == by]
    colors = {int(tenths["decile"].min()): ORANGE, int(tenths["decile"].max()): blue()}
    ends = dict(zip(colors, ("lowest tenth", "highest tenth"), strict=False))
    for decile, lines in tenths.groupby("decile"):
        own.plot(
            lines["level"], lines["covered"], color=colors.get(decile, ink(0.5)), linewidth=1, label=ends.get(decile)
        )
    overall = table[table["by"] == "all"]
    own.plot(overall["level"], overall["covered"], "o", color=ink(), markersize=5, label="all")
    least = min(0.45, float(table["covered"].min()))
    own.set(xlim=(0.45, 1), ylim=(least, 1), xlabel="nominal level", ylabel="held-out counts inside")
    own.set_title(f"Coverage of intervals, by {by}")
    own.legend(frameon=False, fontsize="small")
    finish(ax, show)
    return own
