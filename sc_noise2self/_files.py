"""Denoise a file into another, without holding the counts or the layer, and without ever leaving half a result.

The result is written beside the target and renamed when it is whole (`sc_noise2self._replace`). A run that is stopped,
in whatever way, leaves the source as it was and no target, or the old one.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from anndata import AnnData
from packaging.version import Version
from scanpy import logging as logg

from ._checks import check_flag, check_name, check_path
from ._denoise import denoise
from ._memory import check_fits_disk
from ._progress import progress_bar
from ._read import profiles, record, sizes
from ._replace import check_target, private_folder, replaced
from ._report import report
from ._slots import check_key_name, kind_of
from ._threads import in_threads
from .methods import Method, as_methods
from .methods._profiles import Profiles
from .scales import Scale, as_scale

_SLOTS = ("obs", "var", "obsm", "varm", "uns")  # that a result is written to, besides its layer
_ROWS, _COLUMNS = 1000, 500  # of a chunk of the layer, at most: 2 MB
_COPIED = 1 << 20  # bytes of a chunk of what is copied from one format to the other
_URL = re.compile(r"\w{2,}:/")  # a path keeps one slash of two


def denoise_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    method: str | Method | Sequence[str | Method] = "pca",
    *,
    layer: str | None = None,
    key_added: str = "denoised",
    write_layer: bool = True,
    overwrite: bool = False,
    **options: Any,
) -> str:
    """Denoise the counts of a `.h5ad` or zarr file into another file, in blocks of cells.

    Parameters
    ----------
    source
        File with raw counts in `X` or `layer`, as CSR or dense; it is read only.
    target
        File to write, `.h5ad` or `.zarr`: all that is in the source, and the result. It has the source's permissions.
    write_layer
        False writes the factors alone. The layer is dense, 4 bytes x cells x genes, written in chunks.
    overwrite
        Replace an existing `.h5ad` target, in one step, when the new one is whole. It keeps its permissions; where it
        is a link, the file that it leads to is replaced.
    method, layer, key_added, options
        As in `denoise`. Counts stay on disk, but for a method that needs them in memory (`sc_noise2self.Function`).

    Returns
    -------
    The `report` of the result.

    Raises
    ------
    OSError
        If a path cannot be read or written, if the target exists, or if the disk is too small: nothing is written then.
    ValueError, TypeError
        If the source is damaged, is not of an AnnData object, or cannot be written to the target, and as `denoise`.
    ImportError
        If a `.zarr` is read or written without zarr.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> n2s.denoise_file("big.h5ad", "big.zarr", write_layer=False)  # doctest: +SKIP
    >>> n2s.denoise_file("big.h5ad", "mixed.h5ad", n2s.Diffusion(t=3), mix=True)  # doctest: +SKIP
    """
    source, target = expanded("source", source), expanded("target", target)
    if "copy" in options:
        raise TypeError("copy was given: the target is the copy, so leave it out.")
    if unknown := [name for name in options if name not in signature(denoise).parameters]:
        raise TypeError(f"denoise_file() got an unexpected keyword argument {unknown[0]!r}: its options are denoise's.")
    check_flag("write_layer", write_layer)
    check_flag("overwrite", overwrite)
    check_key_name(key_added)
    if layer is not None:
        check_name("layer", layer)
    _, methods = as_methods(method)
    model = options.pop("save_model", None)
    if model is not None:
        model = expanded("save_model", model)
    _check_paths(source, target, overwrite, model)
    with _read(source) as stored, nullcontext() if model is None else private_folder(model.parent) as own:
        adata = _with_counts(source, stored, layer, any(each.needs_memory for each in methods))
        if key_added in stored.get("layers", ()) and kind_of(adata, key_added) != "denoise":
            raise ValueError(f"layer {key_added!r} exists and is not an earlier result: choose another key_added.")
        decompressed = source.suffix == ".zarr" and target.suffix == ".h5ad"
        n_bytes = _size_of_arrays(stored) if decompressed else _size_of_files(source)
        check_fits_disk(n_bytes + 4 * adata.n_obs * adata.n_vars * write_layer, target.resolve().parent)
        in_memory = write_layer and not all(each.has_factors for each in methods)
        saved = own / model.name if own and model else None
        denoise(adata, method, layer=layer, key_added=key_added, write_layer=in_memory, save_model=saved, **options)
        reported = report(adata, key=key_added)
        scale = as_scale(options.get("scale", "counts"))
        with (
            replaced(target, overwrite=overwrite, like=source) as partial,
            _in_a_sentence(f"{source} could not be written to {target}", OSError),
            ad.settings.override(allow_write_nullable_strings=True),  # that the source may hold
        ):
            start = logg.info(f"writing {target}")
            if source.suffix == target.suffix:
                _copy_file(source, partial)
            with _written(partial) as (out, check):
                if source.suffix != target.suffix:
                    _copy_group(stored, out, check, but=_SLOTS)
                _write_result(out, adata, key_added, check)
                if write_layer:
                    _write_layer(out["layers"], adata, key_added, scale, check)
            if model is not None:
                check_target(model, overwrite=False)  # nothing is written where the model cannot be
            logg.info("    written", time=start)
        if saved and saved.exists():
            with replaced(model) as written:
                saved.rename(written)
    return reported


@contextmanager
def opened(source: str | os.PathLike[str], layer: str | None = None, *, counts: bool = True) -> Iterator[AnnData]:
    """Open a file to read, as an object whose counts stay on disk, or that has no matrix if `counts` is False."""
    source = expanded("source", source)
    _check_source(source)
    with _read(source) as stored:
        if counts:
            yield _with_counts(source, stored, layer, False)
        else:
            with _readable(source):
                adata = _without_matrices(stored)
            yield adata


def expanded(name: str, given: str | bytes | os.PathLike[str]) -> Path:
    """Return a path with the folder of the user in place of its `~`; `name` is that of the argument."""
    if not isinstance(given, bytes):
        check_path(name, given)
    path = os.fsdecode(given)
    if _URL.match(path):
        raise ValueError(f"{path} is an address: download it first, and pass the path of the file.")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} starts with a user without a home folder: write ./{path} for a file.") from None


def _check_source(source: Path) -> None:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: pass an .h5ad or .zarr file with raw counts.")
    _check_format(source, "read")
    if source.suffix == ".h5ad" and not source.is_file():
        raise ValueError(f"{source} is not a file: an .h5ad is one; rename the folder if it is a .zarr.")
    if source.suffix == ".zarr" and not source.is_dir():
        raise ValueError(f"{source} is not a folder: a .zarr is one; unpack it, or rename it if it is an .h5ad.")
    if not os.access(source, os.R_OK):
        raise PermissionError(f"{source} may not be read by this user: ask its owner, or chmod u+r.")


def _check_format(path: Path, does: str) -> None:
    if path.suffix not in (".h5ad", ".zarr"):
        raise ValueError(f"{path} does not end in .h5ad or .zarr: those are the formats {does}.")
    if path.suffix == ".zarr" and find_spec("zarr") is None:
        raise ImportError('a .zarr needs zarr: pip install "sc-noise2self[zarr]".')


def _check_paths(source: Path, target: Path, overwrite: bool, model: Path | None) -> None:
    _check_source(source)
    _check_format(target, "written")
    if target.exists() and source.samefile(target):
        raise FileExistsError(f"{target} is the source: choose another name.")
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"{target} is inside the source, which is not changed: choose another folder.")
    if target.is_file() and not overwrite:
        raise FileExistsError(
            f"{target} exists: nothing is overwritten, so choose another name, or pass overwrite=True."
        )
    check_target(target, overwrite)
    if model is not None:
        if model.resolve() == target.resolve():
            raise ValueError(f"save_model is {os.fspath(model)!r}, the target too: choose another name.")
        check_target(model, overwrite=False)
    if not os.access(target.resolve().parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{target.resolve().parent} may not be written to by this user: choose another folder.")


def _readable(path: Path) -> AbstractContextManager[None]:
    """Say in one sentence what is wrong with a file, whichever library found it."""
    return _in_a_sentence(f"{path} is damaged, or holds no AnnData object")


@contextmanager
def _in_a_sentence(what: str, *but: type[Exception]) -> Iterator[None]:
    """Say what is wrong, and why, whichever library found it; errors in `but` are another's."""
    others: tuple[type[Exception], ...] = (MemoryError, PermissionError, _Refused, *but)
    try:
        yield
    except others:
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what}: {why}") from error


