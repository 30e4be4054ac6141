"""A stopped training run goes on and ends with the weights of one that nothing happened to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from fractal.cli import run
from fractal.resume import TrainingState

FLAGS = ["--epochs", "4", "--scale-dim", "4", "--device", "cpu", "--batch-size", "64"]


def trained(data: Path, output: Path, *more: str) -> dict:
    train.main(["--input", str(data), "--output", str(output), *FLAGS, *more])
    return torch.load(output, weights_only=True)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.fixture
def killed(stratified: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train, and die in the epoch after the second, as by kill -9: nothing is tidied up."""

    def start(output: Path, *more: str) -> Path:
        written: list[tuple[object, ...]] = []
        write = TrainingState.write

        def dying(self: TrainingState, *progress: object) -> None:
            if len(written) == 2:
                raise RuntimeError("killed")
            written.append(progress)
            write(self, *progress)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingState, "write", dying)
            with pytest.raises(RuntimeError, match="killed"):
                trained(stratified, output, *more)
        assert not output.exists()
        return output.with_name(output.name + ".resume")

    return start


@pytest.mark.parametrize("recipe", ["fractal", "published", "mrl"])
def test_a_killed_run_ends_with_the_same_checkpoint(killed, stratified: Path, tmp_path: Path, recipe: str, capsys):
    more = ["--recipe", recipe, *(["--val-ratio", "0"] if recipe == "mrl" else [])]
    whole = trained(stratified, tmp_path / "whole.pt", *more)
    state = killed(tmp_path / "a.pt", *more)
    assert set(torch.load(state, weights_only=True)) == {"flags", "parts", "random", "progress"}
    torch.randn(3)  # whatever happened to the random numbers meanwhile
    resumed = trained(stratified, tmp_path / "a.pt", *more, "--resume")
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert same(whole, resumed)
    assert not state.exists()
    assert not Path(f"{tmp_path}/whole.pt.resume").exists()


def test_it_needs_the_same_flags_and_input(fails, killed, stratified: Path, tmp_path: Path):
    state = killed(tmp_path / "a.pt")
    argv = ["--output", tmp_path / "a.pt", *FLAGS, "--resume"]
    message = fails(train.main, "--input", stratified, *argv, "--seed", "7", "--lr", "0.5")
    assert "a.pt.resume: of a run with lr 0.002, not 0.5, seed 0, not 7;" in message
    assert "of a run with input " in fails(train.main, "--input", tmp_path / "cells.parquet", *argv)
    state.write_bytes(state.read_bytes()[:-1000])
    assert "a.pt.resume: damaged" in fails(train.main, "--input", stratified, *argv)
    state.write_bytes(b"")
    assert "a.pt.resume: damaged" in fails(train.main, "--input", stratified, *argv)
    assert not (tmp_path / "a.pt").exists()


def test_without_a_state_or_the_flag_it_starts_from_the_beginning(killed, stratified: Path, tmp_path: Path, capsys):
    state = killed(tmp_path / "a.pt")
    first = trained(stratified, tmp_path / "a.pt")
    assert "a.pt.resume of a stopped run is replaced" in capsys.readouterr().out
    assert not state.exists()
    assert same(first, trained(stratified, tmp_path / "b.pt", "--resume"))
    assert "b.pt.resume is not there: starting from the beginning" in capsys.readouterr().out


def test_ctrl_c_keeps_the_best_epoch_and_the_way_on(stratified: Path, tmp_path: Path, monkeypatch, capsys):
    whole = trained(stratified, tmp_path / "whole.pt")
    validate, calls = train.Validator.__call__, []

    def interrupted(self, adapter):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return validate(self, adapter)

    monkeypatch.setattr(train.Validator, "__call__", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(lambda: train.main(["--input", str(stratified), "--output", str(tmp_path / "a.pt"), *FLAGS]))
    assert stop.value.code == 130
    best = torch.load(tmp_path / "a.pt", weights_only=True)["training"]["best_epoch"]
    line = f"interrupted: epoch {best}, the best so far, written to {tmp_path}/a.pt; --resume goes on"
    assert [text for text in capsys.readouterr().err.splitlines() if "interrupted" in text] == [line]
    assert same(whole, trained(stratified, tmp_path / "a.pt", "--resume"))


def test_ctrl_c_in_the_first_epoch_leaves_nothing(stratified: Path, tmp_path: Path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Validator, "__call__", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        run(lambda: train.main(["--input", str(stratified), "--output", str(tmp_path / "a.pt"), *FLAGS]))
    assert "interrupted: nothing half-written was left behind\n" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_diverging_run_leaves_no_state(fails, stratified: Path, tmp_path: Path, monkeypatch):
    losses = iter([0.0] * 40)

    def loss(self, adapter, rows):
        return sum(p.sum() for p in adapter.parameters()) * next(losses, float("nan"))

    monkeypatch.setattr(train.PrefixObjective, "forward", loss)
    assert "give a lower --lr" in fails(train.main, "--input", stratified, "--output", tmp_path / "a.pt", *FLAGS)
    assert not list(tmp_path.glob("a.pt*"))
