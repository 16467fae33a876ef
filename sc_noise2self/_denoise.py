"""AnnData in, a denoised layer out: the one function that most people call.

Counts are read and checked, methods are compared on them and refitted, and the result is written. Everything is
computed before anything is written, so a refusal or an interrupt leaves `adata` as it was.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scanpy import logging as logg

from . import _model
from ._anndata import as_counts
from ._blocks import Counts, InMemory
from ._checks import as_whole, check_flag, check_name, check_path, describe_counts, describe_mask, seed_of
from ._choose import Selection, numbered, select
from ._counts import depth_of
from ._memory import check_fits_memory
from ._random import RandomState, as_generator
from ._replace import check_target
from ._result import Member, Result, described_by, write
from ._slots import check_key
from ._threads import one_blas_thread
from ._warnings import recorded_warnings, warn
from .get import layer_of, require_dask
from .methods import as_methods, is_ensemble
from .methods._base import Method
from .methods._mixing import scales_of_cells
from .methods._profiles import computed
from .scales import Scale, as_scale


def denoise(
    adata: AnnData,
    method: str | Method | Sequence[str | Method] = "pca",
    *,
    layer: str | None = None,
    mask_var: str | np.ndarray | Sequence[bool] | None = None,
    n_splits: int = 1,
    mix: bool = False,
    scale: str | Scale = "counts",
    key_added: str = "denoised",
    write_layer: bool = True,
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
        Cells x genes with raw counts (UMIs) in `X` or a layer: a matrix in memory, a dataset on disk (a backed object,
        or `anndata.io.sparse_dataset`), or a Dask array. The last two are read a block of cells at a time. Correct
        ambient RNA, doublets and batches before: both halves share them, so they count as signal. Of a MuData object
        pass the modality, `mdata["rna"]`: the result is written to it, and so is in `mdata`.
    method
        What to denoise by: an object that holds its own options, or the name of one at its defaults. `"pca"`
        (`sc_noise2self.PCA`): PCA regression, fast, a good first look. `"autoencoder"` (`sc_noise2self.Autoencoder`): a
        network, which needs PyTorch. `"diffusion"` (`sc_noise2self.Diffusion`): a random walk among neighbouring cells,
        as in MAGIC; `"knn"` (`sc_noise2self.KNN`): the mean of the nearest; `"clusters"` (`sc_noise2self.Clusters`):
        that of a Leiden cluster. Any function: `sc_noise2self.Function`. `"ensemble"`, or a list of any of these: their
        mean and that of the mean profile, with the weights under which held-out molecules are likeliest (an
        autoencoder's networks of halves, which come to the result later, add half of its weight each); by name PCA,
        autoencoder and diffusion.
    layer
        The layer that holds raw counts; None takes `X`.
    mask_var
        Genes that determine which cells are alike: the name of a boolean column of `var`, a boolean array, or a Series,
        which goes by its index. The other genes are predicted from them. None uses all genes, highly variable or not.
        Genes chosen on these counts have seen both halves, so the reported gain is then a little too high.
    n_splits
        Independent splits to average the choice over, each used in both directions.
    mix
        Mix each cell's own counts back in, gene by gene, as much as the denoiser leaves unexplained (Noise2Self,
        section 4.2), and as much of them as is news to the prediction. Copies of one molecule (UMI errors, PCR) look
        like unexplained expression too, and predict held-out molecules without being biology. So compare before you
        believe what mixing adds, above all for genes with a large `.var["denoised_mixed"]`.
    scale
        Scale of the layer: `"counts"`, expected counts at each cell's own depth; `"rates"`, rows that sum to 1;
        `"log1p_cp10k"`, log1p of 10 000 x the rate; `"expected_log1p_cp10k"`, what log1p(CP10k) of a fresh sample of
        the median depth averages, which lies below the former; or an object of `sc_noise2self.scales`.
    key_added
        Name of everything that is written.
    write_layer
        False writes the factors alone, from which `sc_noise2self.get.denoised` rebuilds any genes and
        `sc_noise2self.get.lazy` makes a layer that is computed where it is read; the layer is dense, 4 bytes x cells x
        genes. Of counts that are not in memory the layer is a lazy one.
    save_model
        File to write the fitted model to, for `sc_noise2self.denoise_with`; it must not exist. What `mix=True` mixes in
        is not of the model.
    copy
        Return a copy with the result instead of writing to `adata`.
    random_state
        Seed or generator, NumPy's old kind too; the same seed on the same machine gives the same bytes.

    Returns
    -------
    None, or the copy. Written, with `key_added="denoised"`:

    `.layers["denoised"]`
        Expected counts at each cell's own depth: float32, dense, non-negative; every gene keeps its total, to 0.3 % on
        average or better, 1 % below 30 cells (not with `mix`). Empty cells and unexpressed genes stay 0.
    `.obsm["denoised"]`, `.varm["denoised"]`, `.obsm["denoised_scale"]`, `.varm["denoised_scale"]`,
    `.obs["denoised_size"]`
        The factors: scores (cells, k), loadings (genes, k), the scales of cells (three columns a member, the last its
        population) and of genes (of a member its scale and what its populations say, then the mean profile), each with
        the fingerprint of the model as the last column, and the molecules of each cell. Their formula is in
        `docs/method.md`, for an ensemble the weighted mean. What was put together from several results is refused where
        it is read. A function has no factors: the layer is all there is.
    `.var["denoised_gain"]`, `.var["denoised_gain_error"]`
        What each gene gained, nats per held-out molecule of it above its mean, and its standard error over cells, NaN
        where fewer than 40 cells hold one. Where the gain is not clearly above 0, believe the mean, not the pattern.
    `.var["denoised_total"]`
        The molecules of each gene.
    `.var["denoised_phi"]`
        Squared coefficient of variation of each gene's true rate around the prediction, where that is the gene's mean:
        how sure a value is, see `sc_noise2self.get.interval`.
    `.var["denoised_mixed"]`
        With `mix=True`: the mean weight of a cell's own count.
    `.obs["denoised_cell_scale"]`
        With `mix=True`: what gives each mixed cell its size.
    `.obs["denoised_gain"]`, `.obs["denoised_coverage"]`
        What each cell gained, nats per held-out molecule, and the share of its held-out counts, of genes drawn at
        random, inside their 90 % interval; NaN where it was not measured.
    `.uns["denoised"]`
        `method`, `version`, `params`, `scale`; the `members` chosen with their settings, weights and ranks
        (components that are more signal than noise, the width, or the components that neighbours are found in), the
        number of populations and the height of the floor; under `learned`, by member, what each component is worth, its
        singular value on a half and the largest that noise alone has there, or a `table` of what was compared inside
        the method; every candidate's `gain` with the
        standard error of its difference to the best; `gain`, `gain_error` (nats per held-out molecule above the mean
        profile), `phi_power`, by which dispersions change with expected counts, `evidence`, the share of a cell's own
        count that is mixed in, `coverage`, a table of how often intervals held held-out counts, by tenths of genes and
        of cells;
        `gain_molecules` and `gain_cells` that it was measured on, and `n_cells`, of how many (the error is
        infinite where fewer than two cells tell); with `mix=True` also `unmixed_gain`; `n_genes` and the
        `fingerprint`; and the `warnings`. `sc_noise2self.report` says the same in a paragraph,
        `sc_noise2self.remove` removes all of it.

    Raises
    ------
    ValueError, TypeError
        If the counts are not raw counts, or a parameter is out of range.
    ImportError
        If an autoencoder is asked for without PyTorch, or a lazy layer without Dask.
    FileExistsError, FileNotFoundError
        If `save_model` exists, or its folder does not.
    MemoryError, FloatingPointError
        If the layer does not fit in memory, if the device has too little of it, or if training diverges at once.

    Nothing is written then, nor when the run is interrupted.

    Warns
    -----
    UserWarning
        If nothing beats the mean profile (which is then written), if cells are empty, if cells have exactly the counts
        of others (a sample was read twice), if the counts look like reads or transposed, if training diverges and its
        best state is kept, or if a device takes half a batch alone.

    Notes
    -----
    Noise2Self (Batson & Royer 2019), sections 3.1 and 3.2. Denoised values are not data: tests, correlations and
    differential expression computed on them are circular (Andrews & Hemberg 2018). The gain is measured on halves;
    the result, fitted to all molecules, does better. Of more than 5 000 cells, so many, drawn at random, are enough to
    compare settings of PCA on (20 000 of neighbours, 50 000 of networks); what is chosen learns from all. Candidates
    are compared on 2e7 dense entries (1 000 cells of 20 000 genes), the gain of the choice and of its genes is measured
    on all cells, or on a random sample of 4e8 (20 000 cells); by neighbours on those among which they were compared.
    Nothing of size cells x genes is made but the layer, or where it takes less than 200 MB. Work goes on in as many
    threads as there are cores, or as the environment variable `LOKY_MAX_CPU_COUNT` says, which changes no value;
    PyTorch's are `torch.set_num_threads`.

    Examples
    --------
    >>> import sc_noise2self as n2s
    >>> adata = n2s.datasets.pbmc68k_reduced()
    >>> n2s.denoise(adata)
    >>> adata.layers["denoised"].shape
    (700, 765)
    """
    rng = as_generator(random_state)
    name, methods = as_methods(method)
    scale = as_scale(scale)
    for flag, given in (("mix", mix), ("write_layer", write_layer), ("copy", copy)):
        check_flag(flag, given)
    if layer is not None:
        check_name("layer", layer, " To write none, pass write_layer=False.")
    as_whole("n_splits", n_splits)
    with recorded_warnings() as warned, one_blas_thread():
        counts = as_counts(adata, layer, mask_var, [key for each in methods for key in each.columns])
        check_key(adata, key_added, layer)
        methods = [each.checked(counts) for each in methods]
        check_room(adata, methods, counts, write_layer, copy)
        _check_model_file(save_model, methods, counts)
        start = logg.info(f"denoising {describe_counts(adata, layer)}")
        selection = select(methods, counts, rng, average=is_ensemble(method), mix=mix, n_splits=n_splits)
        if not selection.beats_mean:
            warn(
                "no candidate predicts held-out molecules better than one mean profile (best gain "
                f"{selection.unmixed_gain}): the mean profile is written. These cells look alike, or hold too few "
                "molecules to tell them apart." + (" No model is saved." if save_model else "")
            )
        result = result_of(
            counts,
            layer,
            scale,
            random_state,
            write_layer,
            method=name,
            params={
                "n_splits": n_splits,
                "mix": mix,
                "mask_var": describe_mask(mask_var),
                "methods": {f"{i} {each.name}": _options(each) for i, each in enumerate(methods)},
            },
            members=_members(selection, counts, rng, mix),
            gain=selection.gain,
            measured=selection.measured,
            gene_gains=selection.gene_gains,
            warnings=warned,
            candidates=_candidates(selection),
            unmixed_gain=selection.unmixed_gain if mix else None,
            dispersion=selection.dispersion,
            coverage=selection.coverage,
            beats_mean=selection.beats_mean,
        )
    target = adata.copy() if copy else adata
    with write(target, key_added, result):
        if save_model is not None and selection.beats_mean:
            _model.save(save_model, _saved(selection, result, counts))
    logg.info(
        f"    {_described(result)}: {selection.gain}",
        time=start,
        deep=f"added\n    {key_added!r}, the denoised counts (adata.layers) and their factors (adata.obsm, .varm)\n"
        f"    {key_added!r}, what was compared and chosen (adata.uns)",
    )
    return target if copy else None


