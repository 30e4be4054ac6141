"""How long the heavy steps take, beside a peer or the floor of their matrix work, in one run.

    uv run --group benchmarks python -m benchmarks.speed knn
    uv run --group benchmarks python -m benchmarks.speed silhouette
    uv run --group benchmarks python -m benchmarks.speed embed --model-path ADAPTER.pt --input CELLS.parquet
    uv run --group benchmarks python -m benchmarks.speed annotate --reference FOLDER --input CELLS.parquet

knn         5,000 queries against 100,000 rows, 128-d, 5 neighbours: ours, faiss's flat index, a torch product with
            topk (how sentence-transformers searches), scikit-learn's brute force
silhouette  50,000 cells, 128-d, 203 classes: ours and scikit-learn's, which goes through all pairs
embed       `fractal embed` on a file, beside its products alone at the rate of a 4096-cubed one
annotate    the first 200,000 cells of a file: the answers of the reference's lists and of exact search (of 20,000), and
            `fractal annotate` as a whole, without Python's start

Every run is a process of its own, so that its peak memory is its own; the runs take turns, and medians are printed. On
a machine that does other things too, compare the CPU seconds. OMP_NUM_THREADS sets the threads of all of them.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from fractal.annotate.neighbours import Neighbours
from fractal.base.errors import run
from fractal.base.table import table
from fractal.commands import annotate, embed
from fractal.commands.options import positive_int
from fractal.data.cells import Cells
from fractal.model.checkpoint import load
from fractal.reference import read_reference
from fractal.score.metrics import silhouette
from fractal.search.exact import nearest

QUERIES, BANK, DIM, K = 5_000, 100_000, 128, 5
CELLS, CLASSES = 50_000, 203
ANNOTATED, EXACTLY = 200_000, 20_000  # cells
Prepared = tuple[Callable[[], Any], int, float]  # the work, rows that it goes through, what its seconds are scaled by


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES), help="what to time")
    parser.add_argument("--rounds", type=positive_int, default=5, help="runs of each; slow peers run once (default: 5)")
    files = parser.add_argument_group("files, of `embed` and `annotate`")
    files.add_argument(
        "--model-path", type=Path, default=Path("data/fractal_adapter_4L.pt"), help="checkpoint (default: %(default)s)"
    )
    files.add_argument(
        "--input", type=Path, default=Path("data/stratified.parquet"), help="its cells (default: %(default)s)"
    )
    files.add_argument(
        "--reference", type=Path, default=Path("data/reference"), help="folder of a reference (default: %(default)s)"
    )
    return parser


# Each makes the data and returns the work that is timed.
def knn(name: str, _: argparse.Namespace) -> Prepared:
    torch.manual_seed(0)
    queries, bank = (normalize(torch.randn(n, DIM), dim=1) for n in (QUERIES, BANK))

    def flat() -> Any:
        import faiss  # here: only this process needs it

        index = faiss.IndexFlatIP(DIM)
        index.add(bank.numpy())
        return index.search(queries.numpy(), K)[1]

    def brute() -> Any:
        from sklearn.neighbors import NearestNeighbors

        return NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(bank).kneighbors(queries)[1]

    work = {
        "ours": lambda: nearest(queries, bank, K).numpy(),
        "faiss flat": flat,
        "torch matmul + topk": lambda: torch.cat([(q @ bank.T).topk(K).indices for q in queries.split(1_000)]).numpy(),
        "scikit-learn brute": brute,
    }
    return work[name], QUERIES, 1.0


def silhouettes(name: str, _: argparse.Namespace) -> Prepared:
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (CELLS,))
    vectors = torch.randn(CLASSES, DIM)[labels] + torch.randn(CELLS, DIM)

    def pairs() -> float:
        from sklearn.metrics import silhouette_score

        return silhouette_score(vectors.numpy(), labels.numpy(), metric="cosine")

    return {"ours": lambda: silhouette(vectors, labels), "scikit-learn": pairs}[name], CELLS, 1.0


def embedding(name: str, args: argparse.Namespace) -> Prepared:
    with Cells.open(args.input) as source:
        rows = source.num_rows
    adapter, _ = load(args.model_path)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        adapter.encode(torch.ones(1_000, adapter.dim))
    square, flops = torch.randn(4096, 4096), rows * counter.get_total_flops() / 1_000

    def script() -> None:
        with tempfile.TemporaryDirectory() as folder:
            files = ["--model-path", str(args.model_path), "--input", str(args.input), "--device", "cpu"]
            embed.main([*files, "--output", str(Path(folder) / "out.parquet")])

    if name == "ours":
        return script, rows, 1.0
    return lambda: square @ square, rows, flops / (2 * 4096**3)


def annotating(name: str, args: argparse.Namespace) -> Prepared:
    with Cells.open(args.input) as source:
        chunks, cells = source.chunks(), list[np.ndarray]()
        while sum(map(len, cells)) < ANNOTATED and (chunk := next(chunks, None)):
            cells.append(chunk[1])
    vectors = np.concatenate(cells)[:ANNOTATED]
    if name == "whole command":
        folder = tempfile.TemporaryDirectory()
        np.save(Path(folder.name) / "cells.npy", vectors)

        def command() -> None:
            with folder:
                files = ["--input", f"{folder.name}/cells.npy", "--output", f"{folder.name}/labels.tsv"]
                annotate.main(["--reference", str(args.reference), *files, "--device", "cpu"])

        return command, len(vectors), 1.0
    voting = read_reference(args.reference).annotator.voting
    if name == "exact search":
        assert isinstance(voting.neighbours, Neighbours)
        vectors, voting.neighbours.lengths = vectors[:EXACTLY], []
    return lambda: voting(vectors).path, len(vectors), 1.0


# Stage -> its parts; the second is what the first is compared with. Those in SLOW run once.
STAGES: dict[str, tuple[Callable[[str, argparse.Namespace], Prepared], list[str]]] = {
    "knn": (knn, ["ours", "faiss flat", "torch matmul + topk", "scikit-learn brute"]),
    "silhouette": (silhouettes, ["ours", "scikit-learn"]),
    "embed": (embedding, ["ours", "floor: its products"]),
    "annotate": (annotating, ["ours", "exact search", "whole command"]),
}
SLOW = {"scikit-learn brute", "scikit-learn", "exact search"}


def timed(name: str, args: argparse.Namespace) -> tuple[float, float, int, float, Any]:
    """-> seconds, CPU seconds, rows, peak memory of this process in MB, and what came out."""
    work, rows, scale = STAGES[args.stage][0](name, args)
    wall, cpu = time.perf_counter(), time.process_time()
    out = work()
    wall, cpu = (time.perf_counter() - wall) * scale, (time.process_time() - cpu) * scale
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return wall, cpu, rows, peak, out if isinstance(out, (np.ndarray, float)) else None


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    names = STAGES[args.stage][1]
    runs: dict[str, list[Any]] = {name: [] for name in names}
    jobs = [name for turn in range(args.rounds) for name in names if turn == 0 or name not in SLOW]
    spawn = multiprocessing.get_context("spawn")  # a forked process would start with the memory of this one
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for name in tqdm(jobs, unit="run", desc=args.stage):
            runs[name].append(pool.submit(timed, name, args).result())

    peer = [run[:2] for run in runs[names[1]]]
    lines = []
    for name in names:
        wall, cpu, rows, peak = np.median([run[:4] for run in runs[name]], axis=0)
        pairs = list(zip(runs[name], peer, strict=False))  # of the same turn, so that they met the same load
        ratios = np.median([np.array(run[:2]) / other for run, other in pairs], axis=0)
        line = [name, f"{len(runs[name])}", f"{wall:.2f}", f"{cpu:.2f}", f"{rows / wall:,.0f}", f"{peak:,.0f}"]
        lines.append([*line, *(f"{ratio:.2f}" for ratio in ratios)])
    header = ["", "Runs", "Seconds", "CPU s", "Rows/s", "Peak MB", f"x {names[1]}", "x in CPU s"]
    print(f"{args.stage}, {torch.get_num_threads()} threads, medians\n\n{table(header, lines)}")
    for name in names:
        if (out := runs[name][0][4]) is not None:
            ours = np.atleast_1d(runs["ours"][0][4])[: len(np.atleast_1d(out))]
            print(f"{name}: agrees with ours to {np.isclose(out, ours, rtol=0, atol=1e-5).mean():.5f}")


if __name__ == "__main__":
    run(main)
