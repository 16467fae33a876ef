"""A denoised layer of 100 000 cells x 20 000 genes, 8 GB if it were dense: two genes read, and plotted by scanpy.

    python benchmarks/lazy_layer.py

Factors are random: neither time nor memory depends on their values. Memory is the peak of the process over what it
held with the factors loaded.
"""

from __future__ import annotations

import resource
import time

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
import scipy.sparse as sp

mpl.use("agg")
N_CELLS, N_GENES, RANK = 100_000, 20_000, 100


def peak() -> float:
    """Return the most memory that the process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def denoised() -> ad.AnnData:
    """Return an object as `denoise(adata, write_layer=False)` leaves it, the counts empty."""
    import sc_noise2self as n2s

    rng = np.random.default_rng(0)
    small = n2s.datasets.pbmc68k_reduced()
    n2s.denoise(small, n2s.PCA(transform="log1p"), write_layer=False)  # for its record alone
    out = ad.AnnData(sp.csr_matrix((N_CELLS, N_GENES), dtype=np.float32))
    out.obs["group"] = pd.Categorical.from_codes(rng.integers(0, 10, N_CELLS), [f"group {i}" for i in range(10)])
    out.uns["denoised"] = small.uns["denoised"]
    out.uns["denoised"]["members"] |= {"link": np.array(["log1p"]), "n_factors": np.array([RANK + 1])}
    for slot, n, scale in ((out.obsm, N_CELLS, 1.0), (out.varm, N_GENES, 1 / N_GENES)):
        slot["denoised"] = rng.standard_normal((n, RANK + 1), dtype=np.float32) / RANK
        slot["denoised_scale"] = np.full((n, 3), scale, np.float32)
        slot["denoised_scale"][:, -1] = out.uns["denoised"]["fingerprint"]
    out.obs["denoised_size"] = np.full(N_CELLS, 5000.0)
    return out


def main() -> None:
    """Measure and print."""
    import scanpy as sc

    import sc_noise2self as n2s

    adata = denoised()
    genes = list(adata.var_names[[17, 12_345]])
    factors = sum(a.nbytes for a in (*adata.obsm.values(), *adata.varm.values())) / 1e9
    before = peak()
    print(f"{N_CELLS} cells x {N_GENES} genes, {RANK} components: factors {factors:.2f} GB, process {before:.2f} GB")
    for name, work in {
        "get.denoised of two genes": lambda: n2s.get.denoised(adata, genes),
        "get.lazy as a layer": lambda: adata.layers.__setitem__("denoised", n2s.get.lazy(adata)),
        "sc.get.obs_df of two genes": lambda: sc.get.obs_df(adata, genes, layer="denoised"),
        "sc.pl.dotplot of two genes": lambda: sc.pl.dotplot(adata, genes, "group", layer="denoised", show=False),
    }.items():
        start = time.perf_counter()
        work()
        print(f"{name:28} {time.perf_counter() - start:6.2f} s, peak {peak() - before:5.2f} GB over the factors")


if __name__ == "__main__":
    main()
