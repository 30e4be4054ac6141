"""Labels that other studies divide: found by ontology, studies and vectors; a note says whose cells are left out."""

import anndata
import networkx as nx
import numpy as np
import pandas as pd
import pytest

import fractal
from fractal.annotate.vague_labels import without_vague
from fractal.base.errors import InputError
from fractal.data.cells import Cells
from fractal.data.ingestion import Plan, place_cells
from fractal.hierarchy.ontology import CL_SLIM, load_graph

CD4, CD8 = "CD4-positive, alpha-beta T cell", "CD8-positive, alpha-beta T cell"
TYPES = [CD4, CD8, "B cell", "plasmablast", "fibroblast"]
COARSE = {CD4: "T cell", CD8: "T cell"}


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    return load_graph(CL_SLIM)


def cells(coarse: set[str], moved: float = 0.0, names: dict[str, str] = COARSE) -> anndata.AnnData:
    """800 cells of 5 types and 4 studies; those of the studies `coarse` carry `names`, and lie `moved` away."""
    rng = np.random.default_rng(0)
    kind, study = rng.integers(0, 5, 800), np.array(list("abcd"))[rng.integers(0, 4, 800)]
    labels = np.array(
        [names.get(TYPES[k], TYPES[k]) if s in coarse else TYPES[k] for k, s in zip(kind, study, strict=True)]
    )
    x = 4 * np.eye(12)[kind] + rng.normal(size=(800, 12)) + 0.3 * np.eye(12)[6 + np.searchsorted(list("abcd"), study)]
    x[np.isin(labels, list(names.values()))] += moved * np.eye(12)[11]
    obs = pd.DataFrame({"label": labels, "study": study}, index=[f"c{i}" for i in range(800)])
    return anndata.AnnData(obs=obs, obsm={"X": x.astype(np.float32)})


def planned(adata: anndata.AnnData, graph: nx.DiGraph, study: str | None = "study", **options) -> tuple[Plan, Plan]:
    """The plan before and after."""
    with Cells.open(adata, "X") as opened:
        before = place_cells(opened.labels("label", study), graph, "adata")
        return before, without_vague(before, opened, graph, **options)


def left_out(adata: anndata.AnnData, graph: nx.DiGraph, **options) -> set[str]:
    before, after = planned(adata, graph, **options)
    gone = after.classes < 0
    assert (after.classes[~gone] == before.classes[~gone]).all()
    return {before.hierarchy.classes[code].subtype for code in before.classes[gone]}


def test_a_label_that_other_studies_divide_is_left_out_and_named(graph: nx.DiGraph):
    adata = cells({"a", "b"})
    assert left_out(adata, graph) == {"T cell"}
    note = planned(adata, graph)[1].hierarchy.notes[-1]
    number = (adata.obs["label"] == "T cell").sum()
    start = f"{number} of 800 cells left out: 'T cell' means less than {CD4}, {CD8}, which other studies"
    assert note.startswith(start)


def test_what_is_no_vague_label_stays(graph: nx.DiGraph):
    assert left_out(cells(set()), graph) == set()  # B cell beside plasmablast: one label below
    assert left_out(cells({"a", "b"}, moved=6.0), graph) == set()  # T cells unlike CD4 and CD8
    assert left_out(cells({"a", "b"}), graph, study=None) == set()  # nothing says that others divide it
    assert left_out(cells({"a", "b"}, names={CD4: "T cell"}), graph) == set()  # CD8 stands beside it in its studies
    assert left_out(cells({"a", "b", "c"}), graph) == set()  # one study below: how far another may lie is not known


def test_a_person_overrules(graph: nx.DiGraph):
    assert left_out(cells({"a", "b"}), graph, not_vague=["T cell"]) == set()
    assert left_out(cells({"a", "b"}, moved=6.0), graph, vague=["CL:0000084"]) == {"T cell"}
    with pytest.raises(InputError, match="'natural killer cell' is no label of these cells"):
        left_out(cells({"a"}), graph, vague=["natural killer cell"])
    with pytest.raises(InputError, match="'B cell' has not two labels of these cells below it"):
        left_out(cells({"a"}), graph, vague=["B cell"])


@pytest.mark.slow
def test_fit_then_answers_subtypes(graph: nx.DiGraph, capsys):
    adata = cells({"a", "b"})
    ref = fractal.fit(adata, "label", "X", "study", epochs=1, device="cpu")
    assert "cells left out: 'T cell' means less than" in capsys.readouterr().out
    assert not any(path[-1] == "T cell" for path in ref.annotator.tree.paths)
    kept = fractal.fit(adata, "label", "X", "study", not_vague=["T cell"], epochs=1, device="cpu")
    assert any(path[-1] == "T cell" for path in kept.annotator.tree.paths)
