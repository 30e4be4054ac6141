"""The labelled cells of an .h5ad, for ingest.py. No torch here: it takes seconds to load."""

import csv
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fractal.atlas import usable
from fractal.cli import InputError, needs
from fractal.vectors import CHUNK, Source, from_obsm, open_h5ad, refuse


def obs_codes(file: Any, path: Path, key: str) -> tuple[np.ndarray, list[str]]:
    """A column of obs -> its (n,) codes, -1 where it is empty, and their names, sorted."""
    if key not in file["obs"]:
        raise InputError(f"{path}: obs has no column '{key}'; it has {', '.join(file['obs'])}")
    values = needs("anndata", "h5ad").io.read_elem(file["obs"][key])
    categorical = needs("pandas", "h5ad").Categorical(values)
    names = [str(name) for name in categorical.categories]
    used = np.unique(categorical.codes[categorical.codes >= 0])
    order = sorted(used.tolist(), key=lambda code: names[code])
    position = np.full(len(names) + 1, -1)
    position[order] = np.arange(len(order))  # the last entry is the one of code -1
    return position[categorical.codes], [names[code] for code in order]


@dataclass(frozen=True)
class LabelledCells:
    """The labelled cells of an .h5ad, with the attributes of fractal.scimilarity.Release that ingest.py uses."""

    types: list[str]
    type_codes: np.ndarray  # (n,) int64, into `types`
    studies: list[str]
    study_codes: np.ndarray | None  # (n,) int64
    keep: np.ndarray  # (cells of the file,) bool: which have a label
    vectors: Source

    @property
    def dim(self) -> int:
        return self.vectors.dim

    def __len__(self) -> int:
        return len(self.type_codes)

    def chunks(self, size: int = CHUNK, scratch: Path | None = None) -> Generator[tuple[slice, np.ndarray], None, None]:
        """Yield (rows, vectors (m, dim) float32); `scratch` is not needed here.

        Raises InputError for NaN, inf or zero vectors.
        """
        done = seen = 0
        for _, chunk in self.vectors.chunks(size):
            keep = self.keep[seen : seen + len(chunk)]
            refuse(keep & ~usable(chunk), seen, self.vectors.path)
            if keep.any():
                yield slice(done, done + keep.sum()), chunk[keep]
            done, seen = done + keep.sum(), seen + len(chunk)


@contextmanager
def open_labelled(
    path: Path, obsm: str, label_key: str, study_key: str | None, label_map: Path | None
) -> Iterator[LabelledCells]:
    """Open the cells of an .h5ad that have a label; `label_map` is a TSV of own name and CL name, see `read_map`."""
    with open_h5ad(path) as file:
        vectors = from_obsm(file, path, obsm)
        codes, names = obs_codes(file, path, label_key)
        translation = read_map(label_map) if label_map else {}
        if unknown := sorted(set(translation) - set(names)):
            raise InputError(f"{label_map}: these names are not in obs '{label_key}' of {path}: {'; '.join(unknown)}")
        translated = [translation.get(name, name) for name in names]
        types = sorted(set(translated) - {""})
        position = {name: code for code, name in enumerate(types)} | {"": -1}
        type_codes = np.array([*(position[name] for name in translated), -1])[codes]
        keep = type_codes >= 0
        if not keep.any():
            raise InputError(f"{path}: no cell has a label in obs '{label_key}'")
        study_codes, studies = None, list[str]()
        if study_key is not None:
            study_codes, studies = obs_codes(file, path, study_key)
            study_codes = study_codes[keep]
            if (study_codes < 0).any():
                raise InputError(f"{path}: {(study_codes < 0).sum():,} labelled cells have no '{study_key}'")
        yield LabelledCells(types, type_codes[keep], studies, study_codes, keep, vectors)


def read_map(path: Path) -> dict[str, str]:
    """A TSV without header, own name and CL name on each line; an empty CL name leaves these cells out."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return {own: name for own, name in csv.reader(file, delimiter="\t")}  # noqa: C416 (checks the width)
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected two columns, own name<TAB>CL name, on every line ({error})") from error
