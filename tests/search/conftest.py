"""Clustered cells with hostile columns, and an index of 3,000 of them in lists of 40."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from fractal.data.cells import Cells
from fractal.search import build, open_index
from fractal.search.exact import nearest
from fractal.search.folder import Space
from fractal.search.index import Index
from fractal.search.source import Source
from tests.conftest import TYPES, clustered

DIM = 16
BLOCKS = (4, 4, 4, 4)
TISSUES = ("lung", "blood", "gut")


def table_of(n: int, seed: int = 0, first: int = 0) -> pa.Table:
    """Columns of n cells: one with a value missing, a number, and names that are hostile."""
    rng = np.random.default_rng(seed)
    tissue = [TISSUES[i] if i < 3 else None for i in rng.integers(0, 4, n)]
    return pa.table({
        "cell_id": [f"cell {first + i}" for i in range(n)],
        "level1_system": rng.choice(["Immune", "Neural"], n).tolist(),
        "level2_type": rng.choice(TYPES, n).tolist(),
        "tissue": pa.array(tissue, pa.string()).dictionary_encode(),
        "age": rng.integers(0, 90, n),
        "a name|with\x1b": rng.choice(["x|y", "<b>", "\x1b[2J"], n).tolist(),
    })  # fmt: skip


def cells_of(vectors: np.ndarray, table: pa.Table, adapters: tuple[str, ...] = ("a1", "a2")) -> Source:
    def columns(rows: slice) -> pa.Table:
        return table.slice(rows.start, rows.stop - rows.start)

    cells = Cells.from_matrix(Path("cells.parquet"), vectors.shape, vectors.dtype, vectors.__getitem__, columns)
    space = Space(vectors.shape[1], "fractal", BLOCKS, adapters)
    return Source(cells, space)


def vectors_of(n: int, seed: int = 0) -> np.ndarray:
    return clustered(np.random.default_rng(seed).choice(TYPES, n).tolist(), DIM, 0.7, seed)


@pytest.fixture
def many_lists(monkeypatch: pytest.MonkeyPatch):
    small_lists(monkeypatch)


def small_lists(patch: pytest.MonkeyPatch) -> None:
    """Lists of 40 cells, pieces of 500, and gathering in several rounds, so that small files have many of each."""
    for name, value in {"CELLS_PER_LIST": 40, "PIECE": 500, "BUFFER": 20_000}.items():
        patch.setattr(build, name, value)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `index`, made once."""
    path = tmp_path_factory.mktemp("built") / "index"
    with pytest.MonkeyPatch.context() as patch:
        small_lists(patch)
        build.build(path, cells_of(vectors_of(3_000), table_of(3_000)))
    return path


@pytest.fixture
def index(built: Path, tmp_path: Path, many_lists) -> Index:
    shutil.copytree(built, tmp_path / "index")
    return open_index(tmp_path / "index")


def exact(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    return nearest(torch.tensor(queries), torch.tensor(vectors), k).numpy()


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)]))
