"""The columns of an atlas are numbered from coarse to fine."""

from fractal.hierarchy.levels import LEVEL_COLUMNS, column_names


def test_column_names():
    assert column_names(("class", "subclass")) == ("level1_class", "level2_subclass")
    assert LEVEL_COLUMNS == ("level1_system", "level2_lineage", "level3_type", "level4_subtype")
