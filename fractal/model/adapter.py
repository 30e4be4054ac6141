"""The adapters: a cell's vector in, a vector of `num_levels` blocks out that can be cut after any block.

`FractalAdapter` is ours: prefix j is the full vector, cut after j blocks and normalised again.
`PublishedAdapter` is the published reference, kept for comparison.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from fractal.base.cli import InputError
from fractal.base.files import atomic_write
from fractal.base.storage import Place, fetch, place
from fractal.hierarchy.levels import MAX_LEVELS, MIN_LEVELS

MAX_GROWTH = 32  # a loaded adapter's largest matrix, in sizes of its weights; 5,000 types at 4 levels need 21
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

    def encode(self, x: Tensor) -> Tensor:
        """(n, dim) -> the full vector."""
        return self.full(self.blocks(x))

    def prefix(self, x: Tensor, j: int) -> Tensor:
        """(n, dim) -> the first j blocks (n, j * scale_dim), of length 1. j = 1 tells the system."""
        return truncate_blocks(self.blocks(x), j)


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

    paths: Tensor
    mean: Tensor
    axes: Tensor
    class_means: Tensor
    log_prior: Tensor
    typical_distance: Tensor
    path_to_class: Tensor
    block_scale: Tensor
    residual_scale: Tensor
    sharpness: Tensor

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
        # Of `fit_statistics`: mean and whitened axes, and in these the class means, their frequency, and how far
        # (squared) a typical cell is from the nearest.
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.eye(dim))
        self.register_buffer("class_means", torch.zeros(len(paths), dim))
        self.register_buffer("log_prior", torch.zeros(len(paths)))
        self.register_buffer("typical_distance", torch.ones(()))
        # (num_paths, classes of all levels): sums the paths through each class
        members = [torch.eye(count).index_select(0, k) for count, k in zip(self.classes, paths.T, strict=True)]
        self.register_buffer("path_to_class", torch.cat(members, 1), persistent=False)
        narrow = min(1.0, dim / RESIDUAL_DIM) ** 0.25
        residual_scale = [narrow * scale for scale in RESIDUAL_SCALE]
        parts = ("block_scale", BLOCK_SCALE), ("residual_scale", residual_scale), ("sharpness", SHARPNESS)
        for name, part in parts:  # (num_levels, 1)
            before = [part[min(j, len(part) - 2)] for j in range(num_levels - 1)]  # of more than 4, middle ones repeat
            column = torch.tensor([*before, part[-1]])[:, None]
            self.register_buffer(name, column, persistent=False)

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


def save(path: str | Place, adapter: Adapter, config: dict[str, Any], classes: list[list[str]], **facts: Any) -> None:
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
    if not config["recipe"].isidentifier():  # it is shown
        raise ValueError("the recipe's name is not a word")
    if not all(isinstance(checkpoint[name], dict) for name in ("training", "versions", "split")):
        raise ValueError("no training, versions or split")
    if not isinstance(checkpoint["validation"], dict | None):
        raise ValueError("validation is not a table of scores")
    if not all(isinstance(names, list) for names in (levels, block_levels, classes, *classes)):
        raise ValueError("levels and classes are not lists")
    if not all(isinstance(name, str) for names in (levels, *classes) for name in names):
        raise ValueError("names are not text")
    if not MIN_LEVELS <= len(levels) == len(classes) <= MAX_LEVELS:
        raise ValueError("levels are not 2 to 6, each with its classes")
    if not MIN_LEVELS <= config["num_levels"] == len(block_levels) <= MAX_LEVELS:
        raise ValueError("blocks are not 2 to 6")
    if not {*block_levels} <= {*range(len(levels))}:
        raise ValueError("a block is of no level")
    for tensor in state.values():  # a view of one number may claim any shape
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise ValueError("a weight is not all there")
    published = config["recipe"] == "published"
    shapes = PublishedAdapter.shapes(config, classes) if published else FractalAdapter.shapes(config)
    if other := [name for name, shape in shapes.items() if tuple(state[name].shape) != shape]:
        raise ValueError(f"sizes of {', '.join(other)} are not those of the config")
    if not published:
        matrix = 4 * len(config["paths"]) * shapes["anchors"][0]  # bytes of path_to_class
        if matrix > MAX_GROWTH * sum(tensor.nbytes for tensor in state.values()):
            raise ValueError("too many paths and classes for so few weights")


def load(path: str | Place, device: torch.device | str = "cpu") -> tuple[Adapter, dict[str, Any]]:
    """-> the adapter, ready for use on `device`, and the whole checkpoint. Runs no code from the file.

    Raises InputError for a file that is missing or is not a checkpoint of this version's train.py.
    """
    if not place(path).is_file():
        raise InputError(f"{path}: no such checkpoint; make one with train.py")
    try:
        checkpoint = torch.load(fetch(place(path)), map_location=device, weights_only=True)
        check(checkpoint)
        with torch.random.fork_rng([]):  # new weights are drawn; the caller's random numbers go on as they would
            adapter = build_adapter(checkpoint["config"], checkpoint["classes"])
        adapter.load_state_dict(checkpoint["state"])
    except Exception as error:  # whatever a damaged file makes torch and its modules raise
        raise InputError(
            f"{path}: not a checkpoint of train.py, or damaged, or of an older version; train it again"
        ) from error
    return adapter.to(device).eval(), checkpoint
