"""How good a reference is, on one page: figures, and below each what to conclude.

    fractal report blood_reference --output report.html
    fractal report blood_reference --input other.h5ad --labels cell_type --study donor_id --output report.html

Which prefix to use for which level, what is taken for what, whether probabilities can be believed, and what happens to
types that the reference lacks. Without --input, the cells scored are those that the reference itself has held out. The
page is one file: it needs no network and runs no script.
"""

import argparse
from pathlib import Path

from fractal.base.cli import InputError, add_device, add_force, non_negative_int, positive_int, printable, run, table
from fractal.base.files import check_paths


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument("reference", type=Path, help="folder of `fractal fit` or `fractal reference`")
    files.add_argument("--output", metavar="HTML", type=Path, help="the page")
    files.add_argument("--figures", metavar="DIR", type=Path, help="write each figure as .svg and .png, too")
    cells = parser.add_argument_group("labelled cells to score")
    cells.add_argument(
        "--input", type=Path, help=".h5ad, or Parquet of ingest.py; of the file of training only the test cells count"
    )
    kind = cells.add_mutually_exclusive_group()
    kind.add_argument("--labels", metavar="COLUMN", help="of an .h5ad: column of obs with the names or CL ids of types")
    kind.add_argument("--levels", nargs="+", default=[], metavar="COLUMN", help="a column per level, coarse to fine")
    cells.add_argument("--use-rep", help="of an .h5ad: key of its vectors in obsm (default: the reference's own)")
    cells.add_argument(
        "--study", metavar="COLUMN", help="of an .h5ad: studies or donors; intervals are over these, not over cells"
    )
    cells.add_argument(
        "--num-samples", type=positive_int, default=5_000, help="cells to draw and score (default: %(default)s)"
    )
    add_force(cells)
    parser.add_argument("--obo", help="Cell Ontology, a path or a URL (default: the shipped CL 2025-07-30)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the draw (default: %(default)s)")
    add_device(parser)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError, before any work, for flags that do not go together."""
    from fractal.data.cells import is_h5ad
    from fractal.view.page import check_output

    if not (args.output or args.figures):
        raise InputError("name the page with --output report.html, or a folder for its figures with --figures")
    check_paths(
        {"--input": args.input, "REFERENCE": args.reference, "--obo": args.obo},
        {"--output": args.output},
    )
    check_output(args.output, args.figures)
    from_h5ad = args.input is not None and is_h5ad(args.input)
    for flag in ("labels", "levels", "use_rep", "study"):
        if getattr(args, flag) and not from_h5ad:
            name = flag.replace("_", "-")
            raise InputError(f"--{name}: says where the labels of an .h5ad are; name one with --input, or drop it")
    if from_h5ad and not (args.labels or args.levels):
        raise InputError(f"{args.input}: name the column of its labels with --labels, or one per level with --levels")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    from fractal.hierarchy.ontology import CL_SLIM, load_graph
    from fractal.model.adapter import pick_device
    from fractal.reference import read_folder
    from fractal.view.findings import summary
    from fractal.view.page import write
    from fractal.view.report import own_cells, read_labelled, score_reference

    bundle, graph = read_folder(args.reference, pick_device(args.device)), load_graph(args.obo or CL_SLIM)
    if args.input:
        columns = args.labels, args.levels, args.use_rep, args.study
        cells = read_labelled(bundle, args.input, *columns, graph, args.num_samples, args.seed, args.force)
    else:
        cells = own_cells(bundle, args.num_samples, args.seed)
    name = args.reference.resolve().name
    scored = score_reference(bundle, name, cells, args.input is None, graph)
    write(f"How good {name} is", [scored], args.output, args.figures)
    print(f"{printable(cells.said)}\n\n{table(*summary(scored.apart()))}\n")
    print("\n".join(f"{path}" for path in (args.output, args.figures) if path))


if __name__ == "__main__":
    run(main)
