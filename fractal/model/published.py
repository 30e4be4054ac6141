"""The published reference, kept faithfully for comparison: its adapter, and its loss.

Two paths through `PublishedAdapter`. The full path sees the whole vector with blocks dropped at random, on the leaf
labels. The prefix path draws a length per cell, and then the whole batch follows the most frequent one: length 1 in
97 of 100 steps, so longer prefixes are hardly trained. That is how the published code does it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad, relu

from fractal.model.adapter import TAU, Adapter, Output
from fractal.model.objective import TrainingRows

MARGIN, MARGIN_WEIGHT = 0.2, 0.5
PREFIX_WEIGHT = 0.6
KEEP = {2: (0.95, 0.7), 3: (0.95, 0.85, 0.7), 4: (0.95, 0.9, 0.8, 0.7)}  # a block is kept with this probability
LENGTH = {2: (0.6, 0.4), 3: (0.45, 0.35, 0.2), 4: (0.4, 0.3, 0.2, 0.1)}  # a prefix length is drawn with this one


class PublishedAdapter(Adapter):
    """One pre-norm transformer block, shared by the scales and applied to a sequence of one token.

    Its full vector passes a LayerNorm that its prefixes do not, so a prefix is not a cut of the full vector.
    """

    def __init__(self, dim: int, num_levels: int, scale_dim: int, num_top: int, num_leaf: int) -> None:
        super().__init__(dim, num_levels, scale_dim)
        total = num_levels * scale_dim
        self.heads = 8 if dim % 8 == 0 else 1
        self.input = nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        # Attention over one token: the softmax over one key is 1, so only the value and output projections are
        # left, and dropout on the attention weights drops whole heads.
        self.value, self.attended = nn.Linear(dim, dim), nn.Linear(dim, dim)
        bound = (6 / (4 * dim)) ** 0.5  # as nn.MultiheadAttention starts its (3 dim, dim) input projection
        nn.init.uniform_(self.value.weight, -bound, bound)
        nn.init.zeros_(self.value.bias)
        nn.init.zeros_(self.attended.bias)
        self.drop_heads = nn.Dropout1d(0.1)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim))
        self.scales = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, scale_dim)) for _ in range(num_levels)
        )
        self.norm_full = nn.LayerNorm(total)
        self.top = nn.Sequential(nn.LayerNorm(total), nn.Linear(total, num_top))
        self.leaf = nn.Sequential(nn.LayerNorm(total), nn.Linear(total, num_leaf))

    @staticmethod
    def shapes(config: dict[str, Any], classes: list[list[str]]) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights that decide how much memory an adapter of this config takes."""
        dim, total = config["dim"], config["num_levels"] * config["scale_dim"]
        top, leaf = config["block_levels"][0], config["block_levels"][-1]
        return {
            "input.weight": (dim, dim),
            "norm_full.weight": (total,),
            "top.1.weight": (len(classes[top]), total),
            "leaf.1.weight": (len(classes[leaf]), total),
        }

    def blocks(self, x: Tensor) -> Tensor:
        first = h = self.input(x)
        blocks = []
        for i, scale in enumerate(self.scales):
            values = self.value(self.norm1(h)).unflatten(1, (self.heads, -1))  # (n, heads, dim / heads)
            h = h + self.attended(self.drop_heads(values).flatten(1))
            h = h + self.ffn(self.norm2(h)) + first * (0.1 / (1 + 0.3 * i))
            blocks.append(scale(h))
        return torch.stack(blocks, 1)

    def forward(self, x: Tensor) -> Output:
        blocks = self.blocks(x)
        logits = self.leaf(self.full(blocks))
        return Output(logits, logits.softmax(1), blocks)

    def full(self, blocks: Tensor) -> Tensor:
        return normalize(self.norm_full(blocks.flatten(1)), dim=1)

    def padded_prefix(self, blocks: Tensor, j: int) -> Tensor:
        """The first j blocks, of length 1, with zeros behind: what the heads are given in training."""
        return normalize(pad(blocks[:, :j].flatten(1), (0, (self.num_levels - j) * self.scale_dim)), dim=1)


