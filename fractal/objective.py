"""The core idea: prefix j of the vector is trained, in every step, on the labels of level j.

So the first block has to tell the systems apart and gains nothing from telling more; the second block is added to
split the systems into lineages, and so on. Each prefix is its own vector of length 1, and each gets two losses:

  prototypes   a cosine softmax over one learned unit vector per class: which class is it?
  contrast     a supervised contrastive loss inside the batch (Khosla et al. 2020): cells of a class close together

The `mrl` control is the same network with the same losses, but every prefix is trained on the leaf labels, which is
what Matryoshka representation learning does (Kusupati et al. 2022).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fractal.adapter import Adapter

TAU = 0.07  # temperature of both softmaxes
SMOOTHING = 0.05  # of the class targets: labels are noisy
CONTRAST = 0.5  # weight of the contrast beside the prototypes


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
    """The loss of a batch: the mean over the prefixes of prototypes + contrast.

    x (n, dim) and labels (n, 4) are all training rows, on the training device. The prototypes are weights of the
    loss, not of the adapter: nothing of them is saved.
    """

    def __init__(self, adapter: Adapter, x: Tensor, labels: Tensor, recipe: str) -> None:
        super().__init__()
        self.x, self.labels, self.scale_dim = x, labels, adapter.scale_dim
        self.levels = trained_levels(labels, adapter.num_levels, recipe)
        self.prototypes = nn.ParameterList(
            torch.randn(int(labels[:, level].max()) + 1, (j + 1) * adapter.scale_dim)
            for j, level in enumerate(self.levels)
        ).to(x.device)

    def forward(self, adapter: Adapter, rows: Tensor) -> Tensor:
        """The loss of the training rows with these numbers (b,)."""
        blocks = adapter.blocks(self.x[rows])  # one forward pass serves all prefixes
        loss = blocks.new_zeros(())
        for j, (level, prototypes) in enumerate(zip(self.levels, self.prototypes, strict=True)):
            prefix = normalize(blocks[:, : j + 1].flatten(1), dim=1)
            target = self.labels[rows, level]
            logits = prefix @ normalize(prototypes, dim=1).T / TAU
            loss = loss + cross_entropy(logits, target, label_smoothing=SMOOTHING)
            loss = loss + CONTRAST * supervised_contrast(prefix, target, len(prototypes))
        return loss / len(self.levels)


def supervised_contrast(z: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Mean over the anchors of -log softmax at their positives; unit vectors z (b, d), classes target (b,).

    An anchor without a second cell of its class in the batch takes no part. The mean similarity to the positives
    comes from class sums, so only the softmax's denominator needs the (b, b) similarities.
    """
    sums = z.new_zeros(num_classes, z.shape[1]).index_add_(0, target, z)
    count = target.bincount(minlength=num_classes)[target] - 1  # positives of each anchor
    attract = ((z * sums[target]).sum(1) - 1) / count.clamp(min=1)  # less z times itself, which is 1
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    repel = (z @ z.T / TAU).masked_fill(itself, -1e4).logsumexp(1)
    used = count > 0
    return ((repel - attract / TAU) * used).sum() / used.sum().clamp(min=1)
