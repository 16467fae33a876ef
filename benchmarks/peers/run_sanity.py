"""Sanity (Breda, Zavolan & van Nimwegen 2021, Nature Biotechnology 39:1008), default settings.

    python run_sanity.py IN.h5ad OUT.npy

The share of a gene in a cell is exp of its log transcription quotient, as the authors define it. Slow on one
thread: 2730 cells x 8716 genes were not done after 12 minutes. Tried with sanity-py 0.1.4. Requires: sanity-py==0.1.4
anndata.
"""

import sys

import anndata as ad
import numpy as np
import pysanity


def main() -> None:
    """Denoise one file."""
    counts = ad.read_h5ad(sys.argv[1]).X.toarray()
    seen = counts.sum(axis=0) > 0
    denoised = np.zeros(counts.shape, dtype=np.float32)
    denoised[:, seen] = np.exp(pysanity.fit(counts[:, seen].T).ltq.T)
    np.save(sys.argv[2], denoised)


if __name__ == "__main__":
    main()
