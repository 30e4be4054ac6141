"""What a label or a study is called: text that people typed, and the many ways to write that there is none."""

from collections.abc import Iterable
from typing import overload

MISSING = {"", "-", "?", "n/a", "na", "nan", "nat", "none", "null", "unknown", "unassigned", "<na>", "#n/a"}


def clean(name: str) -> str:
    """Without blanks at its ends; blanks within it, no-break spaces and tabs among them, become one space each."""
    return " ".join(name.replace("\ufeff", "").replace("\u200b", "").split())


@overload
def several(names: None) -> None: ...
@overload
def several(names: str | Iterable[str]) -> list[str]: ...
def several(names: str | Iterable[str] | None) -> list[str] | None:
    """Names, or one, or None for those that are not given: in Python a text is a sequence of its letters."""
    return [names] if isinstance(names, str) else None if names is None else list(names)


def is_missing(name: str | float | None) -> bool:
    """Does a label or study say that there is none? None, NaN, "", "nan", "NA", "unknown" and such, in any case."""
    return not isinstance(name, str) or clean(name).lower() in MISSING


# Terms above all types, as CELLxGENE writes them for cells of no known type; by name and by id.
NO_TYPES = {"cell", "native cell", "eukaryotic cell", "animal cell"}
NO_TYPES |= {"cl:0000000", "cl:0000003", "cl:0000255", "cl:0000548"}


def is_no_type(name: str) -> bool:
    """Whether a label of a user's cells names no type at all. In a SCimilarity release, two of these are types."""
    return name.casefold().replace("_", ":") in NO_TYPES
