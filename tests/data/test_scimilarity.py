"""Reading a release: hnswlib's own reader is the oracle for the index, and broken files get one clear line."""

from pathlib import Path

import hnswlib
import numpy as np
import pyarrow.parquet as pq
import pytest

import ingest
from fractal.base.errors import InputError
from fractal.data.scimilarity import HEADER, Release, open_index, open_release, read_labels, read_types
from tests.conftest import TYPES, clustered, write_release


def all_vectors(release) -> np.ndarray:
    return np.concatenate([vectors for _, vectors in release.chunks(size=100)])


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("spare", [0, 50])  # max_elements > count
@pytest.mark.parametrize("dim", [1, 22, 128])
def test_vectors_equal_hnswlib_bit_for_bit(tmp_path: Path, dim: int, threads: int, spare: int):
    labels = (TYPES * 60)[:333]
    index = write_release(tmp_path / "m", clustered(labels, dim), labels, threads=threads, spare=spare)
    release = open_release(tmp_path / "m")
    assert (len(release), release.dim) == (333, dim)
    expected = index.get_items(np.arange(333), return_type="numpy")
    assert np.array_equal(all_vectors(release), expected)


def test_records_out_of_label_order(tmp_path: Path):
    labels = TYPES * 20
    vectors = clustered(labels)
    write_release(tmp_path / "m", vectors, labels)
    order = np.random.default_rng(0).permutation(len(labels))
    index = hnswlib.Index(space="cosine", dim=16)
    index.init_index(max_elements=len(labels))
    index.add_items(vectors[order], order, num_threads=1)
    index.save_index(str(tmp_path / "m" / "annotation" / "labelled_kNN.bin"))
    release = open_release(tmp_path / "m")
    assert np.array_equal(release.records["label"], order)
    assert np.array_equal(all_vectors(release), index.get_items(np.arange(len(labels)), return_type="numpy"))


def test_a_release_that_is_replaced_while_it_is_read(tmp_path: Path):
    """Its labels would be of the old cells and its vectors of the new ones."""
    write_release(tmp_path / "a", clustered(TYPES * 10), TYPES * 10)
    write_release(tmp_path / "b", clustered(TYPES * 10, seed=1), TYPES * 10)
    release, name = open_release(tmp_path / "a"), "annotation/labelled_kNN.bin"
    (tmp_path / "b" / name).replace(tmp_path / "a" / name)
    with pytest.raises(InputError, match="a: has been replaced while it was read"):
        list(release.chunks())


def test_real_releases_equal_hnswlib(real_release: Path):
    release = open_release(real_release)
    index = hnswlib.Index(space="cosine", dim=release.dim)
    index.load_index(str(real_release / "annotation" / "labelled_kNN.bin"))
    assert np.array_equal(all_vectors(release), index.get_items(np.arange(len(release)), return_type="numpy"))
    lines = (real_release / "annotation" / "reference_labels.tsv").read_text(encoding="utf-8").splitlines()
    expected = [line.split("\t") for line in lines]
    assert [release.labels.names[c] for c in release.labels.codes] == [name for name, _ in expected]
    assert release.labels.study_codes is not None
    assert [release.labels.studies[c] for c in release.labels.study_codes] == [study for _, study in expected]


def test_labels_with_and_without_studies(tmp_path: Path):
    path = tmp_path / "labels.tsv"
    path.write_text('T cell, CD4\n"quoted" cell\nT cell, CD4\nNA\n')
    codes, names, studies, _ = read_labels(path)
    assert [names[c] for c in codes[:3]] == ["T cell, CD4", '"quoted" cell', "T cell, CD4"]
    assert codes[3] == -1  # NA
    assert studies is None
    path.write_text("a\ts1\r\nb\ts2\r\na\ts2")
    codes, names, study_codes, study_names = read_labels(path)
    assert [names[c] for c in codes] == ["a", "b", "a"]
    assert study_codes is not None
    assert [study_names[c] for c in study_codes] == ["s1", "s2", "s2"]


