"""Everything about .h5ad files, and AnnData in memory: vectors and labels that are read, columns that are written.

Everything streams: one chunk of rows is in memory, whatever the number of cells. No torch here: it takes seconds to
load. Written back are

    obsm["X_fractal"]          (n, dims) float32, the full vector, of length 1; NaN where the input is not usable
    obsm["X_fractal_blocks"]   (n, dims) float32, recipe `published` only, whose prefixes are no cuts of the full vector
    uns["fractal"]             recipe, levels, block_width, prefix_ends, adapter_sha256

and `truncate` cuts a prefix out of these as it should be cut.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fractal.base.cli import InputError, needs, reason
from fractal.base.files import FULL, atomic_write
from fractal.base.storage import Place, download, fetch, open_random, zarr_store
from fractal.data.parquet import usable
from fractal.data.source import CELL_ID, CHUNK, Source, check_format, from_matrix, refuse
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.names import clean, is_missing
from fractal.hierarchy.ontology import CellType, tree_of_columns

MAX_X = 4_096  # numbers per cell: no embedding is wider, and expression has more genes than this


# --- opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def reading_h5ad(path: Place) -> Iterator[None]:
    """Turn what HDF5 and anndata say of a file that cannot be read into one line that names it and the way out."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # anndata wraps whatever h5py raises in errors of its own
        said = " ".join(map(str, (error, error.__cause__, error.__context__)))
        if "not registered" in said or "plugin" in said:  # not: "filter returned failure", of damaged data
            raise InputError(
                f"{path}: compressed with an HDF5 plugin that is not installed here ({reason(error)}); install "
                "hdf5plugin and name its folder in HDF5_PLUGIN_PATH, or write the file again with compression='gzip'"
            ) from error
        if "unable to lock" in said:
            raise InputError(f"{path}: locked, another program has it open for writing; close it there") from error
        raise InputError(f"{path}: not an .h5ad file or .zarr folder, or damaged ({reason(error)})") from error


@contextmanager
def open_h5ad(path: Place, mode: str = "r") -> Iterator[Any]:
    """The h5py.File of an .h5ad, or the zarr.Group of a .zarr, which has the same methods.

    Raises InputError for another format, damage, a lock, and an AnnData before 0.7.
    """
    h5py = needs("h5py", "h5ad")
    check_format(path, "Read are .h5ad and .zarr")
    is_zarr = path.suffix.casefold() != ".h5ad" and path.is_dir()
    if not is_zarr and not path.is_file():
        raise InputError(f"{path}: no such file")
    zarr = needs("zarr", "zarr") if is_zarr else None
    with ExitStack() as stack:
        with reading_h5ad(path):
            if zarr:
                file = zarr.open_group(zarr_store(path), mode=mode)
            else:
                file = stack.enter_context(h5py.File(open_random(path), mode))
            obs = file.get("obs")
            if not hasattr(obs, "keys") or "column-order" not in obs.attrs:
                raise InputError(
                    f"{path}: not an .h5ad file, or written by an AnnData before 0.7; "
                    "write it again with anndata.read_h5ad(...).write_h5ad(...)"
                )
        yield file


# --- vectors ---------------------------------------------------------------------------------------------------------

HOW_TO_EMBED = (
    "this tool takes one vector per cell: make one first, such as SCimilarity's, scVI's, or principal components "
    "(scanpy: normalize_total, log1p, pca, which writes obsm X_pca), and name it with --obsm"
)


def check_embedding(array: Any, where: str) -> None:
    """Raise InputError unless `array`, of obsm or X, can be one embedding per cell: dense floats, not too wide."""
    if not hasattr(array, "shape") or hasattr(array, "tocsr") or hasattr(array, "columns"):
        if where.endswith(" X"):
            raise InputError(f"{where} is a sparse matrix, so gene expression; {HOW_TO_EMBED}")
        raise InputError(f"{where} is not a dense array; write it again with .to_numpy() or .toarray()")
    wide = len(array.shape) == 2 and array.shape[1] > MAX_X
    if where.endswith(" X") and (wide or not np.issubdtype(array.dtype, np.floating)):
        raise InputError(f"{where} holds {array.dtype} of shape {array.shape}, so gene expression; {HOW_TO_EMBED}")


