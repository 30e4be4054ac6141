"""What an atlas answers: rows, labels, counts, balance, copies; and what is none."""

import base64
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.base.errors import InputError, run
from fractal.data.atlas import Atlas, text_codes
from fractal.data.parquet import atlas_table, fingerprint, write_tables
from fractal.hierarchy.levels import LEVEL_COLUMNS
from tests.data.test_parquet import write, write_rows


def test_schema_and_metadata(tmp_path: Path):
    write(tmp_path / "a.parquet", [5])
    schema = Atlas.open(tmp_path / "a.parquet").schema
    assert schema.field("embedding").type == pa.list_(pa.float32(), 3)
    assert all(schema.field(name).type == pa.dictionary(pa.int32(), pa.string()) for name in LEVEL_COLUMNS)
    assert schema.metadata == {b"source": b"a test", b"dim": b"3"}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_rows_come_back_in_the_order_asked_for(groups: list[int], draws: list[int]):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        vectors, labels = write(path, groups)
        rows = np.array(draws) % sum(groups)  # repeats allowed
        cells = Atlas.open(path).read(rows)
        assert np.array_equal(cells.vectors, vectors[rows])
        for k, column in enumerate(labels):
            assert [cells.classes[k][c] for c in cells.labels[:, k]] == [column[i] for i in rows]
            assert cells.classes[k] == sorted({column[i] for i in rows})


def test_an_atlas_that_is_missing_is_named(tmp_path: Path, capsys):
    missing = tmp_path / "none.parquet"

    def main() -> None:
        fingerprint(missing)

    with pytest.raises(SystemExit):
        run(main)
    assert capsys.readouterr().err == f"error: {missing}: No such file or directory\n"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            pa.table({"embedding": pa.array([[1.0]], pa.list_(pa.float32(), 1)), "level1_a": ["a"]}),
            "lacks the columns of its levels",
        ),
        (
            pa.table(
                {
                    "embedding": pa.array([[1.0]], pa.list_(pa.float32(), 1)),
                    **dict.fromkeys(["level1_a", "level3_b"], ["a"]),
                }
            ),
            "its levels are level1_a, level3_b",
        ),
        (
            pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array(["a"])], ["x", "x", "embedding"]),
            "several columns called x; rename or drop",
        ),
        (pa.table({"x": [1]}), "lacks the column embedding"),
        (
            pa.table(
                {"embedding": pa.array([[1.0]], pa.list_(pa.float64(), 1)), **dict.fromkeys(LEVEL_COLUMNS, ["a"])}
            ),
            "'embedding' is fixed_size_list<element: double>",
        ),
        (
            pa.table(
                {
                    "embedding": pa.array([], pa.list_(pa.float32(), 1)),
                    **dict.fromkeys(LEVEL_COLUMNS, pa.array([], pa.string())),
                }
            ),
            "holds no cells",
        ),
    ],
)
def test_other_parquet_files_are_refused(tmp_path: Path, table: pa.Table, message: str):
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match=message):
        Atlas.open(tmp_path / "x.parquet")


def test_zero_vectors_are_refused(tmp_path: Path):
    write_tables(tmp_path / "a", [atlas_table(np.zeros((1, 2), np.float32), [(np.array([0]), ["a"])] * 4)], {})
    with pytest.raises(InputError, match="zero or not finite"):
        Atlas.open(tmp_path / "a").read(np.array([0]))


@pytest.mark.parametrize("column", ["embedding", "level3_type"])
def test_missing_values_are_refused(tmp_path: Path, column: str):
    columns = {"embedding": pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2))}
    columns |= {name: pa.array(["b", "a"]) for name in LEVEL_COLUMNS}
    columns[column] = pa.array([None, columns[column][1].as_py()], columns[column].type)
    pq.write_table(pa.table(columns), tmp_path / "a")
    with pytest.raises(InputError, match=f"a: 1 cells have no {column}"):
        Atlas.open(tmp_path / "a").read(np.array([0, 1]))