@pytest.mark.parametrize("text", ["a\ts\nb\n", "a\ts\tx\nb\ts\tx\n", ""])
def test_label_files_that_cannot_be_read(tmp_path: Path, text: str):
    path = tmp_path / "labels.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=r"labels\.tsv: "):
        read_labels(path)


@pytest.mark.parametrize("text", ["", ",0\n", ",0\n0,a\n2,b\n", ",0\n0,a\n1,a\n", ",0\n0\n", ",0\nx,a\n", "\xff"])
def test_type_files_that_cannot_be_read(tmp_path: Path, text: str):
    path = tmp_path / "label_ints.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"label_ints\.csv: expected"):
        read_types(path)


def test_counts_and_types_must_agree(release: Path):
    labels = release / "annotation" / "reference_labels.tsv"
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match="holds 600 vectors, but reference_labels.tsv has 599 lines"):
        open_release(release)
    labels.write_text("\n".join([*lines[:-1], "blob\ts1"]) + "\n")
    with pytest.raises(InputError, match=r"reference_labels\.tsv: these types are not in label_ints\.csv: 'blob'"):
        open_release(release)
    labels.write_text("\n".join([*(f"AAACCC-{i}\ts1" for i in range(580)), *lines[580:]]) + "\n")  # barcodes
    with pytest.raises(InputError, match=r"'AAACCC-0' \(line 1\); .*; and 560 more$"):
        open_release(release)
    labels.unlink()
    with pytest.raises(InputError, match=r"reference_labels\.tsv: no such file"):
        open_release(release)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("offset_level0", 1),
        ("count", 2**63),
        ("count", 601),
        ("record_size", 2**64 - 1),
        ("label_offset", 3),
        ("label_offset", 2**64 - 8),
        ("vector_offset", 0),
        ("vector_offset", 2**64 - 4),
        ("max_m0", 2**62),
    ],
)
def test_lying_headers(release: Path, field: str, value: int):
    path = release / "annotation" / "labelled_kNN.bin"
    header = np.fromfile(path, HEADER, 1)
    header[field] = value
    with open(path, "r+b") as file:
        file.write(header.tobytes())
    with pytest.raises(InputError, match=r"labelled_kNN\.bin: (not an index|cut short)"):
        open_index(path)


def test_a_count_beyond_the_file(release: Path):
    path = release / "annotation" / "labelled_kNN.bin"
    with open(path, "r+b") as file:
        file.truncate(96 + 1000)
    with pytest.raises(InputError, match=r"cut short, 1,096 bytes of at least"):
        open_index(path)
    with open(path, "r+b") as file:
        file.truncate(95)
    with pytest.raises(InputError, match="too few for an hnswlib index"):
        open_index(path)


def test_labels_that_are_not_a_numbering(tmp_path: Path):
    labels = TYPES * 2
    write_release(tmp_path / "m", clustered(labels), labels)
    index = hnswlib.Index(space="cosine", dim=16)
    index.init_index(max_elements=12)
    index.add_items(clustered(labels), np.arange(1, 13))
    index.save_index(str(tmp_path / "m" / "annotation" / "labelled_kNN.bin"))
    with pytest.raises(InputError, match="its labels are not the numbers 0 to 11"):
        all_vectors(open_release(tmp_path / "m"))


@pytest.mark.parametrize(("record", "label"), [(1, 0), (599, 0), (5, 600), (5, 2**63), (5, 2**64 - 1)])
def test_labels_that_occur_twice_or_are_no_rows(release: Path, record: int, label: int):
    path = release / "annotation" / "labelled_kNN.bin"
    records = open_index(path)
    writable = np.memmap(path, records.dtype, "r+", HEADER.itemsize, (len(records),))
    if label == 0:  # whichever record holds label 0
        record = (int(np.flatnonzero(records["label"] == 0)[0]) + record) % 600
    writable["label"][record] = label
    writable.flush()
    with pytest.raises(InputError, match=r"labelled_kNN\.bin: its labels are not the numbers 0 to 599, each once"):
        all_vectors(open_release(release))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_vectors_that_cannot_be_used(release: Path, value: float):
    path = release / "annotation" / "labelled_kNN.bin"
    records = open_index(path)
    writable = np.memmap(path, records.dtype, "r+", HEADER.itemsize, (len(records),))
    record = int(np.flatnonzero(records["label"] == 321)[0])
    writable["vector"][record] = value
    writable.flush()
    with pytest.raises(InputError, match="the vector of cell 321 is zero or not finite"):
        all_vectors(open_release(release))


