"""The file that fitted models are saved to: an uncompressed NumPy `.npz` of arrays and one JSON text.

A file may come from anywhere. It is read as data that run no code (no pickle), and needs nothing but NumPy. Everything
that it says of itself is held against the schemas of its methods before any array is allocated, and the values of the
arrays after that.
"""

from __future__ import annotations

import json
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
from numpy.lib import format as npy

from ._replace import replaced
from ._transform import Link, TransformName

_FORMAT = 4
_TEXT, _GENES = "model", "genes"  # members that every file has, the JSON and the names of genes
_LARGEST_TEXT = 1 << 20  # bytes
_NOT_ONE = 1e-3  # by how much shares that add up to 1 may miss it
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_TINY, _LARGE = float(np.finfo(np.float32).tiny), 1e6

_ANOTHER_VERSION = "it holds none, or was saved by another version: fit and save it again"

Check = Callable[[Any], bool]
Header = tuple[tuple[int, ...], np.dtype[Any]]
"""Shape and type of an array."""


@dataclass(frozen=True, eq=False)
class State:
    """What prediction needs of one fitted model, as the schema of its method has it."""

    method: str
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Saved:
    """Contents of a model file: the mean of fitted models, whose weights add up to 1."""

    states: tuple[State, ...]
    weights: tuple[float, ...]
    genes: np.ndarray  # names, strings
    batches: tuple[str, ...] = ()  # names of those that the models know


@dataclass(frozen=True)
class Shape:
    """What an array of a model must be; values are from `least` to `most`, inclusive.

    `sizes` names the size of each dimension. `"genes"` is the number of genes; a name that is also that of a value has
    that value; any other is 1 or more, and is set by the first array that has it. `"a+b"` is the sum of two.
    """

    sizes: tuple[str, ...]
    least: float = -np.inf
    most: float = np.inf
    adds_up: bool = False  # to 1
    dtypes: tuple[str, ...] = ("float32", "float64")


@dataclass(frozen=True)
class Schema:
    """The check of each value of a method, and the shape of each array."""

    values: Mapping[str, Check]
    arrays: Mapping[str, Shape]


def is_whole(value: Any, least: int = 0) -> bool:
    """Return whether a value is a whole number, not below a bound."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < 2**31


def is_number(value: Any, least: float, most: float) -> bool:
    """Return whether a value is a number between two bounds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


is_share: Check = partial(is_number, least=0, most=1)
is_depth: Check = partial(is_number, least=_TINY, most=1e12)
"""Return whether a value is a number of molecules that single precision can divide by."""


def one_of(names: Iterable[str]) -> Check:
    """Return the check that a value is one of some names."""
    names = tuple(names)
    return lambda value: isinstance(value, str) and value in names


_OF_GENES = {"gene_share": Shape(("genes",), 0, 1, adds_up=True), "gene_scale": Shape(("genes",), 0, _LARGE)}
_POPULATIONS = {
    "population_centers": Shape(("populations", "genes"), 0, 1),
    "population_factors": Shape(("populations", "genes"), 0, _LARGE),
    "population_shares": Shape(("populations", "genes"), 0, 1),
}

LINKS: dict[str, Link] = {
    "multinomial": "exp",
    "poisson": "exp",
    "negative_binomial": "exp",
    "masked_multinomial": "exp",
    "mse_log1p": "log1p",
    "mse_sqrt": "sqrt",
    "noise2same_log1p": "log1p",
    "noise2same_sqrt": "sqrt",
}
"""Link of each loss of the autoencoder."""

_single = partial(Shape, dtypes=("float32",))
_NETWORK = {
    "scores.components": _single(("genes", "inputs")),
    "scores.gene_weights": _single(("genes",)),
    "scores.center": _single(("inputs",)),
    "scores.depth": _single((), _TINY),
    "scores.mean": _single(("genes",)),
    "scores.share": _single(("genes",), 0, 1),
    "scores.scale": _single((), _TINY),
    "encoder.weight": _single(("n_hidden", "inputs")),
    "encoder.bias": _single(("n_hidden",)),
    "code.weight": _single(("width", "n_hidden")),
    "code.bias": _single(("width",)),
    "code_linear.weight": _single(("width", "inputs")),
    "decoder.weight": _single(("n_hidden", "width+n_batches")),
    "decoder.bias": _single(("n_hidden",)),
    "decoder_linear.weight": _single(("n_hidden", "width")),
    "genes.weight": _single(("genes", "n_hidden")),
    "genes.bias": _single(("genes",)),
    "batch_offsets": _single(("n_batches", "genes")),
}