def find_embedding(obsm: Mapping[str, Any], x: Any, path: Place | str, key: str) -> Any:
    """`obsm[key]`, or X for the key "X". Raises InputError that says what there is instead, and the way out."""
    if key == "X" and "X" not in obsm:
        if x is None:
            raise InputError(f"{path}: has no X; its obsm has {', '.join(obsm) or 'nothing'}")
        check_embedding(x, f"{path}: X")
        return x
    if key not in obsm:
        there = ", ".join(obsm)
        way = f"it has {there}: name one with --obsm" if there else f"it has none; {HOW_TO_EMBED}"
        try:
            check_embedding(x, f"{path}: X")
            if not there and x is not None:
                way = f"it has none, but X is {x.shape[1]} numbers per cell: if that is the embedding, say --obsm X"
        except InputError:
            pass
        raise InputError(f"{path}: has no obsm '{key}'; {way}")
    check_embedding(obsm[key], f"{path}: obsm '{key}'")
    return obsm[key]


def from_obsm(file: Any, path: Place, key: str) -> Source:
    """An array of the obsm of an open .h5ad, or X, with the cells' names."""
    with reading_h5ad(path):
        array = find_embedding(file.get("obsm", {}), file.get("X"), path, key)

    def rows(some: slice) -> np.ndarray:
        with reading_h5ad(path):
            return array[some]

    return from_matrix(path, array.shape, array.dtype, rows, obs_names(file, path))


@contextmanager
def read_h5ad(path: Place, obsm: str) -> Iterator[Source]:
    with open_h5ad(path) as file:
        yield from_obsm(file, path, obsm)


def obs_names(file: Any, path: Place) -> Callable[[slice], np.ndarray]:
    """-> a function rows -> the names of these cells, (m,) str."""
    h5py = needs("h5py", "h5ad")
    with reading_h5ad(path):
        obs = file["obs"]
        index = obs.get(obs.attrs.get("_index", "_index"))
        plain = isinstance(index, h5py.Dataset) and h5py.check_string_dtype(index.dtype)
        # Else numbers, or a text array of pandas.
        names = index.asstr() if plain else needs("anndata", "h5ad").io.read_elem(index)

    def rows(some: slice) -> np.ndarray:
        with reading_h5ad(path):
            return np.asarray(names[some], object).astype(str)

    return rows


# --- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The types and studies of n cells. Codes are -1 for the cells that are left out; `notes` say how many and why."""

    names: list[str]  # the names of the types, cleaned and mapped, sorted
    codes: np.ndarray  # (n,) int64, into `names`
    studies: list[str]
    study_codes: np.ndarray | None  # (n,) int64; None where no study column was named
    tree: dict[str, CellType] | None  # the user's own hierarchy, from his columns: name -> row
    levels: tuple[str, ...] | None  # its levels
    notes: list[str]

    @property
    def keep(self) -> np.ndarray:
        """(n,) bool: the cells that are taken."""
        return self.codes >= 0


@dataclass(frozen=True)
class LabelledCells:
    """The cells of an .h5ad that are taken, with the attributes of fractal.data.scimilarity.Release that ingest.py
    uses."""

    labels: Labels
    vectors: Source

    @property
    def types(self) -> list[str]:
        return self.labels.names

    @property
    def type_codes(self) -> np.ndarray:
        return self.labels.codes[self.labels.keep]

    @property
    def studies(self) -> list[str]:
        return self.labels.studies

    @property
    def study_codes(self) -> np.ndarray | None:
        codes = self.labels.study_codes
        return None if codes is None else codes[self.labels.keep]

    @property
    def dim(self) -> int:
        return self.vectors.dim

    def __len__(self) -> int:
        return int(self.labels.keep.sum())

    def chunks(self, size: int = CHUNK) -> Generator[tuple[slice, np.ndarray, np.ndarray], None, None]:
        """Yield (rows, vectors (m, dim) float32, cell names (m,)). Raises InputError for NaN, inf or zero vectors."""
        done = seen = 0
        for columns, chunk in self.vectors.chunks(size):
            keep = self.labels.keep[seen : seen + len(chunk)]
            refuse(keep & ~usable(chunk), seen, self.vectors.path)
            if keep.any():
                ids = columns[CELL_ID].to_numpy().astype(str)[keep]
                yield slice(done, done + keep.sum()), chunk[keep], ids
            done, seen = done + keep.sum(), seen + len(chunk)