def check_room(adata: AnnData, methods: Sequence[Method], counts: Counts, write_layer: bool, copy: bool) -> None:
    """Refuse what does not fit in memory, or cannot be made of counts that are not in memory."""
    if not write_layer and not all(method.has_factors for method in methods):
        raise ValueError("write_layer=False was given with a function, which has no factors: leave it out.")
    if copy and adata.isbacked:
        raise ValueError("copy=True was given with a backed object: leave it out, the file itself is not written to.")
    if isinstance(counts.chunks, InMemory):
        if write_layer:
            check_fits_memory(*counts.chunks.shape)
        return
    if whole := [method.name for method in methods if method.needs_memory]:
        raise ValueError(
            f"{whole[0]!r} needs all counts in memory, and these are not: load them, adata = adata.to_memory(), or "
            "take a method that reads them in pieces, such as 'pca'."
        )
    if write_layer:
        require_dask()


def _check_model_file(path: str | os.PathLike[str] | None, methods: Sequence[Method], counts: Counts) -> None:
    """Refuse a file that cannot be written, and methods of which there is no model."""
    if path is None:
        return
    if other := [method.name for method in methods if not method.can_transfer]:
        raise ValueError(f"save_model was given with {other[0]!r}, which knows no cells but these: leave it out.")
    if not counts.gene_names.is_unique:
        raise ValueError("gene names are not unique, and a model knows genes by name: adata.var_names_make_unique().")
    if len({method.columns for method in methods if method.columns}) > 1:
        raise ValueError("save_model was given with methods of several batch_key: a model has one.")
    check_path("save_model", path)
    check_target(Path(path), overwrite=False)


