"""Which genes differ between clusters, tested on molecules that the clusters have not seen: `rank_genes_groups`.

Clusters of all molecules are found where the molecules happen to lie, so a test between them on the same molecules
finds differences in pure noise. Here cells are clustered by one part of the molecules, and tested on the other.

That is not enough for a test of log-normalised counts: their mean depends on a cell's depth, the depth of both parts
is that of the cell, and clusters of noise differ in depth. So the test is one of counts with the depth of each cell in
it: the score test of a negative binomial rate. With x the counts of a gene in the second part, s their sums in each
cell, q the rate of the gene in all cells, phi its overdispersion in the part, and f the share of all molecules that
lie in a cluster, the cluster's count has, given the rate q everywhere,

    mean     q S,                       S the sum of s over the cluster,
    variance q S (1 - f) + phi q^2 ((1 - 2 f) S2 + f^2 S2_all),    S2 the sum of s^2,

and the score is the difference of the count and its mean in standard deviations. Its p-value is two-sided, by the
distribution of this mean and variance among the binomial, Poisson and negative binomial ones (Panjer 1981): without
overdispersion that is exact, the binomial distribution of the gene's molecules over the cluster and the other cells.
Half of the probability of the count itself is taken (the mid-p-value, Lancaster 1961), since counts are discrete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import scipy.stats
from anndata import AnnData
from scanpy import logging as logg
from scipy import special

from ._blocks import Counts
from ._checks import by_gene, check_number, describe_counts
from ._counts import row_sums
from ._overdispersion import overdispersion_within
from ._random import RandomState, as_generator
from ._recipe import as_recipe, described_recipe
from ._slots import check_ranking, committed, marked
from ._split import checked_phi
from ._threads import one_blas_thread
from .methods._clusters import as_groups, clustered_by_half, molecules_of

_METHOD = "sc_noise2self score test"
_LEAST = 1e-9  # added to rates before their ratio is taken, as scanpy does
_POISSON = 1e-6  # of the variance over the mean less 1, that makes no difference


def rank_genes_groups(
    adata: AnnData,
    resolution: float = 1.0,
    *,
    n_pcs: int | None = None,
    n_neighbors: int = 15,
    overdispersion: float | np.ndarray | None = None,
    layer: str | None = None,
    key_added: str = "rank_genes_groups",
    groups_added: str = "n2s_groups",
    mask_var: str | np.ndarray | Sequence[bool] | None = None,
    random_state: RandomState = 0,
) -> None:
    """Cluster cells by one half of their molecules, and rank the genes of each cluster by a test on the other half.

    `sc.tl.rank_genes_groups` on clusters of the same counts tests what the clusters were chosen by: its p-values are
    too small. Here the halves are independent where a gene varies within clusters as a negative binomial does.

    Parameters
    ----------
    adata, layer, random_state
        As in `denoise`; counts that are not in memory are read into it.
    resolution
        Of Leiden clustering, e.g. from `select_resolution`.
    n_pcs, n_neighbors, mask_var
        As in `select_resolution`.
    overdispersion
        phi of each gene, or one for all, in variance = mean + phi mean^2 within clusters. None takes
        `sc_noise2self.overdispersion` within clusters of all molecules at the same resolution.
    key_added
        Name in `uns`, of scanpy's form; as in scanpy, an earlier ranking under it is replaced.
    groups_added
        Name in `obs` of the clusters that are tested; those of an earlier ranking are replaced with it.

    Returns
    -------
    None. `.obs[groups_added]` has the cluster of each cell by the first half, categorical; `.uns[groups_added]` says
    how they were found. `.uns[key_added]` has for each cluster against all other cells `names`, `scores` (standard
    deviations), `pvals` (two-sided), `pvals_adj` (Benjamini & Hochberg) and `logfoldchanges` (of rates, base 2), from
    the highest score, as `sc.pl.rank_genes_groups` and `sc.get.rank_genes_groups_df` read them. `X` and the input
    layer are not modified.

    Raises
    ------
    ValueError, TypeError
        As `denoise`, and if there is only one cluster.

    Warns
    -----
    UserWarning
        If `var["highly_variable"]` is there, which `sc.pp.pca` would use, and no `mask_var` is given.

    Notes
    -----
    See `sc_noise2self._groups` for the formulas. A count with overdispersion phi has halves with 2 phi. Splitting:
    Neufeld et al. 2023. Where few cells hold most of the molecules, and phi is large, the rate of a gene is known from
    them alone, and p-values are too small.

    Examples
    --------
    >>> import scanpy as sc, sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.rank_genes_groups(adata, resolution=0.5)
    >>> markers = sc.get.rank_genes_groups_df(adata, group="0", pval_cutoff=0.05)
    """
    rng = as_generator(random_state)
    check_number("resolution", resolution, 0, np.inf)
    asked: dict[str, Any] = {"n_pcs": n_pcs, "n_neighbors": n_neighbors, "layer": layer, "mask_var": mask_var}
    counts, method = as_recipe(adata, resolution, **asked)
    overdispersion = by_gene("overdispersion", overdispersion, adata.var_names)
    check_ranking(adata, key_added, groups_added, _METHOD)
    start = logg.info(f"ranking genes of {describe_counts(adata, layer)}")
    given = overdispersion
    with one_blas_thread():
        method = method.with_rank(counts, rng, overdispersion)
        if overdispersion is None:
            overdispersion = overdispersion_within(method.graph(counts, rng).labels(resolution), counts)
        labels, _, held_out = clustered_by_half(method, counts, overdispersion, rng)
    phi_of_half = 2 * checked_phi(overdispersion, held_out.shape[1])
    tested = scored_clusters(labels, held_out, phi_of_half)
    groups = as_groups(labels)
    record = {
        "params": {
            "groupby": groups_added,
            "reference": "rest",
            "method": _METHOD,
            "use_raw": False,
            "layer": layer,
            "corr_method": "benjamini-hochberg",
        },
        **_ranked(tested, counts, list(groups.categories)),
    }
    of_groups = {
        "params": {
            "key_added": key_added,
            "resolution": float(resolution),
            **described_recipe(method, layer, mask_var, given, random_state),
        },
    }
    written = {key_added: record, groups_added: marked("rank_genes_groups", of_groups)}
    with committed(adata, {"obs": {groups_added: groups}, "uns": written}):
        pass
    logg.info(
        f"    {labels.max() + 1} clusters by half of the molecules",
        time=start,
        deep=f"added\n    {groups_added!r}, the clusters (adata.obs)\n    {key_added!r}, the ranking (adata.uns)",
    )


class Tested(NamedTuple):
    """What is known of each gene in each cluster against all other cells; all of shape (clusters, genes)."""

    scores: np.ndarray
    pvals: np.ndarray
    logfoldchanges: np.ndarray


def scored_clusters(labels: np.ndarray, counts: sp.csr_matrix, phi: np.ndarray) -> Tested:
    """Return the test of every gene in every cluster; `phi` has shape (genes,). A gene without a molecule scores 0."""
    size = row_sums(counts)
    found = molecules_of(labels, counts)
    molecules, squares = (np.bincount(labels, weights=size**power) for power in (1, 2))
    total, rate = size.sum(), found.sum(axis=0) / size.sum()
    share = molecules / total
    of_cells = (1 - 2 * share) * squares + share**2 * squares.sum()
    mean = np.outer(molecules, rate)
    variance = mean * (1 - share)[:, None] + np.outer(of_cells, phi * rate**2)
    known = variance > 0
    scores = np.where(known, (found - mean) / np.sqrt(np.where(known, variance, 1)), 0)
    above, below = tails(found, np.where(known, mean, 1), np.where(known, variance, 1))
    pvals = np.where(known, np.minimum(1, 2 * np.minimum(above, below)), 1)
    inside = found / np.maximum(molecules, 1)[:, None] + _LEAST
    outside = (found.sum(axis=0) - found) / np.maximum(total - molecules, 1)[:, None] + _LEAST
    return Tested(scores, pvals, np.log2(inside / outside))


def tails(counts: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities of more and of less than these counts, each with half of that of as many, elementwise.

    The distribution is binomial where the variance is below the mean, negative binomial where it is above, else that of
    Poisson. Each tail is computed as it is, since what is left of 1 has no digits where it is small.
    """
    excess = variance / mean - 1
    is_poisson = np.abs(excess) < _POISSON
    safe = np.where(is_poisson, 1, excess)
    size = np.where(is_poisson, 1, mean / np.abs(safe))  # of successes, or of trials
    share = np.clip(np.where(safe > 0, safe / (1 + safe), -safe), 0, 1)

    def beyond(k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return P(X > k) and P(X <= k); k from -1."""
        k1 = np.maximum(k + 1, _LEAST)
        other = np.where(safe > 0, size, np.maximum(size - k, _LEAST))
        above = np.where(is_poisson, special.gammainc(k1, mean), special.betainc(k1, other, share))
        below = np.where(is_poisson, special.gammaincc(k1, mean), special.betaincc(k1, other, share))
        return np.where(k < 0, 1.0, above), np.where(k < 0, 0.0, below)

    (more, fewer), (above, below) = beyond(counts - 1), beyond(counts)
    return (more + above) / 2, (fewer + below) / 2


def _ranked(tested: Tested, counts: Counts, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Return what scanpy keeps of a ranking: records with a field for each group, from the highest score."""
    kinds = {"names": "O", "scores": "f4", "logfoldchanges": "f4", "pvals": "f8", "pvals_adj": "f8"}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in kinds}
    for score, p, change in zip(*tested, strict=True):
        order = np.argsort(-score, kind="stable")
        adjusted = scipy.stats.false_discovery_control(p)
        values = (counts.gene_names.to_numpy(), score, change, p, adjusted)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value[order])
    return {
        name: np.rec.fromarrays(column, dtype=[(group, kinds[name]) for group in groups])
        for name, column in columns.items()
    }