def test_plain_string_columns_are_read_too(tmp_path: Path):
    columns = {name: ["b", "a"] for name in LEVEL_COLUMNS}
    table = pa.table({"embedding": pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2)), **columns})
    pq.write_table(table, tmp_path / "a")
    cells = Atlas.open(tmp_path / "a").read(np.array([0, 1]))
    assert cells.labels.tolist() == [[1] * 4, [0] * 4]
    assert cells.classes[0] == ["a", "b"]


def test_path_counts_are_a_slow_count(tmp_path: Path):
    _, labels = write(tmp_path / "a.parquet", [5, 9, 3])
    keep = np.random.default_rng(1).random(17) < 0.6
    expected = Counter(tuple(level[i] for level in labels) for i in np.flatnonzero(keep))
    assert Atlas.open(tmp_path / "a.parquet").path_counts(keep) == dict(expected)


def test_other_levels_and_names_of_cells(tmp_path: Path):
    write_rows(tmp_path / "a", np.eye(3, dtype=np.float32), ["x", "y", "x"])
    assert pq.read_schema(tmp_path / "a").names == ["cell_id", "embedding", "level1_class", "level2_subclass"]
    assert pq.read_table(tmp_path / "a")["cell_id"].to_pylist() == ["c0", "c1", "c2"]
    assert Atlas.open(tmp_path / "a").levels == ("class", "subclass")
    cells = Atlas.open(tmp_path / "a").read(np.array([2, 1]))
    assert (cells.levels, cells.classes, cells.labels.tolist()) == (
        ("class", "subclass"),
        [["all"], ["x", "y"]],
        [[0, 0], [0, 1]],
    )
    assert Atlas.open(tmp_path / "a").path_counts(np.ones(3, bool)) == {("all", "x"): 2, ("all", "y"): 1}
    nothing = Atlas.open(tmp_path / "a").read(np.array([], int))
    assert (nothing.vectors.shape, nothing.labels.shape) == ((0, 3), (0, 2))


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 99))
def test_a_part_of_a_sorted_file_is_balanced(labels: list[str], n: int, seed: int):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        write_rows(path, np.ones((len(labels), 1), np.float32), sorted(labels))
        rows = np.arange(0, len(labels), 2)
        chosen = Atlas.open(path).balanced_rows(rows, n, seed)
        assert len(chosen) == min(n, len(rows))
        assert np.array_equal(chosen, np.unique(chosen))
        assert set(chosen) <= set(rows)
        there = Counter(sorted(labels)[row] for row in rows)
        taken = Counter(sorted(labels)[row] for row in chosen)
        most = max(taken.values(), default=0)
        assert all(taken[name] in (most, most - 1) or taken[name] == there[name] for name in there)
        # A file that says it is balanced is taken at its word.
        write_rows(path, np.ones((len(labels), 1), np.float32), sorted(labels), {"stratified": "level2_subclass"})
        assert Atlas.open(path).balanced_rows(rows, n, seed).tolist() == rows[:n].tolist()


@given(st.lists(st.tuples(st.sampled_from([0.0, -0.0, 1.0]), st.sampled_from([1.0, 2.0])), min_size=1, max_size=30))
def test_duplicates_are_those_of_a_slow_search(pairs: list[tuple[float, float]]):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "a", np.array(pairs, np.float32), ["x"] * len(pairs))
        found = Atlas.open(Path(folder) / "a").first_copies
    assert found.tolist() == [pairs.index(pair) for pair in pairs]  # 0. == -0.


def test_a_level_s_name_may_hold_underscores(tmp_path: Path):
    columns = [(np.array([0]), ["x"])] * 2
    write_tables(tmp_path / "a", [atlas_table(np.ones((1, 2)), columns, ("cell_class", "cell_sub_class"))], {})
    assert (
        Atlas.open(tmp_path / "a").read(np.array([0])).levels
        == Atlas.open(tmp_path / "a").levels
        == ("cell_class", "cell_sub_class")
    )


