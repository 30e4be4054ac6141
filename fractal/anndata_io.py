"""Vectors in and out of the files that single-cell people have: .h5ad (AnnData), .npy, Parquet and TileDB arrays.

Everything streams: one chunk of rows is in memory, whatever the number of cells. Written back to an .h5ad are

    obsm["X_fractal"]          (n, dims) float32, the full vector, of length 1; NaN where the input is not usable
    obsm["X_fractal_blocks"]   (n, dims) float32, recipe `published` only, whose prefixes are no cuts of the full vector
    uns["fractal"]             recipe, levels, block_width, prefix_ends, adapter_sha256

and `cut_prefix` cuts a prefix out of these as it should be cut.
"""

import csv
import importlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from fractal.adapter import Adapter
from fractal.atlas import open_atlas, read_vectors, reading
from fractal.cli import LEVELS, InputError
from fractal.files import replacing

CHUNK = 16_384  # rows; 8 MB of 128-d vectors


def needs(package: str, extra: str) -> Any:
    """Import an optional package. Raises InputError that names the extra it comes with."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"the package {package} is missing; say `uv run --extra {extra} ...`") from error


# --- in --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vectors:
    """An open source of n vectors of `dim` numbers; `chunks(size)` yields (m, dim) float32 in the order of the file."""

    path: Path
    n: int
    dim: int
    chunks: Callable[[int], Iterator[np.ndarray]]


@contextmanager
def open_vectors(path: str | Path, obsm: str = "X_scimilarity") -> Iterator[Vectors]:
    """Open an .h5ad (its `obsm` key), an .npy, the folder of a TileDB array, or an atlas in Parquet.

    Raises InputError for a file that is missing, damaged or empty, or that does not hold cells x numbers.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        with open_tiledb(path) as array:
            yield from_array(array, path)
    elif path.suffix == ".h5ad":
        with open_h5ad(path) as file:
            yield from_array(obsm_array(file, path, obsm), path)
    elif path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{path}: not an array of numpy, or damaged ({error})") from error
        yield from_array(array, path)
    else:
        atlas = open_atlas(path)

        def batches(size: int) -> Iterator[np.ndarray]:
            with reading(path):
                for batch in atlas.iter_batches(size, columns=["embedding"]):
                    yield read_vectors(pa.Table.from_batches([batch]), path)

        yield Vectors(path, atlas.metadata.num_rows, atlas.schema_arrow.field("embedding").type.list_size, batches)


def from_array(array: Any, path: Path) -> Vectors:
    """Vectors of anything with a shape, a dtype and slices: a memory map, an HDF5 dataset, a TileDB array."""
    shape = tuple(map(int, array.shape))
    if len(shape) != 2 or np.dtype(array.dtype).kind not in "fiu":
        raise InputError(f"{path}: holds {array.dtype} of shape {shape}, expected numbers, cells x dims")
    if 0 in shape:
        raise InputError(f"{path}: holds no cells (its array is {shape[0]} x {shape[1]})")

    def chunks(size: int) -> Iterator[np.ndarray]:
        for start in range(0, shape[0], size):
            yield np.asarray(array[start : min(start + size, shape[0])], np.float32)

    return Vectors(path, *shape, chunks)


class TileDBRows:
    """The one attribute of a dense TileDB array, cells x dims, as far as it is written, with slices of rows."""

    def __init__(self, array: Any) -> None:
        self.array, self.name = array, array.attr(0).name
        self.dtype = array.attr(0).dtype
        written = array.nonempty_domain()
        rows = 0 if written is None else int(written[0][1]) + 1
        self.shape = (rows, *array.shape[1:])

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = self.array[rows.start : rows.stop]
        return found[self.name] if isinstance(found, Mapping) else found  # an attribute without a name comes bare


