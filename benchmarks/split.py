"""Time of `split_molecules` beside `Generator.binomial` on the same entries.

    python benchmarks/split.py COUNTS.h5ad

`binomial` draws the numbers alone; `split_molecules` draws them and builds both sparse halves. In turn, five times;
medians.
"""

from __future__ import annotations

import statistics
import sys
import time

import anndata as ad
import numpy as np

import sc_noise2self as n2s


def main() -> None:
    """Print the table."""
    counts = ad.read_h5ad(sys.argv[1]).X.tocsr()
    rng = np.random.default_rng(0)
    calls = {
        "Generator.binomial, even": lambda: rng.binomial(counts.data.astype(np.int64), 0.5),
        "split_molecules, even": lambda: n2s.split_molecules(counts, random_state=rng),
        "split_molecules, 90 to 10": lambda: n2s.split_molecules(counts, 0.9, random_state=rng),
        "split_molecules, folds=10": lambda: n2s.split_molecules(counts, folds=10, random_state=rng),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(6):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    print(f"{counts.nnz:,} entries, {(counts.data == 1).mean():.0%} of them 1\n| | seconds |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values[1:]):.2f} |")


if __name__ == "__main__":
    main()
