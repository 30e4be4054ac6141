"""From labelled cells to a new adapter and its objective: which levels get a block, how wide it is, who is frequent."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fractal.base.errors import InputError
from fractal.data.atlas import LabelledVectors
from fractal.model.adapter import STATISTICS_ROWS, Adapter, FractalAdapter
from fractal.model.checkpoint import build_adapter
from fractal.model.distributed import ALONE, Group
from fractal.model.objective import TrainingRows
from fractal.model.published import KEEP
from fractal.model.recipes import PUBLISHED, Counts, Settings


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
        if i is not None:  # a rare type may have no training row
            frequency[i] += count
    return frequency


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
) -> tuple[Adapter, dict[str, Any], nn.Module]:
    """-> a new adapter, the config of its checkpoint, and its objective.

    y (n, levels) are the labels of all training rows, x (m, dim) the vectors of those of this process.
    """
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
    return adapter, config, recipe.objective(adapter, rows)


def describe(config: dict[str, Any]) -> str:
    """What the blocks are, and which levels have none, in one line."""
    names, block_levels = config["levels"], config["block_levels"]
    blocks = ", ".join(names[k] for k in block_levels)
    line = f"{config['num_levels']} blocks of {config['scale_dim']}: {blocks}"
    without = [name for k, name in enumerate(names[: block_levels[-1]]) if k not in block_levels]
    return line + (f"; none for {', '.join(without)}, where all training cells are of one class" if without else "")
