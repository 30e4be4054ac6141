"""How good a reference is, on one page: how many cells are answered, and how many of these rightly, class by class.

    fractal report blood_reference --output report.html
    fractal report blood_reference --input other.h5ad --labels cell_type --study donor_id --output report.html

What is taken for what, whether probabilities can be believed, what happens to types that the reference lacks, and which
prefix to use for which level. Without --input, the cells scored are those that the reference itself has held out. The
page is one file: it needs no network and runs no script.
"""

import argparse
from pathlib import Path

from fractal.base.errors import InputError, printable
from fractal.base.paths import check_paths
from fractal.base.storage import locate, locate_shared
from fractal.base.table import table
from fractal.commands.options import add, command, positive_int


def get_parser() -> argparse.ArgumentParser:
    parser = command("report", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("reference", type=locate_shared, help="reference of `fractal fit` or `fractal reference`")
    files.add_argument("--output", metavar="HTML", type=Path, help="the page")
    files.add_argument("--figures", metavar="DIR", type=Path, help="write each figure as .svg and .png, too")
    files.add_argument(
        "--annotated",
        metavar="FILE",
        type=locate,
        help=".h5ad of `fractal annotate --over COLUMN --markers`: also show its clusters and their genes",
    )
    cells = parser.add_argument_group("labelled cells to score")
    text = ".h5ad or .zarr, or Parquet of ingest.py; of the file of training only the test cells count"
    add(cells, "--input", default=None, help=text)
    kind = cells.add_mutually_exclusive_group()
    add(kind, "--labels", "--levels")
    add(cells, "--use-rep")
    add(cells, "--study", help="column of obs: studies or donors; intervals are over these, not over cells")
    cells.add_argument(
        "--num-samples", type=positive_int, default=5_000, help="cells to draw and score (default: %(default)s)"
    )
    add(cells, "--force")
    add(parser, "--obo", "--seed", "--device")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError, before any work, for flags that do not go together."""
    from fractal.data.cells import has_obs
    from fractal.view.page import check_output

    if not (args.output or args.figures):
        raise InputError("name the page with --output report.html, or a folder for its figures with --figures")
    check_paths(
        {"--input": args.input, "--annotated": args.annotated, "REFERENCE": args.reference, "--obo": args.obo},
        {"--output": args.output},
    )
    check_output(args.output, args.figures)
    with_obs = args.input is not None and has_obs(args.input)
    for flag in ("labels", "levels", "use_rep", "study"):
        if getattr(args, flag) and not with_obs:
            name = flag.replace("_", "-")
            raise InputError(f"--{name}: says where the labels of an .h5ad are; name one with --input, or drop it")
    if with_obs and not (args.labels or args.levels):
        raise InputError(f"{args.input}: name the column of its labels with --labels, or one per level with --levels")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    from fractal.reference import read_reference
    from fractal.view.findings import summary
    from fractal.view.page import write

    reference = read_reference(args.reference, args.device)
    names = ("labels", "levels", "study", "use_rep", "force", "num_samples", "obo", "seed", "annotated")
    scored = reference.score(args.input, **{name: getattr(args, name) for name in names})
    write(f"How good {scored.name} is", [scored], args.output, args.figures)
    print(f"{printable(scored.cells)}\n\n{table(*summary(scored.apart()))}\n")
    print("\n".join(f"{path}" for path in (args.output, args.figures) if path))
