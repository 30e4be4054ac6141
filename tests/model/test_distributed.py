"""Several processes train what one trains, with losses as close; a job ends with one line where one of them dies."""

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from fractal.base.errors import InputError
from fractal.data.atlas import LabelledVectors
from fractal.model import distributed
from fractal.model.distributed import Group
from fractal.model.preparation import check_settings
from fractal.model.recipes import FRACTAL, PUBLISHED, RECIPES, Settings

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
TWO = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
LOST = "another process of this job has ended"
FEW = ["--epochs", "3", "--scale-dim", "4", "--batch-size", "64", "--device", "cpu"]


def start(flags: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TORCHRUN, *flags], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def lines_of(process: subprocess.Popen[str]) -> tuple[list[str], list[str]]:
    """What it prints until it ends, and of its errors those in the form of our own; pytest shows all on failure."""
    out, err = process.communicate(timeout=300)
    print(err)
    return out.splitlines(), [line for line in err.splitlines() if re.match("error: |interrupted: ", line)]


def checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_shares_hold_every_row_once():
    for size in range(1, 6):
        for n in 0, 1, 7, 1_000:
            shares = [Group(rank, size).share(n) for rank in range(size)]
            assert np.array_equal(np.concatenate([np.arange(n)[share] for share in shares]), np.arange(n))
            lengths = [share.stop - share.start for share in shares]
            assert max(lengths) - min(lengths) <= 1


def test_the_published_recipe_is_refused():
    cells = LabelledVectors(
        np.zeros((50, 4), np.float32), np.zeros((50, 2), np.int64), [["a"], ["a"]], ("system", "type")
    )
    with pytest.raises(InputError, match="without torchrun"):
        check_settings(Settings(PUBLISHED), cells, "cells", Group(0, 2))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(stratified: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RECIPES, "fractal", FRACTAL)  # as in the two, which know nothing of the tests' short epochs
    one, two = tmp_path / "one.pt", tmp_path / "two" / "two.pt"
    flags = [*FEW, "--input", str(stratified)]
    running = start([*flags, "--output", str(two)])
    train.main([*flags, "--output", str(one)])
    alone = capsys.readouterr().out.splitlines()
    together, errors = lines_of(running)
    assert running.returncode == 0
    assert errors == []

    def losses(lines: list[str]) -> list[float]:
        return [float(match[1]) for line in lines if (match := re.match(r"epoch +\d+  loss ([\d.]+)", line))]

    assert len(losses(together)) == 3  # said once
    assert losses(together) == pytest.approx(losses(alone), rel=0.02)
    assert together[0] == alone[0] + ", 2 processes"
    assert [path.name for path in two.parent.iterdir()] == ["two.pt"]
    found, expected = checkpoint(two), checkpoint(one)
    for key in ("config", "classes", "split", "training"):
        assert found[key] == expected[key]
    for name, share in expected["validation"].items():  # of 90 cells: two standard errors
        assert found["validation"][name] == pytest.approx(share, abs=2 * math.sqrt(share * (1 - share) / 90) + 0.02)
    for name in ("mean", "axes", "class_means"):  # of all rows, not of one process's
        torch.testing.assert_close(found["state"][name], expected["state"][name], rtol=1e-4, atol=1e-5)


