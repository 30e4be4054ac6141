"""Training: the loop over epochs, what it averages, how it chooses an epoch, and what a stopped run leaves."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from fractal.base.cli import InputError
from fractal.data.atlas import LabelledVectors
from fractal.model.adapter import STATISTICS_ROWS, Adapter, FractalAdapter, build_adapter, embed
from fractal.model.distributed import Group, ProcessLostError, peers
from fractal.model.objective import TrainingRows
from fractal.model.published import KEEP
from fractal.model.recipes import FRACTAL, PUBLISHED, Recipe

WEIGHT_DECAY = 0.01
CLIP = 1.0  # norm of the gradient
EMA_DECAY = 0.98  # the moving average of the weights looks back about 50 steps
VAL_QUERIES, VAL_BANK = 2_000, 10_000  # enough for a standard error of .01, and a third of a second
Counts = dict[tuple[str, ...], int]  # path of labels -> number of cells
Accuracy = Callable[[Tensor, Tensor, Tensor, Tensor], list[float]]  # see `Validator`
ALONE = Group()  # one process


@dataclass(frozen=True)
class Settings:
    """What to train. None: as the recipe or the cells suggest."""

    recipe: Recipe = FRACTAL
    num_levels: int | None = None  # blocks; None: one for each level with two or more classes
    scale_dim: int | None = None  # numbers per block; None: see `default_scale_dim`
    epochs: int = 20  # at most
    patience: int = 5  # stop after so many epochs that scored worse in validation than the best one
    lr: float | None = None
    batch_size: int | None = None
    seed: int = 0  # of the weights, the order of the rows, and the noise

    @property
    def of_recipe(self) -> Recipe:
        """The recipe, with the settings that are given in place of its defaults."""
        recipe = self.recipe
        return replace(recipe, lr=self.lr or recipe.lr, batch_size=self.batch_size or recipe.batch_size)


@dataclass
class Fitted:
    """The result: the adapter with the weights of the best epoch, and what a checkpoint keeps beside it."""

    adapter: Adapter
    config: dict[str, Any]
    classes: list[list[str]]  # names per level of the file
    validation: dict[str, float] | None = None  # 5-NN accuracy by level, and `score`, of the best epoch
    best_epoch: int = 0
    epochs_done: int = 0
    stopped: KeyboardInterrupt | ProcessLostError | None = field(default=None, repr=False)  # by Ctrl-C, SIGTERM, ...

    @property
    def partial(self) -> bool:
        return self.stopped is not None

    def training(self, settings: Settings) -> dict[str, Any]:
        """For the checkpoint: the settings, and what was done."""
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

    Parameters
    ----------
    cells : of the training and the validation rows x (n, dim) and labels (n, levels); tensors on one device.
    block_levels : the level of the file that each prefix stands for.
    own_level : whether the prefixes count as well, each at its own level.
    accuracy : called with queries (q, dims), their labels (q, levels), and both of the bank (b, ...) -> per level the
        share of the queries whose neighbours vote for the right label.
    group : the processes that train together, each with its share of the rows.
    """

    def __init__(
        self,
        cells: tuple[Tensor, Tensor, Tensor, Tensor],
        block_levels: list[int],
        own_level: bool,
        accuracy: Accuracy,
        group: Group = ALONE,
    ) -> None:
        self.block_levels, self.own_level, self.accuracy = block_levels, own_level, accuracy
        x, labels, val_x, val_labels = cells
        n, num_val = len(labels), len(val_labels)
        bank, queries = torch.randperm(n)[:VAL_BANK], torch.randperm(num_val)[:VAL_QUERIES]
        self.bank, self.bank_labels = group.rows(x, bank, n), labels[bank.to(labels.device)]
        self.queries, self.labels = group.rows(val_x, queries, num_val), val_labels[queries.to(labels.device)]

    def __call__(self, adapter: Adapter) -> tuple[list[float], float]:
        """-> 5-NN accuracy of the full vector at all levels, and the score by which an epoch is chosen.

        The score is the mean over the blocks' levels of the accuracy of the full vector and, for the recipes that
        train each prefix on its own level, of that prefix. NaN if a vector is not finite.
        """
        queries, bank = embed(adapter, self.queries), embed(adapter, self.bank)
        accuracy = self.accuracy(queries[-1], self.labels, bank[-1], self.bank_labels)
        scores = [accuracy[k] for k in self.block_levels]
        for k, q, b in zip(self.block_levels[:-1], queries[:-1], bank[:-1], strict=True) if self.own_level else ():
            scores += self.accuracy(q, self.labels[:, [k]], b, self.bank_labels[:, [k]])
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
    rows: list[Tensor] = []
    while len(rows) < min_steps or not rows:
        order = torch.randperm(n)
        rows += order.split(size) if n <= size else order[: n - n % size].split(size)
    return rows


