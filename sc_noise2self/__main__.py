"""The command line: ``python -m sc_noise2self denoise IN.h5ad OUT.zarr --factors``."""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

_COMMAS = re.compile(r""",(?![^(\[{]*[)\]}])""")  # but those within brackets


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or with one line on standard error 2, 130 if interrupted."""
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, FloatingPointError) as error:
        print(f"sc_noise2self: {' '.join(str(error).split()) or 'there is too little memory.'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sc_noise2self: interrupted.", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sc_noise2self", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    denoise = commands.add_parser("denoise", help="denoise the raw counts of a file into another")
    add = denoise.add_argument
    add("source", metavar="IN", help=".h5ad or .zarr with raw counts; it is not changed")
    add("target", metavar="OUT", help=".h5ad or .zarr to write; it must not exist")
    add(
        "--method",
        action="append",
        metavar="NAME[:OPTION=VALUE,...]",
        help="pca (default), autoencoder, diffusion, knn or ensemble; options are those of the method, e.g. "
        "autoencoder:width=32,device=cpu or knn:n_pcs=(10,20); given several times, the mean of all is taken",
    )
    add("--mix", action="store_true", help="mix each cell's own counts back in")
    add("--scale", default="counts", metavar="NAME[:OPTION=VALUE]", help="scale of the layer (default: %(default)s)")
    add("--layer", help="layer that holds raw counts (default: X)")
    add("--key-added", default="denoised", help="name of the result (default: %(default)s)")
    add("--save-model", help="file to write the fitted model to, e.g. model.npz")
    add("--factors", action="store_true", help="write the factors alone, no dense layer")
    add("--overwrite", action="store_true", help="replace OUT.h5ad, in one step, once it is done")
    add("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    denoise.set_defaults(run=_denoise)
    return parser


def _denoise(args: argparse.Namespace) -> None:
    import scanpy as sc

    from ._files import denoise_file, expanded
    from .methods import REGISTRY
    from .scales import SCALES

    methods = [_made("method", each, REGISTRY) for each in args.method or ["pca"]]
    if not args.quiet:
        sc.settings.verbosity = "info"
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning
        said = denoise_file(
            args.source,
            args.target,
            methods if len(methods) > 1 else methods[0],
            layer=args.layer,
            key_added=args.key_added,
            write_layer=not args.factors,
            overwrite=args.overwrite,
            mix=args.mix,
            scale=_made("scale", args.scale, {name: [each] for name, each in SCALES.items()}),
            save_model=None if args.save_model is None else expanded(args.save_model),
            random_state=args.seed,
        )
    if not args.quiet:
        _print_done(f"{args.target}, result {args.key_added!r}\n{textwrap.fill(said, 100)}")


def _made(what: str, given: str, classes: Mapping[str, Sequence[type]]) -> Any:
    """Return the object that `name:option=value,...` describes; a name alone as it is.

    Values are Python literals, or else text; commas within brackets are the value's. What is wrong with a value, the
    object itself says.
    """
    name, _, options = given.partition(":")
    if not options or name not in classes:
        return given
    if len(classes[name]) > 1:
        raise ValueError(f"--{what} {given}: {name} stands for several, so give each with its options, --{what} again.")
    (made,) = classes[name]
    known = [each.name for each in fields(made)]
    found = {}
    for option in _COMMAS.split(options):
        key, equals, value = option.partition("=")
        if key.strip() not in known or not equals:
            raise ValueError(
                f"--{what} {given}: {option!r} is no option of {name}, which are NAME=VALUE with the names "
                f"{', '.join(known) or 'none'}."
            )
        found[key.strip()] = value.strip()
        with contextlib.suppress(ValueError, SyntaxError):
            found[key.strip()] = ast.literal_eval(value.strip())
    return made(**found)


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
