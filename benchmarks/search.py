"""Search among 10^5 to 8 * 10^6 cells: `fractal index` beside exact search, HNSW graphs and product quantisation.

    OMP_NUM_THREADS=1 uv run --group benchmarks python -m benchmarks.search --cells 100000 1000000 7913892

SIMULATED releases, embedded by an adapter that was trained on one of them. 1,000 cells of the file are asked for, one
at a time, by one thread, in a warm process; the cell itself is no hit. Every line is built in one process, and opened
and asked in another.

exact            fractal.search.exact.nearest: every vector in memory
fractal index    the lists of `fractal index`; beside it, the levels by their prefixes
6 bits a number  the same lists without the vectors, as in a browser: 96 bytes a cell, by faiss's scalar quantiser, of
                 what is left after the list's centre
IVF-PQ           faiss: lists, and 64 or 32 bytes a cell, without the vectors, too (CytoVerse's way); of more than two
                 million cells in our lists, whose time is not counted
hnswlib, usearch, faiss HNSW    graphs, M = 16, in memory
LanceDB          lists, and 32 bytes a cell; the 50 best are compared by the vectors, which its table on disk holds

A build that takes longer than --minutes is stopped: its line is empty, and another run does not try it again.

recall@10     of the ten nearest by exact search with the full vector
class in ten  share of the queries with their own label among the ten hits, and
by majority   with the label that most of the ten have: of the level for a prefix, else the subtype (in brackets: by
              exact search with the same prefix; with the full vector)
beside        MB on disk beside the vectors as float16; what holds its own copy of them is counted without it
anon          MB of memory that the system can't take back
CPU ms        of a query: where others use the machine too, it says more than the time
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import hnswlib
import lancedb
import numpy as np
import pyarrow as pa
import torch
from lancedb.query import LanceVectorQueryBuilder
from tqdm import tqdm
from usearch.index import Index as USearch

import ingest
import stratify
import train
from benchmarks import simulate
from benchmarks.scale import memory_of
from fractal.base.errors import InputError, run
from fractal.base.table import table
from fractal.commands import embed
from fractal.commands import index as index_command
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas
from fractal.data.parquet import Parquet, level_columns
from fractal.search import Index, open_index
from fractal.search.exact import Nearest, nearest
from fractal.search.folder import part_names

QUERIES, K, SEED = 1_000, 10, 0
TRAIN_CELLS, TRAIN_ROWS = 100_000, 60_000  # of the release that the adapter is trained on
EMBEDDED, ADAPTER, TRUTH, VECTORS = "embedded.parquet", "adapter.pt", "truth.npz", "vectors.npy"
OWN_LISTS = 2_000_000  # cells: above, IVF-PQ takes our lists, instead of an hour for lists of its own
SLOW = {"exact"}  # asked fewer queries
SPAWN = multiprocessing.get_context("spawn")  # a forked process would start with the memory of this one
Search = Callable[[np.ndarray], np.ndarray]  # queries (n, dim) -> rows (n, K + 1), the query's own row among them


@dataclass(frozen=True)
class Method:
    name: str
    build: Callable[[Path, Path], None]  # (folder of the data, where it goes)
    open: Callable[[Path, Path], Search]
    vectors_within: int = 0  # bytes a number that its files hold of the vectors themselves
    level: int | None = None  # of the prefix, from 1


def mapped(data: Path) -> np.ndarray:
    return np.load(data / VECTORS, mmap_mode="r")


def pieces(data: Path) -> Any:
    vectors = mapped(data)
    for start in range(0, len(vectors), 65_536):
        yield start, np.array(vectors[start : start + 65_536])  # a copy: torch takes no array that is read-only


# Each peer: how it is built, and how it is opened


def no_build(data: Path, out: Path) -> None:
    out.mkdir()


def open_exact(data: Path, out: Path) -> Search:
    bank = torch.from_numpy(np.array(mapped(data)))
    return lambda queries: nearest(torch.from_numpy(queries), bank, K + 1, unit=True).numpy()


def build_ours(data: Path, out: Path) -> None:
    index_command.main([str(data / EMBEDDED), "--output", str(out)])


def open_ours(prefix: int | None) -> Callable[[Path, Path], Search]:
    def opened(data: Path, out: Path) -> Search:
        index = open_index(out)
        return lambda queries: index.search(queries, K + 1, prefix).cells

    return opened


def build_pq(code: str) -> Callable[[Path, Path], None]:
    def build(data: Path, out: Path) -> None:
        vectors = mapped(data)
        if len(vectors) > OWN_LISTS:
            ours = own_lists(data)
            shape = ours.quantizer, ours.space.dim, len(ours.centroids)
            fill(faiss.IndexIVFPQ(*shape, int(code[2:]), 8, faiss.METRIC_INNER_PRODUCT), ours, data, out)
            return
        lists = max(1, round(len(vectors) / 1_000))
        index = faiss.index_factory(vectors.shape[1], f"IVF{lists},{code}", faiss.METRIC_INNER_PRODUCT)
        some = np.sort(np.random.default_rng(SEED).permutation(len(vectors))[: max(64 * lists, 50_000)])
        index.train(np.ascontiguousarray(vectors[some]))
        for _, piece in pieces(data):
            index.add(piece)
        out.mkdir()
        faiss.write_index(index, str(out / "index.faiss"))

    return build


def own_lists(data: Path) -> Index:
    """Our index, made if it is not there."""
    if not (lists := data / "fractal index").exists():
        build_ours(data, lists)
    return open_index(lists)


def fill(index: Any, ours: Index, data: Path, out: Path) -> None:
    """Train faiss's codes for the lists of our index, put its cells into them, and write that."""
    vectors = mapped(data)
    index.train(vectors[np.sort(np.random.default_rng(SEED).permutation(len(vectors))[:100_000])])
    for part in ours.parts:
        for number in np.flatnonzero(part.sizes).tolist():
            x, rows = part.vectors(number).astype(np.float32), np.array(part.rows(number))
            lists = np.full(len(x), number, np.int64)
            arrays = x, rows, lists  # kept by these names: faiss is given their bare addresses
            index.add_core(len(x), *map(faiss.swig_ptr, arrays))
    out.mkdir()
    faiss.write_index(index, str(out / "index.faiss"))


