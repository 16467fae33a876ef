"""The scales on which denoised profiles can be given."""

from __future__ import annotations

from numbers import Real
from typing import Literal

import numpy as np

from ._checks import check_one_of
from ._transform import PoissonExpectation

Scale = Literal["counts", "rates", "log1p_cp10k", "expected_log1p_cp10k"]

MEANING: dict[Scale, str] = {
    "counts": "expected counts at each cell's own depth",
    "rates": "share of each gene in the cell's molecules; rows sum to 1",
    "log1p_cp10k": "log1p of molecules per 10 000, of the rate",
    "expected_log1p_cp10k": "expected log1p of molecules per 10 000 of a fresh sample of the given depth",
}


def to_scale(counts: np.ndarray, size: np.ndarray, scale: Scale, depth: float | None = None) -> np.ndarray:
    """Return expected counts on another scale, in place where that saves a copy.

    Parameters
    ----------
    counts
        Expected counts at each cell's own depth, float32 of shape (cells, genes asked).
    size
        Molecules of each cell, shape (cells,); an empty cell stays 0.
    scale
        `"counts"`, `"rates"`, `"log1p_cp10k"`: log1p(1e4 rate), or `"expected_log1p_cp10k"`:
        E[log1p(1e4 Poisson(rate depth) / depth)], what log1p(CP10k) of a fresh sample averages. A squared error
        against log-normalised counts is least for the last; the logarithm of a rate overshoots it.
    depth
        Molecules of the fresh sample for `"expected_log1p_cp10k"`.
    """
    if scale == "counts":
        return counts
    counts /= np.maximum(size, 1)[:, None].astype(counts.dtype)
    if scale == "log1p_cp10k":
        counts *= 1e4
        np.log1p(counts, out=counts)
    if scale == "expected_log1p_cp10k":
        assert depth is not None  # checked where the user gives it
        expectation = PoissonExpectation("log1p", 1e4 / depth)
        for cell in counts:
            cell[:] = expectation(cell * depth)
    return counts


def sample_depth(scale: Scale, depth: float | None, size: np.ndarray) -> float | None:
    """Return the depth of the fresh sample, where the scale has one: as given, or the median of cells that hold any."""
    if scale == "expected_log1p_cp10k" and depth is None:
        return float(np.median(size[size > 0]))
    return depth


def check_scale(scale: str, depth: float | None) -> None:
    """Raise if there is no such scale, or if a depth was given to one that has none."""
    check_one_of("scale", scale, tuple(MEANING))
    if depth is not None and scale != "expected_log1p_cp10k":
        raise ValueError(f"scale_depth was given with scale={scale!r}: it is the depth of expected_log1p_cp10k.")
    if depth is None:
        return
    if isinstance(depth, bool) or not isinstance(depth, Real) or not 0 < depth < np.inf:
        raise ValueError(f"scale_depth is {depth!r}: pass a number of molecules above 0.")
