"""AnnData on disk, .h5ad and .zarr: opened, checked, and read by rows and by columns. No torch, it takes seconds."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fractal.base.errors import InputError, needs, reason
from fractal.base.files import refuse_links
from fractal.base.storage import Location, locate, open_random, zarr_store
from fractal.data.parquet import MAX_TEXT, check_format, is_text

MAX_CHUNK = 1 << 30  # bytes of an array that have to be read at once
MAX_DEFLATED = 2_000  # bytes of an array for each that it takes on the disk; gzip reaches 1,032
LARGE = ("X", "obs", "obsm", "layers", "raw", "var", "varm", "uns/fractal")  # parts with large arrays that are read
MAX_NESTED = 100  # groups in groups, also in uns
MAX_DEPTH, MAX_ITEMS = 8, 100_000  # groups in groups, and arrays in all; links to a group above make no end of them
MAX_X = 4_096  # numbers per cell: no embedding is wider, and expression has more genes than this


@contextmanager
def reading_h5ad(path: Location) -> Iterator[None]:
    """Turn what HDF5 and anndata say of a file that cannot be read into one line that names it and the way out."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # anndata wraps whatever h5py raises in its errors
        message = " ".join(map(str, (error, error.__cause__, error.__context__)))
        if "not registered" in message or "plugin" in message:  # not: "filter returned failure", of damaged data
            raise InputError(
                f"{path}: compressed with an HDF5 plugin that is not installed here ({reason(error)}); install "
                "hdf5plugin and name its folder in HDF5_PLUGIN_PATH, or write the file again with compression='gzip'"
            ) from error
        if "unable to lock" in message:
            raise InputError(f"{path}: locked, another program has it open for writing; close it there") from error
        raise InputError(f"{path}: not an .h5ad file or .zarr folder, or damaged ({reason(error)})") from error


@contextmanager
def open_h5ad(path: Location, mode: str = "r") -> Iterator[Any]:
    """The h5py.File of an .h5ad, or the zarr.Group of a .zarr, which has the same methods.

    Raises InputError for another format, damage, a lock, and an AnnData before 0.7.
    """
    check_format(path, "Read are .h5ad and .zarr")
    is_zarr = path.suffix.casefold() != ".h5ad" and path.is_dir()
    if not is_zarr and not path.is_file():
        raise InputError(f"{path}: no such file")
    with ExitStack() as stack:
        with reading_h5ad(path):
            if is_zarr:
                refuse_links(path)
                file = needs("zarr", "zarr").open_group(zarr_store(path), mode=mode)
            else:
                file = stack.enter_context(h5py.File(open_random(path), mode))
                refuse_other_files(file, path)
            check_sizes(file, path)
            obs = file.get("obs")
            if not hasattr(obs, "keys") or "column-order" not in obs.attrs:
                raise InputError(
                    f"{path}: not an .h5ad file, or written by an AnnData before 0.7; "
                    "write it again with anndata.read_h5ad(...).write_h5ad(...)"
                )
        yield file


class InMemory:
    """An AnnData in memory, by the names that an .h5ad has for its parts: "obs", "layers/counts", "raw/X"."""

    def __init__(self, adata: Any) -> None:
        self.adata = adata

    def get(self, name: str, default: Any = None) -> Any:
        group, _, key = name.partition("/")
        part = getattr(self.adata, group)
        if part is not None and key:
            part = part.get(key) if group == "layers" else getattr(part, key)
        return default if part is None else part

    __getitem__ = get


@contextmanager
def open_anndata(cells: Any) -> Iterator[tuple[Any, Location]]:
    """An AnnData, or the path of an .h5ad or .zarr -> its parts by their names, and what messages call it."""
    if hasattr(cells, "obsm"):
        yield InMemory(cells), Path("adata")
    else:
        with open_h5ad(locate(cells)) as file:
            yield file, locate(cells)


def refuse_other_files(file: Any, path: Location) -> None:
    """Raise InputError for an .h5ad that takes numbers from other files: they would be shown as its contents."""

    def link(name: str, link: Any) -> str | None:
        if name.count("/") > MAX_NESTED:  # HDF5 makes a path of each name: 10,000 groups in one another take minutes
            return f"{name[:80]}... lies in more than {MAX_NESTED} groups"
        return f"{name} is a link to the file {link.filename}" if isinstance(link, h5py.ExternalLink) else None

    def storage(name: str, item: Any) -> str | None:
        if not isinstance(item, h5py.Dataset):
            return None
        files = [source.file_name for source in item.virtual_sources()] if item.is_virtual else []
        files = [file for file in files if file != "."] + [file for file, *_ in item.external or ()]
        return f"{name} lies in the file {files[0]}" if files else None

    if problem := file.visititems_links(link) or file.visititems(storage):
        raise InputError(f"{path}: its {problem}; write it again as one file")


