"""Searches of an index, held to exact search; its columns, held to the table that went in."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.base.errors import InputError
from fractal.search import build, enrichment, filters, open_index
from fractal.search import index as index_module
from fractal.search.folder import Part, Space
from fractal.search.index import HIT_COLUMNS, SURE, Hits, Index
from tests.search.conftest import BLOCKS, DIM, TISSUES, agreement, cells_of, exact, table_of, vectors_of


def test_all_lists_equal_exact_search(index: Index):
    queries = vectors_of(50, seed=1)
    hits = index.search(queries, 10, probes=10**6)
    assert agreement(hits.cells, exact(queries, vectors_of(3_000), 10)) >= 0.995  # float16 swaps near ties
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, vectors_of(3_000))]
    cosines = np.einsum("nd,nkd->nk", unit[0], unit[1][hits.cells])
    assert np.allclose(hits.similarity, cosines, atol=2e-3)
    assert (np.diff(hits.similarity, axis=1) <= 0).all()


def test_faiss_sees_the_lists_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With other sizes it would read memory that is not the file's; with a few lists that may go well by chance."""
    monkeypatch.setattr(build, "CELLS_PER_LIST", 8)
    monkeypatch.setattr(build, "SAMPLE_PER_LIST", 8)
    build.build(tmp_path / "index", cells_of(vectors_of(20_000), table_of(20_000)))
    index = open_index(tmp_path / "index")
    part, mapped = index.parts[0], index.mapped[0]
    assert len(part.sizes) > 1_000
    assert [mapped.list_size(i) for i in range(len(part.sizes))] == part.sizes.tolist()
    assert np.array_equal(np.sort(np.concatenate([part.rows(i) for i in range(len(part.sizes))])), np.arange(20_000))
    assert index.search(vectors_of(20_000)[:50], 1).cells[:, 0].tolist() == list(range(50))


def test_some_lists_find_nearly_all(index: Index):
    queries = vectors_of(200, seed=1)
    assert len(index.centroids) > 50
    assert agreement(index.search(queries, 10).cells, exact(queries, vectors_of(3_000), 10)) >= 0.9


@pytest.mark.parametrize("passing", [1.0, 0.9, 0.02])
def test_many_queries_at_once_find_what_each_finds_alone(index: Index, monkeypatch: pytest.MonkeyPatch, passing: float):
    """Alone faiss scans the lists of a query; together each list is read once, of all parts."""
    build.add(index.folder.path, cells_of(vectors_of(500, seed=3), table_of(500, seed=3, first=3_000)))
    index = open_index(index.folder.path)
    monkeypatch.setattr("fractal.search.index.QUERIES", 64)
    monkeypatch.setattr("fractal.search.index.PAIRS", 2_000)  # several rounds
    monkeypatch.setattr("fractal.search.index.IN_THREADS", 8)
    keep = None if passing == 1 else np.random.default_rng(0).random(len(index)) < passing
    queries = vectors_of(301, seed=1)
    together = index.search(queries, 10, keep=keep)
    alone = Hits.concat([index.search(query[None], 10, keep=keep) for query in queries])
    assert np.array_equal(together.cells >= 0, alone.cells >= 0)
    assert np.allclose(together.similarity, alone.similarity, atol=1e-5)
    assert (together.cells == alone.cells).mean() > 0.99  # ties of float16
    assert keep is None or keep[together.cells].all()
    nobody = index.search(queries, 10, keep=np.zeros(len(index), bool))
    assert (nobody.cells == -1).all()
    assert np.isneginf(nobody.similarity).all()


@pytest.mark.parametrize("reach", [1.0, 1.2, 2.0])
def test_lists_out_of_reach_stay_closed(index: Index, reach: float):
    """The slow and obvious way, over the lists and cells one by one; a filter may open more, never fewer."""
    queries = vectors_of(30, 5)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    hits = index.search(queries, 3, probes=12, reach=reach)
    part, opened = index.parts[0], 0
    for query, found in zip(queries, hits.cells.tolist(), strict=True):
        distance = 1 - index.centroids @ query
        cosine: dict[int, float] = {}
        for rank, number in enumerate(np.argsort(distance)[:12].tolist()):
            if rank < SURE or distance[number] <= reach * distance.min():
                opened += 1
                found_here = part.vectors(number).astype(np.float32) @ query
                cosine |= dict(zip(part.rows(number).tolist(), found_here.tolist(), strict=True))
        assert set(found) == set(sorted(cosine, key=lambda row: -cosine[row])[:3])
    assert opened <= 12 * 30
    assert (reach > 1) == (opened > SURE * 30)
    passing = index.search(queries, 3, keep=np.ones(len(index), bool), probes=12, reach=reach)
    assert (passing.similarity >= hits.similarity - 1e-5).all()


@pytest.mark.parametrize("prefix", [1, 2, 3, 4])
def test_a_prefix_of_all_lists_equals_exact_search(index: Index, prefix: int):
    queries, width = vectors_of(40, seed=2), 4 * prefix
    hits = index.search(queries, 10, prefix, probes=10**6)
    expected = exact(queries[:, :width], vectors_of(3_000)[:, :width], 10)
    assert agreement(hits.cells, expected) >= 0.98


