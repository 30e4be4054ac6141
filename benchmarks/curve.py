"""Recall against time of `fractal index`, from a million cells to more than memory holds.

    OMP_NUM_THREADS=1 uv run --group benchmarks python -m benchmarks.curve --cells 1000000 8000000 25000000

SIMULATED cells, made block by block and kept nowhere but in the index: a cell is a mixture of two cells of one subtype,
of the 100,000 embedded cells of benchmarks/search.py, and a little noise. Queries are further cells of this kind, asked
one at a time by one thread. Every size is built in one process, and opened and asked in another.

probes     lists that a query opens, of about 1,000 cells each
recall@10  of the ten nearest by exact search over all cells, which are made anew for it
cold       the first time that a query is asked, with none of the index's files in the system's memory
warm       the second time
anon       MB of memory that the system can't take back
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.scale import memory_of
from benchmarks.search import EMBEDDED, VECTORS, prepare, quietly, spent
from fractal.base.errors import run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.search import open_index
from fractal.search.build import PIECE, add, build
from fractal.search.exact import Nearest
from fractal.search.folder import Space
from fractal.search.source import Source

BASE, BLOCK = 100_000, PIECE  # cells that are mixed, and that are made at a time: as many as the index reads
NOISE = 0.1  # length of the noise beside vectors of length 1
QUERIES, K = 300, 10
PROBES = [2, 4, 8, 16, 32, 64, 128]
PREFIXES = [1, 2, 3]
ADDED = 1_000_000  # cells
Row = dict[str, Any]


class Mixtures:
    """Any number of cells, the same for the same number, `first` of them apart for the queries."""

    def __init__(self, folder: Path) -> None:
        data = folder / str(BASE)
        labels = Atlas.open(data / EMBEDDED).finest[0]
        self.order = np.argsort(labels, kind="stable")  # cells of a subtype lie together
        self.base = np.load(data / VECTORS)[self.order]
        label = labels[self.order]
        self.first = np.searchsorted(label, label, "left")
        self.size = np.searchsorted(label, label, "right") - self.first
        self.dim = self.base.shape[1]

    def block(self, number: int, cells: int = BLOCK) -> np.ndarray:
        """(cells, dim) float32 of length 1."""
        rng = np.random.default_rng([1, number])
        one = rng.integers(len(self.base), size=cells)
        other = self.first[one] + (rng.random(cells) * self.size[one]).astype(np.int64)
        share = rng.random((cells, 1), np.float32)
        x = share * self.base[one] + (1 - share) * self.base[other]
        x += rng.standard_normal(x.shape, np.float32) * np.float32(NOISE / self.dim**0.5)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def blocks(self, cells: int) -> Iterator[np.ndarray]:
        for number, start in enumerate(range(0, cells, BLOCK)):
            yield self.block(number)[: cells - start]

    def source(self, cells: int, first: int = 0) -> Source:
        """For the index, which reads in blocks of this size, from block `first` on."""

        def rows(part: slice) -> np.ndarray:
            return self.block(first + part.start // BLOCK)[: part.stop - part.start]

        matrix = Cells.from_matrix(Path("simulated"), (cells, self.dim), np.dtype(np.float32), rows)
        return Source(matrix, Space(self.dim, "fractal", (self.dim // 4,) * 4))


def truth(mixtures: Mixtures, queries: np.ndarray, cells: int) -> np.ndarray:
    """(queries, K) rows of the nearest cells, by exact search."""
    nearest = Nearest(torch.from_numpy(queries), K)
    for block in tqdm(mixtures.blocks(cells), total=-(-cells // BLOCK), desc="exact", unit="block"):
        nearest.add(torch.from_numpy(block), unit=True)
    return nearest.rows().numpy()


def built(folder: Path, cells: int) -> Row:
    """In a process of its own: the exact neighbours and the index, unless they are there."""
    data = folder / f"curve_{cells}"
    data.mkdir(parents=True, exist_ok=True)
    mixtures = Mixtures(folder)
    if not (data / "truth.npy").exists():
        np.save(data / "truth.npy", truth(mixtures, mixtures.block(2**40, QUERIES), cells))
    if not (data / "built.json").exists():
        _, wall, cpu = spent(lambda: build(data / "index", mixtures.source(cells)))
        made = {"build": wall, "build_cpu": cpu, "build_peak": memory_of(os.getpid()).get("VmHWM", 0)}
        (data / "built.json").write_text(json.dumps(made))
    return json.loads((data / "built.json").read_text())


def forget(path: Path) -> None:
    """Ask the system to drop the file from its memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def asked(folder: Path, cells: int, probes: int | None, prefix: int | None) -> Row:
    """In a process of its own: open the index cold, and ask every query twice."""
    data = folder / f"curve_{cells}"
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    queries, exact = Mixtures(folder).block(2**40, QUERIES), np.load(data / "truth.npy")
    for file in (data / "index").iterdir():
        forget(file)
    before = memory_of(os.getpid()).get("RssAnon", 0)
    index, opening, _ = spent(lambda: open_index(data / "index"))
    index.search(queries[:1], K, prefix, probes=1)  # what is set up once
    times = []
    for _ in range(2):
        began = time.perf_counter()
        hits = [index.search(query[None], K, prefix, probes=probes).cells[0] for query in queries]
        times.append(1e3 * (time.perf_counter() - began) / QUERIES)
    recall = np.mean([len({*a.tolist()} & {*b.tolist()}) / K for a, b in zip(hits, exact, strict=True)])
    anon = memory_of(os.getpid()).get("RssAnon", 0) - before
    return {"opening": opening, "cold": times[0], "warm": times[1], "recall": float(recall), "anon": anon}


