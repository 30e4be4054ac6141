"""What a stage of the pipeline costs at each size: time, memory, files, and how far it is from the machine's limit.

    uv run python -m benchmarks.scale --cells 100_000 1_000_000 7_913_892

Each line is a process of its own, the start of Python included, on a SIMULATED release. Under a stage stand its peers:
what does, with the same files, the least that the stage could do, or does it in the usual way. `x` is the stage's time
over the peer's. CPU s is what the line has computed: where others use the machine too, it says more than the time.

read + write     read the index once and write the finished Parquet file's bytes once, flushed to disk
hnswlib          load_index and get_items of all cells: no labels, no Parquet (up to 1,000,000 cells, 7 GB)
Parquet copy     read and write the Parquet file with Arrow, row group by row group, flushed to disk

--json keeps the measured lines, also from run to run; --model reads them, fits what a stage takes at all sizes but the
largest, holds that against the largest, and prints what 10^6 to 10^10 cells would take (docs/scale.md).

RSS is the peak of all resident pages, with those of mapped files, which the system takes back when it needs them; anon
is the peak of those that it can't take back. What a line reads is dropped from the page cache before it starts.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
from tqdm import tqdm

from benchmarks import plan
from fractal.base.errors import InputError, run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import positive_float, positive_int
from fractal.data.atlas import Atlas
from fractal.data.parquet import write_tables

INDEX, CELLS, STRATIFIED = "model_v1.1/annotation/labelled_kNN.bin", "cells.parquet", "stratified.parquet"
ADAPTER, FIGURES, EMBEDDED = "adapter.pt", "eval.json", "embedded.parquet"
REFERENCE, LABELS = "reference/reference.parquet", "labels.parquet"
BLOCK = 4 << 20  # bytes that are read and written at once
ROOM = 2_900  # bytes of disk a cell: index, three Parquet files, and a temporary file or a copy
EVERY = 0.02  # seconds between two looks at a process's memory


def read_and_write(folder: Path) -> None:
    block = bytearray(BLOCK)
    with open(folder / INDEX, "rb", buffering=0) as file:
        while file.readinto(block):
            pass
    left = (folder / CELLS).stat().st_size
    with atomic_write(folder / "copy") as part, open(part, "wb", buffering=0) as file:
        while left:
            left -= file.write(block[:left])


def hnswlib_items(folder: Path) -> None:
    cells = Atlas.open(folder / CELLS)
    index = hnswlib.Index(space="cosine", dim=cells.dim)
    index.load_index(str(folder / INDEX))
    index.get_items(np.arange(cells.num_rows), return_type="numpy")


def parquet_copy(folder: Path) -> None:
    atlas = Atlas.open(folder / CELLS)
    write_tables(folder / "copy", atlas.data.tables(), {})


@dataclass(frozen=True)
class Peer:
    name: str
    do: Callable[[Path], None]
    reads: Sequence[str]
    most: int = 2**63  # cells; not run above


@dataclass(frozen=True)
class Stage:
    """A script, and what its time is held against. A later stage may read any file of an earlier one."""

    name: str
    module: str  # imported in its own process only: torch is 400 MB and some seconds
    flags: str  # {cells} and {folder} are filled in
    reads: Sequence[str]
    writes: str
    peers: Sequence[Peer] = field(default_factory=tuple)


STAGES = [
    Stage("simulate", "benchmarks.simulate", "--cells {cells} --output {folder}/model_v1.1", [], INDEX),
    Stage(
        "ingest",
        "ingest",
        f"--model-dir {{folder}}/model_v1.1 --output {{folder}}/{CELLS}",
        [INDEX],
        CELLS,
        [
            Peer("read + write", read_and_write, [INDEX]),
            Peer("hnswlib", hnswlib_items, [INDEX], most=1_000_000),
        ],
    ),
    Stage(
        "stratify",
        "stratify",
        f"--input {{folder}}/{CELLS} --output {{folder}}/{STRATIFIED}",
        [CELLS],
        STRATIFIED,
        [Peer("Parquet copy", parquet_copy, [CELLS])],
    ),
    Stage(  # 100,000 cells to train on, where there are so many: 20 epochs at most
        "train",
        "train",
        f"--input {{folder}}/{STRATIFIED} --output {{folder}}/{ADAPTER} --max-samples 117647",
        [STRATIFIED],
        ADAPTER,
    ),
    Stage(
        "train, all cells, 1 epoch",
        "train",
        f"--input {{folder}}/{STRATIFIED} --output {{folder}}/all.pt --max-samples 0 --epochs 1",
        [STRATIFIED],
        "all.pt",
    ),
    Stage(
        "eval",
        "eval",
        f"--input {{folder}}/{STRATIFIED} --model-path {{folder}}/{ADAPTER} --json {{folder}}/{FIGURES}",
        [STRATIFIED],
        FIGURES,
    ),
    Stage(
        "eval, all cells as bank",
        "eval",
        f"--input {{folder}}/{STRATIFIED} --model-path {{folder}}/{ADAPTER} --bank all --json {{folder}}/all.json",
        [STRATIFIED],
        "all.json",
    ),
    Stage(
        "embed",
        "fractal.commands.embed",
        f"--input {{folder}}/{STRATIFIED} --model-path {{folder}}/{ADAPTER} --output {{folder}}/{EMBEDDED}",
        [STRATIFIED],
        EMBEDDED,
    ),
    Stage(
        "reference",
        "fractal.commands.reference",
        f"--input {{folder}}/{STRATIFIED} --model-path {{folder}}/{ADAPTER} --output {{folder}}/reference",
        [STRATIFIED],
        REFERENCE,
    ),
    Stage(  # each cell is compared with the 50,000 of the reference
        "annotate",
        "fractal.commands.annotate",
        f"--input {{folder}}/{CELLS} --reference {{folder}}/reference --output {{folder}}/{LABELS}",
        [CELLS],
        LABELS,
    ),
]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cells",
        type=positive_int,
        nargs="+",
        default=[100_000, 1_000_000, 7_913_892],
        help="sizes of the releases (default: 100_000 1_000_000 7_913_892, which is SCimilarity's)",
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names, help="lines to measure (default: all)")
    parser.add_argument(
        "--keep", action="store_true", help="leave the files in FOLDER/CELLS, where later --stages find them"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("data/scale"),
        help="where the files go, 2.9 GB for a million cells; a size's files are removed when it is done "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="file that measured lines are appended to, one JSON object each")
    parser.add_argument("--model", type=Path, metavar="JSON", help="measure nothing: a model from lines of --json")
    parser.add_argument(
        "--price", type=positive_float, default=0.04, help="of --model: dollars for an hour of a core (default: 0.04)"
    )
    return parser


def drop_from_cache(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):  # not on macOS, where every line finds its files in memory
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # only clean pages can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start_script(module: str, flags: list[str]) -> None:
    importlib.import_module(module).main(flags)


def quietly(log: Path, do: Callable[..., None], *args: object) -> None:
    """In a new process: what it prints goes into a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run(lambda: do(*args))


