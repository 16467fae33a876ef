"""What `denoise` wrote, read back as profiles and values by position, and the counts that belong to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from ._anndata import checked_block, chunks_of
from ._blocks import Block, Chunks, Partial
from ._counts import NotACount, column_sums, row_sums
from ._errors import NotThere
from ._intervals import Belief
from ._result import GeneFactors
from ._slots import as_array, check_not_transposed, in_memory, is_stamped, kind_of, named, owned, results_in
from .methods._dispersion import Dispersion
from .methods._profiles import Index, MixedProfiles, Profiles
from .scales import Scale, as_scale

Source = Literal["factors", "layer"]

# Of a record, and of its parameters; what else it holds is for one method or another.
_NEEDED = {
    *("method", "version", "params", "scale", "scale_meaning", "members", "warnings"),
    *("gain", "gain_error", "gain_molecules", "gain_cells", "beats_mean", "has_factors", "fingerprint"),
    *("n_cells", "n_genes", "n_molecules", "depth", "phi_power", "evidence", "coverage"),
}
_AXES = {"gene": "var", "cell": "obs"}
_NEEDED_PARAMS = {"mix", "random_state"}


def record(adata: AnnData, key: str) -> Mapping[str, Any]:
    """Return what `sc_noise2self.denoise` wrote to `.uns[key]`, if cells and genes belong to the same result.

    Whatever reads a result begins here.
    """
    check_not_transposed(adata, key)
    if kind_of(adata, key) != "denoise":
        raise NotThere(_what_is_there(adata, key))
    found, strange = in_memory(adata.uns[key]), []
    missing = sorted((_NEEDED - set(found)) | (_NEEDED_PARAMS - set(found["params"])))
    if "fingerprint" in missing:
        strange.append("its record in adata.uns holds only what they share")
    elif missing:
        raise ValueError(f"the record of result {key!r} in adata.uns has lost {', '.join(missing)}: {_again(key)}.")
    else:
        for slot, what in (("varm", "genes"), ("obsm", "cells")):
            scales = getattr(adata, slot).get(f"{key}_scale")
            if scales is not None and not is_stamped(scales, int(found["fingerprint"])):
                strange.append(f"its {what} (adata.{slot}) do not belong to the record in adata.uns")
    if strange:
        raise ValueError(
            f"result {key!r} was put together from several: {strange[0]}, as after anndata.concat of objects that were "
            f"denoised one by one. To denoise them together, {_again(key)}; to read results of one object each, do so "
            "before they are joined."
        )
    return found


def _what_is_there(adata: AnnData, key: str) -> str:
    """Return what stands under a key that is not of `denoise`, and what to do, for a message."""
    kind = kind_of(adata, key)
    left = [(slot, name) for slot, name in owned(adata, key) if slot != "uns"]
    if kind is not None and set(left) <= {("layers", key)}:
        where = f"adata.layers[{key!r}]" if left else f"adata.uns[{key!r}]"
        return f"{key!r} is a result of {kind}, not of denoise: read {where}, or plot it with sc_noise2self.pl.loss."
    if left:
        return (
            f"the record of result {key!r} is gone from adata.uns, as after anndata.concat or where something else "
            f"was written there, while {named(left)} left: join parts of one result with anndata.concat(..., "
            f"merge='same', uns_merge='same'), which keeps it; otherwise {_again(key)}."
        )
    return (
        f"there is no result {key!r}: run sc_noise2self.denoise(adata, key_added={key!r}), or pass another key: "
        f"the results in adata are {results_in(adata, 'denoise')}."
    )


def _again(key: str) -> str:
    return f"call sc_noise2self.remove(adata, {key!r}) and denoise again"


def has_all_cells(adata: AnnData, key: str) -> bool:
    """Return whether the cells here are those that were denoised, each once; a part of others may be as many."""
    written = record(adata, key)
    if adata.n_obs != int(written["n_cells"]) or not adata.obs_names.is_unique:
        return False
    return f"{key}_size" not in adata.obs or int(sizes(adata, key).sum()) == int(written["n_molecules"])


def has_all_genes(adata: AnnData, key: str) -> bool:
    """Return whether the genes here are those that were denoised."""
    return adata.n_vars == int(record(adata, key)["n_genes"])


def sizes(adata: AnnData, key: str) -> np.ndarray:
    """Return the molecules of each cell as `denoise` saw them, shape (cells,)."""
    record(adata, key)
    if f"{key}_size" not in adata.obs:
        raise NotThere(f"adata.obs[{f'{key}_size'!r}], the molecules of each cell, is gone: run denoise again.")
    return adata.obs[f"{key}_size"].to_numpy()


def gene_factors(adata: AnnData, key: str) -> GeneFactors:
    """Return what a result knows of genes; it holds nothing else of `adata`."""
    written = record(adata, key)
    if not written["has_factors"]:
        raise ValueError(
            f"result {key!r} has no factors, because {written['method']} returns values instead: its layer is all "
            f"there is, adata.layers[{key!r}], or sc_noise2self.get without source='factors'."
        )
    names = [key, f"{key}_scale"]
    if any(name not in slot for slot in (adata.obsm, adata.varm) for name in names):
        raise NotThere(f"the factors of {key!r} are gone from adata.obsm or adata.varm: pass source='layer'.")
    loadings, scales = (np.asarray(as_array(adata.varm[name])) for name in names)
    return GeneFactors(written["members"], loadings, scales, int(written["fingerprint"]))


def profiles(adata: AnnData, key: str = "denoised", layer: str | None = None) -> Profiles:
    """Return the profiles that `sc_noise2self.denoise` wrote in factors under `key`.

    Counts that were mixed in are read where they are asked for.
    """
    factors = gene_factors(adata, key)
    scores, scales = (np.asarray(as_array(adata.obsm.get(name))) for name in (key, f"{key}_scale"))
    combined = factors.profiles(scores, scales, sizes(adata, key))
    if not record(adata, key)["params"]["mix"]:
        return combined
    if f"{key}_phi" not in adata.var or f"{key}_cell_scale" not in adata.obs:
        raise NotThere(f"the weights of the counts that were mixed into {key!r} are gone: pass source='layer'.")
    cell_scale = adata.obs[f"{key}_cell_scale"].to_numpy()
    return MixedProfiles(combined, observed(adata, key, layer, to_mix=True), _dispersion(adata, key), cell_scale)


def _dispersion(adata: AnnData, key: str) -> Dispersion:
    """Return how widely rates lie around expected counts."""
    of_genes, written = [f"{key}_phi", f"{key}_total"], record(adata, key)
    for name in of_genes:
        if name not in adata.var:
            raise NotThere(f"adata.var[{name!r}], which tells the dispersion of each gene, is gone: {_again(key)}.")
    phi, total = np.asarray(in_memory(adata.var[of_genes])).T
    return Dispersion(phi, total / written["n_cells"], float(written["phi_power"]), float(written["evidence"]))


def values_of(
    adata: AnnData,
    key: str,
    rows: Index,
    columns: Index,
    scale: Scale,
    *,
    source: Source | None = None,
    layer: str | None = None,
) -> np.ndarray:
    """Return denoised values by position, float32 of shape (cells asked, genes asked); see `get.denoised`."""
    size, written = sizes(adata, key), record(adata, key)
    scale = scale.settled(written["depth"])
    has_factors = bool(written["has_factors"])
    if source == "factors" or (source is None and has_factors):
        return scale.apply(profiles(adata, key, layer).counts(rows, columns), size[rows])
    if key not in adata.layers:
        raise NotThere(
            f"there is no layer {key!r}: {'pass source=' + repr('factors') if has_factors else _again(key)}."
        )
    values = np.array(adata.layers[key][rows][:, columns], dtype=np.float32)
    if written["scale"] == "counts":
        return scale.apply(values, size[rows])
    params = dict(written.get("scale_params", {}))  # empty ones get lost in anndata.concat
    if (written["scale"], params) != (scale.name, scale.params):
        of = f" of {', '.join(f'{name} {value:g}' for name, value in params.items())}" if params else ""
        raise ValueError(
            f"the layer {key!r} is on the scale {written['scale']!r}{of}: pass that scale"
            f"{', or source=' + repr('factors') if has_factors else ''}."
        )
    return values


def beliefs(adata: AnnData, key: str, rows: Index, columns: Index) -> Belief:
    """Return how the rates of some cells and genes are distributed, by position."""
    written, dispersion = record(adata, key), _dispersion(adata, key)
    if not written["has_factors"] and written["scale"] != "counts":
        raise ValueError(
            f"intervals are of expected counts, and all there is of {key!r} is a layer on the scale "
            f'{written["scale"]!r}: denoise with scale="counts", and ask for the interval on that scale.'
        )
    if not written["params"]["mix"]:
        expected = values_of(adata, key, rows, columns, as_scale("counts"))
        return Belief.around(expected, dispersion.at(expected, columns))
    mixed = profiles(adata, key)
    assert isinstance(mixed, MixedProfiles)
    own = mixed.observed.part(rows, columns)
    expected = mixed.profiles.counts(rows, columns)
    belief = Belief.around(expected, dispersion.at(expected, columns), own.toarray(), dispersion.evidence)
    return belief.times(mixed.cell_scale[rows][:, None])


def observed(adata: AnnData, key: str, layer: str | None = None, *, to_mix: bool = False) -> Chunks:
    """Return the counts that were denoised, wherever they are: one pass over them makes sure that they still are those.

    `layer` is where they are now, None for where they were. For the messages, `to_mix` says that they are mixed in
    rather than shown.
    """
    guess = " (normalised since?)" if layer is None else ""
    layer = record(adata, key)["params"].get("layer") if layer is None else layer
    name = "adata.X" if layer is None else f"layer {layer!r}"
    matrix = adata.X if layer is None else adata.layers.get(layer)
    # The other way out where counts are mixed in; a plot of them has none.
    or_layer = "; sc_noise2self.get reads a denoised layer with source='layer'" if to_mix else ""
    if matrix is None:
        layers = [each for each in adata.layers if each is not None]
        raise NotThere(
            f"{name} with the counts that were denoised to {key!r} is gone: pass layer= to a plot"
            f"{or_layer}; adata.layers has {layers}."
        )
    chunks = chunks_of(matrix, name)
    if _are_those_denoised(adata, key, chunks):
        return chunks
    holds = next((each for each in adata.layers if each != layer and _holds(adata, key, each)), None)
    if holds is None:
        now = (
            'keep them, adata.layers["counts"] = adata.X.copy() before normalising and denoise(adata, layer="counts"), '
            "and where they are in a layer now, pass layer= to the plot"
        )
    elif to_mix:
        slot = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
        now = f"put them back, {slot} = adata.layers[{holds!r}].copy(), or pass layer={holds!r} to a plot"
    else:
        now = f"pass layer={holds!r} to the plot"
    raise ValueError(f"{name} does not hold the counts that were denoised to {key!r} any more{guess}: {now}{or_layer}.")


def _are_those_denoised(adata: AnnData, key: str, chunks: Chunks, *, clearly: bool = False) -> bool:
    """Whether molecules of cells and of genes are those that were denoised, as far as the cells and genes left tell.

    All genes tell those of cells, all cells those of genes; `clearly` asks that they tell either.
    """
    all_genes = has_all_genes(adata, key)
    all_cells = has_all_cells(adata, key) and f"{key}_total" in adata.var
    if clearly and not all_genes and not all_cells:
        return False

    def sums(block: Block) -> Partial:
        return Partial((column_sums(block.counts),), (row_sums(block.counts),))

    try:
        (totals,), (found,) = chunks.run(sums, checked_block)
    except NotACount:
        return False
    size = sizes(adata, key)
    if not ((found == size) if all_genes else (found <= size)).all():
        return False
    return not all_cells or bool((totals == in_memory(adata.var[f"{key}_total"])).all())


def _holds(adata: AnnData, key: str, layer: str | None) -> bool:
    """Whether a layer in memory clearly holds the counts that were denoised."""
    matrix = None if layer is None else adata.layers[layer]
    if not sp.issparse(matrix) and not isinstance(matrix, np.ndarray):
        return False
    try:
        return _are_those_denoised(adata, key, chunks_of(matrix, f"layer {layer!r}"), clearly=True)
    except (TypeError, ValueError):
        return False


def gains_of_genes(adata: AnnData, key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gain of each gene, its error, and the molecules of the gene, shape (genes,) each."""
    record(adata, key)
    columns = [f"{key}_gain", f"{key}_gain_error", f"{key}_total"]
    if not set(columns) <= set(adata.var):
        raise NotThere(f"the gains of genes of {key!r} are gone from adata.var: run denoise again.")
    gain, error, molecules = in_memory(adata.var[columns]).to_numpy().T
    return gain, error, molecules