class _Refused(ValueError):
    """What a file does not have, in a sentence of its own."""


@contextmanager
def _read(path: Path) -> Iterator[Any]:
    """Open the file to read, as a group of h5py or zarr."""
    if path.suffix == ".h5ad":
        from h5py import File as opened
    else:
        from zarr import open_group as opened
    with _readable(path):
        stored = opened(path, mode="r")
    with stored if path.suffix == ".h5ad" else nullcontext():
        yield stored


class _Steady(io.FileIO):
    """A file that keeps its first failure and takes what is written after it as written.

    HDF5 cannot close a file that it fails to write to: it fails again, and crashes when the program ends.
    """

    failed: BaseException | None = None

    def write(self, data: Any, /) -> int:
        """Write all of it, unless a write failed."""
        try:
            rest = memoryview(data)
            while rest and self.failed is None:
                rest = rest[super().write(rest) :]
        except BaseException as error:
            self.failed = error
        return len(data)

    def truncate(self, size: int | None = None, /) -> int:
        """Cut or extend it, unless a write failed."""
        try:
            return (size or 0) if self.failed else super().truncate(size)
        except BaseException as error:
            self.failed = error
            return size or 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Return as many bytes as asked for: zeros where nothing was written."""
        return (super().read(size) or b"").ljust(size or 0, b"\0")

    def check(self) -> None:
        """Raise the failure."""
        if self.failed is not None:
            raise self.failed


@contextmanager
def _written(path: Path) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Open the file to write, as a group of h5py or zarr, and have what was consolidated in it consolidated again.

    With it comes a check, which raises if something was not written; it is made again in the end.
    """
    if path.suffix == ".h5ad":
        import h5py

        exists = path.exists()
        raw = _Steady(path, "r+" if exists else "x+")
        try:
            file = h5py.File(raw, "r+" if exists else "w")
            with closing(file), closing(file):  # twice, because an interrupt may come before it is closed
                yield file, raw.check
        finally:
            raw.close()
            raw.check()  # what followed from it is no other reason
    else:
        import zarr

        # What exists has its own format; a new store that of anndata.
        new: dict[str, Any] = {"zarr_format": 3 if Version(version("anndata")) >= Version("0.13") else 2}
        consolidated = path.exists() and zarr.open_group(path, mode="r").metadata.consolidated_metadata is not None
        yield zarr.open_group(path, mode="a", use_consolidated=False, **({} if path.exists() else new)), lambda: None
        if consolidated:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that other programs may not know of it
                zarr.consolidate_metadata(path)


