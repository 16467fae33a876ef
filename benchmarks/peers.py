"""What people use today beside `sc_noise2self.denoise`: the same split, the same score, each in its own environment.

    python benchmarks/peers.py paul15_myeloid pbmc3k_10x --evaluator EVALUATE/heldout.py --data DATA --truth \
        --python magic=ENV/bin/python --python scvi=ENV/bin/python --ours 'ours={}' --out table.md --cache RESULTS

A peer is a script in `benchmarks/peers`, `run_NAME.py`, which says what it needs. Every run is a process of its own;
seconds are those of the whole process, with imports, reading and writing, and memory is the peak of its resident set.
A finished run is kept under `--cache` as JSON, one file per data set and method, and is not repeated; delete a file to
repeat its run.

Data sets by name are split 90 to 10 by the evaluator's `load_split` and scored by its `score`. `--truth` adds figures
against something that is not these counts, all of them or those that are named after it:

mix_rnamix_celseq2_sortseq
    RNA of three cell lines mixed in known proportions. A cell's true profile is its proportions times the three lines'
    profiles, which are fitted to the full counts of all cells of its batch (Poisson likelihood, EM). The denoisers see
    20 % of the molecules. Score: mean over cells of KL(truth || P) in nats, P being the denoised row scaled to 1 and
    blended with 0.5 % of the mean profile; lower is better. The spiked-in ERCC RNA does not follow the proportions:
    `kl own` leaves it out of the score, not of the counts.
mix_cells_celseq2
    Wells of up to nine cells of three lines in known numbers, without those of poor quality. The proportions are the
    numbers over their sum, the rest is as above.
cell_lines_5_celseq2
    Single cells of five lines, known by genotype, without doublets. A cell's true profile is the sum of the full counts
    of the other cells of its line, scaled to 1 and blended with 0.5 % of the mean profile. The rest is as above.
citeseq_pbmc_bremsc_1372
    Blood, with proteins. Score: mean over protein and gene pairs of the Spearman correlation between the protein (log1p
    of its counts, centred over the proteins of the cell) and the gene's share of the denoised row. Ties among the cells
    without the protein raise it, so two more: a mixture of two normal distributions divides the cells of each protein
    into positive and negative; `auroc` is the mean area under the ROC curve of the gene's share for positive against
    negative (ties count half), `spearman positive` the mean correlation among the positive.
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
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture

PEERS = Path(__file__).resolve().parent / "peers"
BLEND = 0.005
MIXTURES = {
    "mix_rnamix_celseq2_sortseq": ["H2228_prop", "H1975_prop", "HCC827_prop"],
    "mix_cells_celseq2": ["H1975", "H2228", "HCC827"],
}
LINES = "cell_lines_5_celseq2"
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
FIGURES = ["gain", "elogmse", "kl", "kl own", "spearman", "auroc", "spearman positive"]
# The peak of a process starts at that of the process it was forked from, so a small one stands in between.
LAUNCHER = """
import json, os, signal, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[3:], start_new_session=True)
for each in signal.SIGALRM, signal.SIGINT, signal.SIGTERM:
    signal.signal(each, lambda *_: os.killpg(child.pid, signal.SIGKILL))
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
_, status, usage = os.wait4(child.pid, 0)
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


def against_truth(adata: ad.AnnData, true_profiles):
    """Return a fifth of the molecules, and the score of a denoiser that saw them, by profiles from all of them."""
    counts = adata.X.tocsr()
    thinned = counts.copy()
    thinned.data = np.random.default_rng(0).binomial(counts.data.astype(np.int64), 0.2).astype(np.float32)
    thinned.eliminate_zeros()
    seen = np.asarray(thinned.sum(axis=0)).ravel() > 0
    thinned, truth = thinned[:, seen], true_profiles(counts[:, seen].toarray())
    mean = shares(thinned.sum(axis=0))
    own = ~adata.var_names[seen].str.startswith("ERCC-")

    def score(denoised):
        blended = (1 - BLEND) * shares(denoised) + BLEND * mean
        return {"kl": divergence(truth, blended), "kl own": divergence(shares(truth[:, own]), shares(blended[:, own]))}

    return thinned, score


