"""The adapters: a cell's vector in, a vector of `num_levels` blocks out that can be cut after any block.

`FractalAdapter` is ours: prefix j is the full vector, cut after j blocks and normalised again.
`PublishedAdapter` is the published reference, kept for comparison.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from fractal.cli import InputError
from fractal.files import atomic_write
from fractal.recipes import RECIPES

MAX_LEVELS = 6
MAX_GROWTH = 32  # a loaded adapter's largest matrix, in sizes of its weights; 5,000 types at 4 levels need 21
QUERY_DIM = 128


def truncate_blocks(blocks: Tensor, j: int) -> Tensor:
    """Prefix j: the first j of the blocks (n, num_levels, scale_dim) -> (n, j * scale_dim), of length 1."""
    return normalize(blocks[:, :j].flatten(1), dim=1)


class Adapter(nn.Module):
    """What both have in common. Inputs are (n, dim) float32, blocks (n, num_levels, scale_dim)."""

    def __init__(self, dim: int, num_levels: int, scale_dim: int) -> None:
        super().__init__()
        self.dim, self.num_levels, self.scale_dim = dim, num_levels, scale_dim

    def blocks(self, x: Tensor) -> Tensor:
        return self.logits_and_blocks(x)[1]

    def logits_and_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, dim) -> scores of the finest classes that it knows (n, classes), before the softmax, and the blocks."""
        raise NotImplementedError

    def full(self, blocks: Tensor) -> Tensor:
        """Blocks -> the full vector (n, num_levels * scale_dim), of length 1."""
        return truncate_blocks(blocks, self.num_levels)

    def encode(self, x: Tensor) -> Tensor:
        """(n, dim) -> the full vector."""
        return self.full(self.blocks(x))

    def prefix(self, x: Tensor, j: int) -> Tensor:
        """(n, dim) -> the first j blocks (n, j * scale_dim), of length 1. j = 1 tells the system."""
        return truncate_blocks(self.blocks(x), j)


TAU = 0.07  # temperature of cosine softmaxes
# Per block; the last block takes the last entry, whatever the number of levels. Chosen on simulated atlases of other
# seeds than those reported, so that each level is best separated by its own prefix.
BLOCK_SCALE = (2.0, 0.8, 1.6, 1.0)  # length: the first weighs so much that systems stay apart in the full vector
RESIDUAL_SCALE = (
    0.1,
    0.25,
    0.4,
    0.6,
)  # length of the part that shows the input itself, beside 1 of what the classes dictate
AXES_ROWS = 100_000  # training rows that the principal axes are found in: 50 MB at 128-d
ORDER = 28.0  # divides the log-probabilities: what they add ranges over half a class's probability


