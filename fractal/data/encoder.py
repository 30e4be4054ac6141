"""SCimilarity's encoder: counts of genes -> vectors of 128 numbers and length 1.

A release's folder `model_v1.1` holds it in three files:

    encoder.ckpt       a torch file {"state_dict": ...}: per hidden layer Linear, BatchNorm1d, PReLU; then Linear
    layer_sizes.json   the name of each weight -> its shape
    gene_order.tsv     the genes of the input, a symbol a line (28,231 in v1.1)

The input are counts aligned to the model's genes, scaled to 10,000 a cell over these genes, log1p. A cell has some
2,000 of the genes, so the first layer sums the rows of its weights for these genes alone (torch's embedding_bag)
instead of multiplying a matrix of zeros.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, normalize

from fractal.base.errors import InputError, reason
from fractal.base.storage import Location
from fractal.data.cells import Cells, anndata_cells
from fractal.data.expression import Expression, as_counts, choose_counts, gene_names, open_expression

CHECKPOINT, SIZES, GENES = "encoder.ckpt", "layer_sizes.json", "gene_order.tsv"
MIN_GENES = 5_000  # of the model's that the cells must have; SCimilarity's limit
TARGET_SUM = 1e4  # counts of a cell after scaling
CELLS = 1_024  # encoded at a time: 4 MB per hidden layer, which stay in the cache
CHUNK = 4_096  # cells between two steps of the progress bar
OBSM = "X_scimilarity"


def new_network(widths: list[int]) -> nn.Module:
    """The layers as the checkpoint names them: network.0.1.weight is the first Linear's.

    widths: of genes, hidden layers and output, [28231, 1024, 1024, 128].
    """
    *hidden, last = pairwise(widths)
    blocks = [nn.Sequential(nn.Dropout(), nn.Linear(a, b), nn.BatchNorm1d(b), nn.PReLU()) for a, b in hidden]
    return nn.ModuleDict({"network": nn.ModuleList([*blocks, nn.Linear(*last)])})


@dataclass(frozen=True)
class Encoder:
    """An encoder of a release, read by `read_encoder`."""

    layers: list[Any]  # of the network, in their order, without dropout
    weights: Tensor  # of the first layer, a row per gene
    genes: np.ndarray  # (genes,) str, the order of the input
    dim: int  # numbers per cell, 128
    link: "EncoderLink"  # what a reference keeps of it

    @torch.inference_mode()
    def encode(self, counts: sp.csr_matrix) -> np.ndarray:
        """Counts (m, genes of the model), of any scale -> (m, 128) float32 of length 1; NaN where a cell has none."""
        total = np.asarray(counts.sum(1, dtype=np.float64)).reshape(-1)
        with np.errstate(divide="ignore"):
            factor = np.repeat(TARGET_SUM / total, np.diff(counts.indptr))
        values = torch.from_numpy(np.log1p(counts.data * factor).astype(np.float32))
        columns, starts = (torch.from_numpy(a.astype(np.int64)) for a in (counts.indices, counts.indptr[:-1]))
        columns, starts, values = (a.to(self.weights.device) for a in (columns, starts, values))
        linear, *others = self.layers
        x = embedding_bag(columns, self.weights, starts, mode="sum", per_sample_weights=values) + linear.bias
        for layer in others:
            x = layer(x)
        vectors = normalize(x, dim=1).cpu().numpy()
        vectors[total == 0] = np.nan
        return vectors


def read_encoder(folder: str | Path, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of a folder such as data/models/scimilarity/model_v1.1. Runs no code from it.

    Raises InputError for a missing or damaged file, and for weights of other shapes than layer_sizes.json says.
    """
    folder = Path(folder)
    if missing := [name for name in (CHECKPOINT, SIZES, GENES) if not (folder / name).is_file()]:
        raise InputError(f"{folder}: lacks {', '.join(missing)}, of SCimilarity's release (model_v1.1)")
    lines = (folder / GENES).read_text(encoding="utf-8").split("\n")
    genes = np.array([line.strip() for line in lines if line.strip()], object)
    widths, shapes = read_sizes(folder / SIZES, len(genes))
    path = folder / CHECKPOINT
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # torch raises what zip files, pickles and the system happen to raise
        raise InputError(f"{path}: not a checkpoint of weights, or cut short ({reason(error)})") from error
    if wrong := [name for name, shape in shapes.items() if given.get(name) != shape]:
        raise InputError(f"{path}: '{wrong[0]}' is {given.get(wrong[0], 'missing')}, {SIZES} says {shapes[wrong[0]]}")
    with torch.device("meta"):
        network = new_network(widths)
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path}: its layers are not those of {SIZES} ({reason(error)})") from error
    if not all(tensor.isfinite().all() for tensor in network.state_dict().values()):
        raise InputError(f"{path}: holds weights that are not finite")
    network = network.float().eval().to(device)
    layers: list[Any] = [m for m in network.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d | nn.PReLU)]
    weights = layers[0].weight.detach().t().contiguous()
    with open(path, "rb") as file:
        link = EncoderLink(hashlib.file_digest(file, "sha256").hexdigest(), len(genes), str(folder.resolve()))
    return Encoder(layers, weights, genes, widths[-1], link)


