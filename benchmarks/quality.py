"""The recipes side by side on several data sets, several seeds each, with controls and paired differences.

    export FRACTAL_REAL_DATA=...  # the folder that holds pbmc_tonsil/, fetal_organs/ and pancreas_studies/
    uv run python -m benchmarks.quality

Every seed draws its own test cells (or studies), validation cells and starting weights; `simulated` also makes another
atlas per seed. `pancreas_studies` holds out one study at a time, every one once a seed. Checkpoints and figures that
are there are not made again, so a run that was cut off goes on; delete the output folder after a change of the code.
Writes quality.json and quality.md beside them. fetal_organs has under 2,000 test cells and is cross-fitted: five
trainings a seed, each with another fifth held out, so that every cell is a test cell once.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize
from tqdm import tqdm

import eval as evaluate
import ingest
import stratify
from benchmarks import simulate
from benchmarks.controls import CONTROLS, train_recipe
from benchmarks.intervals import bootstrap_interval, t_interval
from fractal.base.errors import InputError, run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import non_negative_int, positive_int
from fractal.data.atlas import Atlas
from fractal.data.parquet import read_vectors, vector_list, write_tables
from fractal.hierarchy.levels import LEVELS
from fractal.model.recipes import RECIPES

# Both have about 1,500 training cells: 20 epochs of six steps, or stopping at the first noisy best of 290 validation
# cells, leave the published recipe below the raw vectors.
LONGER = ["--epochs", "60", "--lr", "3e-4", "--patience", "60"]
PUBLISHED = {"fetal_organs": LONGER, "pancreas_studies": LONGER}
SIMULATED_CELLS = 1_000_000
SIMULATED_ROWS = 117_647  # less 15 % for validation: 100,000 to train on
PROTOCOLS = {
    "loo": "5-NN accuracy, leave-one-out inside the test cells",
    "bank": "5-NN accuracy, neighbours from the training cells",
    "silhouette": "Silhouette (cosine)",
}


def tonsil_and_blood(stratified: Path, seed: int, fold: int) -> list[str]:
    """Two blood and two tonsil donors of pbmc_tonsil."""
    donors = Atlas.open(stratified).studies[1]
    rng = np.random.default_rng(seed)
    kinds = [[d for d in donors if ("tonsil" in d.lower()) == tonsil] for tonsil in (False, True)]
    return ["--test-studies", *(str(d) for kind in kinds for d in rng.choice(kind, 2, replace=False))]


def one_study(stratified: Path, seed: int, fold: int) -> list[str]:
    return ["--test-studies", Atlas.open(stratified).studies[1][fold]]


def one_fold(stratified: Path, seed: int, fold: int) -> list[str]:
    return ["--fold", str(fold)]


# Data set -> the atlas it is made of, and what train.py is told, given the stratified file, the seed and the fold.
DATASETS: dict[str, tuple[str, Callable[[Path, int, int], list[str]]]] = {
    "pbmc_tonsil": ("pbmc_tonsil", lambda *_: []),
    "pbmc_tonsil_donors": ("pbmc_tonsil", tonsil_and_blood),
    "fetal_organs": ("fetal_organs", one_fold),
    "pancreas_studies": ("pancreas_studies", one_study),
    "simulated": ("simulated", lambda *_: ["--max-samples", str(SIMULATED_ROWS)]),
    "simulated_studies": ("simulated", lambda *_: ["--max-samples", str(SIMULATED_ROWS), "--holdout", "study"]),
}

FOLDS = {"fetal_organs": 5, "pancreas_studies": 5}
STUDIES = {"pbmc_tonsil_donors", "pancreas_studies", "simulated_studies"}  # what is held out; else cells are
Run = tuple[dict[str, Any], Any]  # what eval.py writes: its JSON, and per query right or wrong


def add_data(parser: argparse.ArgumentParser) -> None:
    """The flag --data, the same in all that reads the real atlases."""
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("FRACTAL_REAL_DATA"),
        help="folder with a release per real atlas, ATLAS/model_v1.1 (default: $FRACTAL_REAL_DATA)",
    )


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument(
        "--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--input-dim",
        type=non_negative_int,
        default=0,
        help="principal components that the atlases are cut to, 0 takes them whole (default: %(default)s)",
    )
    parser.add_argument("--recipes", nargs="+", default=["published", "mrl", "fractal"], choices=[*RECIPES, *CONTROLS])
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("data/quality"), help="keeps files and finished runs (default: %(default)s)"
    )
    return parser


def prepare(
    atlas: str, seed: int, data: Path | None, folder: Path, cells: int = SIMULATED_CELLS, flags: Sequence[str] = ()
) -> Path:
    """-> the stratified file of an atlas; flags: of ingest.py, more than the paths."""
    simulated = atlas == "simulated"
    folder = folder / (f"{atlas}_{seed}" if simulated else atlas)
    stratified, ingested = folder / "stratified.parquet", folder / "cells.parquet"
    if stratified.exists():
        return stratified
    if simulated:
        release = folder / "model_v1.1"
        simulate.main(["--cells", str(cells), "--seed", str(seed), "--output", str(release)])
    elif data is None:
        raise InputError("FRACTAL_REAL_DATA is not set: name the folder of the atlases with it, or with --data")
    else:
        release = data / atlas / "model_v1.1"
    ingest.main(["--model-dir", str(release), "--output", str(ingested), *flags])
    stratify.main(["--input", str(ingested), "--output", str(stratified)])
    return stratified


def narrow(stratified: Path, dim: int) -> Path:
    """-> the same rows as `dim` principal components of all the file's vectors, beside the file; 0: the file itself."""
    path = stratified.with_name(f"stratified_{dim}.parquet")
    if not dim:
        return stratified
    if not path.exists():
        rows = pq.read_table(stratified)
        components = PCA(dim, random_state=0).fit_transform(normalize(read_vectors(rows, stratified)))
        at = rows.schema.get_field_index("embedding")
        table = rows.set_column(at, "embedding", vector_list(components))
        write_tables(path, [table], Atlas.open(stratified).metadata)
    return path


