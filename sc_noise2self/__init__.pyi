__all__ = [
    "calibrate",
    "datasets",
    "denoise",
    "denoise_with",
    "get",
    "partitions",
    "pl",
    "select_rank",
    "split_molecules",
]

from . import datasets, get, partitions, pl
from .annotated import split_molecules
from .calibration import calibrate
from .denoising import denoise
from .ranking import select_rank
from .transfer import denoise_with