@contextmanager
def open_labelled(
    path: Place,
    obsm: str,
    label_key: str,
    study_key: str | None = None,
    label_map: Mapping[str, str] | None = None,
    levels: Sequence[str] = (),
) -> Iterator[LabelledCells]:
    """Open the cells of an .h5ad that have a label; see `read_labels`."""
    with open_h5ad(path) as file:
        vectors = from_obsm(file, path, obsm)

        def column(key: str) -> Any:
            values = obs_column(file, path, key)
            if np.ndim(values) and len(values) != vectors.num_rows:
                raise InputError(
                    f"{path}: damaged, {vectors.num_rows:,} vectors and {len(values):,} values in obs '{key}'"
                )
            return values

        yield LabelledCells(read_labels(column, path, label_key, study_key, label_map, levels), vectors)


def obs_column(file: Any, path: Place, key: str) -> Any:
    """A column of the obs of an open .h5ad as AnnData reads it. Raises InputError for one that is not there."""
    io = needs("anndata", "h5ad").io
    with reading_h5ad(path):
        obs = file["obs"]
        columns = [str(name) for name in obs.attrs["column-order"] if name in obs]
        if key not in columns:
            raise InputError(f"{path}: obs has no column '{key}'; it has {', '.join(columns)}")
        # AnnData 0.7 keeps the names of codes apart, in obs/__categories: its own reader puts them together.
        return io.read_elem(obs)[key] if "categories" in obs[key].attrs else io.read_elem(obs[key])


def read_labels(
    column: Callable[[str], Any],
    where: Place | str,
    label_key: str,
    study_key: str | None = None,
    label_map: Mapping[str, str] | None = None,
    levels: Sequence[str] = (),
) -> Labels:
    """The labels of all cells, for a file and for an AnnData in memory alike; `column(key)` reads one of obs.

    Left out and counted are cells without a label or a study ("", "nan", "unknown", ...), and those whose label
    `label_map`, own name -> CL name, maps to nothing. `levels`: 2 to 6 columns from coarse to fine, the user's own tree
    in place of `label_key`. Raises InputError if no cell is left.
    """
    tree, own_levels, notes = None, None, list[str]()
    if levels:
        read = [obs_codes(column(key), where, key) for key in levels]
        paths, codes = _paths_of(read)
        own_levels, rows, notes = tree_of_columns(levels, paths)
        names = [rows[path].subtype if path[0] else "" for path in paths]
        tree = {row.subtype: row for path, row in rows.items() if path[0]}
        why = f"without a label in obs '{levels[0]}'"
    else:
        codes, names = obs_codes(column(label_key), where, label_key)
        why = f"without a label in obs '{label_key}'"
    lost = Counter({why: int((codes < 0).sum())})
    if label_map is not None:
        if unused := sorted(set(label_map) - set(names)):
            notes.append(f"the label map has names that no cell has: {'; '.join(unused)}")
        if not set(label_map) & set(names):
            raise InputError(f"{where}: none of the label map's names is in obs '{label_key}'; it has {_some(names)}")
        dropped = np.array([label_map.get(name) == "" for name in names] + [False])
        lost["whose label is mapped to nothing"] = int(dropped[codes].sum())
        names = [label_map.get(name, name) for name in names]
    types = sorted(set(names) - {""})
    position = {name: code for code, name in enumerate(types)} | {"": -1}
    codes = np.array([*(position[name] for name in names), -1])[codes]
    studies, study_codes = list[str](), None
    if study_key is not None:
        study_codes, studies = obs_codes(column(study_key), where, study_key)
        lost[f"without a study in obs '{study_key}'"] = int(((study_codes < 0) & (codes >= 0)).sum())
        codes = np.where(study_codes < 0, -1, codes)
        used = np.unique(study_codes[codes >= 0])
        studies, renumber = [studies[code] for code in used], np.full(len(studies) + 1, -1)
        renumber[used] = np.arange(len(used))
        study_codes = renumber[study_codes]
    reasons = "; ".join(f"{n:,} {reason}" for reason, n in lost.items() if n)
    if not (codes >= 0).any():
        raise InputError(f"{where}: no cell is left: {reasons}")
    used = np.unique(codes[codes >= 0])
    renumber = np.full(len(types) + 1, -1)
    renumber[used] = np.arange(len(used))
    if reasons:
        notes.insert(0, f"{int((codes < 0).sum()):,} of {len(codes):,} cells left out: {reasons}")
    return Labels([types[c] for c in used], renumber[codes], studies, study_codes, tree, own_levels, notes)