def _with_counts(source: Path, stored: Any, layer: str | None, in_memory: bool) -> AnnData:
    """Return what is in a file besides matrices, and the counts, on disk or in memory."""
    with _readable(source):
        adata = _without_matrices(stored)
        counts = _counts(stored, layer, in_memory)
        if layer is None:
            adata.X = counts
        else:
            adata.layers[layer] = counts
    return adata


def _without_matrices(stored: Any) -> AnnData:
    """Return what is not of size cells x genes, cells x cells or genes x genes."""
    if missing := [slot for slot in ("obs", "var") if slot not in stored]:
        what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        raise _Refused(f"{what} in the file, which has {sorted(stored)}: it holds no AnnData object.")
    if any(getattr(stored[slot], "dtype", np.dtype(float)).names for slot in ("obs", "var")):
        raise _Refused(
            "obs or var is a table as anndata wrote it before 0.7: read the file with anndata.read_h5ad, write it "
            "again with write_h5ad, and pass the new file."
        )
    return AnnData(**{slot: ad.io.read_elem(stored[slot]) for slot in _SLOTS if slot in stored})


def _counts(stored: Any, layer: str | None, in_memory: bool) -> Any:
    """Return the dataset with the counts, or what it holds."""
    if layer is not None and layer not in stored.get("layers", ()):
        raise _Refused(f"layer {layer!r} is missing: the file has {sorted(stored.get('layers', ()))}.")
    if layer is None and "X" not in stored:
        raise _Refused('X is missing in the file: pass the layer that holds raw counts, e.g. layer="counts".')
    element = stored["X"] if layer is None else stored["layers"][layer]
    if in_memory:
        return ad.io.read_elem(element)
    return element if hasattr(element, "shape") else ad.io.sparse_dataset(element)


def _write_result(out: Any, adata: AnnData, key: str, check: Callable[[], None]) -> None:
    """Write all of a result but its layer, and remove that of an earlier one."""
    for slot in _SLOTS:
        check()
        value = getattr(adata, slot)
        ad.io.write_elem(out, slot, value if slot in ("obs", "var") else dict(value))
    if "layers" not in out:
        ad.io.write_elem(out, "layers", {})
    if key in out["layers"]:
        del out["layers"][key]


