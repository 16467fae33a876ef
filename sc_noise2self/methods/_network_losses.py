"""The losses of the autoencoder, all self-supervised: they need no clean counts. They need PyTorch.

Each compares the network's output, one number per gene, with molecules that it has not seen, but Noise2Same. A new loss
is a class here and a line in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._counts import column_sums, depth_of, row_sums
from .._transform import Transform, TransformName
from ._network import Entries, Network

_NEVER = -1e9  # a log probability


class Loss(nn.Module):
    """Loss of a network that sees one part of a cell's molecules and is compared with the other.

    How an output becomes a rate is in `sc_noise2self._model.LINKS`; for a square root, outputs times
    sqrt(molecules of the cell / `depth`) are at the depth that it needs. `start` is the output that stands for the mean
    profile, shape (genes,). `Noise2Same` alone has a weight of `invariance`.
    """

    depth = 1.0
    shares = (0.3, 0.9)  # bounds of the share of molecules that the network sees, drawn for every cell and step

    def __init__(self, counts: sp.csr_matrix, invariance: float = 0) -> None:
        super().__init__()
        self.invariance = invariance
        self.start = self.mean_output(counts)

    def mean_output(self, counts: sp.csr_matrix) -> np.ndarray:
        """Return the output that stands for the mean profile, shape (genes,). A gene never seen gets a tenth."""
        totals = column_sums(counts) + 0.1
        return np.log(totals / totals.sum())

    def forward(self, network: Network, entries: Entries) -> Tensor:
        """Return the loss of a batch."""
        seen, held_out = entries.split(*self.shares)
        return self.compare(network(seen), held_out)

    def compare(self, output: Tensor, held_out: Entries) -> Tensor:
        """Return the loss of outputs, shape (cells, genes), against counts."""
        raise NotImplementedError


class _NatsPerMolecule(torch.autograd.Function):
    """-sum x log softmax(output) / sum x, whose gradient, (softmax(output) n - x) / sum x, is made on the way there.

    What autograd does instead reads and writes the outputs three times as often.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, held_out: Entries) -> Tensor:
        at, total = held_out.places(), held_out.values.sum().clamp_min(1)
        precise = torch.promote_types(output.dtype, torch.float32)
        p = F.softmax(output, dim=1, dtype=precise)
        of_entries = p.view(-1).index_select(0, at).clamp_min(torch.finfo(precise).tiny)
        loss = -(torch.log(of_entries) * held_out.values).sum() / total
        gradient = p.mul_((held_out.sizes() / total)[:, None])
        gradient.view(-1).index_add_(0, at, (held_out.values / total).to(precise), alpha=-1)
        ctx.save_for_backward(gradient.to(output.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None


class Multinomial(Loss):
    """Nats per molecule: -sum x2 log softmax(output) / sum x2. Depth never enters."""

    def compare(self, output: Tensor, held_out: Entries) -> Tensor:
        return _NatsPerMolecule.apply(output, held_out)


class MaskedMultinomial(Multinomial):
    """Genes are hidden instead of molecules (Noise2Self, section 5; Noise2Void, Krull et al. 2019).

    The network predicts how the molecules of the genes that a cell hides are shared out among them, in nats per
    molecule. In its input a hidden gene has the value of the mean profile (Eq. 3 of Noise2Self, where it is the mean of
    the neighbouring pixels). What one gene alone knows of itself is never learned.
    """

    shares = (0.1, 0.7)

    def forward(self, network: Network, entries: Entries) -> Tensor:
        seen, held_out = entries.hide(*self.shares)
        assert seen.hidden is not None
        return self.compare(network(seen).float().masked_fill(~seen.hidden, _NEVER), held_out)


class Poisson(Loss):
    """Counts are Poisson with mean n2 exp(output), n2 the cell's held-out molecules; nats per molecule."""

    def compare(self, output: Tensor, held_out: Entries) -> Tensor:
        output, counts = output.float(), held_out.dense()
        means = held_out.sizes()[:, None] * torch.exp(output)
        return (means - counts * output).sum() / held_out.values.sum().clamp_min(1)


class NegativeBinomial(Loss):
    """As `Poisson`, with variance m + m^2 / r and an r learned for each gene."""

    def __init__(self, counts: sp.csr_matrix, invariance: float = 0) -> None:
        super().__init__(counts, invariance)
        self.log_r = nn.Parameter(torch.full((counts.shape[1],), 1.0))

    def compare(self, output: Tensor, held_out: Entries) -> Tensor:
        output, counts, sizes = output.float(), held_out.dense(), held_out.sizes()[:, None]
        r = torch.exp(self.log_r.clamp(-7, 12))
        log_means = output + torch.log(sizes.clamp_min(1))
        # log(r + m) without overflow; the terms with lgamma are zero where the count is.
        log_sum = torch.logaddexp(log_means, torch.log(r).expand_as(log_means))
        likelihood = (r * torch.log(r)).expand_as(output) - (r + counts) * log_sum + counts * log_means
        of_genes = r.index_select(0, held_out.genes)
        gammas = torch.lgamma(held_out.values + of_genes) - torch.lgamma(of_genes)
        likelihood = likelihood * (sizes > 0)
        return -(likelihood.sum() + gammas.sum()) / held_out.values.sum().clamp_min(1)


class SquaredError(Loss):
    """Mean squared error on transformed counts, as in Noise2Self, section 3.1: even splits, each at one depth."""

    shares = (0.5, 0.5)
    compared = 0.5  # share of the molecules that the output is compared with

    def __init__(self, counts: sp.csr_matrix, invariance: float = 0, *, transform: TransformName) -> None:
        self.depth = depth_of(row_sums(counts))
        self.transform = Transform(transform, self.depth * self.compared)
        super().__init__(counts, invariance)

    def mean_output(self, counts: sp.csr_matrix) -> np.ndarray:
        return column_sums(self.transform.apply(counts, row_sums(counts))) / counts.shape[0]

    def compare(self, output: Tensor, held_out: Entries) -> Tensor:
        output, to_depth = output.float(), self.transform.target / held_out.sizes().clamp_min(1)
        scaled = held_out.dense() * to_depth[:, None]
        return F.mse_loss(output, torch.log1p(scaled) if self.transform.name == "log1p" else torch.sqrt(scaled))


class Noise2Same(SquaredError):
    """Noise2Same (Xie et al. 2020, theorem 2): |f(x) - x|^2 / m + lambda sigma sqrt(|f(x) - f(x_J)|^2 / m).

    The network sees all molecules, so nothing forces f to be J-invariant; the second term bounds what it may gain
    by copying, with lambda = 2. x_J is the cell without a random half of its molecules, sigma the root mean square
    sampling noise on the transformed scale (the jackknife over molecules), m the entries.
    """

    compared = 1.0

    def __init__(self, counts: sp.csr_matrix, invariance: float = 0, *, transform: TransformName) -> None:
        super().__init__(counts, invariance, transform=transform)
        self.sigma = float(np.sqrt(self.transform.noise_variance(counts, row_sums(counts)).mean()))

    def forward(self, network: Network, entries: Entries) -> Tensor:
        part, _ = entries.split(*self.shares)
        full = network(entries).float()
        change = F.mse_loss(full, network(part).float())
        return self.compare(full, entries) + self.invariance * self.sigma * torch.sqrt(change + 1e-12)


LOSSES: dict[str, Callable[[sp.csr_matrix, float], Loss]] = {
    "multinomial": Multinomial,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
    "masked_multinomial": MaskedMultinomial,
    "mse_log1p": partial(SquaredError, transform="log1p"),
    "mse_sqrt": partial(SquaredError, transform="sqrt"),
    "noise2same_log1p": partial(Noise2Same, transform="log1p"),
    "noise2same_sqrt": partial(Noise2Same, transform="sqrt"),
}
"""Every loss by its name, made from counts to train on (CSR, cells x genes) and the weight of invariance."""
