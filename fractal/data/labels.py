"""The labels of cells: columns of obs -> types, studies and the user's tree, by one rule for every source."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.base.errors import InputError
from fractal.base.storage import Location, fetch
from fractal.hierarchy.names import clean, is_missing, is_no_type
from fractal.hierarchy.ontology import CellType, tree_of_columns

Codes = tuple[np.ndarray, list[str]]  # (n,) int64, -1 where there is none; and the names


@dataclass(frozen=True)
class Labels:
    """The types and studies of n cells. Codes are -1 for the cells that are left out; `notes` say how many and why."""

    names: list[str]  # the names of the types, cleaned and mapped; "" for one that is mapped to nothing
    codes: np.ndarray  # (n,) int, into `names`
    studies: list[str] = field(default_factory=list)
    study_codes: np.ndarray | None = None  # (n,) int64; None where no study column was named
    tree: dict[str, CellType] | None = None  # the user's hierarchy, from columns: name -> row
    levels: tuple[str, ...] | None = None  # its levels
    notes: list[str] = field(default_factory=list)

    def mapped(self, label_map: Mapping[str, str], where: Any) -> "Labels":
        """The same cells under other names; "" leaves them out. Raises InputError where the map names no label."""
        targets: dict[str, str] = {}
        for key, value in label_map.items():
            name, target = clean(str(key)), "" if is_missing(value) else clean(value)
            if targets.setdefault(name, target) != target:
                raise InputError(f"label map: '{name}' has two targets, '{targets[name]}' and '{target}'; keep one")
        if not set(targets) & set(self.names):
            there = ", ".join(self.names[:20]) + (", ..." if len(self.names) > 20 else "")
            raise InputError(f"{where}: none of the label map's names is among the labels; these are {there}")
        labels = self.renamed(targets, "their label is mapped to nothing")
        if unused := sorted(set(targets) - set(self.names)):
            labels.notes.append(f"warning: the label map has names that no cell has: {'; '.join(unused)}")
        return labels

    def renamed(self, targets: Mapping[str, str], why: str) -> "Labels":
        """The same cells under other names; those whose name becomes "" are left out, and counted."""
        names = [targets.get(name, name) for name in self.names]
        types = sorted(set(names) - {""})
        codes, notes = renumbered(self.codes, names, types), list(self.notes)
        if lost := int((codes < 0).sum() - (self.codes < 0).sum()):
            notes.append(f"{lost:,} of {len(codes):,} cells left out: {why}")
        return replace(self, names=types, codes=codes, notes=notes)


def dictionary_of(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """A column as codes, null where a value is missing, and its values in one array."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    return column.unify_dictionaries().combine_chunks()


def coded(column: pa.ChunkedArray) -> Codes:
    """A column -> its codes, -1 where a value is missing or says so, and their names, cleaned and sorted."""
    array = dictionary_of(column)
    codes, values = array.indices.fill_null(-1).to_numpy(zero_copy_only=False), array.dictionary
    # A float32 as numpy shows it: .1, not .10000000149011612.
    texts = values.to_numpy() if pa.types.is_floating(values.type) else values.to_pylist()
    raw = ["" if text is None else clean(str(text)) for text in texts]
    used = np.flatnonzero(np.bincount(codes[codes >= 0], minlength=len(raw)))
    names = sorted({raw[code] for code in used if not is_missing(raw[code])})
    return renumbered(codes, raw, names), names


