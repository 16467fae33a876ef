"""Time, memory and gain from ten thousand to a million cells, ours beside what people use today.

    python benchmarks/scale.py COUNTS.h5ad FOLDER [--sizes 10000x2000 100000x2000 1000000x2000 100000x20000]
        [--jobs disk variable ensemble memory splits pca magic] [--python magic=ENV/bin/python] [--out RESULTS]

makes the sizes in FOLDER once (`.h5ad`, CSR, not compressed), runs every job on every size that it is able to take,
each in a process of its own, one after another, and writes RESULTS.md (the table, and the powers of growth with
cells and with genes) and RESULTS.png. A finished run is kept in FOLDER as JSON and is not repeated; delete it to
repeat it.

The cells are real ones resampled: COUNTS is denoised by `sc_noise2self.denoise(adata, mix=True)`, and a new cell is a
Poisson sample of a random cell's expected counts. So structure, depths and sparsity are those of real counts, no two
cells share a molecule, and the gain of the truth itself is known. Genes are taken evenly from as many of the most
detected as leave a tenth of the counts not zero, or as they are for 20 000.

disk      select_rank, then denoise(write_layer=False), on the backed file
variable  the same with the 2 000 genes that scanpy finds most variable in COUNTS (`mask_var`), of more genes than those
ensemble  denoise("ensemble", write_layer=False) on the backed file
memory    the same on the counts in memory
splits    denoise(write_layer=False, n_splits=3) in memory
pca       sc.pp.pca(n_comps=50) on log-normalised counts, with the time of normalisation left out
magic     MAGIC as in `peers`, up to 10 000 cells: its result is dense, and so is what it needs on the way
scvi      scVI as in `peers`, up to 10 000 cells

Of our jobs and of PCA, seconds are those after imports and reading, and memory is the peak of the process less what it
held after imports, the counts included. Of MAGIC and scVI both are of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

SIZES = ("10000x2000", "100000x2000", "1000000x2000", "10000x20000", "100000x20000")
JOBS = ("disk", "variable", "ensemble", "memory", "splits", "pca", "magic", "scvi")
ON_DISK = ("disk", "variable", "ensemble")
N_VARIABLE = 2000
MOST_CELLS = {"magic": 10_000, "scvi": 10_000}  # of peers
BLOCK = 2000


def make(source: Path, paths: list[Path]) -> None:
    """Write resampled counts, block by block, to files whose names are their sizes."""
    import anndata as ad
    import h5py
    import pandas as pd
    import scanpy as sc
    import scipy.sparse as sp

    import sc_noise2self as n2s
    from sc_noise2self._read import profiles as profiles_of

    adata = ad.read_h5ad(source)
    detected = np.asarray((adata.X > 0).mean(axis=0)).ravel()
    order = np.argsort(-detected, kind="stable")
    normalized = sc.pp.log1p(sc.pp.normalize_total(adata, copy=True), copy=True)
    variable = sc.pp.highly_variable_genes(normalized, n_top_genes=N_VARIABLE, inplace=False)["highly_variable"]
    n2s.denoise(adata, mix=True, write_layer=False)
    profiles = profiles_of(adata)
    for path in paths:
        n_cells, n_genes = map(int, path.stem.split("x"))
        chosen = order[:n_genes]
        if n_genes < 10_000:
            evenly = [order[np.linspace(0, pool - 1, n_genes).astype(int)] for pool in range(n_genes, len(order), 100)]
            chosen = min(evenly, key=lambda genes: abs(detected[genes].mean() - 0.1))
        rng = np.random.default_rng(0)
        partial = path.with_suffix(".partial")
        with h5py.File(partial, "w") as file:
            for start in range(0, n_cells, BLOCK):
                cells = rng.integers(adata.n_obs, size=min(BLOCK, n_cells - start))
                counts = sp.csr_matrix(rng.poisson(profiles.counts(cells, chosen)).astype(np.float32))
                if start == 0:
                    ad.io.write_elem(file, "X", counts)
                else:
                    ad.io.sparse_dataset(file["X"]).append(counts)
            ad.io.write_elem(file, "obs", pd.DataFrame(index=[f"cell-{i}" for i in range(n_cells)]))
            ad.io.write_elem(
                file, "var", pd.DataFrame({"variable": variable.to_numpy()[chosen]}, adata.var_names[chosen])
            )
            file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
        partial.rename(path)


def resident() -> float:
    """Return the resident memory of this process, GB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e9


def job(name: str, path: Path) -> dict[str, float]:
    """Run one of our jobs, or scanpy's, in this process and return what it took."""
    import anndata as ad
    import scanpy as sc

    import sc_noise2self as n2s

    n2s.denoise(small := n2s.datasets.pbmc68k_reduced(), write_layer=False)  # imports and tables
    n2s.select_rank(small)
    before, peak, stop = resident(), [0.0], threading.Event()

    def watch():
        while not stop.wait(0.01):
            peak[0] = max(peak[0], resident())

    threading.Thread(target=watch, daemon=True).start()
    adata = ad.read_h5ad(path, backed="r" if name in ON_DISK else None)
    out: dict[str, float] = {}
    if name not in ON_DISK:
        out["csr_gb"] = (adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes) / 1e9
    if name == "pca":
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
    start = time.perf_counter()
    if name == "pca":
        sc.pp.pca(adata, n_comps=50)
    else:
        mask_var = "variable" if name == "variable" else None
        if name not in ("splits", "ensemble"):
            out["rank"] = n2s.select_rank(adata, mask_var=mask_var)
            out["select_rank_seconds"] = time.perf_counter() - start
        method = "ensemble" if name == "ensemble" else "pca"
        n2s.denoise(adata, method, mask_var=mask_var, write_layer=False, n_splits=3 if name == "splits" else 1)
        out["gain"] = adata.uns["denoised"]["gain"]
        written = [adata.obsm[key].nbytes + adata.varm[key].nbytes for key in ("denoised", "denoised_scale")]
        out["factors_gb"] = sum(written) / 1e9
    out["seconds"] = time.perf_counter() - start
    stop.set()
    return out | {"peak_gb": max(peak[0], resident()) - before}


