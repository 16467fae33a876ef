"""CellMapper (Lange 2025, doi 10.5281/zenodo.15683594), mapping the cells onto themselves with its defaults.

    python run_cellmapper.py IN.h5ad OUT.npy

30 neighbours in 50 principal components of log1p of counts at the median depth; one step of its kernel over the
size-normalised counts. Tested with cellmapper 0.2.6, scanpy 1.12.4 and Python 3.12. Requires Python 3.12 or newer and:
cellmapper==0.2.6.
"""

import sys

import numpy as np
import scanpy as sc
from cellmapper import CellMapper


def main() -> None:
    """Denoise one file."""
    adata = sc.read_h5ad(sys.argv[1])
    sc.pp.normalize_total(adata)
    adata.layers["normalised"] = adata.X.copy()
    sc.pp.log1p(adata)
    denoised = CellMapper(adata).map(layer_key="normalised").query_imputed.X
    np.save(sys.argv[2], np.asarray(denoised.todense(), dtype=np.float32))


if __name__ == "__main__":
    main()
