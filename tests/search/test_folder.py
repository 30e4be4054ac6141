"""The folder of an index: damaged, changed, or replaced while it is opened."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from fractal.base.errors import InputError
from fractal.base.files import atomic_folder
from fractal.search import build, open_index
from fractal.search.folder import OWN_FILES, check_files
from fractal.search.index import Index
from tests.search.conftest import cells_of, table_of, vectors_of


def reversed_index(path: Path) -> None:
    """The same cells in the other order, so that every file has the length that it had."""
    build.build(path, cells_of(vectors_of(3_000)[::-1], table_of(3_000)[::-1]))


def test_an_open_index_stays_what_it_was_when_another_run_replaces_it(index: Index):
    hits = index.search(vectors_of(3_000)[:100], 1)
    reversed_index(index.folder.path)
    assert index.table(hits)["id"].to_pylist() == [f"cell {i}" for i in range(100)]
    assert index.search(vectors_of(3_000)[:100], 1).cells.tolist() == hits.cells.tolist()


@pytest.mark.parametrize("step", ["np.load", "pa.memory_map", "np.memmap", "faiss.OnDiskInvertedLists"])
def test_a_folder_that_is_replaced_while_it_is_opened_is_opened_again(
    index: Index, monkeypatch: pytest.MonkeyPatch, step: str
):
    """Before each of its files is opened, another run replaces all of them."""
    module = {"np": np, "pa": pa, "faiss": faiss}[step.split(".")[0]]
    name, replaced = step.split(".")[1], list[str]()
    real = getattr(module, name)

    def replace_first(*args: object, **options: object) -> object:
        if not replaced:
            replaced.append(step)
            monkeypatch.setattr(module, name, real)
            reversed_index(index.folder.path)
        return real(*args, **options)

    monkeypatch.setattr(module, name, replace_first)
    opened = open_index(index.folder.path)
    assert replaced
    hits = opened.search(vectors_of(3_000)[:100], 1)
    assert opened.table(hits)["id"].to_pylist() == [f"cell {i}" for i in range(100)]


def test_an_index_that_names_the_levels_as_earlier_ones_do_is_read(index: Index):
    path = index.folder.path / "index.json"
    metadata = json.loads(path.read_text())
    assert "levels" not in metadata["space"]
    metadata["space"]["levels"] = ["system", "lineage", "type", "subtype"]
    path.write_text(json.dumps(metadata))
    assert open_index(index.folder.path).space == index.space


@pytest.mark.parametrize("name", ["index.json", "centroids.npy", "sizes-0.npy", "vectors-0.bin", "columns-0.arrow"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "zeros", "noise"])
def test_a_damaged_index_is_refused_in_a_line(index: Index, tmp_path: Path, name: str, damage: str):
    file = tmp_path / "index" / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        made = {
            "cut": data[:-10],
            "empty": b"",
            "zeros": data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
            "noise": data[:200] + np.random.default_rng(0).bytes(len(data) - 200),
        }
        file.write_bytes(made[damage])
    with pytest.raises(InputError, match="index"):
        check_files(tmp_path / "index")
    try:  # what is noticed only by reading all is at least no crash
        found = open_index(tmp_path / "index")
        found.table(found.search(vectors_of(5, 9), 10))
        found.search(vectors_of(5, 9), 10, 2)
    except InputError:
        pass


@pytest.mark.parametrize("name", ["centroids.npy", "sizes-0.npy"])
def test_a_small_file_that_was_changed_is_refused_when_it_is_opened(index: Index, tmp_path: Path, name: str):
    """Its shape and sums are right, so that only the checksum says so."""
    array = np.load(tmp_path / "index" / name)
    np.save(tmp_path / "index" / name, array[::-1])
    with pytest.raises(InputError, match=f"{name}: not the file that the index was made with"):
        open_index(tmp_path / "index")


@pytest.mark.parametrize(
    "change",
    [("dim", 8), ("dim", "x"), ("blocks", [4]), ("blocks", [16, 0]), ("adapters", None), ("recipe", None)],
)
def test_a_manifest_that_does_not_fit_is_refused(index: Index, tmp_path: Path, change):
    file = tmp_path / "index" / "index.json"
    facts = json.loads(file.read_text())
    facts["space"][change[0]] = change[1]
    file.write_text(json.dumps(facts))
    try:
        open_index(tmp_path / "index")
    except InputError:
        return
    assert change[0] == "recipe"  # a name, whatever it is


def coded(index: Index, code: int) -> bytes:
    """The columns as they are, but for one code of `tissue`."""
    sink = pa.BufferOutputStream()
    batches = [batch.data for batch in index.batches]
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            column = batch["tissue"]
            codes = column.indices.to_pylist()
            codes[3] = code
            column = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), column.dictionary, safe=False)
            writer.write_batch(batch.set_column(batch.schema.get_field_index("tissue"), "tissue", column))
    return sink.getvalue().to_pybytes()


def one_row_less(index: Index) -> bytes:
    sink = pa.BufferOutputStream()
    batches = [batch.data for batch in index.batches]
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in (*batches[:-1], batches[-1][:-1]):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def sizes_below_zero(index: Index) -> bytes:
    sizes, file = index.parts[0].sizes.copy(), io.BytesIO()
    sizes[:2] = sizes[0] + sizes[1] + 1, -1
    np.save(file, sizes)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "forged"),
    [
        ("vectors-0.bin", lambda index: bytes(index.parts[0].data)[:-40]),
        ("vectors-0.bin", lambda index: bytes(index.parts[0].data)[:-8] + (3_000).to_bytes(8, "little")),
        ("sizes-0.npy", sizes_below_zero),
        ("columns-0.arrow", one_row_less),
        ("columns-0.arrow", lambda index: coded(index, 99)),
    ],
    ids=["one vector less", "a row too large", "a size below zero", "one row less", "a code of no text"],
)
def test_files_that_do_not_fit_are_refused_though_their_checksums_are_right(index: Index, name: str, forged):
    folder = index.folder.path
    content = forged(index)
    (folder / name).unlink()  # it is mapped
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "index.json").read_text())
    manifest["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "index.json").write_text(json.dumps(manifest))

    def read() -> None:
        opened = open_index(folder)
        opened.table(opened.search(vectors_of(3_000)[:1], 3_000, probes=10**6))

    with pytest.raises(InputError, match="damaged"):
        read()


def test_names_of_files_in_the_manifest_lead_nowhere_else(index: Index, tmp_path: Path):
    (tmp_path / "secret").write_text("x")
    file = tmp_path / "index" / "index.json"
    facts = json.loads(file.read_text())
    facts["files"]["../secret"] = [1, "0"]
    file.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="secret"):
        open_index(tmp_path / "index")


def test_own_files_are_all_that_an_index_holds(index: Index, tmp_path: Path):
    assert {file.name for file in (tmp_path / "index").iterdir()} <= set(OWN_FILES)
    with atomic_folder(tmp_path / "index", OWN_FILES) as folder:
        shutil.copy(tmp_path / "index" / "index.json", folder / "index.json")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_an_index_may_be_larger_than_the_memory(index: Index):
    """What is mapped to be written to counts as memory: 26 GB of vectors could not be opened with 24 GB."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    access = [line[1] for line in lines if line[-1] == str(index.folder.path / "vectors-0.bin")]
    assert access
    assert not [rights for rights in access if "w" in rights]