def _some(names: Sequence[str], count: int = 20) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _paths_of(read: Sequence[tuple[np.ndarray, list[str]]]) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Columns (codes, names) -> the distinct tuples of labels, "" where one is missing, and each cell's, -1 without."""
    stacked = np.stack([codes for codes, _ in read], axis=1)
    distinct, codes = np.unique(stacked, axis=0, return_inverse=True)
    paths = [
        tuple(names[c] if c >= 0 else "" for c, (_, names) in zip(row, read, strict=True)) for row in distinct.tolist()
    ]
    none = np.array([not path[0] for path in paths])
    return paths, np.where(none[codes.reshape(-1)], -1, codes.reshape(-1))


def obs_codes(values: Any, where: Place | str, key: str) -> tuple[np.ndarray, list[str]]:
    """A column of obs -> its (n,) codes, -1 where it is missing, and their names, cleaned and sorted."""
    if np.ndim(values) != 1:
        raise InputError(f"{where}: obs '{key}' has {np.ndim(values)} dimensions; name a column of one label per cell")
    categorical = needs("pandas", "h5ad").Categorical(values)
    raw = [clean(str(name)) for name in categorical.categories]
    used = set(np.unique(categorical.codes).tolist()) - {-1}
    names = sorted({raw[code] for code in used if not is_missing(raw[code])})
    position = {name: code for code, name in enumerate(names)}
    renumber = np.array([*(position.get(name, -1) for name in raw), -1])  # the last entry is the one of code -1
    return renumber[categorical.codes], names


def read_map(path: Place) -> dict[str, str]:
    """A label map -> own name -> CL name; an empty CL name leaves these cells out.

    A TSV, own name and CL name on each line; more columns, a first line that begins with # and blank lines are skipped
    over. Raises InputError for a line of one column, and for an own name with two different targets.
    """
    found: dict[str, str] = {}
    try:
        with open(fetch(path), newline="", encoding="utf-8-sig") as file:
            for number, line in enumerate(csv.reader(file, delimiter="\t"), 1):
                cells = [clean(cell) for cell in line]
                if not any(cells) or (number == 1 and cells[0].startswith("#")):
                    continue
                if len(cells) < 2:
                    raise InputError(
                        f"{path}: expected two columns, own name<TAB>CL name; line {number} is '{cells[0]}'"
                    )
                own, target = cells[:2]
                if found.setdefault(own, target) != target:
                    raise InputError(
                        f"{path}: '{own}' has two targets, '{found[own]}' and '{target}' in line {number}; keep one"
                    )
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected two columns of UTF-8 text, own name<TAB>CL name ({error})") from error
    return found


@dataclass(frozen=True)
class LabelReport:
    """What `labelled_from_anndata` left out, and the user's own tree for `fractal.hierarchy.ontology.hierarchy_of`."""

    notes: list[str]  # one line each
    tree: dict[str, CellType] | None
    levels: tuple[str, ...] | None


def labelled_from_anndata(
    adata: Any,
    use_rep: str,
    labels: str = "cell_type",
    study: str | None = None,
    levels: Sequence[str] = (),
    label_map: Mapping[str, str] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray, LabelReport]:
    """The labelled cells of an AnnData in memory, by the same rules as ingest.py's of an .h5ad (`read_labels`).

    -> vectors (n, dim) float32, type names (n,) str, studies (n,) str or None, cell names (n,) str, and the report.
    `use_rep`: a key of obsm, or "X". Raises InputError for an unknown key, no labelled cell, and vectors that are zero
    or not finite.
    """
    where = "adata"

    def column(key: str) -> Any:
        if key not in adata.obs:
            raise InputError(f"{where}: obs has no column '{key}'; it has {', '.join(map(str, adata.obs))}")
        return adata.obs[key]

    found = read_labels(column, where, labels, study, label_map, levels)
    array = find_embedding(adata.obsm, adata.X, where, use_rep)
    source = from_matrix(Path(where), array.shape, array.dtype, lambda some: np.asarray(array[some]))
    keep = found.keep
    vectors = np.concatenate([chunk for _, chunk in source.chunks(CHUNK)])
    refuse(keep & ~usable(vectors), 0, Path(where))
    names = np.array(found.names)[found.codes[keep]]
    studies = None if found.study_codes is None else np.array(found.studies)[found.study_codes[keep]]
    ids = np.asarray(adata.obs_names).astype(str)[keep]
    return vectors[keep], names, studies, ids, LabelReport(found.notes, found.tree, found.levels)


