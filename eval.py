"""Step 4: how well each prefix tells each level, on test cells that the adapter has never seen.

    uv run python eval.py --model-path data/fractal_adapter_4L.pt

Prints 5-NN accuracy twice, each with a 95 % interval. `loo` is the published protocol: every query against the other
queries. `bank` takes the neighbours from the training cells, which is what annotating new cells does. Where whole
types were held out, seen and unseen types follow, apart. Then the same with every class counting alike, how far the
predicted type is from the true one in the Cell Ontology, what a neighbourhood shows at each prefix, the silhouette of
every prefix at every level, and steerability. Several checkpoints, trained on the same cells, become rows of the same
tables, and so do vectors of others, by --vectors. `--report` draws it all on one page.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from fractal.base.errors import InputError, run
from fractal.base.files import atomic_write
from fractal.base.paths import check_paths
from fractal.base.storage import locate
from fractal.commands.options import CHECKPOINT, add, positive_int
from fractal.data.atlas import Atlas
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.reference import load_adapter, read_reference
from fractal.score import checkpoints
from fractal.score.checkpoints import BANKS, Checkpoint, Evaluation
from fractal.score.table import steer
from fractal.view.page import check_output
from fractal.view.page import write as write_report
from fractal.view.report import scored_checkpoint


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cells = parser.add_argument_group("cells")
    add(cells, "--input", help="Parquet file of the training (default: %(default)s)")
    cells.add_argument(
        "--all-rows",
        action="store_true",
        help="the input is another file, and all its cells are new: draw the queries from all of it (no `bank` then)",
    )
    text = "queries to draw from the test cells; all of them if there are fewer (default: %(default)s)"
    cells.add_argument("--num-samples", type=positive_int, default=5_000, help=text)
    add(cells, "--seed", help="of the draw (default: %(default)s)")
    cells.add_argument(
        "--bank",
        choices=["train", "all"],
        default="train",
        help="where neighbours come from: the cells trained on, or all that are not set aside for testing, streamed "
        "from the file, two CPU minutes a million (default: %(default)s)",
    )
    rows = parser.add_argument_group("rows of the tables")
    text = f"checkpoints of train.py or references, all with the same split (default: {CHECKPOINT})"
    rows.add_argument("--model-path", type=locate, nargs="+", default=[CHECKPOINT], help=text)
    text = "also raw vectors cut short, PCA and LDA, both fitted on the training cells"
    rows.add_argument("--controls", action="store_true", help=text)
    text = "also these vectors of other methods: matrices with a row for each row of --input, in its order"
    rows.add_argument("--vectors", type=Path, nargs="+", default=[], metavar="NPY", help=text)
    rows.add_argument("--obo", default=CL_SLIM, help="Cell Ontology for distances, path or URL (default: as shipped)")
    add(rows, "--device")
    outputs = parser.add_argument_group("outputs")
    outputs.add_argument("--json", type=locate, help="write the figures to this file, unrounded")
    outputs.add_argument("--report", metavar="HTML", type=Path, help="write a page of figures, see docs/report.md")
    outputs.add_argument("--figures", metavar="DIR", type=Path, help="write these as .svg and .png")
    text = (
        "write to this .npz, per embedding, query and level, what is right; and rows, labels, seen types, what counts"
    )
    outputs.add_argument("--cells-out", type=locate, help=text)
    outputs.add_argument("--rows-out", type=Path, help="write train.npy and queries.npy, row numbers, to this folder")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Raises InputError for flags that exclude each other, and for outputs that can't be written."""
    args = get_parser().parse_args(argv)
    rows_out = [args.rows_out / name for name in ("train.npy", "queries.npy")] if args.rows_out else []
    check_paths(
        {"--input": args.input, "--model-path": args.model_path, "--obo": args.obo, "--vectors": args.vectors},
        {"--json": args.json, "--cells-out": args.cells_out, "--rows-out": rows_out, "--report": args.report},
    )
    check_output(args.report, args.figures)
    if args.rows_out and args.rows_out.exists() and not args.rows_out.is_dir():
        raise InputError(f"--rows-out {args.rows_out}: is a file; name a folder")
    if args.all_rows and args.controls:
        raise InputError("--controls needs the training cells, and --all-rows has none; drop one of the two")
    if args.all_rows and args.bank == "all":
        raise InputError("--bank all: with --all-rows all cells are new, so none can be in the bank; drop one")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    loaded = [load_adapter(path, args.device) for path in args.model_path]
    models = checkpoints.of_one_split(args.model_path, loaded)
    atlas = Atlas.open(args.input)
    rows = checkpoints.choose_rows(models[0], atlas, args.num_samples, args.seed, args.all_rows)
    graph = load_graph(args.obo)
    bank = None if args.all_rows else args.bank
    result = checkpoints.evaluate(models, atlas, rows, graph, bank, args.vectors, args.controls)
    notes = checkpoints.warnings(atlas, graph.graph["release"], result.scores.copies, result.left_out)
    steering = print_tables(args, models, result, notes)
    if args.report or args.figures:
        draw(args, models, atlas, result, notes)
    write_files(args, models, rows, result, steering)


