"""scself, a noise2self kNN denoiser (as DEWAKSS, Tjarnberg et al. 2021, PLoS Computational Biology 17:e1008569).

    python run_scself.py IN.h5ad OUT.npy

Numbers of components and neighbours are chosen with the defaults of `noise2self`; its graph averages the counts at the
median depth. Tested with scself 0.5.1. Requires: scself==0.5.1 anndata.
"""

import sys

import anndata as ad
import numpy as np
import scself


def main() -> None:
    """Denoise one file."""
    counts = ad.read_h5ad(sys.argv[1]).X.tocsr()
    depth = np.asarray(counts.sum(axis=1)).reshape(-1, 1)
    scaled = counts.multiply(np.median(depth) / np.maximum(depth, 1)).tocsr().astype(np.float32)
    graph, components, neighbours, own = scself.noise2self(counts, random_state=0)
    print(f"note: {components} components, {neighbours} neighbours, {own.mean():.0f} on average per cell")
    np.save(sys.argv[2], scself.denoise_data(scaled, graph, dense=True).astype(np.float32))


if __name__ == "__main__":
    main()
