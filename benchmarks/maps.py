"""Ways to lay the same cells out at every prefix, side by side: how true is each map, and how far do cells move?

    export FRACTAL_REAL_DATA=...  # the folder that holds pbmc_tonsil/ and fetal_organs/
    uv run --group benchmarks python -m benchmarks.maps
    uv run python -m benchmarks.maps --atlases pbmc_tonsil --cells 20000 --methods common  # the time of a large one

Trustworthiness (Venna and Kaski 2001; 15 neighbours, cosine, among at most 3,000 cells): do neighbours on the map lie
near each other in the prefix's vectors? Move: the median distance between a cell's places at one prefix and the next,
as a share of the map's width, for all cells, and for those whose class at this level has one class at the next, so that
its island has no reason to split. Layouts are turned and scaled onto that of prefix 1 first (Procrustes), where that
brings them nearer. Seconds are those of the processor, one thread.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.linalg import orthogonal_procrustes
from sklearn.manifold import trustworthiness
from tqdm import tqdm

import train
from benchmarks.quality import add_data, prepare
from fractal.base.errors import needs, run
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas
from fractal.model.checkpoint import load
from fractal.model.embedding import embed_matrix
from fractal.view import maps

Method = Callable[[list[np.ndarray]], Sequence[np.ndarray]]  # vectors of each prefix (N, dims) -> layouts (N, 2)
MEASURED = 3_000  # cells
STEPS = maps.LATE + maps.REFINE  # after the clusters have gathered, as many for all ways to use t-SNE
UMAP = {"metric": "cosine", "n_neighbors": 15, "min_dist": 0.3, "random_state": 0}


def tsne(vectors: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
    """One prefix by t-SNE alone, or from the layout of the prefix before."""
    with tqdm(disable=True) as bar:
        graph = maps.graph(vectors)
        if start is not None:
            return maps.lay_out(graph, start, maps.REFINE, bar)
        start = maps.start_layout(vectors, 0)
        start = maps.lay_out(graph, start, maps.EARLY, bar, exaggeration=maps.EXAGGERATION, momentum=0.5)
        return maps.lay_out(graph, start, STEPS, bar)


def tsne_chain(prefixes: list[np.ndarray]) -> list[np.ndarray]:
    layouts = [tsne(prefixes[0])]
    for vectors in prefixes[1:]:
        layouts.append(tsne(vectors, layouts[-1]))
    return layouts


def common(prefixes: list[np.ndarray]) -> list[np.ndarray]:
    """What fractal/view/maps.py does."""
    return list(maps.fit_maps(prefixes[-1], [vectors.shape[1] for vectors in prefixes]).layouts)


def umap(vectors: np.ndarray, start: np.ndarray | str = "spectral") -> np.ndarray:
    return needs("umap", "benchmarks").UMAP(**UMAP, n_jobs=1, init=start).fit_transform(vectors)


def umap_chain(prefixes: list[np.ndarray]) -> list[np.ndarray]:
    layouts = [umap(prefixes[0])]
    for vectors in prefixes[1:]:
        layouts.append(umap(vectors, layouts[-1].copy()))
    return layouts


def aligned_umap(prefixes: list[np.ndarray]) -> list[np.ndarray]:
    same = {i: i for i in range(len(prefixes[0]))}
    return (
        needs("umap", "benchmarks").AlignedUMAP(**UMAP).fit_transform(prefixes, relations=[same] * (len(prefixes) - 1))
    )


METHODS: dict[str, tuple[str, Method]] = {
    "own": ("t-SNE, each alone", lambda prefixes: [tsne(vectors) for vectors in prefixes]),
    "chain": ("t-SNE, from the prefix before", tsne_chain),
    "common": ("t-SNE, from a common layout (kept)", common),
    "umap": ("UMAP, each alone", lambda prefixes: [umap(vectors) for vectors in prefixes]),
    "umap_chain": ("UMAP, from the prefix before", umap_chain),
    "aligned": ("AlignedUMAP", aligned_umap),
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--atlases", nargs="+", default=["fetal_organs", "pbmc_tonsil"], help="(default: both)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="(default: all)")
    parser.add_argument("--cells", type=positive_int, default=3_000, help="drawn from the atlas (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("data/maps"), help="keeps files and adapters (default: %(default)s)"
    )
    return parser


def prefixes_of(atlas: str, data: Path | None, folder: Path, cells: int) -> tuple[list[np.ndarray], np.ndarray]:
    """-> vectors of every prefix, of a draw of the atlas's cells, and labels (n, prefixes) of the levels they tell."""
    stratified, checkpoint = prepare(atlas, 0, data, folder), folder / atlas / "adapter_4L.pt"
    if not checkpoint.exists():
        train.main(["--input", str(stratified), "--output", str(checkpoint)])
    adapter, facts = load(checkpoint)
    num_rows = Atlas.open(stratified).num_rows
    found = Atlas.open(stratified).read(np.sort(np.random.default_rng(0).permutation(num_rows)[:cells]))
    vectors = embed_matrix(adapter, found.vectors)[0]
    levels = facts["config"].get("block_levels", range(adapter.num_levels))
    ends = [adapter.scale_dim * j for j in range(1, adapter.num_levels + 1)]
    return [vectors[:, :end] for end in ends], found.labels[:, list(levels)]


