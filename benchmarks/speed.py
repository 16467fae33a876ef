"""How long an analyst waits: each method beside `sc.pp.pca` and MAGIC, in turn, in one run.

    python benchmarks/speed.py SMALL.h5ad LARGE.h5ad --magic ENV/bin/python --repeats 3 --slow

Everything is called on SMALL, PBMC 3k say, but `sc.pp.pca(n_comps=50)` of log-normalised counts and `select_rank`,
which are called on LARGE, PBMC 8k. Medians over the repeats, after one call on few cells that compiles. MAGIC with its
defaults runs in an environment of its own, timed there, without imports and reading. `--slow` adds the autoencoder and
the ensemble, once.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import scanpy as sc

import sc_noise2self as n2s

MAGIC = """
import sys, time, anndata as ad, magic, numpy as np
counts = ad.read_h5ad(sys.argv[1]).X.toarray()
depth = counts.sum(axis=1, keepdims=True)
logs = np.log1p(counts * (np.median(depth) / np.maximum(depth, 1)))
start = time.perf_counter()
magic.MAGIC(random_state=0, verbose=0).fit_transform(logs, genes="all_genes")
print(time.perf_counter() - start)
"""
FIRST = """
import time
start = time.perf_counter()
import sc_noise2self as n2s
imported = time.perf_counter()
adata = n2s.datasets.pbmc68k_reduced()
read = time.perf_counter()
n2s.denoise(adata)
print(imported - start, time.perf_counter() - read)
"""


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def last_line(*command: str) -> str:
    """Return the last line that a process of its own prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[-2]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", type=Path)
    parser.add_argument("large", type=Path)
    parser.add_argument("--magic", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow", action="store_true")
    args = parser.parse_args()
    small, large = (ad.read_h5ad(path) for path in (args.small, args.large))
    logs = large.copy()
    sc.pp.normalize_total(logs)
    sc.pp.log1p(logs)
    for method in ("pca", "ensemble") if args.slow else ("pca",):
        n2s.denoise(n2s.datasets.pbmc68k_reduced(), method)
    calls: dict[str, Callable[[], float]] = {
        "sc.pp.pca(n_comps=50), large": lambda: seconds(lambda: sc.pp.pca(logs, n_comps=50)),
        "select_rank(adata), large": lambda: seconds(lambda: n2s.select_rank(large)),
        "denoise(adata), small": lambda: seconds(lambda: n2s.denoise(small)),
        'denoise(adata, "diffusion"), small': lambda: seconds(lambda: n2s.denoise(small, "diffusion")),
    }
    if args.magic:
        calls["MAGIC, small"] = lambda: float(last_line(str(args.magic), "-c", MAGIC, str(args.small)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(args.repeats):
        for name, call in calls.items():
            found[name].append(call())
    if args.slow:
        for method in ("autoencoder", "ensemble"):
            found[f'denoise(adata, "{method}"), small'] = [seconds(lambda name=method: n2s.denoise(small, name))]
    pca, of_magic = (statistics.median(found[name]) if name in found else float("nan") for name in list(calls)[::4])
    print("| | seconds | over sc.pp.pca | over MAGIC |\n|---|---|---|---|")
    for name, values in found.items():
        own = statistics.median(values)
        print(f"| {name} | {own:.1f} | {own / pca:.2f} | {own / of_magic:.2f} |")
    imported, first = last_line(sys.executable, "-c", FIRST).split()
    print(f"\nimport {float(imported):.2f} s; the first denoise of 700 cells in a process {float(first):.1f} s")


if __name__ == "__main__":
    main()