def mixtures(name: str, data: Path):
    """Return the thinned counts of cell lines mixed in known proportions, and the score of a denoiser of them."""
    adata = ad.read_h5ad(data / f"{name}.h5ad")
    kept = adata.obs[MIXTURES[name]].sum(axis=1) > 0
    if "poor_quality" in adata.obs:
        kept &= adata.obs["poor_quality"] != "YES"
    adata = adata[kept.to_numpy()].copy()
    proportions = shares(adata.obs[MIXTURES[name]].to_numpy())
    batches = adata.obs["batch"].to_numpy()

    def true_profiles(counts):
        truth = np.empty(counts.shape)
        for batch in np.unique(batches):
            cells = batches == batch
            truth[cells] = proportions[cells] @ pure_profiles(counts[cells], proportions[cells])
        return truth

    return against_truth(adata, true_profiles)


def cell_lines(data: Path):
    """Return the thinned counts of single cells of known lines, and the score of a denoiser of them."""
    adata = ad.read_h5ad(data / f"{LINES}.h5ad")
    adata = adata[(adata.obs["demuxlet_cls"] == "SNG").to_numpy()].copy()
    lines = adata.obs["cell_line_demuxlet"].to_numpy()

    def true_profiles(counts):
        same = (lines[:, np.newaxis] == lines).astype(np.float64)
        np.fill_diagonal(same, 0)
        return (1 - BLEND) * shares(same @ counts) + BLEND * shares(counts.sum(axis=0, keepdims=True))

    return against_truth(adata, true_profiles)


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
    positive = {i: high(levels[:, i]) for i, _ in pairs}

    def score(denoised):
        profile = shares(denoised)
        each = [
            (
                correlation(levels[:, i], profile[:, j]),
                float(roc_auc_score(positive[i], profile[:, j])),
                correlation(levels[positive[i], i], profile[positive[i], j]),
            )
            for i, j in pairs
        ]
        means = zip(("spearman", "auroc", "spearman positive"), np.mean(each, axis=0).tolist(), strict=True)
        return dict(means) | {"pairs": dict(zip(GENE_OF, each, strict=True))}

    return adata.X.tocsr(), score


def high(level: np.ndarray) -> np.ndarray:
    """Return which values belong to the upper one of two normal distributions."""
    mixture = GaussianMixture(2, random_state=0).fit(level[:, np.newaxis])
    return mixture.predict_proba(level[:, np.newaxis])[:, mixture.means_.argmax()] > 0.5


def correlation(level: np.ndarray, share: np.ndarray) -> float:
    """Return the Spearman correlation, 0 for a constant."""
    return float(spearmanr(level, share)[0]) if np.ptp(share) else 0.0


TRUTHS = {name: functools.partial(mixtures, name) for name in MIXTURES} | {LINES: cell_lines, PROTEINS: proteins}


def measure(command: list[str], counts: sp.csr_matrix, score, limit: float) -> dict:
    """Run one denoiser in a process of its own, at most `limit` minutes, and return what it took and its score."""
    with tempfile.TemporaryDirectory() as folder:
        source, target, usage = (Path(folder) / name for name in ("in.h5ad", "out.npy", "usage.json"))
        ad.AnnData(counts.astype(np.float32)).write_h5ad(source)
        launcher = [sys.executable, "-c", LAUNCHER, str(usage), str(60 * limit)]
        done = subprocess.run(
            [*launcher, *command[:2], str(source), str(target), *command[2:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        result = json.loads(usage.read_text())
        result["notes"] = [line[6:] for line in done.stdout.splitlines() if line.startswith("note: ")]
        if limit and result["code"] != 0 and result["seconds"] >= 60 * limit:
            result["notes"].append(f"stopped after {limit:g} minutes")
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
    figures = [key for key in FIGURES if any(key in row for row in rows.values())]
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
    parser.add_argument("--truth", nargs="*", choices=TRUTHS, help="add these data sets of known truth, or all")
    parser.add_argument("--python", type=pair, action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--ours", type=pair, nargs="*", default=[("ours", "{}")], metavar="LABEL=JSON")
    parser.add_argument("--limit", type=float, default=0, metavar="MINUTES", help="stop a run after this time")
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
    if args.truth is not None:
        tasks |= {name: functools.partial(TRUTHS[name], args.data) for name in args.truth or TRUTHS}
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
            found = measure(command, counts, score, args.limit) if command else baseline(label, counts, score)
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
