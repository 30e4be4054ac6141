"""The same bytes at a URI as on this machine, whatever the store does meanwhile; whole outputs or none.

The store is moto's S3 server, in a thread of the tests (tests/store.py).
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import eval as evaluate
import ingest
import stratify
import train
from fractal.base import storage
from fractal.base.errors import InputError
from fractal.base.files import atomic_stream, atomic_write
from fractal.base.paths import check_paths
from fractal.base.storage import Remote, fetch, locate
from fractal.commands import annotate, embed, fit, index
from fractal.data import parquet
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.data.parquet import fingerprint
from fractal.data.reorder import round_robin
from tests.conftest import TYPES, clustered, write_h5ad
from tests.data.test_cells import write_tiledb
from tests.store import Store, client, serve


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Store, str]]:
    with serve(store := Store()) as url:
        yield store, url


@pytest.fixture
def store(server: tuple[Store, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An empty bucket, `cells`, where the environment says."""
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": server[1],
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client().create_bucket(Bucket="cells")
    server[0].requests.clear()
    yield server[0]
    server[0].fail()
    for key in keys():
        client().delete_object(Bucket="cells", Key=key)
    for upload in uploads():
        client().abort_multipart_upload(Bucket="cells", Key=upload["Key"], UploadId=upload["UploadId"])


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    """600 cells of 6 types and 3 studies, 16-d, as ingest.py writes them."""
    rng = np.random.default_rng(0)
    codes, studies = rng.permutation(np.arange(600) % 6), rng.integers(0, 3, 600)
    vectors = clustered([TYPES[c] for c in codes])
    table = parquet.atlas_table(vectors, [(codes, TYPES)] * 4 + [(studies, ["s1", "s2", "s3"])])
    tables = (table.slice(start, 150) for start in range(0, 600, 150))
    parquet.write_tables(tmp_path / "atlas.parquet", tables, {"cl_release": "none"})
    return tmp_path / "atlas.parquet"


def keys() -> list[str]:
    return [found["Key"] for found in client().list_objects_v2(Bucket="cells").get("Contents", [])]


def uploads() -> list[dict]:
    """What has been begun and neither completed nor given up."""
    return client().list_multipart_uploads(Bucket="cells").get("Uploads", [])


def body(key: str) -> bytes:
    return client().get_object(Bucket="cells", Key=key)["Body"].read()


