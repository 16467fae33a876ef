"""What is done on a device beside training: products for principal components, and the last pass over cells x genes.

It needs PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from ._populations import ROUNDING, Populations
from ._profiles import UNKNOWN, LowRankProfiles
from ._svd import GramProduct

_ENTRIES = 1 << 26  # dense entries at a time, 256 MB


@dataclass(frozen=True, eq=False)
class DeviceProfiles(LowRankProfiles):
    """Expected counts from factors of log rates, the same as those of `LowRankProfiles` to rounding."""

    device: torch.device

    @classmethod
    def on(cls, device: torch.device, profiles: LowRankProfiles) -> Self:
        """Return profiles whose cells are scaled on a device."""
        given = {each.name: getattr(profiles, each.name) for each in fields(profiles) if each.init}
        return cls(**given, device=device)

    def sums_of_populations(self) -> np.ndarray:
        own = self.populations.times(self.gene_scale)
        scaling = _Scaling(self, own, self.device)
        sums = torch.zeros(own.factors.shape, dtype=torch.float64, device=self.device)
        step = max(1, _ENTRIES // self.shape[1])
        for start in range(0, len(self.size), step):
            rows = slice(start, start + step)
            population = self.population[rows]
            known = None if (population == UNKNOWN).any() else torch.from_numpy(population).long().to(self.device)
            level, *scales = scaling(self.scores[rows], self.size[rows], known, sums)
            self.scores[rows, -1] -= level
            self.population[rows], self.cell_scale[rows], self.row_scale[rows] = scales
        return sums.cpu().numpy()


class _Scaling:
    """What `Populations.refine` does, on a device."""

    def __init__(self, profiles: DeviceProfiles, populations: Populations, device: torch.device) -> None:
        def put(values: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(device)

        self._put, self._height = put, populations.height
        self._loadings, self._gene_scale = put(profiles.loadings.T), put(profiles.gene_scale)
        self._factors, self._shares = put(populations.factors), put(populations.shares)
        self._centers = put(populations.centers) if len(populations.factors) > 1 else None

    def __call__(self, scores: np.ndarray, size: np.ndarray, known: Tensor | None, sums: Tensor) -> list[np.ndarray]:
        """Return level, population and both scales of cells; what genes of their populations add up to is added."""
        sizes = self._put(size)
        rates = self._put(scores) @ self._loadings
        level = rates.amax(dim=1)
        rates.sub_(level[:, None]).exp_()
        population = self._nearest(rates) if known is None else known
        rates *= self._factors[population]
        total = rates.sum(dim=1)
        scale = torch.where(total > 0, sizes / total, 0)
        rates *= scale[:, None]
        last = torch.ones_like(scale)
        if self._height:
            means = sizes[:, None] * self._shares[population]
            rates = _raised(rates, means, self._height)
            last = torch.where(scale > 0, sizes / rates.sum(dim=1), 1)
            rates *= last[:, None]
        # A cell without any rates has the profile of its population.
        rates = torch.where(scale[:, None] > 0, rates, sizes[:, None] * self._shares[population])
        is_of = torch.nn.functional.one_hot(population, len(sums)).T.float()
        sums += (is_of @ rates).double()
        return [each.cpu().numpy() for each in (level, population.float(), scale, last)]

    def _nearest(self, rates: Tensor) -> Tensor:
        """Return the population of each cell, see `Populations.nearest`."""
        if self._centers is None:
            return torch.zeros(len(rates), dtype=torch.int64, device=rates.device)
        points = rates * self._gene_scale
        length = points.sum(dim=1, keepdim=True).sqrt()
        return torch.argmin(length * self._centers.square().sum(dim=1) - 2 * points.sqrt() @ self._centers.T, dim=1)


def _raised(rates: Tensor, means: Tensor, height: float) -> Tensor:
    """Return the larger of rates and the floor, the corner rounded, see `sc_noise2self.methods._populations`."""
    floor = height * (means / (1 + means))
    above, corner = rates - floor, float(ROUNDING) * floor * floor
    half = 0.5 * (above.abs() + torch.sqrt(above * above + corner))
    return floor + torch.where(above >= 0, half, 0.25 * corner / half)


def gram_product_on(device: torch.device) -> GramProduct:
    """Return a product with Gram matrices that is made on a device, whose memory holds the rows dense."""

    def product(rows: sp.csr_matrix, vectors: np.ndarray) -> np.ndarray:
        parts = np.diff(rows.indptr), rows.indices, rows.data, vectors
        lengths, genes, values, w = (torch.from_numpy(each).to(device) for each in parts)
        z = torch.zeros(rows.shape, device=device)
        z[torch.repeat_interleave(lengths, output_size=len(values)), genes.long()] = values
        return (z.T @ (z @ w)).cpu().numpy()

    return product


def on_device(profiles: LowRankProfiles, device: torch.device) -> LowRankProfiles:
    """Return profiles whose cells are scaled on a device; those of squared errors stay with the processor."""
    if device.type == "cpu" or profiles.link != "exp":
        return profiles
    return DeviceProfiles.on(device, profiles)
