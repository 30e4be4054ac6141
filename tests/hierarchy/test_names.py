"""What counts as a name, and as none."""

import pytest

from fractal.hierarchy.names import clean, is_missing, is_no_type


@pytest.mark.parametrize(
    "name", ["", " ", "\u00a0", "nan", "NaN", "NA", "n/a", "<NA>", "None", "Unknown ", "null", None, float("nan")]
)
def test_ways_to_say_none(name: str | float | None):
    assert is_missing(name)


@pytest.mark.parametrize("name", ["B cell", "nano cell", "unknown T cell", "0", "NK"])
def test_names(name: str):
    assert not is_missing(name)


def test_blanks_are_not_part_of_a_name():
    assert clean(" B\u00a0 cell\t") == clean("B cell") == "B cell"
    assert clean("\ufeffB cell\u200b") == "B cell"


def test_labels_that_are_no_types():
    assert all(map(is_no_type, ["cell", "Native cell", "eukaryotic cell", "CL:0000000", "CL_0000003", "cl:0000255"]))
    assert not any(map(is_no_type, ["T cell", "CL:0000236", "neural cell"]))
