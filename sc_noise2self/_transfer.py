"""Denoise cells that a model was not fitted to, by the file that `denoise(..., save_model=)` wrote."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

from . import _model
from ._anndata import read_batches, read_csr
from ._checks import check_flag, check_name, seed_of
from ._choose import check_enough
from ._counts import column_sums, row_sums
from ._loss import Gain, GeneGains
from ._random import RandomState, as_generator
from ._result import Member, Result, write
from ._slots import check_key
from ._split import split_matrix
from ._warnings import recorded_warnings, warn
from .methods import model_of
from .methods._profiles import LowRankProfiles, Profiles, combine
from .scales import Scale, as_scale


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
        As in `denoise`. Genes are matched by `var_names`, in any order.
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
    molecules from the other, above their own mean profile. Genes need not keep their totals.

    Raises
    ------
    ValueError
        If genes are missing or there are others, if a batch is unknown, or the file is not a model; and as `denoise`.

    Warns
    -----
    UserWarning
        If the model predicts these cells no better than their own mean profile.

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
    scale, rng = as_scale(scale), as_generator(random_state)
    with recorded_warnings() as warned:
        counts = read_csr(adata, layer)
        check_key(adata, key_added, layer)
        saved = _model.load(model)
        models = [model_of(state, device) for state in saved.states]
        order = _order_of_genes(adata, saved.genes)
        codes = _codes_of_batches(adata, batch_key, saved.batches)
        start = logg.info(f"denoising {adata.n_obs} cells with {os.fspath(model)}")
        counts, back = counts[:, order], np.argsort(order)

        def predicted(part: sp.csr_matrix) -> list[LowRankProfiles]:
            return [each.predict(part, codes) for each in models]

        halves = split_matrix(counts, random_state=rng)
        check_enough(halves)
        gain, gene_gains = _gains([combine(predicted(half), saved.weights) for half in halves], halves)
        if not gain.is_clear:
            warn(
                "the model predicts held-out molecules of these cells no better than their own mean profile (gain "
                f"{gain.mean:.4f} +- {gain.error:.4f}): fit one to them with sc_noise2self.denoise."
            )
        fitted = [_with_genes(profiles, back) for profiles in predicted(counts)]
    size = row_sums(counts)
    scale = scale.settled(size)
    params = {
        **({} if layer is None else {"layer": layer}),
        "model": os.fspath(model),
        "mix": False,
        "device": device,
        "random_state": seed_of(random_state),
        **({} if batch_key is None else {"batch_key": batch_key}),
    }
    result = Result(
        "model",
        params,
        scale,
        [
            Member(own.name, found.title, found.described, "", found.rank, weight, profiles, found.values)
            for own, found, weight, profiles in zip(
                models, [each.learned() for each in models], saved.weights, fitted, strict=True
            )
        ],
        gain,
        (gene_gains[0][back], gene_gains[1][back]),
        size,
        column_sums(counts)[back],
        warned,
        layer=scale.apply(combine(fitted, saved.weights).counts(), size) if write_layer else None,
    )
    target = adata.copy() if copy else adata
    with write(target, key_added, result):
        pass
    logg.info(f"    {gain.mean:.4f} +- {gain.error:.4f} nats per held-out molecule", time=start)
    return target if copy else None


def _with_genes(profiles: LowRankProfiles, order: np.ndarray) -> LowRankProfiles:
    """Return profiles with their genes in another order."""
    return replace(
        profiles, **{name: getattr(profiles, name)[order] for name in ("loadings", "gene_scale", "gene_share")}
    )


def _gains(
    predictions: Sequence[Profiles], halves: Sequence[sp.csr_matrix]
) -> tuple[Gain, tuple[np.ndarray, np.ndarray]]:
    """Return the gain, and that of each gene with its error, of what each half predicts of the other."""
    held_out = halves[::-1]
    gains = GeneGains([column_sums(seen) / seen.sum() for seen in halves], [column_sums(part) for part in held_out])
    (sums,), (nats, molecules) = gains.of_cells(predictions, held_out)
    return Gain(nats, molecules), gains.of_genes(sums)


def _order_of_genes(adata: AnnData, names: np.ndarray) -> np.ndarray:
    """Return where each gene of the model is in `adata`."""
    if not adata.var_names.is_unique:
        raise ValueError("gene names are not unique: call adata.var_names_make_unique().")
    order = adata.var_names.get_indexer(names)
    missing, extra = names[order < 0], adata.var_names.difference(names, sort=False)
    if len(missing) or len(extra):
        raise ValueError(
            f"the model was fitted to other genes: {len(missing)} of them are missing here{_some(missing)}, and "
            f"{len(extra)} here are not in it{_some(extra)}. Fit and denoise with the same genes."
        )
    return order


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if len(names) else ""


def _codes_of_batches(adata: AnnData, key: str | None, names: Sequence[str]) -> np.ndarray | None:
    """Return the model's code of each cell's batch."""
    if not len(names):
        if key is not None:
            raise ValueError(f"batch_key={key!r} was given, but the model was fitted without batches: leave it out.")
        return None
    if key is None:
        raise ValueError(f"the model was fitted with batches ({', '.join(names)}): pass batch_key.")
    labels = read_batches(adata, key)
    unknown = [name for name in labels.cat.categories if str(name) not in names]
    if unknown:
        raise ValueError(
            f"batches unknown to the model: {', '.join(map(str, unknown[:5]))}. It knows {', '.join(names)}."
        )
    return pd.Index(names).get_indexer(labels.astype(str))
