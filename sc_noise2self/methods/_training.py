"""One training run of the autoencoder: the loop, when it stops, and what it does when something goes wrong.

It needs PyTorch. Random numbers are PyTorch's own; the caller sets and restores their state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from .._loss import Gain
from .._progress import progress_bar
from .._warnings import warn
from ._network import AnyCounts, Network
from ._network_losses import Loss

_CHECKS = 10  # of the validation molecules, in a run
_PATIENCE = 3  # checks without a better one before training stops


@dataclass(frozen=True, eq=False)
class History:
    """Mean training loss of every epoch; epochs, from 1, after which validation molecules were predicted; the gains."""

    losses: list[float] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Number of the check with the largest gain, from 0."""
        return int(np.argmax(self.gains))


@dataclass(frozen=True)
class Schedule:
    """How long and in which steps a network is trained, as in `Autoencoder`; `name` is what it is called meanwhile."""

    name: str
    n_epochs: int
    batch_size: int
    learning_rate: float
    prior_scale: float


def train(
    network: Network,
    loss: Loss,
    counts: AnyCounts,
    rng: np.random.Generator,
    check: Callable[[], Gain],
    schedule: Schedule,
) -> History:
    """Train in place, and leave network and loss in the state with the largest gain by `check`.

    Cells without molecules are left out; `rng` orders the others. A loss that is not finite before the first check is
    an error.
    """
    parts = nn.ModuleList([network, loss])
    # The loss is in nats per molecule, so the prior's share is that of all molecules: |W|^2 / (2 scale^2 molecules).
    # Adam takes its gradient as `weight_decay` (not AdamW, which would shrink rare and abundant genes alike).
    of_genes = [network.genes.weight, network.batch_offsets]
    others = [p for p in parts.parameters() if not any(p is each for each in of_genes)]
    prior: dict[str, Any] = {"params": of_genes, "weight_decay": 1 / (schedule.prior_scale**2 * counts.n_molecules)}
    optimizer = torch.optim.Adam([{"params": others}, prior], lr=schedule.learning_rate, fused=True)
    n_steps = schedule.n_epochs * counts.n_batches(schedule.batch_size)
    cosine = CosineAnnealingLR(optimizer, n_steps)
    history = History()
    best: dict[str, Tensor] = {}
    with progress_bar(schedule.name, schedule.n_epochs) as bar:
        for epoch in range(1, schedule.n_epochs + 1):
            mean = _epoch(parts, counts, rng, schedule.batch_size, cosine)
            bar.update()
            if not math.isfinite(mean):
                message = (
                    f"the loss was {mean} in epoch {epoch} of {schedule.n_epochs}: the learning rate, "
                    f"{schedule.learning_rate:g}, is likely too large."
                )
                if not history.gains:
                    raise FloatingPointError(f"{message} Pass a smaller learning_rate.")
                warn(f"{message} The state after epoch {history.checked[history.best]} is kept.")
                break
            history.losses.append(mean)
            if epoch % max(1, schedule.n_epochs // _CHECKS) and epoch != schedule.n_epochs:
                continue
            parts.eval()
            gain = check().mean
            if not history.gains or gain > max(history.gains):
                best = copy.deepcopy(parts.state_dict())
            history.checked.append(epoch)
            history.gains.append(gain)
            bar.set_postfix_str(f"gain {gain:.4f}")
            if history.best < len(history.gains) - _PATIENCE:
                break
    parts.load_state_dict(best)
    parts.eval()
    return history


def _epoch(
    parts: nn.ModuleList, counts: AnyCounts, rng: np.random.Generator, batch_size: int, cosine: CosineAnnealingLR
) -> float:
    """Show every cell once, and return the mean loss."""
    network, loss = parts
    parts.train()
    bfloat16 = _computes_in_bfloat16(counts.device)
    total = torch.zeros((), device=counts.device)
    for batch in counts.batches(rng, batch_size):
        with torch.autocast(counts.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            batch_loss = loss(network, batch)
        cosine.optimizer.zero_grad()
        batch_loss.backward()
        cosine.optimizer.step()
        cosine.step()
        total += batch_loss.detach() * len(batch.starts)
    return float(total) / counts.n_trained


def choose_device(name: str) -> torch.device:
    """Return the device of this name; ``"auto"`` is CUDA where there is one. ``"cpu"`` does not touch CUDA."""
    if name == "cpu":
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device is {name!r}, which PyTorch cannot use here: pass 'auto' or 'cpu'.") from error
    return device


def _computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself, which takes a quarter of the time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch does not tell
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