def clear_gains(adata: AnnData, key: str) -> dict[str, np.ndarray]:
    """Return which genes gained and which lost by more than two standard errors, boolean of shape (genes,).

    `"gained"`, `"lost"`, and `"unclear"`: no difference to the mean profile was seen, or too few molecules to see one.
    Genes without molecules are in none.
    """
    gain, error, _ = gains_of_genes(adata, key)
    gained, lost = gain > 2 * error, gain < -2 * error
    return {"gained": gained, "unclear": ~(gained | lost) & ~np.isnan(gain), "lost": lost}


def gene_names(adata: AnnData, gene_symbols: str | None = None) -> pd.Index:
    """Return what genes are called: `var_names`, or a column of `var`."""
    if gene_symbols is None:
        return adata.var_names
    if gene_symbols not in adata.var:
        raise NotThere(f"there is no column {gene_symbols!r} in adata.var: it has {list(adata.var.columns)}.")
    return pd.Index(in_memory(adata.var[[gene_symbols]])[gene_symbols].astype(object))


def gene_positions(
    adata: AnnData, genes: str | Sequence[str] | None, gene_symbols: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """Return where genes stand that are named as `gene_names` are, and their names; None for all."""
    names = gene_names(adata, gene_symbols)
    if gene_symbols is None or genes is None:
        found = positions(names, genes, "gene")
        return found, list(names[found])
    wanted = [genes] if isinstance(genes, str) else list(genes)
    # A symbol may stand for several genes, and many have none: only those asked for must be clear.
    several = names[names.duplicated()].intersection(wanted)
    if len(several):
        raise NotThere(
            f"{several[0]!r} stands for several genes in adata.var[{gene_symbols!r}]: name them by adata.var_names, "
            "without gene_symbols."
        )
    first = np.flatnonzero(~names.duplicated())
    found = first[positions(names[first], wanted, "gene")]
    return found, list(names[found])


def positions(names: pd.Index, wanted: str | Sequence[str] | None, what: str) -> np.ndarray:
    """Return where these names of genes or cells stand; None for all."""
    if wanted is None:
        return np.arange(len(names))
    wanted = [wanted] if isinstance(wanted, str) else list(wanted)
    if all(isinstance(each, bool | np.bool_) for each in wanted) and len(wanted) == len(names) and len(names):
        raise TypeError(f"{what}s were given as booleans: pass their names, as adata.{_AXES[what]}_names[mask].")
    if not names.is_unique:
        raise NotThere(f"{what} names are not unique: call adata.{_AXES[what]}_names_make_unique().")
    found = names.get_indexer(wanted)
    missing = [str(name) for name, position in zip(wanted, found, strict=True) if position < 0]
    if missing:
        known = {str(each).lower(): str(each) for each in names}
        near = [known[each] for each in get_close_matches(missing[0].lower(), known, n=3, cutoff=0.8)]
        hint = f"; near {missing[0]!r} are {', '.join(map(repr, near))}" if near else ""
        raise NotThere(f"{what}(s) not in adata: {', '.join(map(repr, missing[:5]))}{hint}.")
    return found