def check_settings(settings: Settings, train: LabelledVectors, source: str, group: Group = ALONE) -> None:
    """Raises InputError for too few cells to learn from, for a number of levels that they don't have, and for a recipe
    that one process must train."""
    if len(train.labels) < 2 * group.size:
        raise InputError(
            f"{source}: {len(train.labels)} rows are left to train on; it takes more cells, or a larger --max-samples"
        )
    if settings.num_levels and settings.num_levels > len(train.levels):
        raise InputError(f"{source}: has {len(train.levels)} levels ({', '.join(train.levels)}); lower --num-levels")
    if settings.recipe == PUBLISHED and group.size > 1:
        raise InputError(
            "--recipe published: compares all cells of a batch with each other, so one process trains it; "
            "start train.py without torchrun"
        )


def prepare(
    x: Tensor, y: Tensor, train: LabelledVectors, counts: Counts, settings: Settings, source: str, group: Group = ALONE
) -> tuple[Fitted, nn.Module]:
    """A new adapter and its objective. y (n, levels) are the labels of all training rows, x (m, dim) this process's."""
    recipe, published = settings.recipe, settings.recipe == PUBLISHED
    label_paths, number = y.unique(dim=0, return_inverse=True)  # the paths through all levels, and that of each row
    if len(label_paths[:, -1].unique()) < 2:
        raise InputError(f"{source}: all training rows are of one type; there is nothing to tell apart")
    levels = choose_levels(label_paths, settings.num_levels, published)
    if published and len(levels) not in KEEP:
        raise InputError(f"{source}: the published recipe has 2 to 4 levels, not {len(levels)}; give --num-levels 4")
    config: dict[str, Any] = {
        "recipe": recipe.name,
        "dim": x.shape[1],
        "num_levels": len(levels),
        "scale_dim": settings.scale_dim or default_scale_dim(x.shape[1], len(levels)),
        "levels": list(train.levels),
        "block_levels": levels,
    }
    trained = levels if recipe.own_level or published else levels[-1:] * len(levels)
    paths, path_of = label_paths[:, trained].unique(dim=0, return_inverse=True)
    if not published:
        config["paths"] = paths.tolist()
    adapter = build_adapter(config, train.classes).to(x.device)
    path = path_of[number]
    lineages = label_paths[np.unique(path_of.cpu(), return_index=True)[1]][:, levels]
    rows = TrainingRows(
        x,
        path[group.share(len(path))],
        frequency=path_frequency(counts, train.classes, trained, paths).to(x.device),
        sampled=path.bincount(minlength=len(paths)),
        lineages=lineages,
        names=[tuple(train.classes[k][c] for k, c in zip(levels, row, strict=True)) for row in lineages.tolist()],
    )
    if isinstance(adapter, FractalAdapter):
        head = torch.arange(min(len(path), STATISTICS_ROWS))
        sample = group.rows(x, head, len(path))
        if group.is_main:  # the others get its weights; this takes 400 MB
            adapter.fit_statistics(sample, path[: len(head)], rows.frequency)
    return Fitted(adapter, config, train.classes), recipe.objective(adapter, rows)


def describe(config: dict[str, Any]) -> str:
    """What the blocks are, and which levels have none, in one line."""
    names = config["levels"]
    line = (
        f"{config['num_levels']} blocks of {config['scale_dim']}: {', '.join(names[k] for k in config['block_levels'])}"
    )
    without = [name for k, name in enumerate(names[: config["block_levels"][-1]]) if k not in config["block_levels"]]
    return line + (f"; none for {', '.join(without)}, where all training cells are of one class" if without else "")


def fit(
    train: LabelledVectors,
    validation: LabelledVectors,
    counts: Counts,
    settings: Settings,
    accuracy: Accuracy,
    source: str = "cells",
    group: Group = ALONE,
) -> Fitted:
    """Train an adapter.

    Ctrl-C or SIGTERM ends it after the first epoch with the best one so far (`Fitted.stopped`), and is raised before;
    so does the end of another process of the group. torch's random numbers go on as if nothing had been drawn.

    Parameters
    ----------
    train, validation : cells that share their classes. `validation` may be empty; then the last epoch counts.
    counts : how many cells of the file lie on each path of labels, without the test cells.
    settings : what to train; `settings.recipe.objective` may be one of your own.
    accuracy : how validation measures, see `Validator`; `fractal.score.metrics.knn_accuracy`.
    source : what messages call the cells.
    group : the processes that train together, each with its share of the cells and on its device
        (fractal/model/distributed.py); by default this one, on the CPU.

    Raises
    ------
    InputError
        For cells that nothing can be learnt from, and for training that diverges.
    """
    check_settings(settings, train, source, group)
    x, y, val_x, val_y = (
        torch.from_numpy(array).to(group.device)
        for array in (train.vectors, train.labels, validation.vectors, validation.labels)
    )
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(settings.seed)
        torch.set_flush_denormal(True)  # once training has converged, numbers below 1e-38 slow a CPU down tenfold
        try:
            fitted, objective = prepare(x, y, train, counts, settings, source, group)
            print(describe(fitted.config))
            trainer = Trainer(fitted.adapter, objective, settings, len(y), group)
            validate = None
            if len(val_y):
                block_levels, own_level = fitted.config["block_levels"], settings.recipe.own_level
                validate = Validator((x, y, val_x, val_y), block_levels, own_level, accuracy, group)
            if group.size > 1:  # each has noise of its own from here on
                torch.manual_seed(settings.seed + group.rank)
            train_epochs(trainer, fitted, validate, settings, source)
        finally:
            torch.set_flush_denormal(False)
    return fitted


