"""A run over cells: in chunks and in clusters, with its warnings; and what can't be asked for."""

from typing import Any

import numpy as np
import pytest
from pyarrow import concat_tables

from fractal.annotate import run as module
from fractal.annotate.answers import answer_columns
from fractal.annotate.query import Origin
from fractal.annotate.run import check_answers
from fractal.base.errors import InputError
from fractal.data.cells import Cells
from fractal.reference import Reference
from tests.annotate.conftest import cells


@pytest.fixture
def new(tmp_path) -> Any:
    np.save(tmp_path / "new.npy", cells(300, 7).vectors)
    with Cells.open(tmp_path / "new.npy") as opened:
        yield opened


def test_chunks_are_answered_as_all_cells_at_once(reference: Reference, new: Cells, monkeypatch: pytest.MonkeyPatch):
    annotator = reference.annotator
    expected = answer_columns(annotator.answer(cells(300, 7).vectors), annotator.tree)
    monkeypatch.setattr(module, "BATCH", 64)
    run = reference.run()
    parts = list(run.columns(new, Origin("obsm", "odd")))
    assert [len(part) for part in parts] == [64, 64, 64, 64, 44]
    found = concat_tables(parts)
    for name in ("label", "status", "level"):
        assert found[name].to_pylist() == expected[name].to_pylist()
    assert run.answered is not None
    assert run.answered.num_rows == 300
    about = run.results["annotation"]
    assert (about["vectors"], about["warning"], about["confidence"]) == ("obsm", "odd", 0.8)


def test_cells_of_a_cluster_get_one_label(reference: Reference, new: Cells, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH", 64)
    codes = cells(300, 7).labels[:, 3]
    run = reference.run(confidence=0.5, novelty="off")
    (table,) = run.columns(new, Origin("", ""), (codes, list("abcd")))
    labels = np.array(table["d" if "d" in table.column_names else "label"].to_pylist(), object)
    assert all(len(set(labels[codes == code])) == 1 for code in range(4))
    assert run.results["groups"].index.tolist() == list("abcd")


def test_one_group_of_three_types_is_not_taken_for_one_type(reference: Reference, tmp_path, recwarn):
    some = cells(400, 7)
    rare = some.vectors[some.labels[:, 3] > 0]  # each is a tenth of the reference
    np.save(tmp_path / "x.npy", rare)
    run = reference.run()
    with Cells.open(tmp_path / "x.npy") as opened:
        (table,) = run.columns(opened, Origin("", ""), (np.zeros(len(rare), int), ["all"]))
    assert table["subtype"].combine_chunks().value_counts().field("counts").to_pylist() == [len(rare)]
    assert not recwarn.list
    assert run.results["annotation"]["warning"] == ""


def test_a_block_of_foreign_rows_is_warned_of(reference: Reference, tmp_path):
    x = cells(1_000, 7).vectors
    x[400:600] = np.random.default_rng(0).normal(size=(200, 8))
    np.save(tmp_path / "x.npy", x)
    run = reference.run()
    with Cells.open(tmp_path / "x.npy") as opened, pytest.warns(UserWarning, match="rows .* have nothing in common"):
        list(run.columns(opened, Origin("", "")))
    assert "have nothing in common" in run.results["annotation"]["warning"]


def test_an_error_sets_the_confidence(reference: Reference):
    run = reference.run(error=0.2)
    assert run.confidence == reference.annotator.calibration.control(0.2).confidence
    assert run.results["annotation"]["error"] == 0.2
    assert run.lines[0].startswith("at most 0.2 of all cells with a wrong label")


def test_types_to_answer_with_are_named_one_or_many(reference: Reference):
    for names in ("a", ["a", "b"]):
        run = reference.run(only=names)
        assert set(run.annotator.path) == set(range(len(names) if isinstance(names, list) else 1))


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ((1.5, "on"), "confidence 1.5: must be above 0 and at most 1"),
        ((0.8, "on", 1.0), "error 1: must be above 0 and below 1"),
        ((0.9, "on", 0.1), "either a confidence or an error"),
        ((0.8, "no"), "novelty 'no': is one of on, flag, off"),
    ],
)
def test_what_can_t_be_asked_for(asked: tuple[Any, ...], line: str):
    with pytest.raises(InputError, match=line):
        check_answers(*asked)