def result_of(
    counts: Counts, layer: str | None, scale: Scale, random_state: RandomState, write_layer: bool, **fields: Any
) -> Result:
    """Return all that is to be written, `fields` by their names in `Result`, with the layer where one is wanted."""
    where = {} if layer is None else {"layer": layer}
    fields["params"] = {**where, **fields["params"], "random_state": seed_of(random_state)}
    fields["dispersion"] = fields["dispersion"]._replace(level=counts.totals / len(counts.size))
    depth = depth_of(counts.size)
    result = Result(size=counts.size, totals=counts.totals, depth=depth, scale=scale.settled(depth), **fields)
    if result.params["mix"]:
        cell_scale, mixed = scales_of_cells(counts.chunks, result.profiles, result.dispersion)
        result = replace(result, cell_scale=cell_scale, mixed=mixed)
    if write_layer:
        return replace(result, layer=layer_of(result, counts))
    if not result.factored:
        raise ValueError("write_layer=False was given with a method that returns no factors: leave it out.")
    return result


def _members(selection: Selection, counts: Counts, rng: np.random.Generator, mix: bool) -> list[Member]:
    """Return what was chosen, fitted to all molecules, each part of a mean; in memory where counts are mixed in."""
    parts, members, written = selection.refit(counts, rng), [], set()
    for (choice, profiles, weight), name in zip(
        parts, numbered([part.choice.learner.kind for part in parts]), strict=True
    ):
        learned = choice.learner.learned(choice.setting)
        if choice in written:  # once is enough
            learned = replace(learned, values={})
        written.add(choice)
        members.append(Member(name, str(choice.setting), weight, computed(profiles) if mix else profiles, learned))
    return members


