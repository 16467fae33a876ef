"""Kill and interrupt `denoise_file` at random moments, with a target that exists: it must be the old or the new, whole.

    python benchmarks/kills.py [--kills 60] [--interrupts 60] [--cells 600] [--genes 200]

Half of the moments are drawn from the whole run, half from the time in which it writes. Prints how often the target was
the old one and the new one afterwards, and fails if it was neither, if the source changed, or if the next run leaves
anything behind. Runs are forked, so it needs Linux.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import anndata as ad
import numpy as np

import sc_noise2self as n2s
from sc_noise2self.__main__ import main as command_line

OPTIONS = ["--overwrite", "--key-added", "denoised"]


def write_source(path: Path, n_cells: int, n_genes: int) -> None:
    """Write simulated counts of three kinds of cells."""
    rng = np.random.default_rng(0)
    profiles = rng.gamma(0.3, size=(3, n_genes))[rng.integers(3, size=n_cells)]
    counts = rng.poisson(300 * profiles / profiles.sum(axis=1, keepdims=True)).astype(np.float32)
    names = [f"c{i}" for i in range(n_cells)], [f"g{i}" for i in range(n_genes)]
    adata = ad.AnnData(counts)
    adata.obs_names, adata.var_names = names
    adata.write_h5ad(path)


def started(source: Path, target: Path) -> int:
    """Return the process of a run of the command line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the command line has begun
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return process
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        except KeyboardInterrupt:
            os._exit(130)
        status = command_line(["denoise", str(source), str(target), "--quiet", *OPTIONS])
    finally:
        os._exit(status)


def ended(process: int) -> bool:
    """Return whether a run has ended, and leave its status to be asked for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def timed(source: Path, target: Path) -> tuple[float, float]:
    """Return after how many seconds a run writes, and ends."""
    before, start, writes = set(target.parent.iterdir()), time.perf_counter(), 0.0
    process = started(source, target)
    while not os.waitpid(process, os.WNOHANG)[0]:
        if not writes and set(target.parent.iterdir()) - before:
            writes = time.perf_counter() - start
        time.sleep(0.001)
    return writes, time.perf_counter() - start


def is_new(target: Path, expected: ad.AnnData) -> bool:
    """Return whether the target can be read and holds all of the result."""
    found = ad.read_h5ad(target)
    return n2s.report(found) == n2s.report(expected) and all(
        np.allclose(found_slot["denoised"], slot["denoised"], rtol=1e-4, atol=1e-6)
        for found_slot, slot in (
            (found.layers, expected.layers),
            (found.obsm, expected.obsm),
            (found.varm, expected.varm),
        )
    )


def main() -> int:
    """Print a line for each kind of end; return 1 if something was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--interrupts", type=int, default=60)
    parser.add_argument("--cells", type=int, default=600)
    parser.add_argument("--genes", type=int, default=200)
    args = parser.parse_args()
    rng, broken = np.random.default_rng(0), 0
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.h5ad", Path(folder) / "out.h5ad"
        write_source(source, args.cells, args.genes)
        whole = source.read_bytes()
        expected = ad.read_h5ad(source)
        n2s.denoise(expected)
        n2s.denoise_file(source, target)  # what is imported and compiled on first use is so before the forks
        times = np.array([timed(source, target) for _ in range(3)])
        writes, ends = np.median(times, axis=0)
        print(f"a run writes after {writes:.2f} s and ends after {ends:.2f} s", flush=True)
        for how, n in ((signal.SIGKILL, args.kills), (signal.SIGINT, args.interrupts)):
            counted: Counter[str] = Counter()
            for i in range(n):
                target.write_bytes(whole)
                before = set(os.listdir(folder))
                process = started(source, target)
                if i % 2:
                    while not (set(os.listdir(folder)) - before or ended(process)):  # it does not write yet
                        time.sleep(0.001)
                time.sleep(rng.uniform(0, 1.2 * (ends - writes) if i % 2 else 1.05 * ends))
                os.kill(process, how)
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                try:
                    state = "old" if target.read_bytes() == whole else "new" if is_new(target, expected) else "broken"
                except Exception as error:
                    state = f"broken ({error})"
                if source.read_bytes() != whole:
                    state = "broken (source changed)"
                if status not in (0, 130, -how) or (status == 0 and state != "new"):
                    state = f"broken (exit status {status})"
                counted[state] += 1
            print(f"{how.name}: {dict(counted)}", flush=True)
            broken += n - counted["old"] - counted["new"]
        os.waitpid(started(source, target), 0)
        left = sorted(path.name for path in Path(folder).iterdir())
        print(f"left after the next run: {left}")
    return int(broken > 0 or left != ["in.h5ad", "out.h5ad"])


if __name__ == "__main__":
    sys.exit(main())