def put(path: Path, key: str) -> str:
    """Copy a file or a folder to the store -> its URI."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            client().upload_file(str(file), "cells", key + str(file)[len(str(path)) :])
    return f"s3://cells/{key}"


# The table of docs/questions.md: what is read, and the tests that show it.
TAKEN = {
    "`.h5ad`": "data/test_cells.py test_all_files_give_the_same_vectors",
    "`.zarr` of AnnData": "test_ingest.py test_a_zarr_of_anndata_is_read_like_its_h5ad",
    "Parquet with a column `embedding`": "data/test_cells.py test_all_files_give_the_same_vectors",
    "a folder of Parquet files, `study=s1/...` too": "base/test_storage.py test_a_folder_of_parquet_is_one_atlas",
    "`.npy`": "data/test_cells.py test_all_files_give_the_same_vectors",
    "SCimilarity's `cellsearch`, a dense TileDB array": (
        "data/test_tiledb_arrays.py test_the_frame_of_cellsearch_becomes_columns"
    ),
    "an experiment of TileDB-SOMA": "data/test_tiledb_arrays.py test_an_experiment_of_soma",
    "any of these at `s3://` or `gs://`": "base/test_storage.py test_all_formats_are_read_from_a_store",
}


def test_the_questions_page_has_this_table():
    root = Path(__file__).parents[2]
    text = (root / "docs" / "questions.md").read_text(encoding="utf-8")
    table = text.partition("| Cells | Taken by |")[2].partition("\n\n")[0].splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in table] == [*TAKEN]
    for shown in TAKEN.values():
        file, test = shown.split()
        assert f"def {test}(" in (root / "tests" / file).read_text(encoding="utf-8")


# --- names -----------------------------------------------------------------------------------------------------------


def test_a_name_is_a_path_or_a_uri():
    at = locate("s3://key:pass@bucket/a b/c.d.parquet?endpoint_override=localhost:9000&scheme=http")
    assert isinstance(at, Remote)
    assert (at.name, at.stem, at.suffix) == ("c.d.parquet", "c.d", ".parquet")
    assert str(at) == "s3://bucket/a b/c.d.parquet"  # no password in messages and metadata
    assert str(at.parent / "x") == "s3://bucket/a b/x"
    assert at.with_name("x") == locate("s3://key:pass@bucket/a b/x?endpoint_override=localhost:9000&scheme=http")
    assert locate("s3a://b/x/") == locate("s3://b/x") == Remote("s3", "b", "/x")
    assert locate("gcs://b/x") == locate("gs://b/x")
    assert locate("file:///tmp/x") == locate("/tmp/x") == Path("/tmp/x")
    assert locate("a:b") == Path("a:b")
    with pytest.raises(InputError, match="a name is empty"):
        locate("")
    for no_path in (None, 3, b"cells.h5ad"):
        with pytest.raises(TypeError, match="expected a path or a URI, not"):
            locate(no_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Path(at)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="download the file first"):
        locate("https://example.org/x.parquet")
    for name in ("s3://b//x", "s3://b/x//y.parquet"):  # Arrow ends in a trace-back
        with pytest.raises(InputError, match="has an empty name between two slashes"):
            locate(name)
    for name in ("s3://", "s3:///x", "gs://?scheme=http"):
        with pytest.raises(InputError, match="names no bucket; it is"):
            locate(name)
    for name in ("s3://b/x?nonsense=1", "gs://b/x?nonsense=1"):
        with pytest.raises(InputError, match=r"^(s3|gs)://b: not a URI of a store \("):
            locate(name).exists()
    with pytest.raises(InputError, match="^nope://x: files of nope:// can't be read"):
        locate("nope://x").is_file()


def test_no_output_is_an_input(store: Store):
    check_paths({"--input": "s3://cells/a.parquet"}, {"--output": "s3://cells/b.parquet"})
    same = r"--output s3://cells/a.parquet: is the input of --input; name another output"
    with pytest.raises(InputError, match=same):
        check_paths({"--input": "s3://cells/a.parquet"}, {"--output": "s3a://cells/a.parquet?scheme=http"})
    with pytest.raises(InputError, match="is a file of --input s3://cells/folder"):
        check_paths({"--input": "s3://cells/folder"}, {"--output": "s3://cells/folder/new.parquet"})
    with pytest.raises(InputError, match="is the output of --json as well"):
        check_paths({}, {"--json": "s3://cells/a", "--output": "s3://cells/a"})
    with pytest.raises(InputError, match="--output s3://none/a: there is no bucket none; make it first"):
        check_paths({}, {"--output": "s3://none/a"})
    with pytest.raises(InputError, match="memory://x/a: is not written to"):
        check_paths({}, {"--output": "memory://x/a"})
    with pytest.raises(InputError, match="--output s3:/cells/a: can't be at a URI"):
        check_paths({}, {"--output": Path("s3://cells/a")})
    with pytest.raises(InputError, match="--output s3://cells/a: name a folder of this machine"):
        check_paths({}, {}, folders={"--output": "s3://cells/a"})
    client().put_object(Bucket="cells", Key="folder/a.parquet", Body=b"")
    with pytest.raises(InputError, match="--output s3://cells/folder: is not a file"):
        check_paths({}, {"--output": "s3://cells/folder"})


# --- the pipeline ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_scripts_write_the_same_bytes_to_a_store(store: Store, release: Path, tmp_path: Path):
    """ingest, stratify, train, eval and embed, from URI to URI; the copy of the release makes no difference either."""

    def pipeline(model_dir: str, folder: str) -> None:
        ingest.main(["--model-dir", model_dir, "--output", f"{folder}/cells.parquet"])
        stratify.main(["--input", f"{folder}/cells.parquet", "--output", f"{folder}/stratified.parquet"])
        model = f"{folder}/model.pt"
        train.main(["--input", f"{folder}/stratified.parquet", "--output", model, "--epochs", "1", "--lr", "1e-3"])
        given = ["--input", f"{folder}/stratified.parquet", "--model-path", model]
        evaluate.main([*given, "--json", f"{folder}/figures.json"])
        embed.main([*given, "--output", f"{folder}/embedded.parquet"])
        embed.main([*given, "--output", f"{folder}/embedded.npy"])

    pipeline(str(release), str(tmp_path))
    pipeline(put(release, "model_v1.1"), "s3://cells/out")
    names = ["cells.hierarchy.tsv", "stratified.parquet", "embedded.npy", "embedded.parquet"]
    assert {f"out/{name}" for name in [*names, "cells.parquet", "model.pt", "figures.json"]} <= set(keys())
    assert pq.read_table(pa.BufferReader(body("out/cells.parquet"))).equals(pq.read_table(tmp_path / "cells.parquet"))
    source = str(release).encode(), b"s3://cells/model_v1.1"
    for name in names:
        there, here = body(f"out/{name}"), (tmp_path / name).read_bytes()
        if not name.endswith(".parquet"):
            assert there == here, name
        else:  # the metadata name the source
            tables = [pq.read_table(pa.BufferReader(file)) for file in (there, here)]
            told = [table.schema.metadata for table in tables]
            assert told[0].pop(b"source") == source[1]
            assert told[1].pop(b"source") == source[0]
            assert told[0].pop(b"checkpoint_sha256", 0) != 1
            told[1].pop(b"checkpoint_sha256", 0)
            assert told[0] == told[1]
            assert tables[0].equals(tables[1])
    assert uploads() == []


@pytest.mark.slow
def test_cells_of_a_store_are_annotated_and_indexed(store: Store, tmp_path: Path):
    labels = TYPES * 40
    local = write_h5ad(tmp_path / "cells.h5ad", clustered(labels), kind=labels)
    there = put(local, "cells.h5ad")
    fit.main([there, "--labels", "kind", "--use-rep", "X_pca", "--epochs", "1", "--output", str(tmp_path / "ref")])
    reference = put(tmp_path / "ref", "ref")
    for ending in ("tsv", "parquet", "h5ad"):
        annotate.main([str(local), "--reference", str(tmp_path / "ref"), "--output", str(tmp_path / f"new.{ending}")])
        annotate.main([there, "--reference", reference, "--output", f"s3://cells/new.{ending}"])
    for ending in ("tsv", "parquet"):
        assert body(f"new.{ending}") == (tmp_path / f"new.{ending}").read_bytes()
    client().download_file("cells", "new.h5ad", str(tmp_path / "back.h5ad"))
    ours, theirs = anndata.read_h5ad(tmp_path / "new.h5ad"), anndata.read_h5ad(tmp_path / "back.h5ad")
    assert ours.obs.equals(theirs.obs)
    embed.main([there, "--reference", reference])
    assert "cells_fractal.h5ad" in keys()
    index.main([there, "--reference", reference, "--output", str(tmp_path / "index")])
    index.main([str(local), "--reference", str(tmp_path / "ref"), "--output", str(tmp_path / "local_index")])
    for file in (tmp_path / "local_index").iterdir():
        if file.name != "index.json":
            assert file.read_bytes() == (tmp_path / "index" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("kind", ["npy", "h5ad", pytest.param("zarr", marks=pytest.mark.slow), "parquet", "folder"])
def test_all_formats_are_read_from_a_store(store: Store, tmp_path: Path, kind: str):
    x = clustered(TYPES * 20)
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(path, x.astype(np.float64))
    elif kind in ("parquet", "folder"):
        table = pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 16)})
        if kind == "folder":
            path.mkdir()
        pq.write_table(table, path / "part.parquet" if kind == "folder" else path, row_group_size=50)
    else:
        write_h5ad(tmp_path / "x.h5ad", x)
        if kind == "zarr":
            anndata.read_h5ad(tmp_path / "x.h5ad").write_zarr(path)
    put(path, path.name)
    with Cells.open(f"s3://cells/{path.name}", "X_pca") as source:
        assert np.array_equal(np.concatenate([vectors for _, vectors in source.chunks(7)]), x)
        assert source.has_names == (kind in ("h5ad", "zarr"))


def test_arrows_options_in_a_uri_name_the_endpoint(
    store: Store, server: tuple[Store, str], monkeypatch, tmp_path: Path
):
    """In place of the environment; for Arrow, which reads, and for s3fs, which writes."""
    options = f"?endpoint_override={server[1].removeprefix('http://')}&scheme=http&region=us-east-1"
    uri = f"s3://key:secret@cells/a/b.txt{options}"
    with monkeypatch.context() as bare:
        bare.delenv("AWS_ENDPOINT_URL")
        bare.delenv("AWS_ACCESS_KEY_ID")
        with atomic_write(locate(uri)) as part:
            part.write_text("whole")
        assert fetch(locate(uri)).read_text() == "whole"
        assert fingerprint(uri) == fingerprint(fetch(locate(uri)))


def test_fsspec_reads_where_arrow_cannot(atlas: Path):
    import fsspec

    with fsspec.open("memory://bucket/cells.parquet", "wb") as file:
        file.write(atlas.read_bytes())
    there = Atlas.open("memory://bucket/cells.parquet").read(np.arange(600))
    here = Atlas.open(atlas).read(np.arange(600))
    assert np.array_equal(there.vectors, here.vectors)
    assert np.array_equal(there.labels, here.labels)


@pytest.mark.slow
def test_tiledb_is_read_from_a_store(store: Store, tmp_path: Path):
    """In a process of its own: TileDB holds Python's lock while it waits, and the server is a thread here."""
    x = clustered(TYPES * 20)
    write_tiledb(tmp_path / "x", x)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np\n"
        "from fractal.data.cells import Cells\n"
        "with Cells.open(sys.argv[1]) as source:\n"
        "    assert np.array_equal(np.concatenate([v for _, v in source.chunks(50)]), np.load(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, put(tmp_path / "x", "array"), str(tmp_path / "x.npy")], check=True)


