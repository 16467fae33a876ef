"""Denoise a file into another, without holding the counts or the layer, and without ever leaving half a result.

The result is written beside the target under a name of its own, and renamed when it is whole. A run that is stopped, in
whatever way, leaves the source as it was and no target, or the old one; what it left beside it is removed by the next.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import anndata as ad
from anndata import AnnData
from packaging.version import Version
from scanpy import logging as logg

from .annotated import chunks_of
from .denoising import denoise
from .estimates import estimate
from .get import lazy, require_dask
from .memory import check_fits_disk
from .reporting import report

_FORMATS = (".h5ad", ".zarr")
_SLOTS = ("obs", "var", "obsm", "varm", "uns")  # that a result is written to, besides its layer
_COMPONENTS = 100  # that an estimate assumes
_ROWS, _COLUMNS = 1000, 500  # of a chunk of the layer: 2 MB


def denoise_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
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
        File to write, `.h5ad` or `.zarr`: all that is in the source, and the result.
    write_layer
        False writes the factors alone. The layer is dense, 4 bytes x cells x genes, written in chunks; that, and
        another format than the source's, needs dask.
    overwrite
        Replace an existing `.h5ad` target, in one step, when the new one is whole.
    layer, key_added, options
        As in `denoise`. Methods other than `"pca"`, and `mix`, load the counts.

    Returns
    -------
    The `report` of the result.

    Raises
    ------
    OSError
        If a path cannot be read or written, if the target exists, or if the disk is too small: nothing is written then.
    ValueError, TypeError
        As `denoise`.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> n2s.denoise_file("big.h5ad", "big.zarr", write_layer=False)  # doctest: +SKIP
    """
    source, target = Path(source), Path(target)
    if "copy" in options:
        raise TypeError("copy was given: the target is the copy, so leave it out.")
    _check_paths(source, target, overwrite)
    with _opened(source, "r") as stored:
        adata = _without_matrices(stored)
        in_memory = options.get("method", "pca") != "pca" or bool(options.get("mix"))
        counts = _counts(stored, layer, in_memory)
        if layer is None:
            adata.X = counts
        else:
            adata.layers[layer] = counts
        _check_layer(stored, adata, key_added)
        n_bytes = _size(source) + 4 * adata.n_obs * (adata.n_vars if write_layer else 0)
        check_fits_disk(n_bytes, target.parent)
        if write_layer or source.suffix != target.suffix:
            require_dask()
        if not in_memory:
            logg.info(str(estimate(chunks_of(counts, "X" if layer is None else f'layer "{layer}"'), _COMPONENTS)))
        denoise(adata, layer=layer, key_added=key_added, write_layer=False, **options)
        said = report(adata, key=key_added)
        with _beside(target, overwrite) as partial:
            start = logg.info(f"writing {target}")
            if source.suffix == target.suffix:
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, partial)
            with _opened(partial, "a") as out:
                if source.suffix != target.suffix:
                    _copy_matrices(stored, out)
                for slot in _SLOTS:
                    ad.io.write_elem(
                        out, slot, getattr(adata, slot) if slot in ("obs", "var") else dict(getattr(adata, slot))
                    )
                if "layers" not in out:
                    ad.io.write_elem(out, "layers", {})
                if key_added in out["layers"]:
                    del out["layers"][key_added]  # of an earlier result
                if write_layer:
                    scale = {name: options[name] for name in ("scale", "scale_depth") if name in options}
                    chunks = lazy(adata, key=key_added, **scale).rechunk((_ROWS, _COLUMNS))
                    ad.io.write_elem(out["layers"], key_added, chunks)
            logg.info("    written", time=start)
    return said


def _check_paths(source: Path, target: Path, overwrite: bool) -> None:
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: pass an .h5ad or .zarr file with raw counts.")
    for path, does in ((source, "read"), (target, "written")):
        if path.suffix not in _FORMATS:
            raise ValueError(f"{path} does not end in .h5ad or .zarr: those are the formats {does}.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is not a folder: make it first.")
    if target.exists() and source.samefile(target):
        raise FileExistsError(f"{target} is the source: choose another name.")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: nothing is overwritten, so choose another name, or pass overwrite.")
    if target.is_dir():
        raise FileExistsError(f"{target} is a folder, which cannot be replaced in one step: choose another name.")


def _check_layer(stored: Any, adata: AnnData, key: str) -> None:
    written = adata.uns.get(key)
    if key in stored.get("layers", ()) and not (isinstance(written, dict) and "scale_meaning" in written):
        raise ValueError(f"layer {key!r} exists and is not an earlier result: choose another key_added.")


@contextmanager
def _opened(path: Path, mode: Literal["r", "a"]) -> Iterator[Any]:
    """Open the file as a group of h5py or zarr."""
    if path.suffix == ".h5ad":
        import h5py

        with closing(h5py.File(path, mode)) as file:
            yield file
    else:
        import zarr

        # What exists has its own format; a new store that of anndata.
        new: dict[str, Any] = {"zarr_format": 3 if Version(version("anndata")) >= Version("0.13") else 2}
        new = {} if path.exists() else new
        yield zarr.open_group(path, mode=mode, **new)


def _without_matrices(stored: Any) -> AnnData:
    """Return what is not of size cells x genes, cells x cells or genes x genes."""
    found = {slot: ad.io.read_elem(stored[slot]) for slot in _SLOTS if slot in stored}
    return AnnData(**found)


def _counts(stored: Any, layer: str | None, in_memory: bool) -> Any:
    """Return the dataset with the counts, or what it holds."""
    if layer is not None and layer not in stored.get("layers", ()):
        raise ValueError(f"layer {layer!r} is missing: the file has {sorted(stored.get('layers', ()))}.")
    if layer is None and "X" not in stored:
        raise ValueError('X is missing in the file: pass the layer that holds raw counts, e.g. layer="counts".')
    element = stored["X"] if layer is None else stored["layers"][layer]
    if in_memory:
        return ad.io.read_elem(element)
    return element if hasattr(element, "shape") else ad.io.sparse_dataset(element)


def _copy_matrices(stored: Any, out: Any) -> None:
    """Copy what `_without_matrices` leaves out, a chunk at a time."""
    for name in stored:
        if name in _SLOTS:
            continue
        if name == "X":
            _copy(stored, out, name)
            continue
        out.require_group(name).attrs.update(stored[name].attrs)
        for key in stored[name]:
            _copy(stored[name], out[name], key)
    out.attrs.update(stored.attrs)


def _copy(stored: Any, out: Any, key: str) -> None:
    is_matrix = stored[key].attrs.get("encoding-type") in ("csr_matrix", "csc_matrix", "array")
    read = ad.experimental.read_elem_lazy if is_matrix else ad.io.read_elem
    ad.io.write_elem(out, key, read(stored[key]))


def _size(path: Path) -> int:
    return sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*")))


@contextmanager
def _beside(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a path beside the target that becomes it when the block ends, and is removed if it fails."""
    here = f".{target.stem}-{socket.gethostname()}-"
    for left in target.parent.glob(f"{glob.escape(here)}*{target.suffix}"):
        if not _is_running(left.stem.removeprefix(here)):
            _remove(left)
    partial = target.with_name(f"{here}{os.getpid()}{target.suffix}")
    _remove(partial)  # of a run that had the same number
    try:
        yield partial
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} has come into being meanwhile: nothing is overwritten.")
        os.replace(partial, target)
    finally:
        _remove(partial)


def _is_running(number: str) -> bool:
    import psutil

    return not number.isdigit() or psutil.pid_exists(int(number))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