def build_6bit(data: Path, out: Path) -> None:
    ours, kind = own_lists(data), faiss.ScalarQuantizer.QT_6bit
    shape = ours.quantizer, ours.space.dim, len(ours.centroids)
    index = faiss.IndexIVFScalarQuantizer(*shape, kind, faiss.METRIC_INNER_PRODUCT, True)
    index.sq.rangestat, index.sq.rangestat_arg = faiss.ScalarQuantizer.RS_quantiles, 0.005
    fill(index, ours, data, out)


def open_faiss(data: Path, out: Path) -> Search:
    index = faiss.read_index(str(out / "index.faiss"))
    if hasattr(index, "nprobe"):
        index.nprobe = 16
    else:
        index.hnsw.efSearch = 64
    return lambda queries: index.search(queries, K + 1)[1]


def build_faiss_hnsw(data: Path, out: Path) -> None:
    index = faiss.IndexHNSWFlat(mapped(data).shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    for _, piece in pieces(data):
        index.add(piece)
    out.mkdir()
    faiss.write_index(index, str(out / "index.faiss"))


def build_hnswlib(data: Path, out: Path) -> None:
    vectors = mapped(data)
    index = hnswlib.Index("ip", vectors.shape[1])
    index.init_index(len(vectors), M=16, ef_construction=200)
    for _, piece in pieces(data):
        index.add_items(piece)
    out.mkdir()
    index.save_index(str(out / "index.bin"))


def open_hnswlib(data: Path, out: Path) -> Search:
    index = hnswlib.Index("ip", mapped(data).shape[1])
    index.load_index(str(out / "index.bin"))
    index.set_ef(64)
    return lambda queries: index.knn_query(queries, K + 1, num_threads=1)[0].astype(np.int64)


def build_usearch(data: Path, out: Path) -> None:
    index = USearch(ndim=mapped(data).shape[1], metric="ip", dtype="f16", connectivity=16)
    for start, piece in pieces(data):
        index.add(np.arange(start, start + len(piece)), piece)
    out.mkdir()
    index.save(str(out / "index.usearch"))


def open_usearch(data: Path, out: Path) -> Search:
    index = USearch.restore(str(out / "index.usearch"), view=True)
    assert index is not None
    return lambda queries: np.atleast_2d(index.search(queries, K + 1, threads=1).keys).astype(np.int64)


def build_lancedb(data: Path, out: Path) -> None:
    dim, cells = mapped(data).shape[1], len(mapped(data))
    schema = pa.schema({"row": pa.int64(), "vector": pa.list_(pa.float32(), dim)})

    def batches() -> Iterator[pa.RecordBatch]:
        for start, piece in pieces(data):
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(piece.ravel()), dim)
            yield pa.record_batch([pa.array(np.arange(start, start + len(piece))), vectors], schema=schema)

    cells_table = lancedb.connect(out).create_table("cells", pa.RecordBatchReader.from_batches(schema, batches()))
    cells_table.create_index("dot", num_partitions=max(1, round(cells / 1_000)), num_sub_vectors=32)


