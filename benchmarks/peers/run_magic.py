"""MAGIC (van Dijk et al. 2018, Cell 174:716) with its defaults, on log1p of counts at the median depth.

    python run_magic.py IN.h5ad OUT.npy

Tested with magic-impute 3.0.0. Requires: magic-impute anndata.
"""

import sys

import anndata as ad
import magic
import numpy as np


def main() -> None:
    """Denoise one file."""
    counts = ad.read_h5ad(sys.argv[1]).X.toarray()
    depth = counts.sum(axis=1, keepdims=True)
    logs = np.log1p(counts * (np.median(depth) / np.maximum(depth, 1)))
    denoised = magic.MAGIC(random_state=0, verbose=0).fit_transform(logs, genes="all_genes")
    np.save(sys.argv[2], np.maximum(np.expm1(np.asarray(denoised)), 0).astype(np.float32))


if __name__ == "__main__":
    main()
