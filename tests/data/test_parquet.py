"""The Parquet contract: what is written is read back, row by row, and splits hold what they promise."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fractal.base.errors import InputError
from fractal.data import parquet
from fractal.data.atlas import Atlas
from fractal.data.parquet import Parquet, atlas_table, fingerprint, metadata_of, read_vectors, write_tables

NAMES = [["b", "a"], ["x", "y", "z"], ["p"], ["n0", "n1", "n2", "n3"]]


def write(path: Path, groups: list[int], dim: int = 3, seed: int = 0) -> tuple[np.ndarray, list[list[str]]]:
    """An atlas with these row-group sizes -> its vectors and, per level, the label of each row."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(sum(groups), dim)).astype(np.float32)
    codes = [rng.integers(0, len(names), sum(groups)) for names in NAMES]
    slices = [slice(stop - size, stop) for stop, size in zip(np.cumsum(groups), groups, strict=True)]
    columns = [[(c[rows], names) for c, names in zip(codes, NAMES, strict=True)] for rows in slices]
    tables = [atlas_table(vectors[rows], some) for rows, some in zip(slices, columns, strict=True)]
    write_tables(path, tables, {"source": "a test"})
    return vectors, [[names[c] for c in column] for column, names in zip(codes, NAMES, strict=True)]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "a.parquet"
    write(path, [5])
    old = path.read_bytes()

    def tables() -> Iterator[pa.Table]:
        yield pq.read_table(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tables(path, tables(), {})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_the_fingerprint_follows_the_rows(tmp_path: Path):
    prints = set()
    for name, groups, seed in [("a", [5, 5], 0), ("b", [5, 5], 1), ("c", [10], 0)]:
        write(tmp_path / name, groups, seed=seed)
        prints.add(fingerprint(tmp_path / name))
    assert len(prints) == 3
    table = pq.read_table(tmp_path / "a")
    for name, order in (("kept", [0, 1]), ("swapped", [1, 0])):  # same sizes, same minima and maxima
        pq.write_table(table.take([*order, *range(2, 10)]), tmp_path / name)
    assert fingerprint(tmp_path / "kept") != fingerprint(tmp_path / "swapped")
    write(tmp_path / "again", [5, 5], seed=0)
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "a")


def test_broken_files_are_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    with pytest.raises(InputError, match=r"a\.parquet: no such file"):
        Atlas.open(path)
    write(path, [50])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet: not a Parquet file, or damaged"):
        Atlas.open(path)


def write_rows(path: Path, vectors: np.ndarray, finest: list[str], metadata: dict[str, str] | None = None) -> None:
    """An atlas of two levels, with names of the cells."""
    names = sorted(set(finest))
    codes = np.array([names.index(name) for name in finest])
    columns, ids = [(np.zeros_like(codes), ["all"]), (codes, names)], np.array([f"c{i}" for i in range(len(codes))])
    write_tables(path, [atlas_table(vectors, columns, ("class", "subclass"), ids)], metadata or {})


def test_metadata_that_are_no_text(tmp_path: Path):
    write_rows(tmp_path / "a", np.eye(2, dtype=np.float32), ["x", "y"])
    table = pq.read_table(tmp_path / "a").replace_schema_metadata({"source": b"caf\xe9", b"\xff": "x"})
    pq.write_table(table, tmp_path / "b")
    assert metadata_of(pq.read_schema(tmp_path / "b")) == {"source": "caf\ufffd", "\ufffd": "x"}


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float16(), 2), pa.list_(pa.float64(), 2), pa.list_(pa.float32()), pa.large_list(pa.float64())],
    ids=str,
)
def test_vectors_of_any_kind_of_list(tmp_path: Path, kind: pa.DataType):
    vectors = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    columns = {"name": ["a", "b", "c"], "embedding": pa.array([list(v.astype(np.float16)) for v in vectors], kind)}
    pq.write_table(pa.table(columns), tmp_path / "a", row_group_size=2)
    read = [read_vectors(table, "a") for table in Parquet.open(tmp_path / "a").tables(["embedding"])]
    assert {part.dtype for part in read} == {np.dtype(np.float32)}
    assert np.array_equal(np.concatenate(read), vectors)
    assert [table["name"].to_pylist() for table in Parquet.open(tmp_path / "a").tables(size=1)] == [["a"], ["b"], ["c"]]


