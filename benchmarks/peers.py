"""What people use today beside `sc_noise2self.denoise`: the same split, the same score, each in its own environment.

    python benchmarks/peers.py paul15_myeloid pbmc3k_10x --evaluator EVALUATE/heldout.py --data DATA --truth \
        --python magic=ENV/bin/python --python scvi=ENV/bin/python --ours 'ours={}' --out table.md --cache RESULTS

A peer is a script in `benchmarks/peers`, `run_NAME.py`, which says what it needs. Every run is a process of its own;
seconds are those of the whole process, with imports, reading and writing, and memory is the peak of its resident set.
A finished run is kept under `--cache` as JSON, one file per data set and method, and is not repeated; delete a file to
repeat its run.

Data sets by name are split 90 to 10 by the evaluator's `load_split` and scored by its `score`. `--truth` adds two
figures against something that is not these counts:

mixtures  RNA of three cell lines mixed in known proportions. A cell's true profile is its proportions times the three
          lines' profiles, which are fitted to the full counts of all cells of its batch (Poisson likelihood, EM).
          The denoisers see 20 % of the molecules. Score: mean over cells of KL(truth || P) in nats, P being the
          denoised row scaled to 1 and blended with 0.5 % of the mean profile; lower is better. The spiked-in ERCC RNA
          does not follow the proportions: `kl own` leaves it out of the score, not of the counts.
proteins  CITE-seq of blood. Score: mean over protein and gene pairs of the Spearman correlation between the protein
          (log1p of its counts, centred over the proteins of the cell) and the gene's share of the denoised row.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
from scipy.stats import spearmanr

PEERS = Path(__file__).resolve().parent / "peers"
MIXTURES = "mix_rnamix_celseq2_sortseq"
PROPORTIONS = ["H2228_prop", "H1975_prop", "HCC827_prop"]
PROTEINS = "citeseq_pbmc_bremsc_1372"
GENE_OF = {
    "CD3": "CD3E",
    "CD4": "CD4",
    "CD8a": "CD8A",
    "CD11c": "ITGAX",
    "CD14": "CD14",
    "CD16": "FCGR3A",
    "CD19": "CD19",
    "CD56": "NCAM1",
    "CD127": "IL7R",
}
# The peak of a process starts at that of the process it was forked from, so a small one stands in between.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
_, status, usage = os.wait4(subprocess.Popen(sys.argv[2:]).pid, 0)
result = {"code": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - start}
with open(sys.argv[1], "w") as file:
    json.dump(result | {"peak_gib": usage.ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)}, file)
"""


def shares(x) -> np.ndarray:
    """Return rows scaled to 1, dense and in double precision."""
    x = np.asarray(x.toarray() if sp.issparse(x) else x, dtype=np.float64)
    x = np.where(np.isfinite(x), np.maximum(x, 0), 0)
    total = x.sum(axis=1, keepdims=True)
    return x / np.where(total > 0, total, 1)


def heldout(name: str, evaluator: Path, data: Path):
    """Return the training counts of a data set, and the score of a denoiser that saw them."""
    spec = importlib.util.spec_from_file_location("evaluator", evaluator)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, test = module.load_split(name, data)
    return train, lambda denoised: module.score(denoised, train, test)


def mixtures(data: Path):
    """Return the thinned counts of the mixtures, and the score of a denoiser that saw them."""
    adata = ad.read_h5ad(data / f"{MIXTURES}.h5ad")
    counts = adata.X.tocsr()
    thinned = counts.copy()
    thinned.data = np.random.default_rng(0).binomial(counts.data.astype(np.int64), 0.2).astype(np.float32)
    thinned.eliminate_zeros()
    seen = np.asarray(thinned.sum(axis=0)).ravel() > 0
    counts, thinned = counts[:, seen], thinned[:, seen]
    proportions = shares(adata.obs[PROPORTIONS].to_numpy())
    truth = np.empty(counts.shape)
    for batch in adata.obs["batch"].unique():
        cells = (adata.obs["batch"] == batch).to_numpy()
        truth[cells] = proportions[cells] @ pure_profiles(counts[cells].toarray(), proportions[cells])
    mean = shares(thinned.sum(axis=0))
    own = ~adata.var_names[seen].str.startswith("ERCC-")

    def score(denoised):
        blended = 0.995 * shares(denoised) + 0.005 * mean
        return {"kl": divergence(truth, blended), "kl own": divergence(shares(truth[:, own]), shares(blended[:, own]))}

    return thinned, score


def divergence(truth: np.ndarray, profile: np.ndarray) -> float:
    """Return the mean over rows of KL(truth || profile) in nats."""
    return float((truth * np.log(np.where(truth > 0, truth, 1) / profile)).sum(axis=1).mean())


def pure_profiles(counts: np.ndarray, proportions: np.ndarray, steps: int = 50) -> np.ndarray:
    """Return the profiles of the pure samples, from samples mixed in known proportions, by EM."""
    depth = counts.sum(axis=1, keepdims=True)
    profiles = np.repeat(counts.sum(axis=0, keepdims=True) / counts.sum(), proportions.shape[1], axis=0)
    exposure = (proportions * depth).sum(axis=0)[:, np.newaxis]
    for _ in range(steps):
        expected = depth * (proportions @ profiles)
        ratio = counts / np.where(expected > 0, expected, 1)
        profiles *= ((proportions * depth).T @ ratio) / exposure
    return shares(profiles)