def run(name: str, path: Path, python: str) -> dict[str, float]:
    """Run a job in a process of its own; of a peer the whole process is measured."""
    if name not in MOST_CELLS:
        command = [sys.executable, "-W", "ignore", __file__, "--job", name, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else {"failed": done.returncode}
    script = Path(__file__).parent / "peers" / f"run_{name}.py"
    start = time.perf_counter()
    denoised = path.with_suffix(f".{name}.npy")
    process = subprocess.Popen([python, str(script), str(path), str(denoised)])
    _, status, usage = os.wait4(process.pid, 0)
    denoised.unlink(missing_ok=True)
    if code := os.waitstatus_to_exitcode(status):
        return {"failed": code}
    return {"seconds": time.perf_counter() - start, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def table(results: dict[tuple[str, int, int], dict[str, float]]) -> str:
    """Return the results as a table, with the powers b of seconds ~ cells^b and genes^b, and those of peak memory."""
    lines = ["| cells | genes | job | seconds | microseconds a cell | peak, GB | gain |", "|" + "---|" * 7]
    for (name, n_cells, n_genes), found in sorted(
        results.items(), key=lambda item: (item[0][2], item[0][0], item[0][1])
    ):
        if "failed" in found:
            lines.append(f"| {n_cells} | {n_genes} | {name} | failed ({found['failed']:.0f}) | | | |")
            continue
        gain = f"{found['gain']:.4f}" if "gain" in found else ""
        seconds, peak, each = found["seconds"], found["peak_gb"], 1e6 * found["seconds"] / n_cells
        lines.append(f"| {n_cells} | {n_genes} | {name} | {seconds:.1f} | {each:.0f} | {peak:.2f} | {gain} |")
    for along, fixed in (("cells", "genes"), ("genes", "cells")):
        lines += ["", f"| job | {fixed} | growth of seconds with {along} | of peak memory |", "|---|---|---|---|"]
        for (name, n), points in groups(results, along).items():
            if len(points) > 1:
                size, *values = np.log(np.array(points)).T
                powers = [f"{np.polyfit(size, each, 1)[0]:.2f}" for each in values]
                lines.append(f"| {name} | {n} | {powers[0]} | {powers[1]} |")
    return "\n".join(lines) + "\n"


def groups(
    results: dict[tuple[str, int, int], dict[str, float]], along: str = "cells"
) -> dict[tuple[str, int], list[tuple[float, ...]]]:
    """Return (cells, seconds, peak) of every job and number of genes, or the other way round."""
    out: dict[tuple[str, int], list[tuple[float, ...]]] = {}
    for (name, n_cells, n_genes), found in sorted(results.items()):
        fixed, size = (n_genes, n_cells) if along == "cells" else (n_cells, n_genes)
        if "failed" not in found:
            out.setdefault((name, fixed), []).append((size, found["seconds"], found["peak_gb"]))
    return out


def plot(results: dict[tuple[str, int, int], dict[str, float]], path: Path) -> None:
    """Draw seconds and memory against cells."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, ((name, n_genes), points) in enumerate(groups(results).items()):
        cells, *values = np.array(points).T
        for ax, each in zip(axes, values, strict=True):
            ax.loglog(
                cells,
                each,
                marker="osD^vP"[i % 6],
                linestyle="-" if n_genes < 10_000 else "--",
                label=f"{name}, {n_genes} genes",
            )
    for ax, label in zip(axes, ("seconds", "peak memory, GB"), strict=True):
        ax.set(xlabel="cells", ylabel=label)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Make what is missing, run what is missing, write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--jobs", nargs="+", default=("disk", "memory", "splits", "pca"), choices=JOBS)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--out", type=Path, default=Path("scale"))
    args = parser.parse_args()
    pythons = dict(each.split("=", 1) for each in args.python)
    args.folder.mkdir(exist_ok=True)
    paths = [args.folder / f"{size}.h5ad" for size in args.sizes]
    if missing := [str(path) for path in paths if not path.exists()]:
        subprocess.run([sys.executable, "-W", "ignore", __file__, "--make", str(args.counts), *missing], check=True)
    results = {}
    for path in paths:
        n_cells, n_genes = map(int, path.stem.split("x"))
        for name in args.jobs:
            too_many = n_cells > MOST_CELLS.get(name, n_cells)
            if (
                too_many
                or (name in MOST_CELLS and name not in pythons)
                or (name == "variable" and n_genes <= N_VARIABLE)
            ):
                continue
            kept = path.with_suffix(f".{name}.json")
            if not kept.exists():
                kept.write_text(json.dumps(run(name, path, pythons.get(name, sys.executable))))
            results[name, n_cells, n_genes] = json.loads(kept.read_text())
            print(name, path.stem, results[name, n_cells, n_genes], flush=True)
    args.out.with_suffix(".md").write_text(table(results))
    plot(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(Path(sys.argv[2]), [Path(each) for each in sys.argv[3:]])
    elif sys.argv[1:2] == ["--job"]:
        print(json.dumps(job(sys.argv[2], Path(sys.argv[3]))))
    else:
        main()
