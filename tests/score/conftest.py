"""A checkpoint that the tests of scores share."""

from pathlib import Path

import pytest

import train


def checkpoint_of(data: Path, out: Path, *flags: str) -> Path:
    few = ["--epochs", "1", "--batch-size", "32", "--scale-dim", "4", "--device", "cpu"]
    train.main(["--input", str(data), "--output", str(out), *few, *flags])
    return out


@pytest.fixture(scope="session")
def trained(first_steps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on the cells of `stratified`."""
    return checkpoint_of(first_steps / "stratified.parquet", tmp_path_factory.mktemp("trained") / "m.pt")
