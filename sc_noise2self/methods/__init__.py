"""Denoising methods: their options as objects, and the names that stand for them.

A new method is one file, with a frozen dataclass derived from `Method`, and one line in `REGISTRY`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ._autoencoder import Autoencoder
from ._base import Method, bounded_values
from ._function import Function
from ._neighbors import KNN, Diffusion
from ._pca import PCA
from ._profiles import LowRankProfiles, TableProfiles

if TYPE_CHECKING:
    from .._model import State

REGISTRY: dict[str, Sequence[type[Method]]] = {
    "pca": [PCA],
    "autoencoder": [Autoencoder],
    "diffusion": [Diffusion],
    "knn": [KNN],
    "ensemble": [PCA, Autoencoder, Diffusion],
}
"""What a name stands for: a method at its defaults, or several, of which the mean is taken."""


def as_methods(method: Any) -> tuple[str, list[Method]]:
    """Return the name of what was asked for, and its methods; several are an ensemble.

    Parameters
    ----------
    method
        A name of the registry, a method, or a sequence of names and methods.

    Raises
    ------
    ValueError
        If there is no such name, or the sequence is empty.
    TypeError
        If it is none of these.
    """
    if isinstance(method, str):
        if method not in REGISTRY:
            raise ValueError(f"method is {method!r}: pass one of {', '.join(REGISTRY)}, or objects such as n2s.PCA().")
        return method, [each() for each in REGISTRY[method]]
    if isinstance(method, Method):
        return method.name, [method]
    if isinstance(method, type):
        raise TypeError(f"method is the class {method.__name__}: pass an object, e.g. {method.__name__}().")
    if isinstance(method, Sequence) and not isinstance(method, bytes):
        if not method:
            raise ValueError("method is empty: pass a name, a method such as n2s.PCA(), or several.")
        return "ensemble", [one for each in method for one in as_methods(each)[1]]
    raise TypeError(
        f"method is {method!r}: pass one of {', '.join(REGISTRY)}, a method such as n2s.PCA(), or a list of these; a "
        "function goes in n2s.Function(...)."
    )


def is_ensemble(method: Any) -> bool:
    """Whether what was asked for is a mean of methods: a list, or a name that stands for several."""
    return not isinstance(method, Method) and (not isinstance(method, str) or len(REGISTRY[method]) > 1)


def model_of(state: State, device: str = "auto") -> Any:
    """Return the fitted model that a state of a model file was made of, with `predict(counts, codes)`."""
    from ._autoencoder import AutoencoderModel
    from ._base import MeanModel
    from ._pca import PCAModel

    models: Mapping[str, Callable[..., Any]] = {
        "mean": MeanModel.from_state,
        "pca": PCAModel.from_state,
        "autoencoder": AutoencoderModel.from_state,
    }
    return models[state.method](state, device)


__all__ = [
    "KNN",
    "PCA",
    "REGISTRY",
    "Autoencoder",
    "Diffusion",
    "Function",
    "LowRankProfiles",
    "Method",
    "TableProfiles",
    "as_methods",
    "bounded_values",
]
