__all__ = [
    "KNN",
    "PCA",
    "Autoencoder",
    "Clusters",
    "Diffusion",
    "Function",
    "__version__",
    "calibrate",
    "cluster_support",
    "datasets",
    "denoise",
    "denoise_file",
    "denoise_with",
    "get",
    "methods",
    "null_counts",
    "overdispersion",
    "partitions",
    "pl",
    "rank_genes_groups",
    "remove",
    "report",
    "scales",
    "select_rank",
    "select_resolution",
    "split_molecules",
]

from . import datasets, get, methods, partitions, pl, scales
from ._anndata import split_molecules
from ._calibrate import calibrate
from ._denoise import denoise
from ._files import denoise_file
from ._groups import rank_genes_groups
from ._null import null_counts
from ._overdispersion import overdispersion
from ._rank import select_rank
from ._report import report
from ._resolution import select_resolution
from ._slots import remove
from ._support import cluster_support
from ._transfer import denoise_with
from ._version import __version__
from .methods import KNN, PCA, Autoencoder, Clusters, Diffusion, Function
