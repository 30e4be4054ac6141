"""Label new cells with a reference, each as deep in the hierarchy as it can be trusted.

    fractal annotate --reference data/reference --input cells.parquet --output cells.tsv
    fractal annotate --reference data/reference --input cells.h5ad --obsm X_pca --output new.h5ad

One row per cell, or columns of obs that begin with fractal_:

    cell_id                                   its name, where the input has names
    level, label, cl_id                       the deepest answer: none, or a level of the reference
    {level}, {level}_cl_id, {level}_probability   all levels, also those below the one reached
    distance                                  cosine distance to the nearest reference cell, fractal vectors
    ood_score                                 how odd the cell is among those of its type; 0 is ordinary
    p_value                                   share of ordinary cells with as high an ood_score, or a higher one
    status                                    ok; novel (unlike anything in the reference); withheld (odd, so no label
                                              below the second level); excluded (without --only and --exclude it would
                                              be a type that they leave out); invalid (NaN, inf or zero vector)
    withheld_by                               why the answer is not deeper: confidence, novelty, or empty
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fractal.base.errors import InputError, run
from fractal.base.files import check_paths, locked
from fractal.base.storage import place
from fractal.base.table import table
from fractal.commands.options import add, check_suffix, command, one_input

if TYPE_CHECKING:  # all that takes long to load is imported where it is used: --help needs none of it
    import numpy as np
    import pyarrow as pa

    from fractal.annotate.annotator import Annotator
    from fractal.annotate.answers import Answer
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
        type=place,
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
    add(answers, "--confidence", "--novelty")
    answers.add_argument(
        "--over",
        metavar="COLUMN",
        help="obs column of a clustering, as leiden: the cells of a cluster take the label that most of its "
        "probability says, per level; needs an .h5ad --input",
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
    if not 0 < args.confidence <= 1:
        raise InputError(f"--confidence {args.confidence:g}: must be above 0 and at most 1")
    if args.use_rep and not has_obsm(args.input):
        raise InputError(f"--use-rep {args.use_rep}: only an .h5ad has several vectors, {args.input} is none; drop it")
    for flag in ("over", "truth"):
        if getattr(args, flag) and not has_obs(args.input):
            raise InputError(f"--{flag}: names a column of obs, which only an .h5ad --input has")


def answers(
    annotator: Annotator, cells: Cells, groups: np.ndarray | None, args: argparse.Namespace
) -> Iterator[pa.Table]:
    """The columns of each chunk, `cell_id` first where the cells have names; with `groups`, of all cells at once."""
    import pyarrow as pa
    from tqdm.auto import tqdm

    from fractal.annotate.answers import answer_columns, join, vote
    from fractal.annotate.votes import BATCH
    from fractal.base.prefetch import prefetch
    from fractal.data.parquet import CELL_ID

    def chunks() -> Generator[tuple[pa.Table, Answer], None, None]:
        with tqdm(total=cells.num_rows, unit="cells", unit_scale=True, desc="annotate") as bar:
            for columns, vectors in cells.chunks(BATCH):
                names = columns.select([CELL_ID] if cells.has_names else [])
                yield names, annotator.answer(vectors, args.confidence, args.novelty)
                bar.update(len(vectors))

    parts: Iterable[tuple[pa.Table, Answer]] = prefetch(chunks())
    if groups is not None:
        names, found = zip(*parts, strict=True)
        parts = [(pa.concat_tables(names), vote(join(found), groups, annotator.tree, args.confidence, args.novelty))]
    for names, answer in parts:
        table = answer_columns(answer, annotator.tree)
        yield table.add_column(0, CELL_ID, names[CELL_ID]) if cells.has_names else table


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    with locked(args.output):  # it may be the input
        annotate(args)


def annotate(args: argparse.Namespace) -> None:
    import pyarrow as pa

    from fractal.annotate.query import tell
    from fractal.commands.output import open_output
    from fractal.model.adapter import pick_device
    from fractal.reference import read_folder

    reference = read_folder(args.reference, pick_device(args.device))
    reference.model = args.model
    annotator = reference.annotator
    if args.index:
        annotator = reference.asking(args.index, args.index_labels)
        print(f"{annotator.voters} vote; probabilities by {len(annotator.validation_path):,} validation cells")
    annotator = annotator.restricted(reference.choose(args.obo, args.only, args.exclude))
    kept: list[pa.Table] = []
    with reference.intake.open(args.input, args.use_rep, args.force) as (cells, origin):
        groups, truth = (cells.codes(key) if key else None for key in (args.over, args.truth))
        tell(origin, args.input)
        about = reference.about(annotator, args.confidence, args.novelty, origin.vectors, origin.warning)
        copied = cells if args.output.suffix == ".h5ad" else None
        with open_output(args.output, copied, uns={"annotation": about}, prefix="fractal_") as write:
            for table in answers(annotator, cells, groups and groups[0], args):
                write(table)
                kept.append(table.select(["level", "label", "status", *(reference.levels if truth else [])]))
    answered = pa.concat_tables(kept)
    print(f"{cells.num_rows:,} cells of {args.input} -> {args.output}: {summary(answered, reference.levels)}")
    if truth:
        score(answered, truth, annotator.tree, args)


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

    columns = {name: answered[name].to_pandas().to_numpy(object) for name in answered.column_names}
    print("\n" + report(columns, *truth, tree.paths, tree.levels, args.truth))
    if args.confusions:
        draw_confusions(args.confusions, columns, *truth, tree.paths, tree.levels, args.truth)


if __name__ == "__main__":
    run(main)