def every_vector(path: Any) -> np.ndarray:
    return np.concatenate(list(Atlas.open(path).vectors()))


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["local", pytest.param("store", marks=pytest.mark.slow)])
def test_a_folder_of_parquet_is_one_atlas(store: Store, atlas: Path, tmp_path: Path, where: str):
    """Also where its folders say a column, as Spark writes them, and where other files lie beside."""
    table = pq.read_table(atlas)
    folder = tmp_path / "atlas"
    for i, study in enumerate(["s3", "s1", "s2"]):
        (folder / f"study={study}").mkdir(parents=True)
        mine = table.filter(pa.compute.equal(table["study"], study)).drop_columns("study")
        for k, start in enumerate(range(0, len(mine), 120)):
            pq.write_table(
                mine.slice(start, 120), folder / f"study={study}" / f"part-{k:03}.parquet", row_group_size=40
            )
        (folder / f"study={study}" / f"_SUCCESS{i}.parquet").write_bytes(b"")
    (folder / "README.md").write_text("not cells")
    expected = pa.concat_tables([table.filter(pa.compute.equal(table["study"], study)) for study in ("s1", "s2", "s3")])
    whole = tmp_path / "whole.parquet"
    pq.write_table(expected, whole)
    path = str(folder) if where == "local" else put(folder, "atlas")

    data = Atlas.open(path).data
    assert (data.num_rows, len(data.sizes) > 10) == (600, True)
    assert np.array_equal(every_vector(path), every_vector(whole))
    for name in ("study", "level4_subtype", "level1_system"):
        codes, names = Atlas.open(path).codes(name)
        assert names == (there := Atlas.open(whole).codes(name))[1]
        assert np.array_equal(codes, there[0])
    rows = np.random.default_rng(0).permutation(600)[:100]
    assert np.array_equal(Atlas.open(path).read(rows).vectors, Atlas.open(whole).read(rows).vectors)
    assert np.array_equal(Atlas.open(path).read(rows).labels, Atlas.open(whole).read(rows).labels)
    if where == "store":
        return
    assert Atlas.open(path).first_copies.tolist() == list(range(600))
    for name, source in (("a", path), ("b", str(whole))):
        stratify.main(["--input", source, "--output", str(tmp_path / f"{name}.parquet")])
    ours, theirs = (pq.read_table(tmp_path / f"{name}.parquet") for name in "ab")
    assert all(ours[name].equals(theirs[name]) for name in theirs.column_names)
    before = fingerprint(path)
    if where == "local":
        next(folder.rglob("part-000.parquet")).unlink()
        assert fingerprint(path) != before