def run_once(dataset: str, seed: int, fold: int, args: argparse.Namespace) -> Run:
    """Train all recipes on one seed and fold, and score them side by side."""
    atlas, flags = DATASETS[dataset]
    stratified = narrow(prepare(atlas, seed, args.data, args.output), args.input_dim)
    folder = args.output / (f"{dataset}_{args.input_dim}" if args.input_dim else dataset) / f"{seed}.{fold}"
    figures, cells = (folder / f"{'_'.join(args.recipes)}.{suffix}" for suffix in ("json", "npz"))
    own = {"published": PUBLISHED.get(dataset, [])}
    told = {recipe: flags(stratified, seed, fold) + own.get(recipe, []) for recipe in args.recipes}
    train_and_score(stratified, folder, told, seed, figures, cells)
    return json.loads(figures.read_text(encoding="utf-8")), np.load(cells)


def train_and_score(
    stratified: Path,
    folder: Path,
    flags: Mapping[str, Sequence[str]],
    seed: int,
    figures: Path,
    cells: Path,
    both: Sequence[str] = (),
) -> None:
    """Train a checkpoint per recipe in `folder`, and score them side by side -> the files `figures` and `cells`.

    What is there is not made again. flags: recipe -> what train.py is told; both: what train.py and eval.py are told.
    """
    models = [folder / f"{recipe}.pt" for recipe in flags]
    common = ["--input", str(stratified), *both, "--seed", str(seed)]
    for (recipe, more), model in zip(flags.items(), models, strict=True):
        if not model.exists():
            train_recipe(recipe, [*common, "--split-seed", str(seed), "--output", str(model), *more])
    if not figures.exists():
        files = ["--cells-out", str(cells), "--json", str(figures)]
        evaluate.main([*common, "--controls", *files, "--model-path", *map(str, models)])


