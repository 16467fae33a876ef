"""Denoising methods: their options as objects, and the names that stand for them.

A new method is one file, with a frozen dataclass derived from `Method`, and one line in `REGISTRY`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any, get_args

from .._model import State
from .._transform import TransformName
from ._autoencoder import Autoencoder, AutoencoderModel
from ._base import MeanModel, Method, bounded_values
from ._clusters import Clusters
from ._function import Function
from ._neighbors import KNN, Diffusion
from ._pca import PCA, PCAModel
from ._profiles import LowRankProfiles, TableProfiles

REGISTRY: dict[str, Sequence[Callable[[], Method]]] = {
    "pca": [PCA],
    "autoencoder": [Autoencoder],
    "diffusion": [Diffusion],
    "knn": [KNN],
    "clusters": [Clusters],
    "ensemble": [*(partial(PCA, transform=name) for name in get_args(TransformName)), Autoencoder, Diffusion],
}
"""What a name stands for: a method at its defaults, or several, of which the mean is taken."""

_MODELS: dict[str, Any] = {"mean": MeanModel, "pca": PCAModel, "autoencoder": AutoencoderModel}


def as_methods(method: Any) -> tuple[str, list[Method]]:
    """Return the name of what was asked for, and its methods; raise if it is no name, method or sequence of these."""
    if isinstance(method, str):
        if method not in REGISTRY:
            raise ValueError(f"method is {method!r}: pass one of {', '.join(REGISTRY)}, or objects such as n2s.PCA().")
        return method, [each() for each in REGISTRY[method]]
    if isinstance(method, Method):
        if not is_dataclass(method):
            kind = type(method).__name__
            raise TypeError(
                f"method is a {kind}, whose options cannot be read: put @dataclass(frozen=True) above {kind}."
            )
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
    return _MODELS[state.method].from_state(state, device)


__all__ = ["KNN", "PCA", "Autoencoder", "Clusters", "Diffusion", "Function", "LowRankProfiles", "Method"]
__all__ += ["TableProfiles", "bounded_values"]
