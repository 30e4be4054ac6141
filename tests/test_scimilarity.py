"""Reading a release: hnswlib's own reader is the oracle for the index, and broken files get one clear line."""

from pathlib import Path

import hnswlib
import numpy as np
import pytest
from conftest import TYPES, clustered, write_release

from fractal.cli import InputError
from fractal.scimilarity import HEADER, open_index, open_release, read_labels, read_types


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


def test_real_releases_equal_hnswlib(real_release: Path):
    release = open_release(real_release)
    index = hnswlib.Index(space="cosine", dim=release.dim)
    index.load_index(str(real_release / "annotation" / "labelled_kNN.bin"))
    assert np.array_equal(all_vectors(release), index.get_items(np.arange(len(release)), return_type="numpy"))
    lines = (real_release / "annotation" / "reference_labels.tsv").read_text(encoding="utf-8").splitlines()
    expected = [line.split("\t") for line in lines]
    assert [release.types[c] for c in release.type_codes] == [name for name, _ in expected]
    assert release.study_codes is not None
    assert [release.studies[c] for c in release.study_codes] == [study for _, study in expected]


def test_labels_with_and_without_studies(tmp_path: Path):
    path = tmp_path / "labels.tsv"
    path.write_text('T cell, CD4\n"quoted" cell\nT cell, CD4\nNA\n')
    codes, names, studies, _ = read_labels(path)
    assert [names[c] for c in codes] == ["T cell, CD4", '"quoted" cell', "T cell, CD4", "NA"]
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
    with pytest.raises(InputError, match=r"reference_labels\.tsv: these types are not in label_ints\.csv: blob"):
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
