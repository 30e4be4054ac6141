"""Conditions held to pandas, terms to the hierarchy."""

import numpy as np
import pytest

from fractal.base.errors import InputError
from fractal.search import filters
from fractal.search.index import Index
from tests.search.conftest import agreement, exact, table_of, vectors_of


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("tissue == 'lung'", lambda f: f.tissue == "lung"),
        ("tissue != 'lung'", lambda f: f.tissue.notna() & (f.tissue != "lung")),
        ("tissue in ['lung', 'gut'] and age >= 40", lambda f: f.tissue.isin(["lung", "gut"]) & (f.age >= 40)),
        ("tissue not in ['lung']", lambda f: f.tissue.notna() & (f.tissue != "lung")),
        ("not (age < 30 or tissue == 'blood')", lambda f: ~((f.age < 30) | (f.tissue == "blood"))),
        ("column('a name|with\\x1b') == '<b>'", lambda f: f["a name|with\x1b"] == "<b>"),
        ("cell_id == 'cell 7'", lambda f: f.cell_id == "cell 7"),
        ("age > -1", lambda f: f.age > -1),
    ],
)
def test_conditions_equal_pandas(index: Index, condition: str, expected):
    keep = filters.where_mask(index, condition)
    assert np.array_equal(keep, expected(table_of(3_000).to_pandas()).to_numpy(bool))
    queries = vectors_of(20, seed=1)
    hits = index.search(queries, 5, keep=keep)
    there = np.flatnonzero(keep)
    assert keep[hits.cells[hits.cells >= 0]].all()
    right = there[exact(queries, vectors_of(3_000)[there], 5)]
    assert agreement(hits.cells[:, : right.shape[1]], right) >= 0.95
    by_prefix = index.search(queries, 5, 2, keep).cells
    assert keep[by_prefix[by_prefix >= 0]].all()


@pytest.mark.parametrize(
    "condition",
    ["__import__('os').system('true')", "tissue", "tissue == other", "1 == 1", "tissue == 'a' == 'b'", "tis == 'lung'",
     "age in 3", "age > 'old'", "tissue == [x for x in ()]", "(" * 300, "", "tissue < b'x'", "column(3) == 4", "\0"],
)  # fmt: skip
def test_what_is_no_condition_is_refused(index: Index, condition: str):
    with pytest.raises(InputError):
        filters.where_mask(index, condition)


def test_only_takes_labels_of_any_level_and_terms(index: Index):
    frame = table_of(3_000).to_pandas()
    assert np.array_equal(filters.only_mask(index, ["Neural"], "data/cl-slim.obo"), frame.level1_system == "Neural")
    leucocytes = ["B cell", "CD14-low, CD16-positive monocyte", "natural killer cell", "regulatory T cell"]
    assert np.array_equal(
        filters.only_mask(index, ["CL:0000738"], "data/cl-slim.obo"), frame.level2_type.isin(leucocytes)
    )
    for term in ("CL:9999999", "no such cell"):
        with pytest.raises(InputError, match=term):
            filters.only_mask(index, [term], "data/cl-slim.obo")
