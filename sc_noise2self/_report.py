"""What a denoised layer is worth, in three lines, in a paragraph or as a table: `report`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
from anndata import AnnData

from ._checks import check_flag, check_name
from ._errors import NotThere
from ._intervals import strata_of
from ._loss import Score
from ._read import clear_gains, gains_of_genes, has_all_cells, has_all_genes, record, sizes
from ._result import described_by, weights_by
from ._slots import in_memory


class Report(str):
    """The text of a report, a string like any other; a notebook shows it with its figures as a table."""

    figures: pd.DataFrame

    def _repr_html_(self) -> str:
        lines = "<br>".join(escape(line) for line in self.splitlines())
        return f"<p>{lines}</p>{self.figures.to_html(float_format='{:,.4g}'.format, na_rep='')}"


@overload
def report(
    adata: AnnData,
    *,
    key: str = "denoised",
    groupby: None = None,
    detail: bool = False,
    as_frame: Literal[False] = False,
) -> str: ...


@overload
def report(
    adata: AnnData, *, key: str = "denoised", groupby: None = None, detail: bool = False, as_frame: Literal[True]
) -> pd.DataFrame: ...


@overload
def report(
    adata: AnnData, *, key: str = "denoised", groupby: str, detail: bool = False, as_frame: bool = False
) -> pd.DataFrame: ...


def report(
    adata: AnnData,
    *,
    key: str = "denoised",
    groupby: str | None = None,
    detail: bool = False,
    as_frame: bool = False,
) -> str | pd.DataFrame:
    """Return what a result is worth: what was done, what it gained, how many warnings, what not to do with it.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` or `denoise_with` wrote to, or a subset of it.
    key
        Its `key_added`.
    groupby
        Instead of the text, a table of where denoising helps and for whom not: a categorical column of `obs`;
        `"depth"`, tenths of the cells by their molecules; or `"expression"`, tenths of the genes by theirs.
    detail
        A paragraph that says all of it, with every warning, instead of three short lines.
    as_frame
        The figures alone, as a table.

    Returns
    -------
    Three lines of plain text; with `detail=True` a paragraph without line breaks, which `sc_noise2self.pl.caption` puts
    under a figure. A notebook shows either with its figures as a table.

    With `as_frame=True` a DataFrame with a row for each figure: its `value`, its standard `error` where it has one, and
    what it is `of`. With `groupby` a DataFrame with a row for each group: `n`, its cells or genes that were measured;
    `gain` in nats per held-out molecule above the mean profile, and `gain_error`, its standard error over cells or
    genes; `coverage`, the share of sampled held-out counts inside their 90 % interval.

    Raises
    ------
    KeyError
        If there is no such result, or no such column.
    ValueError
        If more than one of `groupby`, `detail` and `as_frame` is given, or a column holds numbers instead of groups.

    Notes
    -----
    A gene gained, or lost, if its held-out gain is more than two standard errors from 0 (`.var["denoised_gain"]`). Of a
    subset of the cells the report gives their own gain beside that of all. What cannot be known of a subset is that of
    the whole, and is said to be: what genes gained, over all cells, and what cells gained, over all genes. The coverage
    of tenths of genes is known of all genes alone, else NaN.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata)
    >>> print(n2s.report(adata))  # doctest: +ELLIPSIS
    PCA of log1p (18 components worth more than noise...
    Gain ...
    Of 765 genes ...
    >>> n2s.report(adata, as_frame=True).loc["candidates", "value"].item()
    14.0
    """
    given = {"groupby": groupby is not None, "detail": detail, "as_frame": as_frame}
    for name in ("detail", "as_frame"):
        check_flag(name, given[name])
    if sum(given.values()) > 1:
        names = " and ".join(name for name, is_given in given.items() if is_given)
        raise ValueError(f"{names} were given: each asks for another form of the report, so pass one of them.")
    if groupby is not None:
        check_name("groupby", groupby)
        return _table(adata, key, groupby)
    figures = _figures(adata, key)
    if as_frame:
        return figures
    said = Report(_paragraph(adata, key, figures) if detail else _three_lines(adata, key, figures))
    said.figures = figures
    return said


def _figures(adata: AnnData, key: str) -> pd.DataFrame:
    """Return every figure of a report: a row each, with what it is of."""
    written = record(adata, key)
    covered = _coverage(written, "all")
    n_cells, n_genes = int(written["n_cells"]), int(written["n_genes"])
    over_genes = "" if has_all_genes(adata, key) else f", over all {n_genes:,} genes"
    over_cells = "" if has_all_cells(adata, key) else f", over all {n_cells:,} cells that were denoised"
    cells, genes = f"the {n_cells:,} cells that were denoised{over_genes}", f"{adata.n_vars:,} genes{over_cells}"
    rows: list[tuple[str, float, float, str]] = [
        ("gain", written["gain"], written["gain_error"], cells),
        ("coverage", covered.get(0, np.nan), np.nan, cells),
        ("held-out molecules", written["gain_molecules"], np.nan, cells),
        ("cells measured", written["gain_cells"], np.nan, cells),
    ]
    if "unmixed_gain" in written:
        rows.append(("gain without mixing", written["unmixed_gain"], np.nan, cells))
    if over_cells and adata.n_obs and {f"{key}_gain", f"{key}_coverage"} <= set(adata.obs):
        here = _of_cells(adata, key, np.zeros(adata.n_obs, dtype=int)).squeeze()
        these = f"{here['n']:,.0f} cells here{over_genes}"
        rows.append(("gain here", here["gain"], here["gain_error"], these))
        rows.append(("coverage here", here["coverage"], np.nan, these))
    clear = {name: int(which.sum()) for name, which in clear_gains(adata, key).items()}
    rows += [(f"genes {name}", n, np.nan, genes) for name, n in clear.items()]
    rows.append(("genes not scored", adata.n_vars - sum(clear.values()), np.nan, genes))
    rows.append(("candidates", len(written.get("candidates", ())), np.nan, "this result"))
    rows.append(("warnings", len(written["warnings"]), np.nan, "this result"))
    frame = pd.DataFrame(rows, columns=["figure", "value", "error", "of"]).set_index("figure")
    return frame.astype({"value": float, "error": float})


def _three_lines(adata: AnnData, key: str, figures: pd.DataFrame) -> str:
    written, value = record(adata, key), figures["value"]
    n_warnings = int(value["warnings"])
    warned = f"{n_warnings} warning{'s' if n_warnings > 1 else ''}: see detail=True. " if n_warnings else ""
    over = "" if has_all_cells(adata, key) else f", over all {written['n_cells']:,} cells"
    genes = (
        f"Of {adata.n_vars:,} genes {value['genes gained']:,.0f} are predicted better than by their mean and "
        f"{value['genes lost']:,.0f} worse{over}."
    )
    return "\n".join(
        [
            f"{_how(written, brief=True)}{_chosen(written, brief=True)}.",
            _gain_in_a_line(adata, key, figures),
            f"{genes} {warned}Use the values to look, and test on the counts.",
        ]
    )


def _gain_in_a_line(adata: AnnData, key: str, figures: pd.DataFrame) -> str:
    written = record(adata, key)
    gain, covered, whole = figures.loc["gain"], figures["value"]["coverage"], f"{written['n_cells']:,} cells"
    if not written["beats_mean"] or written["gain_cells"] < 2:
        untold = f"Molecules held out of {whole} do not tell that it predicts them better than one mean profile does"
        if "unmixed_gain" not in written or written["gain_cells"] < 2:
            return f"{untold}."
        return f"{untold}; with each cell's own counts mixed in the gain is {gain['value']:.3f} +- {gain['error']:.3f}."
    said, where = f"{gain['value']:.3f} +- {gain['error']:.3f}", whole
    if "gain here" in figures.index and np.isfinite(figures["error"]["gain here"]):
        here, covered = figures.loc["gain here"], figures["value"]["coverage here"]
        where = f"the {adata.n_obs:,} cells here, {said} in all {whole}"
        said = f"{here['value']:.3f} +- {here['error']:.3f}"
    over = "" if has_all_genes(adata, key) else f", over all {written['n_genes']:,} genes"
    inside = f"; 90 % intervals held {covered:.1%} of held-out counts" if np.isfinite(covered) else ""
    return f"Gain {said} nats per held-out molecule above one mean profile in {where}{over}{inside}."


def _paragraph(adata: AnnData, key: str, figures: pd.DataFrame) -> str:
    written = record(adata, key)
    sentences = [
        _what_was_done(written),
        _what_it_gained(adata, key),
        *_here(adata, key, figures),
        _in_which_genes(adata, key),
    ]
    if written["params"]["mix"]:
        sentences.append(
            "Copies of one molecule look like expression to what was mixed in: compare with mix=False before you "
            "believe a gene that it changes."
        )
    if len(written["warnings"]):
        sentences.append(f"Warnings: {'; '.join(str(message).rstrip('.') for message in written['warnings'])}.")
    sentences.append(
        "Denoised values are not data: differential expression, correlations and p-values computed on them are "
        "circular, so use them to look, and test on the counts (Andrews & Hemberg 2018)."
    )
    return " ".join(sentences)


def _how(written: Mapping[str, Any], *, brief: bool = False) -> str:
    """Return what was done to which counts; of several members, `brief` gives their titles alone."""
    params, members = written["params"], written["members"]
    weights = described_by(members["described"], members["weight"])
    parts = list(weights)
    if len(parts) > 1:
        weights = weights_by(members["title"], members["weight"]) if brief else weights
        parts = [f"{weight:.0%} {part}" for part, weight in weights.items()]
    what = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    source = f"the counts in layer {params['layer']!r}" if "layer" in params else "the counts in X"
    how = f"A model fitted to other cells, {what}, applied to" if "model" in params else f"{what} of"
    share = f"{written['evidence']:.0%}"
    mixed = f", with each cell's own count of a gene mixed back in ({share} of it)" if params["mix"] else ""
    return f"{how[0].upper()}{how[1:]} {source}{mixed}"


def _chosen(written: Mapping[str, Any], *, brief: bool = False) -> str:
    tried = len(written["candidates"]) if "candidates" in written else 0
    if tried and not written["beats_mean"]:
        beats = f"none of {tried} candidates beats" if tried > 1 else "the one candidate does not beat"
        return f", which {beats} by molecules held out"
    one = len(set(written["members"]["described"])) == 1
    by = "" if brief else " by molecules held out"
    return f", the best of {tried} candidates{by}" if tried > 1 and one else ""


def _what_was_done(written: Mapping[str, Any]) -> str:
    version = f"sc_noise2self {written['version']}, seed {written['params']['random_state']}"
    return f"{_how(written)}{_chosen(written)} ({version}). Values are {written['scale_meaning']}."


def _what_it_gained(adata: AnnData, key: str) -> str:
    written = record(adata, key)
    gain, error, n_measured = written["gain"], written["gain_error"], written["gain_cells"]
    cells = _cells(n_measured, written["n_cells"], None if has_all_cells(adata, key) else adata.n_obs)
    if n_measured < 2:
        return f"Too few cells ({cells}) hold molecules to tell whether the mean profile is beaten."
    measured = f"measured on {written['gain_molecules']:,} held-out molecules of {cells}"
    gained = f"{gain:.3f} +- {error:.3f} nats per molecule better than one mean profile does, {measured}"
    no_better = "Molecules held out were predicted no better than by one mean profile"
    if not written["beats_mean"] and "unmixed_gain" in written:
        unmixed = f"{no_better} ({written['unmixed_gain']:.4f} nats)"
        return f"{unmixed}; with mixing, half of the molecules predicts the other half by {gained}."
    if not written["beats_mean"]:
        return f"{no_better} ({gain:.4f} +- {error:.4f} nats, {measured})."
    if "model" in written["params"]:
        return f"From half of these cells' molecules it predicts the other half by {gained}."
    mixed = f" ({written['unmixed_gain']:.3f} without mixing)" if "unmixed_gain" in written else ""
    return (
        f"Learned from half of the molecules, it predicts the other half by {gained}{mixed}; the result is fitted to "
        "all molecules and does better."
    )


def _cells(n_measured: int, n_denoised: int, n_here: int | None) -> str:
    """Return the cells that a gain was measured on, of those denoised; `n_here` are not the same, where there are."""
    if n_here is None:
        return f"{n_measured:,} cells" if n_measured == n_denoised else f"{n_measured:,} of {n_denoised:,} cells"
    of = "" if n_measured == n_denoised else f"{n_measured:,} of "
    here = f"of which {n_here:,} are here" if n_here < n_denoised else f"while {n_here:,} are here"
    return f"{of}the {n_denoised:,} cells that were denoised, {here}"


def _here(adata: AnnData, key: str, figures: pd.DataFrame) -> list[str]:
    """Return what is to be said of a subset: the gain of its cells, and what is of the whole."""
    written = record(adata, key)
    sentences, value, error = [], figures["value"], figures["error"]
    if "gain here" in value and np.isfinite(error["gain here"]):
        here = f"{value['gain here']:.3f} +- {error['gain here']:.3f}"
        sentences.append(f"In the cells here the gain is {here} nats per molecule.")
    if not has_all_genes(adata, key):
        sentences.append(f"Gains of cells are over all {written['n_genes']:,} genes that were denoised.")
    if not has_all_cells(adata, key):
        sentences.append(f"Gains of genes are over all {written['n_cells']:,} cells that were denoised.")
    return sentences


def _in_which_genes(adata: AnnData, key: str) -> str:
    n = {name: int(genes.sum()) for name, genes in clear_gains(adata, key).items()}
    n_scored = sum(n.values())
    unscored = adata.n_vars - n_scored
    rest = f" The other {unscored:,} of {adata.n_vars:,} genes have too few molecules to be scored." if unscored else ""
    if not n["gained"] + n["lost"]:
        return f"No gene is predicted better than its mean.{rest}"
    doubtful = [f"for {n['unclear']:,} the molecules do not tell"] if n["unclear"] else []
    doubtful += [f"{n['lost']:,} are predicted worse"] if n["lost"] else []
    these = "these" if len(doubtful) == 1 else "either"
    trust = f"; {' and '.join(doubtful)}: do not trust the pattern of {these}" if doubtful else ""
    return f"Of {n_scored:,} genes {n['gained']:,} are predicted better than by their mean{trust}.{rest}"


def _table(adata: AnnData, key: str, groupby: str) -> pd.DataFrame:
    """Return gain and coverage by groups of cells, or of genes."""
    written = record(adata, key)
    if groupby in ("expression", "depth") and groupby in adata.obs:
        raise ValueError(
            f"groupby={groupby!r} means tenths by {groupby}, and adata.obs has a column of that name: rename it."
        )
    if groupby == "expression":
        gain, _, molecules = gains_of_genes(adata, key)
        known = np.flatnonzero(molecules > 0)
        table = _by_group(strata_of(molecules[known]) + 1, gain[known], molecules[known])
        whole = has_all_genes(adata, key)
        return table.assign(coverage=_coverage(written, groupby).reindex(table.index) if whole else np.nan)
    if groupby == "depth":
        return _of_cells(adata, key, strata_of(sizes(adata, key)) + 1)
    if groupby not in adata.obs:
        raise NotThere(f"there is no column {groupby!r} in adata.obs: it has {list(adata.obs.columns)}.")
    groups = in_memory(adata.obs[[groupby]])[groupby]
    if pd.api.types.is_float_dtype(groups) and (groups.dropna() % 1).any():
        raise ValueError(f"adata.obs[{groupby!r}] holds numbers, not groups: cut them into some, as with pandas.cut.")
    return _of_cells(adata, key, pd.Categorical(groups))


def _coverage(written: Mapping[str, Any], by: str) -> pd.Series:
    """Return the coverage of 90 % intervals by tenths, which are numbered from 1, or of all, which is 0."""
    table = pd.DataFrame(written.get("coverage", {"level": [], "by": [], "decile": [], "covered": []}))
    return table.query("level == 0.9 and by == @by").set_index("decile")["covered"]


def _of_cells(adata: AnnData, key: str, groups: np.ndarray | pd.Categorical) -> pd.DataFrame:
    """Return gain and coverage of each group of cells; `groups` names that of each cell, none where it is missing."""
    size = sizes(adata, key)
    if f"{key}_gain" not in adata.obs:
        raise NotThere(f"adata.obs[{f'{key}_gain'!r}], the gain of each cell, is gone: run denoise again.")
    gain, covered = (in_memory(adata.obs[[f"{key}_{name}"]]).to_numpy()[:, 0] for name in ("gain", "coverage"))
    table = _by_group(groups, gain, size)
    inside = pd.Series(covered).groupby(np.asarray(groups)).mean()
    table["coverage"] = inside.reindex(table.index).to_numpy()
    return table.rename(index=str) if isinstance(groups, pd.Categorical) else table


def _by_group(groups: np.ndarray | pd.Categorical, gain: np.ndarray, molecules: np.ndarray) -> pd.DataFrame:
    """Return the gain of each group that is there, its members weighted by their molecules, in order."""
    known = ~np.isnan(gain) & (molecules > 0)
    rows, columns = {}, ["n", "gain", "gain_error"]
    for group in pd.Categorical(groups).remove_unused_categories().categories:
        own = known & (groups == group)
        score = Score(gain[own] * molecules[own], molecules[own].astype(np.float64))
        rows[group] = [int(own.sum()), score.mean if own.any() else np.nan, score.error]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)
