"""Several processes train the adapter of one: the same losses, the same weights, one line where one of them dies."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from fractal.base.cli import InputError
from fractal.data.parquet import LabelledVectors
from fractal.model.distributed import Group
from fractal.model.objective import PrefixObjective
from fractal.model.recipes import PUBLISHED
from fractal.model.training import Counts, Settings, check_settings, prepare

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
FEW = ["--epochs", "3", "--scale-dim", "4", "--batch-size", "64", "--device", "cpu"]


def start(flags: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TORCHRUN, *flags], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)  # fmt: skip


def lines_of(process: subprocess.Popen[str]) -> tuple[list[str], list[str]]:
    """What it prints until it ends, and of its errors those in the form of our own."""
    out, err = process.communicate(timeout=300)
    return out.splitlines(), [line for line in err.splitlines() if re.match("error: |interrupted: ", line)]


def checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_the_shares_of_a_batch_add_up_to_its_loss_and_gradients():
    """Rows, noise and dropout of three processes beside those of one; the last batch lies in one share alone."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(90, 8)).astype(np.float32))
    y = torch.from_numpy(np.stack([np.arange(90) // 45, np.arange(90) // 9], axis=1))
    classes = [["a", "b"], [f"type {i}" for i in range(10)]]
    cells = LabelledVectors(x.numpy(), y.numpy(), classes, ("system", "type"))
    counts: Counts = {(classes[0][i // 5], classes[1][i]): 9 for i in range(10)}
    torch.manual_seed(0)
    fitted, objective = prepare(x, y, cells, counts, Settings(), "cells")
    weights = [*fitted.adapter.parameters(), *objective.parameters()]
    assert isinstance(objective, PrefixObjective)
    whole_x, whole_path = objective.x, objective.path
    for rows in torch.randperm(90)[:40], torch.arange(12):
        losses, gradients = [], []
        for group in Group(), Group(0, 3), Group(1, 3), Group(2, 3):
            share = group.share(90)
            objective.x, objective.path = whole_x[share], whole_path[share]
            torch.manual_seed(7)
            for weight in weights:
                weight.grad = None
            loss = group.loss(objective, fitted.adapter.train(), rows, 90)
            loss.backward()
            losses.append(loss.detach())
            gradients.append(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]))
        torch.testing.assert_close(sum(losses[1:]), losses[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.stack(gradients[1:]).sum(0), gradients[0], rtol=1e-4, atol=1e-5)
        assert len(torch.stack(losses[1:]).unique()) > 1  # the processes did hold different rows


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
        check_settings(Settings(PUBLISHED), 100, cells, "cells", Group(0, 2))


@pytest.mark.slow
def test_two_processes_train_what_one_trains(stratified: Path, tmp_path: Path, capsys):
    one, two = tmp_path / "one.pt", tmp_path / "two" / "two.pt"
    flags = [*FEW, "--input", str(stratified)]
    running = start([*flags, "--output", str(two)])
    train.main([*flags, "--output", str(one)])
    alone = capsys.readouterr().out.splitlines()
    together, errors = lines_of(running)
    assert running.returncode == 0
    assert errors == []

    def figures(lines: list[str]) -> list[str]:
        return [re.sub(r" +\d+\.\d s ", " ", line) for line in lines if line.startswith(("epoch  ", "4 blocks"))]

    assert figures(together) == figures(alone)  # losses and accuracies, to three digits; said once
    assert together[0] == alone[0] + ", 2 processes"
    assert [path.name for path in two.parent.iterdir()] == ["two.pt"]
    found, expected = checkpoint(two), checkpoint(one)
    assert {key: found[key] for key in ("config", "classes", "split", "training", "validation")} == {
        key: expected[key] for key in ("config", "classes", "split", "training", "validation")
    }
    for name, tensor in expected["state"].items():
        torch.testing.assert_close(found["state"][name], tensor, rtol=1e-4, atol=1e-5)


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
    if end == "rank 0 is killed":  # only it writes
        assert errors[0].startswith(("error: another process of this job has ended; ", "interrupted: "))
        assert list(output.parent.glob("*.pt")) == []
    else:
        kind = "interrupted: " if end == "torchrun is stopped" else "error: another process of this job has ended; "
        assert errors[0].startswith(kind)
        assert errors[0].endswith(f"the best of them, written to {partial}")
        assert [path.name for path in output.parent.iterdir()] == [partial.name]
        assert checkpoint(partial)["training"]["partial"]


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path: Path):
    process = start([*FEW, "--input", str(tmp_path / "none.parquet"), "--output", str(tmp_path / "out.pt")])
    _, errors = lines_of(process)
    assert process.returncode != 0
    assert len(errors) == 1
    assert "none.parquet: No such file" in errors[0]
    assert not (tmp_path / "out.pt").exists()