def in_one_frame(layouts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Turn and scale each layout onto that of prefix 1."""
    first = layouts[0] - layouts[0].mean(0)
    found = [first]
    for layout in layouts[1:]:
        centred = layout - layout.mean(0)
        turn, scale = orthogonal_procrustes(centred, first)
        found.append(centred @ turn * scale / (centred**2).sum())
    return found


def whole(labels: np.ndarray, j: int) -> np.ndarray:
    """(n,) bool: cells whose class at the level of prefix j has one class at the next."""
    below = [len(np.unique(labels[labels[:, j] == c, j + 1])) == 1 for c in range(labels[:, j].max() + 1)]
    return np.array(below)[labels[:, j]]


def measure(prefixes: list[np.ndarray], labels: np.ndarray, layouts: Sequence[np.ndarray]) -> tuple[str, str, str]:
    """Trustworthiness per prefix, and moves of all cells and of those whose island has no reason to split."""
    some = np.random.default_rng(1).permutation(len(labels))[:MEASURED]
    trust = [
        trustworthiness(v[some], layout[some], n_neighbors=15, metric="cosine")
        for v, layout in zip(prefixes, layouts, strict=True)
    ]
    placed, moves, stay = in_one_frame(layouts), [], []
    for j in range(len(placed) - 1):
        move = np.linalg.norm(placed[j + 1] - placed[j], axis=1) / np.ptp(placed[j], axis=0).max()
        moves.append(np.median(move))
        stay.append(np.median(move[whole(labels, j)]) if whole(labels, j).any() else np.nan)
    shown = (" ".join(f"{value:.3f}" for value in values) for values in (trust, moves, stay))
    return tuple(text.replace("0.", ".").replace("nan", "-") for text in shown)  # type: ignore[return-value]


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    for atlas in args.atlases:
        prefixes, labels = prefixes_of(atlas, args.data, args.output, args.cells)
        rows = []
        for name in args.methods:
            title, method = METHODS[name]
            began = time.process_time()
            layouts = method(prefixes)
            seconds = time.process_time() - began
            rows.append([title, *measure(prefixes, labels, layouts), f"{seconds:,.0f}"])
            tqdm.write(f"{atlas}: {' | '.join(rows[-1])}")
        header = ["Method", "Trustworthiness", "Move, all", "Move, whole islands", "CPU s"]
        print(f"\n{atlas}, {len(labels):,} cells, {len(prefixes)} prefixes\n\n{table(header, rows)}\n")


if __name__ == "__main__":
    run(main)