class PublishedObjective(nn.Module):
    """The loss of a batch of the training rows; it has no weights."""

    def __init__(self, adapter: PublishedAdapter, rows: TrainingRows) -> None:
        super().__init__()
        self.x, self.labels = rows.x, rows.lineages[rows.path]
        self.keep = torch.tensor(KEEP[adapter.num_levels], device=rows.x.device)
        self.length = torch.tensor(LENGTH[adapter.num_levels])  # on the CPU: MPS has no mode()
        # Per level: rows sorted by class, where each class starts, its size, and each row's position in its class.
        self.sorted = [column.argsort(stable=True) for column in self.labels.T]
        self.size = [column.bincount() for column in self.labels.T]
        self.start = [size.cumsum(0) - size for size in self.size]
        self.position = [
            order.argsort() - start[column]
            for order, start, column in zip(self.sorted, self.start, self.labels.T, strict=True)
        ]

    def positives(self, rows: Tensor, level: int) -> Tensor:
        """For each row another row of its class at `level`, drawn evenly; itself if it is the only one. (b,)"""
        label = self.labels[rows, level]
        others = self.size[level][label] - 1
        step = (torch.rand(len(rows), device=rows.device) * others).long() + 1
        position = (self.position[level][rows] + step) % self.size[level][label]
        return self.sorted[level][self.start[level][label] + position]

    def forward(self, adapter: PublishedAdapter, rows: Tensor) -> Tensor:
        """The loss of the training rows with these numbers (b,)."""
        n = len(rows)
        mask = (torch.rand(n, len(self.keep), device=rows.device) < self.keep).float()
        lengths = torch.multinomial(self.length, n, replacement=True) + 1
        j = int(lengths.mode().values)
        leaf_rows, prefix_rows = self.positives(rows, -1), self.positives(rows, j - 1)
        # One pass instead of four; dropout differs between the four all the same.
        blocks = adapter.blocks(self.x[torch.cat([rows, leaf_rows, rows, prefix_rows])]).chunk(4)
        return published_loss(adapter, blocks, self.labels[rows], mask, j)


def published_loss(
    adapter: PublishedAdapter, blocks: tuple[Tensor, ...], labels: Tensor, mask: Tensor, j: int
) -> Tensor:
    """The loss, once everything random is drawn.

    blocks: of the anchors, their leaf positives, the anchors again, their positives at level j; each
    (b, num_levels, scale_dim). labels (b, num_levels), mask (b, num_levels) of 0 and 1, j the prefix length.
    """
    anchor, leaf_positive, again, prefix_positive = blocks
    leaf = labels[:, -1]
    full = adapter.full(anchor * mask[:, :, None])
    loss = info_nce(full, adapter.full(leaf_positive)) + MARGIN_WEIGHT * margin(full, leaf)
    loss = loss + cross_entropy(adapter.leaf(full), leaf)

    prefix = adapter.padded_prefix(again, j)
    side = info_nce(prefix, adapter.full(prefix_positive)) + MARGIN_WEIGHT * margin(prefix, labels[:, j - 1])
    if j == 1:
        side = side + cross_entropy(adapter.top(prefix), labels[:, 0])
    elif j == adapter.num_levels:
        side = side + cross_entropy(adapter.leaf(prefix), leaf)
    return loss + PREFIX_WEIGHT * side


def info_nce(anchor: Tensor, positive: Tensor) -> Tensor:
    """Each anchor against the positives of the whole batch, of which only its partner is right (van den Oord 2018)."""
    return cross_entropy(anchor @ positive.T / TAU, torch.arange(len(anchor), device=anchor.device))


def margin(z: Tensor, target: Tensor) -> Tensor:
    """Mean similarity to other classes should stay below that to the cell's class by the margin."""
    similarity = z @ z.T
    same = target[:, None] == target[None, :]
    positive = same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    usable = positive.any(1) & ~same.all(1)
    if not bool(usable.any()):
        return z.sum() * 0

    def mean(mask: Tensor) -> Tensor:
        return (similarity * mask).sum(1) / mask.sum(1).clamp(min=1)

    return relu(mean(~same) - mean(positive) + MARGIN)[usable].mean()
