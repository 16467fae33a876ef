"""AnnData in, a denoised layer out: the one function that most people call.

Everything is computed before anything is written, so a refusal or an interrupt leaves `adata` as it was.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from ._anndata import read_batches, survey
from ._blocks import InMemory
from ._checks import (
    bounded,
    check_flag,
    check_mapping,
    check_name,
    check_one_of,
    check_positive,
    describe_counts,
    progress_bar,
    read_mask,
    read_names,
    seed_of,
)
from ._choose import Selection, combine, members_of, n_steps, select
from ._memory import check_fits_memory
from ._random import RandomState, as_generator
from ._result import Result, write
from ._slots import check_key
from ._threads import one_blas_thread
from ._transform import TransformName
from ._warnings import caveat, written_down
from .get import lazy_layer, require_dask
from .methods._autoencoder import FURTHER, WIDTHS, LossName, require_torch
from .methods._base import AutoencoderMember, MeanMember, Member, PCAMember
from .methods._neighbor_member import GRIDS, Kind, NeighborsMember
from .methods._profiles import MixedProfiles
from .scales import Scale, as_scale

Method = Literal["pca", "autoencoder", "diffusion", "knn", "ensemble"]
MemberName = Literal["pca", "autoencoder", "diffusion", "knn"]
_MEMBERS: tuple[MemberName, ...] = ("pca", "autoencoder", "diffusion")
_MAX_COMPONENTS = 100


def denoise(
    adata: AnnData,
    method: Method = "pca",
    *,
    layer: str | None = None,
    key_added: str = "denoised",
    write_layer: bool = True,
    scale: str | Scale = "counts",
    mix: bool = False,
    transform: TransformName | Literal["auto"] = "auto",
    n_components: int | None = None,
    n_splits: int = 1,
    mask_var: str | np.ndarray | Sequence[bool] | None = None,
    members: Sequence[MemberName] = _MEMBERS,
    width: int | Sequence[int] | None = None,
    loss: LossName = "multinomial",
    n_seeds: int = 1,
    batch_key: str | None = None,
    device: str = "auto",
    autoencoder: Mapping[str, Any] | None = None,
    neighbors: Mapping[str, int | Sequence[int]] | None = None,
    save_model: str | os.PathLike[str] | None = None,
    copy: bool = False,
    random_state: RandomState = 0,
) -> AnnData | None:
    """Denoise raw counts; the counts themselves say how much, and what it gained.

    Every count is split binomially into two halves that are independent given the cell's true expression. A denoiser
    learned from one half must predict the molecules of the other; how it is set (transform, weight of each principal
    component, width of an autoencoder) is what predicts them best. It is then fitted to all molecules.

    Parameters
    ----------
    adata
        Cells x genes with raw counts (UMIs) in `X` or a layer: a matrix in memory, a dataset on disk (a backed
        object, or `anndata.io.sparse_dataset`), or a Dask array. The last two are read a block of cells at a time,
        for PCA and the autoencoder without `mix`. Correct ambient RNA, doublets and batches before: both halves share
        them, so they count as signal.
    method
        `"pca"`: PCA regression with shrunken components, in the one transform that gains most. `"autoencoder"`: a
        network trained on fresh splits at every step, its width chosen (PyTorch is needed). `"diffusion"`: a random
        walk among neighbouring cells, as in MAGIC; `"knn"`: the mean of the nearest neighbours; components,
        neighbours and steps chosen. `"ensemble"`: the mean of the mean profile and `members`, with the weights under
        which held-out molecules are likeliest.
    layer
        The layer that holds raw counts; None takes `X`.
    key_added
        Name of everything that is written.
    write_layer
        False writes the factors alone, from which `sc_noise2self.get.denoised` rebuilds any genes and
        `sc_noise2self.get.lazy` makes a layer that is computed where it is read; the layer is dense, 4 bytes x cells x
        genes. Of counts that are not in memory the layer is a lazy one.
    scale
        Of the layer: `"counts"`, expected counts at each cell's own depth; `"rates"`, rows that sum to 1;
        `"log1p_cp10k"`, log1p of 10 000 x the rate; `"expected_log1p_cp10k"`, what log1p(CP10k) of a fresh sample
        of the cells' median depth averages, which lies below the former; or an object of `sc_noise2self.scales`, such
        as `ExpectedLog1pCP10k(depth=1000)`.
    mix
        Mix each cell's own counts back in, gene by gene, as much as the denoiser leaves unexplained (Noise2Self,
        section 4.2). Copies of one molecule (UMI errors, PCR) look like unexplained expression too, and predict
        held-out molecules without being biology. So compare before you believe what mixing adds, above all for
        genes with a large `.var["denoised_mixed"]`.
    transform
        `"log1p"`, `"sqrt"`, `"none"`, or `"auto"`, all three.
    n_components
        Components learned beyond the mean profile; their weights decide how many matter. None takes 100, or as many as
        there are. An autoencoder sees a cell by its scores on so many.
    n_splits
        Independent splits to average the choice over, each used in both directions.
    mask_var
        Genes that determine the components: the name of a boolean column of `var`, or a boolean array. The other
        genes are predicted from them. None uses all genes, highly variable or not. Genes chosen on these counts
        have seen both halves, so the reported gain is then a little too high.
    members
        Of the ensemble, besides the mean profile: PCA in every transform (`"pca"`), `"autoencoder"`, `"diffusion"`,
        `"knn"`, which adds little to the others. Without `"autoencoder"` it needs no PyTorch.
    width
        Of the autoencoder's bottleneck, or several to try. None tries 128, 32, 8 and 2 down to the first that predicts
        molecules set aside worse than the best does, and takes the narrowest that does not.
    loss
        That the autoencoder is trained by: `"multinomial"`, `"poisson"`, `"negative_binomial"`,
        `"masked_multinomial"` (genes hidden instead of molecules), `"mse_log1p"`, `"mse_sqrt"`,
        `"noise2same_log1p"` or `"noise2same_sqrt"`.
    n_seeds
        Autoencoders to average, each from another random start.
    batch_key
        Column of `obs` with each cell's batch: the autoencoder's decoder then knows it, so that the code of a cell
        need not. Expected counts are still those of the cell's own batch.
    device
        `"auto"` takes CUDA where there is one; `"cpu"` never touches it.
    autoencoder
        Further arguments of `sc_noise2self.methods._autoencoder.Autoencoder`: `n_hidden`, `dropout`, `learning_rate`,
        `invariance`, `prior_scale`, `n_epochs`, `batch_size`.
    neighbors
        Values of `n_pcs`, `n_neighbors` and, for `"diffusion"`, the steps `t` to choose from, one or several each; see
        `sc_noise2self.methods._neighbors`. The usual ones are tried for what is not given.
    save_model
        File to write the fitted autoencoder to, for `sc_noise2self.denoise_with`; it must not exist.
    copy
        Return a copy with the result instead of writing to `adata`.
    random_state
        Seed or generator; the same seed on the same machine gives the same bytes.

    Returns
    -------
    None, or the copy. Written, with `key_added="denoised"`:

    `.layers["denoised"]`
        Expected counts at each cell's own depth: float32, dense, non-negative; every gene keeps its total, to 0.3 % on
        average or better, 1 % below 30 cells (not with `mix`). Empty cells and unexpressed genes stay 0.
    `.obsm["denoised"]`, `.varm["denoised"]`, `.obsm["denoised_scale"]`, `.varm["denoised_scale"]`,
    `.obs["denoised_size"]`
        The factors: scores (cells, k), loadings (genes, k), the scales of cells (two columns a member) and of genes
        (one a member, then the mean profile), each with the fingerprint of the model as the last column, and the
        molecules of each cell. Their formula is that of `sc_noise2self.methods._profiles.LowRankProfiles`, for an
        ensemble the weighted mean. What was put together from several results is refused where it is read.
    `.var["denoised_gain"]`, `.var["denoised_gain_error"]`
        What each gene gained, nats per held-out molecule of it above its mean, and its standard error over cells: see
        `sc_noise2self._loss.GeneGains`. Where the gain is not clearly above 0, believe the mean, not the pattern.
    `.var["denoised_total"]`
        The molecules of each gene.
    `.var["denoised_phi"]`, `.var["denoised_mixed"]`
        With `mix=True`: each gene's dispersion around the prediction, and the mean weight of a cell's own count.
    `.uns["denoised"]`
        `method`, `version`, `params`, `scale`; the `members` chosen with their settings, weights and ranks
        (components that are more signal than noise, the width, or the components that neighbours are found in);
        under `learned`, by member, what each component is worth, its singular value on a half and the largest that
        noise alone has there, or the gain of each width with its error and the learning curve, or the gain of every
        number of components, neighbours and steps that was tried; every candidate's `gain` with the standard error of
        its difference to the best; `gain`, `gain_error` (nats per held-out molecule above the mean profile),
        `gain_molecules` and `gain_cells` that it was measured on, and `n_cells`, of how many (the error is infinite
        where fewer than two cells tell); with `mix=True` also `unmixed_gain`; `n_genes` and the `fingerprint`; and the
        `warnings`. `sc_noise2self.report` says the same in a paragraph, `sc_noise2self.remove` removes all of it.

    Raises
    ------
    ValueError, TypeError
        If the counts are not raw counts, or a parameter is out of range, or belongs to another method.
    ImportError
        If an autoencoder is asked for without PyTorch.
    MemoryError, FloatingPointError
        If the layer does not fit in memory, if the device has too little of it, or if training diverges at once.

    Nothing is written then, nor when the run is interrupted.

    Warns
    -----
    UserWarning
        If nothing beats the mean profile (which is then written), if cells are empty, if the counts look like
        reads or transposed, or if training diverges and its best state is kept.

    Notes
    -----
    Noise2Self (Batson & Royer 2019), sections 3.1 and 3.2. Denoised values are not data: tests, correlations and
    differential expression computed on them are circular (Andrews & Hemberg 2018). The gain is measured on halves;
    the result, fitted to all molecules, does better. Of more than 5 000 cells, so many, drawn at random, are enough to
    compare settings of PCA on; its components and their worth are learned from all. Candidates are compared on 2e7
    dense entries (1 000 cells of 20 000 genes), the gain of the choice and of its genes is measured on all cells, or on
    a random sample of 4e8 (20 000 cells); by neighbours on those among which they were compared. Counts are
    read a block of cells at a time (`sc_noise2self._blocks`); nothing of size cells x genes is made but the layer.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata)
    >>> adata.layers["denoised"].shape
    (700, 765)
    """
    check_one_of("method", method, get_args(Method))
    check_one_of("transform", transform, ("auto", *get_args(TransformName)))
    check_one_of("loss", loss, get_args(LossName))
    for name, flag in (("mix", mix), ("write_layer", write_layer), ("copy", copy)):
        check_flag(name, flag)
    check_name("device", device)
    if layer is not None:
        check_name("layer", layer, " To write none, pass write_layer=False.")
    if batch_key is not None:
        check_name("batch_key", batch_key)
    members = cast("tuple[MemberName, ...]", read_names("members", members, get_args(MemberName)))
    used = members if method == "ensemble" else (method,)
    of_autoencoder = {
        "width": width is not None,
        "loss": loss != "multinomial",
        "n_seeds": n_seeds != 1,
        "batch_key": batch_key is not None,
        "device": device != "auto",
        "autoencoder": autoencoder is not None,
        "save_model": save_model is not None,
    }
    of_neighbors: list[Kind] = [kind for kind in get_args(Kind) if kind in used]
    if tuple(members) != _MEMBERS and method != "ensemble":
        raise ValueError(f"members was given with method={method!r}: it belongs to method='ensemble'.")
    if transform != "auto" and "pca" not in used:
        raise ValueError(f"transform={transform!r} was given with method={method!r}: it belongs to PCA.")
    if neighbors is not None and not of_neighbors:
        raise ValueError(
            "neighbors was given, but neither diffusion nor knn is used: pass method='diffusion' or 'knn'."
        )
    if "autoencoder" not in used and any(of_autoencoder.values()):
        name = next(name for name, is_given in of_autoencoder.items() if is_given)
        raise ValueError(f"{name} was given, but no autoencoder is used: pass method='autoencoder' or 'ensemble'.")
    if autoencoder is not None:
        check_mapping("autoencoder", autoencoder, FURTHER)
    if neighbors is not None:
        kinds = of_neighbors
        check_mapping("neighbors", neighbors, sorted({n for k in kinds for n, v in GRIDS[k].items() if len(v) > 1}))
    if save_model is not None:
        _check_model_file(save_model, one=method == "autoencoder" and n_seeds == 1)
        if isinstance(adata, AnnData) and not adata.var_names.is_unique:
            raise ValueError(
                "gene names are not unique, and a model knows genes by name: adata.var_names_make_unique()."
            )
    scale = as_scale(scale)
    rng = as_generator(random_state)
    check_positive("n_splits", n_splits)
    check_positive("n_seeds", n_seeds)
    warned: list[str] = []
    with written_down(warned):
        counted = survey(adata, layer)
    n_cells, n_genes = counted.chunks.shape
    in_memory = isinstance(counted.chunks, InMemory)
    if not in_memory:
        _check_out_of_memory(adata, used, mix, write_layer, copy)
    elif write_layer:
        check_fits_memory(n_cells, n_genes)
    check_key(adata, key_added, layer)
    genes = read_mask(adata, mask_var)
    n_used = n_genes if genes is None else int(genes.sum())
    n_components = bounded("n_components", n_components, _MAX_COMPONENTS, n_cells, n_used)
    candidates: list[Member] = []
    if "pca" in used:
        transforms = get_args(TransformName) if transform == "auto" else (transform,)
        candidates += [PCAMember(name, n_components, genes) for name in transforms]
    networks: list[AutoencoderMember] = []
    if "autoencoder" in used:
        require_torch()
        options = {"loss": loss, "n_components": n_components, "device": device, **(autoencoder or {})}
        batches = None if batch_key is None else _read_several_batches(adata, batch_key)
        codes = None if batches is None else batches.cat.codes.to_numpy()
        widths = WIDTHS if width is None else _check_widths(width, n_genes)
        for number in range(1, n_seeds + 1):
            like = networks[0] if networks else None
            networks.append(AutoencoderMember(genes, codes, widths, options, like, number))
        candidates += networks
    for kind in of_neighbors:
        grid = _check_grid(neighbors or {}, n_components, n_cells)
        candidates.append(
            NeighborsMember(kind, n_components, genes, {k: v for k, v in grid.items() if k in GRIDS[kind]})
        )
    average = method == "ensemble" or n_seeds > 1
    if method == "ensemble":
        candidates.insert(0, MeanMember())
    start = logg.info(f"denoising {describe_counts(adata, layer)}")

    pcas = [member for member in candidates if isinstance(member, PCAMember)]
    total = n_steps(candidates, average, n_splits) + 1
    total += sum(member.n_passes(n_cells, n_splits) for member in (pcas if average else pcas[:1]))
    total += 2 + int(mix)  # passes that measure the gain
    with written_down(warned), one_blas_thread(), progress_bar("denoise", total) as bar:
        counted.chunks.on_pass = bar.update
        for network in networks:
            network.on_check = bar.set_postfix_str
        selection = select(
            candidates, counted.chunks, rng, average=average, mix=mix, n_splits=n_splits, on_step=bar.update
        )
        if not selection.beats_mean:
            caveat(
                f"no candidate predicts held-out molecules better than one mean profile (best gain {selection.gain}):"
                " the mean profile is written. These cells look alike, or hold too few molecules to tell them apart."
                + (" No model is saved." if save_model else ""),
                stacklevel=2,
            )
        fitted = selection.refit(counted, rng)
        profiles = combine(fitted, [choice.weight for choice in selection.choices])
        if selection.phi is not None:
            profiles = MixedProfiles.with_totals(profiles, counted.chunks.in_memory(), selection.phi)
        size = counted.size
        scale = scale.settled(size)
        dense = scale.apply(profiles.counts(), size) if write_layer and in_memory else None
        mixed = profiles.share_of_count() if isinstance(profiles, MixedProfiles) else None
        bar.update()

    params: dict[str, Any] = {
        **({} if layer is None else {"layer": layer}),
        "n_components": n_components,
        "n_splits": n_splits,
        "mix": mix,
        "mask_var": mask_var if isinstance(mask_var, str) else ("none" if mask_var is None else "array"),
        "random_state": seed_of(random_state),
        **({"transform": transform} if "pca" in used else {}),
    }
    if neighbors is not None:
        params["neighbors"] = {name: np.array(values) for name, values in neighbors.items()}
    if networks:
        params |= {"loss": loss, "n_seeds": n_seeds, "device": device, "autoencoder": dict(autoencoder or {})}
        params |= {
            name: value
            for name, value in (("width", width if width is None else np.array(width)), ("batch_key", batch_key))
            if value is not None
        }
    result = Result(
        method,
        params,
        scale,
        members_of(selection.choices, fitted),
        selection.gain,
        selection.gene_gains,
        size,
        counted.totals,
        warned,
        candidates=selection.candidates,
        unmixed_gain=None if selection.phi is None else selection.unmixed_gain,
        phi=selection.phi,
        cell_scale=profiles.cell_scale if isinstance(profiles, MixedProfiles) else None,
        mixed=mixed,
        beats_mean=selection.beats_mean,
        layer=dense,
    )
    if write_layer and not in_memory:
        result = replace(result, layer=lazy_layer(result))
    target = adata.copy() if copy else adata
    with write(target, key_added, result):
        if save_model is not None and networks[0].fitted is not None and selection.beats_mean:
            networks[0].fitted.feature_names_in_ = np.array(adata.var_names, dtype=str)
            networks[0].fitted.batch_names_ = np.array([] if batches is None else batches.cat.categories, dtype=str)
            networks[0].fitted.save(save_model)
    logg.info(
        f"    {_described(selection, [member.rank for member in result.members])}: {selection.gain}",
        time=start,
        deep=f"added\n    {key_added!r}, the denoised counts (adata.layers) and their factors (adata.obsm, .varm)\n"
        f"    {key_added!r}, what was compared and chosen (adata.uns)",
    )
    return target if copy else None


def _check_out_of_memory(adata: AnnData, used: Sequence[MemberName], mix: bool, write_layer: bool, copy: bool) -> None:
    """Refuse what needs all counts in memory where they are on disk or in a Dask array."""
    whole = [name for name in used if name in get_args(Kind)]
    if whole or mix:
        needs = "mix=True" if mix else repr(whole[0])
        raise ValueError(
            f"{needs} needs all counts in memory, and these are not: load them, adata = adata.to_memory(), or take "
            "'pca' or 'autoencoder' without mix, which read them in pieces."
        )
    if copy and adata.isbacked:
        raise ValueError("copy=True was given with a backed object: leave it out, the file itself is not written to.")
    if write_layer:
        require_dask()


def _read_several_batches(adata: AnnData, key: str) -> pd.Series:
    batches = read_batches(adata, key)
    if len(batches.cat.categories) < 2:
        raise ValueError(f"adata.obs[{key!r}] has one batch: leave batch_key out.")
    return batches


def _check_model_file(path: str | os.PathLike[str], one: bool) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"save_model is {path!r}: pass the path of a file.")
    if not one:
        raise ValueError("save_model was given, but it is for one autoencoder: pass method='autoencoder', n_seeds=1.")
    if os.path.exists(path):
        raise FileExistsError(f"{path} exists: nothing is overwritten, so choose another name.")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{Path(path).parent} is not a folder: make it first.")


def _check_widths(width: int | Sequence[int], n_genes: int) -> tuple[int, ...]:
    widths = tuple(width) if isinstance(width, Sequence) else (width,)
    for each in widths or (0,):
        check_positive("width", each)
        if each > n_genes:
            raise ValueError(f"width is {each}: a bottleneck is no wider than the {n_genes} genes.")
    return tuple(int(each) for each in widths)


def _described(selection: Selection, ranks: Sequence[int]) -> str:
    if not selection.beats_mean:
        return "the mean profile, which nothing beats; the best of what was tried"
    return "; ".join(
        ("" if choice.weight == 1 else f"{choice.weight:.2f} x ")
        + choice.label
        + (f" (rank {rank})" if isinstance(choice.member, PCAMember) else "")
        for choice, rank in zip(selection.choices, ranks, strict=True)
    )


def _check_grid(
    given: Mapping[str, int | Sequence[int]], n_components: int, n_cells: int
) -> dict[str, tuple[int, ...]]:
    """Return the values of each parameter of an average over neighbours."""
    grid = {}
    for name, values in given.items():
        grid[name] = tuple(values) if isinstance(values, Sequence) else (values,)
        for value in grid[name] or (0,):
            check_positive(name, value)
            for parameter, bound in (("n_pcs", n_components), ("n_neighbors", n_cells - 1)):
                if name == parameter and value > bound:
                    raise ValueError(f"{name} is {value}: {bound} is the most that these counts allow.")
    return grid
