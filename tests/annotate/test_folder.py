"""A reference's folder: what is written is read again, whole or not at all, and damage is noticed."""

import json
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

import fractal
from fractal.annotate import folder as folders
from fractal.annotate.annotator import Annotator
from fractal.base.archive import write_archive
from fractal.base.errors import InputError
from fractal.base.storage import locate_shared
from fractal.data.parquet import fingerprint
from fractal.reference import Reference, load_adapter, open_embedder, read_reference
from tests.annotate.conftest import cells
from tests.conftest import columns


def test_what_is_written_is_read_again(reference: Reference, tmp_path: Path):
    replace(reference).save(tmp_path / "ref")
    again = read_reference(tmp_path / "ref")
    x = cells(50, 3).vectors
    for name, values in columns(reference.annotator, x).items():
        again_values = columns(again.annotator, x)[name]
        assert np.array_equal(values, again_values, equal_nan=values.dtype.kind == "f")
    adapter, facts = load_adapter(tmp_path / "ref")
    assert adapter.dim == facts["config"]["dim"] == 8
    assert (facts["reference_cells"], facts["reference_types"], facts["training_cells"]) == (200, 4, 1000)
    replace(again).save(tmp_path / "ref")  # its own files are replaced


def same_answers(one: Reference, other: Reference) -> bool:
    x = cells(50, 3).vectors
    found, expected = columns(one.annotator, x), columns(other.annotator, x)
    return all(np.array_equal(found[n], a, equal_nan=a.dtype.kind == "f") for n, a in expected.items())


def test_a_zip_is_the_folder_in_one_file(reference: Reference, tmp_path: Path):
    replace(reference).save(tmp_path / "ref")
    replace(reference).save(tmp_path / "ref.zip")
    again = fractal.load(tmp_path / "ref.zip", "cpu")
    assert again.name == "ref.zip"
    assert same_answers(again, reference)
    with zipfile.ZipFile(tmp_path / "ref.zip") as archive:
        for file in (tmp_path / "ref").iterdir():
            assert archive.read(file.name) == file.read_bytes()
    replace(again).save(tmp_path / "ref.zip")  # is replaced
    assert load_adapter(tmp_path / "ref.zip")[1] == again.facts
    assert open_embedder(tmp_path / "ref.zip").sha256 == reference.sha256
    with pytest.raises(InputError, match=r"none\.zip: no such file"):
        fractal.load(tmp_path / "none.zip")
    write_archive(tmp_path / "mine.zip", {"notes.txt": b"mine"})
    with pytest.raises(InputError, match=r"mine\.zip: is there, and no reference"):
        replace(reference).save(tmp_path / "mine.zip")


def test_a_file_that_was_changed_in_a_zip_is_noticed(reference: Reference, tmp_path: Path):
    replace(reference).save(tmp_path / "ref")
    files = {file.name: file.read_bytes() for file in (tmp_path / "ref").iterdir()}
    files["hierarchy.tsv"] = files["hierarchy.tsv"].replace(b"a", b"b")
    write_archive(tmp_path / "ref.zip", files)
    with pytest.raises(InputError, match=rf"^{tmp_path}/ref\.zip/hierarchy\.tsv: missing, or not the file"):
        fractal.load(tmp_path / "ref.zip")


