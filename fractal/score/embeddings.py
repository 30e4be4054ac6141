"""What is scored: raw vectors, adapters, others' vectors and controls, each as a function of rows of a file.

And their nearest neighbours, among rows that are held in memory or streamed from a file.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from fractal.base.errors import InputError, reason
from fractal.base.storage import Location
from fractal.data.cells import Cells
from fractal.model.adapter import Adapter, embed
from fractal.score.metrics import K
from fractal.search.exact import Nearest, nearest


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
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a .npy matrix, or damaged ({reason(error)})") from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise InputError(f"{path}: not a matrix of floats; save one with numpy.save")
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
    """A name per file: its stem, or as much of its path as tells it from the others of that stem."""
    full = [Path(os.path.abspath(str(path))).with_suffix("") for path in paths]
    for parts in range(1, max((len(path.parts) for path in full), default=0) + 1):
        names = ["/".join(path.parts[-parts:]) for path in full]
        if len(set(names)) == len(names):
            break
    else:  # the same file twice, or two suffixes
        return [f"{path.name} ({i + 1})" for i, path in enumerate(paths)]
    stems = [path.name for path in full]
    return [stem if stems.count(stem) == 1 else name for stem, name in zip(stems, names, strict=True)]


def nearest_rows(bank: Subset, queries: Subset, encoders: Sequence[Encoder]) -> list[np.ndarray]:
    """-> per embedding, in the order of the encoders: (n, 5) positions in the bank of each query's neighbours."""
    result = []
    for encode in encoders:
        embedded = encode(bank)
        result += [nearest(e, embedded[name], K).cpu().numpy() for name, e in encode(queries).items()]
    return result


def nearest_in_file(path: Location, keep: np.ndarray, queries: Subset, encoders: Sequence[Encoder]) -> list[np.ndarray]:
    """The same among the kept rows of a file, as row numbers of the file; `keep` is a mask (num_rows,).

    The file is read once, a row group (34 MB) at a time.
    """
    searches = [[Nearest(vectors, K) for vectors in encode(queries).values()] for encode in encoders]
    start = 0
    with Cells.open(path) as source, tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="bank") as bar:
        for _, vectors in source.chunks(strict=True):
            rows = start + np.flatnonzero(keep[start : start + len(vectors)])
            bank = Subset(torch.from_numpy(vectors[rows - start]).to(queries.vectors.device), rows)
            start += len(vectors)
            for encode, group in zip(encoders, searches, strict=True) if len(rows) else ():
                for search, embedding in zip(group, encode(bank).values(), strict=True):
                    search.add(embedding)
            bar.update(len(vectors))
    kept = np.flatnonzero(keep)
    return [kept[search.rows().cpu().numpy()] for group in searches for search in group]
