"""Label new cells with a reference, each as deep in the hierarchy as it can be trusted.

    fractal annotate --reference data/reference --input cells.parquet --output cells.tsv
    fractal annotate --reference data/reference --input cells.h5ad --obsm X_pca --output new.h5ad

One row per cell, or columns of obs that begin with fractal_:

    cell_id                                   its name, where the input has names
    level, label, cl_id                       the deepest answer: none, or a level of the reference
    {level}, {level}_cl_id, {level}_probability   all levels, also those below the one reached
    runner_up, runner_up_probability          the next best finest label
    distance                                  cosine distance to the nearest reference cell, fractal vectors
    ood_score                                 how unusual the cell is among those of its type; 0 is ordinary
    p_value                                   share of ordinary cells with as high an ood_score, or a higher one
    status                                    ok; novel (unlike anything in the reference); withheld (unusual, so no
                                              label below the second level); excluded (without --only and --exclude it
                                              would be a type that they leave out); invalid (NaN, inf or zero vector)
    withheld_by                               why the answer is not deeper: confidence, novelty, or empty

What is not answered is missing. Other columns that begin so and are of an earlier run go.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fractal.base.errors import InputError
from fractal.base.files import locked
from fractal.base.storage import locate
from fractal.base.table import table
from fractal.commands.options import add, check_output, check_suffix, check_use_rep, command, one_input

if TYPE_CHECKING:  # all that takes long to load is imported where it is used: --help needs none of it
    import pyarrow as pa

    from fractal.commands.output import Chunks


def get_parser() -> argparse.ArgumentParser:
    parser = command("annotate", __doc__)
    files = parser.add_argument_group("files")
    add(files, "input")
    add(files, "--reference", default=Path("data/reference"), help="reference of `fractal fit` (default: %(default)s)")
    files.add_argument(
        "--index",
        type=locate,
        help="folder of `fractal index`, made with this reference: all its cells vote, in place of the reference's",
    )
    files.add_argument(
        "--index-labels",
        metavar="COLUMN",
        help="with --index: its column of labels, by name or as the Cell Ontology knows them (default: its levels)",
    )
    add(files, "--use-rep", "--model")
    add(files, "--output", required=True, help=".tsv, .parquet, or .h5ad (a copy of an .h5ad input)")
    add(files, "--obo")
    answers = parser.add_argument_group("answers")
    add(answers, "--confidence", "--error", "--novelty")
    answers.add_argument(
        "--over",
        metavar="COLUMN",
        help="obs column of a clustering, as leiden: all cells of a cluster get the label with most of their "
        "probability, and a table says how sure each is; needs an .h5ad --input",
    )
    answers.add_argument(
        "--markers",
        action="store_true",
        help="with --over: also the genes that set each cluster apart, to check its label by; needs counts, or values "
        "log-normalised from them",
    )
    answers.add_argument(
        "--truth",
        metavar="COLUMN",
        help="obs column of known labels, by name or as the Cell Ontology knows them: print how good the answers are; "
        "needs an .h5ad --input",
    )
    answers.add_argument(
        "--confusions",
        metavar="FILE",
        type=Path,
        help="with --truth: draw which types are taken for which, .png, .svg or .pdf",
    )
    add(answers, "--force", "--only", "--exclude", "--device")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError, before any work, for flags that do not go together."""
    from fractal.annotate.run import check_answers
    from fractal.data.cells import has_obs

    args.input = one_input(args, "fractal annotate new.h5ad --reference FOLDER --output FILE")
    check_use_rep(args)
    check_suffix("--output", args.output, (".tsv", ".parquet", ".h5ad"))
    inputs = {"--reference": args.reference, "--index": args.index, "--obo": args.obo}
    check_output(args, inputs, {"--confusions": args.confusions})
    if args.confusions:
        if not args.truth:
            raise InputError(f"--confusions {args.confusions}: needs --truth, the obs column of the known labels")
        check_suffix("--confusions", args.confusions, (".png", ".svg", ".pdf"))
    if args.index_labels and not args.index:
        raise InputError(f"--index-labels {args.index_labels}: names a column of --index; name that too, or drop it")
    if args.markers and not args.over:
        raise InputError("--markers: are of clusters; name their column of obs with --over")
    check_answers(args.confidence, args.novelty, args.error)
    for flag in ("over", "truth"):
        if getattr(args, flag) and not has_obs(args.input):
            raise InputError(f"--{flag}: names a column of obs, which only an .h5ad --input has")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    with locked(args.output):  # it may be the input
        annotate(args)


def annotate(args: argparse.Namespace) -> None:
    import numpy as np

    from fractal.annotate.answers import annotation_columns
    from fractal.annotate.run import cluster_table
    from fractal.annotate.truth import Truth, draw_confusions, report
    from fractal.commands.output import write_output
    from fractal.reference import read_reference
    from fractal.view.colours import label_colours

    reference = read_reference(args.reference, args.device)
    reference.model = args.model
    names = ("confidence", "error", "novelty", "index", "index_labels", "only", "exclude", "obo")
    run = reference.run(**{name: getattr(args, name) for name in names})
    for line in run.lines:
        print(line)
    tree = run.annotator.tree
    with reference.intake.open(args.input, args.use_rep, args.force) as (cells, origin):
        groups, known = (cells.codes(column) if column else None for column in (args.over, args.truth))
        if args.markers and groups:
            run.add_markers(args.input, groups)

        def uns() -> dict[str, Any]:
            assert run.answered is not None  # it is there after the last chunk
            labels = sorted(set(run.answered["label"].drop_null().to_pylist()))
            return {"fractal": run.results, "fractal_label_colors": np.array(label_colours(tree.paths, labels), object)}

        chunks: Chunks = ((table, {}) for table in run.columns(cells, origin, groups))
        old = annotation_columns(cells.column_names, "fractal")
        write_output(args.output, chunks, cells, uns=uns, prefix="fractal_", replaces=old)
    print(f"{cells.num_rows:,} cells of {args.input} -> {args.output}: {summary(run.answered, tree.levels)}")
    if groups:
        print(f"\n{table(*cluster_table(run.results, args.over))}")
    if known:
        truth = Truth.of(args.truth, *known, tree, reference.graph(args.obo))
        print(f"\n{report(run.answered, truth, tree)}")
        if args.confusions:
            draw_confusions(args.confusions, run.answered, truth, tree)


def summary(answered: pa.Table, levels: Sequence[str]) -> str:
    """How many cells got which status, level and label."""
    from fractal.annotate.answers import STATUSES

    counts = {name: answered[name].to_pandas().value_counts(dropna=False) for name in ("status", "level", "label")}
    statuses = ", ".join(f"{counts['status'].get(status, 0):,} {status}" for status in STATUSES)
    depths = ", ".join(f"{counts['level'].get(level, 0):,} {level}" for level in (*reversed(levels), "none"))
    common = [(label, n) for label, n in counts["label"].items() if n][:20]
    rows = [
        [label if isinstance(label, str) else "(none)", f"{n:,}", f"{n / len(answered):.1%}"] for label, n in common
    ]
    return f"{statuses}\ndeepest level answered: {depths}\n\n{table(['Deepest label', 'Cells', 'Share'], rows)}"
