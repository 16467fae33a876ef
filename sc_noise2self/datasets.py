"""Counts that need no download."""

from __future__ import annotations

import numpy as np
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData


def pbmc68k_reduced() -> AnnData:
    """Return 700 blood cells x 765 genes with raw counts, from the file that scanpy's wheel carries.

    `sc.datasets.pbmc68k_reduced()` keeps log1p of counts scaled by one factor per cell, to three decimals. A cell's
    smallest value stands for a small whole number of molecules (one, nearly always); the number that makes all its
    values whole gives its counts back exactly.

    Returns
    -------
    CSR float32 counts in `X`; the labels of `sc.datasets.pbmc68k_reduced` in `obs` with their colours in
    `uns`, its UMAP in `obsm`.

    Raises
    ------
    RuntimeError
        If a cell's values are not whole numbers of molecules at any scale (another version of the file).
    """
    source = sc.datasets.pbmc68k_reduced()
    logged = sp.csr_matrix(source.raw.X)
    counts = np.empty(logged.nnz, np.float32)
    for start, stop in zip(logged.indptr[:-1], logged.indptr[1:], strict=True):
        counts[start:stop] = _whole_numbers(logged.data[start:stop].astype(np.float64))
    x = sp.csr_matrix((counts, logged.indices, logged.indptr), shape=logged.shape)
    obs = source.obs[["bulk_labels", "louvain"]].copy()
    return AnnData(
        x,
        obs=obs,
        var=source.raw.var[[]].copy(),
        obsm={"X_umap": source.obsm["X_umap"]},
        uns={key: source.uns[key] for key in ("bulk_labels_colors", "louvain_colors")},
    )


def _whole_numbers(logged: np.ndarray) -> np.ndarray:
    """Return the counts behind log1p(counts * scale) rounded to three decimals, the scale unknown."""
    scaled = np.expm1(logged)
    rounding = 0.0006 * (1 + scaled)  # how far half a unit of the third decimal moves expm1
    for smallest in range(1, 5):
        unit = scaled.min() / smallest
        # Refine the unit on the values, the large ones last: they fix it best.
        for value in np.sort(scaled):
            unit = value / max(1, np.rint(value / unit))
        counts = np.rint(scaled / unit)
        if (np.abs(scaled - counts * unit) <= 2 * rounding).all():
            return counts
    raise RuntimeError("scanpy's pbmc68k_reduced has changed: its raw values do not turn back into whole counts.")
