"""Break each script while it runs: is every output then the old whole file, the new whole file, or nothing?

    uv run python -m benchmarks.faults

Each script runs on 2,000 simulated cells, in a forked process, into a folder that is empty or holds the outputs of
another run. It is killed at random moments, and before each of its file operations; the operations fail one by one; it
is stopped by SIGINT and SIGTERM; files may not grow beyond a limit; the disk is a small tmpfs (where mounting is
allowed). After each fault the folder is looked at, and the same command must then succeed, end with the very bytes of
a run that nothing happened to, and leave nothing else behind.
"""

import argparse
import ctypes
import errno
import hashlib
import importlib
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from anndata import AnnData
from tqdm import tqdm

from fractal.base.errors import InputError, run
from fractal.base.files import recover
from fractal.base.table import table
from fractal.commands.options import non_negative_int, positive_int
from fractal.model.checkpoint import load

# What is run: module, and its flags. {in} holds the outputs of the lines before, made with seed {seed}.
SCRIPTS = {
    "benchmarks.simulate": "--cells 2000 --seed {seed} --output {out}/model_v1.1",
    "ingest": "--model-dir {in}/model_v1.1 --output {out}/cells.parquet",
    "stratify": "--input {in}/cells.parquet --output {out}/stratified.parquet",
    "train": "--input {in}/stratified.parquet --output {out}/a.pt --epochs 3 --scale-dim 4 --device cpu",
    "eval": "--model-path {in}/a.pt --input {in}/stratified.parquet --device cpu --json {out}/a.json",
    "embed": "--model-path {in}/a.pt --input {in}/stratified.parquet --output {out}/e.parquet --device cpu",
    "reference": "--model-path {in}/a.pt --input {in}/stratified.parquet --output {out}/reference --device cpu",
    "annotate": "{in}/cells.h5ad --use-rep X --reference {in}/reference --output {out}/labels.h5ad --device cpu",
    "export": "--model-path {in}/a.pt --output {out}/a.onnx",
    "fit": "{in}/cells.h5ad --use-rep X --labels kind --output {out}/fitted --epochs 1 --device cpu",
    "index": "--input {in}/e.parquet --output {out}/index --device cpu",
    "search": "--query {in}/e.parquet --index {in}/index --output {out}/hits.tsv --device cpu",
}
PIPELINE = ("ingest", "stratify", "train", "eval")  # scripts; the others are commands, `fractal NAME`
FAULTS = ("kill", "kill at each operation", "failing operation", "SIGINT", "SIGTERM", "file size limit", "full disk")
STOPS = {signal.SIGINT, signal.SIGTERM}
Files = dict[str, str]  # path in the folder -> sha256


def module(script: str) -> ModuleType:
    """The module of a script, or of a command."""
    return importlib.import_module(script if script in PIPELINE or "." in script else f"fractal.commands.{script}")


def contents(folder: Path) -> Files:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def start(script: str, flags: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run a script's main in a forked process, which saves the imports -> its process id."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the script has begun
    if child := os.fork():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        tqdm.set_lock(threading.RLock())  # its own is shared with the parent: killed while it is held, all would wait
        prepare()
        run(lambda: (signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS), module(script).main(flags))[1])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:  # also where the log takes no more: what lies above in the stack is the parent's business
        os._exit(code)


