"""MAGIC's t chosen by `sc_noise2self.calibrate`, and MAGIC beside `sc_noise2self.Diffusion` at the same t.

    python benchmarks/walks.py calibrate DATA/pbmc3k_10x.h5ad
    python benchmarks/walks.py walks DATA/paul15_myeloid.h5ad DATA/pbmc3k_10x.h5ad

Tested with magic-impute 3.0.0, which must be installed beside this package. `calibrate` runs the README's snippet.
`walks` splits the molecules 90 to 10 and reports nats per held-out molecule above the mean profile.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import anndata as ad
import magic
import numpy as np
import scipy.sparse as sp

import sc_noise2self as n2s


def read(path: Path) -> ad.AnnData:
    """Return the cells above 200 molecules and the genes in at least 3 cells."""
    adata = ad.read_h5ad(path)
    adata = adata[:, np.asarray((adata.X > 0).sum(axis=0)).ravel() >= 3]
    return adata[np.asarray(adata.X.sum(axis=1)).ravel() > 200].copy()


def gain(denoised: np.ndarray, seen: sp.csr_matrix, held_out: sp.csr_matrix) -> float:
    """Return the held-out gain, with .5 % of the mean profile blended in as everywhere."""
    mean = np.asarray(seen.sum(axis=0), dtype=np.float64).ravel() / seen.sum()
    x = held_out.tocoo()
    known = mean[x.col] > 0
    shares = denoised[x.row, x.col] / denoised.sum(axis=1)[x.row]
    ratio = 0.995 * shares[known] / mean[x.col][known] + 0.005
    return float((x.data[known] * np.log(ratio)).sum() / x.data[known].sum())


def diffused(values: np.ndarray, t: int) -> np.ndarray:
    """Return what MAGIC makes of transformed counts."""
    return magic.MAGIC(t=t, random_state=0, verbose=0).fit_transform(values)


def theirs(counts: sp.csr_matrix, t: int) -> np.ndarray:
    """Return what MAGIC makes of log1p counts at the median depth, taken back by expm1."""
    depth = np.asarray(counts.sum(axis=1))
    logs = np.log1p(counts.toarray() * (np.median(depth) / np.maximum(depth, 1)))
    return np.maximum(np.expm1(np.asarray(diffused(logs, t), dtype=np.float64)), 0)


def walks(path: Path) -> None:
    """Print the gains of both at each t, and where ours chooses t itself."""
    seen, held_out = n2s.split_molecules(sp.csr_matrix(read(path).X, dtype=np.float32), 0.9)
    for t in (1, 2, 3, 4, None):
        ours = ad.AnnData(seen.copy())
        n2s.denoise(ours, n2s.Diffusion() if t is None else n2s.Diffusion(t=t))
        of_magic = "" if t is None else f"{gain(theirs(seen, t), seen, held_out):.4f}"
        setting = ours.uns["denoised"]["members"]["setting"][0]
        found = gain(ours.layers["denoised"].astype(np.float64), seen, held_out)
        print(f"| {path.stem} | {'chosen' if t is None else t} | {of_magic} | {found:.4f} ({setting}) |", flush=True)


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["calibrate", "walks"])
    parser.add_argument("counts", nargs="+", type=Path)
    args = parser.parse_args()
    for path in args.counts:
        if args.what == "walks":
            walks(path)
            continue
        adata = read(path)
        start = time.perf_counter()
        result = n2s.calibrate(adata, diffused, {"t": range(9)}, transform="log1p")
        print(result.table.round(4).to_string(index=False))
        print(f"{path.stem}: {result.best}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
