"""fractal export --to: what is in each database, and the queries of docs/databases.md, held to fractal.search.exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fractal.commands import export
from fractal.model.adapter import FractalAdapter, embed, save
from fractal.search.exact import funnel
from tests.conftest import TYPES, clustered, write_h5ad
from tests.test_docs import ROOT, blocks

CELLS = 360
KINDS = ["duckdb", "lancedb", "qdrant", "parquet"]  # as the document has them
BAD = 7  # a cell without a vector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """adapter.pt and cells.h5ad with a tissue."""
    folder = tmp_path_factory.mktemp("databases")
    torch.manual_seed(0)
    paths = torch.arange(6)[:, None].repeat(1, 4)
    config = {"recipe": "fractal", "dim": 16, "num_levels": 4, "scale_dim": 4, "paths": paths.tolist()}
    config |= {"levels": ["a", "b", "c", "d"], "block_levels": [0, 1, 2, 3]}
    adapter, classes = FractalAdapter(16, 4, 4, paths), [[f"t{i}" for i in range(6)]] * 4
    save(folder / "adapter.pt", adapter, config, classes, split={}, training={}, versions={}, validation=None)
    x = clustered(TYPES * (CELLS // 6))
    x[BAD] = np.nan
    write_h5ad(folder / "cells.h5ad", x, kind=TYPES * (CELLS // 6))
    np.save(folder / "x.npy", x)
    return folder


def exported(folder: Path, kind: str, output: Path, *more: str) -> None:
    files = ["--reference", str(folder / "adapter.pt"), "--vectors", str(folder / "cells.h5ad"), "--use-rep", "X_pca"]
    export.main([*files, "--to", kind, "--output", str(output), *more])


def vectors(folder: Path) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """-> the rows that are exported, their prefix 3 and full vectors."""
    from fractal.model.adapter import load

    good = np.delete(np.arange(CELLS), BAD)
    found = embed(load(folder / "adapter.pt")[0], torch.from_numpy(np.load(folder / "x.npy")[good]))
    return good, found[2], found[3]


@pytest.mark.parametrize(("kind", "place"), [(kind, i) for i, kind in enumerate(KINDS)])
def test_the_documents_query_is_the_funnel(folder: Path, kind: str, place: int, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fractal.commands.databases.CHUNK", 100)  # of 360
    exported(folder, kind, tmp_path / f"cells.{kind}")
    code = blocks(ROOT / "docs" / "databases.md", "python")[place].replace("200", "50")
    good, prefix, full = vectors(folder)
    queries = [3, 100, 358]
    expected = good[funnel([prefix[queries], full[queries]], [prefix, full], [50, 10]).numpy()]
    for query, rows in zip(queries, expected, strict=True):
        names: dict[str, Any] = {"prefix": prefix[query].tolist(), "query": full[query].tolist()}
        exec(compile(code, "docs/databases.md", "exec"), names)
        hits = names["hits"]
        if kind == "qdrant":
            found, tissue = [point.id for point in hits], [point.payload["kind"] for point in hits]
            names["client"].close()
        else:
            found, tissue = (np.asarray(hits[name]).tolist() for name in ("row", "kind"))
        assert sorted(found) == sorted(rows.tolist())
        assert found[0] == good[query]
        assert tissue == [TYPES[row % 6] for row in found]


def test_a_file_of_vectors_keeps_its_columns(folder: Path, tmp_path: Path, capsys):
    exported(folder, "parquet", tmp_path / "a.parquet", "--prefix", "1")
    assert "left out 1 " in capsys.readouterr().out
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.column_names[0] == "row"
    assert set(table.column_names) == {"row", "cell_id", "kind", "prefix_1", "full"}
    good, _, full = vectors(folder)
    assert table["row"].to_pylist() == good.tolist()
    assert np.allclose(np.stack(table["full"].to_numpy()), full, atol=1e-6)
    assert table.schema.metadata[b"recipe"] == b"fractal"
    source = ["--reference", str(folder / "adapter.pt"), "--vectors", str(folder / "x.npy")]
    export.main([*source, "--to", "parquet", "--output", str(tmp_path / "b.parquet")])
    assert pq.read_table(tmp_path / "b.parquet").column_names == ["row", "prefix_3", "full"]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_a_run_that_fails(folder: Path, kind: str, tmp_path: Path, monkeypatch):
    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fractal.commands.databases.write", broken)
    with pytest.raises(KeyboardInterrupt):
        exported(folder, kind, tmp_path / f"cells.{kind}")
    assert list(tmp_path.iterdir()) == []


def test_a_column_of_that_name_is_not_lost(folder: Path, tmp_path: Path, fails):
    x = np.load(folder / "x.npy")[:BAD]
    table = pa.table({"embedding": list(x), "full": range(BAD)})
    pq.write_table(table, tmp_path / "cells.parquet")
    argv = ["--reference", folder / "adapter.pt", "--vectors", tmp_path / "cells.parquet", "--to", "duckdb"]
    assert "a column 'full'" in fails(export.main, *argv, "--output", tmp_path / "cells.duckdb")
    assert not (tmp_path / "cells.duckdb").exists()


def test_flags_that_do_not_go_together(folder: Path, tmp_path: Path, fails):
    model = ["--reference", folder / "adapter.pt"]
    cells = ["--vectors", folder / "cells.h5ad", "--use-rep", "X_pca"]
    assert "--vectors" in fails(export.main, *model, "--to", "duckdb")
    assert "neither" in fails(export.main, *model, *cells, "--to", "duckdb", "--int8-dir", tmp_path)
    assert "at most 3" in fails(export.main, *model, *cells, "--to", "duckdb", "--prefix", "4")
    assert "about --to" in fails(export.main, *model, "--prefix", "2")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").touch()
    line = fails(export.main, *model, *cells, "--to", "lancedb", "--output", tmp_path / "there")
    assert "would be lost" in line
    assert "is the input" in fails(export.main, *model, *cells, "--to", "duckdb", "--output", folder / "cells.h5ad")
