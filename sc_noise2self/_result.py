"""What a denoiser hands over to be written (`Result`), and how it stands in AnnData; `_read` reads it back.

The weighted mean of members goes to `.obsm` and `.varm` as their factors side by side, where all of them have factors;
else the layer is all there is. What people and plots ask for goes to `.uns`, as strings, numbers, arrays and tables
that `h5ad` and `zarr` keep. No reader parses text or knows the name of a method.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from anndata import AnnData

from ._intervals import Coverage
from ._loss import Gain
from ._slots import LEAST_STAMP, committed, is_stamped, marked, stamped
from ._transform import Link
from .methods._base import Learned
from .methods._dispersion import Dispersion
from .methods._profiles import N_SCALES, LowRankProfiles, Profiles, combine, scales_from, split_scales_of_genes
from .scales import Scale

_OF_POPULATIONS = ("n_populations", "floor")  # of members, in the record


@dataclass(frozen=True, eq=False)
class Member:
    """One of the denoisers that the result is the weighted mean of.

    Of the values that it learned, plots ask for `singular_values`, the `noise_edge` and the `weights` of components
    (`pl.spectrum`, `pl.markers`), and for a `table` of what was compared (`pl.loss`): columns of parameters, then
    `loss` (minus the gain), `error` of its difference to the least, `gain`, `chosen`.
    """

    name: str  # unique in the result
    setting: str  # for people alone
    weight: float
    profiles: Profiles
    learned: Learned


@dataclass(frozen=True, eq=False)
class Result:
    """All that is written of a run of `denoise` or `denoise_with`.

    `params` has `mix` and `random_state`, and `layer` where the counts are in one. `candidates` has a row for each
    candidate: `label`, `gain`, `error` of its difference to the best, `chosen`. For `dispersion` and, where counts are
    mixed in, `cell_scale` see `MixedProfiles`; `mixed` is the mean weight of a cell's own count.
    """

    method: str
    params: Mapping[str, Any]
    scale: Scale  # of the layer, settled
    members: Sequence[Member]
    gain: Gain
    measured: np.ndarray  # numbers of the cells that the gain was measured on
    gene_gains: tuple[np.ndarray, np.ndarray]  # the gain of each gene and its error, shape (genes,)
    size: np.ndarray  # molecules of each cell and of each gene, by which the counts are known again
    totals: np.ndarray
    depth: float  # median of `size`, by which a scale is settled
    warnings: Sequence[str]
    dispersion: Dispersion
    coverage: Coverage
    candidates: pd.DataFrame | None = None
    unmixed_gain: Gain | None = None
    cell_scale: np.ndarray | None = None
    mixed: np.ndarray | None = None
    beats_mean: bool = True
    layer: Any = None

    @property
    def profiles(self) -> Profiles:
        """The mean of the members' profiles, no counts mixed in."""
        return combine([each.profiles for each in self.members], [each.weight for each in self.members])

    @property
    def gains_of_cells(self) -> np.ndarray:
        """Nats per held-out molecule of each cell, NaN where none was measured, shape (cells,)."""
        out, molecules = np.full(len(self.size), np.nan), self.gain.weights
        out[self.measured] = np.where(molecules > 0, self.gain.sums / np.where(molecules > 0, molecules, 1), np.nan)
        return out

    @property
    def factored(self) -> list[LowRankProfiles]:
        """The profiles of members; none where a member has no factors."""
        fitted = [each.profiles for each in self.members if isinstance(each.profiles, LowRankProfiles)]
        return fitted if len(fitted) == len(self.members) else []


def write(adata: AnnData, key: str, result: Result) -> AbstractContextManager[None]:
    """Return a context in which a result stands in `adata`, the earlier one under `key` removed.

    All of it is built here, set when the context is entered, and set back if what follows in it fails.
    """
    factors = GeneFactors.of(result)
    gain, error = result.gene_gains
    scores, scales = factors.of_cells(result)
    return committed(
        adata,
        {
            "layers": {key: result.layer},
            "obsm": {key: scores, f"{key}_scale": scales},
            "varm": {key: factors.loadings, f"{key}_scale": factors.scales},
            "obs": {
                f"{key}_size": result.size,
                f"{key}_cell_scale": result.cell_scale,
                f"{key}_gain": result.gains_of_cells,
                f"{key}_coverage": result.coverage.of_cells(len(result.size)),
            },
            "var": {
                f"{key}_gain": gain,
                f"{key}_gain_error": error,
                f"{key}_total": result.totals,
                f"{key}_phi": result.dispersion.phi,
                f"{key}_mixed": result.mixed,
            },
            "uns": {key: marked("denoise", _record(result, factors))},
        },
    )


def _record(result: Result, factors: GeneFactors) -> dict[str, Any]:
    members, gain = result.members, result.gain
    return {
        "method": result.method,
        "params": dict(result.params),
        "depth": result.depth,
        "scale": result.scale.name,
        "scale_params": result.scale.params,
        "scale_meaning": result.scale.meaning,
        "members": {
            "name": np.array([each.name for each in members]),
            "title": np.array([each.learned.title for each in members]),
            "described": np.array([each.learned.described for each in members]),
            "setting": np.array([each.setting for each in members]),
            "rank": np.array([int(each.learned.rank) for each in members]),
            **factors.members,
        },
        "learned": {
            each.name: {
                name: plain_table(value) if isinstance(value, pd.DataFrame) else value
                for name, value in each.learned.values.items()
            }
            for each in members
        },
        **({} if result.candidates is None else {"candidates": plain_table(result.candidates)}),
        "beats_mean": result.beats_mean,
        "gain": gain.mean,
        "gain_error": gain.error,
        "gain_molecules": int(gain.weights.sum()),
        "gain_cells": gain.n_cells,
        **({} if result.unmixed_gain is None else {"unmixed_gain": result.unmixed_gain.mean}),
        "phi_power": result.dispersion.power,
        "evidence": result.dispersion.evidence,
        "coverage": result.coverage.table(),
        "has_factors": factors.loadings is not None,
        "fingerprint": factors.fingerprint,
        "n_cells": len(result.size),
        "n_genes": len(result.totals),
        "n_molecules": int(result.totals.sum()),
        "warnings": np.array(result.warnings, dtype=str),
    }