def open_lancedb(data: Path, out: Path) -> Search:
    cells_table = lancedb.connect(out).open_table("cells")

    def search(query: np.ndarray) -> np.ndarray:
        asked = cells_table.search(query, query_type="vector")
        assert isinstance(asked, LanceVectorQueryBuilder)
        found = asked.distance_type("dot").nprobes(16).refine_factor(5).limit(K + 1).select(["row", "_distance"])
        return np.array(found.to_arrow()["row"].to_numpy())

    return lambda queries: np.stack([search(query) for query in queries])


METHODS = [
    Method("exact", no_build, open_exact),
    Method("fractal index", build_ours, open_ours(None), 2),
    *(Method(f"fractal index, prefix {j}", build_ours, open_ours(j), 2, j) for j in (1, 2, 3)),
    Method("6 bits a number", build_6bit, open_faiss),
    Method("IVF-PQ, 64 bytes", build_pq("PQ64"), open_faiss),
    Method("IVF-PQ, 32 bytes", build_pq("PQ32"), open_faiss),
    Method("hnswlib", build_hnswlib, open_hnswlib, 4),
    Method("usearch", build_usearch, open_usearch, 2),
    Method("faiss HNSW", build_faiss_hnsw, open_faiss, 4),
    Method("LanceDB", build_lancedb, open_lancedb, 4),
]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cells",
        type=positive_int,
        nargs="+",
        default=[100_000, 1_000_000],
        help="sizes of the releases; 7913892 is SCimilarity's (default: 100000 1000000)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[m.name for m in METHODS],
        metavar="METHOD",
        help="some lines only (default: all)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("data/search"),
        help="where the files go, 2 GB for a million cells; what is there is used again (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes", type=float, default=30, help="that a build may take before it is stopped (default: %(default)s)"
    )
    return parser


