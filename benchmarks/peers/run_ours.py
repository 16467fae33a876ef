"""`sc_noise2self.denoise`, through the interface of the other scripts.

    python run_ours.py IN.h5ad OUT.npy ['{"method": ["pca", {"Diffusion": {"t": 3}}], "mix": true}']

The JSON holds arguments of `denoise`; `{"Diffusion": {"t": 3}}` stands for `n2s.Diffusion(t=3)`.
"""

import json
import sys

import anndata as ad
import numpy as np
import scipy.sparse as sp

import sc_noise2self as n2s


def method(given):
    """Return a name as it is, a list with each of its methods, and of `{"Diffusion": {"t": 3}}` the object."""
    if isinstance(given, list):
        return [method(each) for each in given]
    if isinstance(given, dict):
        ((name, options),) = given.items()
        return getattr(n2s, name)(**options)
    return given


def main() -> None:
    """Denoise one file."""
    adata = ad.read_h5ad(sys.argv[1])
    kwargs = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    n2s.denoise(adata, method(kwargs.pop("method", "pca")), **kwargs)
    layer = adata.layers[kwargs.get("key_added", "denoised")]
    np.save(sys.argv[2], np.asarray(layer.toarray() if sp.issparse(layer) else layer, dtype=np.float32))


if __name__ == "__main__":
    main()
