__all__ = ["datasets", "denoise", "get", "pl", "select_rank", "split_molecules"]

from . import datasets, get, pl
from .annotated import split_molecules
from .denoising import denoise, select_rank