@contextmanager
def open_tiledb(path: Path) -> Iterator[TileDBRows]:
    """Open a dense TileDB array such as SCimilarity's cellsearch/cell_embedding."""
    tiledb = needs("tiledb", "tiledb")
    try:
        array = tiledb.open(str(path))
    except tiledb.TileDBError as error:
        raise InputError(f"{path}: not a TileDB array, or damaged ({error})") from error
    with array:
        if array.schema.sparse or array.schema.nattr != 1:
            raise InputError(f"{path}: not a dense TileDB array with one attribute, such as cell_embedding")
        yield TileDBRows(array)


@contextmanager
def open_h5ad(path: Path, mode: str = "r") -> Iterator[Any]:
    """The h5py.File of an .h5ad. Raises InputError if it is damaged, or written by an AnnData older than 0.7."""
    h5py = needs("h5py", "h5ad")
    try:
        file = h5py.File(path, mode)
    except OSError as error:
        raise InputError(f"{path}: not an .h5ad file, or damaged ({error})") from error
    with file:
        if not all(isinstance(file.get(name), h5py.Group) for name in ("obs", "obsm")):
            raise InputError(
                f"{path}: not an .h5ad file, or written by an AnnData before 0.7; "
                "write it again with anndata.read_h5ad(...).write_h5ad(...)"
            )
        yield file


def obsm_array(file: Any, path: Path, key: str) -> Any:
    found = file["obsm"].get(key)
    if found is None:
        raise InputError(
            f"{path}: has no obsm '{key}'; it has {', '.join(file['obsm']) or 'none'}: name one with --obsm"
        )
    if not hasattr(found, "shape"):  # a data frame or a sparse matrix
        raise InputError(f"{path}: obsm '{key}' is not a dense array; write it again with .to_numpy() or .toarray()")
    return found


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
    vectors: Vectors

    @property
    def dim(self) -> int:
        return self.vectors.dim

    def __len__(self) -> int:
        return len(self.type_codes)

    def chunks(self, size: int = CHUNK, scratch: Path | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (rows, vectors (m, dim) float32); `scratch` is not needed here.

        Raises InputError for NaN, inf or zero vectors.
        """
        done = seen = 0
        for chunk in self.vectors.chunks(size):
            keep = self.keep[seen : seen + len(chunk)]
            bad = np.flatnonzero(keep & ~usable(chunk))
            if len(bad):
                raise InputError(
                    f"{self.vectors.path}: the vector of cell {seen + bad[0]} is zero or not finite; take such cells "
                    "out, or their labels"
                )
            yield slice(done, done + keep.sum()), chunk[keep]
            done, seen = done + keep.sum(), seen + len(chunk)


@contextmanager
def open_labelled(
    path: Path, obsm: str, label_key: str, study_key: str | None, label_map: Path | None
) -> Iterator[LabelledCells]:
    """Open the cells of an .h5ad that have a label; `label_map` is a TSV of own name and CL name, see `read_map`."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open_h5ad(path) as file:
        vectors = from_array(obsm_array(file, path, obsm), path)
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


def usable(vectors: np.ndarray) -> np.ndarray:
    """(n,) bool: finite and not zero."""
    norm = np.einsum("ij,ij->i", vectors, vectors)
    return np.isfinite(norm) & (norm > 0)


# --- out -------------------------------------------------------------------------------------------------------------


def facts(adapter: Adapter, recipe: str, adapter_sha256: str) -> dict[str, Any]:
    """What uns["fractal"] says of the vectors."""
    return {
        "recipe": recipe,
        "levels": np.array(LEVELS[: adapter.num_levels], object),
        "block_width": adapter.scale_dim,
        "prefix_ends": np.arange(1, adapter.num_levels + 1) * adapter.scale_dim,
        "adapter_sha256": adapter_sha256,
    }


def cut_prefix(obsm: Mapping[str, Any], fractal: Mapping[str, Any], j: int) -> np.ndarray:
    """Prefix j (from 1) of an AnnData's obsm and uns["fractal"] -> (n, prefix_ends[j - 1]) float32, of length 1.

    To cut without normalising again is the commonest mistake with such vectors: distances are then dominated by how
    long the cut part happens to be. Recipe `published`: from its blocks. Raises ValueError for another j, or if the
    blocks are missing.
    """
    ends = [int(end) for end in fractal["prefix_ends"]]
    if not 1 <= j <= len(ends):
        raise ValueError(f"prefix {j} of {len(ends)}")
    source = "X_fractal"
    if fractal["recipe"] == "published" and j < len(ends):
        source = "X_fractal_blocks"
        if source not in obsm:
            raise ValueError("a prefix of recipe `published` is no cut of its full vector: obsm lacks X_fractal_blocks")
    part = np.asarray(obsm[source][:, : ends[j - 1]], np.float32)
    return part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)


