"""The rank that `select_rank` chooses where the rank is known, beside other rules.

    python benchmarks/ranks.py [--runs 200] [--out ranks.jsonl]

Each set has 300 to 1 500 cells of 300 to 2 000 molecules and 400 genes whose true rates have a known rank: mixtures of
programmes (linear, Poisson or negative binomial counts), log-linear rates, or clusters. Ranks are those of components
beyond the mean: k programmes or clusters span k - 1 dimensions around it.

Beside that number stands the rank of least true error: the number of components of log-normalised counts (as
`sc.pp.pca` finds them, of all molecules) that is nearest to their expectation given the rates. Other rules take the
same singular values: the elbow (the point farthest from the line between the first and the fiftieth), the optimal hard
threshold for unknown noise (Gavish & Donoho 2014), and Kaiser's rule (above the mean eigenvalue).
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp

import sc_noise2self as n2s
from sc_noise2self._blocks import Counts
from sc_noise2self._transform import PoissonExpectation
from sc_noise2self.methods._clusters import Graph, as_groups

N_GENES, MOST = 400, 50


def simulate(rng: np.random.Generator) -> tuple[dict, np.ndarray, sp.csr_matrix, float]:
    """Return what was drawn, the true profiles of cells, counts, and their overdispersion."""
    kind = str(rng.choice(["linear", "negative binomial", "log-linear", "clusters"]))
    n_cells, rank, depth = int(rng.integers(300, 1500)), int(rng.integers(1, 16)), float(rng.integers(300, 2000))
    base = rng.gamma(0.7, size=N_GENES) + 0.02
    if kind == "log-linear":
        directions = rng.normal(size=(rank, N_GENES)) * (rng.random((rank, N_GENES)) < 0.15)
        logs = np.log(base) + rng.normal(size=(n_cells, rank)) @ directions * 0.7
        profiles = np.exp(logs)
    else:
        programmes = base * np.exp(rng.normal(0, 1, (rank + 1, N_GENES)) * (rng.random((rank + 1, N_GENES)) < 0.15))
        programmes /= programmes.sum(axis=1, keepdims=True)
        if kind == "clusters":
            shares = np.eye(rank + 1)[rng.integers(rank + 1, size=n_cells)]
        else:
            shares = rng.dirichlet(np.full(rank + 1, 0.3), size=n_cells)
        profiles = shares @ programmes
    profiles /= profiles.sum(axis=1, keepdims=True)
    phi = 0.2 if kind == "negative binomial" else 0.0
    mean = depth * np.exp(rng.normal(0, 0.3, (n_cells, 1))) * profiles
    rates = mean * rng.gamma(1 / phi, phi, mean.shape) if phi else mean
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    about = {"kind": kind, "rank": rank, "cells": n_cells, "depth": round(depth)}
    return about, mean, counts, phi


def within_clusters(adata: ad.AnnData) -> np.ndarray:
    """Return the overdispersion of each gene within the clusters that the counts support."""
    n2s.select_resolution(adata)
    record = adata.uns["select_resolution"]
    graph = Graph.of(Counts.of(adata.X), record["params"]["n_pcs"], 15, np.random.default_rng(0))
    adata.obs["cluster"] = as_groups(graph.labels(record["resolution"]))
    return n2s.overdispersion(adata, "cluster")


def expected_log(mean: np.ndarray, size: np.ndarray, target: float) -> np.ndarray:
    """Return E[log1p(x target / size)] of Poisson counts of this mean, cell by cell, the size as it was observed."""
    return np.array([PoissonExpectation("log1p", float(target / s))(m) for m, s in zip(mean, size, strict=True)])


def true_errors(z: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared error of the first k components of centred counts, k from 0, and the singular values."""
    mean = z.mean(axis=0)
    u, s, v = np.linalg.svd(z - mean, full_matrices=False)
    off = truth - mean
    inner = np.einsum("ij,ij->j", u[:, :MOST], off @ v[:MOST].T)
    changes = np.square(s[:MOST]) - 2 * s[:MOST] * inner
    return np.concatenate([[0], np.cumsum(changes)]), s


def hard_threshold(s: np.ndarray, shape: tuple[int, int]) -> int:
    """Return how many singular values exceed the optimal hard threshold for unknown noise."""
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return int((s > omega * np.median(s)).sum())


def elbow(s: np.ndarray) -> int:
    """Return the rank whose singular value lies farthest below the line from the first to the last of them."""
    values = s[:MOST]
    line = np.linspace(values[0], values[-1], len(values))
    return int(np.argmax(line - values))


def main() -> None:
    """Run and keep what is not kept, and print how near each rule is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("ranks.jsonl"))
    args = parser.parse_args()
    kept = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    for seed in range(len(kept), args.runs):
        about, mean, counts, phi = simulate(np.random.default_rng(seed))
        adata = ad.AnnData(counts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            picks = {
                "select_rank": n2s.select_rank(adata, max_rank=MOST),
                "select_rank(overdispersion=)": n2s.select_rank(
                    adata, max_rank=MOST, overdispersion=within_clusters(adata)
                ),
            }
        size = np.asarray(counts.sum(axis=1)).ravel()
        target = float(np.median(size))
        z = np.log1p(counts.toarray() * (target / size)[:, None])
        errors, s = true_errors(z, expected_log(mean, size, target))
        picks |= {
            "elbow": elbow(s),
            "hard threshold": hard_threshold(s, z.shape),
            "Kaiser": int((s**2 > np.mean(s**2)).sum()),
        }
        kept.append({**about, "best": int(np.argmin(errors)), "errors": errors.tolist(), "picks": picks, "phi": phi})
        with args.out.open("a") as file:
            file.write(json.dumps(kept[-1]) + "\n")
    for kind in sorted({row["kind"] for row in kept}):
        rows = [row for row in kept if row["kind"] == kind]
        print(f"{kind}, {len(rows)} sets")
        for rule in kept[0]["picks"]:
            to_rank = np.array([row["picks"][rule] - row["rank"] for row in rows])
            to_best = np.array([row["picks"][rule] - row["best"] for row in rows])
            lost = [
                (row["errors"][min(row["picks"][rule], MOST)] - min(row["errors"])) / max(-min(row["errors"]), 1e-9)
                for row in rows
            ]
            print(
                f"    {rule}: the known rank exactly {np.mean(to_rank == 0):.2f}, within one "
                f"{np.mean(np.abs(to_rank) <= 1):.2f}; that of least error {np.mean(to_best == 0):.2f}, within one "
                f"{np.mean(np.abs(to_best) <= 1):.2f}; error reduction lost, mean {np.mean(lost):.3f}"
            )


if __name__ == "__main__":
    main()