def test_names_of_cells_that_are_no_text_are_refused(tmp_path: Path):
    columns = {"cell_id": [1], "embedding": pa.array([[1, 2]], pa.list_(pa.float32(), 2)), "level1_a": ["x"]}
    pq.write_table(pa.table(columns | {"level2_b": ["y"]}), tmp_path / "a")
    with pytest.raises(InputError, match="a: 'cell_id' is int64, expected text"):
        Atlas.open(tmp_path / "a")


def table(**columns: pa.Array) -> pa.Table:
    vectors = pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2))
    return pa.table({"embedding": vectors, **dict.fromkeys(LEVEL_COLUMNS, ["b", "a"]), **columns})


NO_TEXT = [pa.array([1, 2]), pa.array([1.5, 2]), pa.array([["a"], ["b"]]), pa.array([b"\xff", b"a"])]


@pytest.mark.parametrize("values", NO_TEXT, ids=lambda values: str(values.type))
def test_levels_that_are_no_text(tmp_path: Path, values: pa.Array):
    pq.write_table(table(level3_type=values), tmp_path / "a")
    with pytest.raises(InputError, match="a: 'level3_type' is .*, expected text"):
        Atlas.open(tmp_path / "a").read(np.array([0]))


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int8(), pa.large_string())])
def test_levels_in_any_kind_of_text(tmp_path: Path, kind: pa.DataType):
    pq.write_table(table(level3_type=pa.array(["b", "a"]).cast(kind)), tmp_path / "a")
    assert Atlas.open(tmp_path / "a").read(np.array([0, 1])).labels.tolist() == [[1] * 4, [0] * 4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, None])
def test_numbers_that_are_none(tmp_path: Path, value: float | None):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 3, value], pa.float32()), 2)
    pq.write_table(table(embedding=vectors), tmp_path / "a")
    with pytest.raises(InputError, match="a: "):
        Atlas.open(tmp_path / "a").read(np.array([0, 1]))


def test_codes_beyond_the_names():
    """Found by fuzzing: Arrow reads them from a damaged file without a look."""
    for code in (-1, 2, 2**31 - 1):
        codes = pa.DictionaryArray.from_arrays(pa.array([0, code], pa.int32()), ["a", "b"], safe=False)
        with pytest.raises(InputError, match="x: damaged, the level1_system of a cell is none"):
            text_codes(pa.table({"level1_system": codes}), "level1_system", "x")


def test_a_footer_that_lies_about_the_number_of_rows(stratified: Path):
    """Found by fuzzing: rows were looked for that no row group holds."""
    data = bytearray(stratified.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    at = data.index(b"\x16\xb0\x09", footer)  # thrift: a 64-bit number, 600 as zigzag varint; the file's comes first
    data[at + 1 : at + 3] = b"\xb2\x09"
    stratified.write_bytes(data)
    assert pq.read_metadata(stratified).num_rows == 601
    with pytest.raises(InputError, match="damaged, its row groups do not add up"):
        Atlas.open(stratified).read(np.array([600]))


def test_a_schema_that_lies_about_the_width(tmp_path: Path):
    """Found by fuzzing: 12 GB were asked for, to hold 3 cells."""
    path, honest, lie = tmp_path / "a", (251).to_bytes(4, "little"), (2**30).to_bytes(4, "little")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * 251), pa.float32()), 251)
    pq.write_table(table(embedding=vectors), path)
    written = pq.read_metadata(path).metadata[b"ARROW:schema"]
    assert base64.b64decode(written).count(honest) == 1
    path.write_bytes(
        path.read_bytes().replace(written, base64.b64encode(base64.b64decode(written).replace(honest, lie)))
    )
    assert pq.read_schema(path).field("embedding").type.list_size == 2**30
    with pytest.raises(InputError, match="damaged, it is too short for one vector of 1,073,741,824"):
        Atlas.open(path).read(np.array([0, 1]))
