"""Labels of cells: what is left out, and what is said of it."""

import numpy as np

from fractal.data.labels import read_labels

NAMES = ["B cell", "T cell", "cell", "native cell"]


def column(_: str) -> tuple[np.ndarray, list[str]]:
    return np.array([0, 1, 2, 3, 3, -1]), NAMES


def test_labels_that_are_no_types_are_left_out_and_counted():
    labels = read_labels(column, "cells.h5ad", "cell_type")
    assert labels.names == ["B cell", "T cell"]
    assert labels.codes.tolist() == [0, 1, -1, -1, -1, -1]
    assert "3 of 6 cells left out: cell, native cell is no type" in labels.notes[-1]


def test_a_label_map_may_give_them_a_type():
    labels = read_labels(column, "cells.h5ad", "cell_type", label_map={"cell": "neuron"})
    assert labels.names == ["B cell", "T cell", "neuron"]
    assert labels.codes.tolist() == [0, 1, 2, -1, -1, -1]


def test_levels_of_the_user_may_be_called_so():
    tree = {"group": (np.array([0, 0, 1]), ["x", "y"]), "fine": (np.array([0, 1, 2]), ["cell", "other", "third"])}
    assert read_labels(tree.__getitem__, "cells.h5ad", "", levels=["group", "fine"]).names == ["cell", "other", "third"]
