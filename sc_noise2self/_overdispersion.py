"""How much does each gene vary within groups of cells, beyond sampling: `overdispersion`."""

from __future__ import annotations

import numpy as np
from anndata import AnnData

from ._anndata import as_counts
from ._blocks import Counts
from ._threads import one_blas_thread
from .methods._clusters import profiles_of_clusters
from .methods._dispersion import HeldOut, posterior_means

_GRID = np.concatenate([[0], np.geomspace(0.003, 300, 81)])  # steps of 15 %: parts that are split with it are that near


def overdispersion(adata: AnnData, groupby: str | None = None, *, layer: str | None = None) -> np.ndarray:
    """Return the overdispersion of each gene within groups of cells: phi in variance = mean + phi mean^2.

    Of molecules split with it, `split_molecules(adata, overdispersion=phi)`, the parts of a count that is negative
    binomial around its group's mean are independent: what one part is used for, such as clustering, can be tested on
    the other.

    Parameters
    ----------
    adata
        Object with raw counts, cells x genes; counts that are not in memory are read into it.
    groupby
        Column of `obs` with the groups, such as clusters at the resolution that `select_resolution` finds; finer ones
        than there are do little harm. None takes all cells for one group, which is right where there is nothing to be
        found: otherwise the differences between groups are taken for noise, and phi is too large.
    layer
        The layer with raw counts; None takes `X`.

    Returns
    -------
    phi of each gene, shape (genes,), 0 or more; nothing is written.

    Raises
    ------
    ValueError, TypeError
        As `denoise`, and if there is no such column or it has missing values.

    Notes
    -----
    The likelihood of each gene's counts, negative binomial around the profile of their group at each cell's depth, is
    taken on a grid of phi, and a prior over the grid is learned from all genes (nonparametric empirical Bayes, Kiefer &
    Wolfowitz 1956), so that genes with few molecules lean on the rest. The result is the posterior mean. Groups fit
    some of the noise: within groups of n cells phi is by 1/n to 2/n of itself too small, and by more within groups that
    were found in the same counts. Cells' totals are taken as given, so it is too small by 1/m more where cells hold m
    molecules.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> phi = n2s.overdispersion(adata, "bulk_labels")
    >>> part1, part2 = n2s.split_molecules(adata, overdispersion=phi)
    """
    counts = as_counts(adata, layer, columns=() if groupby is None else (groupby,), argument="groupby")
    labels = np.zeros(len(counts.size), np.intp)
    if groupby is not None:
        labels = counts.columns[groupby].cat.codes.to_numpy().astype(np.intp)
    return overdispersion_within(labels, counts)


def overdispersion_within(labels: np.ndarray, counts: Counts) -> np.ndarray:
    """Return phi of each gene within groups, whole numbers from 0, shape (genes,)."""
    with one_blas_thread():
        profiles = profiles_of_clusters(labels, counts).scaled(n_rounds=0)
        found = HeldOut.of(profiles, counts.in_memory(), counts.size)
        return posterior_means(found.curves(_GRID), _GRID)[0]
