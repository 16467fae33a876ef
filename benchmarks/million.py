"""The autoencoder on very many cells, on a GPU: seconds an epoch, seconds of the whole `denoise`, and their floors.

    python benchmarks/million.py [--cells 1000000] [--genes 20000] [--stored 2000] [--device cuda] [--out RESULT.json]

Counts are simulated: 20 000 cells (or as many as asked for), log rates linear in 20 coordinates and a depth that
stores about `--stored` entries a cell, repeated until there are enough cells. The floor of an epoch is the larger
of its operations over 700 TFLOP/s and its bytes over 4.3 TB/s, an H200's rates in practice; what is counted is said
below. An epoch shows all cells where there are more than 50 000, so that is the least to ask for.
"""

from __future__ import annotations

import argparse
import json
import time

import anndata as ad
import numpy as np
import scipy.sparse as sp
from autoencoder import trained

import sc_noise2self as n2s
from sc_noise2self._blocks import Counts

FLOPS, BYTES = 700e12, 4.3e12  # a second
BLOCK = 1000


def simulate(n_cells: int, n_genes: int, n_stored: int) -> sp.csr_matrix:
    """Return counts, CSR float32 with 32-bit indices where they suffice."""
    rng = np.random.default_rng(0)
    n_distinct = min(n_cells, 20_000)
    base = rng.normal(0, 1.5, n_genes)
    loadings = rng.normal(size=(20, n_genes)) / np.sqrt(20)
    depth, blocks = 1.5 * n_stored, []
    for start in range(0, n_distinct, BLOCK):
        n_block = min(BLOCK, n_distinct - start)
        rates = np.exp(base + rng.normal(size=(n_block, 20)) @ loadings)
        rates *= depth / rates.sum(axis=1, keepdims=True)
        if start == 0:  # the depth at which so many entries are stored
            for _ in range(20):
                rates *= (n_stored / (1 - np.exp(-rates)).sum(axis=1).mean()) ** 1.3
            depth = float(rates.sum(axis=1).mean())
        blocks.append(sp.csr_matrix(rng.poisson(rates).astype(np.float32)))
    distinct = sp.vstack(blocks, format="csr")
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
    """Time training at one width, then the whole of `denoise` with the choice of the width."""
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

    seconds, every = [], Counts.of(counts)
    for n_epochs in (1, 3):
        # Some cells first: imports, and what the device compiles.
        learner = trained(counts[:1000], width=128, n_epochs=n_epochs, device=args.device)
        start = time.perf_counter()
        learner.refit(every, learner.settings[0], np.random.default_rng(0))
        seconds.append(time.perf_counter() - start)
    result |= {"start_up": seconds[0] - (seconds[1] - seconds[0]) / 2, "epoch": (seconds[1] - seconds[0]) / 2}
    print(json.dumps(result), flush=True)

    start = time.perf_counter()
    adata = ad.AnnData(counts)
    n2s.denoise(adata, n2s.Autoencoder(device=args.device), write_layer=False)
    result |= {"denoise": time.perf_counter() - start, "gain": adata.uns["denoised"]["gain"]}
    print(json.dumps(result), flush=True)
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main()
