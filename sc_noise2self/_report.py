"""One paragraph that says what a denoised layer is worth: `report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import numpy as np
import pandas as pd
from anndata import AnnData

from ._intervals import strata_of
from ._loss import Score
from ._read import clear_gains, gains_of_genes, record, sizes
from ._slots import in_memory


@overload
def report(adata: AnnData, *, key: str = "denoised", groupby: None = None) -> str: ...


@overload
def report(adata: AnnData, *, key: str = "denoised", groupby: str) -> pd.DataFrame: ...


def report(adata: AnnData, *, key: str = "denoised", groupby: str | None = None) -> str | pd.DataFrame:
    """Return a paragraph on a result: what was done, what it gained, on how much, the warnings, what not to do with it.

    Parameters
    ----------
    adata
        Object that `sc_noise2self.denoise` or `denoise_with` wrote to.
    key
        Its `key_added`.
    groupby
        Instead of the paragraph, a table of where denoising helps and for whom not: a categorical column of `obs`;
        `"depth"`, tenths of the cells by their molecules; or `"expression"`, tenths of the genes by theirs.

    Returns
    -------
    Plain text without line breaks; `sc_noise2self.pl.caption` puts it under a figure. With `groupby` a DataFrame with a
    row for each group: `n`, its cells or genes that were measured; `gain` in nats per held-out molecule above the mean
    profile, and `gain_error`, its standard error over cells or genes; `coverage`, the share of sampled held-out counts
    inside their 90 % interval.

    Raises
    ------
    KeyError
        If there is no such result, or no such column.

    Notes
    -----
    A gene gained, or lost, if its held-out gain is more than two standard errors from 0 (`.var["denoised_gain"]`).

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata)
    >>> print(n2s.report(adata))  # doctest: +ELLIPSIS
    PCA of log1p (18 components worth more than noise...
    """
    if groupby is not None:
        return _table(adata, key, groupby)
    written = record(adata, key)
    sentences = [_what_was_done(written), _what_it_gained(written, adata.n_obs), _in_which_genes(adata, key)]
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


def _what_was_done(written: Mapping[str, Any]) -> str:
    params, members = written["params"], written["members"]
    parts = [str(described) for described in members["described"]]
    if len(parts) > 1:
        parts = [f"{weight:.0%} {part}" for weight, part in zip(members["weight"], parts, strict=True)]
    source = f"the counts in layer {params['layer']!r}" if "layer" in params else "the counts in X"
    how = f"{', '.join(parts[:-1])} and {parts[-1]} of" if len(parts) > 1 else f"{parts[0]} of"
    if "model" in params:
        how = f"A model fitted to other cells, {parts[0]}, applied to"
    mixed = ", with each cell's own count of a gene mixed back in" if params["mix"] else ""
    tried = len(written["candidates"]) if "candidates" in written else 0
    chosen = f", the best of {tried} candidates by molecules held out" if tried > 1 and len(parts) == 1 else ""
    if tried and not written["beats_mean"]:
        beats = f"none of {tried} candidates beats" if tried > 1 else "the one candidate does not beat"
        chosen = f", which {beats} by molecules held out"
    version = f"sc_noise2self {written['version']}, seed {params['random_state']}"
    return f"{how[0].upper()}{how[1:]} {source}{mixed}{chosen} ({version}). Values are {written['scale_meaning']}."


def _what_it_gained(written: Mapping[str, Any], n_here: int) -> str:
    gain, error, n_measured = written["gain"], written["gain_error"], written["gain_cells"]
    cells = _cells(n_measured, written["n_cells"], n_here)
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


def _cells(n_measured: int, n_denoised: int, n_here: int) -> str:
    """Return the cells that a gain was measured on, of those denoised, of which others may be here now."""
    if n_here == n_denoised:
        return f"{n_measured:,} cells" if n_measured == n_denoised else f"{n_measured:,} of {n_denoised:,} cells"
    of = "" if n_measured == n_denoised else f"{n_measured:,} of "
    here = f"of which {n_here:,} are here" if n_here < n_denoised else f"while {n_here:,} are here"
    return f"{of}the {n_denoised:,} cells that were denoised, {here}"


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
    tenths = pd.DataFrame(written["coverage"]).query("level == 0.9 and by == @groupby").set_index("decile")["covered"]
    if groupby == "expression":
        gain, _, molecules = gains_of_genes(adata, key)
        known = np.flatnonzero(molecules > 0)
        table = _by_group(strata_of(molecules[known]) + 1, gain[known], molecules[known])
        return table.assign(coverage=tenths.reindex(table.index).to_numpy())
    size = sizes(adata, key)
    if f"{key}_gain" not in adata.obs:
        raise KeyError(f"adata.obs[{f'{key}_gain'!r}], the gain of each cell, is gone: run denoise again.")
    gain, covered = (in_memory(adata.obs[[f"{key}_{name}"]]).to_numpy()[:, 0] for name in ("gain", "coverage"))
    if groupby == "depth":
        table = _by_group(strata_of(size) + 1, gain, size)
        return table.assign(coverage=tenths.reindex(table.index).to_numpy())
    if groupby not in adata.obs:
        raise KeyError(f"there is no column {groupby!r} in adata.obs: it has {list(adata.obs.columns)}.")
    groups = in_memory(adata.obs[[groupby]])[groupby].astype(str).to_numpy()
    table = _by_group(groups, gain, size)
    inside = pd.Series(covered).groupby(groups).mean()
    return table.assign(coverage=inside.reindex(table.index).to_numpy())


def _by_group(groups: np.ndarray, gain: np.ndarray, molecules: np.ndarray) -> pd.DataFrame:
    """Return the gain of each group, its members weighted by their molecules."""
    known = ~np.isnan(gain) & (molecules > 0)
    rows = {}
    for group in sorted(set(groups)):
        own = known & (groups == group)
        score = Score(gain[own] * molecules[own], molecules[own].astype(np.float64))
        rows[group] = {"n": int(own.sum()), "gain": score.mean if own.any() else np.nan, "gain_error": score.error}
    return pd.DataFrame.from_dict(rows, orient="index")