def one_of_two(code: str, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """One of two processes, started without torchrun; with port 0 the other one can't come."""
    return subprocess.Popen([sys.executable, "-c", code, *flags], cwd=ROOT, env=os.environ | TWO | environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


WAITS = """
from fractal.base.errors import run
from fractal.model import distributed
print("begun", flush=True)
def main():
    with distributed.joined("cpu"):
        raise AssertionError
run(main)
"""


@pytest.mark.parametrize(("environment", "says"), [({"RANK": "0"}, "1/2"), ({}, "RANK expected")])
def test_where_the_other_processes_do_not_come_one_line_says_so(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in (TWO | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "JOIN", timedelta(seconds=1))
    with pytest.raises(InputError) as error, distributed.joined("cpu"):
        raise AssertionError
    line = str(error.value)
    assert line.startswith("WORLD_SIZE is 2, but not so many processes have met (")
    assert says in line
    assert "\n" not in line


@pytest.mark.slow
def test_a_process_that_waits_for_others_answers_sigterm():
    process = one_of_two(WAITS, RANK="0")
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(1)
    process.terminate()
    _, errors = lines_of(process)
    assert process.returncode == 143
    assert errors == ["interrupted: nothing half-written was left behind"]


DIES = """
import os, signal, sys, time
import train
from fractal.base.errors import run
from fractal.model.training import Trainer
step = Trainer.step

def dying(self, rows):
    loss = step(self, rows)
    if self.steps_done == 2 * self.steps + int(os.environ["MORE"]):
        if self.group.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1)  # until its end has been noticed
    return loss

Trainer.step = dying
run(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", ["0", "1"])
def test_a_process_that_dies_between_two_exchanges_is_noticed_in_the_next(more: str, stratified: Path, tmp_path: Path):
    """After the last step of an epoch that is the exchange of losses, after others that of the forward pass."""
    output = tmp_path / "out" / "adapter.pt"
    flags = [*FEW, "--input", str(stratified), "--output", str(output)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pair = [one_of_two(DIES, *flags, RANK=rank, MASTER_PORT=port, MORE=more) for rank in ("0", "1")]
    _, errors = lines_of(pair[0])
    lines_of(pair[1])
    assert [process.returncode for process in pair] == [2, -signal.SIGKILL]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {LOST}; ")
    assert [path.name for path in output.parent.iterdir()] == ["adapter.partial.pt"]


def kill_rank(launcher: int, rank: str, how: int) -> None:
    """Send a signal to the process that torchrun has given this rank."""
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                parent = re.search(r"PPid:\t(\d+)", (process / "status").read_text())
                environment = (process / "environ").read_bytes().split(b"\0")
            except OSError:  # it has just ended, or is another user's
                continue
            if parent and int(parent[1]) == launcher and f"RANK={rank}".encode() in environment:
                os.kill(int(process.name), how)
                return
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("end", ["rank 1 is killed", "rank 0 is killed", "torchrun is stopped"])
def test_a_job_that_loses_a_process_ends_with_one_line(end: str, stratified: Path, tmp_path: Path):
    output = tmp_path / "out" / "adapter.pt"
    many = ["--epochs", "100000", "--patience", "100000", "--scale-dim", "4", "--device", "cpu"]
    process = start([*many, "--input", str(stratified), "--output", str(output)])
    assert process.stdout is not None
    while "epoch   2" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    if end == "torchrun is stopped":
        process.terminate()
    else:
        kill_rank(process.pid, end.split()[1], signal.SIGKILL)
    _, errors = lines_of(process)
    assert process.returncode != 0
    assert len(errors) == 1, errors
    partial = output.with_name("adapter.partial.pt")
    stopped = errors[0].startswith("interrupted: torchrun is stopped, or has lost a process; ")
    # Of a lost process, the others hear from the connection or from torchrun, whichever comes first.
    assert stopped or (end != "torchrun is stopped" and errors[0].startswith(f"error: {LOST}; "))
    if end == "rank 0 is killed":  # only it writes
        assert list(output.parent.glob("*.pt")) == []
    else:
        assert errors[0].endswith(f"the best of them, written to {partial}")
        assert [path.name for path in output.parent.iterdir()] == [partial.name]
        assert checkpoint(partial)["training"]["partial"]


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path: Path):
    process = start([*FEW, "--input", str(tmp_path / "none.parquet"), "--output", str(tmp_path / "out.pt")])
    _, errors = lines_of(process)
    assert process.returncode != 0
    assert len(errors) == 1
    assert "none.parquet: no such file" in errors[0]
    assert not (tmp_path / "out.pt").exists()
