"""Step 3: fit the adapter, whose vectors can be cut after any block, on cells balanced over the types.

    uv run python train.py --num-levels 4 --scale-dim 32

Two recipes: `fractal` trains prefix j on the labels of level j (fractal/model/objective.py), `published` is the
published reference (fractal/model/published.py). The controls `mrl` and `hce` are trained by benchmarks/controls.py.

Ctrl-C keeps the best epoch so far beside the output, as NAME.partial.pt; a finished checkpoint stays as it is.

Several processes share the rows and the work, on one machine or more:

    uv run torchrun --standalone --nproc-per-node 2 train.py --max-samples 0
"""

import argparse
import platform
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from fractal.base.errors import printable, run
from fractal.base.paths import check_paths
from fractal.commands.options import add, non_negative_int, positive_float, positive_int, ratio
from fractal.data.atlas import Atlas
from fractal.hierarchy.levels import MAX_LEVELS
from fractal.model.checkpoint import save
from fractal.model.distributed import Group, joined
from fractal.model.recipes import RECIPES, Counts, Recipe, Settings, find_recipe
from fractal.model.split import HOLDOUTS, VAL_RATIO, Split
from fractal.model.training import fit
from fractal.score.metrics import knn_accuracy


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    add(files, "--input")
    add(files, "--output", help="checkpoint to write (default: data/fractal_adapter_{N}L.pt, N the number of levels)")
    model = parser.add_argument_group("model")
    add(model, "--recipe")
    model.add_argument(
        "--num-levels",
        type=int,
        choices=range(2, MAX_LEVELS + 1),
        help="blocks: of the file's first levels, system, lineage, type, subtype in the default tree (default: a block "
        "for each level that has two or more classes)",
    )
    text = "numbers per block (default: input's numbers / blocks, rounded up to a multiple of 8, and 32 at most)"
    model.add_argument("--scale-dim", type=positive_int, help=text)
    add_rows(parser)
    training = parser.add_argument_group("training")
    add(training, "--epochs")
    text = "stop after so many epochs that scored worse in validation than the best one (default: %(default)s)"
    training.add_argument("--patience", type=positive_int, default=5, help=text)
    training.add_argument("--batch-size", type=positive_int, help=recipe_defaults("batch_size"))
    training.add_argument("--lr", type=positive_float, help=recipe_defaults("lr"))
    add(training, "--seed", help="of the weights (default: %(default)s)")
    add(training, "--device")
    return parser


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Which cells are trained on, validated on and set aside for eval.py."""
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--max-samples",
        type=non_negative_int,
        default=100_000,
        help="cells to train and validate on, balanced over the types, none of them a test cell; 0 takes all "
        "(default: %(default)s)",
    )
    text = "share of the whole file that is set aside for eval.py before anything else (default: %(default)s)"
    rows.add_argument("--test-ratio", type=ratio, default=0.2, help=text)
    rows.add_argument(
        "--holdout",
        choices=HOLDOUTS,
        help="what is set aside: cells drawn one by one; whole studies until they hold --test-ratio of the cells; or "
        "all cells of --test-ratio of the types, and as large a share of the cells of the other types (default: cells)",
    )
    text = "which cells are set aside: the folds 0, 1, ... share none, for cross-validation (default: %(default)s)"
    rows.add_argument("--fold", type=non_negative_int, default=0, help=text)
    rows.add_argument("--test-studies", nargs="+", default=[], metavar="STUDY", help="set these studies aside")
    rows.add_argument("--test-types", nargs="+", default=[], metavar="TYPE", help="set all cells of these types aside")
    rows.add_argument(
        "--val-ratio",
        type=ratio,
        help="share of the samples that is validated on; 0 trains all epochs and keeps the last "
        f"(default: {VAL_RATIO}, or more in a small file)",
    )
    text = "of all these draws (default: %(default)s)"
    rows.add_argument("--split-seed", type=non_negative_int, default=0, help=text)


def recipe_defaults(name: str) -> str:
    return "default: " + ", ".join(f"{getattr(r, name):g} for {key}" for key, r in RECIPES.items())


def main(argv: list[str] | None = None, control: Recipe | None = None) -> None:
    """control: a recipe to train in place of --recipe, see benchmarks/controls.py."""
    args = get_parser().parse_args(argv)
    with joined(args.device) as group:
        train_adapter(args, control or find_recipe(args.recipe), group)


def train_adapter(args: argparse.Namespace, recipe: Recipe, group: Group) -> None:
    began = time.perf_counter()
    output = args.output or Path(f"data/fractal_adapter_{args.num_levels or len(Atlas.open(args.input).levels)}L.pt")
    partial = output.with_name(f"{output.stem}.partial.pt")
    check_paths({"--input": args.input}, {"--output": output, "--output, if stopped,": partial})
    names = ("num_levels", "scale_dim", "epochs", "patience", "lr", "batch_size", "seed")
    atlas = Atlas.open(args.input)
    settings = Settings(recipe, **{name: getattr(args, name) for name in names})
    recipe = settings.of_recipe
    where = f"{group.device}" + (f", {group.size} processes" if group.size > 1 else "")
    print(f"recipe {recipe.name}: lr {recipe.lr:g}, batch {recipe.batch_size}, seed {settings.seed}, {where}")

    split, rows, counts = group.from_main(lambda: draw_split(args, atlas))
    held = [part[group.share(len(part))] for part in rows]
    cells = atlas.read(np.concatenate(rows), np.concatenate(held))
    train, validation = cells.split(len(rows[0]), len(held[0]))

    fitted = fit(train, validation, counts, settings, knn_accuracy, str(args.input), group)
    if group.is_main:
        save(
            partial if fitted.stopped else output,
            fitted.adapter,
            fitted.config,
            fitted.classes,
            split=asdict(split),
            training=fitted.training(settings),
            validation=fitted.validation,
            versions={"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()},
        )
    if fitted.stopped:
        done = f"{fitted.epochs_done} of {settings.epochs} epochs done"
        why = f"{fitted.stopped}; {done}" if str(fitted.stopped) else done
        kept = f"epoch {fitted.best_epoch}, the best of them, written to {partial}"
        raise type(fitted.stopped)(f"{why}; {kept}" if group.is_main else why)
    if group.is_main:
        partial.unlink(missing_ok=True)
    print(f"epoch {fitted.best_epoch} kept, {time.perf_counter() - began:.0f} s, written to {output}")


def draw_split(args: argparse.Namespace, atlas: Atlas) -> tuple[Split, tuple[np.ndarray, np.ndarray], Counts]:
    """-> the split, its training and validation rows, and how many cells but test cells lie on each path."""
    split = Split.draw(
        atlas, args.split_seed, args.test_ratio, args.holdout, args.test_studies, args.test_types, args.fold
    )
    split = split.sampled(atlas, args.max_samples, args.val_ratio)
    train_rows, val_rows, test_rows = split.rows(atlas)
    for kind, names in ("studies", split.test_studies), ("types", split.test_types):
        if names:
            listed = printable(", ".join(names[:10]))
            print(f"held out: {len(names)} {kind} ({listed}{', ...' if len(names) > 10 else ''})")
    print(
        f"{len(train_rows):,} training, {len(val_rows):,} validation and {len(test_rows):,} test cells of {args.input}"
    )
    keep = np.ones(split.num_rows, bool)
    keep[test_rows] = False
    return split, (train_rows, val_rows), atlas.path_counts(keep)


if __name__ == "__main__":
    run(main)