@pytest.mark.parametrize("where", ["local", pytest.param("store", marks=pytest.mark.slow)])
def test_a_folder_is_written_part_by_part(store: Store, atlas: Path, tmp_path: Path, monkeypatch, fails, where: str):
    """The same rows as in one file; all parts or none."""
    folder = str(tmp_path / "parts") if where == "local" else "s3://cells/parts"
    monkeypatch.setattr(parquet, "PART", 250)
    monkeypatch.setattr(stratify, "ROW_GROUP", 100)
    flags = ["--input", str(atlas)]
    stratify.main([*flags, "--output", str(tmp_path / "one.parquet")])
    pattern = f"{folder}/part-{{}}.parquet"

    append, calls = pq.ParquetWriter.write_table, []

    def stop(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 6:  # in the third file
            raise KeyboardInterrupt
        append(*args)

    with monkeypatch.context() as stopped:
        stopped.setattr(pq.ParquetWriter, "write_table", stop)
        with pytest.raises(KeyboardInterrupt):
            stratify.main([*flags, "--output", pattern])
    assert not (tmp_path / "parts").exists() or not any((tmp_path / "parts").iterdir())
    assert (keys(), uploads()) == ([], [])
    stratify.main([*flags, "--output", pattern])
    names = keys() if where == "store" else sorted(f"parts/{file.name}" for file in (tmp_path / "parts").iterdir())
    assert names == [f"parts/part-{i:05}.parquet" for i in range(3)]
    assert Atlas.open(folder).num_rows == 600
    one = tmp_path / "one.parquet"
    assert np.array_equal(every_vector(folder), every_vector(one))
    assert np.array_equal(Atlas.open(folder).codes("level4_subtype")[0], Atlas.open(one).codes("level4_subtype")[0])
    assert Atlas.open(folder).schema.equals(Atlas.open(one).schema, check_metadata=True)
    assert "parts: holds part-00000.parquet already; name another folder" in fails(
        stratify.main, *flags, "--output", pattern
    )


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_parquet_that_is_replaced_while_it_is_read(atlas: Path, tmp_path: Path, monkeypatch, fails, kind: str):
    """Without a word, the labels would be of the old rows and the vectors of the new ones."""
    table, path = pq.read_table(atlas), tmp_path / "cells.parquet"
    part = path / "part-0.parquet" if kind == "folder" else path
    part.parent.mkdir(exist_ok=True)
    pq.write_table(table, part)

    def replaced(*args: Any) -> np.ndarray:
        pq.write_table(table.take(np.arange(600)[::-1]), tmp_path / "new")
        (tmp_path / "new").replace(part)
        return round_robin(*args)

    monkeypatch.setattr(stratify, "round_robin", replaced)  # when the labels have been read, and no vector
    line = fails(stratify.main, "--input", path, "--output", tmp_path / "out.parquet")
    assert "cells.parquet: has been replaced while it was read; run this again" in line
    assert not (tmp_path / "out.parquet").exists()
    with Cells.open(path) as cells:
        assert cells.codes("level4_subtype")
        replaced(np.zeros(6, int), 0)
        with pytest.raises(InputError, match="has been replaced while it was read"):
            list(cells.chunks())


def test_a_folder_without_cells_is_refused_in_a_line(fails, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    line = fails(stratify.main, "--input", tmp_path / "empty", "--output", tmp_path / "out.parquet")
    assert "empty: holds no Parquet files" in line
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.parquet").write_bytes(b"no Parquet")
    line = fails(stratify.main, "--input", tmp_path / "bad", "--output", tmp_path / "out.parquet")
    assert "not a Parquet file, or damaged" in line
    assert not (tmp_path / "out.parquet").exists()


# --- a store that fails ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 503, "drop", "cut"])
def test_what_passes_is_tried_again(store: Store, atlas: Path, fault: int | str):
    """Errors of the server, throttling, and dropped connections, in reading and in writing."""
    uri = put(atlas, "cells.parquet")
    store.fail(fault, fault, of=("GET",))
    assert np.array_equal(every_vector(uri), every_vector(atlas))
    assert not store.faults
    store.fail(fault, of=("PUT",))
    with atomic_write(locate("s3://cells/new")) as part:
        part.write_bytes(b"whole")
    assert not store.faults
    assert body("new") == b"whole"


def test_a_part_of_an_upload_is_sent_again(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "UPLOAD", 5 << 20)
    data = np.random.default_rng(0).bytes(12 << 20)
    store.fail(503, "drop", 500, of=("PUT",))
    with atomic_stream(locate("s3://cells/new")) as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])
    assert not store.faults
    assert body("new") == data
    assert uploads() == []