class Loss(nn.Module):
    """The loss of a batch, as a function of the weights of both."""

    def __init__(self, adapter: Adapter, objective: nn.Module) -> None:
        super().__init__()
        self.adapter, self.objective = adapter, objective

    def forward(self, rows: Tensor) -> Tensor:
        return self.objective(self.adapter, rows)


class Trainer:
    """What one step of training needs: the adapter, its loss, the optimizer, and the average of the weights.

    `scored` is the adapter that is validated and kept: the average of the weights, or the adapter itself.
    """

    def __init__(self, adapter: Adapter, objective: nn.Module, settings: Settings, num_rows: int, group: Group) -> None:
        self.recipe, self.group = settings.of_recipe, group
        self.num_rows, self.batch_size = num_rows // group.size, max(1, self.recipe.batch_size // group.size)
        self.loss = group.wrap(Loss(adapter, objective))
        self.scored = copy.deepcopy(adapter) if self.recipe.ema else adapter
        self.weights, self.averages = list(adapter.parameters()), list(self.scored.parameters())
        self.trained = [*self.weights, *objective.parameters()]
        self.steps = len(self.batches())  # per epoch
        self.steps_done = 0
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.recipe.lr, weight_decay=WEIGHT_DECAY, fused=True)
        self.scheduler = schedule(self.optimizer, settings, settings.epochs * self.steps)

    def batches(self) -> list[Tensor]:
        return batches(self.num_rows, self.batch_size, self.recipe.min_steps)

    def step(self, rows: Tensor) -> Tensor:
        """Learn from the rows of this process with these numbers (b,) -> their loss."""
        loss = self.loss(rows)
        self.optimizer.zero_grad()
        with peers():
            loss.backward()
        nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.scheduler.step()
        if self.recipe.ema:  # AveragedModel would copy the buffers as well, in every step
            decay = EMA_DECAY if self.steps_done else 0.0  # the first step's weights as they are
            get_ema_multi_avg_fn(decay)(self.averages, self.weights, None)
        self.steps_done += 1
        return loss.detach()

    def epoch(self, bar: tqdm) -> float:
        """-> the mean loss of one epoch's steps."""
        self.loss.train()
        device = self.weights[0].device
        total = torch.zeros((), device=device)
        for rows in self.batches():
            total += self.step(rows.to(device))
            bar.update()
        return sum(self.group.from_all(total.item())) / self.group.size / self.steps


def train_epochs(trainer: Trainer, fitted: Fitted, validate: Validator | None, settings: Settings, source: str) -> None:
    """Train until the last epoch, or until `patience` runs out; `fitted` gets the best epoch's weights and scores."""
    group, epochs = trainer.group, settings.epochs
    best_score, best_state = -math.inf, copy.deepcopy(trainer.scored.state_dict())
    way_out = f"give a lower --lr than {trainer.recipe.lr:g}"
    began = time.perf_counter()
    try:
        with tqdm(
            total=epochs * trainer.steps, unit="step", desc="train", mininterval=0.5, disable=not group.is_main
        ) as bar:
            for epoch in range(1, epochs + 1):
                loss = trainer.epoch(bar)
                if not math.isfinite(loss):
                    raise InputError(f"{source}: the loss is {loss} in epoch {epoch}; {way_out}")
                bar.set_postfix(loss=f"{loss:.3f}")
                line = f"epoch {epoch:3d}  loss {loss:.3f}  {time.perf_counter() - began:6.1f} s"
                scores, score = None, 0.0  # without validation the last epoch counts
                if validate is not None:
                    accuracy, score = group.from_main(lambda: validate(trainer.scored))
                    scores = dict(zip(fitted.config["levels"], accuracy, strict=True))
                    line += "  validation 5-NN " + " ".join(f"{level} {share:.3f}" for level, share in scores.items())
                    scores["score"] = score
                bar.write(line)
                if score >= best_score:  # of equals the later one: it has been trained longer
                    snapshot = copy.deepcopy(trainer.scored.state_dict())  # so that Ctrl-C can't come between the rest
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
        raise InputError(f"{source}: training diverged; {way_out}")
    fitted.adapter.load_state_dict(best_state)


def schedule(optimizer: torch.optim.Optimizer, settings: Settings, steps: int) -> LRScheduler:
    """The learning rate over all `steps`: ours rises for a tenth of them and then falls, the published one falls."""
    if settings.recipe == PUBLISHED:
        return CosineAnnealingLR(optimizer, steps)
    return OneCycleLR(optimizer, settings.of_recipe.lr, total_steps=steps, pct_start=0.1)