def kept(release: Release) -> list[int]:
    return np.flatnonzero(release.labels.codes >= 0).tolist()


def test_cells_that_are_marked_as_deleted(tmp_path: Path):
    labels = TYPES * 4
    index = write_release(tmp_path / "m", clustered(labels), labels, threads=4)
    for cell in (3, 17):
        index.mark_deleted(cell)
    index.save_index(str(tmp_path / "m" / "annotation" / "labelled_kNN.bin"))
    release = open_release(tmp_path / "m")
    assert kept(release) == [i for i in range(24) if i not in (3, 17)]
    assert release.labels.notes == ["2 of 24 cells left out: they are marked as deleted in the index"]
    rows = kept(release)
    assert np.array_equal(all_vectors(release)[rows], np.array(index.get_items(rows), np.float32))


def test_a_label_file_without_the_deleted_cells_is_explained(tmp_path: Path):
    labels = TYPES * 4
    index = write_release(tmp_path / "m", clustered(labels), labels)
    for cell in (3, 17):
        index.mark_deleted(cell)
    index.save_index(str(tmp_path / "m" / "annotation" / "labelled_kNN.bin"))
    path = tmp_path / "m" / "annotation" / "reference_labels.tsv"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for i, line in enumerate(lines) if i not in (3, 17)), encoding="utf-8")
    with pytest.raises(
        InputError, match="leaves out the 2 cells that are marked as deleted: give each .* an empty line"
    ):
        open_release(tmp_path / "m")
    path.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(InputError, match="1 lines are missing, .*: it is cut short, or of another release"):
        open_release(tmp_path / "m")
    path.write_text("".join([*lines, *lines[:5]]), encoding="utf-8")
    with pytest.raises(InputError, match="5 lines too many: cells stand there twice, or it is of another release"):
        open_release(tmp_path / "m")


def test_cells_without_a_label_or_a_study(tmp_path: Path):
    labels = [*TYPES, "unknown", "", "NaN", "B\u00a0 cell "]
    studies = ["s1", "s1 ", "s2", "nan", "s2", "s1", "s1", "s2", "na", "s1"]
    write_release(tmp_path / "m", clustered(labels), labels, studies)
    release = open_release(tmp_path / "m")
    assert release.labels.names == TYPES
    assert kept(release) == [0, 1, 2, 4, 5, 9]
    assert release.labels.codes[9] == release.labels.codes[0]  # its blanks are not part of the name
    assert release.labels.studies == ["s1", "s2"]
    assert release.labels.study_codes is not None
    assert release.labels.study_codes[[0, 1, 2]].tolist() == [0, 0, 1]
    assert release.labels.notes == [
        "3 of 10 cells left out: they have no label",
        "1 of 10 cells left out: they have no study",
    ]


def test_a_release_of_which_nothing_is_left(tmp_path: Path):
    write_release(tmp_path / "m", clustered(["NA", "nan"]), ["NA", "nan"])
    with pytest.raises(InputError, match="no cell is left: 2 of 2 cells left out: they have no label"):
        open_release(tmp_path / "m")


@pytest.mark.parametrize("studies", [None, ["s1"] * 6])
def test_empty_lines_at_the_end(tmp_path: Path, studies: list[str] | None):
    """More lines than cells: they mean nothing. As many as cells: those without a label."""
    write_release(tmp_path / "m", clustered(TYPES), TYPES, studies)
    path = tmp_path / "m" / "annotation" / "reference_labels.tsv"
    text = path.read_text()
    path.write_text(text + "\n\n")
    assert kept(open_release(tmp_path / "m")) == list(range(6))
    path.write_text("\n".join(text.split("\n")[:4]) + "\n\n\n")
    assert kept(open_release(tmp_path / "m")) == list(range(4))


