"""Denoise cells that a model was not fitted to, by the file that `denoise(..., save_model=)` wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

from . import _model
from ._anndata import as_counts
from ._blocks import Block, Counts, Partial
from ._checks import check_flag, check_name, check_path, describe_counts
from ._choose import Measurement, numbered
from ._denoise import check_room, result_of
from ._random import RandomState, as_generator, as_key
from ._result import Member, write
from ._slots import check_key
from ._threads import one_blas_thread
from ._uncertainty import Dispersions
from ._warnings import recorded_warnings, warn
from .methods import model_of
from .methods._base import Sample
from .methods._profiles import N_SCALES, LowRankProfiles, Profiles, combine, scales_from
from .scales import Scale, as_scale

_Predict = Callable[[sp.csr_matrix, np.ndarray], list[LowRankProfiles]]


def denoise_with(
    adata: AnnData,
    model: str | os.PathLike[str],
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    scale: str | Scale = "counts",
    key_added: str = "denoised",
    write_layer: bool = True,
    device: str = "auto",
    copy: bool = False,
    random_state: RandomState = 0,
) -> AnnData | None:
    """Denoise new cells with a model fitted to others; nothing is learned from them but what it gained.

    Parameters
    ----------
    adata, layer, scale, key_added, write_layer, copy
        As in `denoise`; counts may be on disk or Dask's. Genes are matched by `var_names`, in any order.
    model
        File that `denoise(..., save_model=)` wrote. It is read as data alone: a file from elsewhere can run no code.
    batch_key
        Column of `obs` with each cell's batch, all of them batches that the model was fitted to; needed if it was
        fitted with one.
    device
        Device of an autoencoder, as in `sc_noise2self.Autoencoder`.
    random_state
        Seed of the split that measures the gain.

    Returns
    -------
    None, or the copy. Written as by `denoise`; `.uns[key_added]["gain"]` is that of predicting one half of these cells'
    molecules from the other, above their own mean profile. Of cells that the model was fitted to it is too high, since
    the model has seen both halves. Genes need not keep their totals.

    Raises
    ------
    ValueError
        If genes are missing or there are others, if a batch is unknown, or the file is not a model; and as `denoise`.
    FileNotFoundError
        If there is no such file.

    Warns
    -----
    UserWarning
        If the model predicts these cells no better than their own mean profile, or was fitted to exactly these.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> old, new = adata[:500].copy(), adata[500:].copy()
    >>> n2s.denoise(old, save_model="pbmc.npz")  # doctest: +SKIP
    >>> n2s.denoise_with(new, "pbmc.npz")  # doctest: +SKIP
    """
    for name, flag in (("write_layer", write_layer), ("copy", copy)):
        check_flag(name, flag)
    check_name("device", device)
    check_path("model", model)
    scale, rng = as_scale(scale), as_generator(random_state)
    with recorded_warnings() as warned, one_blas_thread():
        counts = as_counts(adata, layer, columns=() if batch_key is None else (batch_key,))
        check_key(adata, key_added, layer)
        check_room(adata, (), counts, write_layer, copy)
        saved = _model.load(model)
        order = _order_of_genes(counts.gene_names, saved.genes)
        models = [model_of(_model.of_genes(state, order), device) for state in saved.states]
        predict = partial(_predicted, models, _codes_of_batches(counts, batch_key, saved.batches))
        start = logg.info(f"denoising {describe_counts(adata, layer)} with {os.fspath(model)}")
        sample = Sample.of(counts.chunks, [as_key(rng)], np.arange(len(counts.size)))

        def predict_half(_: int, seen: sp.csr_matrix, cells: np.ndarray) -> Profiles:
            return combine(predict(seen, cells), saved.weights)

        gain, gene_gains = Measurement(sample)(predict_half)
        dispersions = Dispersions.learned(predict_half, sample)
        if all(_was_fitted_to(state, order, counts) for state in saved.states):
            warn(
                "the model was fitted to these very cells, so it has seen both halves of their molecules: the gain is "
                "too high. That of the fit is the one to believe."
            )
        if not gain.is_clear:
            warn(
                "the model predicts held-out molecules of these cells no better than their own mean profile (gain "
                f"{gain.mean:.4f} +- {gain.error:.4f}): fit one to them with sc_noise2self.denoise."
            )
        of_batches = {} if batch_key is None else {"batch_key": batch_key}
        result = result_of(
            counts,
            layer,
            scale,
            random_state,
            write_layer,
            method="model",
            params={"model": os.fspath(model), "mix": False, "device": device, **of_batches},
            members=_members(models, saved.weights, predict, counts),
            gain=gain,
            measured=sample.cells,
            dispersion=dispersions.of_all,
            coverage=dispersions.coverage(predict_half, sample, mix=False),
            gene_gains=gene_gains,
            warnings=warned,
        )
    target = adata.copy() if copy else adata
    with write(target, key_added, result):
        pass
    logg.info(f"    {gain}", time=start)
    return target if copy else None


def _was_fitted_to(state: _model.State, order: np.ndarray, counts: Counts) -> bool:
    """Return whether every gene has exactly the share of the counts that it had of those of the fit."""
    share = counts.totals / counts.totals.sum()
    return np.array_equal(state.arrays["gene_share"][order].astype(np.float32), share.astype(np.float32))


def _predicted(
    models: Sequence[Any], codes: np.ndarray | None, counts: sp.csr_matrix, cells: np.ndarray
) -> list[LowRankProfiles]:
    """Return what each model predicts of some cells, CSR of shape (cells, genes), with the codes of all batches."""
    return [model.predict(counts, None if codes is None else codes[cells]) for model in models]


def _members(models: Sequence[Any], weights: Sequence[float], predict: _Predict, counts: Counts) -> list[Member]:
    """Return the profiles of all cells as members of the result, in one pass over the counts."""

    def of_cells(block: Block) -> Partial:
        found = [profiles.scaled(n_rounds=0) for profiles in predict(block.counts, block.cells)]
        return Partial(rows=[*(own.scores for own in found), *(own.scales() for own in found)])

    first = np.arange(2)
    some = predict(counts.chunks.take(first), first)
    widths = [own.scores.shape[1] for own in some] + [N_SCALES] * len(some)
    rows = cast("list[np.ndarray]", counts.chunks.rows(of_cells, widths))  # or Dask's
    size = counts.size.astype(np.float32)
    fitted = [
        replace(own, scores=scores, size=size, **scales_from(scales))
        for own, scores, scales in zip(some, rows[: len(some)], rows[len(some) :], strict=True)
    ]
    names = numbered([model.name for model in models])
    return [
        Member(name, "", weight, profiles, model.learned())
        for name, weight, profiles, model in zip(names, weights, fitted, models, strict=True)
    ]


def _order_of_genes(names: pd.Index, known: np.ndarray) -> np.ndarray:
    """Return where each gene of the counts is in the model, whose genes are `known`."""
    if not names.is_unique:
        raise ValueError("gene names are not unique: call adata.var_names_make_unique().")
    fitted_to = pd.Index(known)
    missing, extra = fitted_to.difference(names, sort=False), names.difference(fitted_to, sort=False)
    if len(missing) or len(extra):
        raise ValueError(
            f"the model was fitted to other genes: {len(missing)} of them are missing here{_some(missing)}, and "
            f"{len(extra)} here are not in it{_some(extra)}. Fit and denoise with the same genes."
        )
    return fitted_to.get_indexer(names)


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if len(names) else ""


def _codes_of_batches(counts: Counts, key: str | None, known: Sequence[str]) -> np.ndarray | None:
    """Return the model's code of each cell's batch; `known` are the batches it was fitted to."""
    if not known:
        if key is not None:
            raise ValueError(f"batch_key={key!r} was given, but the model was fitted without batches: leave it out.")
        return None
    if key is None:
        raise ValueError(f"the model was fitted with batches ({', '.join(known)}): pass batch_key.")
    labels = counts.columns[key].astype(str)
    unknown = [name for name in labels.unique() if name not in known]
    if unknown:
        raise ValueError(f"batches unknown to the model: {', '.join(unknown[:5])}. It knows {', '.join(known)}.")
    return pd.Index(known).get_indexer(labels)
