"""The command line: ``python -m sc_noise2self denoise IN.h5ad OUT.zarr --factors``."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Sequence

_TYPED = {
    "write_layer=False": "--factors",
    "mix=True": "--mix",
    "pass overwrite": "pass --overwrite",
    "key_added": "--key-added",
    "batch_key": "--batch-key",
    "save_model": "--save-model",
    "random_state": "--seed",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or with one line on standard error 2, 130 if interrupted."""
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, FloatingPointError) as error:
        print(f"sc_noise2self: {_as_typed(str(error) or 'there is too little memory.')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sc_noise2self: interrupted.", file=sys.stderr)
        return 130
    return 0


def _as_typed(message: str) -> str:
    """Return a message with parameters as the options that they are here."""
    message = re.sub(r"\b(method|device|layer)=(['\"])(\S*?)\2", r"--\1 \3", " ".join(message.split()))
    for name, option in _TYPED.items():
        message = re.sub(rf"(?<![\w/.-]){name}(?![\w/=]|\.\w)", option, message)
    return message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sc_noise2self", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    denoise = commands.add_parser("denoise", help="denoise the raw counts of a file into another")
    denoise.add_argument("source", metavar="IN", help=".h5ad or .zarr with raw counts; it is not changed")
    denoise.add_argument("target", metavar="OUT", help=".h5ad or .zarr to write; it must not exist")
    denoise.add_argument("--method", default="pca", help="pca, autoencoder, diffusion, knn or ensemble (default: pca)")
    denoise.add_argument("--mix", action="store_true", help="mix each cell's own counts back in")
    denoise.add_argument("--layer", help="layer that holds raw counts (default: X)")
    denoise.add_argument("--key-added", default="denoised", help="name of the result (default: %(default)s)")
    denoise.add_argument("--batch-key", help="column of obs with each cell's batch, for the autoencoder")
    denoise.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    denoise.add_argument("--save-model", help="file to write the fitted autoencoder to")
    denoise.add_argument("--factors", action="store_true", help="write the factors alone, no dense layer")
    denoise.add_argument("--overwrite", action="store_true", help="replace OUT.h5ad, in one step, once it is done")
    denoise.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    denoise.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    denoise.set_defaults(run=_denoise)
    return parser


def _denoise(args: argparse.Namespace) -> None:
    import scanpy as sc

    from ._files import denoise_file, expanded

    if not args.quiet:
        sc.settings.verbosity = "info"
    # Only what was given: what belongs to another method is refused.
    options = {name: getattr(args, name) for name in ("batch_key", "save_model") if getattr(args, name) is not None}
    if args.save_model is not None:
        options["save_model"] = expanded(args.save_model)
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        said = denoise_file(
            args.source,
            args.target,
            layer=args.layer,
            key_added=args.key_added,
            write_layer=not args.factors,
            overwrite=args.overwrite,
            method=args.method,
            mix=args.mix,
            device=args.device,
            random_state=args.seed,
            **options,
        )
    if not args.quiet:
        _print_done(f"{args.target}, result {args.key_added!r}\n{textwrap.fill(said, 100)}")


def _print_done(text: str) -> None:
    """Print what is known of a result that is written: where that cannot be printed, it is written all the same."""
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"sc_noise2self: the result is written, but not all of this printed: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):  # what it still holds would fail again when the program ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


def _print_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"sc_noise2self: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
