"""The core idea: prefix j of the vector is trained, in every step, on the labels of level j.

So the first block has to tell the systems apart and gains nothing from telling more; the second block is added to
split the systems into lineages, and so on. Two losses, both softmaxes over cosines:

  paths        which path of the hierarchy is it? This trains the probabilities that the blocks are made of.
  prototypes   which class of level j is it, by prefix j alone? One learned unit vector per class.

Training rows are balanced over subtypes, cells at large are not. So the logits are shifted by how much more frequent a
class is among the training rows than in the whole file (Menon et al. 2021, logit adjustment); without the shift, which
is how the vectors are made, they then expect the frequencies of the file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fractal.model.adapter import TAU, FractalAdapter

SMOOTHING = 0.05  # of the class targets: labels are noisy


@dataclass(frozen=True)
class TrainingRows:
    """The n rows that an objective takes its batches from, on the training device, and what is known of their paths.

    A path is a class per block of the adapter, see `FractalAdapter`. Of several processes each has other rows.
    """

    x: Tensor  # (n, dim) float32
    path: Tensor  # (n,) int64: the number of each row's path
    frequency: Tensor  # (num_paths,) float32: how many cells of the whole file are on each path
    sampled: Tensor  # (num_paths,) int64: how many training rows are, those of all processes together
    lineages: Tensor  # (num_paths, num_levels) int64: the label of a path's rows at the level of each block
    names: list[tuple[str, ...]]  # of these labels


class PrefixObjective(nn.Module):
    """The loss of a batch of the training rows.

    The prototypes are weights of the loss, not of the adapter: nothing of them is saved.
    """

    def __init__(self, adapter: FractalAdapter, rows: TrainingRows) -> None:
        super().__init__()
        self.x, self.path = rows.x, rows.path
        sampled, device = rows.sampled.float(), rows.x.device
        # The softmaxes: one over the paths, and one over the classes of each level.
        members = [torch.eye(len(sampled), device=device), *adapter.path_to_class.split(adapter.classes, 1)]
        self.logit_adjustment = [log_ratio(sampled @ member, rows.frequency @ member) for member in members]
        smoothed = [(1 - SMOOTHING) * member + SMOOTHING / member.shape[1] for member in members]
        self.targets = torch.cat(smoothed, 1)  # (num_paths, paths and all classes): the targets of a cell of a path
        levels = torch.arange(adapter.num_levels, device=device)
        level = levels.repeat_interleave(torch.tensor(adapter.classes, device=device))
        # blocks up to the class's level
        self.reach = (levels <= level[:, None]).repeat_interleave(adapter.scale_dim, 1)
        self.prototypes = nn.Parameter(torch.randn(self.reach.shape, device=device))

    def forward(self, adapter: FractalAdapter, rows: Tensor) -> Tensor:
        """The loss of the training rows with these numbers (b,)."""
        logits, _, blocks = adapter(self.x.index_select(0, rows))  # one forward pass serves all prefixes
        products = blocks.flatten(1) @ normalize(self.prototypes * self.reach, dim=1).T / TAU
        lengths = blocks.square().sum(2).cumsum(1).sqrt()  # (b, num_levels): of the prefixes
        per_level = zip(products.split(adapter.classes, 1), lengths.split(1, 1), strict=True)
        scores = [logits, *(product / length for product, length in per_level)]
        shifted = [(score + shift).log_softmax(1) for score, shift in zip(scores, self.logit_adjustment, strict=True)]
        return -(torch.cat(shifted, 1) * self.targets.index_select(0, self.path[rows])).sum() / len(rows)


def log_ratio(sampled: Tensor, natural: Tensor) -> Tensor:
    """log of the share of each class in one count over its share in another, both (k,); half a cell is added to all."""
    return (sampled + 0.5).log().log_softmax(0) - (natural + 0.5).log().log_softmax(0)
