"""How far the held-out gain moves where a constant of ours, one that moves a result, is another.

    python benchmarks/constants.py --evaluator EVALUATE/heldout.py --data DATA --out table.md \
        paul15_myeloid pbmc3k_10x baron_human1_pancreas

Each row sets one constant to another value for one run of `denoise` a data set, all else as it is, and shows what
the gain on molecules never seen (nine tenths are seen) differs by, in thousandths of a nat. `--method` says which
method's constants. Finished runs are kept in the file that `--cache` names.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from peers import heldout

import sc_noise2self as n2s
from sc_noise2self.methods._pca import Shrinkage
from sc_noise2self.methods._populations import FACTOR_GRID, HEIGHTS


def strengths(*values: float) -> tuple[Shrinkage, ...]:
    """Return ways to weight components, the cut among them."""
    return Shrinkage(values[0]), Shrinkage(None), *(Shrinkage(each) for each in values[1:])


# What it is; the module and name of the constant, or an option of the method; the other values.
OF_PCA: list[tuple[str, str, dict[str, Any]]] = [
    ("depth of log1p over the median, 1/4", "methods._components._LOG1P_DEPTH", {"1/8": 0.125, "1/2": 0.5}),
    (
        "power of the noise that genes are weighted by, -1/4",
        "methods._components._NOISE_POWER",
        {"-1/8": -0.125, "-3/8": -0.375},
    ),
    ("components, 100", "methods._pca._MOST_COMPONENTS", {"50": 50, "200": 200}),
    (
        "strengths of shrinkage, 1 2 4 8",
        "methods._pca.PCALearner.settings",
        {
            "halved": strengths(1, 0.5, 2, 4),
            "doubled": strengths(4, 2, 8, 16),
            "twice as many": strengths(2, 1, 1.4, 2.8, 4, 5.6, 8),
        },
    ),
    (
        "heights of the floor, 0 1/8 1/4 1/2 1",
        "methods._populations.HEIGHTS",
        {"up to 2": (*HEIGHTS, 2.0), "twice as many": (0.0, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)},
    ),
    ("cells of a population at least, 10", "methods._populations._LEAST_CELLS", {"5": 5, "20": 20}),
    ("random projections that cells are clustered by, 100", "methods._populations._SKETCH", {"50": 50, "200": 200}),
    (
        "grid of the dispersion of factors, 15 from 0.003 to 1e4",
        "methods._populations.FACTOR_GRID",
        {
            "8": np.concatenate([[0], np.geomspace(0.003, 1e4, 8)]),
            "30": np.concatenate([[0], np.geomspace(0.003, 1e4, 30)]),
            "to 1e3": FACTOR_GRID[:-2],
        },
    ),
    ("gene totals are right to 0.1 %", "methods._profiles._TOTALS_OFF", {"0.05 %": 5e-4, "0.2 %": 2e-3}),
    ("mean profile blended in to score, 0.5 %", "_loss._BLEND", {"0.25 %": 0.0025, "1 %": 0.01}),
    ("entries that candidates are compared on, 2e7", "_choose._SCORED", {"1e7": 10_000_000, "4e7": 40_000_000}),
]
OF_AUTOENCODER: list[tuple[str, str, dict[str, Any]]] = [
    ("scale of the prior of genes' weights, 0.08", "prior_scale", {"0.04": 0.04, "0.16": 0.16}),
    ("learning rate, 0.007", "learning_rate", {"halved": 0.5, "doubled": 2.0}),
    ("second beta of Adam, 0.95", "methods._training._BETAS", {"0.9": (0.9, 0.9), "0.98": (0.9, 0.98)}),
    ("power of time that states weigh with, 3", "methods._training._LATE", {"1": 1, "8": 8}),
    ("steps between states that are averaged, 4", "methods._training._AVERAGED", {"1": 1, "16": 16}),
    ("cells shown in training, 120 000", "methods._autoencoder._CELLS_SHOWN", {"60 000": 60_000, "240 000": 240_000}),
    ("checks without a better one before training stops, 3", "methods._training._PATIENCE", {"2": 2, "6": 6}),
    ("cells a step, 128 or more", "batch_size", {"64": 64, "256": 256}),
    ("units of hidden layers, twice the width", "n_hidden", {"64": 64, "512": 512}),
    ("components that a cell enters by, 100", "n_components", {"50": 50, "200": 200}),
    (
        "shares of molecules seen, 0.3 to 0.9",
        "methods._network_losses.Multinomial.shares",
        {"0.2 to 0.9": (0.2, 0.9), "0.4 to 0.8": (0.4, 0.8)},
    ),
]
CONSTANTS = {"pca": OF_PCA, "autoencoder": OF_AUTOENCODER}
METHODS = {"pca": n2s.PCA, "autoencoder": n2s.Autoencoder}


def holder(path: str) -> tuple[Any, str]:
    """Return the module or class that holds a constant, and its name there."""
    *parts, name = path.split(".")
    depth = next(i for i in range(len(parts), 0, -1) if parts[i - 1].startswith("_"))
    found = importlib.import_module(".".join(["sc_noise2self", *parts[:depth]]))
    for part in parts[depth:]:
        found = getattr(found, part)
    assert hasattr(found, name), path
    return found, name


def run(method: str, counts: Any, score: Any, path: str = "", value: Any = None) -> dict[str, Any]:
    """Return the gain, and seconds, with a constant at a value."""
    options, restore = {}, None
    if "." in path:
        found, name = holder(path)
        restore = (found, name, getattr(found, name))
        setattr(found, name, value)
    elif path:
        options[path] = value * METHODS[method]().learning_rate if path == "learning_rate" else value
    adata, start = ad.AnnData(counts.copy()), time.perf_counter()
    try:
        n2s.denoise(adata, METHODS[method](**options))
    finally:
        if restore:
            setattr(*restore)
    return {"gain": float(score(adata.layers["denoised"])["gain"]), "seconds": time.perf_counter() - start}


def main() -> None:
    """Run what is not kept, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--evaluator", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--method", choices=CONSTANTS, default="pca")
    parser.add_argument("--cache", type=Path, default=Path("constants.json"))
    parser.add_argument("--out", type=Path, default=Path("constants.md"))
    args = parser.parse_args()
    kept = json.loads(args.cache.read_text()) if args.cache.exists() else {}

    def gain(name: str, *about: Any, label: str) -> float:
        key = f"{args.method} | {name} | {label}"
        if key not in kept:
            counts, score = heldout(name, args.evaluator, args.data)
            kept[key] = run(args.method, counts, score, *about)
            args.cache.write_text(json.dumps(kept, indent=1))
            print(key, kept[key], flush=True)
        return kept[key]["gain"]

    lines = [f"| constant | instead | {' | '.join(args.sets)} |", "|---|---|" + "---|" * len(args.sets)]
    base = [gain(name, label="as it is") for name in args.sets]
    lines.append("| as it is | | " + " | ".join(f"{each:.4f}" for each in base) + " |")
    for words, path, values in CONSTANTS[args.method]:
        for label, value in values.items():
            found = [gain(name, path, value, label=f"{words}: {label}") for name in args.sets]
            moved = " | ".join(f"{1000 * (each - own):+.1f}" for each, own in zip(found, base, strict=True))
            lines.append(f"| {words} | {label} | {moved} |")
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
