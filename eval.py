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
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fractal.annotate.bundle import load_adapter, read_bundle, weights_sha256
from fractal.base.cli import add_device, non_negative_int, positive_int
from fractal.base.errors import InputError, printable, run
from fractal.base.files import atomic_write, check_paths
from fractal.base.storage import place
from fractal.data.parquet import (
    LabelledVectors,
    fingerprint,
    levels_of,
    metadata_of,
    open_atlas,
    read_rows,
    study_codes,
)
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.ontology import CL_SLIM, LINEAGE_ANCHORS, STEM_ANCHOR, SYSTEM_ANCHORS, load_graph
from fractal.model.adapter import Adapter, pick_device
from fractal.model.split import Split
from fractal.score import embeddings
from fractal.score.embeddings import Encoder, Subset
from fractal.score.table import ScoreTable, Truth, score_table, steer, truth_of
from fractal.view.page import check_output
from fractal.view.page import write as write_report
from fractal.view.scored import Scored, answers_of, provenance, reference_of

BANKS = {"train": "training", "all": "other"}  # whose cells are the bank


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-path",
        type=place,
        nargs="+",
        default=[Path("data/fractal_adapter_4L.pt")],
        help="checkpoints of train.py or references, all with the same split (default: data/fractal_adapter_4L.pt)",
    )
    parser.add_argument(
        "--input",
        type=place,
        default=Path("data/stratified.parquet"),
        help="the Parquet file that it was trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--all-rows",
        action="store_true",
        help="the input is another file, and all its cells are new: draw the queries from all of it (no `bank` then)",
    )
    parser.add_argument(
        "--num-samples",
        type=positive_int,
        default=5_000,
        help="queries to draw from the test cells; all of them if there are fewer (default: %(default)s)",
    )
    parser.add_argument(
        "--bank",
        choices=["train", "all"],
        default="train",
        help="where neighbours come from: the cells trained on, or all that are not set aside for testing, streamed "
        "from the file, two CPU minutes a million (default: %(default)s)",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also score raw vectors cut short, PCA and LDA, both fitted on the training cells",
    )
    parser.add_argument(
        "--vectors",
        type=Path,
        nargs="+",
        default=[],
        metavar="NPY",
        help="also score these vectors of other methods: matrices with a row for each row of --input, in its order",
    )
    parser.add_argument(
        "--obo", default=CL_SLIM, help="Cell Ontology for the distances, a path or a URL (default: the shipped one)"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the draw (default: %(default)s)")
    add_device(parser)
    parser.add_argument("--json", type=place, help="also write the figures to this file, unrounded")
    parser.add_argument(
        "--report",
        metavar="HTML",
        type=Path,
        help="also write a page: the figures drawn, what to conclude from each, and what a reference of the checkpoint "
        "would answer; see docs/report.md",
    )
    parser.add_argument("--figures", metavar="DIR", type=Path, help="also write these as .svg and .png")
    parser.add_argument(
        "--cells-out",
        type=place,
        help="also write right (True) or wrong per embedding, query and level, row numbers, labels, whose types were "
        "seen and what counts in bank, to this .npz",
    )
    parser.add_argument(
        "--rows-out", type=Path, help="also write train.npy and queries.npy, row numbers, to this folder"
    )
    return parser


@dataclass(frozen=True)
class Model:
    """A checkpoint to score."""

    name: str
    path: Path
    adapter: Adapter
    checkpoint: dict[str, Any]
    split: Split

    @property
    def blocks(self) -> list[int]:
        """Which level, by number, each block tells."""
        config = self.checkpoint["config"]
        return list(config.get("block_levels", range(config["num_levels"])))


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


def load_models(paths: list[Path], device: torch.device) -> list[Model]:
    """Raises InputError for checkpoints that were not trained on the same cells."""
    models = []
    for name, path in zip(embeddings.distinct_names(paths), paths, strict=True):
        adapter, checkpoint = load_adapter(path, device)
        models.append(Model(name, path, adapter, checkpoint, Split.of(checkpoint, path)))
        if models[-1].split != models[0].split:
            raise InputError(f"{path}: was trained on other cells than {paths[0]}; evaluate it by itself")
    return models


def choose_rows(
    checkpoint: dict[str, Any], model: Path, path: Path, num_samples: int, seed: int, all_rows: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """-> the training rows, which are the bank, and the query rows. Raises InputError for another file."""
    file = open_atlas(path)
    split = Split.of(checkpoint, model)
    same_file = fingerprint(path) == split.fingerprint
    dim = file.schema_arrow.field("embedding").type.list_size
    if dim != checkpoint["config"]["dim"]:
        raise InputError(f"{path}: its vectors have {dim} numbers, those of {model} {checkpoint['config']['dim']}")
    trained = tuple(checkpoint["config"].get("levels", LEVELS))
    if levels_of(path) != trained:
        raise InputError(f"{path}: its levels are {', '.join(levels_of(path))}, those of {model} {', '.join(trained)}")
    if all_rows and same_file:
        raise InputError(f"{path}: {model} was trained on it, so its cells are not new; drop --all-rows")
    if all_rows:
        train, pool = np.arange(0), np.arange(file.metadata.num_rows)
    elif not same_file:
        raise InputError(
            f"{path}: not the file that {model} was trained on, so which of its cells are held out is "
            "unknown; name that file, or say --all-rows if all its cells are new"
        )
    else:
        train, _, pool = split.rows(path)
    queries = np.random.default_rng(seed).permutation(pool)[:num_samples]
    if len(queries) < 2:
        raise InputError(f"{path}: {len(queries)} test cells are too few; train with a larger --test-ratio")
    return train, queries


def warnings(path: Path, release: str, copies: dict[str, int], failed: list[str]) -> list[str]:
    """What makes the figures say less than they seem to, a line each."""
    lines = [f"left out: {line}" for line in failed]
    metadata = metadata_of(path)
    made_with = metadata.get("cl_release", "")
    if made_with and made_with != release:
        lines.append(
            f"warning: {path} was made with Cell Ontology {printable(made_with)}, and steps are counted in {release}; "
            "name the other one with --obo"
        )
    anchors = hashlib.sha256(repr((SYSTEM_ANCHORS, STEM_ANCHOR, LINEAGE_ANCHORS)).encode()).hexdigest()
    if metadata.get("anchors_sha256", anchors) != anchors:
        lines.append(f"note: {path} has another tree than this version's anchors make, and is scored on its own")
    for where, number in copies.items():
        if number:
            lines.append(f"warning: {number:,} test cells have an exact copy among {where}, which flatters all figures")
    return lines


def of_model(model: Model, truth: Truth) -> str:
    config = model.checkpoint["config"]
    told = ", ".join(truth.levels[k] for k in model.blocks)
    return f"recipe {config['recipe']}, {len(model.blocks)} blocks of {config['scale_dim']}: {told}"


def of_cells(args: argparse.Namespace, split: Split, truth: Truth, num_bank: int, data: object) -> list[str]:
    """What is scored, and what was held out; `data` is the file's name."""
    n, strangers = len(truth.seen), int((~truth.seen).sum())
    if args.all_rows:
        return [f"{n:,} cells of {data}, which are all new"]
    held_out = f"{len(split.test_studies)} whole studies" if split.test_studies else "cells"
    if split.test_types:
        held_out = f"{len(split.test_types)} whole types, of which {strangers:,} test cells are, and other types' cells"
    cells = f"{n:,} test cells of {data}, {num_bank:,} {BANKS[args.bank]} cells in the bank"
    return [cells, f"held out: {held_out}"]


def what_intervals_are_of(split: Split, groups: np.ndarray | None) -> str:
    if groups is not None:
        return f"[95 % interval over the {len(np.unique(groups))} studies]"
    if split.test_studies:
        return "[95 % interval over cells: one study can't say how another would score]"
    return "[95 % interval over cells]"


def write_outputs(
    args: argparse.Namespace, numbers: dict[str, np.ndarray], per_cell: dict[str, Any], result: dict[str, Any]
) -> None:
    """The files of --rows-out, --cells-out and --json."""
    for name, rows in numbers.items() if args.rows_out else ():
        with atomic_write(args.rows_out / name) as part, open(part, "wb") as file:
            np.save(file, rows)
    if args.cells_out:
        with atomic_write(args.cells_out) as part, open(part, "wb") as file:
            np.savez_compressed(file, **per_cell)
    if args.json:
        with atomic_write(args.json) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def scored_model(
    args: argparse.Namespace,
    models: list[Model],
    i: int,
    scores: ScoreTable,
    cells: LabelledVectors,
    protocols: dict[str, str],
) -> Scored:
    """What --report shows of the i-th checkpoint: its rows, as printed, and what its reference would answer."""
    model, truth = models[i], scores.truth
    data = fingerprint(args.input) if args.all_rows else model.split.fingerprint  # `choose_rows` has compared them
    try:
        if not args.all_rows:
            bundle = reference_of(model.adapter, model.checkpoint, args.input, model.split)
        elif model.path.is_dir():
            bundle = read_bundle(model.path)
        else:
            raise InputError("a checkpoint has none for cells of another file; name a reference with --model-path")
        answers, why = answers_of(bundle, cells.split(len(truth.seen))[0], truth.seen), ""
    except InputError as error:
        answers, why = {}, str(error)
    return Scored(
        name=model.name,
        cells=of_model(model, truth),
        levels=truth.levels,
        blocks=model.blocks,
        prefixes=scores.groups[1 + i][::-1],  # raw comes first
        raw=scores.rows[0],
        controls=[row for group in scores.groups[1 + len(models) :] for row in group],
        protocols=protocols,
        truth=truth,
        classes=cells.classes,
        paths=np.unique(cells.labels, axis=0),
        studies=study_codes(args.input)[1] if truth.groups is not None else (),
        answers=answers,
        no_answers=why,
        facts=[
            ("model", model.path.name),
            ("cells scored", f"{args.input.name}, sha256 {data}, draw {args.seed}"),
            *provenance(model.checkpoint, weights_sha256(model.adapter)),
        ],
    )


def make_encoders(
    args: argparse.Namespace, models: list[Model], train: Subset, types: np.ndarray
) -> tuple[list[Encoder], list[str]]:
    """-> raw vectors, checkpoints, others' vectors, controls; and a line for each control that can't be fitted."""
    encoders: list[Encoder] = [embeddings.raw]
    encoders += [embeddings.adapter_encoder(model.adapter, model.name if len(models) > 1 else "") for model in models]
    num_rows = open_atlas(args.input).metadata.num_rows
    names = embeddings.distinct_names(args.vectors)
    encoders += [
        embeddings.vectors_encoder(path, num_rows, name) for path, name in zip(args.vectors, names, strict=True)
    ]
    if not args.controls:
        return encoders, []
    widths = {j * model.adapter.scale_dim for model in models for j in range(1, model.adapter.num_levels + 1)}
    controls, failed = embeddings.fit_controls(train.vectors, types, sorted(widths))
    return [*encoders, controls], failed


def find_neighbours(
    args: argparse.Namespace, split: Split, encoders: list[Encoder], queries: Subset, train: Subset
) -> tuple[np.ndarray, list[np.ndarray], int]:
    """-> the rows of the bank that are neighbours, per embedding each query's 5 among these, and the bank's size."""
    if args.bank == "train":
        return train.rows, embeddings.nearest_rows(train, queries, encoders), len(train.rows)
    keep = ~split.is_test(args.input)
    rows = np.stack(embeddings.nearest_in_file(args.input, keep, queries, encoders))
    numbers, positions = np.unique(rows, return_inverse=True)
    return numbers, list(positions.reshape(rows.shape)), int(keep.sum())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = pick_device(args.device)
    models = load_models(args.model_path, device)
    split, checkpoint = models[0].split, models[0].checkpoint
    train_rows, query_rows = choose_rows(
        checkpoint, models[0].path, args.input, args.num_samples, args.seed, args.all_rows
    )
    n = len(query_rows)

    # The queries, and the training cells: the controls are fitted on these, and they are the bank of --bank train.
    needed = train_rows if args.bank == "train" or args.controls else train_rows[:0]
    cells = read_rows(args.input, np.concatenate([query_rows, needed]))  # one call: labels share their codes
    vectors = torch.from_numpy(cells.vectors).to(device)
    queries, train = Subset(vectors[:n], query_rows), Subset(vectors[n:], needed)
    encoders, failed = make_encoders(args, models, train, cells.labels[n:, -1])
    num_bank, positions = len(train_rows), None
    if not args.all_rows:
        numbers, positions, num_bank = find_neighbours(args, split, encoders, queries, train)
        if args.bank == "all":
            cells = read_rows(args.input, np.concatenate([query_rows, numbers]))

    # Score.
    graph = load_graph(args.obo)
    unseen = [] if args.all_rows else split.test_types
    groups = study_codes(args.input)[0][query_rows] if len(split.test_studies) > 1 and positions else None
    labels, bank_labels = (torch.from_numpy(part).to(device) for part in (cells.labels[:n], cells.labels[n:]))
    truth = truth_of(cells.levels, labels, cells.classes, checkpoint["classes"], unseen, groups, graph)
    bank = Subset(torch.from_numpy(cells.vectors[n:]).to(device), np.arange(0)) if positions else None
    scores = score_table(truth, queries, encoders, bank, bank_labels, positions)

    # Print.
    protocols = {"loo": "leave-one-out inside the test cells (loo)"}
    if positions:
        protocols["bank"] = f"neighbours from the {BANKS[args.bank]} cells (bank)"
    notes = warnings(args.input, graph.graph["release"], scores.copies, failed)
    about = of_cells(args, split, truth, num_bank, args.input)
    print("\n".join([*(f"{model.path}: {of_model(model, truth)}" for model in models), *about, *notes, ""]))
    print(scores.markdown(protocols, what_intervals_are_of(split, groups)))
    steering = {}
    for model, rows in zip(models, scores.groups[1:], strict=False):
        steering[model.name], text = steer(rows, cells.levels[model.blocks[0]], cells.levels[model.blocks[-1]])
        print(f"\n{model.name + ' ' if len(models) > 1 else ''}{text}")

    # Write.
    if args.report or args.figures:
        whose = {"bank": f"{BANKS[args.bank]} cells", "loo": "the other test cells"}
        whose = {protocol: name for protocol, name in whose.items() if protocol in protocols}
        about = of_cells(args, split, truth, num_bank, args.input.name)
        scored = [scored_model(args, models, i, scores, cells, whose) for i in range(len(models))]
        scored = [replace(one, cells="; ".join([one.cells, *about]), warnings=notes) for one in scored]
        title = f"{', '.join(model.name for model in models)} on {args.input.name}"
        write_report(title, scored, args.report, args.figures)
    result = {
        "rows": scores.as_json(),
        "levels": list(cells.levels),
        "classes": cells.classes,
        "steerability": steering if len(models) > 1 else steering[models[0].name],
        "num_queries": n,
        "num_unseen": int((~truth.seen).sum()),
        "num_bank": num_bank,
        "exact_copies": scores.copies,
        "config": [model.checkpoint["config"] for model in models],
    }
    per_cell: dict[str, Any] = {protocol: scores.right(protocol) for protocol in protocols}
    per_cell |= {"rows": query_rows, "labels": cells.labels[:n], "seen": truth.seen, "counts": truth.counts}
    write_outputs(args, {"train.npy": train_rows, "queries.npy": query_rows}, per_cell, result)


if __name__ == "__main__":
    run(main)
