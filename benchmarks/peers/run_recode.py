"""RECODE (Imoto et al. 2022, Life Science Alliance 5:e202201591), default settings (version 2 of the method).

    python run_recode.py IN.h5ad OUT.npy

Tested with screcode 2.2.0. Requires: screcode==2.2.0 anndata.
"""

import sys

import anndata as ad
import numpy as np
import screcode


def main() -> None:
    """Denoise one file."""
    counts = ad.read_h5ad(sys.argv[1]).X.toarray()
    recode = screcode.RECODE(verbose=False)
    denoised = recode.fit_transform(counts)
    print(f"note: rank {recode.log_['ell']}")
    np.save(sys.argv[2], np.maximum(denoised, 0).astype(np.float32))


if __name__ == "__main__":
    main()
