"""Reading cells in random order from disk, as training does: cells a second, ours beside annbatch.

    python benchmarks/loader.py COUNTS.h5ad FOLDER --annbatch ENV/bin/python [--cells 200000]

FOLDER gets the first cells of COUNTS twice, once: as `.h5ad`, CSR, not compressed, and as annbatch's sharded zarr
(`write_sharded` at its defaults). Each loader gives all cells once, in batches of 4 096, in a process of its own, and
the best of three is printed. Ours gives the tensors that training takes (`StreamedCounts`: cells come in pools of
random stretches of 1 000), annbatch CSR matrices at the settings of its own example (`chunk_size=32`,
`preload_nchunks=512`) and with stretches as long as ours (`chunk_size=1024`, `preload_nchunks=20`). The files are in
the page cache, so what is timed is decoding and gathering, not the disk. zarr decodes by zarrs, as annbatch advises,
where it is installed. Tested with annbatch 0.3.1 and zarrs 0.2.3; annbatch needs Python 3.12.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

BATCH = 4096
PEERS = {
    "annbatch, zarr, stretches of 32": {"chunk_size": 32, "preload_nchunks": 512},
    "annbatch, zarr, stretches of 1024": {"chunk_size": 1024, "preload_nchunks": 20},
}
OURS = {"ours, .h5ad": "cells.h5ad", "ours, the same zarr": "cells.zarr"}


def make(source, folder, n_cells):
    """Write both files; it needs annbatch."""
    import anndata as ad
    import zarr
    from annbatch import write_sharded

    adata = ad.read_h5ad(source, backed="r")[:n_cells].to_memory()
    adata.write_h5ad(folder / "cells.h5ad")
    write_sharded(zarr.open_group(folder / "cells.zarr", mode="w", zarr_format=3), adata)


def of_annbatch(folder, options):
    """Return the cells that one pass gives, and its seconds."""
    import anndata as ad
    import zarr
    from annbatch import Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    group = zarr.open_group(folder / "cells.zarr", mode="r")
    loader = Loader(batch_size=BATCH, shuffle=True, preload_to_gpu=False, to=None, **options)
    loader = loader.add_dataset(ad.io.sparse_dataset(group["X"]))
    start, n_cells = time.perf_counter(), 0
    for batch in loader:
        n_cells += batch["X"].shape[0]
    return n_cells, time.perf_counter() - start


def of_ours(path):
    """Return the cells that one pass gives, and its seconds."""
    import anndata as ad
    import h5py
    import numpy as np
    import torch
    import zarr

    from sc_noise2self._anndata import as_counts
    from sc_noise2self.methods._network import Aside, StreamedCounts

    if path.suffix == ".zarr" and importlib.util.find_spec("zarrs"):
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    group = h5py.File(path) if path.suffix == ".h5ad" else zarr.open_group(path, mode="r")
    adata = ad.AnnData(obs=ad.io.read_elem(group["obs"]), var=ad.io.read_elem(group["var"]))
    adata.X = ad.io.sparse_dataset(group["X"])
    counts = as_counts(adata, None, None)
    nothing = Aside(np.arange(1), counts.chunks.take(np.arange(1)) * 0)
    streamed = StreamedCounts(counts, None, torch.device("cpu"), nothing)
    start, n_cells = time.perf_counter(), 0
    for batch in streamed.batches(np.random.default_rng(0), BATCH):
        n_cells += len(batch.starts)
    return n_cells, time.perf_counter() - start


def main():
    """Make the files, measure each loader in its own environment, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--annbatch", required=True, metavar="PYTHON")
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.measure == "make":
        make(args.counts, args.folder, args.cells)
        return
    if args.measure:
        path = args.folder / OURS.get(args.measure, "")
        runs = [of_ours(path) if args.measure in OURS else of_annbatch(path, PEERS[args.measure]) for _ in range(3)]
        print(json.dumps({"cells": runs[0][0], "seconds": min(seconds for _, seconds in runs)}))
        return
    args.folder.mkdir(parents=True, exist_ok=True)

    def run(python, what):
        command = [python, __file__, args.counts, args.folder, "--annbatch", args.annbatch, "--cells", str(args.cells)]
        done = subprocess.run([*command, "--measure", what], check=True, capture_output=True, text=True)
        return done.stdout

    if not (args.folder / "cells.zarr").exists():
        run(args.annbatch, "make")
    print("| | cells | seconds | cells a second |\n|---|---|---|---|")
    for name in (*OURS, *PEERS):
        found = json.loads(run(sys.executable if name in OURS else args.annbatch, name))
        print(f"| {name} | {found['cells']} | {found['seconds']:.2f} | {found['cells'] / found['seconds']:.0f} |")


if __name__ == "__main__":
    main()