def proteins(data: Path):
    """Return the counts of the CITE-seq cells, and the score of a denoiser that saw them."""
    adata = ad.read_h5ad(data / f"{PROTEINS}.h5ad")
    logs = np.log1p(adata.obsm["protein_expression"])
    levels = logs - logs.mean(axis=1, keepdims=True)
    names = list(adata.uns["protein_names"])
    pairs = [(names.index(protein), adata.var_names.get_loc(gene)) for protein, gene in GENE_OF.items()]

    def score(denoised):
        profile = shares(denoised)
        each = [float(spearmanr(levels[:, i], profile[:, j])[0]) if np.ptp(profile[:, j]) else 0.0 for i, j in pairs]
        return {"spearman": float(np.mean(each)), "pairs": dict(zip(GENE_OF, each, strict=True))}

    return adata.X.tocsr(), score


def measure(command: list[str], counts: sp.csr_matrix, score) -> dict:
    """Run one denoiser in a process of its own and return what it took and its score."""
    with tempfile.TemporaryDirectory() as folder:
        source, target, usage = (Path(folder) / name for name in ("in.h5ad", "out.npy", "usage.json"))
        ad.AnnData(counts.astype(np.float32)).write_h5ad(source)
        launcher = [sys.executable, "-c", LAUNCHER, str(usage)]
        done = subprocess.run(
            [*launcher, *command[:2], str(source), str(target), *command[2:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        result = json.loads(usage.read_text())
        result["notes"] = [line[6:] for line in done.stdout.splitlines() if line.startswith("note: ")]
        if result["code"] != 0 or not target.exists():
            return result | {"failed": done.stdout[-2000:]}
        return result | score(np.load(target))


def baseline(label: str, counts: sp.csr_matrix, score) -> dict:
    """Return the score of the counts themselves, or of their mean profile for every cell."""
    if label == "raw":
        return score(counts.toarray())
    return score(np.repeat(np.asarray(counts.sum(axis=0), dtype=np.float64), counts.shape[0], axis=0))


def table(rows: dict[str, dict]) -> str:
    """Return the markdown table of one data set."""
    figures = [
        key for key in ("gain", "elogmse", "kl", "kl own", "spearman") if any(key in row for row in rows.values())
    ]
    lines = [
        "| | " + " | ".join([*figures, "seconds (whole process)", "peak GiB", "notes"]) + " |",
        "|---" * (len(figures) + 4) + "|",
    ]
    for label, row in rows.items():
        cells = [f"{row[key]:.4f}" if key in row else "failed" for key in figures]
        cells += [f"{row[key]:{form}}" if key in row else "" for key, form in (("seconds", ".0f"), ("peak_gib", ".2f"))]
        notes = row.get("notes", []) + ([f"{row['bad']} bad entries"] if row.get("bad") else [])
        lines.append("| " + " | ".join([label, *cells, "; ".join(notes)]) + " |")
    return "\n".join(lines)


def pair(text: str) -> tuple[str, str]:
    """Return the two sides of NAME=VALUE."""
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main() -> None:
    """Run what is not yet in the cache, and print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="data sets to split and score")
    parser.add_argument("--evaluator", type=Path, help="the file that defines load_split and score")
    parser.add_argument("--data", type=Path, required=True, help="folder of the .h5ad files")
    parser.add_argument("--truth", action="store_true", help="add the two figures against known truth")
    parser.add_argument("--python", type=pair, action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--ours", type=pair, nargs="*", default=[("ours", "{}")], metavar="LABEL=JSON")
    parser.add_argument("--cache", type=Path, required=True, help="folder of finished runs")
    parser.add_argument("--out", type=Path, help="write the tables here too")
    args = parser.parse_args()
    if args.names and not args.evaluator:
        parser.error("data sets need --evaluator")

    scripts = {path.stem.removeprefix("run_"): path for path in sorted(PEERS.glob("run_*.py"))}
    ours = scripts.pop("ours")
    pythons = dict(args.python)
    if unknown := pythons.keys() - scripts.keys():
        parser.error(f"no script for {', '.join(sorted(unknown))}; there is {', '.join(scripts)}")
    if missing := [python for python in pythons.values() if not shutil.which(python)]:
        parser.error(f"no such interpreter: {', '.join(missing)}")
    commands = {name: [pythons[name], str(script)] for name, script in scripts.items() if name in pythons}
    commands |= {label: [sys.executable, str(ours), json.dumps(json.loads(text))] for label, text in args.ours}

    tasks = {name: lambda name=name: heldout(name, args.evaluator, args.data) for name in args.names}
    if args.truth:
        tasks |= {MIXTURES: lambda: mixtures(args.data), PROTEINS: lambda: proteins(args.data)}
    report = []
    for name, load in tasks.items():
        load = functools.cache(load)
        rows = {}
        for label, command in ({"raw": None, "mean profile": None} | commands).items():
            kept = args.cache / name / f"{label}.json"
            rows[label] = json.loads(kept.read_text()) if kept.exists() else {}
            arguments = command[2:] if command else []
            if rows[label].get("arguments") == arguments:
                continue
            counts, score = load()
            found = measure(command, counts, score) if command else baseline(label, counts, score)
            rows[label] = found | {"arguments": arguments, "shape": counts.shape}
            print(f"{name} {label}: {json.dumps(rows[label])}", file=sys.stderr, flush=True)
            if "failed" not in found:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(rows[label], indent=1))
        cells, genes = rows["raw"]["shape"]
        report.append(f"{name}, {cells} cells x {genes} genes\n\n{table(rows)}\n")
        print(report[-1], flush=True)
    if skipped := [name for name in scripts if name not in commands]:
        report.append(f"Skipped, no interpreter given: {', '.join(skipped)}.\n")
        print(report[-1])
    if args.out:
        args.out.write_text("\n".join(report))


if __name__ == "__main__":
    main()