def test_vectors_of_different_lengths(tmp_path: Path):
    pq.write_table(pa.table({"embedding": pa.array([[1.0], [1, 2]])}), tmp_path / "a")
    with pytest.raises(InputError, match="different lengths, 1 to 2 numbers"):
        read_vectors(next(Parquet.open(tmp_path / "a").tables()), "a")


def parts(folder: Path, **second: pa.Array) -> Path:
    """Two parts of an atlas; `second`: columns of the second one, None to leave one out."""
    first = pa.table({
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.ones(6), pa.float32()), 3),
        "study": ["a", "b"],
        "age": pa.array([1, 2]),
    })  # fmt: skip
    columns = {**dict(zip(first.column_names, first.columns, strict=True)), **second}
    folder.mkdir()
    pq.write_table(first, folder / "part-0.parquet")
    pq.write_table(
        pa.table({name: column for name, column in columns.items() if column is not None}), folder / "part-1.parquet"
    )
    return folder


def test_parts_of_a_folder_with_other_columns_are_refused_by_name(tmp_path: Path):
    wide = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8), pa.float32()), 4)
    for i, (second, words) in enumerate(
        [
            ({"study": None}, "part-1.parquet: lacks the column study"),
            ({"tissue": pa.array(["x", "y"])}, "part-0.parquet: lacks the column tissue, which .*part-1.parquet has"),
            ({"embedding": wide}, r"part-1.parquet: its embedding is fixed_size_list<\w+: float>\[4\]"),
            ({"age": pa.array(["x", "y"])}, "part-1.parquet: has columns of other types than .*part-0.parquet"),
        ]
    ):
        with pytest.raises(InputError, match=words):
            Parquet.open(parts(tmp_path / str(i), **second))


def test_numbers_of_several_types_become_the_widest(tmp_path: Path):
    file = Parquet.open(parts(tmp_path / "a", age=pa.array([1.5, None])))
    assert pa.concat_tables(file.tables())["age"].to_pylist() == [1, 2, 1.5, None]
    empty = Parquet.open(parts(tmp_path / "b", study=pa.nulls(2)))
    assert empty.read(["study"])["study"].to_pylist() == ["a", "b", None, None]


def test_a_large_row_group_of_a_folder_is_read_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of equal rows, 15 kB hold millions: neither is one decoded at once, nor are others read ahead."""
    for study in "ab":
        (tmp_path / f"study={study}").mkdir()
        write(tmp_path / f"study={study}" / "x.parquet", [100, 150], seed=ord(study))
    whole = pa.concat_tables(Parquet.open(tmp_path).tables()).unify_dictionaries()
    monkeypatch.setattr(parquet, "LARGE", 99)
    monkeypatch.delattr("pyarrow.parquet.ParquetFile.read_row_group")
    tables = list(Parquet.open(tmp_path).tables(size=40))
    assert [len(table) for table in tables] == [40, 40, 20, 40, 40, 40, 30] * 2
    pieces = pa.concat_tables(tables).unify_dictionaries()
    assert pieces.column_names == whole.column_names
    assert pieces.to_pylist() == whole.to_pylist()
    assert [table.column_names for table in Parquet.open(tmp_path).tables(["study"], 90)] == [["study"]] * 8


def test_small_files_with_much_text_are_refused(tmp_path: Path):
    """A text of 1 MB for each row, which would be 1.2 GB; one text of 2 MB; one of 400 MB, before it is read."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2_400, np.float32)), 2)

    def write(name: str, texts: list[str], codes: np.ndarray) -> Path:
        notes = pa.DictionaryArray.from_arrays(pa.array(codes), texts)
        table = pa.table({"embedding": vectors, "note": notes})
        pq.write_table(table, tmp_path / name, compression="zstd", store_schema=False)
        assert (tmp_path / name).stat().st_size < 100_000
        return tmp_path / name

    each = write("each.parquet", ["y" * 1_000_000], np.zeros(1_200, np.int32))
    with pytest.raises(InputError, match=r"each\.parquet: column 'note' has 1,200,000,000 bytes of text"):
        Parquet.open(each).read(["note"])
    one = write("one.parquet", ["", "y" * 2_000_000], (np.arange(1_200) == 7).astype(np.int32))
    with pytest.raises(InputError, match=r"one\.parquet: column 'note' has a text of 2,000,000 bytes"):
        list(Parquet.open(one).tables(size=100))
    with pytest.raises(InputError, match="1,200 rows take 400,0"):
        Parquet.open(write("long.parquet", ["", "y" * 400_000_000], (np.arange(1_200) == 7).astype(np.int32)))
