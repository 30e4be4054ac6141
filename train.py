"""Step 3: fit the adapter, whose vectors can be cut after any block, on the first rows of a stratified file.

    uv run python train.py --num-levels 4 --scale-dim 32

Three recipes: `fractal` trains prefix j on the labels of level j (fractal/objective.py), `published` is the published
reference (fractal/published.py), and `mrl` is the flat control that trains every prefix on the leaf labels.
"""

import argparse
import copy
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from fractal.adapter import Adapter, FractalAdapter, PublishedAdapter, build_adapter, embed, pick_device, save
from fractal.atlas import LEVELS, Cells, fingerprint, open_atlas, path_counts, read_rows
from fractal.cli import InputError, non_negative_int, positive_float, positive_int, printable, ratio, run
from fractal.files import check_output
from fractal.metrics import knn_accuracy
from fractal.objective import PrefixObjective, trained_levels
from fractal.published import PublishedObjective
from fractal.resume import TrainingState, noting_interrupts
from fractal.split import Split, draw_studies


@dataclass(frozen=True)
class Recipe:
    """What differs between the recipes beside their loss."""

    lr: float
    batch_size: int
    min_steps: int  # per epoch: small atlases are gone through several times
    ema: bool  # score and save an exponential moving average of the weights


RECIPES = {
    "fractal": Recipe(lr=2e-3, batch_size=512, min_steps=30, ema=True),
    "published": Recipe(lr=1e-4, batch_size=256, min_steps=1, ema=False),
    "mrl": Recipe(lr=2e-3, batch_size=512, min_steps=30, ema=True),
}
WEIGHT_DECAY = 0.01
CLIP = 1.0  # norm of the gradient
EMA_DECAY = 0.98  # decay of the moving average: it looks back about 50 steps
VAL_QUERIES, VAL_BANK = 2_000, 10_000  # enough for a standard error of .01, and a third of a second


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input",
        type=Path,
        default=Path("data/stratified.parquet"),
        help="Parquet file of stratify.py (default: %(default)s)",
    )
    files.add_argument("--output", type=Path, help="checkpoint to write (default: data/fractal_adapter_{N}L.pt)")
    files.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last whole epoch of a stopped run with the same flags, whose state lies beside --output "
        "in a file with .resume at its end; without one, start from the beginning",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--recipe", choices=list(RECIPES), default="fractal", help="what to train, see above (default: %(default)s)"
    )
    model.add_argument(
        "--num-levels",
        type=int,
        choices=[2, 3, 4],
        default=4,
        help="blocks: system, lineage, type, subtype, or the first of these (default: %(default)s)",
    )
    model.add_argument("--scale-dim", type=positive_int, default=32, help="numbers per block (default: %(default)s)")
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--max-samples",
        type=non_negative_int,
        default=100_000,
        help="first rows, less the test rows, to train and validate on; 0 takes all (default: %(default)s)",
    )
    rows.add_argument(
        "--test-ratio",
        type=ratio,
        default=0.2,
        help="share of the whole file that is set aside for eval.py before anything else (default: %(default)s)",
    )
    rows.add_argument(
        "--holdout",
        choices=["cells", "study"],
        default="cells",
        help="what is set aside: cells drawn one by one, or whole studies until they hold --test-ratio of the cells "
        "(default: %(default)s)",
    )
    rows.add_argument(
        "--fold",
        type=non_negative_int,
        default=0,
        help="which cells are set aside: the folds 0, 1, ... share none, for cross-validation (default: %(default)s)",
    )
    rows.add_argument("--test-studies", nargs="+", metavar="STUDY", help="set these studies aside")
    rows.add_argument(
        "--val-ratio",
        type=ratio,
        default=0.15,
        help="share of the samples that is validated on; 0 trains all epochs and keeps the last (default: %(default)s)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, default=20, help="at most (default: %(default)s)")
    training.add_argument(
        "--patience",
        type=positive_int,
        default=5,
        help="stop after so many epochs that scored worse in validation than the best one (default: %(default)s)",
    )
    training.add_argument("--batch-size", type=positive_int, help=recipe_defaults("batch_size"))
    training.add_argument("--lr", type=positive_float, help=recipe_defaults("lr"))
    training.add_argument("--seed", type=non_negative_int, default=0, help="of split and training (default: 0)")
    training.add_argument(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="auto takes CUDA, else MPS, else the CPU (default: %(default)s)",
    )
    return parser


def recipe_defaults(name: str) -> str:
    return "default: " + ", ".join(f"{getattr(r, name):g} for {key}" for key, r in RECIPES.items())


class Validator:
    """Scores an adapter on validation cells, against training cells."""

    def __init__(self, x: Tensor, labels: Tensor, val_x: Tensor, val_labels: Tensor, own_level: bool) -> None:
        self.own_level = own_level
        bank = torch.randperm(len(x))[:VAL_BANK].to(x.device)
        queries = torch.randperm(len(val_x))[:VAL_QUERIES].to(x.device)
        self.bank, self.bank_labels = x[bank], labels[bank]
        self.queries, self.labels = val_x[queries], val_labels[queries]

    def __call__(self, adapter: Adapter) -> tuple[list[float], float]:
        """-> 5-NN accuracy of the full vector at all four levels, and the score by which an epoch is chosen.

        The score is the mean over the learnt levels of the accuracy of the full vector and, for the recipes that
        train prefix j on level j, of prefix j.
        """
        queries, bank = embed(adapter, self.queries), embed(adapter, self.bank)
        prefixes = list(zip(queries, bank, strict=True))[:-1]
        accuracy = knn_accuracy(queries[-1], self.labels, bank[-1], self.bank_labels)
        scores = accuracy[: len(queries)]
        if self.own_level:
            scores += [
                knn_accuracy(q, self.labels[:, [j]], b, self.bank_labels[:, [j]])[0]
                for j, (q, b) in enumerate(prefixes)
            ]
        finite = bool(queries[-1].isfinite().all())  # weights of 1e30 may be finite, their vectors are not
        return accuracy, sum(scores) / len(scores) if finite else math.nan


def path_frequency(counts: dict[tuple[str, ...], int], cells: Cells, levels: list[int], paths: Tensor) -> Tensor:
    """-> (num_paths,) how many cells of the file lie on each of the paths (num_paths, num_levels)."""
    codes = [{name: code for code, name in enumerate(names)} for names in cells.classes]
    number = {tuple(path): i for i, path in enumerate(paths.tolist())}
    frequency = torch.zeros(len(paths))
    for names, count in counts.items():
        i = number.get(tuple(codes[level].get(names[level], -1) for level in levels))
        if i is not None:  # some rare types have no training row
            frequency[i] += count
    return frequency


def batches(n: int, size: int, min_steps: int) -> list[Tensor]:
    """Row numbers of one epoch: shuffled, cut to full batches, repeated until there are `min_steps` of them."""
    found: list[Tensor] = []
    while len(found) < min_steps or not found:
        order = torch.randperm(n)
        found += order.split(size) if n <= size else order[: n - n % size].split(size)
    return found


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    recipe = RECIPES[args.recipe]
    lr, batch_size = args.lr or recipe.lr, args.batch_size or recipe.batch_size
    output = args.output or Path(f"data/fractal_adapter_{args.num_levels}L.pt")
    check_output(output, args.input)
    device = pick_device(args.device)
    print(f"recipe {args.recipe}: {args.num_levels} levels x {args.scale_dim}, lr {lr:g}, batch {batch_size}, {device}")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # once training has converged, numbers below 1e-38 slow a CPU down tenfold

    # Rows: the test rows are set aside first; training and validation share the first of the others.
    if args.fold and (args.fold + 1) * args.test_ratio > 1.001:
        raise InputError(
            f"--fold {args.fold}: there are {int(1.001 / args.test_ratio)} of --test-ratio {args.test_ratio}"
        )
    num_rows = open_atlas(args.input).metadata.num_rows
    studies = args.test_studies or []
    if args.fold and (args.holdout == "study" or studies):
        raise InputError(f"--fold {args.fold}: folds are of cells, and studies are held out; leave it out")
    if args.holdout == "study" and not studies and args.test_ratio:
        studies = draw_studies(args.input, args.test_ratio, args.seed)
    split = Split(
        fingerprint(args.input),
        num_rows,
        args.seed,
        args.test_ratio,
        args.val_ratio,
        args.max_samples,
        studies,
        args.fold,
    )
    train_rows, val_rows, test_rows = split.rows(args.input)
    if studies:
        names = printable(", ".join(studies[:10]))
        print(f"held out: {len(studies)} studies ({names}{', ...' if len(studies) > 10 else ''})")
    if len(train_rows) < 2:
        raise InputError(
            f"{args.input}: {len(train_rows)} rows are left to train on; it takes more cells, or a larger --max-samples"
        )
    cells = read_rows(args.input, np.concatenate([train_rows, val_rows]))
    vectors, labels = torch.from_numpy(cells.vectors).to(device), torch.from_numpy(cells.labels).to(device)
    x, val_x = vectors[: len(train_rows)], vectors[len(train_rows) :]
    y, val_y = labels[: len(train_rows)], labels[len(train_rows) :]
    if len(y[:, -1].unique()) < 2:
        raise InputError(f"{args.input}: all training rows are of one type; there is nothing to tell apart")
    print(f"{len(x):,} training, {len(val_x):,} validation and {len(test_rows):,} test cells of {args.input}")

    config = {"recipe": args.recipe, "dim": x.shape[1], "num_levels": args.num_levels, "scale_dim": args.scale_dim}
    objective: nn.Module
    if args.recipe == "published":
        adapter = build_adapter(config, cells.classes).to(device)
        objective = PublishedObjective(cast(PublishedAdapter, adapter), x, y)
    else:
        levels = trained_levels(y, args.num_levels, args.recipe)
        paths, path = y[:, levels].unique(dim=0, return_inverse=True)
        config["paths"] = paths.tolist()
        adapter = cast(FractalAdapter, build_adapter(config, cells.classes).to(device))
        adapter.fit_axes(x)
        keep = np.ones(num_rows, bool)
        keep[test_rows] = False
        counts = path_counts(args.input, keep)
        frequency = path_frequency(counts, cells, levels, paths).to(device)
        objective = PrefixObjective(adapter, x, path, frequency)
    scored = copy.deepcopy(adapter) if recipe.ema else adapter
    weights, averages = list(adapter.parameters()), list(scored.parameters())
    steps = len(batches(len(x), batch_size, recipe.min_steps))
    optimizer = torch.optim.AdamW([*weights, *objective.parameters()], lr=lr, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler: LRScheduler
    if args.recipe == "published":
        scheduler = CosineAnnealingLR(optimizer, args.epochs * steps)
    else:
        scheduler = OneCycleLR(optimizer, lr, total_steps=args.epochs * steps, pct_start=0.1)
    validate = Validator(x, y, val_x, val_y, args.recipe == "fractal") if len(val_x) else None

    best_score, best_epoch, best_state, validation = -math.inf, 0, copy.deepcopy(scored.state_dict()), None
    flags = {name: str(value) for name, value in vars(args).items() if name not in ("input", "output", "resume")}
    flags |= {"lr": repr(lr), "batch_size": str(batch_size), "device": device.type, "input": split.fingerprint}
    parts: dict[str, Any] = {"adapter": adapter, "average": scored, "objective": objective}
    parts |= {"optimizer": optimizer, "scheduler": scheduler}
    state = TrainingState(output, flags, parts, device)
    done = 0  # epochs
    if state.path.exists() and args.resume:
        done, best_score, best_epoch, best_state, validation = state.read()
        print(f"resuming after epoch {done}")
    elif state.path.exists() or args.resume:
        found = "of a stopped run is replaced; --resume would go on with it" if state.path.exists() else "is not there"
        print(f"{state.path} {found}: starting from the beginning")
    began = time.perf_counter()
    bar = tqdm(total=args.epochs * steps, initial=done * steps, unit="step", desc="train", mininterval=0.5)
    with noting_interrupts() as interrupts, bar:
        for epoch in range(done + 1, args.epochs + 1):
            adapter.train()
            total = torch.zeros((), device=device)
            for step, rows in enumerate(batches(len(x), batch_size, recipe.min_steps)):
                loss = objective(adapter, rows.to(device))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(weights, CLIP)
                optimizer.step()
                scheduler.step()
                if recipe.ema:  # AveragedModel would copy the buffers as well, in every step
                    decay = EMA_DECAY if step or epoch > 1 else 0.0  # the first step's weights are taken as they are
                    get_ema_multi_avg_fn(decay)(averages, weights, None)
                total += loss.detach()
                bar.update()
            mean_loss = total.item() / steps
            if not math.isfinite(mean_loss):
                state.path.unlink(missing_ok=True)
                raise InputError(
                    f"{args.input}: the loss is {mean_loss} in epoch {epoch}; give a lower --lr than {lr:g}"
                )
            bar.set_postfix(loss=f"{mean_loss:.3f}")
            line = f"epoch {epoch:3d}  loss {mean_loss:.3f}  {time.perf_counter() - began:6.1f} s"
            if validate is None:
                best_epoch, best_state = epoch, copy.deepcopy(scored.state_dict())
                bar.write(line)
                state.write(epoch, best_score, best_epoch, best_state, validation)
                continue
            accuracy, score = validate(scored)
            named = dict(zip(LEVELS, accuracy, strict=True))
            bar.write(f"{line}  validation 5-NN " + " ".join(f"{k} {v:.3f}" for k, v in named.items()))
            if score >= best_score:  # of equals the later one: it has been trained longer
                snapshot = copy.deepcopy(scored.state_dict())  # first, so that Ctrl-C can't come between the four
                best_score, best_epoch, best_state, validation = score, epoch, snapshot, {**named, "score": score}
            elif epoch - best_epoch >= args.patience:
                bar.write(f"no better for {args.patience} epochs: stopping")
                break
            state.write(epoch, best_score, best_epoch, best_state, validation)

    if interrupts and not best_epoch:
        raise interrupts[0]
    if not all(tensor.isfinite().all() for tensor in best_state.values()) or best_epoch == 0:
        state.path.unlink(missing_ok=True)
        raise InputError(f"{args.input}: training diverged; give a lower --lr than {lr:g}")
    adapter.load_state_dict(best_state)
    training = {"epochs": args.epochs, "lr": lr, "batch_size": batch_size, "best_epoch": best_epoch}
    versions = {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}
    save(
        output,
        adapter,
        config,
        cells.classes,
        split=asdict(split),
        training=training,
        validation=validation,
        versions=versions,
    )
    if interrupts:
        raise type(interrupts[0])(f"epoch {best_epoch}, the best so far, written to {output}; --resume goes on")
    state.path.unlink(missing_ok=True)
    print(f"epoch {best_epoch} kept, {time.perf_counter() - began:.0f} s, written to {output}")


if __name__ == "__main__":
    run(main)
