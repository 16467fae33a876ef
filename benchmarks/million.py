"""The autoencoder on very many cells, on a GPU: seconds an epoch, seconds of `denoise` by stage, and their floors.

    python benchmarks/million.py [--cells 1000000] [--genes 20000] [--stored 2000] [--device cuda] [--out RESULT.json]

Counts are simulated: 20 000 cells (or as many as asked for), log rates linear in 20 coordinates and a depth that
stores about `--stored` entries a cell, repeated until there are enough cells. The floor of an epoch is the larger
of its operations over 700 TFLOP/s and its bytes over 4.3 TB/s, an H200's rates in practice; what is counted is said
below. A stage's seconds are its own, without those of a stage within it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from functools import wraps
from threading import current_thread, main_thread

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

import sc_noise2self as n2s
from sc_noise2self import _choose, _denoise, _uncertainty
from sc_noise2self._threads import in_threads
from sc_noise2self.methods import _autoencoder, _network, _training

FLOPS, BYTES = 700e12, 4.3e12  # a second
BLOCK = 1000
STAGES = {
    "checking and counting": [(_denoise, "as_counts")],
    "choosing: counts, halves, scores": [(_denoise, "select")],
    "principal components": [(_autoencoder._AutoencoderLearner, "_principal_scores")],
    "counts onto the device": [(_network.DeviceCounts, "__init__")],
    "training": [(_training, "_epoch")],
    "gain on molecules set aside": [(_autoencoder._AutoencoderLearner, "_gain")],
    "what the choice gains": [(_choose.Measurement, "__init__"), (_choose.Measurement, "__call__")],
    "uncertainty": [(_uncertainty.Dispersions, "learned"), (_uncertainty.Dispersions, "coverage")],
    "profiles of all cells": [(_autoencoder.AutoencoderModel, "profiles")],
}


class Stages:
    """Seconds of each stage on the main thread."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.epochs: list[float] = []
        self._inside: list[float] = []

    def watch(self) -> None:
        """Wrap what the stages are made of."""
        for label, functions in STAGES.items():
            for holder, name in functions:
                found = vars(holder)[name]
                timed = self._timed(getattr(found, "__func__", found), label)
                setattr(holder, name, classmethod(timed) if isinstance(found, classmethod) else timed)

    def _timed(self, function, label):
        @wraps(function)
        def timed(*args, **kwargs):
            if current_thread() is not main_thread():
                return function(*args, **kwargs)
            start = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                own = time.perf_counter() - start
                self.seconds[label] += own - self._inside.pop()
                if label == "training":
                    self.epochs.append(round(own, 2))
                if self._inside:
                    self._inside[-1] += own

        return timed


def simulate(n_cells: int, n_genes: int, n_stored: int) -> sp.csr_matrix:
    """Return counts, CSR float32 with 32-bit indices where they suffice."""
    rng = np.random.default_rng(0)
    n_distinct = min(n_cells, 20_000)
    base = rng.normal(0, 1.5, n_genes)
    loadings = rng.normal(size=(20, n_genes)) / np.sqrt(20)

    def rates(start: int) -> np.ndarray:
        own = np.random.default_rng([1, start])
        found = np.exp(base + own.normal(size=(min(BLOCK, n_distinct - start), 20)) @ loadings)
        return found / found.sum(axis=1, keepdims=True)

    depth, some = 1.5 * n_stored, rates(0)
    for _ in range(20):  # the depth at which so many entries are stored
        depth *= (n_stored / (1 - np.exp(-depth * some)).sum(axis=1).mean()) ** 1.3

    def drawn(start: int) -> sp.csr_matrix:
        return sp.csr_matrix(np.random.default_rng([2, start]).poisson(depth * rates(start)).astype(np.float32))

    distinct = sp.vstack(list(in_threads(drawn, range(0, n_distinct, BLOCK))), format="csr")
    times = -(-n_cells // n_distinct)
    indptr = np.concatenate([[0], np.cumsum(np.tile(np.diff(distinct.indptr), times)[:n_cells])])
    data, indices = np.tile(distinct.data, times)[: indptr[-1]], np.tile(distinct.indices, times)[: indptr[-1]]
    return sp.csr_matrix((data, indices, indptr), shape=(n_cells, n_genes), copy=False)


def floor(counts: sp.csr_matrix, n_hidden: int, n_components: int = 100) -> dict[str, float]:
    """Return the least seconds an epoch can take.

    Operations: the output layer forward and twice backward, and the scores of the stored entries. Bytes: the outputs in
    bfloat16 written and read by the product, the softmax and its gradient, and read by two products; the held-out
    counts written and read; the stored entries, 6 bytes each, read.
    """
    n_cells, n_genes = counts.shape
    flops = 3 * 2 * n_cells * n_genes * n_hidden + 2 * counts.nnz * n_components
    moved = n_cells * n_genes * 2 * (1 + 2 + 2 + 2 + 2) + 6 * counts.nnz
    return {"floor_flops": flops / FLOPS, "floor_bytes": moved / BYTES}


def main() -> None:
    """Time the whole of `denoise` with the choice of the width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--stored", type=int, default=2_000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out")
    args = parser.parse_args()
    counts = simulate(args.cells, args.genes, args.stored)
    result = {"cells": args.cells, "genes": args.genes, "stored": counts.nnz, **floor(counts, n_hidden=256)}
    print(json.dumps(result), flush=True)

    # Some cells first: imports, and what is compiled.
    n2s.denoise(ad.AnnData(counts[:1000].copy()), n2s.Autoencoder(device=args.device, n_epochs=2), write_layer=False)
    adata, stages = ad.AnnData(counts), Stages()
    stages.watch()
    if on_cuda := args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    n2s.denoise(adata, n2s.Autoencoder(device=args.device), write_layer=False)
    whole, record = time.perf_counter() - start, adata.uns["denoised"]
    stages.seconds["the rest"] = whole - sum(stages.seconds.values())
    learned = next(iter(record["learned"].values()))
    result |= {
        "denoise": whole,
        "epoch": stages.epochs[-len(learned["epoch_losses"]) :],
        "stages": {label: round(each, 1) for label, each in sorted(stages.seconds.items(), key=lambda item: -item[1])},
        "gain": record["gain"],
        "setting": [str(each) for each in record["members"]["setting"]],
        "peak_device_gb": torch.cuda.max_memory_allocated() / 1e9 if on_cuda else 0,
    }
    print(json.dumps(result, indent=1), flush=True)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main()
