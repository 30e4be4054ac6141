"""Conditions held to pandas, terms to the hierarchy."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.base.errors import InputError
from fractal.search import build, filters, open_index
from fractal.search.index import Index
from tests.search.conftest import agreement, cells_of, exact, table_of, vectors_of


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


# --- any condition, against Python row by row -------------------------------------------------------------------------

Row = dict[str, Any]
VALUES: dict[str, list[Any]] = {
    "tissue": ["lung", "blood", "gut", "", "é", None],
    "age": [0, 1, 40, -3, 2**62, None],
    "score": [0.0, 0.5, -1.0, 1e300, float("inf"), None],
    "smoker": [True, False, None],
    "a name": ["'", "x|y", "\\", None],
}
ROWS = [{name: values[i % len(values)] for name, values in VALUES.items()} for i in range(31)]
COMPLETE = [i for i, row in enumerate(ROWS) if None not in row.values()]
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "in": lambda value, several: value in several, "not in": lambda value, several: value not in several,
}  # fmt: skip
Condition = tuple[str, Callable[[Row], bool]]  # as text, and what it means


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """31 cells with text as codes and as text, numbers and truth values, each with some that are missing."""
    table = pa.table({name: [row[name] for row in ROWS] for name in VALUES})
    table = table.set_column(0, "tissue", table["tissue"].dictionary_encode())
    path = tmp_path_factory.mktemp("mixed") / "index"
    build.build(path, cells_of(vectors_of(len(ROWS)), table))
    return open_index(path)


@st.composite
def comparisons(draw: st.DrawFn) -> Condition:
    name, op = draw(st.sampled_from(list(VALUES))), draw(st.sampled_from(list(COMPARE)))
    known = [value for value in VALUES[name] if value is not None]
    value = draw(st.lists(st.sampled_from(known), max_size=3) if "in" in op else st.sampled_from(known))
    column = name if name.isidentifier() and draw(st.booleans()) else f"column({name!r})"
    text = f"{column} {op} {value!r}".replace("inf", "1e999")
    return text, lambda row: row[name] is not None and COMPARE[op](row[name], value)


def combined(parts: st.SearchStrategy[Condition]) -> st.SearchStrategy[Condition]:
    def join(a: Condition, b: Condition, how: str) -> Condition:
        if how == "not":
            return f"not ({a[0]})", lambda row: not a[1](row)
        both = {"and": all, "or": any}[how]
        return f"({a[0]}) {how} ({b[0]})", lambda row: both([a[1](row), b[1](row)])

    return st.builds(join, parts, parts, st.sampled_from(["and", "or", "not"]))


@settings(max_examples=100)
@given(st.recursive(comparisons(), combined, max_leaves=6))
def test_any_condition_means_what_it_does_in_python(mixed: Index, condition: Condition):
    text, passes = condition
    try:
        mask = filters.where_mask(mixed, text)
    except InputError:
        assert "smoker" in text  # Arrow has no order of truth values
    else:
        assert mask.tolist() == [passes(row) for row in ROWS]


WORDS = [*VALUES, *COMPARE, "and", "or", "not", "(", ")", "[", "]", ",", "-", "~", "column('a name')", "column", "None",
         "True", "1", "0.5", "1e999", "1j", str(2**63), str(2**64), "9" * 5_000, "'lung'", "b'lung'", "f'{age}'", "''",
         "'\\ud800'", "'\\d'", "'\\0'", "\0", "\ud800", "\n", "#", "lambda: 1", "if",
         ":=", "__import__('os')"]  # fmt: skip


@settings(max_examples=200)
@given(st.one_of(st.text(), st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)))
def test_any_text_is_answered_as_python_does_or_refused(mixed: Index, text: str):
    try:
        mask = filters.where_mask(mixed, text)
    except InputError:
        return
    code = compile(text.strip(), "", "eval")
    for i in COMPLETE:  # `not in` holds for what is missing in Python alone
        assert mask[i] == eval(code, {"column": ROWS[i].__getitem__, **ROWS[i]})


@pytest.mark.parametrize("value", [str(2**63), str(10**400), "'\\ud800'", "9" * 5_000, "-" * 3_000 + "1"])
def test_values_that_arrow_or_python_can_not_hold_are_refused(mixed: Index, value: str):
    for name in VALUES:
        for condition in (f"column({name!r}) == {value}", f"column({name!r}) in [{value}]"):
            with pytest.raises(InputError, match="can't be applied"):
                filters.where_mask(mixed, condition)