# --- writing ---------------------------------------------------------------------------------------------------------


def facts(adapter: Any, recipe: str, adapter_sha256: str, levels: Sequence[str] = LEVELS) -> dict[str, Any]:
    """What uns["fractal"] says of the vectors; `levels` are the names of the hierarchy's levels, coarse to fine."""
    return {
        "recipe": recipe,
        "levels": np.array(levels[: adapter.num_levels], object),
        "block_width": adapter.scale_dim,
        "prefix_ends": np.arange(1, adapter.num_levels + 1) * adapter.scale_dim,
        "adapter_sha256": adapter_sha256,
    }


def truncate(vectors: np.ndarray, facts: Mapping[str, Any], j: int, blocks: np.ndarray | None = None) -> np.ndarray:
    """Prefix j (from 1) of fractal vectors (n, dims) -> (n, prefix_ends[j - 1]) float32, of length 1.

        fractal.truncate(adata.obsm["X_fractal"], adata.uns["fractal"], 2)

    To cut without normalising again is the commonest mistake with such vectors: distances are then dominated by how
    long the cut part happens to be. `facts` is uns["fractal"]. A prefix of recipe `published` is no cut of its full
    vector: give obsm["X_fractal_blocks"] as `blocks`. Rows of NaN stay so. Raises InputError for another j, vectors
    of another width, and where blocks are needed.
    """
    ends = [int(end) for end in np.asarray(facts["prefix_ends"])]
    if not 1 <= j <= len(ends):
        raise InputError(f"prefix {j} of {len(ends)}: name one from 1 to {len(ends)}")
    if facts["recipe"] == "published" and j < len(ends):
        if blocks is None:
            raise InputError(
                "a prefix of recipe `published` is no cut of its full vector: "
                'give its blocks, truncate(..., blocks=adata.obsm["X_fractal_blocks"])'
            )
        vectors = blocks
    if np.ndim(vectors) != 2 or np.shape(vectors)[1] != ends[-1]:
        raise InputError(f"vectors of shape {np.shape(vectors)}: expected (n, {ends[-1]}), not yet cut")
    part = np.asarray(vectors[:, : ends[j - 1]], np.float32)
    return part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)


@contextmanager
def h5ad_copy(source: Place, target: Place) -> Iterator[Any]:
    """A copy of an .h5ad, open for additions; it appears at `target`, which may be `source`, whole or not at all."""
    with atomic_write(target) as part:
        download(source, part)
        try:
            with open_h5ad(part, "r+") as file:
                yield file
        except (OSError, RuntimeError, ValueError) as error:  # HDF5 tells of a full disk in its text only
            number = re.search(r"errno = (\d+)", str(error))
            if number and int(number[1]) in FULL:
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise


def add_obsm(file: Any, key: str, n: int, dim: int) -> Any:
    """A new, empty (n, dim) float32 array in obsm -> its HDF5 dataset, to be filled chunk by chunk."""
    obsm = file.require_group("obsm")
    if key in obsm:
        del obsm[key]
    array = obsm.create_dataset(key, (n, dim), np.float32, chunks=(min(n, 4_096), dim))
    obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})  # as AnnData itself marks arrays
    return array


def add_obs(file: Any, columns: Mapping[str, Any], replaces: Callable[[str], bool] = lambda name: False) -> None:
    """Add columns (arrays or pandas categoricals, (n,)) to obs; those of the same names go, and those to replace."""
    write = needs("anndata", "h5ad").io.write_elem
    for name in [name for name in file["obs"].attrs["column-order"] if replaces(name) and name in file["obs"]]:
        del file["obs"][name]
    for name, values in columns.items():
        write(file["obs"], name, values)
    order = [name for name in file["obs"].attrs["column-order"] if name not in columns and not replaces(name)]
    file["obs"].attrs["column-order"] = np.array([*order, *columns], object)
