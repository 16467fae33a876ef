"""Training speed of autoencoders: cells per second and epoch, the same counts, one run, the same machine.

    python benchmarks/throughput.py COUNTS.h5ad --python dca=ENV/bin/python --python scvi=ENV/bin/python

Each trains twice, for a few epochs and for more; the difference leaves out starting, reading and compiling. DCA and
scVI train with their own settings (batch 32 and 128), ours with its own (batch 128). What the peers' environments need
is said in `benchmarks/peers`. This file runs itself in each of them, so it keeps to Python 3.8.
"""

import argparse
import functools
import json
import subprocess
import sys
import time

EPOCHS = {"width 128": (4, 12), "width 64": (4, 12), "dca": (2, 5), "scvi": (1, 3)}


def read(path):
    """Return the counts, CSR; by h5py, because an old anndata does not read new files."""
    import h5py
    import scipy.sparse as sp

    with h5py.File(path, "r") as file:
        x = file["X"]
        return sp.csr_matrix((x["data"][:], x["indices"][:], x["indptr"][:]), shape=tuple(x.attrs["shape"]))


def train_ours(counts, n_epochs, width):
    """Train the autoencoder of this package at one width; its hidden layers are twice as wide."""
    from autoencoder import trained

    trained(counts.astype("float32"), width=width, n_epochs=n_epochs, device="cpu")


def train_dca(counts, n_epochs):
    """Train DCA with its default network."""
    import anndata as ad
    from dca.api import dca

    dca(ad.AnnData(counts.toarray().astype("float32")), epochs=n_epochs, threads=2, verbose=False)


def train_scvi(counts, n_epochs):
    """Train scVI with a negative binomial likelihood."""
    import anndata as ad
    import scvi

    adata = ad.AnnData(counts.astype("float32"))
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata, gene_likelihood="nb")
    model.train(
        max_epochs=n_epochs,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        logger=False,
    )


def measure(name, path):
    """Return seconds per epoch, from the difference of two runs."""
    counts = read(path)
    counts = counts[:, (counts > 0).sum(axis=0).A1 >= 3]
    train = {
        "width 128": functools.partial(train_ours, width=128),
        "width 64": functools.partial(train_ours, width=64),
        "dca": train_dca,
        "scvi": train_scvi,
    }[name]
    few, many = EPOCHS[name]
    train(counts, few)  # imports and compiles
    seconds = []
    for n_epochs in (few, many):
        start = time.perf_counter()
        train(counts, n_epochs)
        seconds.append(time.perf_counter() - start)
    return {"cells": counts.shape[0], "genes": counts.shape[1], "epoch": (seconds[1] - seconds[0]) / (many - few)}


def main():
    """Measure each in its own environment and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.counts)))
        return
    pythons = {
        "width 128": sys.executable,
        "width 64": sys.executable,
        **dict(pair.split("=", 1) for pair in args.python),
    }
    print("| | seconds an epoch | cells a second |\n|---|---|---|")
    for name, python in pythons.items():
        command = [python, __file__, args.counts, "--measure", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr[-300:]} | |")
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"| {name} | {found['epoch']:.2f} | {found['cells'] / found['epoch']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
