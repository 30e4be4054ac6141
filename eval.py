"""Step 4: how well each prefix tells each level, on test cells that the adapter has never seen.

    uv run python eval.py --model-path data/fractal_adapter_4L.pt

Prints 5-NN accuracy twice, each with a 95 % interval. `loo` is the published protocol: every query against the other
queries. `bank` takes the neighbours from the training cells, which is what annotating new cells does. Where whole
types were held out, seen and unseen types follow, apart. Then the same with every class counting alike, how far the
predicted type is from the true one in the Cell Ontology, what a neighbourhood shows at each prefix, the silhouette of
every prefix at every level, and steerability. Several checkpoints, trained on the same cells, become rows of the same
tables. `--search` adds what a shorter vector buys in search, `--report` draws it all on one page.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fractal.annotate.bundle import load_adapter, read_bundle, weights_sha256
from fractal.base.cli import InputError, add_device, non_negative_int, positive_int, printable, run, table
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
from fractal.model.adapter import Adapter, embed, pick_device
from fractal.model.split import Split
from fractal.score.evaluate import (
    Encoder,
    Truth,
    adapter_encoder,
    distinct_names,
    fit_controls,
    nearest_in_file,
    nearest_rows,
    score,
    shuffled_tree,
    truth_of,
    twins,
)
from fractal.score.metrics import K, silhouette, steerability
from fractal.score.truncation import RECALL, search_table
from fractal.search.exact import nearest
from fractal.view.page import check_output
from fractal.view.page import write as write_report
from fractal.view.scored import Scored, answers_of, provenance, reference_of

SEARCHES = 2_000  # queries of --search
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
        help="also score raw vectors cut short, PCA and LDA (both fitted on the training cells), and the prefixes' "
        "silhouettes on a shuffled tree",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="also show what a shorter vector buys: recall of the full vectors' neighbours among the training cells, "
        "time per query and bytes per cell, for every prefix, for funnels and for hnswlib indexes; some minutes",
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
        {"--input": args.input, "--model-path": args.model_path, "--obo": args.obo},
        {"--json": args.json, "--cells-out": args.cells_out, "--rows-out": rows_out, "--report": args.report},
    )
    check_output(args.report, args.figures)
    if args.rows_out and args.rows_out.exists() and not args.rows_out.is_dir():
        raise InputError(f"--rows-out {args.rows_out}: is a file; name a folder")
    if args.all_rows:
        for flag in ("controls", "search"):
            if getattr(args, flag):
                raise InputError(f"--{flag} needs the training cells, and --all-rows has none; drop one of the two")
        if args.bank == "all":
            raise InputError("--bank all: with --all-rows all cells are new, so none can be in the bank; drop one")
    if args.search and args.bank == "all":
        raise InputError("--search looks among the training cells; drop --bank all")
    return args


def load_models(paths: list[Path], device: torch.device) -> list[Model]:
    """Raises InputError for checkpoints that were not trained on the same cells."""
    models = []
    for name, path in zip(distinct_names(paths), paths, strict=True):
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


def show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def with_interval(share: float | None, interval: Sequence[float] | None) -> str:
    return show(share) + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def accuracy_table(rows: list[dict[str, Any]], protocol: str, levels: Sequence[str]) -> str:
    def line(row: dict[str, Any]) -> list[str]:
        shares, intervals = row[protocol], row[f"{protocol}_interval"]
        cells = [with_interval(shares[level], intervals[level]) for level in levels]
        return [row["embedding"], f"{row['dims']}d", *cells, show(row["silhouette"][levels[0]])]

    return table(["Embedding", "Dims", *(level.capitalize() for level in levels), "Sil"], [line(row) for row in rows])


def strangers_table(rows: list[dict[str, Any]], protocols: Sequence[str], levels: Sequence[str]) -> str:
    """Unseen types, then seen ones, each at every level in every protocol."""
    header = ["Embedding", "Types", *(f"{protocol} {level}" for protocol in protocols for level in levels)]
    lines = [
        [row["embedding"], name, *(show(row[name][protocol][level]) for protocol in protocols for level in levels)]
        for name in ("unseen", "seen")
        for row in rows
    ]
    return table(header, lines)


def level_table(rows: list[dict[str, Any]], key: str, levels: Sequence[str], more: dict[str, str] | None = None) -> str:
    """One figure per level, `key`, and further columns: title -> key."""

    def line(row: dict[str, Any]) -> list[str]:
        others = [show(row[k], 0 if k.endswith("cells") else 2) for k in (more or {}).values()]
        return [row["embedding"], *(show(row[key][level]) for level in levels), *others]

    header = ["Embedding", *(level.capitalize() for level in levels), *(more or {})]
    return table(header, [line(row) for row in rows])


def what_intervals_are_of(split: Split, groups: np.ndarray | None) -> str:
    if groups is not None:
        return f"[95 % interval over the {len(np.unique(groups))} studies]"
    if split.test_studies:
        return "[95 % interval over cells: one study can't say how another would score]"
    return "[95 % interval over cells]"


def print_tables(
    rows: list[dict[str, Any]], protocols: dict[str, str], levels: Sequence[str], unseen: bool, interval: str
) -> None:
    """All tables of the test cells. protocols: "loo" and perhaps "bank" -> its title."""
    for protocol, title in protocols.items():
        print(f"5-NN accuracy, {title} {interval}\n\n{accuracy_table(rows, protocol, levels)}\n")
    if unseen:
        print("5-NN accuracy, types that were held out (unseen) and all others (seen) apart, neighbours as above; in")
        print("bank an unseen type counts at the levels whose class other types have brought into training\n")
        print(strangers_table(rows, list(protocols), levels) + "\n")
    for protocol, title in protocols.items():
        print(f"Macro F1, every class counting alike, {title};")
        print("Steps: mean way from the true type's term to the predicted one's in the Cell Ontology, of so many Cells")
        print("whose true and predicted types are both terms of it. hF1: the same cells' F1 over all terms above\n")
        more = {"Steps": f"{protocol}_distance", "Cells": f"{protocol}_distance_cells"}
        more |= {"hF1": f"{protocol}_hierarchical_f1"}
        print(level_table(rows, f"{protocol}_macro_f1", levels, more) + "\n")
        print(f"Macro accuracy: mean over the classes of the share of their cells that is right, {title}\n")
        print(level_table(rows, f"{protocol}_macro", levels) + "\n")
    print("Zoom: share of a cell's 5 nearest that have its label, and distinct subtypes among its 50 nearest (loo)\n")
    print(level_table(rows, "zoom_agree", levels, {"Of 50": "zoom_subtypes"}) + "\n")
    print("Triplets: two types and a third that leaves their path earlier; how often the centroids say so too\n")
    names = ("seen", "unseen")
    lines = [[row["embedding"], *(show(row["triplets"][name]) for name in names)] for row in rows]
    print(table(["Embedding", *(name.capitalize() for name in names)], lines) + "\n")
    print("Silhouette (cosine) of each embedding at each level\n")
    print(level_table(rows, "silhouette", levels))


def steer(model: Model, rows: list[dict[str, Any]], levels: Sequence[str]) -> tuple[float, str]:
    """Steerability of the rows of one checkpoint, full first and prefix 1 last -> S, and how it comes about."""
    full, first = rows[0]["loo"], rows[-1]["loo"]
    top, leaf = levels[model.blocks[0]], levels[model.blocks[-1]]
    terms = [first[top], full[top], full[leaf], first[leaf]]
    s = steerability(*terms)
    return s, (
        f"Steerability S = ({top} at prefix 1 - at full) + ({leaf} at full - at prefix 1)\n"
        f"  = ({terms[0]:.3f} - {terms[1]:.3f}) + ({terms[2]:.3f} - {terms[3]:.3f}) = {s:+.3f}"
    )


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


def score_all(
    args: argparse.Namespace,
    models: list[Model],
    encoders: list[Encoder],
    queries: Tensor,
    truth: Truth,
    neighbours: list[Tensor] | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[Model, float, str]]]:
    """-> a row per embedding, the adapters' silhouettes on a shuffled tree, and the checkpoints' steerability."""
    rows: list[dict[str, Any]] = []
    shuffled, steering = [], []
    mixed = shuffled_tree(truth.labels, args.seed)
    for i, encode in enumerate(encoders):
        start = len(rows)
        for name, e in encode(queries).items():
            rows.append({"embedding": name, **score(e, truth, neighbours[len(rows)] if neighbours else None)})
            if args.controls and 1 <= i <= len(models):
                values = [silhouette(e, mixed[:, k]) for k in range(len(truth.levels))]
                shuffled.append({"embedding": name, "silhouette": dict(zip(truth.levels, values, strict=True))})
        if 1 <= i <= len(models):  # raw comes before the checkpoints, controls after them
            steering.append((models[i - 1], *steer(models[i - 1], rows[start:], truth.levels)))
    return rows, shuffled, steering


def scored_model(
    args: argparse.Namespace,
    models: list[Model],
    i: int,
    rows: list[dict[str, Any]],
    shuffled: list[dict[str, Any]],
    truth: Truth,
    cells: LabelledVectors,
    protocols: dict[str, str],
) -> Scored:
    """What --report shows of the i-th checkpoint: its rows, as printed, and what its reference would answer."""
    model, queries = models[i], cells.split(len(truth.seen))[0]
    *_, start, stop = np.cumsum([1, *(len(one.blocks) for one in models[: i + 1])])  # raw comes first
    last = 1 + sum(len(one.blocks) for one in models)
    data = fingerprint(args.input) if args.all_rows else model.split.fingerprint  # `choose_rows` has compared them
    try:
        if not args.all_rows:
            bundle = reference_of(model.adapter, model.checkpoint, args.input, model.split)
        elif model.path.is_dir():
            bundle = read_bundle(model.path)
        else:
            raise InputError("a checkpoint has none for cells of another file; name a reference with --model-path")
        answers, why = answers_of(bundle, queries, truth.seen), ""
    except InputError as error:
        answers, why = {}, str(error)
    return Scored(
        name=model.name,
        cells=of_model(model, truth),
        levels=truth.levels,
        blocks=model.blocks,
        prefixes=rows[start:stop][::-1],
        raw=rows[0],
        controls=rows[last:],
        shuffled=shuffled[start - 1 : stop - 1],
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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = pick_device(args.device)
    models = load_models(args.model_path, device)
    several, split = len(models) > 1, models[0].split

    # Rows: the queries, and the training cells, on which the controls are fitted and which are the bank.
    train_rows, query_rows = choose_rows(
        models[0].checkpoint, models[0].path, args.input, args.num_samples, args.seed, args.all_rows
    )
    if args.search and len(train_rows) < RECALL:
        raise InputError(f"{args.input}: --search takes {RECALL} training cells or more")
    n = len(query_rows)
    needed = train_rows if args.bank == "train" or args.controls else train_rows[:0]
    cells = read_rows(args.input, np.concatenate([query_rows, needed]))  # one call: labels share their codes
    vectors = torch.from_numpy(cells.vectors).to(device)
    queries, train = vectors[:n], vectors[n:]

    # Encoders: raw, the checkpoints, the controls.
    encoders: list[Encoder] = [lambda x: {"raw": x}]
    encoders += [adapter_encoder(model.adapter, f"{model.name} " if several else "") for model in models]
    failed: list[str] = []
    if args.controls:
        widths = {e.shape[1] for model in models for e in embed(model.adapter, queries[:1])}
        controls, failed = fit_controls(train, cells.labels[n:, -1], sorted(widths))
        encoders.append(controls)

    # Neighbours in the bank, as places in the cells that follow the queries.
    num_bank, places = len(train_rows), None
    if args.bank == "all":
        keep = ~split.is_test(args.input)
        num_bank = int(keep.sum())
        found = np.stack(nearest_in_file(args.input, keep, queries, encoders))
        numbers, where = np.unique(found, return_inverse=True)
        places = list(where.reshape(found.shape))
        cells = read_rows(args.input, np.concatenate([query_rows, numbers]))
    elif not args.all_rows:
        places = nearest_rows(train, queries, encoders)
    labels, bank_labels = (torch.from_numpy(part).to(device) for part in (cells.labels[:n], cells.labels[n:]))
    neighbours = [bank_labels[torch.from_numpy(own).to(device)] for own in places] if places else None
    copies = {"other test cells": twins(cells.vectors[:n], cells.vectors[nearest(queries, k=K).cpu().numpy()])}
    if places:
        copies["the bank"] = twins(cells.vectors[:n], cells.vectors[n:][places[0]])

    # Score.
    graph = load_graph(args.obo)
    levels, trained = cells.levels, models[0].checkpoint["classes"]
    unseen = [] if args.all_rows else split.test_types
    groups = study_codes(args.input)[0][query_rows] if len(split.test_studies) > 1 and places else None
    truth = truth_of(levels, labels, cells.classes, trained, unseen, groups, graph)
    rows, shuffled, steering = score_all(args, models, encoders, queries, truth, neighbours)

    # Print.
    protocols = {"loo": "leave-one-out inside the test cells (loo)"}
    if places:
        protocols["bank"] = f"neighbours from the {BANKS[args.bank]} cells (bank)"
    about = of_cells(args, split, truth, num_bank, args.input)
    odd = warnings(args.input, graph.graph["release"], copies, failed)
    print("\n".join([*(f"{model.path}: {of_model(model, truth)}" for model in models), *about, *odd, ""]))
    print_tables(rows, protocols, levels, bool(unseen), what_intervals_are_of(split, groups))
    if args.controls:
        print("\nThe same with the subtypes shuffled over the paths of the tree: no prefix should show a level\n")
        print(level_table(shuffled, "silhouette", levels))
    for model, _, text in steering:
        print(f"\n{model.name + ' ' if several else ''}{text}")
    for model in models if args.search else ():
        asked, bank = embed(model.adapter, queries[:SEARCHES]), embed(model.adapter, train)
        print(f"\nSearch with {model.path}: {len(asked[0]):,} test cells against {num_bank:,} training cells\n")
        print(search_table(asked, bank, labels[:SEARCHES], bank_labels, levels))

    # Write.
    if args.report or args.figures:
        whose = {"bank": f"{BANKS[args.bank]} cells", "loo": "the other test cells"}
        whose = {protocol: name for protocol, name in whose.items() if protocol in protocols}
        about = of_cells(args, split, truth, num_bank, args.input.name)
        scored = [scored_model(args, models, i, rows, shuffled, truth, cells, whose) for i in range(len(models))]
        scored = [replace(one, cells="; ".join([one.cells, *about]), warnings=odd) for one in scored]
        write_report(
            f"{', '.join(model.name for model in models)} on {args.input.name}", scored, args.report, args.figures
        )
    right: dict[str, Any] = {p: np.stack([row.pop(f"{p}_right") for row in rows]) for p in protocols}
    for row, p in product(rows, protocols):
        del row[f"{p}_predicted"]
    result = {
        "rows": rows,
        "levels": list(levels),
        "classes": cells.classes,
        "steerability": {model.name: s for model, s, _ in steering} if several else steering[0][1],
        "shuffled_tree": shuffled,
        "num_queries": n,
        "num_unseen": int((~truth.seen).sum()),
        "num_bank": num_bank,
        "exact_copies": copies,
        "config": [model.checkpoint["config"] for model in models],
    }
    right |= {"rows": query_rows, "labels": cells.labels[:n], "seen": truth.seen, "counts": truth.counts}
    write_outputs(args, {"train.npy": train_rows, "queries.npy": query_rows}, right, result)


if __name__ == "__main__":
    run(main)