def weights_by(names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Return what the weights of members of the same name add up to."""
    found: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        found[str(name)] = found.get(str(name), 0.0) + float(weight)
    return found


def described_by(described: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Return the weights of members by what they are, of how many fits each is the mean."""
    times = Counter(map(str, described))
    found = weights_by(described, weights)
    return {f"{name}, the mean of {times[name]} fits" if times[name] > 1 else name: found[name] for name in found}


def plain_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table as files keep it: whatever is no number or truth value as text."""

    def plain(column: pd.Series) -> pd.Series:
        if isinstance(column.dtype, pd.StringDtype):  # pandas 3 takes None among strings for what is missing
            return column.fillna("None")
        return column.map(str) if column.dtype == object else column

    return table.apply(plain)


@dataclass(frozen=True, eq=False)
class GeneFactors:
    """What a result knows of genes: the model, without the cells."""

    members: Mapping[str, np.ndarray]  # as in the record: `link`, `weight`, `n_factors`, `n_populations`, `floor`
    loadings: np.ndarray | None  # those of all members side by side, shape (genes, factors); None where one has none
    scales: np.ndarray  # of genes of each member, the mean profile, the fingerprint; without factors that alone
    fingerprint: int  # a whole number that two models share once in eight million

    @classmethod
    def of(cls, result: Result) -> GeneFactors:
        """Return those of a result."""
        fitted = result.factored
        weights = tuple(float(member.weight) for member in result.members)
        if fitted:
            links = tuple(str(profiles.link) for profiles in fitted)
            n_factors = tuple(profiles.loadings.shape[1] for profiles in fitted)
            loadings = np.hstack([profiles.loadings for profiles in fitted])
            scales = np.column_stack([*(profiles.scales_of_genes() for profiles in fitted), fitted[0].gene_share])
            told_by = [loadings, scales]
            populations = [(len(profiles.populations.factors), profiles.populations.height) for profiles in fitted]
        else:
            links, n_factors = ("none",) * len(weights), (0,) * len(weights)
            loadings, scales = None, np.empty((len(result.totals), 0), np.float32)
            populations = [(1, 0.0)] * len(weights)
            told_by = [np.stack([result.totals, *result.gene_gains], axis=1)]
        told_by += [] if result.cell_scale is None else [result.dispersion.phi[:, None]]
        fingerprint = _fingerprint(np.hstack(told_by), (links, weights, n_factors, populations, repr(result.scale)))
        members = {"link": np.array(links), "weight": np.array(weights), "n_factors": np.array(n_factors)}
        members |= dict(zip(_OF_POPULATIONS, np.array(populations).T.copy(), strict=True))
        return cls(members, loadings, stamped(scales, fingerprint), fingerprint)

    def of_cells(self, result: Result) -> tuple[Any, Any]:
        """Return the scores of cells, shape (cells, factors), their scales, three a member, and the fingerprint.

        Either is a Dask array where the factors of cells are; without factors there are no scores.
        """
        fitted = result.factored
        if not fitted:
            return None, stamped(np.empty((len(result.size), 0), np.float32), self.fingerprint)
        scales = np.hstack([profiles.scales() for profiles in fitted])
        return np.hstack([profiles.scores for profiles in fitted]), stamped(scales, self.fingerprint)

    def profiles(self, scores: np.ndarray, scales: np.ndarray, size: np.ndarray) -> Profiles:
        """Return the profiles of cells from their scores, scales and sizes; refuse those of another model."""
        if self.loadings is None or not is_stamped(scales, self.fingerprint):
            raise ValueError("the cells belong to another result than the loadings.")
        n_factors = self.loadings.shape[1]
        if scores.shape[1:] != (n_factors,):
            raise ValueError(
                f"the factors of cells have the shape {scores.shape}, and those of genes {n_factors} columns: one of "
                "them was changed, so denoise again."
            )
        fitted, end, of_genes = [], 0, self.scales[:, :-2]
        names = ("link", "n_factors", *_OF_POPULATIONS)
        for i, (link, n_factors, *about) in enumerate(zip(*(self.members[name] for name in names), strict=True)):
            start, end = end, end + int(n_factors)
            gene_scale, populations, of_genes = split_scales_of_genes(of_genes, self.scales[:, -2], *about)
            fitted.append(
                LowRankProfiles(
                    link=cast("Link", str(link)),
                    scores=scores[:, start:end],
                    loadings=self.loadings[:, start:end],
                    gene_scale=gene_scale,
                    gene_share=self.scales[:, -2],
                    size=size.astype(np.float32),
                    populations=populations,
                    **scales_from(scales[:, i * N_SCALES : (i + 1) * N_SCALES]),
                )
            )
        return combine(fitted, [float(weight) for weight in self.members["weight"]])


def _fingerprint(of_genes: np.ndarray, others: object) -> int:
    """Return a hash that does not depend on the order of genes, which a concatenation may change."""

    def digest(data: bytes) -> int:
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")

    total = sum(digest(row.tobytes()) for row in np.ascontiguousarray(of_genes, dtype=np.float32))
    return LEAST_STAMP + digest(repr((total, others)).encode()) % LEAST_STAMP
