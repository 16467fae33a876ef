"""What `select_resolution` chooses where the truth is known: nothing to find, simulated groups, and how long it takes.

    python benchmarks/clusters.py null COUNTS.h5ad ... [--runs 40]
    python benchmarks/clusters.py simulated [--runs 200] [--out sets.jsonl]
    python benchmarks/clusters.py types COUNTS.h5ad ... --out table.md
    python benchmarks/clusters.py tests COUNTS.h5ad ...
    python benchmarks/clusters.py power LINES.h5ad
    python benchmarks/clusters.py time COUNTS.h5ad

null       how often shuffled counts, at most 1 000 cells of them, are one cluster
simulated  groups, nested groups and gradients of 2 to 20 parts, 500 to 10 000 molecules a cell, 600 to 2 500 cells:
           the resolution chosen beside the one whose clusters of all molecules have profiles nearest to the truth
           (the expected log likelihood of a new molecule), and beside what the silhouette, the modularity and
           resolution 1 choose
tests      genes found between clusters of shuffled counts, and of counts in which every gene is negative binomial on
           its own: by Wilcoxon's test of the same molecules, or of the other half, and by our test
power      genes found between clusters of cell lines known by genotype (Wilcoxon's test between these, adjusted p below
           1e-6 and twice the level, says which there are)
time       seconds beside the recipe run once for every resolution
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
import scipy.sparse as sp
from sklearn.metrics import silhouette_score

import sc_noise2self as n2s
from sc_noise2self._blocks import Counts
from sc_noise2self.methods._clusters import Graph, molecules_of, principal_coordinates, shrunk_shares

N_GENES = 2_000
LEIDEN = {"flavor": "igraph", "n_iterations": 2, "directed": False}


def counts_of(path: Path, most: int | None = None) -> sp.csr_matrix:
    """Return the counts of a file, of some cells drawn at random."""
    counts = sp.csr_matrix(ad.read_h5ad(path).X, dtype=np.float32)
    if most is None or counts.shape[0] <= most:
        return counts
    return counts[np.sort(np.random.default_rng(0).choice(counts.shape[0], most, replace=False))]


def chosen(counts: sp.csr_matrix, **options) -> tuple[float, dict]:
    """Return the resolution that is selected, and the record."""
    adata = ad.AnnData(counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        resolution = n2s.select_resolution(adata, **options)
    return resolution, adata.uns["select_resolution"]


def null(paths: list[Path], runs: int) -> None:
    """Print how often shuffled counts are one cluster."""
    for path in paths:
        counts = counts_of(path, 1_000)
        found = [chosen(n2s.null_counts(counts, random_state=seed), random_state=seed)[0] == 0 for seed in range(runs)]
        print(f"{path.stem}: one cluster in {sum(found)} of {runs}", flush=True)


def simulate(rng: np.random.Generator) -> tuple[dict, np.ndarray, sp.csr_matrix]:
    """Return what was drawn, the true profiles of cells, and counts."""
    kind = str(rng.choice(["groups", "nested", "gradient"]))
    n_cells, n_parts = int(rng.integers(600, 2500)), int(rng.integers(2, 21))
    depth, strength = float(np.exp(rng.uniform(np.log(500), np.log(10_000)))), float(rng.uniform(0.3, 1.2))
    base = rng.normal(0, 1.5, N_GENES)

    def shifts(n: int, by: float) -> np.ndarray:
        return rng.normal(0, by, (n, N_GENES)) * (rng.random((n, N_GENES)) < 0.1)

    if kind == "gradient":
        ends = base + shifts(max(2, n_parts // 4 + 1), strength)
        start, way = rng.integers(len(ends) - 1, size=n_cells), rng.random((n_cells, 1))
        logs = ends[start] * (1 - way) + ends[start + 1] * way
    else:
        parts = base + shifts(n_parts, strength)
        if kind == "nested":
            n_top = max(2, int(np.sqrt(n_parts)))
            parts = np.repeat(base + shifts(n_top, strength), -(-n_parts // n_top), axis=0)
            parts = parts + shifts(len(parts), strength / 2)
        logs = parts[rng.choice(len(parts), n_cells, p=rng.dirichlet(np.full(len(parts), 3.0)))]
    profiles = np.exp(logs)
    profiles /= profiles.sum(axis=1, keepdims=True)
    size = np.exp(rng.normal(np.log(depth), 0.3, n_cells))
    counts = sp.csr_matrix(rng.poisson(profiles * size[:, None]).astype(np.float32))
    about = {"kind": kind, "parts": n_parts, "cells": n_cells, "depth": round(depth), "strength": round(strength, 2)}
    return about, profiles, counts


def simulated(runs: int, out: Path) -> None:
    """Run and keep what is not kept, and print how near each choice is to the best."""
    kept = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for seed in range(len(kept), runs):
        rng = np.random.default_rng(seed)
        about, profiles, counts = simulate(rng)
        resolution, record = chosen(counts, random_state=seed)
        grid, n_pcs = list(record["table"]["resolution"]), record["params"]["n_pcs"]
        whole = Counts.of(counts)
        points, graph = principal_coordinates(whole, n_pcs, rng), Graph.of(whole, n_pcs, 15, rng)
        true, n_clusters, silhouette, modularity = [], [], [], []
        for each in grid:
            labels = graph.labels(each)
            n_clusters.append(int(labels.max()) + 1)
            share = whole.totals / whole.totals.sum()
            logs = np.log(np.where(share > 0, shrunk_shares(molecules_of(labels, counts), whole.totals), 1))
            logs -= np.log(np.where(share > 0, share, 1))
            gain = sum(
                float(whole.size[labels == i] @ (profiles[labels == i] @ logs[i])) for i in range(n_clusters[-1])
            )
            true.append(gain / whole.size.sum())
            several = 1 < n_clusters[-1] < len(labels)
            silhouette.append(float(silhouette_score(points, labels)) if several else -1.0)
            edges = sp.csr_matrix(graph.neighbors.obsp["connectivities"])
            modularity.append(modularity_of(edges, labels))
        nearest_to_1 = int(np.argmin(np.abs(np.array(grid) - 1)))
        picks = {
            "select_resolution": grid.index(resolution),
            "silhouette": int(np.argmax(silhouette)),
            "modularity": int(np.argmax(modularity)),
            "resolution 1": nearest_to_1,
        }
        row = {**about, "n_pcs": n_pcs, "grid": grid, "n_clusters": n_clusters, "true": true, "picks": picks}
        row |= {name: list(map(float, record["table"][name])) for name in ("gain", "error")}
        kept.append(row)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    summarise(kept)


def modularity_of(edges: sp.csr_matrix, labels: np.ndarray) -> float:
    """Return the modularity of a partition of a weighted graph."""
    degree, total = np.asarray(edges.sum(axis=1)).ravel(), edges.sum()
    belongs = sp.csr_matrix((np.ones(len(labels)), (labels, np.arange(len(labels)))))
    inside = (belongs @ edges @ belongs.T).diagonal().sum()
    return float(inside / total - np.square(belongs @ degree).sum() / total**2)


def summarise(kept: list[dict]) -> None:
    """Print for each rule how far its choice is from the best, in steps of the grid and in gain."""
    there = [row for row in kept if max(row["true"]) > 1e-4]
    print(f"{len(kept)} sets; in {len(kept) - len(there)} no partition gains 0.0001 nats by the truth:")
    nothing = [row for row in kept if max(row["true"]) <= 1e-4]
    for rule in kept[0]["picks"]:
        print(f"    {rule}: one cluster in {sum(row['picks'][rule] == 0 for row in nothing)} of {len(nothing)}")
    for rule in kept[0]["picks"]:
        steps, lost = [], []
        for row in there:
            true = np.array(row["true"])
            best = np.flatnonzero(true >= true.max() - 1e-9)  # resolutions that give the same clusters are one
            steps.append(np.abs(best - row["picks"][rule]).min())
            lost.append(1 - true[row["picks"][rule]] / true.max())
        shares = [np.mean(np.array(steps) <= n) for n in (0, 1, 2, 4)]
        print(
            f"{rule}: within 0, 1, 2, 4 steps of sqrt(2) {np.round(shares, 3)}; gain lost: mean {np.mean(lost):.4f}, "
            f"95 % {np.quantile(lost, 0.95):.4f}, most {np.max(lost):.4f}"
        )


def types(paths: list[Path], out: Path) -> None:
    """Write what is chosen on real counts, and how well the clusters agree with the labels that come with them."""
    from sklearn.metrics import adjusted_rand_score

    columns = ("cell_type", "cell_line_demuxlet", "mix", "paul15_clusters", "bulk_labels")
    lines = ["| counts | cells | PCs | resolution | clusters | gain | ARI to labels |", "|---|---|---|---|---|---|---|"]
    for path in paths:
        adata = ad.read_h5ad(path)
        counts = sp.csr_matrix(adata.X, dtype=np.float32)
        resolution, record = chosen(counts)
        row = record["table"][record["table"]["chosen"]].iloc[0]
        n_pcs = record["params"]["n_pcs"]
        labels = Graph.of(Counts.of(counts), n_pcs, 15, np.random.default_rng(0)).labels(resolution)
        known = next((name for name in columns if name in adata.obs), None)
        agreement = "" if known is None else f"{adjusted_rand_score(adata.obs[known].astype(str), labels):.2f}"
        lines.append(
            f"| {path.stem} | {counts.shape[0]} | {n_pcs} | {resolution:g} | {labels.max() + 1} | {row['gain']:.4f} | "
            f"{agreement} |"
        )
        out.write_text("\n".join(lines) + "\n")
        print(lines[-1], flush=True)


def tests(paths: list[Path]) -> None:
    """Print the share of p-values below 5 % and the genes found where there is nothing to find."""
    for path in paths:
        counts = counts_of(path, 3_000)
        counts = counts[:, np.asarray((counts > 0).sum(axis=0)).ravel() >= 20]
        rng = np.random.default_rng(0)
        share = np.asarray(counts.sum(axis=0)).ravel() / counts.sum()
        phi = np.exp(rng.normal(np.log(0.3), 0.7, len(share)))
        mean = np.asarray(counts.sum(axis=1)) * share
        kinds = {
            "shuffled": n2s.null_counts(counts),
            "negative binomial": sp.csr_matrix(
                rng.poisson(mean * rng.gamma(1 / phi, phi, mean.shape)).astype(np.float32)
            ),
        }
        for kind, nothing in kinds.items():
            adata = ad.AnnData(nothing)
            n2s.rank_genes_groups(adata, 1.0, n_pcs=10)
            phi = n2s.overdispersion(adata) if kind == "negative binomial" else None
            tables = {
                "Wilcoxon, the same molecules": wilcoxon(nothing, nothing),
                "Wilcoxon, the other half": wilcoxon(*n2s.split_molecules(nothing, overdispersion=phi)),
                "n2s.rank_genes_groups": sc.get.rank_genes_groups_df(adata, None),
            }
            for name, table in tables.items():
                below, found = (table["pvals"] < 0.05).mean(), int((table["pvals_adj"] < 0.05).sum())
                print(f"{path.stem}, {kind}: {name}: p < 0.05 {below:.4f}; found {found} of {len(table)}", flush=True)


def wilcoxon(seen: sp.csr_matrix, tested: sp.csr_matrix) -> pd.DataFrame:
    """Return scanpy's ranking, corrected for ties, of genes in some counts between clusters of others."""
    first, second = ad.AnnData(seen.copy()), ad.AnnData(tested.copy())
    for adata in (first, second):
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
    sc.pp.pca(first, n_comps=10)
    sc.pp.neighbors(first)
    sc.tl.leiden(first, **LEIDEN)
    second.obs["leiden"] = first.obs["leiden"].to_numpy()
    sc.tl.rank_genes_groups(second, "leiden", method="wilcoxon", tie_correct=True)
    return sc.get.rank_genes_groups_df(second, None)


