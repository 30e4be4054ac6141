"""Maps that belong together: one layout in the plane per prefix, in one frame, so that islands are seen to split.

Each prefix has its own graph of nearest neighbours, and t-SNE (van der Maaten and Hinton 2008) lays it out. Left to
itself every layout would put its islands elsewhere. So first one layout is made of the mean of all graphs; in it each
kind of cell has its position. From there every prefix is laid out by its own graph, and a weak spring pulls each cell
to its position. benchmarks/maps.py compares this with UMAP, AlignedUMAP, and starting from the prefix before.

New cells are placed without refitting: amid their nearest neighbours, prefix by prefix.
"""

import errno
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from tqdm.auto import tqdm

from fractal import __version__
from fractal.base.errors import InputError, needs
from fractal.base.files import atomic_write, check_header
from fractal.data.vectors import refuse, usable
from fractal.search.exact import Nearest

VERSION = 1  # of the file
OBSM, COLUMN = "X_fractal_umap_{}", "fractal_umap_{}"  # of prefix 1, 2, ...; in an AnnData, and in Parquet
MIN_CELLS = 20
PERPLEXITY = 30  # how many neighbours a cell attends to; three times as many are looked up
EARLY, LATE = 250, 250  # steps of the common layout: clusters form, and then take their shape
REFINE = 400  # steps of each prefix from there
EXAGGERATION = 12  # of the attraction in the early steps
SPRING = 0.006  # of the force that pulls a cell to its position in the common layout
FEW = 2_500  # cells: with fewer, Barnes-Hut's tree is faster than the grid of FIt-SNE
PLACED_BY = 10  # neighbours of a new cell
SAME = 1 - 1e-6  # cosine above which a new cell is one of the fitted ones, and takes its position


@dataclass(frozen=True)
class Maps:
    """Layouts of the same cells at every prefix, and what it takes to place other cells on them."""

    vectors: np.ndarray  # (N, D) float32, as given to `fit_maps`
    prefix_ends: tuple[int, ...]  # numbers in prefix 1, 2, ...; the last is D
    layouts: np.ndarray  # (P, N, 2) float32, prefix 1 first; all in one frame, within [-1, 1]
    facts: Mapping[str, Any] = field(default_factory=dict)  # provenance: seed, method, versions

    def transform(self, vectors: np.ndarray) -> np.ndarray:
        """Place cells (M, D) float32 -> (P, M, 2) float32, without refitting.

        At every prefix: amid the 10 nearest fitted cells by cosine, see `amid`; a cell that is one of these takes its
        position. A row that is zero or not finite becomes NaN. Raises InputError for another width.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.prefix_ends[-1]:
            raise InputError(f"vectors of shape {vectors.shape}: the maps take (n, {self.prefix_ends[-1]})")
        positions = np.full((len(self.prefix_ends), len(vectors), 2), np.nan, np.float32)
        good = np.flatnonzero(usable(vectors))
        for j, (end, layout) in enumerate(zip(self.prefix_ends, self.layouts, strict=True)):
            similarity, rows = neighbours(vectors[good, :end], self.vectors[:, :end], PLACED_BY)
            positions[j, good] = np.where(similarity[:, :1] > SAME, layout[rows[:, 0]], amid(layout[rows]))
        return positions

    def save(self, path: str | Path) -> None:
        """Write the maps as one safetensors file, whole or not at all."""
        arrays = {"vectors": self.vectors, "layouts": self.layouts}
        facts = {**self.facts, "version": VERSION, "prefix_ends": list(self.prefix_ends), "sha256": checksum(arrays)}
        with atomic_write(path) as part:
            part.write_bytes(save(arrays, {"fractal_maps": json.dumps(facts)}))

    @staticmethod
    def load(path: str | Path) -> "Maps":
        """Raises InputError for a file that is missing, damaged, or of another version."""
        try:
            check_header(Path(path))
            with safe_open(path, "np") as file:
                facts = json.loads((file.metadata() or {})["fractal_maps"])
                arrays = {name: file.get_tensor(name) for name in ("vectors", "layouts")}
            if (facts.pop("version"), facts.pop("sha256")) != (VERSION, checksum(arrays)):
                raise ValueError("of another version")
            return Maps(arrays["vectors"], tuple(facts.pop("prefix_ends")), arrays["layouts"], facts)
        except Exception as error:  # whatever the parsers of a damaged file raise
            raise InputError(f"{path}: damaged, or of another version; delete it, and it is made again") from error


def amid(points: np.ndarray) -> np.ndarray:
    """(m, k, 2) -> (m, 2): the mean of the half of the points that lies nearest to their median.

    The median alone would set new cells in lines, on the rows and columns of others.
    """
    distance = np.linalg.norm(points - np.median(points, axis=1, keepdims=True), axis=2)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : -(-points.shape[1] // 2)]
    return np.take_along_axis(points, nearest[..., None], axis=1).mean(axis=1)


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def fit_maps(vectors: np.ndarray, prefix_ends: Sequence[int], *, seed: int = 0) -> Maps:
    """Lay cells out at every prefix; the same input and seed give the same maps.

    vectors (N, D) float32: full fractal vectors, or blocks, whose first `prefix_ends[j]` numbers are prefix j + 1. Of
    any length. Raises InputError for fewer than 20 cells, for rows that are zero or not finite, and where openTSNE is
    missing.
    """
    needs("openTSNE", "maps")
    ends = tuple(map(int, prefix_ends))
    if len(vectors) < MIN_CELLS:
        raise InputError(f"{len(vectors)} cells are too few for a map; it takes {MIN_CELLS}")
    if list(ends) != sorted({*ends}) or ends[0] < 1 or ends[-1] != vectors.shape[1]:
        raise InputError(f"prefixes that end at {', '.join(map(str, ends))}: do not fit vectors of {vectors.shape[1]}")
    refuse(~usable(vectors), 0, "maps")
    vectors = np.ascontiguousarray(vectors, np.float32)
    with tqdm(total=EARLY + LATE + REFINE * len(ends), unit="steps", desc="maps") as bar:
        graphs = [graph(vectors[:, :end]) for end in ends]
        common = start_layout(vectors[:, : ends[0]], seed)
        mean = sum(graphs) / len(graphs)
        common = lay_out(mean, common, EARLY, bar, exaggeration=EXAGGERATION, momentum=0.5)
        common = lay_out(mean, common, LATE, bar)
        layouts = np.stack([lay_out(g, common, REFINE, bar, home=common) for g in graphs])
    low, high = layouts.min((0, 1)), layouts.max((0, 1))
    layouts = (layouts - (low + high) / 2) / (max(high - low) / 2)
    about = {"method": "t-SNE", "openTSNE": needs("openTSNE", "maps").__version__, "seed": seed}
    return Maps(vectors, ends, layouts.astype(np.float32), {**about, "fractal_version": __version__})


def neighbours(queries: np.ndarray, bank: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest by cosine -> cosines and rows, both (n, k), nearest first. Without a bank: among the others."""
    search = Nearest(torch.from_numpy(np.ascontiguousarray(queries)), k, leave_one_out=bank is None)
    search.add(torch.from_numpy(np.ascontiguousarray(queries if bank is None else bank)))
    similarity, rows = search.result()
    return similarity.numpy(), rows.numpy()


