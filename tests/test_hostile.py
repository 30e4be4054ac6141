"""Broken and hostile files: each is refused in one line, or has a sane result that is written down here."""

import base64
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import eval as evaluate
import ingest
import stratify
import train
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas
from fractal.data.parquet import text_codes
from fractal.data.scimilarity import open_index, open_release, read_labels, read_types
from fractal.hierarchy.levels import LEVEL_COLUMNS
from fractal.hierarchy.ontology import CL_SLIM, build_hierarchy, load_graph
from fractal.model.checkpoint import load
from tests.conftest import TYPES, clustered, write_release

LONG = "x" * 100_000


# A release


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


def test_a_name_with_a_megabyte_of_text_is_refused_in_a_line_of_bounded_length(fails, tmp_path: Path):
    types = ["B cell", LONG, "evil \x1b[2J cell"]
    write_release(tmp_path / "m", clustered(types * 3), types * 3, types=types)
    message = fails(ingest.main, "--model-dir", tmp_path / "m", "--output", tmp_path / "a")
    assert len(message) <= 10_000
    assert "\x1b" not in message


def test_one_cell(fails, tmp_path: Path):
    write_release(tmp_path / "m", clustered(["B cell"]), ["B cell"])
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "a")])
    stratify.main(["--input", str(tmp_path / "a"), "--output", str(tmp_path / "b")])
    assert pq.read_metadata(tmp_path / "b").num_rows == 1
    message = fails(train.main, "--input", tmp_path / "b", "--output", tmp_path / "c.pt", "--test-ratio", "0")
    assert "b: 1 rows are left to train on" in message


def test_no_cell(fails, tmp_path: Path):
    write_release(tmp_path / "m", clustered(["B cell"]), ["B cell"])
    (tmp_path / "m" / "annotation" / "reference_labels.tsv").write_text("")
    assert "reference_labels.tsv: " in fails(ingest.main, "--model-dir", tmp_path / "m", "--output", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_type_with_one_cell(tmp_path: Path):
    labels = ["fibroblast", *["B cell", "natural killer cell"] * 60]
    write_release(tmp_path / "m", clustered(labels), labels)
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "a")])
    argv = ["--input", str(tmp_path / "a"), "--output", str(tmp_path / "a.pt"), "--epochs", "1", "--scale-dim", "4"]
    train.main(argv)
    evaluate.main(["--model-path", str(tmp_path / "a.pt"), "--input", str(tmp_path / "a")])


def test_types_that_were_not_trained_on(tmp_path: Path, capsys):
    """A checkpoint embeds cells of any type: their names are not looked up."""
    for name, types in (("m", TYPES[:3]), ("n", TYPES[3:])):
        write_release(tmp_path / name, clustered(types * 40), types * 40)
        ingest.main(["--model-dir", str(tmp_path / name), "--output", str(tmp_path / f"{name}.parquet")])
    argv = ["--output", str(tmp_path / "a.pt"), "--epochs", "1", "--scale-dim", "4"]
    train.main(["--input", str(tmp_path / "m.parquet"), *argv])
    capsys.readouterr()
    evaluate.main(["--model-path", str(tmp_path / "a.pt"), "--input", str(tmp_path / "n.parquet"), "--all-rows"])
    assert "| full" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(fails, release: Path, tmp_path: Path):
    (tmp_path / "shut").mkdir(mode=0o555)
    message = fails(ingest.main, "--model-dir", release, "--output", tmp_path / "shut" / "a")
    assert "Permission denied" in message


@pytest.mark.parametrize("script", ["ingest", "stratify", "train", "eval"])
def test_an_output_that_is_a_folder(fails, request: pytest.FixtureRequest, monkeypatch, tmp_path: Path, script: str):
    """Said before the work is done, not after it."""
    (tmp_path / "taken").mkdir()
    model = ["--epochs", "1", "--scale-dim", "4"]
    if script == "ingest":
        argv = [ingest.main, "--model-dir", request.getfixturevalue("release"), "--output", tmp_path / "taken"]
    else:
        data = request.getfixturevalue("stratified")
        argv = [stratify.main, "--input", data, "--output", tmp_path / "taken"]
        if script == "train":
            argv = [train.main, "--input", data, "--output", tmp_path / "taken", *model]
        if script == "eval":
            train.main(["--input", str(data), "--output", str(tmp_path / "a.pt"), *model])
            argv = [evaluate.main, "--model-path", tmp_path / "a.pt", "--input", data, "--json", tmp_path / "taken"]
        for work in ("fractal.model.training.prepare", "fractal.score.table.nearest"):
            monkeypatch.setattr(work, lambda *_: pytest.fail("too late"))
    assert "taken: is not a file" in fails(*argv)


# An ontology


def test_names_from_files_do_not_reach_the_terminal_as_they_are(stratified: Path, tmp_path: Path):
    text = CL_SLIM.read_text(encoding="utf-8").replace("releases/2025-07-30", "releases/2025\x1b[2J", 1)
    (tmp_path / "a.obo").write_text(text, encoding="utf-8")
    assert load_graph(tmp_path / "a.obo").graph["release"] == "2025\\x1b[2J"
    train.main(["--input", str(stratified), "--output", str(tmp_path / "a.pt"), "--epochs", "1", "--scale-dim", "4"])
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    checkpoint["config"]["recipe"] = "fractal\x1b[2J"
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(InputError, match="not a checkpoint"):
        load(tmp_path / "a.pt")


def obo(*terms: str) -> str:
    return CL_SLIM.read_text(encoding="utf-8") + "\n" + "\n\n".join(f"[Term]\n{term}" for term in terms) + "\n"


def test_a_cycle_of_terms_ends(tmp_path: Path):
    (tmp_path / "cl.obo").write_text(
        obo(
            "id: CL:9900001\nname: cat cell\nis_a: CL:9900002",
            "id: CL:9900002\nname: dog cell\nis_a: CL:9900001\nis_a: CL:0000542",
        ),
        encoding="utf-8",
    )
    cat, dog = build_hierarchy(["cat cell", "dog cell"], load_graph(tmp_path / "cl.obo"))
    assert (cat.system, cat.lineage, cat.type) == ("Immune", "Lymphoid", "dog cell")
    assert (dog.lineage, dog.type) == ("Lymphoid", "lymphocyte")


def test_obsolete_terms_are_not_matched(tmp_path: Path):
    (tmp_path / "cl.obo").write_text(obo("id: CL:9900001\nname: gone cell\nis_obsolete: true"), encoding="utf-8")
    with pytest.raises(InputError, match=r"1 type names are not in CL .*: gone cell"):
        build_hierarchy(["gone cell"], load_graph(tmp_path / "cl.obo"))


# A Parquet file


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


# A checkpoint


class Code:
    """Its pickle runs a command where it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_carries_code_does_not_run_it(fails, stratified: Path, tmp_path: Path, zipped: bool):
    path = tmp_path / "a.pt"
    torch.save({"state": Code(tmp_path / "run")}, path, _use_new_zipfile_serialization=zipped)
    assert "not a checkpoint" in fails(evaluate.main, "--model-path", path, "--input", stratified)
    assert not (tmp_path / "run").exists()
    with open(tmp_path / "c", "wb") as file:  # the oracle: pickle itself would have run it
        pickle.dump(Code(tmp_path / "run"), file)
    pickle.loads((tmp_path / "c").read_bytes())
    assert (tmp_path / "run").exists()
