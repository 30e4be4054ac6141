"""What truncation buys in search: recall of the full vectors' neighbours, against time per query and bytes per cell.

    uv run python -m benchmarks.truncation --model-path data/fractal_adapter_4L.pt --input data/stratified.parquet

2,000 test cells look for their neighbours among the training cells: by exact search with every prefix and with float16
vectors; by funnels, which take a shortlist by one prefix and rank it by longer ones; and by an hnswlib index for every
prefix. Takes some minutes.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import hnswlib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fractal.base.errors import InputError, run
from fractal.base.table import table
from fractal.commands.options import add, non_negative_int
from fractal.data.atlas import Atlas
from fractal.model.adapter import embed, pick_device
from fractal.reference import load_adapter
from fractal.score.checkpoints import choose_rows, of_one_split
from fractal.score.metrics import K, majority
from fractal.search.exact import nearest

SEARCHES = 2_000  # queries
RECALL = 10  # neighbours
SINGLE = 200  # queries that are also searched one by one
ROUNDS = 3  # the fastest of so many counts
EF = 100  # search width of hnswlib
# Stages (prefix, rows that it leaves); 0 is the full vector.
FUNNELS = [
    [(1, 200), (0, RECALL)],
    [(1, 2_000), (0, RECALL)],
    [(2, 200), (0, RECALL)],
    [(2, 2_000), (0, RECALL)],
    [(3, 50), (0, RECALL)],
    [(3, 200), (0, RECALL)],
    [(2, 2_000), (3, 100), (0, RECALL)],
]
Search = Callable[[int, int], Tensor]  # queries from row a to row b -> (b - a, 10) rows of the bank, nearest first


def exact(queries: Tensor, bank: Tensor) -> Search:
    unit = bank.dtype == torch.float32  # rounded to float16, lengths are off by 1e-3, and recall by more
    return lambda a, b: nearest(queries[a:b], bank, RECALL, unit)


def funnel(queries: Sequence[Tensor], banks: Sequence[Tensor], keep: Sequence[int]) -> Tensor:
    """Search in stages: all rows by the first vectors, what is left by the second, ... -> (n, keep[-1]) int64.

    Stage i ranks by the cosine of queries[i] (n, d_i) and banks[i] (m, d_i), both of unit length, and leaves keep[i]
    rows; longer prefixes come later. Adaptive retrieval of Kusupati et al. 2022 (Matryoshka representation learning).
    """
    rows = nearest(queries[0], banks[0], keep[0], unit=True)
    for vectors, bank, k in zip(queries[1:], banks[1:], keep[1:], strict=True):
        size = max(1, 2**18 // (rows.shape[1] * bank.shape[1]))  # queries at a time: 1 MB of gathered rows
        ranked = []
        for batch, shortlist in zip(vectors.split(size), rows.split(size), strict=True):
            # index_select: three times as fast as bank[shortlist]
            gathered = bank.index_select(0, shortlist.flatten()).float().view(*shortlist.shape, -1)
            similarity = torch.bmm(gathered, batch[:, :, None])[:, :, 0]
            ranked.append(shortlist.gather(1, similarity.topk(min(k, similarity.shape[1]), dim=1).indices))
        rows = torch.cat(ranked)
    return rows


def in_stages(queries: list[Tensor], banks: list[Tensor], plan: list[tuple[int, int]]) -> Search:
    keep = [rows for _, rows in plan]
    chosen = [banks[prefix - 1] for prefix, _ in plan]
    return lambda a, b: funnel([queries[prefix - 1][a:b] for prefix, _ in plan], chosen, keep)


def graph(queries: Tensor, bank: Tensor) -> tuple[Search, float, float]:
    """-> the search in an hnswlib index (M = 16, ef_construction = 200), seconds to build it, bytes per cell."""
    index = hnswlib.Index(space="ip", dim=bank.shape[1])  # the vectors are of unit length
    index.init_index(max_elements=len(bank), M=16, ef_construction=200, random_seed=0)
    index.set_num_threads(torch.get_num_threads())
    began = time.perf_counter()
    index.add_items(bank.cpu().numpy())
    seconds = time.perf_counter() - began
    index.set_ef(EF)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "index.bin")
        index.save_index(path)
        size = os.path.getsize(path) / len(bank)
    q, device = queries.cpu().numpy(), queries.device
    return (
        lambda a, b: torch.from_numpy(index.knn_query(q[a:b], RECALL)[0].astype(np.int64)).to(device),
        seconds,
        size,
    )


def milliseconds(search: Search, n: int, step: int) -> float:
    """Per query, `step` of them at a time; the fastest round."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for start in range(0, n, step):
            search(start, min(start + step, n)).cpu()  # waits for a GPU
        times.append(time.perf_counter() - began)
    return 1_000 * min(times) / n


