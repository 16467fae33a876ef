"""DCA (Eraslan et al. 2019, Nature Communications 10:390), default settings (zinb-conddisp, 300 epochs, early stop).

    python run_dca.py IN.h5ad OUT.npy

Tested with DCA 0.3.4, TensorFlow 2.4.4 and anndata 0.7.8 on Python 3.8. Requires Python 3.8 and:
dca==0.3.4 "tensorflow>=2.4,<2.5" keras==2.4.3 "protobuf<3.21" "pyyaml<6".

The file is read with h5py: an anndata of that age does not read those of today.
"""

import sys

import anndata as ad
import h5py
import numpy as np
import scipy.sparse as sp
from dca.api import dca


def main() -> None:
    """Denoise one file."""
    with h5py.File(sys.argv[1], "r") as file:
        x = file["X"]
        counts = sp.csr_matrix((x["data"][:], x["indices"][:], x["indptr"][:]), shape=tuple(x.attrs["shape"]))
    adata = ad.AnnData(counts.toarray().astype(np.float32))
    dca(adata, random_state=0, threads=2)
    np.save(sys.argv[2], np.asarray(adata.X, dtype=np.float32))


if __name__ == "__main__":
    main()
