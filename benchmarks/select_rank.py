"""Time and memory of `select_rank` beside `sc.pp.pca` and molecular cross-validation by its published recipe.

    python benchmarks/select_rank.py COUNTS.h5ad [--repeats 3]

Every measurement is a process of its own; the jobs take turns, and medians are printed. Time is that of the call
alone, after imports, a warm-up on 300 cells, and (for `pca`) normalisation. Memory is the peak of the process above
what it held before the call, plus the CSR matrix, in units of that matrix.

pca       sc.pp.pca(n_comps=50), default solver, on log1p of counts normalised to the median depth
rank      sc_noise2self.select_rank: one split, both directions, ranks 0 to 50
mcv       one of the ten trials of molecular cross-validation's published recipe (Batson, Royer & Webber 2019): square
          roots of a 90 to 10 split, a truncated SVD, and for every rank the rebuilt matrix, its expectations converted
          to the other depth, and the mean squared error
mcv-even  the same with even halves, which need no conversion
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

JOBS = ("pca", "rank", "mcv-even", "mcv")


def resident_mib() -> float:
    """Return the resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def measure(call) -> tuple[float, float]:
    """Return seconds, and the peak of resident memory above what was held before, in MiB."""
    before, peak, stop = resident_mib(), [0.0], threading.Event()

    def watch():
        while not stop.wait(0.002):
            peak[0] = max(peak[0], resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return seconds, peak[0] - before


def published_mcv(counts, fraction: float) -> int:
    """Return the rank of least loss, every rank's matrix rebuilt in double precision as published."""
    from sklearn.metrics import mean_squared_error
    from sklearn.utils.extmath import randomized_svd

    import sc_noise2self as n2s
    from sc_noise2self._transform import PoissonExpectation

    first, second = (np.sqrt(part.toarray(), dtype=np.float64) for part in n2s.split_molecules(counts, fraction))
    u, s, vt = randomized_svd(first, n_components=min(50, *counts.shape), random_state=0)
    means = np.linspace(0, np.sqrt(first.max() ** 2 / fraction), 5000) ** 2
    expectation = PoissonExpectation("sqrt")
    here, there = expectation(means * fraction), expectation(means * (1 - fraction))
    losses = []
    for k in range(1, len(s) + 1):
        rebuilt = (u[:, :k] * s[:k]) @ vt[:k]
        if fraction != 0.5:
            rebuilt = np.interp(np.maximum(rebuilt, 0), here, there)
        losses.append(mean_squared_error(second, rebuilt))
    return 1 + int(np.argmin(losses))


def job(name: str, path: Path) -> dict[str, float]:
    """Run one job in this process and return its measurements."""
    import anndata as ad
    import scanpy as sc

    import sc_noise2self as n2s

    adata = ad.read_h5ad(path)
    x = adata.X
    csr = (x.data.nbytes + x.indices.nbytes + x.indptr.nbytes) / 2**20
    calls = {
        "pca": lambda a: sc.pp.pca(a, n_comps=50),
        "rank": lambda a: n2s.select_rank(a, max_rank=50),
        "mcv-even": lambda a: published_mcv(a.X, 0.5),
        "mcv": lambda a: published_mcv(a.X, 0.9),
    }
    if name == "pca":
        sc.pp.normalize_total(adata, target_sum=float(np.median(np.asarray(x.sum(axis=1)))))
        sc.pp.log1p(adata)
    calls[name](adata[:300].copy())
    seconds, above = measure(lambda: calls[name](adata))
    return {"seconds": seconds, "memory": (above + csr) / csr, "above_mib": above, "csr_mib": csr}


def main() -> None:
    """Run every job in processes of their own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(job(args.job, args.path)))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.jobs}
    for _ in range(args.repeats):
        for name in args.jobs:
            command = [sys.executable, __file__, str(args.path), "--job", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[name].append(json.loads(output.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in results.items()
    }
    print(f"{args.path.stem}: CSR {medians['rank']['csr_mib']:.0f} MiB; medians of {args.repeats}")
    print("| | seconds | over rank | peak memory / CSR |\n|---|---|---|---|")
    for name, row in medians.items():
        ratio = row["seconds"] / medians["rank"]["seconds"]
        print(f"| {name} | {row['seconds']:.2f} | {ratio:.2f} | {row['memory']:.2f} |")


if __name__ == "__main__":
    main()
