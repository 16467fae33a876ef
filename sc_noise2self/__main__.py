"""The command line: ``python -m sc_noise2self denoise IN.h5ad OUT.h5ad``."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or 2 with one sentence on standard error."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, FloatingPointError) as error:
        print(f"sc_noise2self: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sc_noise2self", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    denoise = commands.add_parser("denoise", help="denoise the raw counts of an .h5ad file into another")
    denoise.add_argument("source", type=Path, metavar="IN.h5ad", help="file with raw counts; it is not changed")
    denoise.add_argument("target", type=Path, metavar="OUT.h5ad", help="file to write; it must not exist")
    denoise.add_argument("--method", default="pca", help="pca, autoencoder, diffusion, knn or ensemble (default: pca)")
    denoise.add_argument("--mix", action="store_true", help="mix each cell's own counts back in")
    denoise.add_argument("--layer", help="layer that holds raw counts (default: X)")
    denoise.add_argument("--key-added", default="denoised", help="name of the result (default: %(default)s)")
    denoise.add_argument("--batch-key", help="column of obs with each cell's batch, for the autoencoder")
    denoise.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    denoise.add_argument("--save-model", type=Path, help="file to write the fitted autoencoder to")
    denoise.add_argument("--factors", action="store_true", help="write the factors alone, no dense layer")
    denoise.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    denoise.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    denoise.set_defaults(run=_denoise)
    return parser


def _denoise(args: argparse.Namespace) -> None:
    if not args.source.is_file():
        raise FileNotFoundError(f"{args.source} is not a file: pass an .h5ad file with raw counts.")
    if args.target.suffix != ".h5ad":
        raise ValueError(f"{args.target} does not end in .h5ad: that is the format written.")
    if args.target.exists():
        raise FileExistsError(f"{args.target} exists: nothing is overwritten, so choose another name.")
    if not args.target.parent.is_dir():
        raise FileNotFoundError(f"{args.target.parent} is not a folder: make it first.")

    import anndata
    import scanpy as sc

    from .denoising import denoise
    from .reporting import report

    if not args.quiet:
        sc.settings.verbosity = "info"
    adata = anndata.read_h5ad(args.source)
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        denoise(
            adata,
            method=args.method,
            mix=args.mix,
            layer=args.layer,
            key_added=args.key_added,
            batch_key=args.batch_key,
            device=args.device,
            save_model=args.save_model,
            write_layer=not args.factors,
            random_state=args.seed,
        )
    # Written beside the target and then renamed: a run that is stopped leaves no half of a file under its name.
    partial = args.target.with_name(f".{args.target.stem}-{os.getpid()}.h5ad")
    try:
        adata.write_h5ad(partial)
        partial.rename(args.target)
    finally:
        partial.unlink(missing_ok=True)
    if not args.quiet:
        print(f"{args.target}: {adata.n_obs} cells x {adata.n_vars} genes, result {args.key_added!r}")
        print(textwrap.fill(report(adata, key=args.key_added), 100))


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"sc_noise2self: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
