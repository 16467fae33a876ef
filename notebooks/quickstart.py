"""Denoise 700 blood cells, plot two marker genes before and after, and save everything.

    python notebooks/quickstart.py results

The counts come with scanpy; nothing is downloaded.
"""

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import scanpy as sc

import sc_noise2self as n2s

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results")
folder.mkdir(exist_ok=True)
sc.settings.verbosity = "info"

adata = n2s.datasets.pbmc68k_reduced()

n2s.select_rank(adata)
n2s.pl.loss(adata).figure.savefig(folder / "loss.png", dpi=150)

n2s.denoise(adata)
axes = n2s.pl.markers(adata, ["CD79A", "NKG7"], color="bulk_labels")
axes[0].figure.savefig(folder / "markers.png", dpi=150)
plt.close("all")

adata.write_h5ad(folder / "denoised.h5ad", compression="gzip")
record = adata.uns["denoised"]
members = record["members"]
print(
    f"gain {record['gain']:.3f} +- {record['gain_error']:.3f} nats per held-out molecule "
    f"({members['name'][0]}, rank {members['rank'][0]}); pictures and denoised.h5ad are in {folder}/"
)
