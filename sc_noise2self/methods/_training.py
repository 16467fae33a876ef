"""One training run of the autoencoder: the loop, when it stops, and what it does when something goes wrong.

It needs PyTorch. Random numbers are PyTorch's own; the caller sets and restores their state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .._loss import Gain
from .._warnings import caveat
from ._network import Counts, Network, StreamedCounts
from ._network_losses import Loss

_CHECKS = 10  # of the validation molecules, in a run
_PATIENCE = 3  # checks without a better one before training stops


@dataclass(frozen=True, eq=False)
class History:
    """What happened in training.

    Attributes
    ----------
    losses
        Mean training loss of every epoch.
    checked, gains
        Epochs, from 1, after which validation molecules were predicted, and the gain in nats per molecule.
    """

    losses: list[float] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Number of the check with the largest gain, from 0."""
        return int(np.argmax(self.gains))


def train(
    network: Network,
    loss: Loss,
    counts: Counts | StreamedCounts,
    rng: np.random.Generator,
    *,
    check: Callable[[], Gain],
    on_check: Callable[[int, float], object],
    n_epochs: int,
    batch_size: int,
    learning_rate: float,
    prior_scale: float,
) -> History:
    """Train in place, and leave network and loss in the state with the best check.

    Parameters
    ----------
    counts
        Counts to train on; cells without molecules are left out.
    rng
        Source of the order of the cells.
    check
        Function that returns the gain on validation molecules.
    on_check
        Function that is called with (epoch, gain) after each check.
    n_epochs, batch_size, learning_rate, prior_scale
        As in `Autoencoder`.

    Raises
    ------
    FloatingPointError
        If the loss is not finite before the first check.
    """
    network_and_loss = torch.nn.ModuleList([network, loss])
    optimizer = torch.optim.Adam(_parameter_groups(network, loss, counts, prior_scale), lr=learning_rate, fused=True)
    n_steps = n_epochs * counts.n_batches(batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    bfloat16 = computes_in_bfloat16(counts.device)
    history = History()
    best: dict[str, Tensor] = {}
    for epoch in range(1, n_epochs + 1):
        network_and_loss.train()
        total = torch.zeros((), device=counts.device)
        for batch in counts.batches(rng, batch_size):
            with torch.autocast(counts.device.type, dtype=torch.bfloat16, enabled=bfloat16):
                batch_loss = loss(network, batch)
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
            schedule.step()
            total += batch_loss.detach() * len(batch.starts)
        mean = float(total) / counts.n_trained
        if not math.isfinite(mean):
            message = (
                f"the loss was {mean} in epoch {epoch} of {n_epochs}: the learning rate, {learning_rate:g}, is likely "
                "too large."
            )
            if not best:
                raise FloatingPointError(f"{message} Pass a smaller learning_rate.")
            caveat(f"{message} The state after epoch {history.checked[history.best]} is kept.", stacklevel=2)
            break
        history.losses.append(mean)
        if epoch % max(1, n_epochs // _CHECKS) == 0 or epoch == n_epochs:
            network_and_loss.eval()
            gain = check().mean
            if not history.gains or gain > max(history.gains):
                best = copy.deepcopy(network_and_loss.state_dict())
            history.checked.append(epoch)
            history.gains.append(gain)
            on_check(epoch, gain)
            if history.best < len(history.gains) - _PATIENCE:
                break
    network_and_loss.load_state_dict(best)
    network_and_loss.eval()
    return history


def choose_device(name: str) -> torch.device:
    """Return the device of this name; ``"auto"`` is CUDA where there is one. ``"cpu"`` does not touch CUDA.

    Raises
    ------
    ValueError
        If there is no such device.
    """
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


def computes_in_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies in bfloat16 itself, which takes a quarter of the time."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # an older PyTorch does not tell
            return False
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False


def _parameter_groups(
    network: Network, loss: Loss, counts: Counts | StreamedCounts, prior_scale: float
) -> list[dict[str, object]]:
    """Return the parameters, those of genes with a Gaussian prior.

    The loss is in nats per molecule, so the prior's share is that of all molecules: |W|^2 / (2 scale^2 molecules). Adam
    takes the gradient of that as `weight_decay` (not AdamW, which would shrink rare and abundant genes alike).
    """
    of_genes = [network.genes.weight, network.batch_offsets]
    ids = {id(parameter) for parameter in of_genes}
    others = [p for module in (network, loss) for p in module.parameters() if id(p) not in ids]
    return [
        {"params": others},
        {"params": of_genes, "weight_decay": 1 / (prior_scale**2 * counts.n_molecules)},
    ]