def _write_layer(out: Any, adata: AnnData, key: str, scale: Scale, check: Callable[[], None]) -> None:
    """Write the dense layer: the one in memory, or what factors give on that scale, a chunk at a time."""
    if key in adata.layers:
        ad.io.write_elem(out, key, adata.layers[key])
        return
    rebuilt, size = profiles(adata, key), sizes(adata, key)
    scale = scale.settled(record(adata, key)["depth"])
    # Parts that are as few as allowed and equal: the last one wastes no disk.
    n_rows, n_columns = (-(-n // -(-n // most)) for n, most in ((adata.n_obs, _ROWS), (adata.n_vars, _COLUMNS)))
    made = _create(out, key, adata.shape, np.float32, (n_rows, n_columns))
    made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def chunks() -> Iterator[tuple[slice, slice, Profiles]]:
        for row in range(0, adata.n_obs, n_rows):
            cells = slice(row, min(row + n_rows, adata.n_obs))
            own = rebuilt.of_cells(np.arange(cells.start, cells.stop))  # reads counts that are mixed in, once
            for column in range(0, adata.n_vars, n_columns):
                yield cells, slice(column, min(column + n_columns, adata.n_vars)), own

    def values(chunk: tuple[slice, slice, Profiles]) -> tuple[slice, slice, np.ndarray]:
        cells, genes, own = chunk
        return cells, genes, scale.apply(own.counts(genes=genes), size[cells])

    with progress_bar("writing the layer", adata.n_obs) as bar:
        for cells, genes, block in in_threads(values, chunks()):
            made[cells, genes] = block
            check()
            bar.update(cells.stop - cells.start if genes.stop == adata.n_vars else 0)


def _create(out: Any, key: str, shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...]) -> Any:
    """Make a dataset of h5py or an array of zarr."""
    make = out.create_array if hasattr(out, "create_array") else out.create_dataset
    chunked = {} if 0 in shape else {"chunks": tuple(map(min, shape, chunks))}
    return make(key, shape=shape, dtype=dtype, **chunked)


def _size_of_files(source: Path) -> int:
    """Return the bytes of a file, or of all files of a store."""
    return sum(each.stat().st_size for each in ([source] if source.is_file() else source.rglob("*")))


def _size_of_arrays(stored: Any) -> int:
    """Return the bytes of all arrays in a group without compression, as they are written to `.h5ad`."""
    return int(stored.nbytes) if hasattr(stored, "nbytes") else sum(_size_of_arrays(stored[name]) for name in stored)


def _copy_file(source: Path, target: Path) -> None:
    """Copy what a file holds, or the files of a store; not their permissions, which may forbid to write."""
    if source.is_file():
        shutil.copyfile(source, target)
        return
    for folder, _, names in os.walk(source, followlinks=True):
        here = target / Path(folder).relative_to(source)
        here.mkdir()
        for name in names:
            shutil.copyfile(Path(folder) / name, here / name)


def _copy_group(stored: Any, out: Any, check: Callable[[], None], but: Sequence[str] = ()) -> None:
    """Copy what is in a group, but some of it, from one format to the other."""
    out.attrs.update(_attributes(stored))
    for name in stored:
        if name not in but:
            _copy(stored[name], out, name, check)


def _copy(element: Any, out: Any, key: str, check: Callable[[], None]) -> None:
    """Copy an element; of a matrix some rows or entries at a time."""
    kind = element.attrs.get("encoding-type")
    if kind in ("csr_matrix", "csc_matrix"):
        made = out.create_group(key)
        made.attrs.update(_attributes(element))
        for name in ("data", "indices", "indptr"):
            _copy_array(element[name], made, name, check)
    elif kind == "array" and element.dtype.kind in "biuf" and element.shape:
        _copy_array(element, out, key, check)
    elif kind in ("dict", "raw"):
        _copy_group(element, out.create_group(key), check)
    elif kind != "null":  # means what its absence does; where `raw` stands, `.h5ad` knows absence alone
        ad.io.write_elem(out, key, ad.io.read_elem(element))


def _copy_array(stored: Any, out: Any, key: str, check: Callable[[], None]) -> None:
    rest = int(np.prod(stored.shape[1:]))
    rows = max(1, _COPIED // max(1, stored.dtype.itemsize * rest))
    made = _create(out, key, stored.shape, stored.dtype, (rows, *stored.shape[1:]))
    made.attrs.update(_attributes(stored))
    for start in range(0, stored.shape[0], 16 * rows):
        made[start : start + 16 * rows] = stored[start : start + 16 * rows]
        check()


def _attributes(stored: Any) -> dict[str, Any]:
    """Return attributes as JSON has them, which zarr needs."""
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in stored.attrs.items()}
