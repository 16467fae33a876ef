"""How often intervals hold what they promise to hold, measured from outside.

    python benchmarks/intervals.py --data DATA --out table.md paul15_myeloid:pca pbmc3k_10x:ensemble:0.1

The molecules of a data set are split, into even halves or so that a part of this share is seen. It is denoised, and the
rest is held against the intervals that are written with it: 400 000 entries, as many in each tenth of the genes by
expression, the cells drawn at random. The counts are discrete, so their probability integral transform is randomised
(Smith 1985). The table has the share inside the 50 % and 90 % intervals, over all and in the worst tenths of genes and
of cells by depth. Where little is seen of deep counts, the rest nearly is the expected count itself, and the last
column has its intervals: those of the entries whose rate is less sure than counting (phi m > 1).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp

import sc_noise2self as n2s
from sc_noise2self._intervals import Belief, strata_of
from sc_noise2self._read import beliefs

ENTRIES = 400_000
FEWEST = 3  # cells that have a gene


def parts(path: Path, seen: float) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Return the two parts of a data set's molecules, without rare genes and cells whose first part is empty."""
    counts = ad.read_h5ad(path).X.tocsr()
    counts = counts[:, np.asarray((counts > 0).sum(axis=0)).ravel() >= FEWEST]
    one, two = n2s.split_molecules(counts, seen, random_state=7)
    kept = np.asarray(one.sum(axis=1)).ravel() > 0
    return one[kept], two[kept]


def integrals(one: sp.csr_matrix, two: sp.csr_matrix, method: str) -> tuple[np.ndarray, ...]:
    """Return integral transforms of entries of the second part, tenths of their genes and cells, and what is unsure."""
    adata, rng = ad.AnnData(one.astype(np.float32)), np.random.default_rng(0)
    n2s.denoise(adata, method)
    expected, size, depth = adata.layers["denoised"], *(np.asarray(x.sum(axis=1)).ravel() for x in (one, two))
    of_genes, of_cells = strata_of(expected.sum(axis=0)), strata_of(size)
    cells = rng.integers(0, len(size), ENTRIES)
    genes = np.concatenate([rng.choice(np.flatnonzero(of_genes == i), ENTRIES // 10) for i in range(10)])
    every = beliefs(adata, "denoised", slice(None), slice(None))
    belief = Belief(every.shape[cells, genes], every.mean[cells, genes] * depth[cells] / size[cells])
    counts, unsure = np.asarray(two[cells, genes]).ravel(), belief.mean > belief.shape
    return belief.probability_integral(counts, rng.random(ENTRIES)), of_genes[genes], of_cells[cells], unsure


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="DATASET:METHOD[:SEEN]")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("intervals.md"))
    args = parser.parse_args()
    lines = [
        "| data | method | seen | 50 % | 90 % | 90 %, tenths of genes | 90 %, tenths of cells | 90 %, unsure |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in args.runs:
        name, method, *share = each.split(":")
        seen = float(share[0]) if share else 0.5
        found, genes, cells, unsure = integrals(*parts(args.data / f"{name}.h5ad", seen), method)
        inside = {level: np.abs(found - 0.5) <= level / 2 for level in (0.5, 0.9)}
        ranges = [
            f"{min(shares):.3f} to {max(shares):.3f}"
            for shares in ([inside[0.9][tenth == i].mean() for i in range(10)] for tenth in (genes, cells))
        ]
        shares = [f"{found.mean():.3f}" for found in (inside[0.5], inside[0.9])]
        of_unsure = f"{inside[0.9][unsure].mean():.3f} of {unsure.sum()}"
        lines.append(f"| {' | '.join([name, method, f'{seen:g}', *shares, *ranges, of_unsure])} |")
        print(lines[-1], flush=True)
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