@pytest.mark.parametrize("error", [InputError("stop"), KeyboardInterrupt()])
def test_an_upload_that_is_stopped_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, error: BaseException):
    """No object, no parts; an object that was there stays as it is."""
    monkeypatch.setattr(storage, "UPLOAD", 5 << 20)
    client().put_object(Bucket="cells", Key="old", Body=b"old")
    for key in ("new", "old"):
        with pytest.raises(type(error)), atomic_stream(locate(f"s3://cells/{key}")) as file:  # noqa: PT012
            file.write(bytes(12 << 20))
            assert len(uploads()) == 1  # parts are there already
            raise error
    with pytest.raises(type(error)), atomic_write(locate("s3://cells/small")) as part:  # noqa: PT012
        part.write_bytes(b"x")
        raise error
    assert keys() == ["old"]
    assert body("old") == b"old"
    assert uploads() == []


def test_what_stays_wrong_is_one_line(store: Store, fails, atlas: Path, tmp_path: Path):
    uri, out = put(atlas, "cells.parquet"), str(tmp_path / "out.parquet")
    line = fails(stratify.main, "--input", "s3://none/cells.parquet", "--output", out)
    assert "s3://none/cells.parquet: no such file" in line
    line = fails(stratify.main, "--input", uri, "--output", "s3://none/out.parquet")
    assert "s3://none/out.parquet: there is no bucket none" in line
    store.fail(403, of=("HEAD",), forever=True)
    line = fails(stratify.main, "--input", uri, "--output", out)
    assert re.search("s3://cells/cells.parquet: cannot be read, its store says: .*ACCESS_DENIED", line)
    store.fail(403, of=("PUT",), forever=True)
    line = fails(stratify.main, "--input", uri, "--output", "s3://cells/out.parquet")
    assert "s3://cells/out.parquet: cannot be written, its store says: as the test says; check" in line
    store.fail()
    assert keys() == ["cells.parquet"]
    client().put_object(Bucket="cells", Key="bad.parquet", Body=b"no Parquet")
    line = fails(stratify.main, "--input", "s3://cells/bad.parquet", "--output", out)
    assert "s3://cells/bad.parquet: not a Parquet file, or damaged" in line
    assert not Path(out).exists()


