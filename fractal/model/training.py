"""Training: the loop over epochs, what it averages, how it chooses an epoch, and what a stopped run leaves."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm.auto import tqdm

from fractal.base.errors import InputError
from fractal.data.atlas import LabelledVectors
from fractal.model.adapter import Adapter, embed
from fractal.model.distributed import ALONE, Group, ProcessLostError, peers
from fractal.model.preparation import check_settings, describe, prepare
from fractal.model.recipes import PUBLISHED, Counts, Settings

WEIGHT_DECAY = 0.01
CLIP = 1.0  # norm of the gradient
EMA_DECAY = 0.98  # the moving average of the weights looks back about 50 steps
VAL_QUERIES, VAL_BANK = 2_000, 10_000  # enough for a standard error of .01, and a third of a second
Accuracy = Callable[[Tensor, Tensor, Tensor, Tensor], list[float]]  # see `Validator`


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

    def training(self, settings: Settings) -> dict[str, Any]:
        """For the checkpoint: the settings, and what was done."""
        recipe = settings.of_recipe
        return {
            "epochs": settings.epochs,
            "epochs_done": self.epochs_done,
            "best_epoch": self.best_epoch,
            "partial": self.stopped is not None,
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
            adapter, config, objective = prepare(x, y, train, counts, settings, source, group)
            print(describe(config))
            fitted = Fitted(adapter, config, train.classes)
            trainer = Trainer(adapter, objective, settings, len(y), group)
            validate = None
            if len(val_y):
                block_levels, own_level = config["block_levels"], settings.recipe.own_level
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
        """Row numbers of one epoch: shuffled, cut to full batches, repeated until there are `min_steps` of them."""
        rows, n, size = list[Tensor](), self.num_rows, self.batch_size
        while len(rows) < self.recipe.min_steps or not rows:
            order = torch.randperm(n)
            rows += order.split(size) if n <= size else order[: n - n % size].split(size)
        return rows

    def step(self, rows: Tensor) -> Tensor:
        """Learn from the rows of this process with these numbers (b,) -> their loss."""
        self.optimizer.zero_grad()
        with peers():  # the forward pass, too: there DistributedDataParallel sends the buffers
            loss = self.loss(rows)
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
        return self.group.total(total).item() / self.group.size / self.steps


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
