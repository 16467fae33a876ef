"""The loss of every rank, width, number of steps, or whatever was calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from .._errors import NotThere
from .._slots import in_memory, kind_of, results_in
from ._style import MARKERS, finish, ink, legend_beside, new_axes, palette

_MANY_LINES = 6
_LONGEST_TICKS = 40  # characters that stand side by side
_RANKS = "principal components"
_RESOLUTIONS = "resolution of clustering"
_COUNTED = "resolution (clusters)"
_NATS = "loss (nats per held-out molecule)"


def loss(
    adata: AnnData,
    *,
    key: str | Sequence[str] = "select_rank",
    member: str | None = None,
    ax: Axes | None = None,
    show: bool | None = None,
) -> Axes:
    """Plot the self-supervised loss of every rank, resolution, candidate of a calibration, or setting of a denoiser.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.select_rank`, `select_resolution` or `calibrate` wrote to, or `denoise` with a method
        that compares settings, such as widths of an autoencoder or numbers of neighbours.
    key
        Its `key_added`; several are overlaid.
    member
        Name of a member of an ensemble, e.g. `"diffusion"`; None takes the first that has a curve.
    ax
        Axes to draw on.
    show
        Whether to call `matplotlib.pyplot.show`; None does so where scanpy would (`settings.autoshow`, and no `ax`).

    Returns
    -------
    The Axes. Ranks: the squared error relative to that of k = 0, in per cent, at the depth of a half and, where it was
    corrected, at full depth. Else nats per held-out molecule, minus the gain; or the loss that was calibrated by. The
    line at 0 is k = 0, or one mean profile. Bands and bars are one standard error of the difference to the least
    loss, paired by cell; values within it are shaded: they are as good as the one chosen. With several parameters
    there is a line for each combination of the others.

    Raises
    ------
    KeyError
        If there is no such result, or it has no curve.
    ValueError
        If the results are in different units.
    """
    keys = [key] if isinstance(key, str) else list(key)
    runs = _aligned([_run(adata, each, member, is_alone=len(keys) == 1) for each in keys])
    if len({(run.unit, run.x) for run in runs}) != 1:
        raise ValueError(
            "these results have different axes: "
            + ", ".join(f"{k!r} {r.x}, {r.unit}" for k, r in zip(keys, runs, strict=True))
        )
    own, first = new_axes(ax), runs[0]
    _scale_x(own, runs)
    colors = palette()
    for i, (run, name) in enumerate(zip(runs, keys, strict=True)):
        _draw(own, run, "" if len(runs) == 1 else name, colors[i % len(colors)], MARKERS[i % len(MARKERS)])
    if first.zero is not None:
        own.axhline(0, color=ink(0.7), linewidth=1, linestyle=(0, (1, 1.5)), label=_limit_y(own, runs, first.zero))
    own.set(xlabel=first.x, ylabel=first.unit, title="Self-supervised loss")
    if ax is None:
        legend_beside(own, widen=True)
    else:
        own.legend(fontsize="small", framealpha=0.8, edgecolor="none")
    finish(ax, show)
    return own


@dataclass(frozen=True, eq=False)
class _Run:
    """The losses of one result.

    `table` has a row for each candidate: `x` (where it stands on the axis), `line` (the values of the other
    parameters), `loss`, `error`, `chosen`, and `full_depth_loss` where there is one.
    """

    table: pd.DataFrame
    x: str  # what the axes are called
    unit: str
    zero: str | None  # what the line at 0 is called, where candidates should be compared with it
    choice: str  # in words
    ticks: tuple[str, ...] | None = None  # names of the positions 0, 1, ..., where `x` is not a number

    @property
    def is_ranks(self) -> bool:
        """Whether it is of `select_rank`."""
        return self.x == _RANKS

    @property
    def is_resolutions(self) -> bool:
        """Whether it is of `select_resolution`."""
        return self.x in (_RESOLUTIONS, _COUNTED)


def _run(adata: AnnData, key: str, member: str | None, *, is_alone: bool) -> _Run:
    kind = kind_of(adata, key)
    if kind is None:
        raise NotThere(
            f"there is no result {key!r}: run sc_noise2self.select_rank, select_resolution, calibrate or denoise to "
            f"{key!r}, or pass key: the results in adata are {results_in(adata)}."
        )
    written = in_memory(adata.uns[key])
    learned = written.get("learned", {})
    if member is not None and member not in learned:
        raise NotThere(f"result {key!r} has no member {member!r}: it has {', '.join(learned) or 'none'}.")
    if kind == "select_rank":
        return _of_ranks(written)
    if kind == "select_resolution":
        return _of_resolutions(written, is_alone)
    if kind == "cluster_support":
        raise NotThere(f"result {key!r} is a tree of clusters, not a curve: sc_noise2self.pl.cluster_support draws it.")
    found = [written] if "table" in written else [learned[name] for name in ([member] if member else learned)]
    table = next((each["table"] for each in found if "table" in each), None)
    if table is None:
        raise NotThere(
            f"result {key!r} has no curve: it is that of select_rank, of calibrate, or of denoise with a method that "
            "compares settings. sc_noise2self.pl.spectrum shows what the components of a PCA are worth."
        )
    if written.get("loss", "poisson") != "poisson":
        return _of_table(table, f"loss ({written['loss']})", None)
    return _of_table(table, _NATS, "one mean profile")


def _of_ranks(written: Mapping[str, Any]) -> _Run:
    """Return ranks, their losses in per cent of that of k = 0."""
    table, zero = written["table"].copy(), written["table"]["loss"].iloc[0]
    table["loss"], table["error"] = 100 * (table["loss"] / zero - 1), 100 * table["error"] / zero
    if "full_depth_loss" in table:
        table["full_depth_loss"] = 100 * (table["full_depth_loss"] / table["full_depth_loss"].iloc[0] - 1)
    none = "k = 0: one mean profile" if written["params"]["center"] else "k = 0: no counts"
    run = _of_table(table, "loss relative to k = 0 (%)", none)
    return replace(run, x=_RANKS, choice=str(written["rank"]))


def _aligned(runs: Sequence[_Run]) -> list[_Run]:
    """Return runs whose positions of one name are one, where they have names: resolutions rising, others as met."""
    names = list(dict.fromkeys(name for run in runs for name in run.ticks or ()))
    if len(runs) == 1 or any(run.ticks is None for run in runs):
        return list(runs)
    if all(run.is_resolutions for run in runs):
        names.sort(key=float)
    out = []
    for run in runs:
        assert run.ticks is not None
        places = np.array([names.index(name) for name in run.ticks])
        out.append(replace(run, table=run.table.assign(x=places[run.table["x"]]), ticks=tuple(names)))
    return out


def _of_resolutions(written: Mapping[str, Any], is_alone: bool) -> _Run:
    """Return resolutions, each with the number of its clusters where no other run has another."""
    table = written["table"]
    counted = [f" ({n})" if is_alone else "" for n in table["n_clusters"]]
    names = [f"{resolution:.12g}{n}" for resolution, n in zip(table["resolution"], counted, strict=True)]
    lost = pd.DataFrame({"resolution": names, "loss": -table["gain"], "error": table["error"]})
    run = _of_table(lost.assign(chosen=table["chosen"].to_numpy()), _NATS, "one cluster")
    choice = f"{written['resolution']:g}, {table['n_clusters'][table['chosen']].iloc[0]} clusters"
    return replace(run, x=_COUNTED if is_alone else _RESOLUTIONS, choice=choice)


def _of_table(candidates: pd.DataFrame, unit: str, zero: str | None) -> _Run:
    """Put the parameter of most values on the axis, and the others into lines."""
    parameters = list(candidates.columns[: candidates.columns.get_loc("loss")])
    several = [name for name in parameters if candidates[name].nunique() > 1] or parameters[:1]
    if not several:
        raise ValueError("the calibration had one candidate without parameters: there is no curve.")
    x = max(several, key=lambda name: candidates[name].nunique())
    others = [name for name in several if name != x]
    is_number = pd.api.types.is_numeric_dtype(candidates[x])
    codes, names = pd.factorize(candidates[x])
    lines = [", ".join(f"{name} {row[name]}" for name in others) for _, row in candidates.iterrows()]
    columns = [name for name in ("loss", "error", "chosen", "full_depth_loss") if name in candidates]
    table = candidates[columns].assign(x=candidates[x] if is_number else codes, line=lines)
    chosen = candidates[candidates["chosen"]].iloc[0]
    choice = ", ".join(f"{name} {chosen[name]}" for name in several)
    return _Run(table, x, unit, zero, choice, None if is_number else tuple(map(str, names)))


def _draw(ax: Axes, run: _Run, name: str, color: str, marker: str) -> None:
    """Draw the lines of a run; `name` is empty where it is alone."""
    table, chosen = run.table, run.table[run.table["chosen"]].iloc[0]
    lines, colors = list(table.groupby("line", sort=False)), palette()
    for i, (line, unsorted) in enumerate(lines):
        rows = unsorted.sort_values("x")
        label = f"{name}: {run.choice}" if name else line or None
        if len(lines) > 1 and not name and len(lines) <= _MANY_LINES:
            color, marker = colors[i % len(colors)], MARKERS[i % len(MARKERS)]
        elif line != chosen["line"]:
            ax.plot(rows["x"], rows["loss"], color=ink(0.3), linewidth=0.8, zorder=1)
            continue
        if run.is_ranks:
            low, high = rows["loss"] - rows["error"], rows["loss"] + rows["error"]
            ax.fill_between(rows["x"], low, high, color=color, alpha=0.25, linewidth=0)
            ax.plot(rows["x"], rows["loss"], color=color, label=label or "on the other half")
        else:
            style: dict[str, Any] = {"markersize": 4, "capsize": 2.5, "linewidth": 1.2, "label": label}
            ax.errorbar(rows["x"], rows["loss"], rows["error"], color=color, marker=marker, **style)
    if len(lines) > _MANY_LINES:
        ax.plot([], [], color=ink(0.3), linewidth=0.8, label="other values")
    if name:
        ax.plot(
            chosen["x"], chosen["loss"], marker=marker, color=color, markersize=7, markeredgecolor=ax.get_facecolor()
        )
        return
    corrected = table.get("full_depth_loss")
    if corrected is not None:
        ax.plot(table["x"], corrected, color=colors[1], linestyle="--", label="corrected to full depth")
    own = table[table["line"] == chosen["line"]]
    within = own["x"][own["loss"] - table["loss"].min() <= own["error"]]
    if len(within):
        low, high = within.min(), within.max()
        between = "" if run.ticks is not None else f": {low:g}" + (f" to {high:g}" if high > low else "")
        span = ax.axvspan(*_widened(ax, own["x"], low, high), color=ink(0.12), linewidth=0, zorder=0)
        span.set_label(f"within one error{' on a half' if corrected is not None else ''}{between}")
    ax.axvline(chosen["x"], color=ink(0.8), linewidth=1, linestyle="--", label=f"chosen: {run.choice}")


def _widened(ax: Axes, values: pd.Series, low: float, high: float) -> tuple[float, float]:
    """Return ends of a span that reaches 0.3 of the way to the next values."""
    there, back = (np.log2, np.exp2) if ax.get_xscale() == "log" else (np.asarray, float)
    positions = there(np.unique(values))
    step = 0.3 * (float(np.diff(positions).min()) if len(positions) > 1 else 1)
    return float(back(there(low) - step)), float(back(there(high) + step))


def _scale_x(ax: Axes, runs: Sequence[_Run]) -> None:
    """Use a logarithm where values are doubled rather than counted, names where they are not numbers."""
    values = np.unique(np.concatenate([run.table["x"] for run in runs]))
    if runs[0].ticks is not None:
        ax.set_xticks(range(len(runs[0].ticks)), labels=runs[0].ticks)
        if sum(map(len, runs[0].ticks)) > _LONGEST_TICKS:
            ax.tick_params(axis="x", labelrotation=90)
    elif runs[0].is_ranks:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        if values.min() > 0 and values.max() >= 8 * values.min():
            ax.set_xscale("log", base=2)
            ax.minorticks_off()
        ax.set_xticks(values, labels=[f"{value:g}" for value in values])


def _limit_y(ax: Axes, runs: Sequence[_Run], zero: str) -> str:
    """Cut off what fails beyond the line at 0, or that line where all are far better; return what it is called then."""
    losses = np.concatenate([run.table["loss"] for run in runs])
    losses = losses[np.isfinite(losses)]  # a candidate that failed has none
    least, most = float(losses.min()), float(losses.max())
    if least >= 0:
        return zero
    if -least > 3 * (most - least) > 0:
        spread = most - least
        ax.set_ylim(least - 0.25 * spread, most + 0.5 * spread)
        return f"{zero}: 0, above"
    ax.set_ylim(1.08 * least, 0.08 * -least)
    return zero
