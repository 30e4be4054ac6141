"""The vectors of new cells for a reference: those of their obsm, or, where it keeps a PCA, projected from expression.

One rule for an AnnData in memory and for files: obsm is taken where it is there and can come from the reference's
space. Else the cells are projected, if the reference can do that, and else they are refused.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fractal.annotate.bundle import Bundle
from fractal.annotate.projection import Expression, in_memory, on_disk
from fractal.base.cli import InputError
from fractal.base.storage import Place
from fractal.data.cells import Cells, cells_of_file, has_obsm, is_h5ad
from fractal.data.h5ad import check_embedding, open_h5ad
from fractal.data.vectors import CHUNK


@dataclass(frozen=True)
class Origin:
    """What is said of the vectors: where they come from, and what is odd about them, each a line or ""."""

    vectors: str
    warning: str
    projected: bool = False


def vectors_of(bundle: Bundle, adata: Any, use_rep: str | None, force: bool) -> tuple[np.ndarray, Origin]:
    """The cells of an AnnData -> (n, dim) float32. `force`: obsm is taken though it is of another space.

    Raises InputError where there is neither a fitting obsm nor anything to project.
    """
    key = use_rep or bundle.use_rep
    there = adata.X if key == "X" and "X" not in adata.obsm else adata.obsm.get(key)
    problem = lacking(there, key, bundle.adapter.dim)
    way = f"it has {', '.join(adata.obsm) or 'nothing'}. New cells must come through the embedding of the reference's"
    if not problem:
        check_embedding(there, f"obsm '{key}'")
        vectors = np.ascontiguousarray(there, np.float32)
        odd, certain = bundle.space_problem(vectors) or ("", False)
        if force or not certain:
            return vectors, Origin(f"obsm '{key}'", odd)
        problem, way = f"obsm '{key}': {odd}", "force=True goes on"
    expression = in_memory(adata, bundle.projection.layer) if bundle.projection and key == bundle.use_rep else None
    if expression is None:
        raise InputError(f"{problem}; {way}")
    rows, origin = project(bundle, expression, problem, force)
    return rows(slice(0, adata.n_obs)), origin


@contextmanager
def open_query(bundle: Bundle, path: Place, use_rep: str | None, force: bool) -> Iterator[tuple[Cells, Origin]]:
    """The cells of a file, streamed. Raises InputError as `vectors_of` and `Cells.open` do."""
    key, dim = use_rep or bundle.use_rep, bundle.adapter.dim
    with ExitStack() as stack:
        problem, expression = "", None
        if is_h5ad(path) and bundle.projection and key == bundle.use_rep:
            file = stack.enter_context(open_h5ad(path))
            expression = on_disk(file, path, bundle.projection.layer)
            problem = lacking(file.get("obsm", {}).get(key), key, dim) if expression else ""
        if not problem:
            source = stack.enter_context(Cells.open(path, key, dim))
            _, chunk = next(iter(source.chunks(CHUNK)))
            odd, certain = bundle.space_problem(chunk) or ("", False)
            if force or not certain:
                yield source, Origin(f"obsm '{key}'" if has_obsm(path) else "", odd)
                return
            problem = f"obsm '{key}': {odd}" if expression else odd
        if expression is None:
            raise InputError(f"{path}: {problem}; name the right vectors with --obsm, or go on with --force")
        rows, origin = project(bundle, expression, problem, force)
        shape = (expression.num_cells, dim)
        yield cells_of_file(file, path, shape, np.float32, rows), origin


def tell(origin: Origin, path: Place) -> None:
    """Print where vectors that are not the file's own come from, and what is odd about them."""
    if origin.projected:
        print(f"{path}: {origin.vectors}")
    if origin.warning:
        print(f"warning: {path}: {origin.warning}", file=sys.stderr)


def lacking(array: Any, key: str, dim: int) -> str:
    """Why an array of obsm, or None, can't be the vectors of the reference; or ""."""
    if array is None:
        return f"obsm has no '{key}', which the reference was made with"
    shape: tuple[int, ...] = getattr(array, "shape", ())
    if len(shape) != 2 or shape[1] != dim:
        return f"obsm '{key}' has {shape[-1] if shape else 'no'} numbers a cell, the reference takes {dim}"
    return ""


def project(
    bundle: Bundle, expression: Expression, problem: str, force: bool
) -> tuple[Callable[[slice], np.ndarray], Origin]:
    """-> a function rows -> (m, dim) float32. Raises InputError where the expression does not fit either."""
    assert bundle.projection is not None
    rows, line = bundle.projection.components(expression, force)
    odd, certain = bundle.space_problem(rows(slice(0, min(CHUNK, expression.num_cells)))) or ("", False)
    if certain and not force:
        raise InputError(f"{problem}; {line}; but {odd}. Is the expression normalised as the reference's?")
    return rows, Origin(f"{problem}; {line}", odd, projected=True)
