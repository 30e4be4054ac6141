"""The adapters: a cell's vector in, a vector of `num_levels` blocks out that can be cut after any block.

`FractalAdapter` is ours: prefix j is the full vector, cut after j blocks and normalised again. The published one, kept
for comparison, is in published.py; checkpoint.py builds, saves and loads both.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from fractal.base.errors import InputError

QUERY_DIM = 128


def truncate_blocks(blocks: Tensor, j: int) -> Tensor:
    """Prefix j: the first j of the blocks (n, num_levels, scale_dim) -> (n, j * scale_dim), of length 1."""
    return normalize(blocks[:, :j].flatten(1), dim=1)


class Output(NamedTuple):
    """What an adapter makes of n cells. Its classes are the finest that it knows."""

    logits: Tensor  # (n, classes), before the softmax
    probability: Tensor  # (n, classes)
    blocks: Tensor  # (n, num_levels, scale_dim)


class Adapter(nn.Module):
    """What both have in common: (n, dim) float32 -> `Output`."""

    def __init__(self, dim: int, num_levels: int, scale_dim: int) -> None:
        super().__init__()
        self.dim, self.num_levels, self.scale_dim = dim, num_levels, scale_dim

    def forward(self, x: Tensor) -> Output:
        raise NotImplementedError

    def blocks(self, x: Tensor) -> Tensor:
        return self(x).blocks

    def full(self, blocks: Tensor) -> Tensor:
        """Blocks -> the full vector (n, num_levels * scale_dim), of length 1."""
        return truncate_blocks(blocks, self.num_levels)

    def prefixes(self, blocks: Tensor) -> list[Tensor]:
        """Blocks -> prefix 1, prefix 2, ... and last the full vector, each (n, its dims)."""
        return [*(truncate_blocks(blocks, j) for j in range(1, self.num_levels)), self.full(blocks)]

    def encode(self, x: Tensor) -> Tensor:
        """(n, dim) -> the full vector."""
        return self.full(self.blocks(x))


TAU = 0.07  # temperature of cosine softmaxes
# Per block; the last block takes the last entry, whatever the number of levels. All constants here were chosen on other
# draws, studies and simulated atlases than those reported.
BLOCK_SCALE = (1.5, 1.0, 1.4, 0.8)  # length of what the classes dictate: the first weighs most, so systems stay apart
RESIDUAL_SCALE = (1.5, 1.5, 2.5, 3.0)  # of the slice of the whitened cell; all slices together have length 1
# That was chosen at 128 numbers. Cosines of unrelated cells scatter by 1 / sqrt(dim), so a narrower input shows less:
# scale squared / sqrt(dim), which is how far chance moves a product of two vectors, is kept.
RESIDUAL_DIM = 128
SHARPNESS = (2.0, 2.0, 2.0, 1.0)  # power of the probabilities: coarse levels decide, subtypes keep theirs
STATISTICS_ROWS = 100_000  # training rows that `fit_statistics` looks at: 100 MB at 128-d
SHRINKAGE = 0.3  # of the covariance within subtypes towards a ball, which small atlases need
MEANS_SHARE = 0.3  # of the probabilities, that of the class means; the rest is the network's
MEANS_TEMPERATURE = 2.0  # of the class means: the numbers of a cell are not independent witnesses
TYPICAL = 0.95  # share of the training cells that lie within the typical distance from the nearest class mean


def per_block(part: Sequence[float], num_levels: int) -> nn.Buffer:
    """(num_levels, 1): the last block takes the last number; of more than 4 levels the middle ones repeat."""
    before = [part[min(j, len(part) - 2)] for j in range(num_levels - 1)]
    return nn.Buffer(torch.tensor([*before, part[-1]])[:, None], persistent=False)


class FractalAdapter(Adapter):
    """Block j says which class of level j a cell belongs to, and shows a slice of the cell itself.

    Whitening. All work is done in axes in which the cells of one subtype vary alike in all directions, be it by study
    or by chance (`fit_statistics`; nothing is trained). Distances there count what tells types apart, in studies and
    for types that training never saw as well.

    Classes. How likely is each path of the hierarchy? Two opinions are averaged. A perceptron, with a linear map beside
    it, ends in a cosine softmax over one learned unit vector per path: it knows cells as in training best. The
    distances to the class means (a linear discriminant) carry over better to studies that training never saw. The
    farther a cell is from all class means, the less sure both are taken to be, else they would squeeze cells of unseen
    types into known ones. Summed over the paths through a class, that is the class's probability, so that all levels
    agree. Block j is the mean of the classes' anchors (learned unit vectors), weighted with these probabilities.

    Residual. The whitened cell, a vector of length 1, lies in slices across the blocks, the axes that vary most in the
    last one. So the full vector keeps what no label names, and cells of unseen types stay together.

    Labels are noisy and small atlases have 2,000 cells, so training is held back twice: by dropout, and by noise on
    the perceptron's input, `noise` long beside a vector of length 1, which teaches that cells so close are the same.

    paths (num_paths, num_levels): the class of each path at the level that block j tells. 0.4 M weights at 128-d,
    4 x 32 and 203 subtypes.
    """

    def __init__(
        self,
        dim: int,
        num_levels: int,
        scale_dim: int,
        paths: Tensor,
        hidden: int = 512,
        dropout: float = 0.2,
        noise: float = 0.5,
    ) -> None:
        super().__init__(dim, num_levels, scale_dim)
        self.noise = noise
        self.linear = nn.Linear(dim, QUERY_DIM, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden, QUERY_DIM),
        )  # fmt: skip
        self.path_anchors = nn.Parameter(torch.randn(len(paths), QUERY_DIM))
        self.classes = [int(k.max()) + 1 for k in paths.T]  # per level
        self.anchors = nn.Parameter(torch.randn(sum(self.classes), scale_dim))  # one level after the other
        self.paths = nn.Buffer(paths)
        # Of `fit_statistics`: mean and whitened axes, and in these the class means, their frequency, and how far
        # (squared) a typical cell is from the nearest.
        self.mean = nn.Buffer(torch.zeros(dim))
        self.axes = nn.Buffer(torch.eye(dim))
        self.class_means = nn.Buffer(torch.zeros(len(paths), dim))
        self.log_prior = nn.Buffer(torch.zeros(len(paths)))
        self.typical_distance = nn.Buffer(torch.ones(()))
        # (num_paths, classes of all levels): sums the paths through each class
        members = [torch.eye(count).index_select(0, k) for count, k in zip(self.classes, paths.T, strict=True)]
        self.path_to_class = nn.Buffer(torch.cat(members, 1), persistent=False)
        narrow = min(1.0, dim / RESIDUAL_DIM) ** 0.25
        self.block_scale = per_block(BLOCK_SCALE, num_levels)
        self.residual_scale = per_block([narrow * scale for scale in RESIDUAL_SCALE], num_levels)
        self.sharpness = per_block(SHARPNESS, num_levels)

    @staticmethod
    def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights that decide how much memory an adapter of this config takes."""
        dim, num_levels, scale_dim = config["dim"], config["num_levels"], config["scale_dim"]
        columns = list(zip(*config["paths"], strict=True))
        if len(columns) != num_levels or any(type(k) is not int or k < 0 for column in columns for k in column):
            raise ValueError("paths are not rows of class numbers, one per block")
        return {
            "linear.weight": (QUERY_DIM, dim),
            "path_anchors": (len(config["paths"]), QUERY_DIM),
            "anchors": (sum(max(column) + 1 for column in columns), scale_dim),
            "axes": (dim, dim),
            "class_means": (len(config["paths"]), dim),
        }

    def fit_statistics(self, x: Tensor, path: Tensor, frequency: Tensor) -> None:
        """Find the whitened axes and the class means of the training rows x (n, dim), on the paths path (n,) int64.

        frequency (num_paths,): how many cells of the file are on each path. The covariance within the paths is shrunk
        towards a ball (Ledoit and Wolf 2004, with a fixed weight), and the axes come in the order of the principal
        axes of x, most varying first.
        """
        x, path = normalize(x[:STATISTICS_ROWS].cpu().double(), dim=1), path[:STATISTICS_ROWS].cpu()
        mean = x.mean(0)
        x = x - mean
        size = path.bincount(minlength=len(self.paths)).clamp(min=1)[:, None]
        means = torch.zeros(len(size), self.dim, dtype=x.dtype).index_add_(0, path, x) / size
        within = x - means[path]
        covariance = within.T @ within / len(x)
        ball = covariance.trace().clamp(min=1e-12) / self.dim * torch.eye(self.dim, dtype=x.dtype)
        variance, directions = torch.linalg.eigh(torch.lerp(covariance, ball, SHRINKAGE))
        principal = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)
        axes = directions * variance.rsqrt() @ directions.T @ principal
        self.mean.copy_(mean)
        self.axes.copy_(axes)
        self.class_means.copy_(means @ axes)
        self.log_prior.copy_((frequency.cpu() + 0.5).log().log_softmax(0))
        whitened = (x @ axes).to(self.axes)
        nearest = torch.cat([self.squared_distances(rows).amin(1) for rows in whitened.split(8_192)])
        self.typical_distance.copy_(nearest.sort().values[int(TYPICAL * (len(nearest) - 1))].clamp(min=1e-6))

    def squared_distances(self, whitened: Tensor) -> Tensor:
        """(n, dim) in the whitened axes -> (n, num_paths), to the class means."""
        products = whitened @ self.class_means.T
        return whitened.square().sum(1, keepdim=True) - 2 * products + self.class_means.square().sum(1)

    def slices(self, unit: Tensor) -> Tensor:
        """(n, dim) -> (n, num_levels, scale_dim): the first numbers in the last block, the next in the one before."""
        width = min(self.scale_dim, -(-self.dim // self.num_levels))  # numbers that a block shows
        kept = pad(unit, (0, max(0, self.num_levels * width - self.dim)))[:, : self.num_levels * width]
        return pad(kept.unflatten(1, (self.num_levels, width)).flip(1), (0, self.scale_dim - width))

    def forward(self, x: Tensor) -> Output:
        """No gradient goes from the blocks into the probability, else the blocks' losses would blur it."""
        whitened = (normalize(x, dim=1) - self.mean) @ self.axes
        unit = normalize(whitened, dim=1)
        noisy = unit + self.noise / self.dim**0.5 * torch.randn_like(unit) if self.training else unit
        noisy = noisy * self.dim**0.5  # entries of about 1
        query = normalize(self.linear(noisy) + self.mlp(noisy), dim=1)
        logits = query @ normalize(self.path_anchors, dim=1).T / TAU
        distances = self.squared_distances(whitened)
        temperature = (distances.amin(1, keepdim=True) / self.typical_distance).clamp(min=1).square()  # of a far cell
        by_network = (logits.detach() / temperature).softmax(1)
        by_means = ((self.log_prior - distances / (2 * MEANS_TEMPERATURE)) / temperature).softmax(1)
        probability = torch.lerp(by_network, by_means, MEANS_SHARE)  # of the paths
        of_classes = (probability @ self.path_to_class).split(self.classes, 1)  # one per level
        anchors = normalize(self.anchors, dim=1).split(self.classes)
        levels = zip(of_classes, self.sharpness, anchors, strict=True)
        means = [normalize((p + 1e-9) ** power, p=1.0, dim=1) @ anchor for p, power, anchor in levels]
        blocks = self.block_scale * torch.stack(means, 1) + self.residual_scale * self.slices(unit)
        return Output(logits, probability, blocks)


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU. Raises InputError for a device that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise InputError(f"--device {name}: this machine, or this build of torch, has none; try --device auto")
    return torch.device(name)


BATCH = 2_048  # cells; 4 MB of hidden units per layer, which stay in the cache


@torch.inference_mode()
def blocks_of(adapter: Adapter, vectors: Tensor, batch: int = BATCH) -> Tensor:
    """(n, dim), on the adapter's device -> (n, num_levels, scale_dim), in memory for a batch at a time."""
    adapter.eval()
    return torch.cat([adapter.blocks(x) for x in vectors.split(batch)])


@torch.inference_mode()
def embed(adapter: Adapter, vectors: Tensor, batch: int = BATCH) -> list[Tensor]:
    """(n, dim), on the adapter's device -> see `Adapter.prefixes`."""
    return adapter.prefixes(blocks_of(adapter, vectors, batch))
