"""The levels of a hierarchy, coarse to fine: the names of the default ones, how many there may be, their columns."""

from collections.abc import Sequence

LEVELS = ("system", "lineage", "type", "subtype")  # of the Cell Ontology's tree
MIN_LEVELS, MAX_LEVELS = 2, 6


def column_names(levels: Sequence[str]) -> tuple[str, ...]:
    """The columns of an atlas: ("system", "lineage", ...) -> ("level1_system", "level2_lineage", ...)."""
    return tuple(f"level{k}_{name}" for k, name in enumerate(levels, 1))


LEVEL_COLUMNS = column_names(LEVELS)