def prepare(folder: Path, cells: int) -> None:
    """Make what is missing: the embedded file of a size, its vectors as .npy, and what exact search finds."""
    data = folder / str(cells)
    data.mkdir(parents=True, exist_ok=True)
    if not (data / EMBEDDED).exists():
        if not (folder / ADAPTER).exists():
            release(data, TRAIN_CELLS, "training.parquet")
            stratify.main(["--input", str(data / "training.parquet"), "--output", str(data / "stratified.parquet")])
            flags = ["--max-samples", str(TRAIN_ROWS), "--epochs", "4"]
            train.main(["--input", str(data / "stratified.parquet"), "--output", str(folder / ADAPTER), *flags])
        if not (data / "cells.parquet").exists():
            release(data, cells, "cells.parquet")
        flags = ["--reference", str(folder / ADAPTER), "--output", str(data / EMBEDDED)]
        embed.main([str(data / "cells.parquet"), *flags])
    if not (data / VECTORS).exists():
        part = data / "part.npy"
        dim = Parquet.open(data / EMBEDDED).dim
        matrix = np.lib.format.open_memmap(part, "w+", np.float32, (cells, dim))
        start = 0
        for chunk in Atlas.open(data / EMBEDDED).vectors():
            matrix[start : (start := start + len(chunk))] = chunk
        part.replace(data / VECTORS)
    if not (data / TRUTH).exists():
        rows = np.sort(np.random.default_rng(SEED).choice(cells, min(QUERIES, cells), replace=False))
        vectors = mapped(data)
        queries = np.array(vectors[rows])
        widths = [queries.shape[1] * j // 4 for j in (1, 2, 3, 4)]
        found = [Nearest(torch.from_numpy(queries[:, :width].copy()), K + 1) for width in widths]
        for _, piece in pieces(data):
            for width, one in zip(widths, found, strict=True):
                one.add(torch.from_numpy(piece[:, :width]))
        truth: dict[str, Any] = {f"prefix{j}": without_self(one.rows().numpy(), rows) for j, one in enumerate(found, 1)}
        np.savez(data / TRUTH, rows=rows, queries=queries, **truth)


def release(data: Path, cells: int, name: str) -> None:
    simulate.main(["--cells", str(cells), "--output", str(data / "model_v1.1")])
    ingest.main(["--model-dir", str(data / "model_v1.1"), "--output", str(data / name)])


def without_self(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n, K + 1) rows of the hits -> (n, K), without the query itself, or else without the last."""
    kept = [[row for row in hits if row != own][:K] for hits, own in zip(found.tolist(), rows.tolist(), strict=True)]
    return np.array([hits + [-1] * (K - len(hits)) for hits in kept])


def spent(do: Callable[[], Any]) -> tuple[Any, float, float]:
    """-> what comes out, seconds, and seconds of computing."""
    wall, cpu = time.perf_counter(), time.process_time()
    out = do()
    return out, time.perf_counter() - wall, time.process_time() - cpu


def quietly(do: Callable[..., Any], *args: Any) -> Any:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return do(*args)


def build(name: str, data: Path, out: Path, facts: Path) -> None:
    """In a process of its own: build, and note what that took."""
    method = next(m for m in METHODS if m.name == name)
    _, wall, cpu = spent(lambda: quietly(method.build, data, out))
    facts.write_text(json.dumps({"seconds": wall, "cpu": cpu}))


def built(name: str, data: Path, out: Path, minutes: float) -> dict[str, float] | None:
    """Build what is not there yet -> what that took, or None if it was stopped."""
    facts = out.with_suffix(".json")
    if not facts.exists():
        process = SPAWN.Process(target=build, args=(name, data, out, facts))
        process.start()
        process.join(60 * minutes)
        if process.exitcode is None:
            process.kill()
            process.join()
            shutil.rmtree(out, ignore_errors=True)
            facts.write_text("null")
        elif process.exitcode:
            raise InputError(f"{name}, {data}: the build failed")
    return json.loads(facts.read_text())


def asked(name: str, data: Path, out: Path) -> dict[str, float]:
    """In a process of its own: open it, and ask."""
    method = next(m for m in METHODS if m.name == name)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    truth = np.load(data / TRUTH)
    before = memory_of(os.getpid()).get("RssAnon", 0)
    search, opening, _ = spent(lambda: method.open(data, out))
    some = 20 if name in SLOW else len(truth["rows"])
    queries, rows = truth["queries"], truth["rows"]
    for query in queries[:some]:  # warm: what it reads is in the page cache then
        search(query[None])
    _, wall, cpu = spent(lambda: [search(query[None]) for query in queries[:some]])
    found = without_self(np.concatenate([search(piece) for piece in np.array_split(queries, 10)]), rows)
    labels = level_columns(Parquet.open(data / EMBEDDED).schema)
    codes, _ = Atlas.open(data / EMBEDDED).codes(labels[(method.level or 4) - 1])
    exact = truth[f"prefix{method.level or 4}"]
    pairs = zip(found.tolist(), truth["prefix4"].tolist(), strict=True)
    names = (
        [out / part_names(0)[i] for i in range(3)]
        if name.startswith("fractal")
        else [file for file in out.rglob("*") if file.is_file()]
    )
    size = sum(file.stat().st_size for file in names) - method.vectors_within * mapped(data).size
    return {
        "opening": opening,
        "wall": 1e3 * wall / some,
        "cpu": 1e3 * cpu / some,
        "recall": sum(len({*a} & {*b}) for a, b in pairs) / (K * len(found)),
        **told("", codes[found], codes[rows]),
        **told("_exact", codes[exact], codes[rows]),
        **told("_full", codes[truth["prefix4"]], codes[rows]),
        "size": size,
        "anon": memory_of(os.getpid()).get("RssAnon", 0) - before,
    }


def told(name: str, hits: np.ndarray, own: np.ndarray) -> dict[str, float]:
    """Codes of the labels of the hits (n, K), and the queries' own (n,) -> how often they agree."""
    most = np.array([np.bincount(row).argmax() for row in hits])
    return {f"any{name}": float((hits == own[:, None]).any(1).mean()), f"most{name}": float((most == own).mean())}


def line(method: Method, cells: int, made: dict[str, float], result: dict[str, float], exact_ms: float) -> list[str]:
    return [
        method.name,
        f"{cells:,}",
        f"{made['seconds']:.0f}",
        f"{made['cpu']:.0f}",
        f"{result['size'] / 1e6:,.0f}",
        f"{result['anon'] / 1e6:,.0f}",
        f"{result['opening']:.2f}",
        f"{result['wall']:.2f}",
        f"{result['cpu']:.2f}",
        f"{exact_ms / result['cpu']:.0f}" if exact_ms else "-",
        "-" if method.level else f"{result['recall']:.3f}",
        *(
            f"{result[kind]:.3f} ({result[kind + '_exact']:.3f}; {result[kind + '_full']:.3f})"
            for kind in ("any", "most")
        ),
    ]


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    methods = [m for m in METHODS if not args.methods or m.name in args.methods]
    lines = []
    with tqdm(total=len(args.cells) * (1 + len(methods)), unit="line", desc="search") as bar:
        for cells in args.cells:
            data = args.folder / str(cells)
            with ProcessPoolExecutor(1, mp_context=SPAWN, max_tasks_per_child=1) as pool:
                pool.submit(quietly, prepare, args.folder, cells).result()
                bar.update()
                exact_ms = 0.0
                for method in methods:
                    bar.set_postfix_str(f"{method.name}, {cells:,} cells")
                    out = data / method.name.split(", prefix")[0]  # all prefixes ask one index
                    try:
                        made = built(method.name, data, out, args.minutes)
                        result = pool.submit(asked, method.name, data, out).result() if made else None
                    except InputError as error:
                        raise InputError(f"{method.name}, {cells:,} cells: {error}") from error
                    if made and result:
                        exact_ms = result["cpu"] if method.name == "exact" else exact_ms
                        lines.append(line(method, cells, made, result, exact_ms))
                    else:
                        lines.append([method.name, f"{cells:,}", f"> {60 * args.minutes:.0f}", *["-"] * 10])
                    bar.update()
    header = ["", "Cells", "Build s", "CPU s", "Beside MB", "anon MB", "Opening s", "ms", "CPU ms", "x exact"]
    print(table([*header, "recall@10", "Class in ten", "By majority"], lines))


if __name__ == "__main__":
    run(main)
