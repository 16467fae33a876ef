__all__ = [
    "calibrate",
    "datasets",
    "denoise",
    "denoise_file",
    "denoise_with",
    "get",
    "null_counts",
    "partitions",
    "pl",
    "remove",
    "report",
    "select_rank",
    "split_molecules",
]

from . import datasets, get, partitions, pl
from .annotated import split_molecules
from .calibration import calibrate
from .denoising import denoise
from .files import denoise_file
from .null import null_counts
from .ranking import select_rank
from .reporting import report
from .transfer import denoise_with
from .written import remove
