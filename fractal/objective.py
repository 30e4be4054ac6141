"""The core idea: prefix j of the vector is trained, in every step, on the labels of level j.

So the first block has to tell the systems apart and gains nothing from telling more; the second block is added to
split the systems into lineages, and so on. Two losses, both softmaxes over cosines:

  paths        which path of the hierarchy is it? This trains the probabilities that the blocks are made of.
  prototypes   which class of level j is it, by prefix j alone? One learned unit vector per class.

Training rows are balanced over subtypes, cells at large are not. So the logits are shifted by how much more frequent a
class is among the training rows than in the whole file (Menon et al. 2021, logit adjustment); without the shift, which
is how the vectors are made, they then expect the frequencies of the file.

The `mrl` control is the same network with the same losses, but every prefix is trained on the leaf labels, which is
what Matryoshka representation learning does (Kusupati et al. 2022).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fractal.adapter import TAU, FractalAdapter, cut

SMOOTHING = 0.05  # of the class targets: labels are noisy


def trained_levels(labels: Tensor, num_levels: int, recipe: str) -> list[int]:
    """Which level each prefix is trained on: `fractal` its own, `mrl` the leaf, the last of the `num_levels`.

    A level of which the training rows hold one class only can't be learnt; its prefix takes the next one that can
    (an atlas of blood has one system, so its first prefix already tells the lineages apart).
    """
    learnable = [k for k in range(labels.shape[1]) if len(labels[:, k].unique()) > 1]
    if not learnable:
        raise ValueError("all training rows are of one type")
    own = [num_levels - 1 if recipe == "mrl" else k for k in range(num_levels)]
    return [next((k for k in learnable if k >= level), learnable[-1]) for level in own]


class PrefixObjective(nn.Module):
    """The loss of a batch. x (n, dim) are all training rows, on the training device.

    path (n,) is the number of each row's path among the adapter's, frequency (num_paths,) how many cells of the file
    are on each path. The prototypes are weights of the loss, not of the adapter: nothing of them is saved.
    """

    def __init__(self, adapter: FractalAdapter, x: Tensor, path: Tensor, frequency: Tensor) -> None:
        super().__init__()
        self.x, self.path = x, path
        sampled, natural = path.bincount(minlength=len(frequency)).float(), frequency.float()
        self.shift, self.class_shift = log_ratio(sampled, natural), []
        self.prototypes = nn.ParameterList()
        for j, classes in enumerate(adapter.paths.T):
            total = torch.zeros(2, int(classes.max()) + 1, device=x.device)
            total.index_add_(1, classes, torch.stack([sampled, natural]))
            self.class_shift.append(log_ratio(*total))
            self.prototypes.append(torch.randn(total.shape[1], (j + 1) * adapter.scale_dim, device=x.device))

    def forward(self, adapter: FractalAdapter, rows: Tensor) -> Tensor:
        """The loss of the training rows with these numbers (b,)."""
        logits, blocks = adapter.logits_and_blocks(self.x[rows])  # one forward pass serves all prefixes
        path = self.path[rows]
        loss = cross_entropy(logits + self.shift, path, label_smoothing=SMOOTHING)
        for j, (prototypes, shift) in enumerate(zip(self.prototypes, self.class_shift, strict=True)):
            target = adapter.paths[path, j]
            logits = cut(blocks, j + 1) @ normalize(prototypes, dim=1).T / TAU + shift
            loss = loss + cross_entropy(logits, target, label_smoothing=SMOOTHING)
        return loss


def log_ratio(sampled: Tensor, natural: Tensor) -> Tensor:
    """log of the share of each class in one count over its share in another, both (k,); half a cell is added to all."""
    return (sampled + 0.5).log().log_softmax(0) - (natural + 0.5).log().log_softmax(0)
