"""A reference's folder: what is written is read again, whole or not at all, and damage is noticed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fractal.annotate import folder as folders
from fractal.annotate.annotator import Annotator
from fractal.base.errors import InputError
from fractal.reference import Reference, load_adapter, read_reference
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