def own_embedding(config: dict[str, Any], level: int) -> str | None:
    """The name of the shortest prefix that has the block of a level, or "full"; None where there is no such block.

    A level of one class has no block of its own and takes the first.
    """
    blocks = list(config.get("block_levels", range(config["num_levels"])))
    if level > blocks[-1]:
        return None
    j = max(1, sum(own <= level for own in blocks))
    return f"prefix {j}" if j < len(blocks) else "full"


def summary(values: list[float | None], seeds: int) -> str:
    """Mean and standard deviation (n - 1) over the seeds of values: one per seed and fold, a seed's folds together."""
    if None in values:
        return "-"
    means = np.array(values, float).reshape(seeds, -1).mean(1)
    return f"{means.mean():.3f}" + (f" ± {means.std(ddof=1):.3f}" if seeds > 1 else "")


def paired(difference: np.ndarray, cells: np.ndarray, studies: np.ndarray | None = None) -> str:
    """Mean of differences (n,) and its 95 % interval: a bootstrap over the cells (n,), or t over their studies (n,).

    A cell that several draws have tested counts once, with the mean of its differences. With studies the mean is that
    of their own means.
    """
    _, first, own, times = np.unique(cells, return_index=True, return_inverse=True, return_counts=True)
    difference = np.bincount(own, difference) / times
    if studies is None:
        low, high = bootstrap_interval(difference)
    else:
        _, study, size = np.unique(studies[first], return_inverse=True, return_counts=True)
        difference = np.bincount(study, difference) / size
        low, high = t_interval(difference)
    return f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def numbered(numbers: list[np.ndarray], seeds: int, one_atlas_a_seed: bool) -> np.ndarray:
    """Row or study numbers of all runs: equal ones are the same in every run, unless there is `one_atlas_a_seed`."""
    per_seed = len(numbers) // seeds
    return np.concatenate([own + 10**9 * (i // per_seed) * one_atlas_a_seed for i, own in enumerate(numbers)])


def differences(
    runs: list[Run], seeds: int, one_atlas_a_seed: bool, studies: list[np.ndarray] | None = None
) -> dict[str, list[str]]:
    """Paired differences of `fractal full` to every other embedding of full length, and of its prefix j at level j.

    -> name -> one text per level. `studies`: per run the study of each cell, where whole studies are held out.
    """
    names = [row["embedding"] for row in runs[0][0]["rows"]]
    fractal = next(config for config in runs[0][0]["config"] if config["recipe"] == "fractal")
    cells = numbered([right["rows"] for _, right in runs], seeds, one_atlas_a_seed)
    groups = None if studies is None else numbered(studies, seeds, one_atlas_a_seed)
    found = {}
    for protocol in ("loo", "bank"):
        right = {
            name: np.concatenate([one[protocol][i] for _, one in runs]).astype(int) for i, name in enumerate(names)
        }
        full = right.pop("fractal full")
        for name, values in right.items():
            if name.endswith(" full") or name.split()[0] in ("raw", "PCA", "LDA"):
                found[f"{protocol}: full - {name}"] = [paired(column, cells, groups) for column in (full - values).T]
        right["fractal full"] = full
        own = [right[f"fractal {own_embedding(fractal, k)}"][:, k] - full[:, k] for k in range(len(LEVELS) - 1)]
        found[f"{protocol}: prefix j at level j - full"] = [*(paired(column, cells, groups) for column in own), "-"]
    return found


def held_out_studies(dataset: str, runs: list[Run], args: argparse.Namespace) -> list[np.ndarray]:
    """Per run the study number of each test cell."""
    per_seed = len(runs) // args.seeds
    files = [prepare(DATASETS[dataset][0], i // per_seed, args.data, args.output) for i in range(len(runs))]
    studies = [Atlas.open(path).studies[0] for path in files]
    return [codes[right["rows"]].astype(np.int64) for codes, (_, right) in zip(studies, runs, strict=True)]


def level_means(runs: list[Run], embedding: str, key: str, seeds: int) -> list[str]:
    rows = [next(row for row in figures["rows"] if row["embedding"] == embedding) for figures, _ in runs]
    return [summary([row[key][level] for row in rows], seeds) for level in LEVELS]


def in_brief(found: dict[str, list[Run]], paired_rows: dict[str, dict[str, list[str]]], seeds: int) -> str:
    """The tables of the README: all data sets together, the most telling rows only."""
    accuracy, gains, own, silhouettes = [], [], [], []
    for dataset, runs in found.items():
        fractal = next(config for config in runs[0][0]["config"] if config["recipe"] == "fractal")
        prefixes = [f"fractal {own_embedding(fractal, k)}" for k in range(len(LEVELS))]
        for name in ("raw", "LDA", "published full", "mrl full", "fractal full"):
            accuracy.append([dataset, name, *level_means(runs, name, "loo", seeds)])
        every = [level_means(runs, name, "loo", seeds) for name in prefixes]
        accuracy.append([dataset, "fractal prefix j at level j", *(every[j][j] for j in range(4))])
        for protocol in ("loo", "bank"):
            gains.append([dataset, protocol, *paired_rows[dataset][f"{protocol}: full - published full"]])
            own.append([dataset, protocol, *paired_rows[dataset][f"{protocol}: prefix j at level j - full"][:3]])
        every = [level_means(runs, name, "silhouette", seeds) for name in prefixes]
        raw, steering = (
            level_means(runs, "raw", "silhouette", seeds)[0],
            [f["steerability"]["fractal"] for f, _ in runs],
        )
        silhouettes.append([dataset, *(every[j][j] for j in range(4)), every[3][0], raw, summary(steering, seeds)])
    levels = [level.capitalize() for level in LEVELS]
    tables = [
        ("5-NN accuracy, leave-one-out", table(["Cells", "Embedding", *levels], accuracy)),
        ("fractal full - published full, paired", table(["Cells", "Protocol", *levels], gains)),
        ("fractal, prefix j at level j - full, paired", table(["Cells", "Protocol", *levels[:3]], own)),
        (
            "fractal: silhouette of each level at its own prefix, of the systems at full and in the raw vectors, and S",
            table(["Cells", *levels, "System at full", "System raw", "S"], silhouettes),
        ),
    ]
    return "\n\n".join(f"{title}\n\n{text}" for title, text in tables) + "\n"


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    jobs = [(d, s, f) for d in args.datasets for s in range(args.seeds) for f in range(FOLDS.get(d, 1))]
    found: dict[str, list[Run]] = {dataset: [] for dataset in args.datasets}
    for dataset, seed, fold in tqdm(jobs, unit="run", desc="quality"):
        found[dataset].append(run_once(dataset, seed, fold, args))
    tables, paired_rows = [], {}
    header = [level.capitalize() for level in LEVELS]
    compared = set(args.recipes) >= {"published", "mrl", "fractal"}
    for dataset, runs in found.items():
        for key, title in PROTOCOLS.items():
            rows = [
                [row["embedding"], f"{row['dims']}d", *level_means(runs, row["embedding"], key, args.seeds)]
                for row in runs[0][0]["rows"]
            ]
            text = table(["Embedding", "Dims", *header], rows)
            tables.append(f"{dataset}: {title}, mean ± sd of {args.seeds} seeds\n\n{text}\n")
        if compared:
            simulated = DATASETS[dataset][0] == "simulated"
            studies = held_out_studies(dataset, runs, args) if dataset in STUDIES else None
            paired_rows[dataset] = differences(runs, args.seeds, simulated, studies)
            rows = [[name, *texts] for name, texts in paired_rows[dataset].items()]
            unit = "t interval over studies" if studies else "bootstrap interval over cells"
            title = f"{dataset}: paired differences of fractal, 95 % {unit}"
            tables.append(f"{title}\n\n{table(['Difference', *header], rows)}\n")
    if compared:
        tables.insert(0, in_brief(found, paired_rows, args.seeds))
    text = "\n".join(tables)
    kept = {dataset: [figures for figures, _ in runs] for dataset, runs in found.items()}
    for name, content in (("quality.md", text), ("quality.json", json.dumps(kept, indent=1))):
        with atomic_write(args.output / name) as part:
            part.write_text(content + "\n", encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    run(main)
