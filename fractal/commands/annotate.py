"""Label new cells with a reference, each as deep in the hierarchy as it can be trusted.

    fractal annotate --reference data/reference --input cells.parquet --output cells.tsv
    fractal annotate --reference data/reference --input cells.h5ad --obsm X_pca --output new.h5ad

One row per cell, or columns of obs that begin with fractal_:

    cell_id                                   its name, where the input has names
    level, label, cl_id                       the deepest answer: none, or a level of the reference
    {level}, {level}_cl_id, {level}_probability   all levels, also those below the one reached
    runner_up, runner_up_probability          the next best finest label
    distance                                  cosine distance to the nearest reference cell, fractal vectors
    ood_score                                 how odd the cell is among those of its type; 0 is ordinary
    p_value                                   share of ordinary cells with as high an ood_score, or a higher one
    status                                    ok; novel (unlike anything in the reference); withheld (unusual, so no
                                              label below the second level); excluded (without --only and --exclude it
                                              would be a type that they leave out); invalid (NaN, inf or zero vector)
    withheld_by                               why the answer is not deeper: confidence, novelty, or empty

What is not answered is missing. Other columns that begin so and are of an earlier run go.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fractal.base.errors import InputError, run
from fractal.base.files import locked
from fractal.base.paths import check_paths
from fractal.base.storage import locate
from fractal.base.table import table
from fractal.commands.options import add, check_suffix, command, one_input

if TYPE_CHECKING:  # all that takes long to load is imported where it is used: --help needs none of it
    import numpy as np
    import pyarrow as pa

    from fractal.annotate.annotator import Annotator
    from fractal.annotate.answers import Answer
    from fractal.annotate.space import RowCheck
    from fractal.data.cells import Cells
    from fractal.hierarchy.tree import Tree

STATUSES = ("ok", "withheld", "novel", "excluded", "invalid")
EXAMPLE = "fractal annotate new.h5ad --reference FOLDER --output FILE"


def get_parser() -> argparse.ArgumentParser:
    parser = command("annotate", __doc__)
    files = parser.add_argument_group("files")
    add(files, "input")
    add(files, "--reference", default=Path("data/reference"), help="folder of `fractal fit` (default: %(default)s)")
    files.add_argument(
        "--index",
        type=locate,
        help="folder of `fractal index`, made with this reference: all its cells vote, in place of the reference's",
    )
    files.add_argument(
        "--index-labels",
        metavar="COLUMN",
        help="with --index: its column of labels, named as the reference's finest (default: its columns of levels)",
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
        "--truth",
        metavar="COLUMN",
        help="obs column of known labels, named as the reference's finest ones: print how good the answers are; needs "
        "an .h5ad --input",
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
    from fractal.data.cells import has_obs, has_obsm, is_h5ad
    from fractal.reference import check_answers

    args.input = one_input(args, EXAMPLE)
    check_suffix("--output", args.output, (".tsv", ".parquet", ".h5ad"))
    if args.output.suffix == ".h5ad" and not is_h5ad(args.input):
        raise InputError(f"{args.output}: an .h5ad is only written for an .h5ad --input; name a .tsv or .parquet")
    in_place = [("--output", "--input")] if args.output.suffix == ".h5ad" else []
    inputs = {"--input": args.input, "--reference": args.reference, "--index": args.index, "--obo": args.obo}
    check_paths(inputs, {"--output": args.output, "--confusions": args.confusions}, in_place)
    if args.confusions:
        if not args.truth:
            raise InputError(f"--confusions {args.confusions}: needs --truth, the obs column of the known labels")
        check_suffix("--confusions", args.confusions, (".png", ".svg", ".pdf"))
    if args.index_labels and not args.index:
        raise InputError(f"--index-labels {args.index_labels}: names a column of --index; name that too, or drop it")
    check_answers(args.confidence, args.novelty, args.error)
    if args.use_rep and not has_obsm(args.input):
        raise InputError(f"--use-rep {args.use_rep}: only an .h5ad has several vectors, {args.input} is none; drop it")
    for flag in ("over", "truth"):
        if getattr(args, flag) and not has_obs(args.input):
            raise InputError(f"--{flag}: names a column of obs, which only an .h5ad --input has")


def answers(
    annotator: Annotator, cells: Cells, rows: RowCheck | None, args: argparse.Namespace
) -> Iterator[tuple[pa.Table, Answer]]:
    """The names of each chunk of cells, a table without columns where they have none, and their answers.

    `rows`, if there is one, looks at all of the cells.
    """

    from tqdm.auto import tqdm

    from fractal.annotate.votes import BATCH
    from fractal.base.prefetch import prefetch
    from fractal.data.parquet import CELL_ID

    def chunks() -> Generator[tuple[pa.Table, Answer], None, None]:
        with tqdm(total=cells.num_rows, unit="cells", unit_scale=True, desc="annotate") as bar:
            for columns, vectors in cells.chunks(BATCH):
                names = columns.select([CELL_ID] if cells.has_names else [])
                if rows:
                    rows.add(vectors)
                yield names, annotator.answer(vectors, args.confidence, args.novelty)
                bar.update(len(vectors))

    return prefetch(chunks())


def with_names(names: pa.Table, answers: pa.Table) -> pa.Table:
    """The columns of the answers, after the names of the cells."""
    for name in names.column_names:
        answers = answers.add_column(0, name, names[name])
    return answers


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    with locked(args.output):  # it may be the input
        annotate(args)


def annotate(args: argparse.Namespace) -> None:
    import pyarrow as pa

    from fractal.annotate.answers import annotation_columns, answer_columns, one_type_warning
    from fractal.annotate.query import Origin, tell
    from fractal.commands.output import open_output
    from fractal.model.adapter import pick_device
    from fractal.reference import read_folder
    from fractal.view.colours import label_colours

    reference = read_folder(args.reference, pick_device(args.device))
    reference.model = args.model
    annotator = reference.annotator
    if args.index:
        annotator = reference.asking(args.index, args.index_labels)
        print(f"{annotator.voters} vote; probabilities by {len(annotator.held_out):,} held-out cells")
    annotator = annotator.restricted(reference.choose(args.obo, args.only, args.exclude))
    if args.error is not None:
        control = annotator.calibration.control(args.error)
        print(control)
        args.confidence = control.confidence
    tree, kept, groups = annotator.tree, list[pa.Table](), None
    with reference.intake.open(args.input, args.use_rep, args.force) as (cells, origin):
        truth = cells.codes(args.truth) if args.truth else None
        tell(origin, args.input)
        rows = reference.intake.row_check(cells.num_rows)
        about = reference.about(annotator, args.confidence, args.novelty, origin.vectors, origin.warning, args.error)
        results: dict[str, Any] = {"annotation": about}
        uns = {"fractal": results, "fractal_label_colors": lambda labels: label_colours(tree.paths, labels)}
        copied = cells if args.output.suffix == ".h5ad" else None
        old = annotation_columns(cells.column_names, "fractal")
        with open_output(args.output, copied, uns=uns, prefix="fractal_", replaces=old.__contains__) as write:
            parts: Iterable[tuple[pa.Table, Answer]] = answers(annotator, cells, rows, args)
            if args.over:
                part, groups = voted(parts, cells, tree, args)
                parts, results["groups"] = [part], groups.to_pandas().set_index("group")
            for names, answer in parts:
                columns = answer_columns(answer, tree)
                write(with_names(names, columns))
                kept.append(columns.select(["level", "label", "status", *tree.levels]))
            answered = pa.concat_tables(kept)
            lines = [line for line in (rows.problem(), one_type_warning(answered, tree)) if line]
            for line in lines:
                tell(Origin("", line), args.input)
            about["warning"] = "; ".join(filter(None, (origin.warning, *lines)))
    print(f"{cells.num_rows:,} cells of {args.input} -> {args.output}: {summary(answered, tree.levels)}")
    if groups is not None:
        print(f"\n{group_summary(groups, args.over)}")
    if truth:
        score(answered, truth, tree, args)


def voted(
    parts: Iterable[tuple[pa.Table, Answer]], cells: Cells, tree: Tree, args: argparse.Namespace
) -> tuple[tuple[pa.Table, Answer], pa.Table]:
    """One answer for the cells of a group of --over -> all names and answers, and a table of the groups."""
    import pyarrow as pa

    from fractal.annotate.answers import group_columns, join, real_groups, vote

    codes, labels = real_groups(*cells.codes(args.over))
    names, found = zip(*parts, strict=True)
    before = join(found)
    after = vote(before, codes, tree, args.confidence, args.novelty)
    return (pa.concat_tables(names), after), group_columns(before, after, codes, labels, tree)


def group_summary(groups: pa.Table, column: str) -> str:
    """A row for each group of cells, as the output's uns has them."""
    frame = groups.to_pandas().astype(object)
    numbers = ["confidence", "agreement", "runner_up_probability"]
    frame[numbers] = frame[numbers].map(lambda value: "" if value != value else f"{value:.3f}")
    rows = [[str(value) for value in row] for row in frame.fillna("").to_numpy().tolist()]
    header = ["Cells", "Label", "Level", "Probability", "Cells that agree", "Not deeper by", "Next best", "Probability"]
    return table([column, *header], rows)


def summary(answered: pa.Table, levels: Sequence[str]) -> str:
    """How many cells got which status, level and label."""
    counts = {name: answered[name].to_pandas().value_counts(dropna=False) for name in ("status", "level", "label")}
    statuses = ", ".join(f"{counts['status'].get(status, 0):,} {status}" for status in STATUSES)
    depths = ", ".join(f"{counts['level'].get(level, 0):,} {level}" for level in (*reversed(levels), "none"))
    common = [(label, n) for label, n in counts["label"].items() if n][:20]
    rows = [
        [label if isinstance(label, str) else "(none)", f"{n:,}", f"{n / len(answered):.1%}"] for label, n in common
    ]
    return f"{statuses}\ndeepest level answered: {depths}\n\n{table(['Deepest label', 'Cells', 'Share'], rows)}"


def score(answered: pa.Table, truth: tuple[np.ndarray, list[str]], tree: Tree, args: argparse.Namespace) -> None:
    """Print how good the answers are, and draw what is taken for what."""
    from fractal.annotate.truth import draw_confusions, report

    print("\n" + report(answered, *truth, tree, args.truth))
    if args.confusions:
        draw_confusions(args.confusions, answered, *truth, tree, args.truth)


if __name__ == "__main__":
    run(main)
