"""The adapters: a cell's vector in, a vector of `num_levels` blocks out that can be cut after any block.

`FractalAdapter` is ours: prefix j is the full vector, cut after j blocks and normalised again.
`PublishedAdapter` is the published reference, kept for comparison.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot, pad

from fractal.cli import InputError
from fractal.files import atomic_write


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


@cache
def bf16_pays(device: torch.device) -> bool:
    """Does the device multiply matrices faster in bfloat16? Twice as fast on recent CPUs, more on GPUs."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch: unknown, so no
    return device.type == "cpu" and any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


class ByteDropout(nn.Dropout):
    """Dropout whose chances on a CPU are whole 256ths: eight are cut from each random number.

    torch's own dropout draws a number per entry there, which was a sixth of a training step.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        kept = max(1, 256 - round(256 * self.p))
        numbers = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        drawn = numbers.view(torch.uint8)[: x.numel()].view(x.shape)
        keep = drawn.to(x.dtype).le_(kept - 1)  # 1 or 0; bfloat16 holds a byte exactly, and is compared faster
        return x * (keep * (256 / kept))


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
        self.noise, self.query_dim = noise, 128
        self.linear = nn.Linear(dim, self.query_dim, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), ByteDropout(dropout),
            nn.Linear(hidden, hidden), nn.GELU(), ByteDropout(dropout),
            nn.Linear(hidden, self.query_dim),
        )  # fmt: skip
        self.path_anchors = nn.Parameter(torch.randn(len(paths), self.query_dim))
        self.classes = [int(k.max()) + 1 for k in paths.T]  # per level
        self.anchors = nn.Parameter(torch.randn(sum(self.classes), scale_dim))  # one level after the other
        self.register_buffer("paths", paths)
        self.register_buffer("mean", torch.zeros(dim))  # of the inputs, and their principal axes: see fit_axes
        self.register_buffer("axes", torch.zeros(num_levels * scale_dim, dim))
        # (num_paths, classes of all levels): sums the paths through each class
        self.register_buffer("path_to_class", torch.cat([one_hot(k) for k in paths.T], 1).float(), persistent=False)
        for name, part in ("block_scale", BLOCK_SCALE), ("residual_scale", RESIDUAL_SCALE):  # (num_levels, 1)
            column = torch.tensor([*part[: num_levels - 1], part[-1]])[:, None]
            self.register_buffer(name, column, persistent=False)

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
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.training and bf16_pays(x.device)):
            hidden = self.mlp(x).float()
        query = normalize(self.linear(x) + hidden, dim=1)
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


RECIPES = ("fractal", "published", "mrl")


def build_adapter(config: dict[str, Any], classes: list[list[str]]) -> Adapter:
    """A new adapter for a checkpoint's config (recipe, dim, num_levels, scale_dim, paths) and class names per level."""
    shape = config["dim"], config["num_levels"], config["scale_dim"]
    if config["recipe"] == "published":
        return PublishedAdapter(*shape, len(classes[0]), len(classes[config["num_levels"] - 1]))
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


def check_sizes(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Raise ValueError if a config asks for sizes that none of the weights has: it may ask for gigabytes.

    Or for a recipe that there is not, whose name would be shown.
    """
    if config["recipe"] not in RECIPES:
        raise ValueError(f"there is no recipe {config['recipe']!r}")
    asked = {config["dim"], config["scale_dim"]}
    if config["recipe"] != "published":
        asked.add(sum(max(codes) + 1 for codes in zip(*config["paths"], strict=True)))
    there = {size for tensor in state.values() for size in tensor.shape}
    if config["num_levels"] not in (2, 3, 4) or not asked <= there:
        raise ValueError(f"sizes {sorted(asked)} are not those of the weights")


def load(path: str | Path, device: torch.device | str = "cpu") -> tuple[Adapter, dict[str, Any]]:
    """-> the adapter, ready for use on `device`, and the whole checkpoint. Runs no code from the file.

    Raises InputError for a file that is missing or is not a checkpoint of train.py.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; make one with train.py")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        check_sizes(checkpoint["config"], checkpoint["state"])
        adapter = build_adapter(checkpoint["config"], checkpoint["classes"])
        adapter.load_state_dict(checkpoint["state"])
    except Exception as error:  # whatever a damaged file makes torch and its modules raise
        raise InputError(f"{path}: not a checkpoint of train.py, or damaged; train it again") from error
    return adapter.to(device).eval(), checkpoint
