__all__ = [
    "KNN",
    "PCA",
    "Autoencoder",
    "Diffusion",
    "Function",
    "__version__",
    "calibrate",
    "datasets",
    "denoise",
    "denoise_file",
    "denoise_with",
    "get",
    "methods",
    "null_counts",
    "partitions",
    "pl",
    "remove",
    "report",
    "scales",
    "select_rank",
    "split_molecules",
]

from . import datasets, get, methods, partitions, pl, scales
from ._anndata import split_molecules
from ._calibrate import calibrate
from ._denoise import denoise
from ._files import denoise_file
from ._null import null_counts
from ._rank import select_rank
from ._report import report
from ._slots import remove
from ._transfer import denoise_with
from ._version import __version__
from .methods import KNN, PCA, Autoencoder, Diffusion, Function