@settings(max_examples=15)
@given(st.integers(1, 400), st.integers(1, 30), st.integers(0, 99))
def test_any_size_and_k(tmp_path_factory: pytest.TempPathFactory, n: int, k: int, seed: int):
    folder = tmp_path_factory.mktemp("index")
    build.build(folder / "i", cells_of(vectors_of(n, seed), table_of(n, seed)))
    found = open_index(folder / "i")
    hits = found.search(vectors_of(3, seed + 1), k)
    assert hits.cells.shape == (3, k)
    assert ((hits.cells >= 0).sum(1) == min(n, k)).all()
    assert all(len(set(row[row >= 0])) == min(n, k) for row in hits.cells)
    assert found.take(np.arange(n), ["cell_id"])["cell_id"].to_pylist() == table_of(n, seed)["cell_id"].to_pylist()


@pytest.mark.parametrize("prefix", [None, 2])
def test_lists_are_read_ahead_while_the_disk_is_read(index: Index, monkeypatch: pytest.MonkeyPatch, prefix: int | None):
    ahead, blocks = list[int](), iter([5, 5, 9])
    monkeypatch.setattr(index_module, "disk_blocks", lambda: next(blocks))
    monkeypatch.setattr(Part, "read_ahead", lambda part, number: ahead.append(number))
    query = vectors_of(1, seed=1)
    for read in (True, False, True):  # at first, with no block since, and with some
        ahead.clear()
        index.search(query, 3, prefix, probes=4)
        width = DIM if prefix is None else index.space.prefix_width(prefix)
        wanted = index.lists(query[:, :width] / np.linalg.norm(query[:, :width]), 4, 3, None)
        assert ahead == (sorted(wanted[0].tolist()) if read else [])


def test_a_list_that_is_read_ahead_stays_what_it_is(index: Index):
    part = index.parts[0]
    before = [part.vectors(number).copy() for number in range(len(part.sizes))]
    for number in range(len(part.sizes)):
        part.read_ahead(number)
    assert all(np.array_equal(part.vectors(number), vectors) for number, vectors in enumerate(before))


def test_columns_come_back_as_they_went_in(index: Index):
    table = table_of(3_000)
    drawn = np.random.default_rng(0).integers(0, 3_000, 500)
    found = index.table(Hits(drawn[:, None], np.ones((500, 1), np.float32)))
    expected_names = ["query", "rank", "id", "row", "source", "similarity", *table.column_names[1:]]
    assert found.column_names == expected_names
    assert found["row"].to_pylist() == drawn.tolist()
    assert set(found["source"].to_pylist()) == {"cells.parquet"}
    expected = table.take(pa.array(drawn))
    for name in index.columns:
        assert found[name].to_pylist() == expected[name].to_pylist(), name
    assert index.counts("tissue") == {t: table["tissue"].to_pylist().count(t) for t in TISSUES}


NAMES = ["query", "atlas_query", "Query", "id", "row", "source", "rank", "similarity", "none", "Tissue", "tissue"]


def test_columns_of_any_name_come_out(index: Index, tmp_path: Path):
    """Names of the hits' columns, of the one that stands for none, and such that differ in case only."""
    table = pa.table({name: [f"{name} {i}" for i in range(60)] for name in NAMES})
    build.build(tmp_path / "index", cells_of(vectors_of(60), table))
    opened = open_index(tmp_path / "index")
    assert opened.columns == NAMES
    hits = opened.search(vectors_of(60)[:5], 1)
    found = opened.table(hits)
    pq.write_table(found, tmp_path / "hits.parquet")
    columns = [c for c in pq.read_table(tmp_path / "hits.parquet").column_names if c not in HIT_COLUMNS]
    assert columns == ["atlas_atlas_query", "atlas_query", "atlas_Query", "atlas_id", "atlas_row", "atlas_source",
                       "atlas_rank", "atlas_similarity", "none", "Tissue", "tissue"]  # fmt: skip
    for name, column in zip(NAMES, columns, strict=True):
        assert found[column].to_pylist() == [f"{name} {i}" for i in range(5)]
    assert filters.where_mask(opened, "row == 'row 3' and none == 'none 3'").nonzero()[0].tolist() == [3]
    enriched = enrichment.enrichment(opened, hits, ["mine"] * 5, ["row", "none"])
    assert set(enriched["column"].to_pylist()) == {"row", "none"}


def test_wrong_questions(index: Index):
    with pytest.raises(InputError, match="7 numbers"):
        index.search(np.ones((2, 7), np.float32))
    with pytest.raises(InputError, match="zero or not finite"):
        index.search(np.zeros((2, DIM), np.float32))
    for k in (0, -1):
        with pytest.raises(InputError, match=f"k is {k}: ask for one hit or more"):
            index.search(vectors_of(2), k)
    with pytest.raises(InputError, match="a filter of 7 cells, the index has 3,000"):
        index.search(vectors_of(2), keep=np.ones(7, bool))
    with pytest.raises(InputError, match="prefix 5 of 4"):
        index.search(vectors_of(2), prefix=5)
    with pytest.raises(InputError, match="no column 'organ'"):
        index.table(Hits(np.zeros((1, 1), int), np.ones((1, 1))), columns=["organ"])
    with pytest.raises(InputError, match="not that of the index"):
        index.check_adapter(["b"], "other.pt")
    with pytest.raises(InputError, match="can't be compared"):
        build.add(index.folder.path, cells_of(vectors_of(50), table_of(50), adapters=("b",)))
    published = Space(DIM, "published", BLOCKS)
    with pytest.raises(InputError, match="no cut"):
        published.prefix_width(2)
    with pytest.raises(InputError, match="as they came"):
        Space(DIM).prefix_width(1)
