"""Training: the loop over epochs, what it averages, how it chooses an epoch, and what a stopped run leaves."""

import copy
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from fractal.base.cli import InputError
from fractal.data.parquet import Cells
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.model.adapter import STATISTICS_ROWS, Adapter, FractalAdapter, PublishedAdapter, build_adapter, embed
from fractal.model.distributed import Group, ProcessLostError
from fractal.model.hierarchical import HierarchicalObjective, ancestor_matrix
from fractal.model.objective import PrefixObjective
from fractal.model.published import KEEP, PublishedObjective
from fractal.model.recipes import RECIPES, Recipe
from fractal.score.metrics import knn_accuracy

WEIGHT_DECAY = 0.01
CLIP = 1.0  # norm of the gradient
EMA_DECAY = 0.98  # the moving average of the weights looks back about 50 steps
VAL_QUERIES, VAL_BANK = 2_000, 10_000  # enough for a standard error of .01, and a third of a second
Counts = dict[tuple[str, ...], int]  # path of labels -> number of cells
ALONE = Group()  # one process


@dataclass(frozen=True)
class Settings:
    """What to train. None: as the recipe or the cells suggest."""

    recipe: str = "fractal"
    num_levels: int | None = None  # blocks; None: one for each level with two or more classes
    scale_dim: int | None = None  # numbers per block; None: see `default_scale_dim`
    epochs: int = 20  # at most
    patience: int = 5  # stop after so many epochs that scored worse in validation than the best one
    lr: float | None = None
    batch_size: int | None = None
    seed: int = 0  # of the weights, the order of the rows, and the noise
    obo: str | Path = CL_SLIM  # ontology of the `hce` recipe

    @property
    def of_recipe(self) -> Recipe:
        """The recipe, with the settings that are given instead of its own."""
        recipe = RECIPES[self.recipe]
        return replace(recipe, lr=self.lr or recipe.lr, batch_size=self.batch_size or recipe.batch_size)


@dataclass
class Fitted:
    """What came of it: the adapter with the weights of the best epoch, and all that a checkpoint says of it."""

    adapter: Adapter
    config: dict[str, Any]
    classes: list[list[str]]  # names per level of the file
    validation: dict[str, float] | None = None  # 5-NN accuracy by level, and `score`, of the best epoch
    best_epoch: int = 0
    epochs_done: int = 0
    stopped: KeyboardInterrupt | ProcessLostError | None = field(
        default=None, repr=False
    )  # what ended it: Ctrl-C, SIGTERM

    @property
    def partial(self) -> bool:
        return self.stopped is not None

    def training(self, settings: Settings) -> dict[str, Any]:
        """For the checkpoint: what was asked and what was done."""
        recipe = settings.of_recipe
        return {
            "epochs": settings.epochs,
            "epochs_done": self.epochs_done,
            "best_epoch": self.best_epoch,
            "partial": self.partial,
            "lr": recipe.lr,
            "batch_size": recipe.batch_size,
            "seed": settings.seed,
        }


