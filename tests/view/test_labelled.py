"""Labelled cells to score a reference with."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from fractal.base.errors import InputError
from fractal.data.atlas import Atlas
from fractal.hierarchy.ontology import build_hierarchy
from fractal.model.split import Split
from fractal.reference import Reference
from fractal.view.labelled import atlas_cells, known_paths
from tests.view.conftest import GRAPH, made


def test_the_file_of_training_counts_with_its_test_cells_only(bundle: Reference, stratified: Path):
    atlas = Atlas.open(stratified)
    split = Split.draw(atlas)
    own = replace(bundle, facts={**bundle.facts, "split": asdict(split)})
    tree = own.annotator.tree
    cells, tests = atlas_cells(stratified, tree, own.facts, 5_000, 0), split.rows(atlas)[2]
    assert np.array_equal(cells.vectors, atlas.read(tests).vectors)
    assert cells.title == f"{len(tests)} test cells of {stratified.name}"
    assert cells.groups is None  # cells were held out, not studies
    other = atlas_cells(stratified, tree, bundle.facts, 5_000, 0)  # all of it
    assert len(other.vectors) == 600
    assert other.groups is not None
    with pytest.raises(InputError, match="its levels are"):
        atlas_cells(stratified, replace(tree, levels=("a", "b")), bundle.facts, 5_000, 0)


def test_a_name_has_the_path_of_the_reference_or_else_of_the_ontology():
    """By name, by CL id, by the published rules; nowhere else."""
    rows = build_hierarchy(["fibroblast", "B cell"], GRAPH)
    tree = made([row.levels for row in rows], ("system", "lineage", "type", "subtype"), test=0).annotator.tree
    fibroblast, b_cell = (next(path for path in tree.paths if path[-1] == name) for name in ("fibroblast", "B cell"))
    [by_name, by_id, elsewhere, nowhere] = known_paths(tree, ["fibroblast", "CL:0000236", "neuron", "no cell"], GRAPH)
    assert (by_name, by_id, nowhere) == (fibroblast, b_cell, None)
    assert elsewhere == build_hierarchy(["neuron"], GRAPH)[0].levels