def wait(child: int) -> int:
    """-> exit code; -9 for a killed process. Fails loudly on one that doesn't end."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1000


def at_operation(number: int, folder: Path, reached: Path, act: Callable[[], None]) -> Callable[[], None]:
    """Before the `number`-th file operation of this process that Python does in `folder`: make `reached`, and `act`."""

    def install() -> None:
        seen = iter(range(number + 1))

        def hook(event: str, args: tuple) -> None:
            in_folder = any(str(arg).startswith(str(folder)) for arg in args if isinstance(arg, str | Path))
            if event in ("open", "os.rename", "os.remove", "os.mkdir") and in_folder and next(seen, -1) == number:
                reached.touch()
                act()

        sys.addaudithook(hook)

    return install


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def mount(folder: Path, size: int) -> bool:
    return not ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={size}".encode())


def write_h5ad(cells: Path) -> None:
    """The cells of a Parquet file as an .h5ad beside it."""
    table = pq.read_table(cells)
    obs = pd.DataFrame({"kind": table["level4_subtype"].to_pylist()}, index=[f"cell {i}" for i in range(len(table))])
    AnnData(obs=obs, obsm={"X": np.stack(table["embedding"].to_numpy())}).write_h5ad(cells.with_suffix(".h5ad"))


class Bench:
    """Everything that is needed to break one script: two sets of inputs, and what comes out of each."""

    def __init__(self, script: str, base: Path) -> None:
        self.script, self.base, self.out, self.log = script, base, base / "out" / script, base / "log"
        self.reached = base / "reached"
        self.good: list[Files] = []
        self.duration = 0.0
        for seed in (0, 1):
            done = base / f"in{seed}"
            began = time.monotonic()
            if code := wait(start(script, self.flags(seed, done), self.log)):
                raise InputError(f"{script}: exit code {code} without any fault: {self.log.read_text()[-500:]}")
            self.duration = time.monotonic() - began
            self.out.mkdir(parents=True)
            wait(start(script, self.flags(seed, self.out), self.log))
            self.good.append(contents(self.out))
            shutil.rmtree(self.out)

    def flags(self, seed: int, out: Path) -> list[str]:
        values = {"in": str(self.base / f"in{seed}"), "out": str(out), "seed": seed}
        return SCRIPTS[self.script].format(**values).split()

    def prepare_folder(self, older: bool) -> None:
        """The outputs of the run on the first inputs, or nothing; the faults happen to the one on the second inputs."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in self.good[0] if older else ():
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.base / "in0" / name, self.out / name)

    def judge(self, older: bool, code: int, fault: str) -> str:
        """What the fault left behind: "old", "new", "nothing", "mixed" (all whole), "best so far", or a failure."""
        graceful = "kill" not in fault
        if not graceful:  # as whoever reads a folder does: it may have been killed between two renames
            for folder in {Path(name).parts[0] for name in self.good[1] if len(Path(name).parts) > 1}:
                recover(self.out / folder)
        found = contents(self.out)
        if graceful and (code not in (0, 2, 130, 143) or "Traceback" in self.log.read_text()):
            return "wrong exit"
        left = found.keys() - self.good[1].keys()
        if fault == "failing operation":  # it may be the one that tidies up; the run after it must do so
            left = {name for name in left if not any(part.endswith(".part") for part in Path(name).parts)}
        if graceful and left:
            return "left over"
        kinds = set()
        for name, new in self.good[1].items():
            old = self.good[0][name] if older else None
            if found.get(name) == new == old:  # the file is the same in both runs
                continue
            if found.get(name) == new:
                kinds.add("new")
            elif found.get(name) == old:
                kinds.add("old" if older else "nothing")
            elif code in (130, 143) and name.endswith(".pt"):
                load(self.out / name)
                kinds.add("best so far")
            else:
                return "half-written"
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def again(self) -> str | None:
        """The same command, undisturbed -> what is wrong with it."""
        if code := wait(start(self.script, self.flags(1, self.out), self.log)):
            return f"rerun: exit code {code}: {self.log.read_text()[-300:]}"
        found = contents(self.out)
        return None if found == self.good[1] else f"rerun: {sorted(found.items() ^ self.good[1].items())}"

    def once(self, fault: str, number: int, rng: random.Random, counts: Counter[str]) -> bool:
        """One run with one fault -> did the fault happen? It does not where the run has fewer operations."""
        older = bool(number % 2)
        self.prepare_folder(older)
        prepare: Callable[[], None] = lambda: None  # noqa: E731
        largest = max(os.path.getsize(self.base / "in1" / name) for name in self.good[1])
        if fault == "kill at each operation":
            prepare = at_operation(number // 2, self.out, self.reached, kill)
        elif fault == "failing operation":
            prepare = at_operation(number // 2, self.out, self.reached, fail)
        elif fault == "file size limit":
            limit = rng.randrange(largest)
            prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
        elif fault == "full disk":
            older = False
            shutil.rmtree(self.out)
            self.out.mkdir()
            if not mount(self.out, max(4096, rng.randrange(largest))):
                counts["skipped"] += 1
                return False
        child = start(self.script, self.flags(1, self.out), self.log, prepare)
        stop = {"kill": signal.SIGKILL, "SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}.get(fault)
        if stop is not None:
            time.sleep(rng.random() * self.duration)
            os.kill(child, stop)
        code = wait(child)
        outcome, said = self.judge(older, code, fault), self.log.read_text()
        counts["runs"] += 1
        counts[outcome] += 1
        if fault == "full disk":
            ctypes.CDLL(None).umount(bytes(self.out))
        elif (wrong := self.again()) is not None:
            counts["failed rerun"] += 1
            tqdm.write(f"{self.script}, {fault} {number}: {wrong}", file=sys.stderr)
        if outcome in ("wrong exit", "left over", "half-written"):
            tqdm.write(f"{self.script}, {fault} {number}: {outcome}, exit code {code}", file=sys.stderr)
            tqdm.write(said[-1500:], file=sys.stderr)
        shutil.rmtree(self.out)
        happened = self.reached.exists()
        self.reached.unlink(missing_ok=True)
        return happened


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive_int, default=50, help="at random moments, per script (default: 50)")
    parser.add_argument(
        "--others", type=positive_int, default=10, help="of each other random fault, per script (default: 10)"
    )
    parser.add_argument("--scripts", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS), help="(default: all)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="(default: all)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of moments and limits (default: 0)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    torch.set_num_threads(1)  # a forked process has no other threads
    for script in SCRIPTS:
        module(script)
    bad, rows = ("wrong exit", "left over", "half-written", "failed rerun"), []
    remaining = set(args.scripts)
    with TemporaryDirectory() as folder:
        for script in SCRIPTS:  # the ones that are not asked for too, for the inputs of the next
            if not remaining:
                break
            remaining.discard(script)
            bench = Bench(script, Path(folder))
            if script == "ingest":
                for number in (0, 1):
                    write_h5ad(Path(folder, f"in{number}", "cells.parquet"))
            for fault in args.faults if script in args.scripts else ():
                counts, rng, number = Counter[str](), random.Random(f"{args.seed} {script} {fault}"), 0
                each = fault in ("kill at each operation", "failing operation")  # until the run gets through
                wanted = args.kills if fault == "kill" else args.others
                missed = 0
                with tqdm(desc=f"{script}, {fault}", total=None if each else wanted, unit="run") as bar:
                    while missed < 2 if each else number < wanted:
                        missed = 0 if bench.once(fault, number, rng, counts) else missed + 1
                        number += 1
                        bar.update()
                whole = [counts[kind] for kind in ("old", "new", "mixed", "nothing", "best so far")]
                rows.append([f"{script}: {fault}", *map(str, [counts["runs"], *whole, *(counts[k] for k in bad)])])
    print(table(["Fault", "Runs", "Old", "New", "Mixed", "Nothing", "Best so far", *map(str.capitalize, bad)], rows))
    if any(cell != "0" for row in rows for cell in row[-len(bad) :]):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
