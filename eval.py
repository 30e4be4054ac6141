"""Step 4: how well each prefix tells each level, on test cells that the adapter has never seen.

    uv run python eval.py --model-path data/fractal_adapter_4L.pt

Prints 5-NN accuracy twice. `loo` is the published protocol: every query against the other queries. `bank` takes the
neighbours from the training cells, which is what annotating new cells does. Then the silhouette of every prefix at
every level, and steerability.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fractal.adapter import embed, load, pick_device
from fractal.atlas import Split, fingerprint, open_atlas, read_rows
from fractal.cli import LEVELS, InputError, non_negative_int, positive_int, run, table
from fractal.files import replacing
from fractal.metrics import knn_accuracy, silhouette, steerability


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-path",
        type=Path,
        default=Path("data/fractal_adapter_4L.pt"),
        help="checkpoint of train.py (default: %(default)s)",
    )
    parser.add_argument(
        "--input",
        type=Path,
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
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="auto takes CUDA, else MPS, else the CPU (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file, unrounded")
    parser.add_argument(
        "--rows-out", type=Path, help="also write train.npy and queries.npy, row numbers, to this folder"
    )
    return parser


def choose_rows(checkpoint: dict[str, Any], args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """-> the training rows, which are the bank, and the query rows. Raises InputError for another file."""
    file = open_atlas(args.input)
    try:
        split = Split(**checkpoint["split"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{args.model_path}: carries no split of train.py; train it again") from error
    same_file = fingerprint(args.input) == split.fingerprint
    dim = file.schema_arrow.field("embedding").type.list_size
    if dim != checkpoint["config"]["dim"]:
        raise InputError(
            f"{args.input}: its vectors have {dim} numbers, those of {args.model_path} {checkpoint['config']['dim']}"
        )
    if args.all_rows and same_file:
        raise InputError(
            f"{args.input}: {args.model_path} was trained on it, so its cells are not new; drop --all-rows"
        )
    if args.all_rows:
        train, pool = np.arange(0), np.arange(file.metadata.num_rows)
    elif not same_file:
        raise InputError(
            f"{args.input}: not the file that {args.model_path} was trained on, so which of its cells are held out is "
            "unknown; name that file, or say --all-rows if all its cells are new"
        )
    else:
        train, _, pool = split.rows()
    queries = np.random.default_rng(args.seed).permutation(pool)[: args.num_samples]
    if len(queries) < 2:
        raise InputError(f"{args.input}: {len(queries)} test cells are too few; train with a larger --test-ratio")
    return train, queries


def score(vectors: Tensor, labels: Tensor, bank: Tensor | None, bank_labels: Tensor) -> dict[str, Any]:
    """The figures of one embedding: accuracies and silhouettes of all four levels."""
    loo = knn_accuracy(vectors, labels)
    banked = [None] * len(LEVELS) if bank is None else knn_accuracy(vectors, labels, bank, bank_labels)
    widths = [silhouette(vectors, labels[:, k]) for k in range(len(LEVELS))]
    return {
        "dims": vectors.shape[1],
        "loo": dict(zip(LEVELS, loo, strict=True)),
        "bank": dict(zip(LEVELS, banked, strict=True)),
        "silhouette": dict(zip(LEVELS, widths, strict=True)),
    }


def show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def accuracy_table(rows: list[dict[str, Any]], protocol: str) -> str:
    return table(
        ["Embedding", "Dims", *(level.capitalize() for level in LEVELS), "Sil"],
        [
            [
                row["embedding"],
                f"{row['dims']}d",
                *(show(row[protocol][level]) for level in LEVELS),
                show(row["silhouette"]["system"]),
            ]
            for row in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = pick_device(args.device)
    adapter, checkpoint = load(args.model_path, device)
    config = checkpoint["config"]
    train_rows, query_rows = choose_rows(checkpoint, args)
    cells = read_rows(args.input, np.concatenate([query_rows, train_rows]))  # one call: labels share their codes
    vectors, labels = torch.from_numpy(cells.vectors).to(device), torch.from_numpy(cells.labels).to(device)

    n = len(query_rows)
    names = ["raw", *(f"prefix {j}" for j in range(1, config["num_levels"])), "full"]
    embeddings = [vectors, *embed(adapter, vectors)]
    rows = [
        {"embedding": name, **score(e[:n], labels[:n], e[n:] if len(train_rows) else None, labels[n:])}
        for name, e in zip(names, embeddings, strict=True)
    ]
    raw, *prefixes, full = rows
    leaf = LEVELS[config["num_levels"] - 1]
    terms = [prefixes[0]["loo"]["system"], full["loo"]["system"], full["loo"][leaf], prefixes[0]["loo"][leaf]]
    steer = steerability(*terms)

    print(f"{args.model_path}: recipe {config['recipe']}, {config['num_levels']} levels x {config['scale_dim']}")
    print(f"{n:,} test cells of {args.input}, {len(train_rows):,} training cells in the bank\n")
    listed = [raw, full, *reversed(prefixes)]
    print(f"5-NN accuracy, leave-one-out inside the test cells (loo)\n\n{accuracy_table(listed, 'loo')}\n")
    if len(train_rows):
        print(f"5-NN accuracy, neighbours from the training cells (bank)\n\n{accuracy_table(listed, 'bank')}\n")
    matrix = [[row["embedding"], *(show(row["silhouette"][level]) for level in LEVELS)] for row in rows]
    print("Silhouette (cosine) of each prefix at each level\n")
    print(table(["Embedding", *(level.capitalize() for level in LEVELS)], matrix))
    print(
        f"\nSteerability S = (system at prefix 1 - at full) + ({leaf} at full - at prefix 1)\n"
        f"  = ({terms[0]:.3f} - {terms[1]:.3f}) + ({terms[2]:.3f} - {terms[3]:.3f}) = {steer:+.3f}"
    )

    if args.rows_out:
        for name, numbers in (("train.npy", train_rows), ("queries.npy", query_rows)):
            with replacing(args.rows_out / name) as part, open(part, "wb") as file:
                np.save(file, numbers)
    if args.json:
        result = {
            "rows": listed,
            "steerability": steer,
            "num_queries": n,
            "num_bank": len(train_rows),
            "config": config,
        }
        with replacing(args.json) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
