"""Denoise cells that an autoencoder was not trained on, by the model that `denoise(..., save_model=)` wrote."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scanpy import logging as logg

from ._anndata import read_batches, read_csr
from ._checks import check_flag, seed_of
from ._choose import Choice, check_enough, members_of
from ._counts import column_sums, row_sums
from ._loss import Gain, GeneGains
from ._random import RandomState, as_generator
from ._result import Result, write
from ._slots import check_key
from ._split import split_matrix
from ._warnings import caveat, written_down
from .methods._autoencoder import Autoencoder, require_torch
from .methods._base import AutoencoderMember
from .methods._profiles import LowRankProfiles
from .scales import Scale, as_scale


def denoise_with(
    adata: AnnData,
    model: str | os.PathLike[str],
    *,
    layer: str | None = None,
    key_added: str = "denoised",
    write_layer: bool = True,
    scale: str | Scale = "counts",
    batch_key: str | None = None,
    device: str = "auto",
    copy: bool = False,
    random_state: RandomState = 0,
) -> AnnData | None:
    """Denoise new cells with a model fitted to others; nothing is learned from them but what it gained.

    Parameters
    ----------
    adata, layer, key_added, write_layer, scale, device, copy
        As in `denoise`. Genes are matched by `var_names`, in any order.
    model
        File that `denoise(..., save_model=)` wrote. It is read as data alone: a file from elsewhere can run no code.
    batch_key
        Column of `obs` with each cell's batch, all of them batches that the model was fitted to; needed if it was
        fitted with one.
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
    >>> n2s.denoise(old, method="autoencoder", save_model="pbmc.pt")  # doctest: +SKIP
    >>> n2s.denoise_with(new, "pbmc.pt")  # doctest: +SKIP
    """
    require_torch()
    for name, flag in (("write_layer", write_layer), ("copy", copy)):
        check_flag(name, flag)
    scale = as_scale(scale)
    rng = as_generator(random_state)
    warned: list[str] = []
    with written_down(warned):
        counts = read_csr(adata, layer)
    check_key(adata, key_added, layer)
    fitted = Autoencoder.load(model, device=device)
    order = _order_of_genes(adata, fitted.feature_names_in_)
    batch = _codes_of_batches(adata, batch_key, fitted.batch_names_)
    start = logg.info(f"denoising {adata.n_obs} cells with {model}")

    own_order = np.argsort(order)
    counts = counts[:, order]
    first, second = split_matrix(counts, random_state=rng)
    check_enough([first, second])
    halves = ((first, second), (second, first))
    gain, gene_gains = _gains([fitted.predict(seen, batch) for seen, _ in halves], halves)
    if not gain.is_clear:
        with written_down(warned):
            caveat(
                "the model predicts held-out molecules of these cells no better than their own mean profile (gain "
                f"{gain.mean:.4f} +- {gain.error:.4f}): fit one to them with sc_noise2self.denoise.",
                stacklevel=2,
            )
    profiles = fitted.predict(counts, batch)
    of_genes = {name: getattr(profiles, name)[own_order] for name in ("loadings", "gene_scale", "gene_share")}
    profiles = replace(profiles, **of_genes)
    size = row_sums(counts)
    scale = scale.settled(size)
    dense = scale.apply(profiles.counts(), size) if write_layer else None

    params = {
        **({} if layer is None else {"layer": layer}),
        "model": os.fspath(model),
        "mix": False,
        "device": device,
        "random_state": seed_of(random_state),
        **({} if batch_key is None else {"batch_key": batch_key}),
    }
    choice = Choice(AutoencoderMember(fitted=fitted), f"width {fitted.width_}", 1.0)
    gain_of_genes, error_of_genes = gene_gains
    result = Result(
        "autoencoder",
        params,
        scale,
        members_of([choice], [profiles]),
        gain,
        (gain_of_genes[own_order], error_of_genes[own_order]),
        size,
        column_sums(counts)[own_order],
        warned,
        beats_mean=gain.is_clear,
        layer=dense,
    )
    target = adata.copy() if copy else adata
    with write(target, key_added, result):
        pass
    logg.info(f"    {gain.mean:.4f} +- {gain.error:.4f} nats per held-out molecule", time=start)
    return target if copy else None


def _gains(
    predictions: Sequence[LowRankProfiles], halves: Sequence[tuple[sp.csr_matrix, sp.csr_matrix]]
) -> tuple[Gain, tuple[np.ndarray, np.ndarray]]:
    """Return the gain, and that of each gene with its error, over (seen, held out) halves."""
    held_out = [part for _, part in halves]
    gains = GeneGains([column_sums(seen) / seen.sum() for seen, _ in halves], [column_sums(part) for part in held_out])
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


def _codes_of_batches(adata: AnnData, key: str | None, names: np.ndarray) -> np.ndarray | None:
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