def search_table(
    queries: list[Tensor], banks: list[Tensor], labels: Tensor, bank_labels: Tensor, levels: Sequence[str]
) -> str:
    """All searches of the bank, one a line.

    queries and banks: prefix 1, prefix 2, ... and last the full vectors, (n, dims) and (m, dims) float32 of length 1,
    m >= 10; labels (n, levels) and bank_labels (m, levels), whose names are `levels`. `Batch` is the time per query
    when all are searched at once, `Single` one by one. Recall@10 is the share of the 10 exact
    neighbours by full vector among the results; the accuracies, 5-NN by the results, say whether it matters.
    """
    blocks, n = len(banks), len(labels)
    names = [*(f"prefix {j}" for j in range(1, blocks)), "full"]
    sizes = [4.0 * bank.shape[1] for bank in banks]  # bytes
    searches: list[tuple[str, Search, float | None, float]] = []
    for j in reversed(range(blocks)):
        searches.append((f"exact, {names[j]}", exact(queries[j], banks[j]), None, sizes[j]))
    searches.insert(1, ("exact, full, float16", exact(queries[-1], banks[-1].half()), None, sizes[-1] / 2))
    for stages in FUNNELS:
        plan = [(prefix or blocks, rows) for prefix, rows in stages]
        if all(prefix < blocks for prefix, _ in plan[:-1]):
            title = " > ".join(f"{names[prefix - 1]} ({rows:,})" for prefix, rows in plan)
            size = sum(sizes[prefix - 1] for prefix, _ in plan)  # each stage has its vectors, side by side
            searches.append((f"funnel, {title}", in_stages(queries, banks, plan), None, size))
    for j in tqdm(reversed(range(blocks)), total=blocks, unit="index", desc="hnswlib"):
        search, seconds, size = graph(queries[j], banks[j])
        searches.append((f"hnswlib, {names[j]}", search, seconds, size))

    truth, lines = nearest(queries[-1], banks[-1], RECALL), []
    for name, search, build, size in tqdm(searches, unit="search", desc="search"):
        rows = search(0, n)
        recall = (rows[:, :, None] == truth[:, None, :]).any(2).float().mean()
        accuracy = (majority(bank_labels[rows[:, :K]]) == labels).float().mean(0)
        batch, single = milliseconds(search, n, n), milliseconds(search, min(n, SINGLE), 1)
        line = [name, f"{size:,.0f}", "-" if build is None else f"{build:.1f}", f"{batch:.3f}", f"{single:.3f}"]
        lines.append([*line, f"{recall:.3f}", *(f"{share:.3f}" for share in accuracy)])
    header = ["Search", "Bytes/cell", "Build s", "Batch ms", "Single ms", "Recall@10"]
    return table([*header, *(level.capitalize() for level in levels)], lines)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=Path, required=True, help="checkpoint of train.py, or a reference")
    parser.add_argument("--input", type=Path, required=True, help="the Parquet file that it was trained on")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the draw (default: %(default)s)")
    add(parser, "--device")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = pick_device(args.device)
    (model,) = of_one_split([args.model_path], [load_adapter(args.model_path, args.device)])
    atlas = Atlas.open(args.input)
    train, test = choose_rows(model, atlas, SEARCHES, args.seed)
    if len(train) < RECALL:
        raise InputError(f"{args.input}: it takes {RECALL} training cells or more")
    cells = atlas.read(np.concatenate([test, train]))
    queries, bank = (embed(model.adapter, torch.from_numpy(part.vectors).to(device)) for part in cells.split(len(test)))
    labels, bank_labels = torch.from_numpy(cells.labels).to(device).split([len(test), len(train)])
    print(f"{args.model_path}: {len(test):,} test cells against {len(train):,} training cells\n")
    print(search_table(queries, bank, labels, bank_labels, cells.levels))


if __name__ == "__main__":
    run(main)
