"""`sc_noise2self.denoise`, through the interface of the other scripts.

python run_ours.py IN.h5ad OUT.npy ['{"method": "pca"}']
"""

import json
import sys

import anndata as ad
import numpy as np
import scipy.sparse as sp

import sc_noise2self as n2s


def main() -> None:
    """Denoise one file."""
    adata = ad.read_h5ad(sys.argv[1])
    kwargs = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    n2s.denoise(adata, **kwargs)
    layer = adata.layers[kwargs.get("key_added", "denoised")]
    np.save(sys.argv[2], np.asarray(layer.toarray() if sp.issparse(layer) else layer, dtype=np.float32))


if __name__ == "__main__":
    main()
