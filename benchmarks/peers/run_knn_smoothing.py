"""Average over nearest neighbours, the simplest smoothing (as in Wagner, Yan & Yanai 2018, bioRxiv 217737, one step).

    python run_knn_smoothing.py IN.h5ad OUT.npy

60 neighbours, the cell itself among them, in 50 principal components of log1p of counts at the median depth; the
average of their size-normalised counts. Tested with scanpy 1.11.5. Requires: scanpy.
"""

import sys

import numpy as np
import scanpy as sc
import scipy.sparse as sp
from sklearn.neighbors import NearestNeighbors


def main() -> None:
    """Denoise one file."""
    adata = sc.read_h5ad(sys.argv[1])
    sc.pp.normalize_total(adata)
    normalised = adata.X.copy()
    sc.pp.log1p(adata)
    sc.pp.pca(adata, n_comps=50, random_state=0)
    pcs = adata.obsm["X_pca"]
    neighbours = NearestNeighbors(n_neighbors=60).fit(pcs).kneighbors(pcs, return_distance=False)
    weights = np.full(neighbours.size, 1 / 60, dtype=np.float32)
    mean = sp.csr_matrix((weights, neighbours.ravel(), np.arange(0, neighbours.size + 1, 60)), (len(pcs), len(pcs)))
    np.save(sys.argv[2], (mean @ normalised).toarray().astype(np.float32))


if __name__ == "__main__":
    main()