def describe(args: argparse.Namespace, models: list[Checkpoint], result: Evaluation, name: object) -> list[str]:
    """Which cells are scored, and which were held out; `name` is that of the file."""
    seen, split = result.scores.truth.seen, models[0].split
    if args.all_rows:
        return [f"{len(seen):,} cells of {name}, which are all new"]
    held_out = f"{len(split.test_studies)} whole studies" if split.test_studies else "cells"
    if split.test_types:
        unseen = int((~seen).sum())
        held_out = f"{len(split.test_types)} whole types, of which {unseen:,} test cells are, and other types' cells"
    bank = f"{result.num_bank:,} {BANKS[args.bank]} cells in the bank"
    return [f"{len(seen):,} test cells of {name}, {bank}", f"held out: {held_out}"]


def print_tables(
    args: argparse.Namespace, models: list[Checkpoint], result: Evaluation, notes: list[str]
) -> dict[str, float]:
    """-> the steerability of each checkpoint."""
    about = [f"{model.path}: {model}" for model in models]
    print("\n".join([*about, *describe(args, models, result, args.input), *notes, ""]))
    protocols = {"loo": "leave-one-out inside the test cells (loo)"}
    if not args.all_rows:
        protocols["bank"] = f"neighbours from the {BANKS[args.bank]} cells (bank)"
    over = checkpoints.describe_intervals(models[0].split, result.scores.truth.groups)
    print(result.scores.markdown(protocols, over))
    steering = {}
    for model, group in zip(models, result.scores.groups[1:], strict=False):
        steering[model.name], text = steer(group, model.blocks[0], model.blocks[-1])
        print(f"\n{model.name + ' ' if len(models) > 1 else ''}{text}")
    return steering


def draw(
    args: argparse.Namespace, models: list[Checkpoint], atlas: Atlas, result: Evaluation, notes: list[str]
) -> None:
    """The page of --report and the pictures of --figures."""
    about = [*describe(args, models, result, args.input.name), f"draw {args.seed}"]
    protocols = {} if args.all_rows else {"bank": f"{BANKS[args.bank]} cells"}
    protocols["loo"] = "the other test cells"
    scored = []
    for i, model in enumerate(models):
        annotator = read_reference(model.path).annotator if args.all_rows and model.path.is_dir() else None
        scored.append(scored_checkpoint(models, i, result, atlas, protocols, about, annotator))
    for one in scored:
        one.warnings.extend(notes)
    write_report(f"{', '.join(m.name for m in models)} on {args.input.name}", scored, args.report, args.figures)


def write_files(
    args: argparse.Namespace,
    models: list[Checkpoint],
    rows: tuple[np.ndarray, np.ndarray],
    result: Evaluation,
    steering: dict[str, float],
) -> None:
    """The files of --rows-out, --cells-out and --json."""
    scores, n = result.scores, len(rows[1])
    for name, numbers in zip(("train.npy", "queries.npy"), rows, strict=True) if args.rows_out else ():
        with atomic_write(args.rows_out / name) as part, open(part, "wb") as file:
            np.save(file, numbers)
    if args.cells_out:
        truth, protocols = scores.truth, ("loo",) if args.all_rows else ("loo", "bank")
        arrays: dict[str, Any] = {p: np.stack([row[f"{p}_right"] for row in scores.rows]) for p in protocols}
        arrays |= {"rows": rows[1], "labels": result.cells.labels[:n], "seen": truth.seen, "counts": truth.counts}
        with atomic_write(args.cells_out) as part, open(part, "wb") as file:
            np.savez_compressed(file, **arrays)
    figures: dict[str, Any] = {
        "rows": scores.as_json(),
        "levels": list(result.cells.levels),
        "classes": result.cells.classes,
        "steerability": steering if len(models) > 1 else steering[models[0].name],
        "num_queries": n,
        "num_unseen": int((~scores.truth.seen).sum()),
        "num_bank": result.num_bank,
        "exact_copies": scores.copies,
        "config": [model.facts["config"] for model in models],
    }
    if args.json:
        with atomic_write(args.json) as part:
            part.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
