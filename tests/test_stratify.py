"""Stratified order: balanced, complete, seeded."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import stratify
from fractal.data.atlas import Atlas
from fractal.data.reorder import round_robin


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(0, 2**31))
def test_rounds(labels: list[int], seed: int):
    y = np.array(labels)
    order = round_robin(y, seed)
    assert np.array_equal(np.sort(order), np.arange(len(y)))
    # the k-th cell of every label stands before the (k+1)-th of any
    seen: dict[int, int] = {}
    turns = []
    for label in y[order].tolist():
        seen[label] = seen.get(label, 0) + 1
        turns.append(seen[label])
    assert turns == sorted(turns)


def test_the_seed_decides_who_comes_first():
    y = np.repeat(np.arange(5), 40)
    first = [tuple(round_robin(y, seed)[:5]) for seed in range(20)]
    assert len(set(first)) > 15
    assert np.array_equal(round_robin(y, 3), round_robin(y, 3))


def test_the_same_rows_in_another_order(stratified: Path, tmp_path: Path):
    def rows(path: Path) -> list[tuple]:
        table = pq.read_table(path)
        return [tuple(map(str, row.values())) for row in table.to_pylist()]

    before, after = rows(tmp_path / "cells.parquet"), rows(stratified)
    assert before != after
    assert sorted(before) == sorted(after)
    schema, own = pq.read_schema(tmp_path / "cells.parquet"), pq.read_schema(stratified)
    assert own.equals(schema)
    assert own.metadata == schema.metadata | {b"stratified": b"level4_subtype"}
    assert Atlas.open(stratified).is_stratified
    assert not Atlas.open(tmp_path / "cells.parquet").is_stratified
    first = pq.read_table(stratified)["level4_subtype"].to_pylist()[:6]
    assert len(set(first)) == 6


def test_names_other_columns_and_other_levels_come_along(tmp_path: Path):
    """An own tree of two levels, and metadata that are no UTF-8."""
    n = 20
    cells = pa.table({
        "cell_id": [f"cell {i}" for i in range(n)],
        "embedding": pa.array(np.arange(2 * n, dtype=np.float32).reshape(n, 2).tolist(), pa.list_(pa.float32(), 2)),
        "level1_class": ["a"] * n,
        "level2_subclass": ["x"] * 15 + ["y"] * 5,
        "quality": np.arange(n) / n,
        "batch": pa.array(["p", None] * 10).dictionary_encode(),
    })  # fmt: skip
    pq.write_table(cells.replace_schema_metadata({"source": b"\xff", b"\xfe": "x"}), tmp_path / "a", row_group_size=7)
    stratify.main(["--input", str(tmp_path / "a"), "--output", str(tmp_path / "b")])
    table = pq.read_table(tmp_path / "b")
    assert table.schema.names == cells.schema.names
    assert table.schema.metadata[b"stratified"] == b"level2_subclass"
    assert sorted(table["level2_subclass"].to_pylist()[:10]) == ["x"] * 5 + ["y"] * 5
    assert sorted(table.to_pylist(), key=lambda row: row["quality"]) == cells.to_pylist()


def test_the_same_seed_gives_the_same_file(stratified: Path, tmp_path: Path):
    for name, seed in (("same", 0), ("other", 1)):
        argv = ["--input", str(tmp_path / "cells.parquet"), "--output", str(tmp_path / name), "--seed", str(seed)]
        stratify.main(argv)
    assert (tmp_path / "same").read_bytes() == stratified.read_bytes() != (tmp_path / "other").read_bytes()


def test_a_missing_input(fails, tmp_path: Path):
    message = fails(stratify.main, "--input", tmp_path / "none.parquet", "--output", tmp_path / "out.parquet")
    assert "none.parquet: no such file" in message
    assert not list(tmp_path.iterdir())


def test_onto_its_own_input(fails, stratified: Path):
    """It would work, since the input is read before the output appears; but then the release's order is lost."""
    before = stratified.read_bytes()
    assert "is the input of --input" in fails(stratify.main, "--input", stratified, "--output", stratified)
    assert stratified.read_bytes() == before


@pytest.mark.parametrize("argv", [["--help"], ["--seed", "x"]])
def test_argparse_exits(argv: list[str]):
    with pytest.raises(SystemExit):
        stratify.main(argv)
