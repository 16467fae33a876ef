"""The file that an autoencoder is saved to: what it holds, and that it is so before anything is made of it.

A file may come from anywhere. It is read as data that run no code, without allocating what it says its sizes are, and
every part is held against one schema. It needs PyTorch.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from .._replace import replaced
from .._transform import Link

_FORMAT = 2
_LARGEST_SCALE = 1e6  # of a gene: it makes up for the bend of a transform

Check = Callable[[Any], bool]

_GENES: dict[str, tuple[str, ...]] = {"gene_share_": ("genes",), "gene_scale_": ("genes",)}
_NETWORK: dict[str, tuple[str, ...]] = {
    "scores.components": ("genes", "inputs"),
    "scores.gene_weights": ("genes",),
    "scores.center": ("inputs",),
    "scores.depth": (),
    "scores.mean": ("genes",),
    "scores.share": ("genes",),
    "scores.scale": (),
    "encoder.weight": ("hidden", "inputs"),
    "encoder.bias": ("hidden",),
    "code.weight": ("width", "hidden"),
    "code.bias": ("width",),
    "code_linear.weight": ("width", "inputs"),
    "decoder.weight": ("hidden", "width+batches"),
    "decoder.bias": ("hidden",),
    "decoder_linear.weight": ("hidden", "width"),
    "genes.weight": ("genes", "hidden"),
    "genes.bias": ("genes",),
    "batch_offsets": ("batches", "genes"),
}
"""The shape of every tensor, as names of sizes."""

_TINY = float(np.finfo(np.float32).tiny)
_BOUNDS = {
    "gene_share_": (0, 1),
    "gene_scale_": (0, _LARGEST_SCALE),
    "scores.share": (0, 1),
    "scores.depth": (_TINY, np.inf),
    "scores.scale": (_TINY, np.inf),
}


def save(path: str | os.PathLike[str], contents: Mapping[str, Any]) -> None:
    """Write the parts of a model, as the schema has them, to a file that does not exist yet."""
    with replaced(Path(path)) as partial:
        torch.save({"sc_noise2self": _FORMAT, **contents}, partial)


def load(path: str | os.PathLike[str], losses: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the parts of a model from a file that `save` wrote: tensors in memory, everything of the right shape.

    Parameters
    ----------
    losses
        Names that the loss may have.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    ValueError
        If it is not such a file, in one sentence.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)} is not a file: pass one that denoise(..., save_model=) wrote.")
    saved = _read(path)
    if (
        type(saved) is not dict
        or not _is_whole(saved.get("sc_noise2self"), _FORMAT)
        or saved["sc_noise2self"] > _FORMAT
    ):
        raise ValueError(f"{_not_a_model(path)}, or was saved by another version: fit and save it again.")
    try:
        _check(saved, os.path.getsize(path), losses)
    except _Wrong as wrong:
        raise ValueError(f"{_not_a_model(path)}: {wrong}.") from None
    tensors = {part: {name: value.clone() for name, value in saved[part].items()} for part in ("genes", "network")}
    return saved | tensors


def _not_a_model(path: str | os.PathLike[str]) -> str:
    return f"{os.fspath(path)} is not a model that sc_noise2self saved"


def _read(path: str | os.PathLike[str]) -> Any:
    """Return what a file holds, its tensors left in the file."""
    with open(path, "rb"):  # who may not read it is told so
        pass
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise _Wrong("its parts are compressed")  # and might be larger than memory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that PyTorch did not write
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever bytes that mean nothing make the readers raise
        raise ValueError(f"{_not_a_model(path)}.") from error


class _Wrong(ValueError):
    """Why a part is not what the schema says."""


def _check(saved: dict[str, Any], n_bytes: int, losses: Sequence[str]) -> None:
    """Hold everything that was read against the schema.

    Parameters
    ----------
    n_bytes
        Of the file, which holds all numbers of its tensors.
    """
    _check_parts("the file", saved, {"sc_noise2self", "parameters", "fitted", "genes", "names", "network"})
    for part, checks in _values(losses).items():
        _check_parts(part, saved[part], set(checks))
        for name, check in checks.items():
            if not check(saved[part][name]):
                raise _Wrong(f"its {name} is {_shown(saved[part][name])}")
    _check_parts("genes", saved["genes"], set(_GENES))
    _check_parts("network", saved["network"], set(_NETWORK))
    tensors = {**saved["genes"], **saved["network"]}
    sizes = {
        "genes": len(saved["names"]["feature_names_in_"]),
        "batches": saved["parameters"]["n_batches"],
        "width": saved["fitted"]["width_"],
    }
    if len(saved["names"]["batch_names_"]) != sizes["batches"]:
        raise _Wrong(f"it names {len(saved['names']['batch_names_'])} batches and has {sizes['batches']}")
    for name, value in tensors.items():
        _check_tensor(name, value)
    if sum(value.nbytes for value in tensors.values()) > n_bytes:
        raise _Wrong("its tensors say that they are larger than the file")
    sizes |= {"hidden": _length(tensors["encoder.bias"]), "inputs": _length(tensors["scores.center"])}
    if not (sizes["hidden"] and sizes["inputs"]):
        raise _Wrong("its network has a layer without units")
    if saved["parameters"]["n_hidden"] not in (None, sizes["hidden"]):
        raise _Wrong(f"its n_hidden is {saved['parameters']['n_hidden']}, and its network has {sizes['hidden']}")
    for name, shape in {**_GENES, **_NETWORK}.items():
        wanted = tuple(sum(sizes[size] for size in length.split("+")) for length in shape)
        if tuple(tensors[name].shape) != wanted:
            raise _Wrong(f"its {name} has shape {tuple(tensors[name].shape)} instead of {wanted}")
        if not torch.isfinite(tensors[name]).all():
            raise _Wrong(f"its {name} holds values that are not finite")
    for name, (least, most) in _BOUNDS.items():
        if not ((tensors[name] >= least) & (tensors[name] <= most)).all():
            raise _Wrong(f"its {name} holds values that are not from {least:g} to {most:g}")
    if not abs(float(tensors["gene_share_"].sum()) - 1) < 1e-3:
        raise _Wrong("its gene_share_ does not add up to 1")
    loss, link = saved["parameters"]["loss"], saved["fitted"]["link_"]
    if link != (loss.rpartition("_")[2] if loss.startswith(("mse", "noise2same")) else "exp"):
        raise _Wrong(f"its link_ {link!r} is not that of its loss, {loss!r}")


def _values(losses: Sequence[str]) -> dict[str, dict[str, Check]]:
    """Return what everything that is no tensor must be."""

    def or_none(check: Check) -> Check:
        return lambda value: value is None or check(value)

    return {
        "parameters": {
            "widths": lambda value: isinstance(value, list) and bool(value) and all(map(_is_count, value)),
            "loss": lambda value: isinstance(value, str) and value in losses,
            "n_components": _is_count,
            "n_batches": lambda value: _is_whole(value, 0),
            "n_hidden": or_none(_is_count),
            "dropout": lambda value: _is_number(value) and 0 <= value < 1,
            "learning_rate": lambda value: _is_number(value) and value > 0,
            "invariance": lambda value: _is_number(value) and value >= 0,
            "prior_scale": lambda value: _is_number(value) and value > 0,
            "n_epochs": or_none(_is_count),
            "batch_size": or_none(_is_count),
        },
        "fitted": {
            "width_": _is_count,
            "link_": lambda value: isinstance(value, str) and value in get_args(Link),
            "depth_": lambda value: _is_number(value) and value > 0,
        },
        "names": {"feature_names_in_": _are_names, "batch_names_": _are_names},
    }


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < 2**31


def _is_count(value: Any) -> bool:
    return _is_whole(value, 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value) and len(set(value)) == len(value)


def _check_parts(what: str, found: Any, wanted: set[str]) -> None:
    if type(found) is not dict:  # others may come with attributes in place of their methods
        raise _Wrong(f"its {what} is {_shown(found)}")
    for names, said in ((wanted - set(found), "lacks"), (set(found) - wanted, "has in excess")):
        if names:
            raise _Wrong(f"{what} {said} {', '.join(sorted(map(_shown, names)))}")


def _check_tensor(name: str, value: Any) -> None:
    """Refuse what only looks like an array of numbers that the file holds."""
    is_plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not is_plain or value.dtype not in (torch.float32, torch.float64) or not value.is_contiguous():
        raise _Wrong(f"its {name} is {_shown(value)}")


def _length(value: Tensor) -> int:
    return value.shape[0] if value.ndim else 0


def _shown(value: Any) -> str:
    """Return a value as it is shown in a message, or its type where that would be long."""
    shown = repr(value) if isinstance(value, str | int | float) else f"of type {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
