"""Labels of cells: what is left out, and what is said of it; and label maps, any text, against a slow reader."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fractal.base.errors import InputError
from fractal.data.ingestion import place_cells
from fractal.data.labels import Codes, Labels, coded, read_labels, read_map
from fractal.hierarchy.matching import match_names
from fractal.hierarchy.names import clean, is_missing
from fractal.hierarchy.ontology import CL_SLIM, load_graph

NAMES = ["B cell", "T cell", "cell", "native cell"]


def cells(codes: Callable[[str], Codes]) -> SimpleNamespace:
    return SimpleNamespace(path="cells.h5ad", codes=codes)


CELLS = cells(lambda _: (np.array([0, 1, 2, 3, 3, -1]), NAMES))


def test_labels_that_are_no_types_are_left_out_and_counted():
    labels = read_labels(CELLS, "cell_type")
    assert labels.names == ["B cell", "T cell"]
    assert labels.codes.tolist() == [0, 1, -1, -1, -1, -1]
    assert "3 of 6 cells left out: cell, native cell is no type" in labels.notes[-1]


def test_a_label_map_may_give_them_a_type():
    labels = read_labels(CELLS, "cell_type", label_map={"cell": "neuron"})
    assert labels.names == ["B cell", "T cell", "neuron"]
    assert labels.codes.tolist() == [0, 1, 2, -1, -1, -1]


def test_levels_of_the_user_may_be_called_so():
    tree = {"group": (np.array([0, 0, 1]), ["x", "y"]), "fine": (np.array([0, 1, 2]), ["cell", "other", "third"])}
    assert read_labels(cells(tree.__getitem__), "", levels=["group", "fine"]).names == ["cell", "other", "third"]


TEXTS = ["B cell", "B\u00a0 cell", "T cell", '"T cell"', '"NK', 'a "b"', "", " ", "# name", "NA", "CL:0000236"]
SIGNS = ["\t", "\n", "\r\n", "\r", '"', '""', "\ufeff", "\x00", "\u2028", "\x85"]
ROWS = st.lists(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=3).map("\t".join)).map("\n".join)
PIECES = st.lists(st.sampled_from(TEXTS + SIGNS)).map("".join)
MAPS = (ROWS | PIECES | st.text()).map(str.encode) | st.binary()
FIELD = r'"(?:[^"]|"")*"|(?!")[^\t]*'  # in quotation marks, in which two stand for one, or without


def slow_map(data: bytes) -> dict[str, str] | int:
    """The label map, or the number of the first line that is wrong."""
    targets: dict[str, str] = {}
    for number, raw in enumerate(re.split(b"\r\n|\r|\n", data), 1):
        try:
            line = raw.decode().removeprefix("\ufeff")
        except UnicodeDecodeError:
            return number
        if not re.fullmatch(rf"({FIELD})(\t({FIELD}))*", line, re.DOTALL):
            return number
        fields = re.findall(rf"(?:^|\t)({FIELD})", line, re.DOTALL)
        names = [clean(field[1:-1].replace('""', '"') if field[:1] == '"' else field) for field in fields]
        if not any(names) or (number == 1 and names[0].startswith("#")):
            continue
        if len(names) < 2 or not names[0] or targets.setdefault(names[0], names[1]) != names[1]:
            return number
    return targets


@given(MAPS)
@example(b'a\t"B cell\nb\tT cell"\n')  # one record of two lines, as csv has it
@example(b"\tB cell\n")
def test_any_label_map_is_read_as_by_hand_or_refused_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
):
    path = tmp_path_factory.getbasetemp() / "map.tsv"
    path.write_bytes(data)
    expected = slow_map(data)
    if isinstance(expected, int):
        with pytest.raises(InputError, match=rf"map\.tsv: [^\n]*\bline {expected}\b"):
            read_map(path)
    else:
        assert read_map(path) == expected


@pytest.mark.slow
@given(MAPS)
def test_any_label_map_names_the_cells_or_is_refused(data: bytes):
    """Each cell's name, on to its class in the ontology."""
    targets, named = slow_map(data), ["B cell", "T cell", "NK", "NA", "B cell"]
    if isinstance(targets, int):
        return
    codes, names = coded(pa.chunked_array([named]))
    mapped = [targets.get(name, name) for name in named if name != "NA"]
    mapped = ["" if is_missing(name) else name for name in mapped]
    known = match_names(filter(None, mapped), graph := load_graph(CL_SLIM))
    usable = set(targets) & set(names) and any(mapped) and all(term for term, _ in known.values())
    try:
        labels = read_labels(cells(lambda _: (codes, names)), "cell_type", label_map=targets)
        plan = place_cells(labels, graph, "cells.h5ad")
    except InputError:
        assert not usable
        return
    assert usable
    assert [labels.names[code] if code >= 0 else "" for code in np.delete(labels.codes, 3)] == mapped
    assert np.array_equal(plan.classes >= 0, labels.codes >= 0)


def test_a_label_map_of_python_follows_the_rules_of_the_file():
    """Names are cleaned, numbers are names, and two targets of one name are refused."""
    labels = Labels(["0", "B cell"], np.array([0, 1]))
    assert labels.mapped({0: "T cell", "B\u00a0cell ": None}, "adata").names == ["T cell"]  # type: ignore[dict-item]
    with pytest.raises(InputError, match="label map: 'B cell' has two targets, 'T cell' and 'neuron'"):
        labels.mapped({"B cell": "T cell", "B\u00a0cell": "neuron"}, "adata")