def graph(vectors: np.ndarray) -> Any:
    """Vectors (N, dim) -> t-SNE's symmetric affinities (N, N), sparse, of sum 1."""
    affinity = needs("openTSNE.affinity", "maps")
    k = min(3 * PERPLEXITY, len(vectors) - 1)
    similarity, rows = neighbours(vectors, None, k)
    distance = np.sqrt(np.maximum(2 - 2 * similarity.astype(np.float64), 0))  # of vectors of length 1
    return affinity.joint_probabilities_nn(rows, distance, [min(PERPLEXITY, k / 3)])


def start_layout(vectors: np.ndarray, seed: int) -> np.ndarray:
    """The first two principal components of vectors (N, dim), as small as t-SNE wants its start -> (N, 2) float64."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    initialization = needs("openTSNE.initialization", "maps")
    start = PCA(2, svd_solver="full").fit_transform(unit.astype(np.float64))
    return initialization.jitter(initialization.rescale(start), scale=1e-6, random_state=seed)


def lay_out(
    affinities: Any, start: np.ndarray, steps: int, bar: tqdm, home: np.ndarray | None = None, **options: float
) -> np.ndarray:
    """t-SNE from `start` (N, 2); springs may pull to `home` (N, 2) -> (N, 2) float64. Deterministic: one thread.

    options: openTSNE's exaggeration (else 1) and momentum (else .8).
    """
    tsne = needs("openTSNE.tsne", "maps")
    given = needs("openTSNE.affinity", "maps").PrecomputedAffinities(affinities, normalize=False)
    layout = needs("openTSNE", "maps").TSNEEmbedding(start.copy(), given, n_jobs=1)
    method = tsne.kl_divergence_bh if len(start) < FEW else tsne.kl_divergence_fft

    def objective(embedding: Any, P: Any, **options: Any) -> tuple[float, np.ndarray]:  # noqa: N803
        error, gradient = method(embedding, P, **options)
        if home is not None:
            gradient = gradient + SPRING / len(start) * (np.asarray(embedding) - home)
        return error, gradient

    def progress(*_: Any) -> None:
        bar.update()

    watched = {"callbacks": progress, "callbacks_every_iters": 1}
    layout.optimize(steps, negative_gradient_method=objective, inplace=True, **watched, **options)
    return np.asarray(layout)


def turned(maps: Maps, like: np.ndarray) -> Maps:
    """Turned and mirrored so that the cells come near to their positions in another layout (N, 2), within [-1, 1]."""
    layouts = maps.layouts @ orthogonal_procrustes(maps.layouts[-1], like)[0]
    return replace(maps, layouts=layouts / max(1, np.abs(layouts).max()))


def kept_maps(path: Path | None, vectors: np.ndarray, prefix_ends: Sequence[int], *, seed: int = 0) -> Maps:
    """The maps in a file, if they are of these vectors, else new ones, which are written there.

    path: of a reference's maps; None keeps nothing. The rest, and errors, are as of `fit_maps` and `Maps.load`.
    """
    if path and path.exists():
        maps = Maps.load(path)
        same = maps.vectors.shape == vectors.shape and maps.prefix_ends == tuple(prefix_ends)
        # other processors and numbers of threads round otherwise
        if same and maps.facts.get("seed") == seed and np.allclose(maps.vectors, vectors, atol=1e-4):
            return maps
    maps = fit_maps(vectors, prefix_ends, seed=seed)
    if path:
        try:
            maps.save(path)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            print(f"{path}: can't be written, so the maps are made again each time", file=sys.stderr)
    return maps