def power(path: Path) -> None:
    """Print what share of the genes that differ between lines known by genotype each way finds between clusters."""
    adata = ad.read_h5ad(path)
    adata = adata[adata.obs["demuxlet_cls"] == "SNG"].copy()
    adata.X = sp.csr_matrix(adata.X, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of counts that look like reads
        n2s.rank_genes_groups(adata, 0.1, key_added="ours")
    logged = adata.copy()
    sc.pp.normalize_total(logged)
    sc.pp.log1p(logged)
    sc.pp.pca(logged, n_comps=adata.uns["n2s_groups"]["params"]["n_pcs"])
    sc.pp.neighbors(logged)
    sc.tl.leiden(logged, resolution=0.1, **LEIDEN)
    logged.obs["line"] = logged.obs["cell_line_demuxlet"].astype("category")
    sc.tl.rank_genes_groups(logged, "line", method="wilcoxon", key_added="truth")
    sc.tl.rank_genes_groups(logged, "leiden", method="wilcoxon", key_added="naive")
    line = adata.obs["cell_line_demuxlet"].astype(str).to_numpy()
    for name, source, groups in (("n2s", adata, "n2s_groups"), ("Wilcoxon, all molecules", logged, "leiden")):
        found, known = [], []
        for group in source.obs[groups].cat.categories:
            own = source.obs[groups] == group
            home = max(set(line[own]), key=list(line[own]).count)
            truth = sc.get.rank_genes_groups_df(logged, home, key="truth")
            truth = set(truth["names"][(truth["pvals_adj"] < 1e-6) & (truth["logfoldchanges"] > 1)])
            key = "ours" if groups == "n2s_groups" else "naive"
            table = sc.get.rank_genes_groups_df(source, group, key=key)
            hits = set(table["names"][(table["pvals_adj"] < 0.05) & (table["scores"] > 0)])
            found.append(len(hits & truth))
            known.append(len(truth))
        print(f"{name}: {len(found)} clusters, {sum(found)} of {sum(known)} genes found", flush=True)


def seconds(path: Path) -> None:
    """Print the seconds of `select_resolution` and of the recipe for every resolution that it compared."""
    counts = counts_of(path)
    n2s.select_resolution(ad.AnnData(counts[:300]))  # what is compiled or imported at first
    start = time.perf_counter()
    _, record = chosen(counts)
    ours = time.perf_counter() - start
    n_pcs, start = record["params"]["n_pcs"], time.perf_counter()
    for resolution in record["table"]["resolution"][1:]:
        adata = ad.AnnData(counts.copy())
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        sc.pp.pca(adata, n_comps=n_pcs)
        sc.pp.neighbors(adata, transformer="sklearn")
        sc.tl.leiden(adata, resolution=resolution, **LEIDEN)
    recipes = time.perf_counter() - start
    n = len(record["table"]) - 1
    print(f"select_resolution {ours:.1f} s; the recipe for {n} resolutions {recipes:.1f} s: {ours / recipes:.2f}")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("null", "simulated", "types", "tests", "power", "time"))
    parser.add_argument("counts", nargs="*", type=Path)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--out", type=Path, default=Path("clusters.jsonl"))
    args = parser.parse_args()
    if args.what == "null":
        null(args.counts, args.runs or 40)
    elif args.what == "simulated":
        simulated(args.runs or 200, args.out)
    elif args.what == "types":
        types(args.counts, args.out)
    elif args.what == "power":
        power(args.counts[0])
    elif args.what == "tests":
        tests(args.counts)
    else:
        seconds(args.counts[0])


if __name__ == "__main__":
    main()
