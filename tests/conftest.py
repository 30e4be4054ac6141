"""Small releases for the tests, written by hnswlib itself, and the folder of real ones."""

import csv
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import hnswlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import settings

import ingest
import stratify
from fractal.model.recipes import RECIPES

settings.register_profile("patient", deadline=None)  # its 200 ms an example fail on a busy machine
settings.load_profile("patient")
torch.set_num_threads(1)  # the tensors are tiny: a second thread would mostly wait for the first

TYPES = [
    "B cell",
    "CD14-low, CD16-positive monocyte",
    "fibroblast",
    "natural killer cell",
    "regulatory T cell",
    "type II pneumocyte",
]


def write_release(
    folder: Path,
    vectors: np.ndarray,
    labels: Sequence[str],
    studies: Sequence[str] | None = None,
    types: Sequence[str] = TYPES,
    threads: int = 1,
    spare: int = 0,
) -> hnswlib.Index:
    """A model_v1.1 folder, the index built by hnswlib with room for `spare` more cells."""
    (folder / "annotation").mkdir(parents=True)
    with open(folder / "label_ints.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([["", "0"], *enumerate(types)])
    lines = labels if studies is None else [f"{a}\t{b}" for a, b in zip(labels, studies, strict=True)]
    (folder / "annotation" / "reference_labels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    index = hnswlib.Index(space="cosine", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors) + spare, M=8, ef_construction=20)
    index.add_items(vectors, np.arange(len(vectors)), num_threads=threads)
    index.save_index(str(folder / "annotation" / "labelled_kNN.bin"))
    return index


def clustered(labels: Sequence[str], dim: int = 16, spread: float = 0.5, seed: int = 0) -> np.ndarray:
    """(n, dim) float32: cells around one random centre per type."""
    rng = np.random.default_rng(seed)
    names, codes = np.unique(labels, return_inverse=True)
    vectors = rng.normal(size=(len(names), dim))[codes] + spread * rng.normal(size=(len(labels), dim))
    return vectors.astype(np.float32)


def labelled_cells(n: int, seed: int = 0, dim: int = 16, **obs: object) -> anndata.AnnData:
    """n cells of the six TYPES and three donors; the same types lie in the same places for every seed."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(TYPES, n)
    centres = clustered(TYPES, dim, spread=0.0)
    vectors = centres[np.searchsorted(TYPES, kind)] + 0.5 * rng.normal(size=(n, dim))
    table = pd.DataFrame({"cell_type": kind, "donor": rng.choice(["a", "b", "c"], n), **obs})
    table.index = [f"cell {seed}-{i}" for i in range(n)]
    return anndata.AnnData(np.zeros((n, 1), np.float32), obs=table, obsm={"X_scVI": vectors.astype(np.float32)})


def write_h5ad(path: Path, vectors: np.ndarray, **obs: object) -> Path:
    data = anndata.AnnData(np.zeros((len(vectors), 1), np.float32), obs=pd.DataFrame(obs).set_axis(
        [f"cell {i}" for i in range(len(vectors))]), obsm={"X_pca": vectors})  # fmt: skip
    data.write_h5ad(path)
    return path


@pytest.fixture
def h5ad(tmp_path: Path) -> Path:
    """60 cells of 6 types; one without a label."""
    labels = [*TYPES * 10]
    labels[7] = None  # type: ignore[call-overload]
    return write_h5ad(tmp_path / "cells.h5ad", clustered(TYPES * 10), kind=labels, donor=["a", "b"] * 30)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """A shell starts what it runs in the background with SIGINT ignored; the tests that send one would never end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def few_steps() -> Iterator[None]:
    """An epoch takes 12 steps of 128 cells, for 30 of 512: the cells here are few, and a fit trains six times."""
    recipe = RECIPES["fractal"]
    RECIPES["fractal"] = replace(recipe, min_steps=12, batch_size=128)
    yield
    RECIPES["fractal"] = recipe


@pytest.fixture(autouse=True)
def subnormal_numbers() -> Iterator[None]:
    """train.py turns them off for the whole process, and hypothesis then refuses to draw floats."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def first_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, and what ingest.py and stratify.py make of it; the tests get copies."""
    folder, rng = tmp_path_factory.mktemp("first_steps"), np.random.default_rng(0)
    labels = [*TYPES, *rng.choice(TYPES, 594, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])]
    studies = rng.choice(["s1", "s2", "s3"], 600).tolist()
    write_release(folder / "model_v1.1", clustered(labels), labels, studies, threads=4)
    cells, output = str(folder / "cells.parquet"), str(folder / "stratified.parquet")
    ingest.main(["--model-dir", str(folder / "model_v1.1"), "--output", cells])
    stratify.main(["--input", cells, "--output", output])
    return folder


@pytest.fixture
def release(first_steps: Path, tmp_path: Path) -> Path:
    """600 cells of 6 types and 3 studies, 16-d, in a folder with a space and an umlaut in its name."""
    return shutil.copytree(first_steps / "model_v1.1", tmp_path / "ein Atlas für Zellen" / "model_v1.1")


@pytest.fixture
def stratified(release: Path, first_steps: Path, tmp_path: Path) -> Path:
    """The same cells after ingest.py and stratify.py."""
    for name in ("cells.parquet", "cells.hierarchy.tsv", "stratified.parquet"):
        shutil.copyfile(first_steps / name, tmp_path / name)
    return tmp_path / "stratified.parquet"


@pytest.fixture(params=["pbmc_tonsil", "fetal_organs"])
def real_release(request: pytest.FixtureRequest) -> Path:
    """A real atlas in SCimilarity's layout; these tests are skipped where FRACTAL_REAL_DATA is not set."""
    root = os.environ.get("FRACTAL_REAL_DATA")
    if not root:
        pytest.skip("FRACTAL_REAL_DATA is not set")
    return Path(root) / request.param / "model_v1.1"


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a script's main as the command line does; expect exit code 2 and one line, and return that line."""
    from fractal.base.errors import run

    def check(main: Callable[[list[str]], None], *argv: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run(lambda: main([str(a) for a in argv]))
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert "Traceback" not in "".join(lines)
        return errors[0]

    return check


def columns(annotator: Any, x: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """The columns of the output, (n,) each; text that is missing is ""."""
    from fractal.annotate.answers import answer_columns

    table = answer_columns(annotator.answer(x, **options), annotator.tree)
    text = {name for name in table.column_names if pa.types.is_dictionary(table[name].type)}
    return {
        name: (column.cast(pa.string()).fill_null("") if name in text else column).to_pandas().to_numpy()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