def added(folder: Path, cells: int) -> float:
    """In a process of its own: seconds to add ADDED cells to a copy of links to the index."""
    data, mixtures = folder / f"curve_{cells}", Mixtures(folder)
    copy = data / "added"
    copy.mkdir()
    for file in (data / "index").iterdir():
        os.link(file, copy / file.name)
    seconds = spent(lambda: add(copy, mixtures.source(ADDED, 2**41), force=True))[1]
    for file in copy.iterdir():
        file.unlink()
    copy.rmdir()
    return seconds


def draw(rows: list[Row], path: Path) -> None:
    """Recall against warm time, a line per size."""
    figure = Figure((5.5, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="milliseconds of a query, one thread, warm", ylabel="recall@10", xscale="log")
    for cells in sorted({row["cells"] for row in rows}):
        line = [row for row in rows if row["cells"] == cells and row["prefix"] is None]
        axes.plot([row["warm"] for row in line], [row["recall"] for row in line], "o-", label=f"{cells:,} cells")
        for row in line:
            axes.annotate(str(row["probes"]), (row["warm"], row["recall"]), (3, -9), textcoords="offset points", size=7)
    marks = [0.25, 0.5, 1, 2, 4, 8]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.minorticks_off()
    axes.legend(title="numbers: lists opened")
    axes.grid(alpha=0.3)
    with atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=positive_int, nargs="+", default=[1_000_000, 8_000_000, 25_000_000])
    text = "where the files go, 0.3 GB for a million cells, twice that while it is built (default: %(default)s)"
    parser.add_argument("--folder", type=Path, default=Path("data/search"), help=text)
    args = parser.parse_args(argv)
    quietly(prepare, args.folder, BASE)
    rows, builds = list[Row](), list[list[str]]()
    spawn = multiprocessing.get_context("spawn")  # a forked process would start with the memory of this one
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for cells in args.cells:
            made = pool.submit(built, args.folder, cells).result()
            ways = [*((probes, None) for probes in PROBES), *((None, prefix) for prefix in PREFIXES)]
            for probes, prefix in ways:
                found = pool.submit(asked, args.folder, cells, probes, prefix).result()
                rows.append({"cells": cells, "probes": probes, "prefix": prefix, **found})
            files = [file.stat().st_size for file in (args.folder / f"curve_{cells}" / "index").iterdir()]
            seconds = pool.submit(added, args.folder, cells).result()
            builds.append([f"{cells:,}", f"{made['build']:,.0f}", f"{made['build_cpu']:,.0f}",
                           f"{made['build_peak'] / 1e6:,.0f}", f"{sum(files) / 1e9:.2f}",
                           f"{seconds:.0f}"])  # fmt: skip
            (args.folder / "curve.json").write_text(json.dumps({"rows": rows, "builds": builds}, indent=1))
    header = ["Cells", "Build s", "Build CPU s", "Peak MB", "Disk GB", f"{ADDED:,} added, s"]
    print(table(header, builds), end="\n\n")
    lines = [
        [f"{row['cells']:,}", f"prefix {row['prefix']}" if row["prefix"] else str(row["probes"]),
         "-" if row["prefix"] else f"{row['recall']:.3f}", f"{row['warm']:.2f}", f"{row['cold']:.1f}",
         f"{row['anon'] / 1e6:.0f}", f"{row['opening']:.2f}"]
        for row in rows
    ]  # fmt: skip
    print(table(["Cells", "Lists opened", "recall@10", "Warm ms", "Cold ms", "anon MB", "Opening s"], lines))
    draw(rows, args.folder / "curve.png")


if __name__ == "__main__":
    run(main)
