"""scVI (Lopez et al. 2018, Nature Methods 15:1053), negative binomial likelihood, other settings at their defaults.

    python run_scvi.py IN.h5ad OUT.npy

Tested with scvi-tools 1.4.2 and torch 2.13.0. Requires: torch scvi-tools anndata.

The number of epochs is scvi-tools' own heuristic (400 up to 20 000 cells), cut off after N2S_SCVI_MINUTES (default 8)
minutes of training; the epochs that were reached are printed.
"""

import os
import sys

import anndata as ad
import numpy as np
import scvi


def main() -> None:
    """Denoise one file."""
    minutes = float(os.environ.get("N2S_SCVI_MINUTES", "8"))
    scvi.settings.seed = 0
    adata = ad.read_h5ad(sys.argv[1])
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, n_layers=1, n_latent=10, gene_likelihood="nb")
    model.train(
        accelerator="cpu",
        max_time={"seconds": round(60 * minutes)},
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )
    print(f"note: {model.trainer.current_epoch} epochs of {model.trainer.max_epochs}")
    np.save(sys.argv[2], model.get_normalized_expression(return_numpy=True).astype(np.float32))


if __name__ == "__main__":
    main()
