"""The published tree and CELLxGENE's, trained and scored on the same cells of real atlases.

    uv run python -m benchmarks.trees --data $FRACTAL_REAL_DATA

Per atlas and tree: ingest, stratify, train and eval, for several seeds; each seed draws its own test cells, the same
for both trees. Accuracy is that of the nearest five training cells (`bank`): of the full vector, and of the prefix that
belongs to the level. The last level of both trees is the same labels; the ones above are not, and are no contest.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import eval as evaluate
import train
from benchmarks.quality import add_data, own_embedding, prepare, summary
from benchmarks.studies import ATLASES
from fractal.base.errors import run
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas

TREES = ["published", "cellxgene"]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--atlases", nargs="+", choices=ATLASES, default=ATLASES, help="(default: %(default)s)")
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("data/trees"), help="(default: %(default)s)")
    return parser


def score(stratified: Path, seed: int) -> dict:
    """What eval.py finds for an adapter with a block for each level."""
    model, figures = (stratified.with_name(f"{seed}.{suffix}") for suffix in ("pt", "json"))
    if not figures.exists():
        levels = str(len(Atlas.open(stratified).levels))
        common = ["--input", str(stratified), "--seed", str(seed)]
        train.main([*common, "--split-seed", str(seed), "--num-levels", levels, "--output", str(model)])
        evaluate.main([*common, "--model-path", str(model), "--json", str(figures)])
    return json.loads(figures.read_text(encoding="utf-8"))


def rows_of(stratified: Path, runs: list[dict]) -> list[list[str]]:
    """A row per level: its classes, and the accuracy of the raw vectors, the full ones and the level's own prefix."""
    atlas, rows = Atlas.open(stratified), []
    labels = atlas.read(np.arange(atlas.num_rows)).labels
    for k, level in enumerate(atlas.levels):
        own = own_embedding(runs[0]["config"][0], k)
        embeddings = ["raw", "full", own]
        means = []
        for name in embeddings:
            found = [next(row for row in one["rows"] if row["embedding"] == name) for one in runs]
            means.append(summary([row["bank"][level] for row in found], len(runs)))
        rows.append([level, str(len(np.unique(labels[:, k]))), *means])
    return rows


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    lines = []
    for atlas in args.atlases:
        for tree in TREES:
            stratified = prepare(atlas, 0, args.data, args.output / tree, flags=["--tree", tree])
            runs = [score(stratified, seed) for seed in range(args.seeds)]
            lines += [[atlas, tree, *row] for row in rows_of(stratified, runs)]
    print("\n" + table(["Atlas", "Tree", "Level", "Classes", "Raw", "Full", "Its prefix"], lines))
    print(f"mean ± sd of {args.seeds} seeds", file=sys.stderr)


if __name__ == "__main__":
    run(main)
