__all__ = ["datasets", "denoise", "denoise_with", "get", "pl", "select_rank", "split_molecules"]

from . import datasets, get, pl
from .annotated import split_molecules
from .denoising import denoise, select_rank
from .transfer import denoise_with