def renumbered(codes: np.ndarray, old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """(n,) codes into `old` -> (n,) int64 codes into `new`, -1 for a name that is not in it and for -1."""
    position = {name: code for code, name in enumerate(new)}
    return np.array([*(position.get(name, -1) for name in old), -1])[codes]


def read_labels(
    cells: Any,
    label_key: str,
    study_key: str | None = None,
    label_map: Mapping[str, str] | None = None,
    levels: Sequence[str] = (),
) -> Labels:
    """The types and studies of all cells, from columns: the method `labels` of `Cells`.

    Left out and counted are cells without a label or a study ("", "nan", "unknown", ...), and those whose label
    is no type, or mapped to nothing.
    label_key, study_key: columns of the types and of the studies or donors; label_map: name -> CL name, "" leaves these
    cells out; levels: 2 to 6 columns from coarse to fine, the user's tree in place of `label_key`.
    Raises InputError if no cell is left, and for a label map that names no label.
    """
    tree, own_levels, notes = None, None, list[str]()
    if levels:
        paths, codes = label_paths([cells.codes(key) for key in levels])
        own_levels, rows, notes = tree_of_columns(levels, paths)
        names = [rows[path].subtype if path[0] else "" for path in paths]
        tree = {row.subtype: row for path, row in rows.items() if path[0]}
    else:
        codes, names = cells.codes(label_key)
    lost = {f"without a label in obs '{levels[0] if levels else label_key}'": int((codes < 0).sum())}
    studies, study_codes = list[str](), None
    if study_key is not None:
        study_codes, studies = cells.codes(study_key)
        lost[f"without a study in obs '{study_key}'"] = int(((study_codes < 0) & (codes >= 0)).sum())
        codes = np.where(study_codes < 0, -1, codes)
    if reasons := "; ".join(f"{n:,} {reason}" for reason, n in lost.items() if n):
        notes.insert(0, f"{int((codes < 0).sum()):,} of {len(codes):,} cells left out: {reasons}")
    labels = Labels(names, codes, studies, study_codes, tree, own_levels, notes)
    labels = labels if label_map is None else labels.mapped(label_map, f"{cells.path}: obs '{label_key}'")
    if not levels:
        no_types = [name for name in labels.names if is_no_type(name)]  # such as "cell" or "native cell"
        labels = labels.renamed(dict.fromkeys(no_types, ""), f"{', '.join(no_types)} is no type")
    keep = labels.codes >= 0
    if not keep.any():
        raise InputError(f"{cells.path}: no cell is left: {'; '.join(labels.notes)}")
    codes, names = those_used(labels.codes, labels.names, keep)
    if study_codes is not None:
        study_codes, studies = those_used(study_codes, studies, keep)
    return replace(labels, names=names, codes=codes, studies=studies, study_codes=study_codes)


def those_used(codes: np.ndarray, names: list[str], keep: np.ndarray) -> Codes:
    """The same codes with only the names that the kept cells (n,) bool have, sorted; -1 for a cell with another."""
    used = sorted({names[code] for code in np.unique(codes[keep])} - {""})
    return renumbered(codes, names, used), used


def label_paths(columns: Sequence[Codes]) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Columns -> the distinct tuples of labels, "" where one is missing, and each cell's, -1 without the first."""
    distinct, codes = np.unique(np.stack([codes for codes, _ in columns], axis=1), axis=0, return_inverse=True)
    named = [[*names, ""] for _, names in columns]
    paths = [tuple(names[code] for code, names in zip(row, named, strict=True)) for row in distinct.tolist()]
    none = np.array([not path[0] for path in paths])
    return paths, np.where(none[codes.reshape(-1)], -1, codes.reshape(-1))


def read_map(path: Location) -> dict[str, str]:
    """A label map -> name -> CL name; an empty CL name leaves these cells out.

    A TSV, a name and its CL name on each line, in quotation marks or not; more columns, a first line that begins with #
    and blank lines are passed over. Raises InputError, which names the line, for any other, and for a name with two
    different targets.
    """
    targets: dict[str, str] = {}
    expected = f"{path}: expected two columns of UTF-8 text, name<TAB>CL name"
    for number, line in enumerate(fetch(path).read_bytes().splitlines(), 1):
        try:  # by itself: a quotation mark that is not closed must not swallow the lines below
            fields = next(csv.reader([line.decode("utf-8-sig")], delimiter="\t", strict=True), [])
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{expected}; line {number} is not ({error})") from error
        cells = [clean(cell) for cell in fields]
        if not any(cells) or (number == 1 and cells[0].startswith("#")):
            continue
        if len(cells) < 2 or not cells[0]:
            raise InputError(f"{expected}; line {number} is '{'<TAB>'.join(cells):.200}'")
        name, target = cells[:2]
        if targets.setdefault(name, target) != target:
            raise InputError(
                f"{path}: '{name}' has two targets, '{targets[name]}' and '{target}' in line {number}; keep one"
            )
    return targets
