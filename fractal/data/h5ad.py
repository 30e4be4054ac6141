"""AnnData on disk, .h5ad and .zarr: opened, checked, and read by rows and by columns. No torch, it takes seconds."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.base.errors import InputError, needs, reason
from fractal.base.storage import Location, open_random, zarr_store
from fractal.data.parquet import check_format

MAX_CHUNK = 1 << 30  # bytes of an array that have to be read at once
MAX_DEFLATED = 2_000  # bytes of an array for each that it takes on the disk; gzip reaches 1,032
MAX_X = 4_096  # numbers per cell: no embedding is wider, and expression has more genes than this


# --- opening ---------------------------------------------------------------------------------------------------------


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
                refuse_other_files(file, path)
            check_sizes(file, path)
            obs = file.get("obs")
            if not hasattr(obs, "keys") or "column-order" not in obs.attrs:
                raise InputError(
                    f"{path}: not an .h5ad file, or written by an AnnData before 0.7; "
                    "write it again with anndata.read_h5ad(...).write_h5ad(...)"
                )
        yield file


def refuse_other_files(file: Any, path: Location) -> None:
    """Raise InputError for an .h5ad that takes numbers from other files: they would be shown as its contents."""
    h5py = needs("h5py", "h5ad")

    def link(name: str, link: Any) -> str | None:
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
    items = [(name, file[name]) for name in ("X", "obs", "obsm") if name in file]
    for name, item in items:
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


# --- vectors ---------------------------------------------------------------------------------------------------------

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


def find_embedding(obsm: Mapping[str, Any], x: Any, path: Location | str, key: str) -> Any:
    """`obsm[key]`, or X for the key "X". Raises InputError that says what there is instead, and the way out."""
    if key == "X" and "X" not in obsm:
        if x is None:
            raise InputError(f"{path}: has no X; its obsm has {', '.join(obsm) or 'nothing'}")
        check_embedding(x, f"{path}: X")
        return x
    if key not in obsm:
        there = ", ".join(obsm)
        way = f"it has {there}: name one with --use-rep" if there else f"it has none; {HOW_TO_EMBED}"
        try:
            check_embedding(x, f"{path}: X")
            if not there and x is not None:
                way = f"it has none, but X is {x.shape[1]} numbers per cell: if that is the embedding, say --use-rep X"
        except InputError:
            pass
        raise InputError(f"{path}: has no obsm '{key}'; {way}")
    check_embedding(obsm[key], f"{path}: obsm '{key}'")
    return obsm[key]


def num_cells(file: Any) -> int:
    """Of an open .h5ad, by its obs; h5py can write another number of vectors."""
    index = file["obs"][file["obs"].attrs.get("_index", "_index")]
    return index.shape[0] if hasattr(index, "shape") else len(needs("anndata", "h5ad").io.read_elem(index))


def obs_names(file: Any, path: Location) -> Callable[[slice], np.ndarray]:
    """-> a function rows -> the names of these cells, (m,) str."""
    h5py = needs("h5py", "h5ad")
    with reading_h5ad(path):
        obs = file["obs"]
        index = obs.get(obs.attrs.get("_index", "_index"))
        plain = isinstance(index, h5py.Dataset) and h5py.check_string_dtype(index.dtype)
        # Else numbers, or a text array of pandas.
        names = index.asstr() if plain else needs("anndata", "h5ad").io.read_elem(index)

    def rows(batch: slice) -> np.ndarray:
        with reading_h5ad(path):
            return np.asarray(names[batch], object).astype(str)

    return rows


def obs_table(obs: Any, path: Location, names: Sequence[str]) -> pa.Table:
    """Columns of obs, a group of an open .h5ad or a DataFrame, which are known to be there."""
    with reading_h5ad(path):
        if not hasattr(obs, "columns") and any("categories" in obs[name].attrs for name in names):
            # AnnData 0.7 keeps the names of codes apart, in obs/__categories: its reader puts them together.
            obs = needs("anndata", "h5ad").io.read_elem(obs)
        read = (
            obs.__getitem__
            if hasattr(obs, "columns")
            else lambda name: needs("anndata", "h5ad").io.read_elem(obs[name])
        )
        return pa.table([arrow(read(name), f"{path}: obs '{name}'") for name in names], names=list(names))


def arrow(values: Any, where: str) -> pa.Array:
    """A column of obs in Arrow's types; text where it mixes types, or where Arrow has none. Missing stays missing."""
    if np.ndim(values) != 1:
        raise InputError(f"{where} has {np.ndim(values)} dimensions; name a column of one label per cell")
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        series = needs("pandas", "h5ad").Series(values)
        return pa.array(series.astype(str).astype(object).where(series.notna(), None), pa.string())


def fractal_uns(file: Any, path: Location) -> Mapping[str, Any]:
    """uns["fractal"] of an open .h5ad; empty where it has none."""
    with reading_h5ad(path):
        uns = file.get("uns", {})
        facts = needs("anndata", "h5ad").io.read_elem(uns["fractal"]) if "fractal" in uns else {}
    return facts if isinstance(facts, Mapping) else {}
