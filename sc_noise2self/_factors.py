"""The factors of a result as AnnData keeps them, stamped so that what does not belong together is noticed.

A result has three sides: what belongs to cells (`.obsm`), to genes (`.varm`) and to all of it (`.uns`). Subsets,
concatenations and files carry each side along on its own, so each carries the fingerprint of the model, in `.obsm` and
`.varm` as the last column of the scales. Cells of two results on the loadings of one have two fingerprints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._choose import combine
from ._transform import Link
from .methods._profiles import LowRankProfiles, Profiles

_LEAST = 1 << 23  # whole numbers from here to twice as much are exact in float32, and no scale of a cell or gene


@dataclass(frozen=True, eq=False)
class GeneFactors:
    """What a result knows of genes: the model, without the cells.

    Attributes
    ----------
    links, weights, n_factors
        Of each member.
    loadings
        Those of all members side by side, float32 of shape (genes, factors).
    scales
        The scale of genes of each member, the mean profile, and the fingerprint, shape (genes, members + 2).
    fingerprint
        A whole number that two models share once in eight million.
    """

    links: tuple[Link, ...]
    weights: tuple[float, ...]
    n_factors: tuple[int, ...]
    loadings: np.ndarray
    scales: np.ndarray
    fingerprint: int

    @classmethod
    def of(cls, fitted: Sequence[LowRankProfiles], weights: Sequence[float], *also: Any) -> GeneFactors:
        """Return the factors of genes of members; `also` is what else the fingerprint should tell apart."""
        links = tuple(profiles.link for profiles in fitted)
        n_factors = tuple(profiles.loadings.shape[1] for profiles in fitted)
        loadings = np.hstack([profiles.loadings for profiles in fitted])
        scales = np.column_stack([*(profiles.gene_scale for profiles in fitted), fitted[0].gene_share])
        of_genes = np.hstack([loadings, scales, *(each[:, None] for each in also if isinstance(each, np.ndarray))])
        others = [each for each in also if not isinstance(each, np.ndarray)]
        fingerprint = _fingerprint(of_genes, (links, [float(weight) for weight in weights], n_factors, others))
        return cls(links, tuple(weights), n_factors, loadings, _stamped(scales, fingerprint), fingerprint)

    @classmethod
    def read(cls, record: Mapping[str, Any], loadings: np.ndarray, scales: np.ndarray) -> GeneFactors:
        """Return the factors of genes as they were written."""
        members = record["members"]
        return cls(
            tuple(str(link) for link in members["link"]),  # type: ignore[misc]  # links, as written
            tuple(float(weight) for weight in members["weight"]),
            tuple(int(n) for n in members["n_factors"]),
            loadings,
            scales,
            int(record["fingerprint"]),
        )

    def cell_scales(self, fitted: Sequence[LowRankProfiles]) -> Any:
        """Return the two scales of cells of each member and the fingerprint, shape (cells, 2 members + 1)."""
        scales = [column for profiles in fitted for column in (profiles.cell_scale, profiles.row_scale)]
        return _stamped(np.stack(scales, axis=1), self.fingerprint)

    def profiles(self, scores: np.ndarray, scales: np.ndarray, size: np.ndarray) -> Profiles:
        """Return the profiles of cells from their scores, scales and sizes.

        Raises
        ------
        ValueError
            If cells belong to another model.
        """
        if not is_stamped(scales, self.fingerprint):
            raise ValueError("the cells belong to another result than the loadings.")
        ends = [int(end) for end in np.cumsum(self.n_factors)]
        fitted = [
            LowRankProfiles(
                link,
                scores[:, start:end],
                self.loadings[:, start:end],
                self.scales[:, i],
                scales[:, 2 * i],
                scales[:, 2 * i + 1],
                self.scales[:, -2],
                size.astype(np.float32),
            )
            for i, (link, start, end) in enumerate(zip(self.links, [0, *ends[:-1]], ends, strict=True))
        ]
        return combine(fitted, self.weights)


def as_array(values: Any) -> Any:
    """Return an array, NumPy's or Dask's, of a slot that may hold a DataFrame, in memory or not, instead."""
    if hasattr(values, "to_memory"):
        values = values.to_memory()
    return values if hasattr(values, "__dask_graph__") else np.asarray(values)


def is_stamped(scales: Any, fingerprint: int) -> bool:
    """Whether every row of scales has this fingerprint; of a Dask array its last column alone is computed."""
    scales = as_array(scales)
    return scales.ndim == 2 and bool((np.asarray(scales[:, -1]) == fingerprint).all())


def has_stamps(scales: Any) -> bool:
    """Whether some row has a fingerprint of some model, which nothing but a result has."""
    scales = as_array(scales)
    if scales.ndim != 2 or not scales.shape[1] or scales.dtype.kind != "f":
        return False
    last = np.asarray(scales[:, -1])
    return bool(((last >= _LEAST) & (last < 2 * _LEAST) & (last == np.rint(last))).any())


def _stamped(scales: Any, fingerprint: int) -> Any:
    """Return scales with a last column more, the same for every row; a Dask array stays one."""
    return np.concatenate([scales, np.full_like(scales[:, :1], fingerprint)], axis=1)


def _fingerprint(of_genes: np.ndarray, others: object) -> int:
    """Return a hash that does not depend on the order of genes, which a concatenation may change."""
    rows = np.ascontiguousarray(of_genes, dtype=np.float32)
    total = sum(int.from_bytes(_digest(row.tobytes()), "little") for row in rows)
    return _LEAST + int.from_bytes(_digest(repr((total, others)).encode()), "little") % _LEAST


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
