"""fractal export: ONNX held to torch, the Parquet file, and the databases that load it as docs/databases.md says."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fractal.commands import export
from fractal.model import adapter
from fractal.model.adapter import FractalAdapter, embed
from fractal.model.checkpoint import save
from fractal.model.published import PublishedAdapter
from fractal.search.exact import nearest
from tests.conftest import TYPES, clustered, write_h5ad
from tests.test_docs import ROOT, blocks

CELLS = 360
KINDS = ["duckdb", "lancedb", "qdrant"]  # as the document has them
BAD = 7  # a cell without a vector


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """adapter.pt and cells.h5ad with a tissue."""
    folder = tmp_path_factory.mktemp("databases")
    torch.manual_seed(0)
    paths = torch.arange(6)[:, None].repeat(1, 4)
    config = {"recipe": "fractal", "dim": 16, "num_levels": 4, "scale_dim": 4, "paths": paths.tolist()}
    config |= {"levels": ["a", "b", "c", "d"], "block_levels": [0, 1, 2, 3]}
    model, classes = FractalAdapter(16, 4, 4, paths), [[f"t{i}" for i in range(6)]] * 4
    save(folder / "adapter.pt", model, config, classes, split={}, training={}, versions={}, validation=None)
    x = clustered(TYPES * (CELLS // 6))
    x[BAD] = np.nan
    write_h5ad(folder / "cells.h5ad", x, kind=TYPES * (CELLS // 6))
    np.save(folder / "x.npy", x)
    return folder


def exported(folder: Path, output: Path, *more: str) -> None:
    files = ["--reference", str(folder / "adapter.pt"), "--vectors", str(folder / "cells.h5ad"), "--use-rep", "X_pca"]
    export.main([*files, "--to", "parquet", "--output", str(output), *more])


def vectors(folder: Path) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """-> the rows that are exported, their prefix 3 and full vectors."""
    from fractal.model.checkpoint import load

    good = np.delete(np.arange(CELLS), BAD)
    found = embed(load(folder / "adapter.pt")[0], torch.from_numpy(np.load(folder / "x.npy")[good]))
    return good, found[2], found[3]


@pytest.mark.parametrize(("kind", "place"), [(kind, i) for i, kind in enumerate(KINDS)])
def test_the_documents_query_ranks_a_shortlist_by_the_prefix_with_the_full_vector(
    folder: Path, kind: str, place: int, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("fractal.data.vectors.CHUNK", 100)  # of 360
    exported(folder, tmp_path / "cells.parquet")
    code = blocks(ROOT / "docs" / "databases.md", "python")[place].replace("200", "50")
    good, prefix, full = vectors(folder)
    queries = [3, 100, 358]
    shortlists = nearest(prefix[queries], prefix, 50)
    chosen = [rows[nearest(full[[q]], full[rows], 10)[0]] for q, rows in zip(queries, shortlists, strict=True)]
    expected = good[torch.stack(chosen).numpy()]
    for query, rows in zip(queries, expected, strict=True):
        names: dict[str, Any] = {"prefix": prefix[query].tolist(), "query": full[query].tolist()}
        (tmp_path / str(query)).mkdir()
        monkeypatch.chdir(tmp_path / str(query))  # a database each
        Path("cells.parquet").hardlink_to(tmp_path / "cells.parquet")
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
    exported(folder, tmp_path / "a.parquet", "--prefix", "1")
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


def test_cells_of_which_none_has_a_vector_are_refused(folder: Path, tmp_path: Path, fails):
    np.save(tmp_path / "none.npy", np.full((5, 16), np.nan, np.float32))
    files = ["--reference", folder / "adapter.pt", "--vectors", tmp_path / "none.npy"]
    line = fails(export.main, *files, "--to", "parquet", "--output", tmp_path / "cells.parquet")
    assert "none.npy: every cell's vector is zero or not finite" in line
    assert not (tmp_path / "cells.parquet").exists()


def test_nothing_is_left_of_a_run_that_fails(folder: Path, tmp_path: Path, monkeypatch):
    chunks = list[int]()

    def broken(*args: Any) -> Any:
        chunks.append(1)
        if len(chunks) > 1:
            raise KeyboardInterrupt
        return chosen(*args)

    chosen = adapter.embed
    monkeypatch.setattr("fractal.data.vectors.CHUNK", 100)  # of 360
    monkeypatch.setattr(adapter, "embed", broken)
    with pytest.raises(KeyboardInterrupt):
        exported(folder, tmp_path / "cells.parquet")
    assert [path for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_a_column_of_that_name_is_not_lost(folder: Path, tmp_path: Path, fails):
    x = np.load(folder / "x.npy")[:BAD]
    table = pa.table({"embedding": list(x), "full": range(BAD)})
    pq.write_table(table, tmp_path / "cells.parquet")
    argv = ["--reference", folder / "adapter.pt", "--vectors", tmp_path / "cells.parquet", "--to", "parquet"]
    assert "a column 'full'" in fails(export.main, *argv, "--output", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_columns_that_differ_by_case_alone_are_refused(folder: Path, tmp_path: Path, fails):
    """DuckDB would rename one of them without a word."""
    n = len(TYPES)
    write_h5ad(tmp_path / "x.h5ad", clustered(TYPES), Kind=TYPES, kind=TYPES, other=["a"] * n)
    files = ["--reference", folder / "adapter.pt", "--vectors", tmp_path / "x.h5ad", "--use-rep", "X_pca"]
    line = fails(export.main, *files, "--to", "parquet", "--output", tmp_path / "out.parquet")
    assert "x.h5ad: its columns Kind and kind differ by case alone" in line
    assert not (tmp_path / "out.parquet").exists()


def test_flags_that_do_not_go_together(folder: Path, tmp_path: Path, fails):
    model = ["--reference", folder / "adapter.pt"]
    cells = ["--vectors", folder / "cells.h5ad", "--use-rep", "X_pca"]
    assert "go together" in fails(export.main, *model, "--to", "parquet")
    assert "go together" in fails(export.main, *model, *cells)
    assert "at most 3" in fails(export.main, *model, *cells, "--to", "parquet", "--prefix", "4")
    assert "about --to parquet" in fails(export.main, *model, "--prefix", "2")
    assert "is the input" in fails(export.main, *model, *cells, "--to", "parquet", "--output", folder / "cells.h5ad")


PATHS = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fractal", "published"])
def test_onnx_equals_torch(tmp_path: Path, recipe: str):
    torch.manual_seed(0)
    model = FractalAdapter(16, 3, 5, PATHS) if recipe == "fractal" else PublishedAdapter(16, 3, 5, 2, 4)
    assert export.export(model.eval(), tmp_path / "a.onnx") <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert [output.name for output in session.get_outputs()] == ["prefix_1", "prefix_2", "full"]
    for size in (1, 31):
        x = 5 * torch.randn(size, 16)
        found = session.run(None, {"x": x.numpy()})
        for ours, theirs in zip(embed(model, x), found, strict=True):
            assert np.allclose(ours, theirs, atol=1e-5)
            assert np.allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-5)
