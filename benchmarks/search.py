"""What truncation buys in search: recall@10 of the full vectors' neighbours, against time per query and bytes per cell.

    uv run python benchmarks/search.py --model-path data/demo/fractal_adapter_4L.pt --input data/demo/stratified.parquet

The queries are test cells, the bank are cells that are not. Exact search with every prefix, and with float16 vectors;
funnels, which take a shortlist by one prefix and rank it by longer ones; and an hnswlib index for every prefix. `Batch`
is the time per query when all are asked at once, `Single` when they are asked one by one. Recall counts how many of the
10 exact neighbours by full vector are found; the accuracies, 5-NN by the neighbours found, say whether it matters.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hnswlib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds its own folder only

from eval import choose_rows, split_of
from fractal.adapter import embed, load
from fractal.atlas import read_rows
from fractal.cli import LEVELS, InputError, non_negative_int, positive_int, run, table
from fractal.metrics import K, majority
from fractal.search import funnel, nearest

RECALL = 10  # neighbours
SINGLE = 200  # queries that are also asked one by one
Search = Callable[[int, int], Tensor]  # queries from row a to row b -> (b - a, 10) rows of the bank, nearest first


def stages(text: str) -> list[tuple[int, int]]:
    """An argparse type: "1:1000,4" -> [(1, 1000), (4, 10)], prefixes and how many rows each leaves."""
    parts = [part.split(":") for part in text.split(",")]
    found = [(int(part[0]), int(part[1]) if len(part) > 1 else RECALL) for part in parts]
    prefixes, keep = zip(*found, strict=True)
    if len(found) < 2 or list(prefixes) != sorted(set(prefixes)) or list(keep) != sorted(keep, reverse=True):
        raise argparse.ArgumentTypeError(f"{text} is not PREFIX:ROWS,...,PREFIX, prefixes rising and rows falling")
    if min(prefixes) < 1 or keep[-1] != RECALL:
        raise argparse.ArgumentTypeError(f"{text}: prefixes start at 1, and the last one leaves {RECALL} rows")
    return found


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model-path", type=Path, default=Path("data/fractal_adapter_4L.pt"), help="checkpoint (default: %(default)s)"
    )
    files.add_argument(
        "--input",
        type=Path,
        default=Path("data/stratified.parquet"),
        help="the Parquet file that it was trained on (default: %(default)s)",
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument(
        "--num-bank",
        type=positive_int,
        default=100_000,
        help="cells to search, drawn from all but the test cells (default: %(default)s)",
    )
    rows.add_argument("--num-samples", type=positive_int, default=2_000, help="queries (default: %(default)s)")
    rows.add_argument("--seed", type=non_negative_int, default=0, help="of the draws (default: %(default)s)")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--funnels",
        type=stages,
        nargs="+",
        default=[stages(text) for text in ("1:200,4", "1:2000,4", "2:200,4", "2:2000,4", "3:50,4", "3:200,4")]
        + [stages("2:2000,3:100,4")],
        metavar="STAGES",
        help="'2:2000,3:100,4' takes the 2,000 nearest by prefix 2, of these the 100 nearest by prefix 3, and of these "
        f"the {RECALL} nearest by prefix 4, the full vector (default: prefix 1, 2 or 3 first)",
    )
    search.add_argument("--ef", type=positive_int, default=100, help="hnswlib's search width (default: %(default)s)")
    search.add_argument("--rounds", type=positive_int, default=3, help="the fastest of so many counts (default: 3)")
    return parser


def exact(queries: Tensor, bank: Tensor) -> Search:
    unit = bank.dtype == torch.float32  # rounded to float16, lengths are off by 1e-3, and recall by more
    return lambda a, b: nearest(queries[a:b], bank, RECALL, unit)


def in_stages(queries: list[Tensor], banks: list[Tensor], plan: list[tuple[int, int]]) -> Search:
    keep = [rows for _, rows in plan]
    chosen = [banks[prefix - 1] for prefix, _ in plan]
    return lambda a, b: funnel([queries[prefix - 1][a:b] for prefix, _ in plan], chosen, keep)


def graph(queries: Tensor, bank: Tensor, ef: int) -> tuple[Search, float, float]:
    """-> the search in an hnswlib index (M = 16, ef_construction = 200), seconds to build it, bytes per cell."""
    index = hnswlib.Index(space="ip", dim=bank.shape[1])  # the vectors are of unit length
    index.init_index(max_elements=len(bank), M=16, ef_construction=200, random_seed=0)
    index.set_num_threads(torch.get_num_threads())
    began = time.perf_counter()
    index.add_items(bank.numpy())
    seconds = time.perf_counter() - began
    index.set_ef(max(ef, RECALL))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "index.bin")
        index.save_index(path)
        size = os.path.getsize(path) / len(bank)
    q = queries.numpy()
    return lambda a, b: torch.from_numpy(index.knn_query(q[a:b], RECALL)[0].astype(np.int64)), seconds, size


def milliseconds(search: Search, n: int, step: int, rounds: int) -> float:
    """Per query, asked `step` at a time; the fastest round."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        for start in range(0, n, step):
            search(start, min(start + step, n))
        times.append(time.perf_counter() - began)
    return 1_000 * min(times) / n


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    adapter, checkpoint = load(args.model_path)
    _, query_rows = choose_rows(checkpoint, args.model_path, args.input, args.num_samples, args.seed)
    rest = np.flatnonzero(~split_of(checkpoint, args.model_path).is_test(args.input))
    bank_rows = np.random.default_rng(args.seed).permutation(rest)[: args.num_bank]
    levels, n = adapter.num_levels, len(query_rows)
    if too_long := [plan for plan in args.funnels if plan[-1][0] > levels]:
        raise InputError(f"{args.model_path}: has {levels} blocks, --funnels asks for {too_long[0][-1][0]}")
    cells = read_rows(args.input, np.concatenate([query_rows, bank_rows]))
    labels = torch.from_numpy(cells.labels)
    vectors = embed(adapter, torch.from_numpy(cells.vectors))
    queries, banks = [v[:n] for v in vectors], [v[n:] for v in vectors]
    names = [*(f"prefix {j}" for j in range(1, levels)), "full"]
    widths = [bank.shape[1] for bank in banks]

    half = banks[-1].half()
    searches: list[tuple[str, Search, float | None, float]] = []
    for j in reversed(range(levels)):
        searches.append((f"exact, {names[j]}", exact(queries[j], banks[j]), None, 4 * widths[j]))
    searches.insert(1, ("exact, full, float16", exact(queries[-1], half), None, 2 * widths[-1]))
    for plan in args.funnels:
        title = " > ".join(f"{names[j - 1]} ({keep:,})" for j, keep in plan)
        size = sum(4 * widths[j - 1] for j, _ in plan)  # each stage has vectors of its own, side by side
        searches.append((f"funnel, {title}", in_stages(queries, banks, plan), None, size))
    for j in tqdm(reversed(range(levels)), total=levels, unit="index", desc="hnswlib"):
        search, seconds, size = graph(queries[j], banks[j], args.ef)
        searches.append((f"hnswlib, {names[j]}", search, seconds, size))

    truth, lines = nearest(queries[-1], banks[-1], RECALL), []
    for name, search, build, size in tqdm(searches, unit="search", desc="search"):
        rows = search(0, n)
        recall = (rows[:, :, None] == truth[:, None, :]).any(2).float().mean()
        accuracy = (majority(labels[n:][rows[:, :K]]) == labels[:n]).float().mean(0)
        batch = milliseconds(search, n, n, args.rounds)
        single = milliseconds(search, min(n, SINGLE), 1, args.rounds)
        line = [name, f"{size:,.0f}", "-" if build is None else f"{build:.1f}", f"{batch:.3f}", f"{single:.3f}"]
        lines.append([*line, f"{recall:.3f}", *(f"{share:.3f}" for share in accuracy)])
    header = [
        "Search",
        "Bytes/cell",
        "Build s",
        "Batch ms",
        "Single ms",
        "Recall@10",
        *(k.capitalize() for k in LEVELS),
    ]
    config = checkpoint["config"]
    print(
        f"{n:,} test cells of {args.input} against {len(bank_rows):,} others, recipe {config['recipe']}, "
        f"{torch.get_num_threads()} threads\n\n{table(header, lines)}"
    )


if __name__ == "__main__":
    run(main)
