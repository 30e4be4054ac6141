"""A reference by the scripts and the command, made once for all commands."""

from pathlib import Path

import pytest

import ingest
import train
from fractal.commands import reference as bundle
from tests.conftest import TYPES, clustered, write_h5ad


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cells.parquet, adapter.pt and ref/, a bundle of them; made once."""
    folder = tmp_path_factory.mktemp("reference")
    labels = TYPES * 120
    path = write_h5ad(folder / "cells.h5ad", clustered(labels), kind=labels)
    cells, model = str(folder / "cells.parquet"), str(folder / "adapter.pt")
    ingest.main(["--h5ad", str(path), "--obsm", "X_pca", "--label-key", "kind", "--output", cells])
    # short, and enough validation cells to calibrate on
    quick = ["--epochs", "2", "--val-ratio", "0.3", "--scale-dim", "4", "--device", "cpu"]
    train.main(["--input", cells, "--output", model, *quick])
    bundle.main(["--model-path", model, "--input", cells, "--output", str(folder / "ref"), "--device", "cpu"])
    return folder
