"""Two workers beside one process: are the rows the same, and what do they cost?

    uv run --extra cluster python -m benchmarks.cluster --cells 1_000_000

Each stage runs on a SIMULATED release as the script of one machine, on one thread, and by `fractal cluster` with two
workers (`train`: by torchrun with two processes, all cells, one epoch). CPU s are those of all processes together,
Ray's own ones among them. Worker MB is the peak of memory of the largest worker, of pages that the system can't take
back, main MB that of the process that plans. Equal: do the outputs agree row for row? Of `train`: its losses, and the
largest difference of a weight.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from benchmarks.scale import memory_of
from fractal.base.errors import InputError, run
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.parquet import read_vectors

EVERY = 0.1  # seconds between two looks at the processes
TICKS = os.sysconf("SC_CLK_TCK")
STAGES = {  # arguments of one process, and of two; a later stage reads the single-machine output of an earlier one
    "ingest": (
        "ingest.py --model-dir {folder}/model_v1.1 --output {folder}/cells.parquet",
        "-m fractal cluster ingest --model-dir {folder}/model_v1.1 --output {folder}/cells --workers 2",
    ),
    "stratify": (
        "stratify.py --input {folder}/cells.parquet --output {folder}/stratified.parquet",
        "-m fractal cluster stratify --input {folder}/cells --output {folder}/stratified --workers 2 --memory 200MB",
    ),
    "train": (
        "train.py --input {folder}/stratified.parquet --output {folder}/one.pt {train} --device cpu",
        "-m torch.distributed.run --standalone --nproc-per-node 2 train.py --input {folder}/stratified.parquet "
        "--output {folder}/two.pt {train} --device cpu",
    ),
    "embed": (
        "-m fractal embed {folder}/stratified.parquet --reference {folder}/one.pt --output {folder}/embedded.parquet "
        "--device cpu",
        "-m fractal cluster embed --input {folder}/stratified --reference {folder}/one.pt --output {folder}/embedded "
        "--workers 2",
    ),
    "reference": (
        "-m fractal reference --input {folder}/stratified.parquet --model-path {folder}/one.pt "
        "--output {folder}/reference",
        "",
    ),
    "annotate": (
        "-m fractal annotate {folder}/cells.parquet --reference {folder}/reference --output {folder}/labels.parquet "
        "--device cpu",
        "-m fractal cluster annotate --input {folder}/cells --reference {folder}/reference --output {folder}/labels "
        "--workers 2",
    ),
}
OUTPUTS = {"ingest": "cells", "stratify": "stratified", "embed": "embedded", "annotate": "labels"}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=positive_int, default=1_000_000, help="of the release (default: %(default)s)")
    parser.add_argument(
        "--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="which ones (default: all)"
    )
    parser.add_argument("--folder", type=Path, help="keep the files here, and use those that are there")
    parser.add_argument("--train", default="--max-samples 0 --epochs 1", help="flags of train (default: %(default)s)")
    return parser


@dataclass
class Cost:
    """What a command and all processes below it took."""

    seconds: float = 0.0
    cpu: dict[int, float] = field(default_factory=dict)  # seconds by process
    main: float = 0.0  # bytes, peaks
    worker: float = 0.0


def processes_below(root: int) -> Iterator[tuple[int, float]]:
    """(process, seconds of computing) of a process and all that it has started, directly or not."""
    parents, spent = {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            parents[int(path.name)] = int(fields[1])
            spent[int(path.name)] = (int(fields[11]) + int(fields[12])) / TICKS
    for process in parents:
        above: int | None = process
        while above is not None and above != root:
            above = parents.get(above)
        if above == root:
            yield process, spent[process]


def is_worker(process: int) -> bool:
    """Does it run tasks of Ray, or is it one of torchrun's?"""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
        return words.startswith(b"ray::") or b"\0RANK=" in Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return False