def _candidates(selection: Selection) -> pd.DataFrame:
    """Return the gain of everything that was compared, and what was chosen."""
    table = selection.comparison.table(gain=True)[["label", "gain", "error"]]
    chosen = [choice.label for choice in selection.choices]
    return table.assign(chosen=table["label"].isin(chosen))


def _saved(selection: Selection, result: Result, counts: Counts) -> _model.Saved:
    """Return what a model file keeps."""
    states = tuple(state for choice in selection.choices for state in choice.learner.states())
    column = next(iter(counts.columns.values()), None)
    batches = () if column is None else tuple(str(name) for name in column.cat.categories)
    weights = tuple(float(each.weight) for each in result.members)
    return _model.Saved(states, weights, np.array(counts.gene_names, dtype=str), batches)


def _options(method: Method) -> dict[str, Any]:
    """Return the options of a method as files keep them."""
    found = {each.name: getattr(method, each.name) for each in fields(method)}  # type: ignore[arg-type]
    return {name: _plain(value) for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Sequence) and all(isinstance(each, int | float) for each in value):
        return np.array(value)
    return getattr(value, "__qualname__", None) or str(value)


def _described(result: Result) -> str:
    if not result.beats_mean:
        return "the mean profile, which nothing beats; the best of what was tried"
    weights = described_by(
        [each.learned.described for each in result.members], [each.weight for each in result.members]
    )
    return "; ".join(name if len(weights) == 1 else f"{weight:.2f} x {name}" for name, weight in weights.items())
