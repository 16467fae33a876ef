"""The autoencoder's losses, seeds and widths by held-out gain.

    python benchmarks/autoencoder.py losses DATA/pbmc3k_10x.h5ad ...
    python benchmarks/autoencoder.py seeds DATA/pbmc3k_10x.h5ad ...
    python benchmarks/autoencoder.py widths

`losses` and `seeds` split the molecules 90 to 10, fit one width to the nine tenths, and report nats per held-out
molecule above the mean profile, and seconds.

`widths` compares two ways to choose the width on counts whose log rates lie on a plane of known dimension: a sweep,
which trains a network per width, and one nested training (Matryoshka, nested dropout) in which every step shows the
decoder a random number of the code's first units, so that one network serves every width. Both are scored on the same
held-out tenth.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

import sc_noise2self as n2s
from sc_noise2self._blocks import Counts
from sc_noise2self._compare import Comparison
from sc_noise2self._loss import Gain
from sc_noise2self._model import LINKS
from sc_noise2self.methods import _network
from sc_noise2self.methods._autoencoder import narrowest_as_good
from sc_noise2self.methods._base import Learner
from sc_noise2self.partitions import fold_of

WIDTHS = (32, 16, 8, 4, 2, 1)


class Nested(_network.Network):
    """All code units but the first few are 0: a number drawn anew each step in training, `active` of them after."""

    active = WIDTHS[0]

    def bottleneck(self, entries: _network.Entries) -> torch.Tensor:
        """Return the code, its later units set to 0."""
        code = super().bottleneck(entries)
        active = WIDTHS[int(torch.randint(len(WIDTHS), ()))] if self.training else self.active
        return code * (torch.arange(code.shape[1], device=code.device) < active)


def read(path: Path) -> sp.csr_matrix:
    """Return the counts of cells above 200 molecules and of genes in at least 3 cells."""
    counts = ad.read_h5ad(path).X.tocsr().astype(np.float32)
    counts = counts[:, np.asarray((counts > 0).sum(axis=0)).ravel() >= 3]
    return counts[np.asarray(counts.sum(axis=1)).ravel() > 200]


def trained(counts: sp.csr_matrix, seed: int = 0, **options) -> Learner:
    """Return an autoencoder with these options, trained once on all molecules but those it sets aside."""
    (learner,) = n2s.Autoencoder(**options).checked(Counts.of(counts)).learners(Counts.of(counts))
    learner.prepare(counts, np.arange(counts.shape[0]), np.random.default_rng(seed))
    return learner


def gain(learner: Learner, seen: sp.csr_matrix, held_out: sp.csr_matrix) -> Gain:
    """Return the held-out gain of what was trained on the molecules seen."""
    profiles = learner.refit(Counts.of(seen), learner.settings[0], np.random.default_rng(0))
    return fold_of(seen, held_out).gain(profiles)


def report(path: Path, label: str, seen: sp.csr_matrix, held_out: sp.csr_matrix, seed: int = 0, **options) -> None:
    """Fit, score and print one line."""
    start = time.perf_counter()
    learner = trained(seen, seed, width=64, device="cpu", **options)
    seconds = time.perf_counter() - start
    print(f"| {path.stem} | {label} | {gain(learner, seen, held_out).mean:.4f} | {seconds:.1f} |", flush=True)


def on_a_plane(dimension: int) -> sp.csr_matrix:
    """Return counts of 1500 cells x 300 genes, 3000 molecules a cell, with log rates linear in so many coordinates."""
    rng = np.random.default_rng(dimension)
    z = rng.normal(size=(1500, dimension)) @ rng.normal(size=(dimension, 300)) / np.sqrt(dimension)
    rates = np.exp(z + rng.normal(0, 1, 300))
    return sp.csr_matrix(rng.poisson(3000 * rates / rates.sum(axis=1, keepdims=True)).astype(np.float32))


def widths() -> None:
    """Print both curves for several dimensions: gain of each width less that of the best, and the choice."""
    plain = _network.Network
    print("| dimension | | " + " | ".join(map(str, WIDTHS)) + " | chosen | seconds |")
    print("|---" * (len(WIDTHS) + 4) + "|")
    for dimension in (1, 2, 4, 8):
        seen, held_out = n2s.split_molecules(on_a_plane(dimension), 0.9)
        start = time.perf_counter()
        sweep = [gain(trained(seen, width=width, device="cpu"), seen, held_out) for width in WIDTHS]
        show(dimension, "sweep", sweep, time.perf_counter() - start)
        start = time.perf_counter()
        _network.Network, Nested.active = Nested, WIDTHS[0]
        learner = trained(seen, width=WIDTHS[0], device="cpu")
        _network.Network = plain
        nested = []
        for Nested.active in WIDTHS:
            nested.append(gain(learner, seen, held_out))
        show(dimension, "nested", nested, time.perf_counter() - start)


def show(dimension: int, label: str, gains: list[Gain], seconds: float) -> None:
    """Print one curve; the choice is the narrowest width within one paired standard error of the best."""
    comparison = Comparison()
    for width, each in zip(WIDTHS, gains, strict=True):
        comparison.add({"width": width}, -each)
    curve = " | ".join(f"{each.mean:.4f}" for each in gains)
    print(f"| {dimension} | {label} | {curve} | {WIDTHS[narrowest_as_good(comparison)]} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Run one of the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["losses", "seeds", "widths"])
    parser.add_argument("counts", nargs="*", type=Path)
    args = parser.parse_args()
    if args.what == "widths":
        widths()
        return
    for path in args.counts:
        seen, held_out = n2s.split_molecules(read(path), 0.9)
        if args.what == "losses":
            for loss in LINKS:
                report(path, loss, seen, held_out, loss=loss)
        else:
            for seed in range(5):
                report(path, f"seed {seed}", seen, held_out, seed)


if __name__ == "__main__":
    main()
