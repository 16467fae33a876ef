"""The scales on which denoised values can be given: `scale=` of `denoise` and of `get` takes a name or an object.

A scale is a class: a name, what it means, its unit on an axis, and how counts are brought to it. Another one derives
from `Scale`; listed in `SCALES`, it is known by its name too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from ._transform import PoissonExpectation

__all__ = ["Counts", "ExpectedLog1pCP10k", "Log1pCP10k", "Rates", "Scale"]


@dataclass(frozen=True)
class Scale(ABC):
    """A scale of values of cells x genes.

    Attributes
    ----------
    name
        By which `scale=` finds it.
    meaning
        What a value is, for the report.
    unit
        What a value is called beside an axis.
    """

    name: ClassVar[str]
    meaning: ClassVar[str]
    unit: ClassVar[str]

    @abstractmethod
    def apply(self, counts: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Return counts on this scale, in place where that saves a copy.

        Parameters
        ----------
        counts
            Expected counts at each cell's own depth, float32 of shape (cells, genes asked).
        size
            Molecules of each cell, shape (cells,); an empty cell stays 0.
        """

    def settled(self, depth: float) -> Scale:
        """Return the scale with what it leaves open settled, by the median molecules of the cells denoised."""
        return self

    def of_observed(self) -> Scale:
        """Return the scale on which counts as they are stand beside values of this one."""
        return self

    @property
    def params(self) -> dict[str, Any]:
        """What the scale was made with, as it is written down: `SCALES[name](**params)` is the scale again."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Counts(Scale):
    """Expected counts."""

    name = "counts"
    meaning = "expected counts at each cell's own depth"
    unit = "counts"

    def apply(self, counts: np.ndarray, size: np.ndarray) -> np.ndarray:
        """See `Scale`."""
        return counts


class Rates(Scale):
    """Shares of the cell's molecules."""

    name = "rates"
    meaning = "share of each gene in the cell's molecules; rows sum to 1"
    unit = "share of the cell's molecules"

    def apply(self, counts: np.ndarray, size: np.ndarray) -> np.ndarray:
        """See `Scale`."""
        counts /= np.maximum(size, 1)[:, None].astype(counts.dtype)
        return counts


class Log1pCP10k(Scale):
    """log1p(10 000 x the rate)."""

    name = "log1p_cp10k"
    meaning = "log1p of molecules per 10 000, of the rate"
    unit = "log1p(CP10k)"

    def apply(self, counts: np.ndarray, size: np.ndarray) -> np.ndarray:
        """See `Scale`."""
        counts = Rates().apply(counts, size)
        counts *= 1e4
        return np.log1p(counts, out=counts)


@dataclass(frozen=True)
class ExpectedLog1pCP10k(Scale):
    """E[log1p(1e4 Poisson(rate depth) / depth)], what log1p(CP10k) of a fresh sample averages.

    A squared error against log-normalised counts is least for it; the logarithm of a rate overshoots it.

    Attributes
    ----------
    depth
        Molecules of the fresh sample; None takes the median of the cells that hold any.

    Raises
    ------
    ValueError
        If the depth is no number above 0.
    """

    name = "expected_log1p_cp10k"
    meaning = "expected log1p of molecules per 10 000 of a fresh sample of the given depth"
    unit = "log1p(CP10k)"
    depth: float | None = None

    def __post_init__(self) -> None:
        if self.depth is None:
            return
        if isinstance(self.depth, bool) or not isinstance(self.depth, Real) or not 0 < self.depth < np.inf:
            raise ValueError(f"depth is {self.depth!r}: pass a number of molecules above 0, or None for the median.")
        object.__setattr__(self, "depth", float(self.depth))

    def settled(self, depth: float) -> Scale:
        """See `Scale`."""
        return replace(self, depth=depth) if self.depth is None else self

    def of_observed(self) -> Scale:
        """See `Scale`; counts are a sample themselves."""
        return Log1pCP10k()

    def apply(self, counts: np.ndarray, size: np.ndarray) -> np.ndarray:
        """See `Scale`."""
        if self.depth is None:
            raise ValueError("the depth is not settled: call settled(median molecules of a cell) first.")
        counts, expectation = Rates().apply(counts, size), PoissonExpectation("log1p", 1e4 / self.depth)
        for cell in counts:
            cell[:] = expectation(cell * self.depth)
        return counts


SCALES: dict[str, type[Scale]] = {each.name: each for each in (Counts, Rates, Log1pCP10k, ExpectedLog1pCP10k)}


def as_scale(scale: str | Scale) -> Scale:
    """Return the scale of a name, or the one given."""
    if isinstance(scale, Scale):
        return scale
    if not isinstance(scale, str) or scale not in SCALES:
        raise ValueError(
            f"scale is {scale!r}: pass one of {', '.join(SCALES)}, or an object such as "
            "sc_noise2self.scales.ExpectedLog1pCP10k(depth=1000)."
        )
    return SCALES[scale]()