class FractalAdapter(Adapter):
    """Block j says which class of level j a cell belongs to, and hardly more.

    A perceptron with two hidden layers and a linear map beside it tell how likely each path of the hierarchy is: a
    cosine softmax over one learned unit vector per path. Summed over the paths through a class, that is the class's
    probability, so that all levels agree. Block j is the mean of the classes' anchors (learned unit vectors), weighted
    with these probabilities, and a little of their logarithms, which keep apart the cells of one class.

    A smaller part of each block shows the input itself: the direction of its first `scale_dim` principal components in
    the last block, of the next ones in the block before, and so on. The full vector thus also shows what the labels
    don't name, so neighbours stay right where the classifier has not seen such cells; in the first blocks, which get
    what varies least, cells of one class are not put in the order of the classifier's certainty.

    Labels are noisy and small atlases have 2,000 cells, so training is held back twice: by dropout, and by noise on
    the input, `noise` long beside a vector of length 1, which teaches that cells so close together are the same.

    paths (num_paths, num_levels): the class of each path at the level that block j tells. 0.4 M weights at 128-d,
    4 x 32 and 203 subtypes.
    """

    paths: Tensor
    mean: Tensor
    axes: Tensor
    path_to_class: Tensor
    block_scale: Tensor
    residual_scale: Tensor

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
        self.register_buffer("paths", paths)
        self.register_buffer("mean", torch.zeros(dim))  # of the inputs, and their principal axes: see fit_axes
        self.register_buffer("axes", torch.zeros(num_levels * scale_dim, dim))
        # (num_paths, classes of all levels): sums the paths through each class
        members = [torch.eye(count).index_select(0, k) for count, k in zip(self.classes, paths.T, strict=True)]
        self.register_buffer("path_to_class", torch.cat(members, 1), persistent=False)
        for name, part in ("block_scale", BLOCK_SCALE), ("residual_scale", RESIDUAL_SCALE):  # (num_levels, 1)
            before = [part[min(j, len(part) - 2)] for j in range(num_levels - 1)]  # of more than 4, middle ones repeat
            column = torch.tensor([*before, part[-1]])[:, None]
            self.register_buffer(name, column, persistent=False)

    @staticmethod
    def asked(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights that decide how much memory an adapter of this config takes."""
        dim, num_levels, scale_dim = config["dim"], config["num_levels"], config["scale_dim"]
        columns = list(zip(*config["paths"], strict=True))
        if len(columns) != num_levels or any(type(k) is not int or k < 0 for column in columns for k in column):
            raise ValueError("paths are not rows of class numbers, one per block")
        return {
            "linear.weight": (QUERY_DIM, dim),
            "path_anchors": (len(config["paths"]), QUERY_DIM),
            "anchors": (sum(max(column) + 1 for column in columns), scale_dim),
            "axes": (num_levels * scale_dim, dim),
        }

    def fit_axes(self, x: Tensor) -> None:
        """Take mean and principal axes from the training rows x (n, dim). Axes that these don't have stay zero."""
        x = normalize(x[:AXES_ROWS].cpu().double(), dim=1)
        self.mean.copy_(x.mean(0))
        axes = torch.zeros(len(self.axes), self.dim)
        covariance = torch.atleast_2d(torch.cov(x.T, correction=0))
        components = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)  # most varying first
        n = min(len(axes), *x.shape)
        axes[:n] = components[:n]
        self.axes.copy_(axes.view(self.num_levels, -1, self.dim).flip(0).flatten(0, 1))

    def logits_and_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, dim) -> logits of the paths (n, num_paths), and the blocks.

        No gradient goes from the blocks into the probabilities, else the blocks' losses would blur them.
        """
        unit = normalize(x, dim=1)
        if self.training:
            unit = unit + self.noise / self.dim**0.5 * torch.randn_like(unit)
        x = unit * self.dim**0.5  # entries of about 1, whatever the length of the vectors
        query = normalize(self.linear(x) + self.mlp(x), dim=1)
        logits = query @ normalize(self.path_anchors, dim=1).T / TAU
        probability = logits.detach().softmax(1) @ self.path_to_class  # of the classes of all levels
        order = (probability + 1e-6).log() / ORDER
        levels = (part.split(self.classes, -1) for part in (probability, order, normalize(self.anchors, dim=1).T))
        told = [(p + o - o.mean(1, keepdim=True)) @ anchors.T for p, o, anchors in zip(*levels, strict=True)]
        shown = ((unit - self.mean) @ self.axes.T).unflatten(1, (self.num_levels, -1))
        return logits, self.block_scale * (torch.stack(told, 1) + self.residual_scale * normalize(shown, dim=2))


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
    def asked(config: dict[str, Any], classes: list[list[str]]) -> dict[str, tuple[int, ...]]:
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

    def logits_and_blocks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = self.blocks(x)
        return self.leaf(self.full(blocks)), blocks

    def full(self, blocks: Tensor) -> Tensor:
        return normalize(self.norm_full(blocks.flatten(1)), dim=1)

    def padded_prefix(self, blocks: Tensor, j: int) -> Tensor:
        """The first j blocks, of length 1, with zeros behind: what the heads are given in training."""
        return normalize(pad(blocks[:, :j].flatten(1), (0, (self.num_levels - j) * self.scale_dim)), dim=1)


def build_adapter(config: dict[str, Any], classes: list[list[str]]) -> Adapter:
    """A new adapter for a checkpoint's config and its class names per level of the file.

    config: recipe, dim, num_levels, scale_dim, block_levels (the level of the file that each block stands for) and,
    but for `published`, paths (num_paths, num_levels).
    """
    shape = config["dim"], config["num_levels"], config["scale_dim"]
    if config["recipe"] == "published":
        top, leaf = config["block_levels"][0], config["block_levels"][-1]
        return PublishedAdapter(*shape, len(classes[top]), len(classes[leaf]))
    return FractalAdapter(*shape, torch.tensor(config["paths"]))


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU. Raises InputError for a device that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise InputError(f"--device {name}: this machine, or this build of torch, has none; try --device auto")
    return torch.device(name)


@torch.inference_mode()
def embed(adapter: Adapter, vectors: Tensor, batch: int = 2_048) -> list[Tensor]:
    """(n, dim), on the adapter's device -> prefix 1, prefix 2, ... and last the full vector, each (n, its dims)."""
    adapter.eval()
    parts = []
    for x in vectors.split(batch):
        blocks = adapter.blocks(x)
        parts.append([*(truncate_blocks(blocks, j) for j in range(1, adapter.num_levels)), adapter.full(blocks)])
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def save(path: str | Path, adapter: Adapter, config: dict[str, Any], classes: list[list[str]], **facts: Any) -> None:
    """Write a checkpoint of plain containers and tensors, so that `torch.load(weights_only=True)` reads it.

    `facts`: what else belongs to the run (split, versions, validation scores).
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in adapter.state_dict().items()}
    with atomic_write(path) as part, open(part, "wb") as file:
        torch.save({"config": config, "classes": classes, "state": state, **facts}, file)


def check(checkpoint: dict[str, Any]) -> None:
    """Raise ValueError or KeyError for a checkpoint that is not train.py's, before any memory is taken for it.

    A damaged or hostile config may ask for gigabytes, so all that it asks for must be there in the weights.
    """
    config, classes, state = checkpoint["config"], checkpoint["classes"], checkpoint["state"]
    levels, block_levels = config["levels"], config["block_levels"]
    if config["recipe"] not in RECIPES:  # its name would be shown
        raise ValueError(f"there is no recipe {config['recipe']!r}")
    if not all(isinstance(checkpoint[name], dict) for name in ("training", "versions", "split")):
        raise ValueError("no training, versions or split")
    if not isinstance(checkpoint["validation"], dict | None):
        raise ValueError("validation is not a table of scores")
    if not all(isinstance(names, list) for names in (levels, block_levels, classes, *classes)):
        raise ValueError("levels and classes are not lists")
    if not all(isinstance(name, str) for names in (levels, *classes) for name in names):
        raise ValueError("names are not text")
    if not 2 <= len(levels) == len(classes) <= MAX_LEVELS:
        raise ValueError("levels are not 2 to 6, each with its classes")
    if not 2 <= config["num_levels"] == len(block_levels) <= MAX_LEVELS or not {*block_levels} <= {*range(len(levels))}:
        raise ValueError("blocks are not 2 to 6, each of a level")
    for tensor in state.values():  # a view of one number may claim any shape
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise ValueError("a weight is not all there")
    asked = PublishedAdapter.asked(config, classes) if config["recipe"] == "published" else FractalAdapter.asked(config)
    if other := [name for name, shape in asked.items() if tuple(state[name].shape) != shape]:
        raise ValueError(f"sizes of {', '.join(other)} are not those of the config")
    if config["recipe"] != "published":
        matrix = 4 * len(config["paths"]) * asked["anchors"][0]  # bytes of path_to_class
        if matrix > MAX_GROWTH * sum(tensor.nbytes for tensor in state.values()):
            raise ValueError("too many paths and classes for so few weights")


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[Adapter, dict[str, Any]]:
    """-> the adapter, ready for use on `device`, and the whole checkpoint. Runs no code from the file.

    Raises InputError for a file that is missing or is not a checkpoint of this version's train.py.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; make one with train.py")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        check(checkpoint)
        adapter = build_adapter(checkpoint["config"], checkpoint["classes"])
        adapter.load_state_dict(checkpoint["state"])
    except Exception as error:  # whatever a damaged file makes torch and its modules raise
        raise InputError(
            f"{path}: not a checkpoint of train.py, or damaged, or of an older version; train it again"
        ) from error
    return adapter.to(device).eval(), checkpoint
