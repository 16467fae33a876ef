"""BiPCA ("Principled PCA separates signal from noise in omics count data", 2025, PMC11838471), default settings.

    python run_bipca.py IN.h5ad OUT.npy

As in its tutorial, genes seen in fewer than 100 cells are left out of the fit (its scaling does not converge with them)
and all singular values are computed; a gene that was left out gets its mean share of every cell. The denoised matrix is
brought back to the domain of the counts (`unscale=True`); values below 0 become 0, as its default has it. Tested with
bipca 1.1.0 and torch 2.13.0. Requires: torch bipca==1.1.0 anndata.
"""

import sys

import anndata as ad
import numpy as np
from bipca import BiPCA


def main() -> None:
    """Denoise one file."""
    counts = ad.read_h5ad(sys.argv[1]).X.toarray().astype(np.float64)
    kept = (counts > 0).sum(axis=0) >= 100
    model = BiPCA(n_components=-1, verbose=0)
    denoised = counts.sum(axis=1, keepdims=True) * (counts.sum(axis=0) / counts.sum())
    denoised[:, kept] = model.fit_transform(counts[:, kept], unscale=True, library_normalize=False)
    print(f"note: rank {model.mp_rank}, {kept.sum()} genes")
    np.save(sys.argv[2], np.maximum(denoised, 0).astype(np.float32))


if __name__ == "__main__":
    main()
