"""Denoise single-cell counts in files: sc-noise2self denoise IN.h5ad OUT.zarr --factors."""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

# What public functions call what is typed otherwise here, for their messages.
_TYPED = {
    r"sc_noise2self\.denoise\(adata, key_added=(.+)\), or pass another key: the results in adata": (
        r"sc-noise2self denoise IN OUT --key-added \1, or pass another --key: the results in the file"
    ),
    "key_added": "--key-added",
    "save_model": "--save-model",
    "write_layer=False": "--factors",
    "overwrite(?:=True)?": "--overwrite",
    "random_state": "--seed",
    "max_rank": "--max-rank",
    "n_splits": "--n-splits",
    "detail=True": "--detail",
    "layer=[\"'](\\w+)[\"']": r"--layer \1",
    **{f"{name}(?= is )": f"--{name}" for name in ("method", "scale", "protocol")},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, or with one line on standard error 2, 130 if interrupted."""
    names = dict(_TYPED)
    try:
        args = _parser().parse_args(argv)
        names |= _names_of_options(getattr(args, "named", []))
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            args.run(args)
    except (ValueError, TypeError, OSError, ImportError, MemoryError, FloatingPointError, KeyError) as error:
        said = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        print(f"sc_noise2self: {_as_typed(said, names) or 'there is too little memory.'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sc_noise2self: interrupted.", file=sys.stderr)
        return 130
    return 0


@dataclass
class _Named:
    """A method or a scale by name, and the options that were set after it, as they were typed."""

    what: str
    name: str
    options: dict[str, str] = field(default_factory=dict)


class _Name(argparse.Action):
    """Begin another method, or a scale, that what is set next belongs to."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.named = [*namespace.named, _Named(self.dest, values)]


class _Set(argparse.Action):
    """Set an option of the method or scale named last."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        option, equals, value = values.partition("=")
        if not equals or not option.strip():
            raise ValueError(f"--set {values}: pass OPTION=VALUE, e.g. --method autoencoder --set width=32.")
        if not namespace.named:
            namespace.named = [_Named("method", "pca")]
        namespace.named[-1].options[option.strip()] = value.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sc-noise2self", description=__doc__)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    denoise = commands.add_parser("denoise", help="denoise the raw counts of a file into another")
    add = denoise.add_argument
    add("source", metavar="IN", help=".h5ad or .zarr with raw counts; it is not changed")
    add("target", metavar="OUT", help=".h5ad or .zarr to write; it must not exist")
    add(
        "--method",
        action=_Name,
        metavar="NAME",
        help="pca (default), autoencoder, diffusion, knn, clusters or ensemble; of several the mean is taken",
    )
    add("--scale", action=_Name, metavar="NAME", help="scale of the layer (default: counts)")
    add(
        "--set",
        action=_Set,
        metavar="OPTION=VALUE",
        help="set an option of the method or scale named before it, as often as wanted: --method autoencoder "
        "--set width=16,32 --set device=cpu --scale expected_log1p_cp10k --set depth=1000",
    )
    add("--mix", action="store_true", help="mix each cell's own counts back in")
    add("--layer", metavar="NAME", help="layer that holds raw counts (default: X)")
    add("--key-added", metavar="NAME", default="denoised", help="name of the result (default: %(default)s)")
    add("--save-model", metavar="FILE", help="file to write the fitted model to, e.g. model.npz")
    add("--factors", action="store_true", help="write the factors alone, no dense layer")
    add("--overwrite", action="store_true", help="replace OUT.h5ad, in one step, once it is done")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    denoise.set_defaults(run=_denoise, named=[])

    rank = commands.add_parser("select-rank", help="print how many principal components the raw counts support")
    add = rank.add_argument
    add("source", metavar="IN", help=".h5ad or .zarr with raw counts; it is not changed")
    add("--protocol", metavar="NAME", default="loo", help="loo (default), noise2self, mcv or bcv")
    add("--layer", metavar="NAME", help="layer that holds raw counts (default: X)")
    add("--max-rank", type=int, metavar="N", help="largest rank tried (default: 50)")
    add("--n-splits", type=int, default=1, metavar="N", help="splits to average over (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    add("--quiet", action="store_true", help="print nothing but the rank, warnings and errors")
    rank.set_defaults(run=_select_rank)

    report = commands.add_parser("report", help="print what a result is worth")
    add = report.add_argument
    add("source", metavar="FILE", help=".h5ad or .zarr that a result was written to")
    add("--key", metavar="NAME", default="denoised", help="name of the result (default: %(default)s)")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--detail", action="store_true", help="a paragraph, with every warning")
    form.add_argument("--as-frame", action="store_true", help="every figure, as a table with tabs")
    form.add_argument("--groupby", metavar="COLUMN", help="a table by a column of obs, depth or expression")
    report.set_defaults(run=_report)
    return parser


class _Version(argparse.Action):
    """Print the version; read when it is asked for."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from ._version import __version__

        print(f"sc-noise2self {__version__}")
        parser.exit()


def _denoise(args: argparse.Namespace) -> None:
    from ._files import denoise_file, expanded
    from .methods import REGISTRY
    from .scales import SCALES

    methods = [_made(each, REGISTRY) for each in args.named if each.what == "method"] or ["pca"]
    scales = {name: [each] for name, each in SCALES.items()}
    scale = [_made(each, scales) for each in args.named if each.what == "scale"] or ["counts"]
    if len(scale) > 1:
        raise ValueError(f"--scale was given {len(scale)} times: the layer has one scale, so give it once.")
    _tell(args.quiet)
    said = denoise_file(
        args.source,
        args.target,
        methods if len(methods) > 1 else methods[0],
        layer=args.layer,
        key_added=args.key_added,
        write_layer=not args.factors,
        overwrite=args.overwrite,
        mix=args.mix,
        scale=scale[0],
        save_model=None if args.save_model is None else expanded("save_model", args.save_model),
        random_state=args.seed,
    )
    if not args.quiet:
        _print_done(f"{args.target}, result {args.key_added!r}\n{_as_typed(said, _TYPED)}")


def _select_rank(args: argparse.Namespace) -> None:
    from ._files import opened
    from ._rank import select_rank

    _tell(args.quiet)
    with opened(args.source, args.layer) as adata:
        rank = select_rank(
            adata,
            protocol=args.protocol,
            layer=args.layer,
            max_rank=args.max_rank,
            n_splits=args.n_splits,
            random_state=args.seed,
        )
    print(rank)


def _report(args: argparse.Namespace) -> None:
    from ._files import opened
    from ._report import report

    with opened(args.source, counts=False) as adata:
        if args.as_frame or args.groupby is not None:
            form = {"as_frame": True} if args.as_frame else {"groupby": args.groupby}
            print(report(adata, key=args.key, **form).to_csv(sep="\t", float_format="%.6g"), end="")
        else:
            print(_as_typed(report(adata, key=args.key, detail=args.detail), _TYPED))


def _tell(quiet: bool) -> None:
    """Have scanpy say what is being done, or show no progress either."""
    import scanpy as sc

    sc.settings.verbosity = "error" if quiet else "info"


def _made(given: _Named, classes: Mapping[str, Sequence[Callable[..., Any]]]) -> Any:
    """Return the method or scale that was named, with the options set; without any its name.

    Values are Python literals, so that `16,32` are two numbers, or else text. What is wrong with a value, the object
    itself says.
    """
    if not given.options or given.name not in classes:
        return given.name
    if len(classes[given.name]) > 1:
        raise ValueError(
            f"--{given.what} {given.name} stands for several, so --set cannot tell which: name each, --{given.what} "
            "again, with its own --set behind it."
        )
    (made,) = cast("Sequence[type]", classes[given.name])
    known, values = [each.name for each in fields(made)], {}
    for option, value in given.options.items():
        if option not in known:
            raise ValueError(
                f"--set {option}={value} is no option of {given.name}: those are {', '.join(known) or 'none'}."
            )
        try:
            values[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            values[option] = value
    return made(**values)


def _names_of_options(named: Sequence[_Named]) -> dict[str, str]:
    """Return the options that were set, where a message names them, and as they are typed."""
    return {f"{re.escape(option)}(?= is |=)": f"--set {option}" for each in named for option in each.options}


def _as_typed(message: str, names: Mapping[str, str]) -> str:
    """Return a message that calls options as they are typed."""
    for name, typed in names.items():
        message = re.sub(rf"(?<![-\w.'\"])(?<!--set ){name}(?!\w)", typed, message)
    return message


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
