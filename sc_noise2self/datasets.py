"""Counts to try things on: one set that needs no download, and the myeloid progenitors of the Noise2Self paper."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData, read_h5ad


def pbmc68k_reduced() -> AnnData:
    """Return 700 blood cells x 765 genes with raw counts, from the file that scanpy's wheel carries.

    They are the layer `"counts"` of `sc.datasets.pbmc68k_reduced()` where it has one, from scanpy 1.13 on. Before, it
    keeps log1p of counts scaled by one factor per cell, to three decimals. A cell's smallest value stands for a small
    whole number of molecules (one, nearly always); the number that makes all its values whole gives its counts back
    exactly.

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
    counts = source.layers["counts"] if "counts" in source.layers else _counts_behind(sp.csr_matrix(source.raw.X))
    return AnnData(
        sp.csr_matrix(counts, dtype=np.float32),
        obs=source.obs[["bulk_labels", "louvain"]].copy(),
        var=source.var[[]].copy(),
        obsm={"X_umap": source.obsm["X_umap"]},
        uns={key: source.uns[key] for key in ("bulk_labels_colors", "louvain_colors")},
    )


_PAUL15 = "https://exampledata.scverse.org/scanpy/paul15.h5"  # the file of scanpy.datasets.paul15, 10 MB
_PAUL15_SHA256 = "6161984f758dd464992edc23f1a8ab89b2081600130c6aa93a1ab12b3ada5bfb"
_PAUL15_TYPES = (
    ["Ery"] * 6 + ["MEP", "Mk"] + ["GMP"] * 2 + ["DC"] + ["Baso"] * 2 + ["Mo"] * 2 + ["Neu"] * 2 + ["Eos", "Lymph"]
)


def paul15() -> AnnData:
    """Return 2730 mouse myeloid progenitors x 8716 genes with raw counts (Paul et al. 2015, Cell 163:1663; GSE72857).

    `sc.datasets.paul15` gives the debatched values of the same file, which are not counts, for a part of the genes.

    Returns
    -------
    CSR float32 counts in `X`; `paul15_clusters` in `obs`, as scanpy names them. Read from `paul15_myeloid.h5ad` in the
    folder that the environment variable `SC_NOISE2SELF_DATA` names, if it is set; else downloaded once to
    `sc.settings.datasetdir`, and its SHA-256 checked.

    Raises
    ------
    ImportError
        Without pooch, if it has to be downloaded: `pip install pooch`.
    ValueError, OSError
        If the file downloaded is another one, or there is no connection.
    """
    if folder := os.environ.get("SC_NOISE2SELF_DATA"):
        found = read_h5ad(Path(folder) / "paul15_myeloid.h5ad")
        x, cells, genes, clusters = found.X, found.obs_names, found.var_names, found.obs["cluster_id"].to_numpy()
    else:
        x, cells, genes, clusters = _read_paul15(_fetch(_PAUL15, _PAUL15_SHA256, "paul15/paul15.h5"))
    names = [f"{i}{name}" for i, name in enumerate(_PAUL15_TYPES, 1)]
    labels = pd.Categorical.from_codes(clusters - 1, names)
    obs = pd.DataFrame({"paul15_clusters": labels}, index=pd.Index(list(cells)))
    return AnnData(sp.csr_matrix(x, dtype=np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(list(genes))))


def _read_paul15(path: Path) -> tuple[np.ndarray, list[str], list[str], np.ndarray]:
    """Return counts (cells, genes), names of cells and genes (the first where a gene has several), and clusters."""
    import h5py

    with h5py.File(path) as file:
        genes = [name.decode().split(";")[0] for name in file["data_rownames"]]
        cells = [name.decode() for name in file["data_colnames"]]
        return file["data"][()].T, cells, genes, file["cluster.id"][()].ravel().astype(int)


def _fetch(url: str, sha256: str, name: str) -> Path:
    """Return the path of a file in scanpy's folder of data sets, downloaded if it is not there yet."""
    try:
        import pooch
    except ImportError as error:
        raise ImportError("a download needs pooch: pip install pooch.") from error
    path = Path(sc.settings.datasetdir) / name
    return Path(pooch.retrieve(url, f"sha256:{sha256}", fname=path.name, path=path.parent))


def _counts_behind(logged: sp.csr_matrix) -> sp.csr_matrix:
    """Return the counts of which log1p, scaled by one factor per cell, is kept to three decimals."""
    counts = np.empty(logged.nnz, np.float32)
    for start, stop in zip(logged.indptr[:-1], logged.indptr[1:], strict=True):
        counts[start:stop] = _whole_numbers(logged.data[start:stop].astype(np.float64))
    return sp.csr_matrix((counts, logged.indices, logged.indptr), shape=logged.shape)


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