def measure(arguments: str, log: Path) -> Cost:
    """Run Python with these arguments to its end. Raises InputError where it fails."""
    cost, began = Cost(), time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, *arguments.split()], env=environment, stdout=file, stderr=file)
        try:
            while process.poll() is None:
                for number, cpu in processes_below(process.pid):
                    cost.cpu[number] = cpu
                    memory = memory_of(number).get("RssAnon", 0)
                    if number == process.pid:
                        cost.main = max(cost.main, memory)
                    elif is_worker(number):
                        cost.worker = max(cost.worker, memory)
                time.sleep(EVERY)
        finally:
            process.terminate()
            process.wait()
    if process.returncode:
        raise InputError(f"{log}: a command failed: python {arguments}")
    cost.seconds = time.perf_counter() - began
    return cost


def plain(part: pa.Table) -> pa.Table:
    """Without vectors, and text as text: which names a part's dictionary holds does not matter."""
    found = {name: part[name] for name in part.column_names if name != "embedding"}
    coded = [name for name, column in found.items() if pa.types.is_dictionary(column.type)]
    return pa.table(found | {name: found[name].cast(found[name].type.value_type) for name in coded})


def same_rows(one: Path, many: Path) -> str:
    """Of a file, and a folder of parts: the text of all columns, and how far numbers are from each other."""
    whole, start, most = pq.read_table(one, memory_map=True), 0, 0.0
    for path in sorted(many.glob("part-*.parquet")):
        part = pq.read_table(path)
        rows = whole[start : start + len(part)]
        numbers = [field.name for field in part.schema if pa.types.is_floating(field.type)]
        if not plain(rows).drop_columns(numbers).equals(plain(part).drop_columns(numbers)):
            return f"no, in {path.name}"
        if "embedding" in part.column_names and (read_vectors(rows, one) != read_vectors(part, path)).any():
            return f"no, in {path.name}"
        for name in numbers:
            difference = np.abs(rows[name].to_numpy() - part[name].to_numpy())
            most = max(most, float(np.nanmax(difference, initial=0)))
        start += len(part)
    if start != len(whole):
        return f"no, {start:,} of {len(whole):,} rows"
    return f"all {start:,} rows" + (f", numbers to {most:.0e}" if most else "")


def same_weights(one: Path, two: Path) -> str:
    states = [torch.load(path, weights_only=True)["state"] for path in (one, two)]
    largest = max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])
    return f"to {largest:.0e}"


def losses(log: Path) -> str:
    return ", ".join(re.findall(r"loss (\d+\.\d+)  ", log.read_text()))


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model_v1.1").exists():
            release = f"-m benchmarks.simulate --cells {args.cells} --output {folder}/model_v1.1"
            measure(release, folder / "simulate.log")
        for stage in tqdm(args.stages, unit="stage", desc="cluster"):
            words = [text.format(folder=folder, train=args.train) for text in STAGES[stage]]
            logs = [folder / f"{stage}.{count}.log" for count in (1, 2)]
            costs = [measure(text, log) for text, log in zip(words, logs, strict=True) if text]
            equal = [""]
            if stage in OUTPUTS:
                equal.append(same_rows(folder / f"{OUTPUTS[stage]}.parquet", folder / OUTPUTS[stage]))
            elif stage == "train":
                agree = same_weights(folder / "one.pt", folder / "two.pt")
                equal = [f"loss {losses(logs[0])}", f"loss {losses(logs[1])}, weights {agree}"]
            for label, cost, verdict in zip((stage, "- two workers"), costs, equal, strict=False):
                peaks = [f"{peak / 1e6:,.0f}" if peak else "" for peak in (cost.main, cost.worker)]
                rows.append([label, f"{cost.seconds:.0f}", f"{sum(cost.cpu.values()):.0f}", *peaks, verdict])
    print(f"{args.cells:,} cells\n")
    print(table(["Stage", "Seconds", "CPU s", "Main MB", "Worker MB", "Equal"], rows))


if __name__ == "__main__":
    run(main)
