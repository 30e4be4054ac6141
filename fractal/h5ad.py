"""What is written back to an .h5ad; its labels are read by fractal/labelled.py.

Everything streams: one chunk of rows is in memory, whatever the number of cells. Written back are

    obsm["X_fractal"]          (n, dims) float32, the full vector, of length 1; NaN where the input is not usable
    obsm["X_fractal_blocks"]   (n, dims) float32, recipe `published` only, whose prefixes are no cuts of the full vector
    uns["fractal"]             recipe, levels, block_width, prefix_ends, adapter_sha256

and `truncate` cuts a prefix out of these as it should be cut.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fractal.adapter import Adapter
from fractal.atlas import LEVELS
from fractal.cli import needs
from fractal.files import atomic_write
from fractal.vectors import open_h5ad


def facts(adapter: Adapter, recipe: str, adapter_sha256: str) -> dict[str, Any]:
    """What uns["fractal"] says of the vectors."""
    return {
        "recipe": recipe,
        "levels": np.array(LEVELS[: adapter.num_levels], object),
        "block_width": adapter.scale_dim,
        "prefix_ends": np.arange(1, adapter.num_levels + 1) * adapter.scale_dim,
        "adapter_sha256": adapter_sha256,
    }


def truncate(obsm: Mapping[str, Any], fractal: Mapping[str, Any], j: int) -> np.ndarray:
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
    with atomic_write(target) as part:
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