def memory_of(pid: int | None) -> dict[str, int]:
    """VmHWM and RssAnon of a process in bytes; empty where there is no /proc, or the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {words[0][:-1]: int(words[1]) * 1024 for words in fields if words[0] in ("VmHWM:", "RssAnon:")}


def cpu_of_children() -> float:
    """Seconds that ended processes of ours have computed, user and system."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(folder: Path, name: str, reads: Sequence[str], do: Callable[..., None], *args: object) -> dict[str, float]:
    """Run `do(*args)` in a new process -> seconds, seconds of computing, and the peaks of memory in bytes."""
    for file in reads:
        drop_from_cache(folder / file)
    log = folder / f"{name}.log"
    process = multiprocessing.get_context("spawn").Process(target=quietly, args=(log, do, *args))
    peaks: dict[str, float] = {"VmHWM": float("nan"), "RssAnon": float("nan")}
    began, spent = time.perf_counter(), cpu_of_children()
    process.start()
    try:
        while process.is_alive():
            for key, value in memory_of(process.pid).items():
                peaks[key] = value if np.isnan(peaks[key]) else max(peaks[key], value)
            process.join(EVERY)
    finally:  # after Ctrl-C, nobody is left who writes
        process.kill()
        process.join()
    peaks |= {"seconds": time.perf_counter() - began, "cpu": cpu_of_children() - spent}
    if process.exitcode:
        last = log.read_text().splitlines()[-1:]
        raise InputError(f"{name} ended with exit code {process.exitcode}: {''.join(last)}")
    return peaks


def row(cells: int, name: str, result: dict[str, float], size: str, ratio: str) -> list[str]:
    peaks = ["-" if np.isnan(result[key]) else f"{result[key] / 1e6:,.0f}" for key in ("VmHWM", "RssAnon")]
    times = [f"{result['seconds']:.1f}", f"{result['cpu']:.1f}", f"{cells / result['seconds']:,.0f}"]
    return [name, f"{cells:,}", *times, *peaks, size, ratio]


def measure_stages(
    stages: list[Stage], cells: int, folder: Path, bar: tqdm, keep: Callable[[dict[str, Any]], None]
) -> list[list[str]]:
    """All lines of one size; `keep` is given what was measured of each stage."""
    rows = []
    for stage in stages:
        bar.set_postfix_str(f"{stage.name}, {cells:,} cells")
        flags = [word.format(cells=cells, folder=folder) for word in stage.flags.split()]
        own = measure(folder, stage.name, stage.reads, start_script, stage.module, flags)
        keep({"stage": stage.name, "cells": cells, **own})
        rows.append(row(cells, stage.name, own, f"{(folder / stage.writes).stat().st_size / 1e6:,.0f}", ""))
        bar.update()
        for peer in stage.peers:
            if cells <= peer.most:
                other = measure(folder, peer.name, peer.reads, peer.do, folder)
                rows.append(row(cells, f"- {peer.name}", other, "", f"{own['seconds'] / other['seconds']:.2f}"))
            bar.update()
        (folder / "copy").unlink(missing_ok=True)
    return rows


@contextmanager
def folder_of(cells: int, folder: Path, keep: bool) -> Iterator[Path]:
    """Where the files of one size lie: for good, or until they are measured."""
    if keep:
        (folder / str(cells)).mkdir(exist_ok=True)
        yield folder / str(cells)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            yield Path(name)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.model:
        print(plan.tables(plan.Line.read(args.model), args.price))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.folder).free
    if free < ROOM * max(args.cells):
        raise InputError(
            f"{args.folder}: has {free / 1e9:.1f} GB free, of {ROOM * max(args.cells) / 1e9:.1f} GB that are needed; "
            "give another --folder, or fewer --cells"
        )

    def keep(line: dict[str, Any]) -> None:
        if args.json:
            with open(args.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    rows: list[list[str]] = []
    stages = [stage for stage in STAGES if stage.name in args.stages]
    lines = len(args.cells) * sum(1 + len(stage.peers) for stage in stages)
    with tqdm(total=lines, unit="line", desc="scale") as bar:
        for cells in args.cells:
            with folder_of(cells, args.folder, args.keep) as folder:
                rows += measure_stages(stages, cells, folder, bar, keep)
    print(table(["Stage", "Cells", "Seconds", "CPU s", "Cells/s", "RSS MB", "anon MB", "File MB", "x"], rows))


if __name__ == "__main__":
    run(main)