class Validator:
    """Scores an adapter on validation cells, against training cells.

    x (n, dim), labels (n, levels), val_x and val_labels the same for validation. block_levels: the level that each
    prefix stands for. `own_level`: the prefixes count as well, each at its own level. `group`: the processes that train
    together, each with its share of the rows.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        val_x: Tensor,
        val_labels: Tensor,
        block_levels: list[int],
        own_level: bool,
        group: Group = ALONE,
    ) -> None:
        self.block_levels, self.own_level = block_levels, own_level
        n, num_val = group.num_rows(x), group.num_rows(val_x)
        bank, queries = torch.randperm(n)[:VAL_BANK], torch.randperm(num_val)[:VAL_QUERIES]
        self.bank, self.bank_labels = group.collect(x, bank, n), group.collect(labels, bank, n)
        self.queries, self.labels = group.collect(val_x, queries, num_val), group.collect(val_labels, queries, num_val)

    def __call__(self, adapter: Adapter) -> tuple[list[float], float]:
        """-> 5-NN accuracy of the full vector at all levels, and the score by which an epoch is chosen.

        The score is the mean over the blocks' levels of the accuracy of the full vector and, for the recipes that
        train each prefix on its own level, of that prefix. NaN if a vector is not finite.
        """
        queries, bank = embed(adapter, self.queries), embed(adapter, self.bank)
        accuracy = knn_accuracy(queries[-1], self.labels, bank[-1], self.bank_labels)
        scores = [accuracy[k] for k in self.block_levels]
        if self.own_level:
            prefixes = zip(self.block_levels[:-1], queries[:-1], bank[:-1], strict=True)
            scores += [knn_accuracy(q, self.labels[:, [k]], b, self.bank_labels[:, [k]])[0] for k, q, b in prefixes]
        finite = bool(queries[-1].isfinite().all())  # weights of 1e30 may be finite, their vectors are not
        return accuracy, sum(scores) / len(scores) if finite else math.nan


def choose_levels(labels: Tensor, num_levels: int | None, published: bool = False) -> list[int]:
    """labels (n, levels) of the training rows, or each path of them once -> the level that each block stands for.

    By default every level with two or more classes. With `num_levels` the first so many levels; where one of them has
    a single class, which can't be learnt, its block takes the next level that can (but not in the published recipe).
    """
    count = labels.shape[1]
    learnable = [k for k in range(count) if len(labels[:, k].unique()) > 1]
    if not learnable:
        raise ValueError("all training rows are of one type")
    if num_levels is None and len(learnable) > 1:
        return learnable
    wanted = range(num_levels or 2)
    if published:
        return list(wanted)
    return [next((k for k in learnable if k >= level), learnable[-1]) for level in wanted]


def default_scale_dim(dim: int, num_levels: int) -> int:
    """Numbers per block: the vector gets about as long as the input, in steps of 8; 8 at least and 32 at most."""
    return min(32, 8 * math.ceil(dim / num_levels / 8))


def path_frequency(counts: Counts, classes: list[list[str]], levels: list[int], paths: Tensor) -> Tensor:
    """-> (num_paths,) how many cells of the file lie on each of the paths (num_paths, num_levels)."""
    codes = [{name: code for code, name in enumerate(names)} for names in classes]
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


def check_settings(settings: Settings, num_rows: int, train: Cells, source: str, group: Group = ALONE) -> None:
    """Raises InputError for too few cells to learn from, for a number of levels that they don't have, and for a recipe
    that one process must train."""
    if num_rows < max(2, group.size):
        raise InputError(
            f"{source}: {num_rows} rows are left to train on; it takes more cells, or a larger --max-samples"
        )
    if settings.num_levels and settings.num_levels > len(train.levels):
        raise InputError(f"{source}: has {len(train.levels)} levels ({', '.join(train.levels)}); lower --num-levels")
    if settings.recipe == "published" and group.size > 1:
        raise InputError(
            "--recipe published: compares all cells of a batch with each other, so one process trains it; "
            "start train.py without torchrun"
        )


def prepare(
    x: Tensor, y: Tensor, train: Cells, counts: Counts, settings: Settings, source: str, group: Group = ALONE
) -> tuple[Fitted, nn.Module]:
    """A new adapter and its objective. x (n, dim) and y (n, levels) are the training rows, on the training device."""
    published = settings.recipe == "published"
    found, number = group.unique_rows(y)  # the paths through all levels, and that of each row
    if len(found[:, -1].unique()) < 2:
        raise InputError(f"{source}: all training rows are of one type; there is nothing to tell apart")
    levels = choose_levels(found, settings.num_levels, published)
    if published and len(levels) not in KEEP:
        raise InputError(f"{source}: the published recipe has 2 to 4 levels, not {len(levels)}; give --num-levels 4")
    scale_dim = settings.scale_dim or default_scale_dim(x.shape[1], len(levels))
    config: dict[str, Any] = {
        "recipe": settings.recipe,
        "dim": x.shape[1],
        "num_levels": len(levels),
        "scale_dim": scale_dim,
        "levels": list(train.levels),
        "block_levels": levels,
    }
    if published:
        adapter = build_adapter(config, train.classes).to(x.device)
        fitted = Fitted(adapter, config, train.classes)
        return fitted, PublishedObjective(cast(PublishedAdapter, adapter), x, y[:, levels])
    trained = levels if RECIPES[settings.recipe].own_level else levels[-1:] * len(levels)
    paths, path_of = found[:, trained].unique(dim=0, return_inverse=True)
    path = path_of[number]
    config["paths"] = paths.tolist()
    network = cast(FractalAdapter, build_adapter(config, train.classes).to(x.device))
    frequency = path_frequency(counts, train.classes, trained, paths).to(x.device)
    sampled = group.total(path.bincount(minlength=len(paths)))
    n = group.num_rows(x)
    head = torch.arange(min(n, STATISTICS_ROWS))
    sample, its_path = group.collect(x, head, n), group.collect(path, head, n)
    if group.is_main:  # the others get its weights; this takes 400 MB for a moment
        network.fit_statistics(sample, its_path, frequency)
    fitted = Fitted(network, config, train.classes)
    if settings.recipe != "hce":
        return fitted, PrefixObjective(network, x, path, frequency, sampled)
    lineages = {labels[levels[-1]]: tuple(labels[k] for k in levels) for labels in counts}
    leaves = [train.classes[levels[-1]][leaf] for leaf in paths[:, -1].tolist()]
    ancestors = ancestor_matrix([lineages.get(leaf, (leaf,)) for leaf in leaves], load_graph(settings.obo))
    return fitted, HierarchicalObjective(network, x, path, frequency, ancestors.to(x.device), sampled)


def describe(config: dict[str, Any]) -> str:
    """What the blocks are, and which levels have none, in one line."""
    names = config["levels"]
    line = (
        f"{config['num_levels']} blocks of {config['scale_dim']}: {', '.join(names[k] for k in config['block_levels'])}"
    )
    without = [name for k, name in enumerate(names[: config["block_levels"][-1]]) if k not in config["block_levels"]]
    return line + (f"; none for {', '.join(without)}, where all training cells are of one class" if without else "")


def fit(
    train: Cells,
    validation: Cells,
    counts: Counts,
    settings: Settings,
    device: torch.device,
    source: str = "cells",
    group: Group = ALONE,
) -> Fitted:
    """Train an adapter. The two sets of cells share their classes; `validation` may be empty: the last epoch counts.

    counts: how many cells of the file lie on each path, without the test cells. source: what messages call the cells.
    group: the processes that train it together, each with its share of the cells (fractal/model/distributed.py).
    Ctrl-C or SIGTERM ends it after the first epoch with the best one so far (`Fitted.stopped`), and is raised before;
    so does the end of another process of the group.
    Raises InputError for cells that nothing can be learnt from, and for training that diverges.
    """
    check_settings(settings, group.num_rows(train.vectors), train, source, group)
    torch.manual_seed(settings.seed)
    torch.set_flush_denormal(True)  # once training has converged, numbers below 1e-38 slow a CPU down tenfold
    try:
        return train_epochs(train, validation, counts, settings, device, source, group)
    finally:
        torch.set_flush_denormal(False)


def train_epochs(
    train: Cells,
    validation: Cells,
    counts: Counts,
    settings: Settings,
    device: torch.device,
    source: str,
    group: Group,
) -> Fitted:
    """See `fit`, which prepares torch for it."""
    recipe = settings.of_recipe
    x, y, val_x, val_y = (
        torch.from_numpy(array).to(device)
        for array in (train.vectors, train.labels, validation.vectors, validation.labels)
    )
    n, num_val = group.num_rows(x), group.num_rows(val_x)
    fitted, objective = prepare(x, y, train, counts, settings, source, group)
    print(describe(fitted.config))
    adapter = fitted.adapter
    group.same_weights(adapter, objective)
    scored = copy.deepcopy(adapter) if recipe.ema else adapter
    weights, averages = list(adapter.parameters()), list(scored.parameters())
    trained = [*weights, *objective.parameters()]
    steps = len(batches(n, recipe.batch_size, recipe.min_steps))
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=WEIGHT_DECAY, fused=True)
    scheduler = schedule(optimizer, settings, settings.epochs * steps)
    block_levels = fitted.config["block_levels"]
    validate = Validator(x, y, val_x, val_y, block_levels, recipe.own_level, group) if num_val else None

    best_score, best_state = -math.inf, copy.deepcopy(scored.state_dict())
    diverged = f"give a lower --lr than {recipe.lr:g}"
    hidden = not group.is_main
    began = time.perf_counter()
    try:
        with tqdm(total=settings.epochs * steps, unit="step", desc="train", mininterval=0.5, disable=hidden) as bar:
            for epoch in range(1, settings.epochs + 1):
                adapter.train()
                total = torch.zeros((), device=device)
                for step, rows in enumerate(batches(n, recipe.batch_size, recipe.min_steps)):
                    loss = group.loss(objective, adapter, rows.to(device), n)
                    optimizer.zero_grad()
                    loss.backward()
                    group.add_gradients(trained)
                    nn.utils.clip_grad_norm_(weights, CLIP)
                    optimizer.step()
                    scheduler.step()
                    if recipe.ema:  # AveragedModel would copy the buffers as well, in every step
                        ema_decay = EMA_DECAY if step or epoch > 1 else 0.0  # the first step's weights as they are
                        get_ema_multi_avg_fn(ema_decay)(averages, weights, None)
                    total += loss.detach()
                    bar.update()
                mean_loss = group.total(total).item() / steps
                if not math.isfinite(mean_loss):
                    raise InputError(f"{source}: the loss is {mean_loss} in epoch {epoch}; {diverged}")
                bar.set_postfix(loss=f"{mean_loss:.3f}")
                line = f"epoch {epoch:3d}  loss {mean_loss:.3f}  {time.perf_counter() - began:6.1f} s"
                scores, score = None, 0.0  # without validation the last epoch counts
                if validate is not None:
                    accuracy, score = group.from_main(lambda: validate(scored))
                    scores = dict(zip(train.levels, accuracy, strict=True)) | {"score": score}
                    line += "  validation 5-NN " + " ".join(f"{k} {v:.3f}" for k, v in scores.items() if k != "score")
                bar.write(line)
                if score >= best_score:  # of equals the later one: it has been trained longer
                    snapshot = copy.deepcopy(scored.state_dict())  # first, so that Ctrl-C can't come between the rest
                    best_score, best_state, fitted.best_epoch, fitted.validation = score, snapshot, epoch, scores
                fitted.epochs_done = epoch
                if epoch - fitted.best_epoch >= settings.patience:
                    bar.write(f"no better for {settings.patience} epochs: stopping")
                    break
    except (KeyboardInterrupt, ProcessLostError) as stop:
        if not fitted.best_epoch:
            raise
        fitted.stopped = stop
    if not all(tensor.isfinite().all() for tensor in best_state.values()) or fitted.best_epoch == 0:
        raise InputError(f"{source}: training diverged; {diverged}")
    adapter.load_state_dict(best_state)
    return fitted


def schedule(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> LRScheduler:
    """The learning rate over all `steps`: ours rises for a tenth of them and then falls, the published one falls."""
    if settings.recipe == "published":
        return CosineAnnealingLR(optimizer, steps)
    return OneCycleLR(optimizer, settings.of_recipe.lr, total_steps=steps, pct_start=0.1)
