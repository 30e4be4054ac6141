"""The recipes side by side on real atlases, several seeds each; one table per atlas and figure.

    export FRACTAL_REAL_DATA=...  # the folder that holds pbmc_tonsil/ and fetal_organs/ (README: Real cells)
    uv run python benchmarks/quality.py

Every seed draws its own test cells, validation cells and starting weights. A run that is finished is kept in the
output folder and not done again.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds its own folder only

import eval as evaluate
import ingest
import stratify
import train
from fractal.cli import LEVELS, InputError, positive_int, run, table

ATLASES = ("pbmc_tonsil", "fetal_organs")
# fetal_organs has 1,600 training cells: 20 epochs of six steps leave the published recipe below the raw vectors.
PUBLISHED = {"pbmc_tonsil": [], "fetal_organs": ["--epochs", "60", "--lr", "3e-4"]}
PROTOCOLS = {
    "loo": "5-NN accuracy, leave-one-out inside the test cells",
    "bank": "5-NN accuracy, neighbours from the training cells",
    "silhouette": "Silhouette (cosine)",
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("FRACTAL_REAL_DATA"),
        help="folder with a release per atlas, ATLAS/model_v1.1 (default: $FRACTAL_REAL_DATA)",
    )
    parser.add_argument("--atlases", nargs="+", default=ATLASES, help="folders in it (default: both)")
    parser.add_argument("--recipes", nargs="+", default=["published", "fractal"], choices=list(train.RECIPES))
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("data/quality"), help="keeps files and finished runs (default: %(default)s)"
    )
    return parser


def run_once(atlas: str, recipe: str, seed: int, data: Path, folder: Path) -> list[dict[str, Any]]:
    """The rows of eval.py for one recipe and seed."""
    stratified, name = folder / atlas / "stratified.parquet", f"{recipe}_{seed}"
    if not stratified.exists():
        cells = folder / atlas / "cells.parquet"
        ingest.main(["--model-dir", str(data / atlas / "model_v1.1"), "--output", str(cells)])
        stratify.main(["--input", str(cells), "--output", str(stratified)])
    result = folder / atlas / f"{name}.json"
    if not result.exists():
        model = folder / atlas / f"{name}.pt"
        common = ["--input", str(stratified), "--seed", str(seed)]
        flags = PUBLISHED.get(atlas, []) if recipe == "published" else []
        train.main([*common, "--output", str(model), "--recipe", recipe, *flags])
        evaluate.main([*common, "--model-path", str(model), "--json", str(result)])
    return json.loads(result.read_text(encoding="utf-8"))["rows"]


def summary(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f} ± {np.std(known):.3f}" if known else "-"


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.data is None:
        raise InputError("FRACTAL_REAL_DATA is not set: name the folder of the atlases with it, or with --data")
    tables = []
    for atlas in args.atlases:
        runs = {r: [run_once(atlas, r, s, args.data, args.output) for s in range(args.seeds)] for r in args.recipes}
        for protocol, title in PROTOCOLS.items():
            rows = []
            for recipe, seeds in runs.items():
                for i, row in enumerate(seeds[0]):
                    if row["embedding"] == "raw" and recipe != args.recipes[0]:
                        continue  # the same test cells, so the same figures
                    name = "raw" if row["embedding"] == "raw" else f"{recipe} {row['embedding']}"
                    cells = [summary([one[i][protocol][level] for one in seeds]) for level in LEVELS]
                    rows.append([name, f"{row['dims']}d", *cells])
            header = ["Embedding", "Dims", *(level.capitalize() for level in LEVELS)]
            tables.append(f"{atlas}: {title}, mean ± sd of {args.seeds} seeds\n\n{table(header, rows)}\n")
    print("\n" + "\n".join(tables))


if __name__ == "__main__":
    run(main)
