"""One training run of the autoencoder: the loop, when it stops, and what it does when something goes wrong.

It needs PyTorch. Random numbers are PyTorch's own; the caller sets and restores their state. Where processes were
started to train together (`torch.distributed`), each shows its share of the cells, and all end with the same network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .._loss import Gain
from .._progress import progress_bar
from .._warnings import warn
from ._network import AnyCounts, Entries, Network, Process
from ._network_losses import Loss

_SPACING = 20, 5  # validation molecules are predicted again after this part of all epochs, and of those so far
_PATIENCE = 3  # checks without a better one before training stops
_BETAS = 0.9, 0.95  # of Adam: with the usual 0.999 wide networks diverge at a constant learning rate
_AVERAGED = 4  # steps from one state that enters the average to the next
_LATE = 3  # the power of time that states weigh with in it


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


class Compared(nn.Module):
    """A network and its loss: what is trained."""

    def __init__(self, network: Network, loss: Loss, device: torch.device) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        network.in_bfloat16 = _computes_in_bfloat16(device)

    def forward(self, batch: Entries) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(self.network, batch)


class Average:
    """The average of the states that parts pass through, the later the heavier (Shamir & Zhang 2013)."""

    def __init__(self, parts: Compared) -> None:
        self.parts, self._n_states = copy.deepcopy(parts), 0

    @torch.no_grad()
    def add(self, parts: Compared) -> None:
        """Let the state of parts enter the average."""
        self._n_states += 1
        weight = (_LATE + 1) / (self._n_states + _LATE)
        for own, state in zip(self.parts.parameters(), parts.parameters(), strict=True):
            own.lerp_(state, weight)


def train(
    network: Network,
    loss: Loss,
    counts: AnyCounts,
    rng: np.random.Generator,
    check: Callable[[Network], Gain],
    schedule: Schedule,
) -> History:
    """Train in place, and leave network and loss in the average of states with the largest gain by `check`.

    The learning rate is constant, and the states along the way are averaged (`Average`), which serves at any time: how
    long training will be need not be known, and it ends when the gain no longer rises. Cells without molecules are left
    out; `rng` orders the others. A loss that is not finite before the first check is an error.
    """
    parts = Compared(network, loss, counts.device)
    counts.process = Process(distributed.get_rank(), distributed.get_world_size()) if _is_shared() else Process()
    stepped: nn.Module = parts
    if counts.process.of > 1:
        torch.manual_seed(torch.initial_seed() + counts.process.number)
        stepped = DistributedDataParallel(parts, broadcast_buffers=False)
    # The loss is in nats per molecule, so the prior's share is that of all molecules: |W|^2 / (2 scale^2 molecules).
    # Adam takes its gradient as `weight_decay` (not AdamW, which would shrink rare and abundant genes alike).
    of_genes = [network.genes.weight, network.batch_offsets]
    others = [p for p in parts.parameters() if not any(p is each for each in of_genes)]
    prior: dict[str, Any] = {"params": of_genes, "weight_decay": 1 / (schedule.prior_scale**2 * counts.n_molecules)}
    optimizer = torch.optim.Adam([{"params": others}, prior], lr=schedule.learning_rate, betas=_BETAS, fused=True)
    batch_size = -(-schedule.batch_size // counts.process.of)
    average = Average(parts)
    history = History()
    best: dict[str, Tensor] = {}
    next_check = max(1, schedule.n_epochs // _SPACING[0])
    with progress_bar(schedule.name, schedule.n_epochs) as bar:
        for epoch in range(1, schedule.n_epochs + 1):
            mean = _epoch(stepped, counts, rng, batch_size, optimizer, lambda: average.add(parts))
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
            if epoch < min(next_check, schedule.n_epochs):
                continue
            next_check = epoch + max(1, schedule.n_epochs // _SPACING[0], epoch // _SPACING[1])
            measured = torch.tensor(check(average.parts.network).mean, dtype=torch.float64)
            gain = float(_of_first(measured, counts.device))
            if not history.gains or gain > max(history.gains):
                best = copy.deepcopy(average.parts.state_dict())
            history.checked.append(epoch)
            history.gains.append(gain)
            bar.set_postfix_str(f"gain {gain:.4f}")
            if history.best < len(history.gains) - _PATIENCE:
                break
    parts.load_state_dict({name: _of_first(value, counts.device) for name, value in best.items()})
    return history


def _epoch(
    parts: nn.Module,
    counts: AnyCounts,
    rng: np.random.Generator,
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    average: Callable[[], None],
) -> float:
    """Show every cell once, and return the mean loss."""
    total, n_shown = torch.zeros((), device=counts.device), 0
    for step, batch in enumerate(counts.batches(rng, batch_size)):
        batch_loss, n_cells = parts(batch), len(batch.starts)
        optimizer.zero_grad()
        batch_loss.backward()
        optimizer.step()
        if step % _AVERAGED == 0:
            average()
        total += batch_loss.detach() * n_cells
        n_shown += n_cells
    if _is_shared():  # each shows as many cells
        distributed.all_reduce(total)
        n_shown *= distributed.get_world_size()
    return float(total) / n_shown


def _is_shared() -> bool:
    """Whether several processes train together."""
    return distributed.is_available() and distributed.is_initialized()


def _of_first(value: Tensor, device: torch.device) -> Tensor:
    """Return the value that the first of the processes has."""
    if _is_shared():
        value = value.to(device)
        distributed.broadcast(value, 0)
    return value


def choose_device(name: str) -> torch.device:
    """Return the device of this name; ``"auto"`` is CUDA where there is one. ``"cpu"`` does not touch CUDA."""
    if name == "cpu":
        return torch.device("cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise NotImplementedError
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
