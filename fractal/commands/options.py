"""The flags that commands share, each declared once, the kinds of numbers that flags take, and checks of flags.

    parser = command("embed", __doc__)
    add(parser, "input", "--reference", "--use-rep")
    add(parser, "--prefix", help="keep this many blocks")  # all but the help as declared here

A flag that only one command has is declared in that command.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fractal.base.archive import is_archive
from fractal.base.errors import InputError
from fractal.base.paths import Paths, check_paths
from fractal.base.storage import Location, locate, locate_shared

T = TypeVar("T", int, float)


def number(kind: Callable[[str], T], fits: Callable[[T], bool], otherwise: str) -> Callable[[str], T]:
    """An argparse type: a number that fits."""

    def parse(text: str) -> T:
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} {otherwise}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


positive_int = number(int, lambda value: value > 0, "is not above 0")
# what numpy and torch take as a seed
non_negative_int = number(int, lambda value: 0 <= value < 2**63, "is below 0 or above 2^63 - 1")
positive_float = number(float, lambda value: 0 < value < float("inf"), "is not a number above 0")
ratio = number(float, lambda value: 0 <= value < 1, "is not in [0, 1)")


def num_bytes(text: str) -> int:
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    value = float(text[:-2]) * units[text[-2:].upper()] if text[-2:].upper() in units else float(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 500MB or 2GB")
    return int(value)


CHECKPOINT = Path("data/fractal_adapter_4L.pt")  # of train.py, by default
ALIASES = {"--use-rep": ["--obsm"], "--reference": ["--model-path"]}
FLAGS: dict[str, dict[str, Any]] = {
    "input": {"type": locate, "nargs": "?", "help": "cells: .h5ad, .zarr, .npy, Parquet or TileDB"},
    "--input": {
        "type": locate,
        "default": Path("data/stratified.parquet"),
        "help": "Parquet file of stratify.py (default: %(default)s)",
    },
    "--reference": {
        "type": locate_shared,
        "help": "folder or .zip of `fractal fit`, or https://HOST/NAME.zip#sha256=HEX, or a checkpoint of train.py",
    },
    "--output": {"type": locate},
    "--model": {
        "type": locate,
        "metavar": "FOLDER",
        "help": "folder model_v1.1 of SCimilarity's release: its encoder makes vectors from counts (default, for a "
        "reference that was made so: where it lay then)",
    },
    "--use-rep": {
        "metavar": "KEY",
        "help": "of an .h5ad: key of its vectors in obsm (default: the one that the reference was made with)",
    },
    "--embedded": {
        "action": "store_true",
        "help": "the vectors are the full ones of `fractal embed` already (Parquet of embed says so itself)",
    },
    "--force": {"action": "store_true", "help": "take vectors that can't come from the reference's embedding"},
    "--prefix": {"type": positive_int, "help": "keep this many blocks (default: the full vector)"},
    "--labels": {"metavar": "COLUMN", "help": "column of obs: names or ids of the Cell Ontology"},
    "--levels": {
        "nargs": "+",
        "default": [],
        "metavar": "COLUMN",
        "help": "2 to 6 columns of obs, coarse to fine, in place of the ontology",
    },
    "--study": {"metavar": "COLUMN", "help": "column of obs: studies or donors (default: none)"},
    "--columns": {"nargs": "+", "metavar": "COLUMN"},
    "--label-map": {
        "type": locate,
        "metavar": "TSV",
        "help": "name in the file<TAB>CL name or id; an empty one leaves its cells out",
    },
    "--write-label-map": {
        "type": locate,
        "metavar": "TSV",
        "help": "write a template for --label-map, with the best guess for each name, and stop",
    },
    "--hierarchy": {"type": locate, "metavar": "TSV", "help": "an edited hierarchy table, in place of CL's"},
    "--unmapped": {
        "choices": ["error", "other"],
        "default": "error",
        "help": "names that CL does not know: stop and list them, or file them under Other (default: error)",
    },
    "--tree": {
        "choices": ["published", "cellxgene"],
        "default": "published",
        "help": "levels of CL: system, lineage, type, subtype, or system, subclass, type (default: published)",
    },
    "--obo": {"help": "Cell Ontology, a path or a URL (default: the shipped CL 2025-07-30)"},
    "--confidence": {
        "type": float,
        "default": 0.8,
        "help": "a level is answered if its probability is at least this (default: %(default)s)",
    },
    "--error": {
        "type": float,
        "help": "in place of --confidence: at most this share of all cells gets a label that is neither theirs nor "
        "above theirs; printed is for whom that is guaranteed",
    },
    "--novelty": {
        "choices": ["on", "flag", "off"],
        "default": "on",
        "help": "cells unlike anything in the reference: on flags them and withholds their fine labels, flag only "
        "flags them, off does neither (default: %(default)s)",
    },
    "--only": {
        "nargs": "+",
        "default": [],
        "metavar": "TERM",
        "help": "only these types and what is below them, as CL:0000084",
    },
    "--exclude": {
        "nargs": "+",
        "default": [],
        "metavar": "TERM",
        "help": "none of these types and of what is below them",
    },
    "--recipe": {
        "choices": ["fractal", "published"],
        "default": "fractal",
        "help": "fractal is ours, published the published one (default: %(default)s)",
    },
    "--epochs": {"type": positive_int, "default": 20, "help": "at most (default: %(default)s)"},
    "--memory": {
        "type": num_bytes,
        "default": "1GB",
        "help": "of vectors that are held at once, such as 500MB; the others wait in files beside the output, "
        "which take as much room as they do. The output is the same with any (default: %(default)s)",
    },
    "--seed": {"type": non_negative_int, "default": 0, "help": "of all random draws (default: %(default)s)"},
    "--device": {
        "choices": ["auto", "cuda", "mps", "cpu"],
        "default": "auto",
        "help": "auto takes CUDA, else MPS, else the CPU (default: %(default)s)",
    },
}


def command(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `fractal NAME`; the description is the docstring of its module."""
    return argparse.ArgumentParser(
        prog=f"fractal {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add(parser: argparse._ActionsContainer, *flags: str, **changes: Any) -> None:
    """Declare these of FLAGS on a parser or a group of it; `changes` replace what FLAGS says of each of them."""
    for flag in flags:
        parser.add_argument(flag, *ALIASES.get(flag, ()), **{**FLAGS[flag], **changes})
        if flag == "input" and changes.get("nargs", "?") == "?":
            parser.add_argument("--input", dest="input_flag", type=locate, help=argparse.SUPPRESS)  # as in the scripts


def one_input(args: argparse.Namespace, example: str, default: Path | None = None) -> Location:
    """The cells to read, named with or without --input. Raises InputError for both, and for neither if no default."""
    path: Location | None = args.input or args.input_flag or default
    if path is None or (args.input and args.input_flag):
        raise InputError(f"name one input: {example}")
    return path


def check_suffix(flag: str, path: Location | None, suffixes: Sequence[str]) -> None:
    """Raises InputError for an output whose name ends otherwise."""
    if path is not None and path.suffix.casefold() not in suffixes:
        *most, last = suffixes
        raise InputError(f"{path}: name a {', '.join(most)}{' or ' * bool(most)}{last} file with {flag}")


def check_reference_output(inputs: Mapping[str, Paths], output: Path) -> None:
    """Raises InputError for an --output that can't become a reference, a folder or a .zip."""
    from fractal.annotate.folder import check_folder

    files, folders = ({"--output": output}, {}) if is_archive(output) else ({}, {"--output": output})
    check_paths(inputs, files, folders=folders)
    check_folder(output)


def check_use_rep(args: argparse.Namespace) -> None:
    from fractal.data.cells import has_obsm

    if args.use_rep and not has_obsm(args.input):
        raise InputError(f"--use-rep {args.use_rep}: only an .h5ad has several vectors, {args.input} is none; drop it")


def check_output(
    args: argparse.Namespace, inputs: Mapping[str, Paths], others: Mapping[str, Paths] | None = None
) -> None:
    """Raises InputError for an --output that can't be written; an .h5ad is a copy of the input, or takes its place."""
    from fractal.data.cells import is_h5ad

    if is_h5ad(args.output) and not is_h5ad(args.input):
        raise InputError(f"{args.output}: an .h5ad is only written for an .h5ad input; name another kind of file")
    in_place = [("--output", "input")] if is_h5ad(args.output) else []
    check_paths({"input": args.input, **inputs}, {"--output": args.output, **(others or {})}, in_place)
