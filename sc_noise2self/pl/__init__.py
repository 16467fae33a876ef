"""Plots of what this package wrote, from factors: no dense layer is needed or made.

They take `ax` and `show` as scanpy's do and return Axes. What scanpy plots already it plots from the layer, e.g.
`sc.pl.dotplot(adata, genes, groupby, layer="denoised")`.
"""

from ._calibration import calibration
from ._caption import caption
from ._gain import gain_per_gene
from ._loss import loss
from ._markers import embedding, markers
from ._spectrum import spectrum
from ._support import cluster_support

__all__ = ["calibration", "caption", "cluster_support", "embedding", "gain_per_gene", "loss", "markers", "spectrum"]
