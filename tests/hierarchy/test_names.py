"""What counts as a name, and as none."""

import pytest

from fractal.hierarchy.names import clean, is_missing


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
