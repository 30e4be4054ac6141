"""The recipes side by side on several data sets, several seeds each, with controls and paired differences.

    export FRACTAL_REAL_DATA=...  # the folder that holds pbmc_tonsil/ and fetal_organs/ (README: Real cells)
    uv run python benchmarks/quality.py

Every seed draws its own test cells (or studies), validation cells and starting weights; `simulated` also makes another
atlas per seed. Checkpoints and figures that are there are not made again, so a run that was cut off goes on; delete the
output folder after a change of the code. Writes quality.json and quality.md beside them. Sets with under 2,000 test
cells are cross-fitted: five trainings a seed, each with another fifth held out, so that every cell is a test cell once.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds its own folder only

import eval as evaluate
import ingest
import stratify
import train
from fractal import simulate
from fractal.atlas import study_codes
from fractal.cli import LEVELS, InputError, positive_int, run, table
from fractal.files import replacing
from fractal.metrics import bootstrap_interval

# fetal_organs has 1,600 training cells: 20 epochs of six steps, or stopping at the first noisy best of 290 validation
# cells, leave the published recipe below the raw vectors.
PUBLISHED = {"fetal_organs": ["--epochs", "60", "--lr", "3e-4", "--patience", "60"]}
SIMULATED_CELLS = 1_000_000
SIMULATED_ROWS = 117_647  # less 15 % for validation: 100,000 to train on
PROTOCOLS = {
    "loo": "5-NN accuracy, leave-one-out inside the test cells",
    "bank": "5-NN accuracy, neighbours from the training cells",
    "silhouette": "Silhouette (cosine)",
}


def tonsil_and_blood(stratified: Path, seed: int) -> list[str]:
    """Two blood and two tonsil donors of pbmc_tonsil."""
    donors = study_codes(stratified)[1]
    rng = np.random.default_rng(seed)
    kinds = [[d for d in donors if ("tonsil" in d.lower()) == tonsil] for tonsil in (False, True)]
    return ["--test-studies", *(str(d) for kind in kinds for d in rng.choice(kind, 2, replace=False))]


# Data set -> the atlas it is made of, and what train.py is told, given the stratified file and the seed.
DATASETS: dict[str, tuple[str, Callable[[Path, int], list[str]]]] = {
    "pbmc_tonsil": ("pbmc_tonsil", lambda *_: []),
    "pbmc_tonsil_donors": ("pbmc_tonsil", tonsil_and_blood),
    "fetal_organs": ("fetal_organs", lambda *_: []),
    "simulated": ("simulated", lambda *_: ["--max-samples", str(SIMULATED_ROWS)]),
    "simulated_studies": ("simulated", lambda *_: ["--max-samples", str(SIMULATED_ROWS), "--holdout", "study"]),
}


FOLDS = {"fetal_organs": 5}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("FRACTAL_REAL_DATA"),
        help="folder with a release per real atlas, ATLAS/model_v1.1 (default: $FRACTAL_REAL_DATA)",
    )
    parser.add_argument(
        "--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS), help="which (default: all)"
    )
    parser.add_argument("--recipes", nargs="+", default=["published", "mrl", "fractal"], choices=list(train.RECIPES))
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("data/quality"), help="keeps files and finished runs (default: %(default)s)"
    )
    return parser


def prepare(atlas: str, seed: int, data: Path | None, folder: Path) -> Path:
    """-> the stratified file of an atlas."""
    simulated = atlas == "simulated"
    folder = folder / (f"{atlas}_{seed}" if simulated else atlas)
    stratified, cells = folder / "stratified.parquet", folder / "cells.parquet"
    if stratified.exists():
        return stratified
    if simulated:
        release = folder / "model_v1.1"
        simulate.main(["--cells", str(SIMULATED_CELLS), "--seed", str(seed), "--output", str(release)])
    elif data is None:
        raise InputError("FRACTAL_REAL_DATA is not set: name the folder of the atlases with it, or with --data")
    else:
        release = data / atlas / "model_v1.1"
    ingest.main(["--model-dir", str(release), "--output", str(cells)])
    stratify.main(["--input", str(cells), "--output", str(stratified)])
    return stratified


def run_once(dataset: str, seed: int, fold: int, args: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """-> what eval.py writes of all recipes with one seed and fold: its JSON, and right or wrong per query."""
    atlas, flags = DATASETS[dataset]
    stratified = prepare(atlas, seed, args.data, args.output)
    folder = args.output / dataset / f"{seed}.{fold}"
    models = []
    for recipe in args.recipes:
        models.append(folder / f"{recipe}.pt")
        if not models[-1].exists():
            more = flags(stratified, seed) + (PUBLISHED.get(dataset, []) if recipe == "published" else [])
            common = ["--input", str(stratified), "--seed", str(seed), "--fold", str(fold), "--recipe", recipe]
            train.main([*common, "--output", str(models[-1]), *more])
    figures, cells = (folder / f"{'_'.join(args.recipes)}.{suffix}" for suffix in ("json", "npz"))
    if not figures.exists():
        names = [str(model) for model in models]
        common = ["--input", str(stratified), "--seed", str(seed), "--controls"]
        evaluate.main([*common, "--model-path", *names, "--cells-out", str(cells), "--json", str(figures)])
    return json.loads(figures.read_text(encoding="utf-8")), np.load(cells)


def summary(values: list[float | None], seeds: int) -> str:
    """Mean and standard deviation over the seeds of values (one per seed and fold, the folds of a seed together)."""
    if None in values:
        return "-"
    means = np.array(values, float).reshape(seeds, -1).mean(1)
    return f"{means.mean():.3f} ± {means.std():.3f}"


def paired(difference: np.ndarray, cells: np.ndarray) -> str:
    """Mean of differences (n,), and its 95 % bootstrap interval over the cells; a cell tested twice counts once."""
    own, times = np.unique(cells, return_inverse=True, return_counts=True)[1:]
    difference = np.bincount(own, difference) / times
    low, high = bootstrap_interval(difference)
    return f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    tables, kept = [], {}
    jobs = [(d, s, f) for d in args.datasets for s in range(args.seeds) for f in range(FOLDS.get(d, 1))]
    found = {(d, s, f): run_once(d, s, f, args) for d, s, f in tqdm(jobs, unit="run", desc="quality")}
    for dataset in args.datasets:
        runs = [run for job, run in found.items() if job[0] == dataset]
        kept[dataset] = [figures for figures, _ in runs]
        first = runs[0][0]["rows"]
        for protocol, title in PROTOCOLS.items():
            rows = [
                [row["embedding"], f"{row['dims']}d"]
                + [summary([f["rows"][i][protocol][level] for f, _ in runs], args.seeds) for level in LEVELS]
                for i, row in enumerate(first)
            ]
            header = ["Embedding", "Dims", *(level.capitalize() for level in LEVELS)]
            tables.append(f"{dataset}: {title}, mean ± sd of {args.seeds} seeds\n\n{table(header, rows)}\n")
        if "fractal" in args.recipes and len(args.recipes) > 1:
            tables.append(f"{dataset}: {differences(runs, args.seeds, DATASETS[dataset][0] == 'simulated')}")
    text = "\n".join(tables)
    for name, content in (("quality.md", text), ("quality.json", json.dumps(kept, indent=1))):
        with replacing(args.output / name) as part:
            part.write_text(content + "\n", encoding="utf-8")
    print("\n" + text)


def differences(runs: list[tuple[dict[str, Any], Any]], seeds: int, one_atlas_a_seed: bool) -> str:
    """Paired differences of `fractal full` to every other embedding of full length, and of its prefix j at level j.

    Rows of the same number are the same cell in every run, unless there is `one_atlas_a_seed`.
    """
    names = [row["embedding"] for row in runs[0][0]["rows"]]
    per_seed = len(runs) // seeds
    numbers = [cells["rows"] + 10**9 * (i // per_seed) * one_atlas_a_seed for i, (_, cells) in enumerate(runs)]
    cells_tested = np.concatenate(numbers)
    rows = []
    for protocol in ("loo", "bank"):

        def right(name: str, protocol: str = protocol) -> np.ndarray:
            return np.concatenate([cells[protocol][names.index(name)] for _, cells in runs]).astype(int)

        full = right("fractal full")
        others = [name for name in names if name.endswith(" full") or name.split()[0] in ("raw", "PCA", "LDA")]
        for name in others:
            if name != "fractal full":
                values = full - right(name)
                rows.append(
                    [f"{protocol}: fractal full - {name}", *(paired(column, cells_tested) for column in values.T)]
                )
        own = np.stack([right(f"fractal prefix {j + 1}")[:, j] for j in range(3)], axis=1) - full[:, :3]
        rows.append(
            [
                f"{protocol}: fractal prefix j at level j - full",
                *(paired(column, cells_tested) for column in own.T),
                "-",
            ]
        )
    steering = [figures["steerability"]["fractal"] for figures, _ in runs]  # several recipes: one each
    title = "paired differences, mean over seeds and cells, 95 % bootstrap interval over cells"
    return (
        f"{title}; S of fractal {summary(steering, seeds)}\n\n"
        f"{table(['Difference', *(level.capitalize() for level in LEVELS)], rows)}\n"
    )


if __name__ == "__main__":
    run(main)
