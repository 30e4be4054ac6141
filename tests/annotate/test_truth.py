"""Scores against known labels, by hand, and the picture of what is taken for what."""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.axes import Axes

from fractal.annotate.truth import Truth, draw_confusions, report
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.hierarchy.tree import Tree


def answered(
    levels: Sequence[str], labels: Sequence[Sequence[str | None]], level: Sequence[str], status: Sequence[str]
):
    """Columns of the output: a label per level and cell."""
    columns = {name: pa.array(values, pa.string()) for name, values in zip(levels, labels, strict=True)}
    return pa.table({**columns, "level": level, "status": status})


def test_scores_by_hand():
    """x is answered rightly, and y for x; a cell of another type is flagged, one without a vector counts nowhere."""
    labels = [["I", "I", "S", "I", None], ["x", "y", "z", "x", None]]
    cells = answered("kt", labels, ["t", "k", "t", "t", "none"], ["ok", "ok", "ok", "novel", "invalid"])
    tree = Tree.of([("I", "x"), ("I", "y"), ("S", "z")], ("k", "t"))
    text = report(cells, Truth("kind", np.array([0, 0, 2, 3, 0]), ["x", "y", "z", "strange"]), tree)
    assert "3 cells whose kind the reference has; 1 of other types, 100.0% of them flagged" in text
    row = next(line for line in text.splitlines() if line.startswith("| t "))
    assert [cell.strip() for cell in row.split("|")[2:5]] == ["0.667", "0.667", "1.000"]
    assert "hierarchical F1 of the finest labels: 0.833" in text  # 5 of 6 nodes on both sides
    assert "x -> y" in text


def test_labels_count_however_they_are_written():
    """By name, synonym, plural or id of the Cell Ontology; what it does not know is named with its spelling."""
    paths = [("Immune", "NK"), ("Immune", "B cell"), ("Immune", "CD19+ B")]
    ids = np.array([["", "CL:0000623"], ["", "CL:0000236"], ["", ""]])
    tree, graph = Tree.of(paths, ("k", "t"), ids), load_graph(CL_SLIM)
    names = ["natural killer cell", "CL:0000236", "B cells", "CD19+ B", "T cell", "my cells"]
    truth = Truth.of("kind", np.arange(6), names, tree, graph)
    assert truth.names == ["NK", "B cell", "B cell", "CD19+ B", "T cell", "my cells"]
    labels = [["Immune"] * 6, ["NK", "B cell", "NK", "CD19+ B", "NK", "NK"]]
    text = report(answered("kt", labels, ["t"] * 6, ["ok"] * 6), truth, tree)
    assert text.startswith(
        "4 cells whose kind the reference has; 2 of other types, 0.0% of them flagged as novel; 1 of"
    )
    assert "1 of the names are none of the Cell Ontology's, such as 'my cells': rename them" in text
    assert "| t     |               0.750 |" in text
    assert Truth.of("kind", np.arange(6), names, tree, None).names == names


def test_what_a_report_calls_its_columns():
    """One cell answered wrongly from the second level on, and at the finest not at all."""
    cells = answered("kmt", [["I"], ["v"], ["y"]], ["m"], ["ok"])
    tree = Tree.of([("I", "u", "x"), ("I", "v", "y")], ("k", "m", "t"))
    text = report(cells, Truth("kind", np.array([0]), ["x"]), tree)
    assert "| Level | Accuracy, all cells | Answered | Accuracy, answered |" in text
    assert "| k     |               1.000 |    1.000 |              1.000 |" in text
    assert "| t     |               0.000 |    0.000 |                  - |" in text
    assert "| Type              | Precision | Recall |    F1 | Cells |" in text
    assert "| Confusion (true -> answered) | Cells | Share of the type |" in text
    assert "| x -> y                       |     1 |             1.000 |" in text


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_confusions_are_drawn_in_the_order_of_the_tree(tmp_path: Path, suffix: str):
    """Two of x's three cells are taken for y, which lies beside it though z comes first; a name is no formula."""
    labels = [["S", "S", "S", "I", None], ["x$_1$", "y", "y", "z", None]]
    cells = answered("kt", labels, ["t"] * 4 + ["none"], ["ok"] * 4 + ["invalid"])
    codes, names = np.array([0, 0, 0, 1, 2]), ["x$_1$", "z", "strange"]
    tree = Tree.of([("I", "z"), ("S", "y"), ("S", "x$_1$"), ("S", "absent")], ("k", "t"))
    with (
        patch.object(Axes, "imshow", autospec=True, side_effect=Axes.imshow) as imshow,
        patch.object(Axes, "set_yticks", autospec=True, side_effect=Axes.set_yticks) as yticks,
    ):
        draw_confusions(tmp_path / f"a.{suffix}", cells, Truth("kind", codes, names), tree)
    assert yticks.call_args.args[2] == ["z", "x$_1$", "y"]
    assert np.allclose(imshow.call_args.args[1], np.array([[1, 0, 0], [0, 1 / 3, 2 / 3], [0, 0, 0]]))
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert (tmp_path / f"a.{suffix}").read_bytes().startswith(start)