def check_sizes(file: Any, path: Location) -> None:
    """Raise InputError for an array that asks for far more memory than it takes on the disk."""
    items = [(name, file[name]) for name in LARGE if name in file]
    for name, item in items:
        if name.count("/") > MAX_DEPTH or len(items) > MAX_ITEMS:
            raise InputError(f"{path}: damaged, {name} leads round in a circle, or is one of too many; make it again")
        if hasattr(item, "keys"):
            items += [(f"{name}/{key}", item[key]) for key in item]
            continue
        chunk, size = (math.prod(shape) * item.dtype.itemsize for shape in (item.chunks or (0,), item.shape or ()))
        if chunk > MAX_CHUNK:
            raise InputError(f"{path}: {name} lies in chunks of {chunk:,} bytes; write it again in smaller ones")
        if size > MAX_CHUNK:
            stored = item.id.get_storage_size() if hasattr(item, "id") else item.nbytes_stored()
            if size > MAX_CHUNK + MAX_DEFLATED * stored:
                raise InputError(f"{path}: damaged, {name} asks for {size:,} bytes and holds {stored:,}; make it again")


HOW_TO_EMBED = (
    "this tool takes one vector per cell: make one first, such as SCimilarity's, scVI's, or principal components "
    "(scanpy: normalize_total, log1p, pca, which writes obsm X_pca), and name it with --use-rep"
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


def find_embedding(file: Any, path: Location, key: str) -> Any:
    """obsm[key] of `open_anndata`, or X for the key "X". Raises InputError that says what there is instead."""
    obsm, x = file.get("obsm", {}), file.get("X")
    there = ", ".join(obsm)
    if key in obsm or (key == "X" and x is not None):
        array, where = (obsm[key], f"{path}: obsm '{key}'") if key in obsm else (x, f"{path}: X")
        check_embedding(array, where)
        return array
    if key == "X":
        raise InputError(f"{path}: has no X; its obsm has {there or 'nothing'}")
    way = f"it has {there}: name one with --use-rep" if there else f"it has none; {HOW_TO_EMBED}"
    if not there and x is not None:
        with suppress(InputError):
            check_embedding(x, f"{path}: X")
            way = f"it has none, but X is {x.shape[1]} numbers per cell: if that is the embedding, say --use-rep X"
    raise InputError(f"{path}: has no obsm '{key}'; {way}")


def rows_of(array: Any, path: Location) -> Callable[[slice], Any]:
    """-> a function: rows -> that part of an array of a file, whose errors are those of `reading_h5ad`."""

    def rows(batch: slice) -> Any:
        with reading_h5ad(path):
            return array[batch]

    return rows


def obs_names(obs: Any) -> Any:
    """The cells' names (n,): an array, or what reads one by rows."""
    if hasattr(obs, "columns"):
        return np.asarray(obs.index)
    index = obs[obs.attrs.get("_index", "_index")]
    if isinstance(index, h5py.Dataset) and h5py.check_string_dtype(index.dtype):
        return index.asstr()
    return read_elem(index)  # numbers, or a text array of pandas


def read_elem(group: Any) -> Any:
    """anndata's, whose import takes half a second."""
    from anndata import io

    return io.read_elem(group)


def obs_columns(obs: Any) -> tuple[str, ...]:
    if hasattr(obs, "columns"):
        return tuple(map(str, obs.columns))
    return tuple(str(name) for name in obs.attrs["column-order"] if name in obs)


def obs_table(obs: Any, path: Location, names: Sequence[str]) -> pa.Table:
    """Columns of obs, a group of an open .h5ad or a DataFrame, which are known to be there."""
    with reading_h5ad(path):
        if not hasattr(obs, "columns") and any("categories" in obs[name].attrs for name in names):
            obs = read_elem(obs)  # AnnData 0.7 keeps the names of codes apart, in obs/__categories
        values = (obs[name] if hasattr(obs, "columns") else read_elem(obs[name]) for name in names)
        columns = [arrow(column, f"{path}: obs '{name}'") for column, name in zip(values, names, strict=True)]
        return pa.table(columns, names=list(names))


def arrow(values: Any, where: str) -> pa.Array:
    """A column of obs in Arrow's types; text where it mixes types, or where Arrow has none. Missing stays missing."""
    if np.ndim(values) != 1:
        raise InputError(f"{where} has {np.ndim(values)} dimensions; name a column of one label per cell")
    try:
        array = pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        from pandas import Series  # half a second, which only such a column waits for

        series = Series(values)
        array = pa.array(series.astype(str).astype(object).where(series.notna(), None), pa.string())
    text = array.dictionary if pa.types.is_dictionary(array.type) else array
    if is_text(text.type) and (longest := pc.max(pc.binary_length(text)).as_py() or 0) > MAX_TEXT:
        raise InputError(f"{where} has a text of {longest:,} bytes; cut it, or drop the column")
    return array


def fractal_uns(file: Any, path: Location) -> Mapping[str, Any]:
    """uns["fractal"] of `open_anndata`; empty where it has none."""
    with reading_h5ad(path):
        facts = file.get("uns", {}).get("fractal", {})
        facts = read_elem(facts) if hasattr(facts, "attrs") else facts
    return facts if isinstance(facts, Mapping) else {}
