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
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fractal.base.errors import InputError, run
from fractal.base.files import check_paths, locked
from fractal.base.storage import place
from fractal.base.table import table
from fractal.commands.options import add, check_suffix, command, one_input

if TYPE_CHECKING:  # all that takes long to load is imported where it is used: --help needs none of it
    from fractal.annotate.annotator import Answer
    from fractal.annotate.bundle import Bundle
    from fractal.data.cells import Cells

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
    add(files, "--use-rep")
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


def voted(parts: list[tuple[Answer, np.ndarray, np.ndarray]], groups: np.ndarray, bundle: Bundle, args: Any) -> None:
    """Give all cells of a group of (n,) codes one answer, in place of `parts`, the chunks of the whole file."""
    from fractal.annotate.annotator import Answer, depths, majority

    good = np.concatenate([part[1] for part in parts])
    joined = Answer(*(np.concatenate([getattr(p[0], f.name) for p in parts]) for f in fields(Answer)))
    path, probability = majority(joined.probability, joined.path, groups[good], bundle.tree)
    confident, depth = depths(probability, joined.p_value, args.confidence, args.novelty)
    joined = replace(joined, path=path, probability=probability, confident_depth=confident, depth=depth)
    start = 0
    for i, (part, mask, excluded) in enumerate(parts):
        rows = slice(start, start := start + len(part.path))
        parts[i] = Answer(*(getattr(joined, f.name)[rows] for f in fields(Answer))), mask, excluded


def answers(bundle: Bundle, source: Cells, groups: np.ndarray | None, args: Any) -> Iterator[dict[str, np.ndarray]]:
    """The columns of each chunk, `cell_id` first where known; with `groups` all answers are held, for the vote."""
    from tqdm import tqdm

    from fractal.base.prefetch import prefetch
    from fractal.data.cells import names_of
    from fractal.data.parquet import CELL_ID
    from fractal.data.vectors import CHUNK, usable

    def asked() -> Generator[tuple[Answer, np.ndarray, np.ndarray], None, None]:
        with tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="annotate") as bar:
            for table, chunk in source.chunks(4 * CHUNK):  # the annotator's BATCH
                good = usable(chunk)
                some = chunk[good]
                names.append(names_of(table))
                yield bundle.answer(some, args.confidence, args.novelty), good, bundle.best_excluded(some)
                bar.update(len(chunk))

    names = list[np.ndarray | None]()  # of the cells of each chunk
    parts: Iterable[tuple[Answer, np.ndarray, np.ndarray]] = prefetch(asked())
    if groups is not None:
        parts = list(parts)
        voted(parts, groups, bundle, args)
    for part in parts:
        ids = names.pop(0)
        yield ({} if ids is None else {CELL_ID: ids.astype(object)}) | bundle.columns(*part)


def restrict(bundle: Bundle, args: argparse.Namespace) -> Bundle:
    """Without the types that --only and --exclude leave out. Raises InputError for terms that --obo does not know."""
    from fractal.annotate.bundle import check_terms, choose_paths
    from fractal.hierarchy.ontology import CL_SLIM, load_graph

    if bundle.cl_ids.any():
        graph = load_graph(args.obo or CL_SLIM)
        check_terms(bundle, graph, args.reference, args.obo or CL_SLIM)
        keep = choose_paths(bundle, graph, args.only, args.exclude)
        return bundle if keep is None else bundle.restricted(keep)
    if args.only or args.exclude:
        raise InputError(f"{args.reference}: has no CL ids, so --only and --exclude can't be applied")
    return bundle


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    with locked(args.output):  # it may be the input
        annotate(args)


def annotate(args: argparse.Namespace) -> None:
    import pyarrow as pa

    from fractal.annotate.bundle import read_bundle
    from fractal.annotate.query import open_query, tell
    from fractal.annotate.truth import draw_confusions, report
    from fractal.commands.output import open_output
    from fractal.model.adapter import pick_device

    bundle = read_bundle(args.reference, pick_device(args.device))
    if args.index:
        from fractal.search.voters import with_index

        bundle = with_index(bundle, args.index, args.index_labels)
        print(f"{bundle.voters} vote; probabilities by {len(bundle.validation_path):,} validation cells")
    bundle = restrict(bundle, args)
    levels, statuses, labels = Counter[str](), Counter[str](), Counter[str]()
    kept: list[dict[str, np.ndarray]] = []
    with open_query(bundle, args.input, args.use_rep, args.force) as (source, origin):
        tell(origin, args.input)
        groups, truth = (key and source.codes(key) for key in (args.over, args.truth))
        name = args.reference.resolve().name
        about = bundle.about(name, args.confidence, args.novelty, origin.vectors, origin.warning)
        copied = source if args.output.suffix == ".h5ad" else None
        with open_output(args.output, copied, uns={"annotation": about}, prefix="fractal_") as write:
            for columns in answers(bundle, source, groups and groups[0], args):
                write(pa.table(columns))
                levels.update(columns["level"])
                statuses.update(columns["status"])
                labels.update(columns["label"])
                if truth:
                    kept.append({name: columns[name] for name in (*bundle.levels, "level", "status")})

    print(
        f"{source.num_rows:,} cells of {args.input} -> {args.output}: "
        + ", ".join(f"{statuses[s]:,} {s}" for s in STATUSES)
    )
    order = ("none", *bundle.levels)
    print("deepest level answered: " + ", ".join(f"{levels[d]:,} {d}" for d in reversed(order)) + "\n")
    shown = [[label or "(none)", f"{n:,}", f"{100 * n / source.num_rows:.1f}"] for label, n in labels.most_common(20)]
    print(table(["Deepest label", "Cells", "%"], shown))
    if truth:
        answered = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
        known = (answered, *truth, bundle.tree.paths, bundle.levels, args.truth)
        print("\n" + report(*known))
        if args.confusions:
            draw_confusions(args.confusions, *known)


if __name__ == "__main__":
    run(main)