@pytest.fixture
def served(reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that https://web.example serves, with the reference in it."""
    replace(reference).save(tmp_path / "ref.zip")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local, urlopen = f"http://127.0.0.1:{server.server_port}", urllib.request.urlopen
        monkeypatch.setattr(
            urllib.request, "urlopen", lambda url, **more: urlopen(url.replace("https://web.example", local), **more)
        )
        yield tmp_path
        server.shutdown()


def test_a_reference_at_an_address_is_read_with_its_sha256_only(served: Path, reference: Reference):
    sha256 = fingerprint(served / "ref.zip")
    url = "https://web.example/ref.zip?download=1"
    again = fractal.load(url, "cpu", sha256=sha256.upper())
    assert again.name == "ref.zip"
    assert same_answers(again, reference)
    assert same_answers(read_reference(locate_shared(f"{url}#sha256={sha256}")), reference)
    for odd, match in {
        url: "its sha256: URL#sha256=64 digits",
        f"{url}#sha256=abc": "its sha256: URL#sha256=64 digits",
        f"http://web.example/ref.zip#sha256={sha256}": "from an https:// address",
        f"{url}#sha256={'0' * 64}": rf"^https://web\.example/ref\.zip: has the sha256 {sha256}, not 000",
        f"https://web.example/none.zip#sha256={'1' * 64}": r"none\.zip: cannot be read.* 404",
    }.items():
        with pytest.raises(InputError, match=match):
            fractal.load(odd)
    with pytest.raises(InputError, match="goes with an https:// address"):
        fractal.load(served / "ref.zip", sha256=sha256)


def test_a_reference_that_a_killed_run_moved_away_is_put_back(reference: Reference, tmp_path: Path):
    part = tmp_path / ".ref.01234567.part"  # as a run killed between its two renames leaves it
    for name in ("old", "new"):
        replace(reference).save(part / name)
    assert read_reference(tmp_path / "ref").levels == reference.levels
    assert [path.name for path in tmp_path.iterdir()] == ["ref"]


def test_a_reference_that_is_replaced_while_it_is_read(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All that is read is of one run, not the first one's facts and the second one's cells."""
    path, load_file = tmp_path / "ref", folders.load_file
    a = reference.annotator
    other = replace(reference, annotator=replace(a, vectors=a.vectors[::-1].copy(), path=a.path[::-1].copy()))
    replace(reference).save(path)

    def replaced(file: Path) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(folders, "load_file", load_file)
        replace(other).save(path)
        return load_file(file)

    monkeypatch.setattr(folders, "load_file", replaced)
    again = read_reference(path)
    assert np.array_equal(again.annotator.vectors, other.annotator.vectors)
    assert again.facts["sha256"] == json.loads((path / "bundle.json").read_text())["sha256"]


def test_nothing_that_is_not_the_reference_s_own_is_lost(reference: Reference, tmp_path: Path):
    replace(reference).save(tmp_path / "ref")
    (tmp_path / "ref" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        replace(reference).save(tmp_path / "ref")
    assert (tmp_path / "ref" / "notes.txt").read_text() == "mine"


CHANGES: dict[str, Callable[[Annotator], Annotator]] = {
    "a path that the tree lacks": lambda a: replace(a, path=a.path + 1),
    "a number that is not finite": lambda a: replace(a, vectors=np.where(a.vectors > 0, np.nan, a.vectors)),
    "a vector of zeros": lambda a: replace(a, vectors=a.vectors * 0),
    "studies of other cells": lambda a: replace(a, study=a.study[1:]),
    "codes of another width": lambda a: replace(a, path=a.path.astype(np.int32)),
    "no cells": lambda a: replace(a, vectors=a.vectors[:0], path=a.path[:0], study=a.study[:0]),
    "a neighbour on no path": lambda a: replace(
        a, held_out=replace(a.held_out, neighbour_path=a.held_out.neighbour_path - 1)
    ),
    "a cell without a neighbour": lambda a: replace(
        a, held_out=replace(a.held_out, cosine=np.full_like(a.held_out.cosine, -np.inf))
    ),
    "signals of other cells": lambda a: replace(a, held_out=replace(a.held_out, signals=a.held_out.signals[1:])),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parts_that_do_not_fit_together_are_refused(name: str, reference: Reference, tmp_path: Path):
    """Also where the hashes agree, as those of a folder that somebody else has made may."""
    replace(reference, annotator=CHANGES[name](reference.annotator)).save(tmp_path / "ref")
    with pytest.raises(InputError, match="ref: a damaged reference; make it again"):
        read_reference(tmp_path / "ref")


def test_names_with_quotes_tabs_and_the_word_na_come_back(reference: Reference, tmp_path: Path):
    tree = reference.annotator.tree
    names = ['a "b"', "NA", "null, or nan", "Zellen für x"]
    odd = replace(tree, paths=[(*path[:3], name) for path, name in zip(tree.paths, names, strict=True)])
    replace(reference, annotator=replace(reference.annotator, tree=odd)).save(tmp_path / "ref")
    assert read_reference(tmp_path / "ref").annotator.tree.paths == odd.paths