@contextmanager
def h5ad_copy(source: Path, target: Path) -> Iterator[Any]:
    """A copy of an .h5ad, open for additions; it appears at `target`, which may be `source`, whole or not at all."""
    with replacing(target) as part:
        shutil.copyfile(source, part)
        with open_h5ad(part, "r+") as file:
            yield file


def add_obsm(file: Any, key: str, n: int, dim: int) -> Any:
    """A new, empty (n, dim) float32 array in obsm -> its HDF5 dataset, to be filled chunk by chunk."""
    if key in file["obsm"]:
        del file["obsm"][key]
    array = file["obsm"].create_dataset(key, (n, dim), np.float32, chunks=(min(n, 4_096), dim))
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})  # as AnnData itself marks arrays
    return array


def add_obs(file: Any, columns: Mapping[str, Any]) -> None:
    """Add columns (arrays or pandas categoricals, (n,)) to obs, in place of those with the same names."""
    write = needs("anndata", "h5ad").io.write_elem
    for name, values in columns.items():
        write(file["obs"], name, values)
    order = [name for name in file["obs"].attrs["column-order"] if name not in columns]
    file["obs"].attrs["column-order"] = np.array([*order, *columns], object)


@torch.inference_mode()
def embed_chunks(adapter: Adapter, chunks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (full vectors (m, dims), blocks (m, dims)), both float32; NaN in the rows whose vector is not usable."""
    device = next(adapter.parameters()).device
    for chunk in chunks:
        good = usable(chunk)
        blocks = adapter.blocks(torch.from_numpy(chunk[good]).to(device))
        found = np.full((2, len(chunk), adapter.num_levels * adapter.scale_dim), np.nan, np.float32)
        found[0, good], found[1, good] = adapter.full(blocks).cpu(), blocks.flatten(1).cpu()
        yield found[0], found[1]


def embed_h5ad(adapter: Adapter, recipe: str, adapter_sha256: str, source: Path, obsm: str, target: Path) -> int:
    """Copy an .h5ad and add X_fractal and uns["fractal"] -> how many cells were not usable. In bounded memory.

    Raises InputError if the vectors are not as wide as the adapter's input.
    """
    with open_vectors(source, obsm) as vectors, h5ad_copy(source, target) as file:
        check_width(vectors, adapter.dim)
        dims = adapter.num_levels * adapter.scale_dim
        outputs = [add_obsm(file, "X_fractal", vectors.n, dims)]
        if recipe == "published":
            outputs.append(add_obsm(file, "X_fractal_blocks", vectors.n, dims))
        needs("anndata", "h5ad").io.write_elem(file["uns"], "fractal", facts(adapter, recipe, adapter_sha256))
        start = invalid = 0
        with tqdm(total=vectors.n, unit="cells", unit_scale=True, desc="embed") as bar:
            for found in embed_chunks(adapter.eval(), vectors.chunks(CHUNK)):
                stop = start + len(found[0])
                for output, values in zip(outputs, found, strict=False):
                    output[start:stop] = values
                invalid += int(np.isnan(found[0][:, 0]).sum())
                start = stop
                bar.update(len(found[0]))
    return invalid


def check_width(vectors: Vectors, dim: int) -> None:
    if vectors.dim != dim:
        raise InputError(f"{vectors.path}: its vectors have {vectors.dim} numbers, the adapter takes {dim}")