def test_a_label_that_is_no_type_is_shown_with_its_line(release: Path):
    path = release / "annotation" / "reference_labels.tsv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], "blob\u00a0 x\ts1", *lines[5:]]) + "\n")
    with pytest.raises(InputError, match=r"not in label_ints\.csv: 'blob x' \(line 5\)"):
        open_release(release)


def test_a_zero_vector_of_a_cell_that_is_left_out(tmp_path: Path):
    vectors = clustered(TYPES)
    vectors[2] = 0
    write_release(tmp_path / "m", vectors, TYPES)
    with pytest.raises(InputError, match="cell 2 is zero or not finite; empty line 3 of reference_labels.tsv"):
        all_vectors(open_release(tmp_path / "m"))
    write_release(tmp_path / "n", vectors, [*TYPES[:2], "", *TYPES[3:]])
    assert kept(release := open_release(tmp_path / "n")) == [0, 1, 3, 4, 5]
    assert all_vectors(release).shape == (6, 16)


def test_a_brute_force_index(tmp_path: Path):
    write_release(tmp_path / "m", clustered(TYPES), TYPES)
    index = hnswlib.BFIndex(space="cosine", dim=16)
    index.init_index(max_elements=20)
    index.add_items(clustered(TYPES))
    index.save_index(str(tmp_path / "m" / "annotation" / "labelled_kNN.bin"))
    with pytest.raises(InputError, match=r"labelled_kNN\.bin: not an index .*a BFIndex has no graph"):
        open_release(tmp_path / "m")


def test_ingest_leaves_them_out_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    labels = ["fibroblast", *TYPES * 4]
    index = write_release(tmp_path / "m", clustered(labels), ["unknown", *labels[1:]])
    index.mark_deleted(7)
    index.save_index(str(tmp_path / "m" / "annotation" / "labelled_kNN.bin"))
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "cells.parquet")])
    kept_labels = [label for i, label in enumerate(labels) if i not in (0, 7)]
    assert len(pq.read_table(tmp_path / "cells.parquet")) == len(kept_labels)
    said = capsys.readouterr().out
    assert "1 of 25 cells left out: they are marked as deleted in the index" in said
    assert "1 of 25 cells left out: they have no label" in said


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_labels_in_another_encoding(tmp_path: Path, encoding: str):
    path = tmp_path / "labels.tsv"
    path.write_text("Zellé\ts1\nZellé\ts2\n", encoding=encoding)
    with pytest.raises(InputError, match=r"labels\.tsv: "):
        read_labels(path)
    path.write_text(",0\n0,Zellé\n", encoding=encoding)
    with pytest.raises(InputError, match=r"labels\.tsv: expected a header"):
        read_types(path)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path):
    path = tmp_path / "labels.tsv"
    path.write_text("B cell\ts1\nT cell\ts2\n", encoding="utf-8-sig")
    assert read_labels(path)[1] == ["B cell", "T cell"]
    path.write_text(",0\n0,B cell\n", encoding="utf-8-sig")
    assert read_types(path) == ["B cell"]


def test_a_blank_line_is_a_cell_without_a_type(release: Path):
    labels = release / "annotation" / "reference_labels.tsv"
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join([*lines[:5], "", *lines[6:]]) + "\n")
    opened = open_release(release)
    assert np.flatnonzero(opened.labels.codes < 0).tolist() == [5]
    assert opened.labels.notes == ["1 of 600 cells left out: they have no label"]


def test_a_longer_index_file_is_read_as_far_as_its_header_says(release: Path):
    path = release / "annotation" / "labelled_kNN.bin"
    before = np.array(open_index(path)["vector"])
    with open(path, "ab") as file:
        file.write(b"\xff" * 10_000)
    assert np.array_equal(open_index(path)["vector"], before)