@pytest.mark.slow  # Arrow tries again for 6 s
def test_a_server_that_stays_broken_is_one_line(store: Store, fails, atlas: Path, tmp_path: Path):
    uri = put(atlas, "cells.parquet")
    store.fail(503, of=("GET",), forever=True)
    line = fails(stratify.main, "--input", uri, "--output", tmp_path / "out.parquet")
    assert "s3://cells/cells.parquet: cannot be read, its store says:" in line
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.slow
@pytest.mark.parametrize("faults", [[], ["late"]], ids=["", "before the store has answered"])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_stopped_leaves_nothing_in_the_store(
    store: Store, tmp_path: Path, stop: signal.Signals, faults: list[int | str]
):
    """Ctrl-C, and what schedulers send, in the middle of an upload of 80 MB."""
    store.fail(*faults, of=("POST",))
    x = np.random.default_rng(0).normal(size=(300_000, 64)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np; from fractal.base.errors import run; from fractal.base.storage import locate\n"
        "from fractal.base.files import atomic_stream\n"
        "def main():\n"
        "    x = np.load(sys.argv[1]).tobytes()\n"
        "    with atomic_stream(locate('s3://cells/new.bin')) as file:\n"
        "        while True: file.write(x)\n"
        "run(main)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x.npy")], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (begun := uploads()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert begun
    process.send_signal(stop)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if stop == signal.SIGINT else 143)
    assert "interrupted: nothing half-written was left behind" in said
    assert "Traceback" not in said
    assert keys() == []
    assert uploads() == []
