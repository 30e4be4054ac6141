"""One row per idea: the `fractal` recipe with one thing changed, several seeds each.

    export FRACTAL_REAL_DATA=...  # the folder that holds pbmc_tonsil/ and fetal_organs/ (README: Real cells)
    uv run python -m benchmarks.ablations
    uv run python -m benchmarks.ablations --holdout type --datasets fetal_organs pancreas_studies --rows ...

The first rows change the shape (levels, numbers per block), the next ones leave a part out, the last one trains on a
shuffled tree: every subtype is moved to the path of another, so the levels are as large as before but mean nothing.
All rows are scored at the true levels. With `--holdout type` a fifth of the types is taken out of training, another
fifth for each seed, and the table tells the cells of these types from the others. At most 5,000 cells are trained and
validated on; simulated atlases have 60,000. Finished runs are kept; delete the output folder after a change of code.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import eval as evaluate
from benchmarks.controls import shuffled_tree, train_recipe
from benchmarks.quality import DATASETS, get_parser, narrow, own_embedding, prepare, summary
from fractal.base.errors import run
from fractal.base.files import atomic_write
from fractal.base.storage import Location
from fractal.base.table import table
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.data.parquet import Parquet
from fractal.hierarchy.levels import LEVELS
from fractal.model.adapter import FractalAdapter
from fractal.model.recipes import Counts

Patches = Callable[[], dict[str, Any]]  # what is replaced while a row is trained and scored: its name -> by what


def without_adjustment(sampled: Tensor, natural: Tensor) -> Tensor:
    return torch.zeros_like(sampled)


class ShuffledAtlas(Atlas):
    """Its subtypes lie on the paths of others."""

    @staticmethod
    def open(path: str | Location) -> "ShuffledAtlas":
        return ShuffledAtlas(Parquet.open(path))

    def read(self, rows: np.ndarray, held: np.ndarray | None = None) -> LabelledVectors:
        cells = super().read(rows, held)
        labels = shuffled_tree(torch.from_numpy(cells.labels), seed=0)
        return LabelledVectors(cells.vectors, labels.numpy(), cells.classes, cells.levels)


def subtype_frequency(counts: Counts, classes: list[list[str]], levels: list[int], paths: Tensor) -> Tensor:
    """`path_frequency` where the paths are not those of the file; the subtypes are."""
    number = {names[-1]: count for names, count in counts.items()}
    return torch.tensor([float(number[classes[levels[-1]][code]]) for code in paths[:, -1].tolist()])


def adapter(**arguments: Any) -> Patches:
    class Changed(FractalAdapter):  # a class, since loading a checkpoint asks it for its sizes
        __init__ = partialmethod(FractalAdapter.__init__, **arguments)

    return lambda: {"fractal.model.checkpoint.FractalAdapter": Changed}


ABLATIONS: dict[str, tuple[list[str], Patches]] = {
    "4 x 32": ([], dict),
    "4 x 8": (["--scale-dim", "8"], dict),
    "4 x 16": (["--scale-dim", "16"], dict),
    "4 x 64": (["--scale-dim", "64"], dict),
    "3 x 32": (["--num-levels", "3"], dict),
    "2 x 64": (["--num-levels", "2", "--scale-dim", "64"], dict),
    "2 x 32": (["--num-levels", "2"], dict),
    "all prefixes on subtype (mrl)": ([], dict),
    "equal blocks": ([], lambda: {"fractal.model.adapter.BLOCK_SCALE": [1.0] * 4}),
    "cell not shown": ([], lambda: {"fractal.model.adapter.RESIDUAL_SCALE": [0.0] * 4}),
    "no whitening": ([], lambda: {"fractal.model.adapter.SHRINKAGE": 1.0}),  # all directions are scaled alike
    "network alone": ([], lambda: {"fractal.model.adapter.MEANS_SHARE": 0.0}),
    "class means alone": ([], lambda: {"fractal.model.adapter.MEANS_SHARE": 1.0}),
    "no sharpening": ([], lambda: {"fractal.model.adapter.SHARPNESS": [1.0] * 4}),
    "no logit adjustment": ([], lambda: {"fractal.model.objective.log_ratio": without_adjustment}),
    "no input noise": ([], adapter(noise=0.0)),
    "no dropout": ([], adapter(dropout=0.0)),
    "no label smoothing": ([], lambda: {"fractal.model.objective.SMOOTHING": 0.0}),
    "no weight average": ([], lambda: {"fractal.model.training.EMA_DECAY": 0.0}),
    "half as wide": ([], adapter(hidden=256)),
    "shuffled tree": (
        [],
        lambda: {"train.Atlas": ShuffledAtlas, "fractal.model.preparation.path_frequency": subtype_frequency},
    ),
}
# So that a run takes half a minute: 5,000 cells to train on, of simulated atlases of 60,000.
MORE = dict.fromkeys(("pbmc_tonsil", "simulated"), ["--max-samples", "5000"])
SIMULATED_CELLS = 60_000


def run_once(name: str, dataset: str, seed: int, stratified: Path, output: Path, holdout: str) -> dict[str, Any]:
    """-> what eval.py writes: its JSON."""
    flags, patches = ABLATIONS[name]
    stem = output / holdout / dataset / str(seed) / name.replace(" ", "_")
    model, figures = stem.with_suffix(".pt"), stem.with_suffix(".json")
    if not figures.exists():
        with ExitStack() as stack:
            for target, value in patches().items():
                stack.enter_context(patch(target, value))
            common = ["--input", str(stratified), "--seed", str(seed)]  # of the weights, and of the draw of queries
            more = MORE.get(dataset) or DATASETS[dataset][1](stratified, seed, 0)
            if holdout == "type":
                more = [*MORE.get(dataset, []), "--holdout", "type"]
            recipe = "mrl" if name.endswith("(mrl)") else "fractal"
            train_recipe(recipe, [*common, "--split-seed", str(seed), "--output", str(model), *more, *flags])
            evaluate.main([*common, "--model-path", str(model), "--json", str(figures)])
    return json.loads(figures.read_text(encoding="utf-8"))


def figures_of(result: dict[str, Any]) -> list[float | None]:
    """The row of the table: accuracies of the full vector, its subtype in bank, prefixes and silhouettes, S."""
    rows = {row["embedding"]: row for row in result["rows"]}
    full = rows["full"]
    names = [own_embedding(result["config"][0], k) for k in range(len(LEVELS))]
    own = [rows[name]["loo"][level] if name else None for name, level in zip(names[:3], LEVELS, strict=False)]
    diagonal = [rows[name]["silhouette"][level] if name else None for name, level in zip(names, LEVELS, strict=True)]
    accuracy = [full["loo"][level] for level in LEVELS]
    return [*accuracy, full["bank"]["subtype"], *own, *diagonal, full["silhouette"]["system"], result["steerability"]]


def unseen_figures(result: dict[str, Any]) -> list[float | None]:
    """The row of the table with types held out: the full vector on cells of unseen and of seen types, S."""
    rows = {row["embedding"]: row for row in result["rows"]}
    names = [own_embedding(result["config"][0], k) for k in range(len(LEVELS))]
    own = [
        rows[name]["unseen"]["bank"][level] if name else None for name, level in zip(names[:3], LEVELS, strict=False)
    ]
    unseen, seen = rows["full"]["unseen"], rows["full"]["seen"]
    return [unseen["loo"]["subtype"], seen["loo"]["subtype"], seen["bank"]["subtype"], *own, result["steerability"]]


UNSEEN_HEADER = [
    "Ablation", "unseen: loo subtype", "seen: loo subtype", "bank subtype",
    "unseen, bank: p1 system", "p2 lineage", "p3 type", "S",
]  # fmt: skip
HEADER = [
    "Ablation", *LEVELS, "bank subtype", "p1 system", "p2 lineage", "p3 type",
    *(f"sil {level}" for level in LEVELS), "sil system, full", "S",
]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    parser.description = __doc__
    parser.set_defaults(datasets=["pbmc_tonsil", "fetal_organs", "simulated"], output=Path("data/ablations"))
    parser.add_argument("--rows", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS), help="default: all")
    parser.add_argument("--holdout", choices=["cells", "type"], default="cells", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    header, figures = (HEADER, figures_of) if args.holdout == "cells" else (UNSEEN_HEADER, unseen_figures)
    jobs = [(name, dataset, seed) for dataset in args.datasets for seed in range(args.seeds) for name in args.rows]
    found = {}
    for name, dataset, seed in tqdm(jobs, unit="run", desc="ablations"):
        whole = prepare(DATASETS[dataset][0], seed, args.data, args.output, SIMULATED_CELLS)
        folder = args.output / (f"{args.input_dim} numbers" if args.input_dim else "whole")
        result = run_once(name, dataset, seed, narrow(whole, args.input_dim), folder, args.holdout)
        found[name, dataset, seed] = figures(result)
    text = (
        "5-NN accuracy of the full vector (leave-one-out; bank), of prefix j at its level (leave-one-out), silhouette\n"
        f"of level j at prefix j and of the systems at full, steerability S; mean ± sd of {args.seeds} seeds\n"
        if args.holdout == "cells"
        else "A fifth of the types held out: 5-NN accuracy of the full vector (leave-one-out among all test cells;\n"
        f"bank) and of prefix j at its level, by cells of unseen and seen types; mean ± sd of {args.seeds} seeds\n"
    )
    for dataset in args.datasets:
        rows = []
        for name in args.rows:
            columns = zip(*(found[name, dataset, seed] for seed in range(args.seeds)), strict=True)
            rows.append([name, *(summary(list(column), args.seeds) for column in columns)])
        text += f"\n{dataset}\n\n{table(header, rows)}\n"
    with atomic_write(args.output / ("ablations.md" if args.holdout == "cells" else "ablations_types.md")) as part:
        part.write_text(text, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    run(main)