SCHEMAS: dict[str, Schema] = {
    "mean": Schema({}, {"gene_share": _OF_GENES["gene_share"]}),
    "pca": Schema(
        {"transform": one_of(get_args(TransformName)), "target": is_depth, "floor": is_share},
        {
            **_OF_GENES,
            **_POPULATIONS,
            "gene_weights": Shape(("genes",), 0),
            "mean": Shape(("genes",)),
            "components": Shape(("genes", "k")),
            "weights": Shape(("k",), 0, 1),
            "used": Shape(("genes",), dtypes=("bool",)),
        },
    ),
    "autoencoder": Schema(
        {
            **{"loss": one_of(LINKS), "width": partial(is_whole, least=1), "n_batches": is_whole, "depth": is_depth},
            "floor": is_share,
        },
        {**_OF_GENES, **_POPULATIONS, **_NETWORK},
    ),
}
"""The schema of each method whose models can be saved."""


def save(path: str | os.PathLike[str], saved: Saved) -> None:
    """Write models, if they are what their schemas say, to a file that does not exist yet, whole or not at all."""
    states = [{"method": state.method, "values": state.values} for state in saved.states]
    contents = {"sc_noise2self": _FORMAT, "states": states, "weights": saved.weights, "batches": saved.batches}
    text = json.dumps(contents, default=lambda scalar: scalar.item())
    arrays = {
        _TEXT: np.frombuffer(text.encode(), np.uint8),
        _GENES: np.asarray(saved.genes, dtype=str),
        **{f"{i}/{name}": value for i, state in enumerate(saved.states) for name, value in state.arrays.items()},
    }
    try:
        contents = _contents(arrays[_TEXT])
        _check_headers(contents, {name: (value.shape, value.dtype) for name, value in arrays.items()})
        _check_values(contents, arrays)
    except _Wrong as wrong:
        raise ValueError(f"the model cannot be saved: {wrong}.") from None
    with replaced(Path(path)) as written, written.open("xb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def of_genes(state: State, order: np.ndarray) -> State:
    """Return a state with its genes in another order: new gene i is old gene `order[i]`."""
    arrays = dict(state.arrays)
    for name, shape in SCHEMAS[state.method].arrays.items():
        if "genes" in shape.sizes:
            arrays[name] = arrays[name].take(order, axis=shape.sizes.index("genes"))
    return replace(state, arrays=arrays)


def load(path: str | os.PathLike[str]) -> Saved:
    """Return what a file that `save` wrote holds; refuse any other in one sentence."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)} is not a file: pass one that denoise(..., save_model=) wrote.")
    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of headers that NumPy did not write
                return _load(file)
        except _Wrong as wrong:
            raise ValueError(f"{os.fspath(path)} is not a model that sc_noise2self saved: {wrong}.") from None
        except Exception as error:  # whatever bytes that mean nothing make the readers raise
            raise ValueError(f"{os.fspath(path)} is not a model that sc_noise2self saved.") from error


class _Wrong(ValueError):
    """Why a part is not what the schema says."""


def _load(file: BinaryIO) -> Saved:
    with zipfile.ZipFile(file) as archive:
        members = _members(archive, os.fstat(file.fileno()).st_size)
        headers = {name: _header(archive, member) for name, member in members.items()}
        contents = _contents(_array(archive, members[_TEXT]))
        _check_headers(contents, headers)
        arrays = {name: _array(archive, member) for name, member in members.items()}
    _check_values(contents, arrays)
    states = [
        State(each["method"], each["values"], {name: arrays[f"{i}/{name}"] for name in SCHEMAS[each["method"]].arrays})
        for i, each in enumerate(contents["states"])
    ]
    return Saved(tuple(states), tuple(contents["weights"]), arrays[_GENES], tuple(contents["batches"]))


def _members(archive: zipfile.ZipFile, n_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Return the members of a file of so many bytes by their names, where they are stored as they are."""
    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise _Wrong("it has two parts of one name")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
        raise _Wrong("its parts are compressed")  # and might be larger than memory
    if sum(member.file_size for member in members.values()) > n_bytes:
        raise _Wrong("its parts say that they are larger than the file")
    if _TEXT not in members:
        raise _Wrong(_ANOTHER_VERSION)
    if members[_TEXT].file_size > _LARGEST_TEXT:
        raise _Wrong(f"its text has {members[_TEXT].file_size} bytes")
    return members


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    """Return what an array says of itself, where as many bytes follow."""
    with archive.open(member) as stream:
        shape, _, dtype = _HEADERS[npy.read_magic(stream)](stream)
        n_bytes = member.file_size - stream.tell()
    if dtype.hasobject or not dtype.itemsize or math.prod(shape) * dtype.itemsize != n_bytes:
        raise _Wrong(
            f"its {_cut(repr(member.filename))} stores {n_bytes} bytes for shape {_cut(shape)} of {_cut(dtype)}"
        )
    return shape, dtype


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _contents(text: np.ndarray) -> dict[str, Any]:
    """Return the JSON of a file, everything in it as the schemas say."""
    contents = json.loads(text.tobytes())
    if type(contents) is not dict or contents.get("sc_noise2self") != _FORMAT:
        raise _Wrong(_ANOTHER_VERSION)
    _check_names("the file", contents, {"sc_noise2self", "states", "weights", "batches"})
    states, weights, batches = contents["states"], contents["weights"], contents["batches"]
    if not isinstance(states, list) or not states:
        raise _Wrong(f"its states is {_shown(states)}")
    if not isinstance(batches, list) or not _are_names(batches):
        raise _Wrong(f"its batches is {_shown(batches)}")
    for state in states:
        _check_names("a state", state, {"method", "values"})
        if not one_of(SCHEMAS)(state["method"]):
            raise _Wrong(f"its method is {_shown(state['method'])}")
        schema = SCHEMAS[state["method"]]
        _check_names(f"its {state['method']}", state["values"], set(schema.values))
        for name, check in schema.values.items():
            if not check(state["values"][name]):
                raise _Wrong(f"its {name} is {_shown(state['values'][name])}")
        n_batches = state["values"].get("n_batches", 0)
        if n_batches not in (0, len(batches)):
            raise _Wrong(f"it names {len(batches)} batches and has {n_batches}")
    are_shares = isinstance(weights, list) and all(is_number(weight, 0, 1) for weight in weights)
    if not are_shares or len(weights) != len(states) or abs(sum(weights) - 1) > _NOT_ONE:
        raise _Wrong(f"its weights are not {len(states)} shares that add up to 1")
    return contents


def _check_headers(contents: Mapping[str, Any], headers: Mapping[str, Header]) -> None:
    """Hold the shape and the type of every array against the schemas."""
    wanted = {f"{i}/{name}" for i, state in enumerate(contents["states"]) for name in SCHEMAS[state["method"]].arrays}
    _check_names("the file", dict(headers), {_TEXT, _GENES} | wanted)
    shape, dtype = headers[_GENES]
    if dtype.kind != "U" or not dtype.isnative or not dtype.itemsize or len(shape) != 1 or not shape[0]:
        raise _Wrong(f"its names of genes are {shape} values of type {_cut(dtype)}")
    for i, state in enumerate(contents["states"]):
        sizes = {name: value for name, value in state["values"].items() if is_whole(value)} | {"genes": shape[0]}
        for name, of_one in SCHEMAS[state["method"]].arrays.items():
            _check_header(name, headers[f"{i}/{name}"], of_one, sizes)


def _check_header(name: str, header: Header, wanted: Shape, sizes: dict[str, int]) -> None:
    """Hold an array against its schema; sizes that it is the first to have are set."""
    shape, dtype = header
    if dtype not in wanted.dtypes:
        raise _Wrong(f"its {name} is of type {_cut(dtype)}")
    if len(shape) != len(wanted.sizes):
        raise _Wrong(f"its {name} has shape {shape} instead of {len(wanted.sizes)} dimensions")
    for size, length in zip(wanted.sizes, shape, strict=True):
        if "+" not in size and size not in sizes:
            if length < 1:
                raise _Wrong(f"its {name} has shape {shape}, and its {size} must be 1 or more")
            sizes[size] = length
    expected = tuple(sum(sizes[part] for part in size.split("+")) for size in wanted.sizes)
    if shape != expected:
        raise _Wrong(f"its {name} has shape {shape} instead of {expected}")


def _check_values(contents: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Hold the values of the arrays against the schemas."""
    if not _are_names(arrays[_GENES].tolist()):
        raise _Wrong("its names of genes repeat")
    for i, state in enumerate(contents["states"]):
        for name, wanted in SCHEMAS[state["method"]].arrays.items():
            value, least, most = arrays[f"{i}/{name}"], wanted.least, wanted.most
            if value.dtype == bool:
                value, least, most = value.view(np.uint8), 0, 1  # another byte would make NumPy count wrong
            if not np.isfinite(value).all():
                raise _Wrong(f"its {name} holds values that are not finite")
            if not ((value >= least) & (value <= most)).all():
                raise _Wrong(f"its {name} holds values that are not from {least:g} to {most:g}")
            if wanted.adds_up and not abs(value.sum(dtype=np.float64) - 1) < _NOT_ONE:
                raise _Wrong(f"its {name} does not add up to 1")


def _check_names(what: str, found: Any, wanted: set[str]) -> None:
    if type(found) is not dict:
        raise _Wrong(f"{what} is {_shown(found)}")
    for names, said in ((wanted - set(found), "lacks"), (set(found) - wanted, "has in excess")):
        if names:
            raise _Wrong(f"{what} {said} {_cut(', '.join(sorted(map(repr, names))))}")


def _are_names(values: list[Any]) -> bool:
    return all(isinstance(each, str) for each in values) and len(set(values)) == len(values)


def _shown(value: Any) -> str:
    """Return a value as it is shown in a message, or its type where that would be long."""
    return _cut(repr(value)) if isinstance(value, str | int | float) else f"of type {type(value).__name__}"


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
