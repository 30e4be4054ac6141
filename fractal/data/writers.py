"""What is written: vectors as Parquet or .npy, and columns and vectors added to a copy of an .h5ad.

Into an .h5ad go

    obsm["X_fractal"]          (n, dims) float32, the full vector, of length 1; NaN where the input is not usable
    obsm["X_fractal_blocks"]   (n, dims) float32, recipe `published` only, whose prefixes are no cuts of the full vector
    uns["fractal"]             recipe, levels, block_width, prefix_ends, adapter_sha256

and `truncate` cuts a prefix out of these as it should be cut.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.base.errors import InputError
from fractal.base.files import atomic_write
from fractal.base.storage import Location, download
from fractal.data.h5ad import open_h5ad
from fractal.data.parquet import is_text
from fractal.hierarchy.levels import LEVELS


def facts(adapter: Any, recipe: str, adapter_sha256: str, levels: Sequence[str] = LEVELS) -> dict[str, Any]:
    """What uns["fractal"] says of the vectors; `levels` are the names of the hierarchy's levels, coarse to fine."""
    return {
        "recipe": recipe,
        "levels": np.array(levels[: adapter.num_levels], object),
        "block_width": adapter.scale_dim,
        "prefix_ends": np.arange(1, adapter.num_levels + 1) * adapter.scale_dim,
        "adapter_sha256": adapter_sha256,
    }


def updated(known: object, new: Mapping[str, Any]) -> dict[str, Any]:
    """A dict of uns, or whatever stands in its place, with new entries; None removes one."""
    both = {**known, **new} if isinstance(known, Mapping) else new
    return {key: value for key, value in both.items() if value is not None}


def truncate(
    vectors: np.ndarray, facts: Mapping[str, Any], j: int | str, blocks: np.ndarray | None = None
) -> np.ndarray:
    """Prefix j of fractal vectors (n, dims), from 1 or by its level -> (n, prefix_ends[j - 1]) float32, of length 1.

        fractal.truncate(adata.obsm["X_fractal"], adata.uns["fractal"], 2)
        fractal.truncate(adata.obsm["X_fractal"], adata.uns["fractal"], "lineage")

    To cut without normalising again is the commonest mistake with such vectors: distances are then dominated by how
    long the cut part happens to be. `facts` is uns["fractal"]. A prefix of recipe `published` is no cut of its full
    vector: give obsm["X_fractal_blocks"] as `blocks`. Rows of NaN stay so. Raises InputError for another j, vectors
    of another width, and where blocks are needed.
    """
    ends = [int(end) for end in np.asarray(facts["prefix_ends"])]
    levels = [str(level) for level in facts.get("levels", LEVELS)]
    if isinstance(j, str) and j in levels:
        j = levels.index(j) + 1
    if isinstance(j, str) or not 1 <= j <= len(ends):
        raise InputError(f"prefix {j!r}: name one from 1 to {len(ends)}, or a level, {', '.join(levels)}")
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
def h5ad_copy(source: Location, target: Location) -> Iterator[Any]:
    """A copy of an .h5ad, open for additions; it appears at `target`, which may be `source`, whole or not at all."""
    with atomic_write(target) as part:
        download(source, part)
        with open_h5ad(part, "r+") as file:
            yield file


def add_obsm(file: Any, key: str, n: int, dim: int) -> Any:
    """A new, empty (n, dim) float32 array in obsm -> its HDF5 dataset, to be filled chunk by chunk."""
    obsm = file.require_group("obsm")
    if key in obsm:
        del obsm[key]
    array = obsm.create_dataset(key, (n, dim), np.float32, chunks=(min(n, 4_096), dim))
    obsm.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})  # as AnnData itself marks arrays
    return array


def obs_of(table: pa.Table) -> pa.Table:
    """A table as AnnData can write it: dates, durations, bytes and lists as text, names that HDF5 can hold."""
    arrays, names = [], list[str]()
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (is_text(kind) or pa.types.is_primitive(kind) or pa.types.is_null(kind)) or pa.types.is_temporal(kind):
            values = (value.hex() if isinstance(value, bytes) else value for value in column.to_pylist())
            column = pa.array([None if value is None else str(value) for value in values], pa.string())
        arrays.append(column)
        name = name.replace("/", "|").replace("_index", "index") or "unnamed"
        names.append(next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in names))
    return pa.table(arrays, names=names)


def add_obs(file: Any, columns: Mapping[str, Any], replaces: Collection[str]) -> None:
    """Add columns (arrays or pandas categoricals, (n,)) to obs; those of the same names go, and those to replace."""
    from anndata import io  # half a second

    obs = file["obs"]
    before = obs.attrs["column-order"]
    for name in [name for name in before if name in replaces and name in obs]:
        del obs[name]
    for name, values in columns.items():
        io.write_elem(obs, name, values)
    kept = [name for name in before if name not in columns and name not in replaces]
    obs.attrs["column-order"] = np.array([*kept, *columns], object)
