"""What is scored: raw vectors, adapters, others' vectors and controls, each as a function of rows of a file.

And their nearest neighbours, among rows that are held in memory or streamed from a file.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from torch.nn.functional import normalize

from fractal.base.errors import InputError, reason
from fractal.base.storage import Location
from fractal.data.cells import Cells
from fractal.model.adapter import Adapter, embed
from fractal.score.metrics import K
from fractal.search.exact import Nearest


@dataclass(frozen=True)
class Subset:
    """Rows of a file: their vectors (m, dim) float32, on the device of scoring, and their numbers (m,)."""

    vectors: Tensor
    rows: np.ndarray


Encoder = Callable[[Subset], dict[str, Tensor]]  # rows -> name -> embedding (m, dims)


def raw(cells: Subset) -> dict[str, Tensor]:
    """The vectors as they are."""
    return {"raw": cells.vectors}


def adapter_encoder(adapter: Adapter, name: str = "") -> Encoder:
    """The full vectors, then the prefixes, longest first; `name` comes before "full", "prefix 3", ..."""
    parts = ["full", *(f"prefix {j}" for j in range(adapter.num_levels - 1, 0, -1))]
    names = [f"{name} {part}".strip() for part in parts]
    return lambda cells: dict(zip(names, reversed(embed(adapter, cells.vectors)), strict=True))


def vectors_encoder(path: Path, num_rows: int, name: str) -> Encoder:
    """Vectors that others have made: a .npy matrix with a row for each of the file's `num_rows` rows, in their order.

    Raises InputError for anything else and, when rows are read, for numbers that are not finite.
    """
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f":
            raise ValueError("not a matrix of floats")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a .npy matrix, or damaged ({reason(error)}); write it by numpy.save") from error
    if len(matrix) != num_rows:
        raise InputError(f"{path}: has {len(matrix):,} rows, and --input {num_rows:,}; write a row for each of them")

    def encode(cells: Subset) -> dict[str, Tensor]:
        vectors = np.float32(matrix[cells.rows])
        if not np.isfinite(vectors).all():
            raise InputError(f"{path}: has numbers that are not finite; replace them, or leave these cells out")
        return {name: torch.from_numpy(vectors).to(cells.vectors.device)}

    return encode


def fit_controls(train: Tensor, types: np.ndarray, widths: Sequence[int]) -> tuple[Encoder, list[str]]:
    """Raw vectors cut short, PCA and LDA, at these widths -> the encoder, and a line for each that can't be fitted.

    PCA and LDA are fitted on the training cells (m, dim) with types (m,), both on vectors of length 1, as the adapters
    see them and as the cosine does.
    """

    def unit(x: Tensor) -> np.ndarray:
        return normalize(x.double(), dim=1).cpu().numpy()

    x, widths = unit(train), sorted(widths)
    fitted: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [("raw", lambda x: x)]
    failed = []
    if np.ptp(x, axis=0).max() <= 1e-12:
        failed.append("PCA and LDA: all training cells have the same vector")
    else:
        fitted.append(("PCA", PCA(min(widths[-1], *x.shape), random_state=0).fit(x).transform))
        if len(x) <= len(np.unique(types)):  # no two cells of a type: no scatter inside types
            failed.append("LDA: needs more training cells than types")
        else:
            fitted.append(("LDA", LinearDiscriminantAnalysis().fit(x, types).transform))

    def controls(cells: Subset) -> dict[str, Tensor]:
        x, result = unit(cells.vectors), {}
        for name, transform in fitted:
            rotated = transform(x)
            for width in (cuts := sorted({min(width, rotated.shape[1]) for width in widths})):
                if name == "raw" and width == x.shape[1]:
                    continue  # the whole of it is there without controls
                cut = torch.from_numpy(np.float32(rotated[:, :width])).to(cells.vectors.device)
                result[name if name != "raw" and width == cuts[-1] else f"{name} {width}d"] = cut
        return result

    return controls, failed


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A name per file: its stem, or its path below the folder that all files share where stems are equal."""
    full = [Path(os.path.abspath(str(path))).with_suffix("") for path in paths]
    folder = os.path.commonpath([path.parent for path in full]) if full else ""
    stems = [path.name for path in full]
    names = [path.name if stems.count(path.name) == 1 else str(path.relative_to(folder)) for path in full]
    if len(set(names)) < len(names):  # the same file twice, or two suffixes
        return [f"{stem} ({i + 1})" for i, stem in enumerate(stems)]
    return names


def nearest_in(bank: Iterable[Subset], queries: Subset, encoders: Sequence[Encoder]) -> np.ndarray:
    """Each query's neighbours among cells that come in pieces -> (embeddings, n, 5) int64, nearest first.

    The embeddings are in the order of the encoders, the neighbours are positions in the bank.
    """
    searches = [[Nearest(vectors, K) for vectors in encode(queries).values()] for encode in encoders]
    for cells in bank:
        for encode, group in zip(encoders, searches, strict=True):
            for search, embedding in zip(group, encode(cells).values(), strict=True):
                search.add(embedding)
    return np.stack([search.rows().cpu().numpy() for group in searches for search in group])


def kept_cells(path: Location, keep: np.ndarray, device: torch.device) -> Iterator[Subset]:
    """The cells of a file that are kept, (num_rows,) bool, a row group (34 MB) at a time."""
    start = 0
    with Cells.open(path) as source:
        for _, vectors in source.chunks(strict=True, progress="bank"):
            rows = start + np.flatnonzero(keep[start : start + len(vectors)])
            if len(rows):
                yield Subset(torch.from_numpy(vectors[rows - start]).to(device), rows)
            start += len(vectors)