def read_sizes(path: Path, num_genes: int) -> tuple[list[int], dict[str, tuple[int, ...]]]:
    """layer_sizes.json -> the widths of genes, hidden layers and output, and the shape of each weight.

    Raises InputError for another file, and for layers that do not fit each other or the number of genes.
    """
    try:
        shapes = {str(name): tuple(int(n) for n in shape) for name, shape in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a table of shapes, weight -> [rows, columns] ({reason(error)})") from error
    matrices = [name for name, shape in shapes.items() if name.endswith("weight") and len(shape) == 2]
    matrices.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    widths = [num_genes, *(shapes[name][0] for name in matrices)]
    if not matrices or [shapes[name][1] for name in matrices] != widths[:-1]:
        raise InputError(f"{path}: its layers do not fit each other, or the {num_genes:,} genes of {GENES}")
    return widths, shapes


def align(expression: Expression, encoder: Encoder, force: bool = False) -> tuple[sp.csr_matrix, str]:
    """-> (genes of the cells, genes of the model) 0 or 1, what multiplies the counts; and a line on the genes.

    Columns of one symbol are summed. Raises InputError for Ensembl ids alone and, unless `force`, for fewer than
    MIN_GENES of the model's genes, and for symbols of mouse, which are matched by their upper case then.
    """
    names, where = gene_names(expression.var, encoder.genes)
    known = {gene: i for i, gene in enumerate(encoder.genes.tolist())}
    columns = np.array([known.get(name, -1) for name in names])
    upper = np.array([known.get(name.upper(), -1) for name in names])
    note, needed = "", min(MIN_GENES, len(encoder.genes) // 2)
    as_upper = len(np.unique(upper[upper >= 0]))
    found = len(np.unique(columns[columns >= 0]))
    if as_upper > 2 * found and as_upper >= needed:
        mixed = f"the genes are named as {', '.join(names[upper >= 0][:3])}, as of mouse; the model is of human genes"
        if not force:
            raise InputError(f"{expression.where}: {mixed}; force matches them by upper case")
        columns, found, note = upper, as_upper, f" ({mixed})"
    ensembl = np.mean([name.startswith("ENS") for name in names[:1_000]]) > 0.5
    if ensembl and found < needed:
        raise InputError(
            f"{expression.where}: its genes are named by Ensembl ids alone ({names[0]}); add a column of symbols to "
            "var, called feature_name, gene_symbols or gene_name"
        )
    if found < needed and not force:
        raise InputError(
            f"{expression.where}: has {found:,} of the model's {len(known):,} genes, SCimilarity asks for {needed:,}; "
            f"they are named as {', '.join(names[:3])}, the model's as {', '.join(encoder.genes[:3])}"
        )
    rows = np.flatnonzero(columns >= 0)
    ones = np.ones(len(rows), np.float32)
    to_model = sp.csr_matrix((ones, (rows, columns[rows])), shape=(len(names), len(known)))
    repeated = len(rows) - found
    message = f"{found:,} of the model's {len(known):,} genes{where}{note}"
    return to_model, message + (f", {repeated:,} columns of the same symbol summed" if repeated else "")


def encode_rows(
    expression: Expression, encoder: Encoder, force: bool = False
) -> tuple[Callable[[slice], np.ndarray], str]:
    """Counts of `choose_counts` -> a function: rows -> their vectors (m, 128) float32, and a line on what was read.

    Raises InputError as `align` does; where it reads rows, for values that are no counts. Memory: a chunk of the
    expression, and 8 MB.
    """
    to_model, genes = align(expression, encoder, force)

    def rows(batch: slice) -> np.ndarray:
        vectors = []
        for part, x in expression.chunks(batch.start, batch.stop):
            aligned = sp.csr_matrix(as_counts(x, expression, part.start) @ to_model)
            vectors += [encoder.encode(aligned[i : i + CELLS]) for i in range(0, aligned.shape[0], CELLS)]
        return np.concatenate(vectors)

    return rows, f"{expression.where}: {expression.scale}, {genes}"


@contextmanager
def open_encoded(cells: Any, encoder: Encoder, force: bool = False) -> Iterator[tuple[Cells, str]]:
    """An AnnData, or the path of an .h5ad or .zarr -> its cells with the vectors that the encoder makes of them.

    The string says which counts were read. Raises InputError as `choose_counts` and `encode_rows` do.
    """
    with open_expression(cells) as (file, matrix):
        expression = choose_counts(matrix, cells if isinstance(cells, str | Location) else "adata")
        rows, line = encode_rows(expression, encoder, force)
        shape = (expression.num_cells, encoder.dim)
        yield anndata_cells(file, expression.path, shape, np.float32, rows), line


@dataclass(frozen=True)
class EncoderLink:
    """Which encoder made the vectors of a reference's cells, and where it lay: what the reference keeps of it."""

    sha256: str  # of encoder.ckpt
    genes: int
    folder: str

    def find(self, matrix: Callable[[str], Expression | None]) -> Expression:
        """The counts, of the expression of `open_expression`. Raises InputError where there are none."""
        return choose_counts(matrix, "new cells")

    def components(self, new: Expression, force: bool = False) -> tuple[Callable[[slice], np.ndarray], str]:
        """As `encode_rows`. Raises InputError where another encoder, or none, lies in the folder."""
        encoder = read_encoder(self.folder)
        if encoder.link.sha256 != self.sha256:
            raise InputError(
                f"{self.folder}: another encoder than that of the reference (sha256 {self.sha256[:12]}...); name the "
                "folder of the right one with --model, or fractal.load(..., model=...)"
            )
        rows, line = encode_rows(new, encoder, force)
        return rows, f"encoded from {line}"


def encode(
    adata: Any, model: str | Path, key_added: str = OBSM, *, force: bool = False, device: str | torch.device = "cpu"
) -> None:
    """Add obsm[key_added] (n, 128) float32 in place: SCimilarity's vectors of the cells, from their counts.

    Parameters
    ----------
    adata : AnnData
        with counts, or values log-normalised from them, in layers["counts"], X or raw; symbols of genes in var_names or
        a column of var. A cell without counts gets NaN.
    model : path
        the folder of a release that holds encoder.ckpt, layer_sizes.json and gene_order.tsv
    key_added : str, default "X_scimilarity"
    force : bool, default False
        go on with fewer than 5,000 of the model's genes, and match symbols of mouse by their upper case
    device : of torch

    Raises
    ------
    InputError
        for a model that lacks a file or is damaged, for too few genes, and for values that are no counts

    Examples
    --------
    >>> fractal.encode(adata, "data/models/scimilarity/model_v1.1")
    >>> fractal.fit(adata, labels="cell_type", use_rep="X_scimilarity")
    """
    with open_encoded(adata, read_encoder(model, device), force) as (cells, line):
        adata.obsm[key_added] = np.concatenate([vectors for _, vectors in cells.chunks(CHUNK, progress="encode")])
        print(line)
