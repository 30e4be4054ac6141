"""New cells for a reference: their vectors in obsm, or, where it keeps a PCA or knows an encoder, made from expression.

One rule for an AnnData in memory and for files: obsm is taken where it is there and can come from the reference's
space. Else the cells are projected or encoded, if the reference can do that, and else they are refused.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fractal.annotate.projection import Projection
from fractal.annotate.space import RowCheck, space_problem
from fractal.base.errors import InputError, warn
from fractal.data.cells import Cells, Chunk, anndata_cells, has_obs, has_obsm
from fractal.data.encoder import EncoderLink
from fractal.data.expression import Expression, open_expression
from fractal.data.vectors import CHUNK, usable


@dataclass(frozen=True)
class Origin:
    """Where vectors come from, and a warning about them, each a line or ""."""

    vectors: str
    warning: str
    projected: bool = False


@dataclass(frozen=True)
class Intake:
    """What a reference takes: vectors (dim,) of obsm[use_rep] like those of its cells, or expression to project."""

    use_rep: str
    dim: int
    vectors: np.ndarray  # (m, dim) float32, of the reference's cells
    projection: Projection | EncoderLink | None = None

    @contextmanager
    def open(self, cells: Any, use_rep: str | None, force: bool) -> Iterator[tuple[Cells, Origin]]:
        """Open new cells, of an AnnData or a path; `force` takes vectors that can't be of the reference's embedding.

        Prints how vectors are projected, and warns of what is unusual about them. Raises InputError where nothing can
        be taken or projected.
        """
        key, in_memory = use_rep or self.use_rep, hasattr(cells, "obsm")
        several = in_memory or has_obsm(cells)
        with ExitStack() as stack:
            problem, expression, file, matrix = "", None, None, None
            if self.projection and key == self.use_rep and (in_memory or has_obs(cells)):
                file, matrix = stack.enter_context(open_expression(cells))
                if problem := lacking(file.get("obsm", {}).get(key), key, self.dim):
                    expression = self.projection.find(matrix)
            if expression is None:
                source = stack.enter_context(Cells.open(cells, key, self.dim))
                _, chunk = next(iter(source.chunks(CHUNK)))
                warning, certain = self.problem(chunk)
                if force or not certain:
                    if warning:
                        warn(f"{source.path}: {warning}")
                    yield source, Origin(f"obsm '{key}'" if several else "", warning)
                    return
                problem = f"obsm '{key}': {warning}" if several else warning
                if self.projection and matrix:
                    with suppress(InputError):  # no counts: then the first problem is the one to tell
                        expression = self.projection.find(matrix)
            if expression is None:
                where, way = "adata" if in_memory else cells, "with --use-rep, or go on with --force"
                raise InputError(f"{where}: {problem}; name the right vectors {way}")
            rows, origin = self.projected(expression, problem, force)
            shape = (expression.num_cells, self.dim)
            source = anndata_cells(file, expression.path, shape, np.float32, rows)
            print(f"{source.path}: {origin.vectors}")
            if origin.warning:
                warn(f"{source.path}: {origin.warning}")
            yield source, origin

    def projected(
        self, expression: Expression, problem: str, force: bool
    ) -> tuple[Callable[[slice], np.ndarray], Origin]:
        """-> a function: rows -> vectors (m, dim). Raises InputError where the expression does not fit either."""
        assert self.projection is not None
        rows, line = self.projection.components(expression, force)
        warning, certain = self.problem(rows(slice(0, min(CHUNK, expression.num_cells))))
        if certain and not force:
            raise InputError(f"{problem}; {line}; but {warning}. Is the expression normalised as the reference's?")
        return rows, Origin(f"{problem}; {line}", warning, projected=True)

    def problem(self, vectors: np.ndarray) -> tuple[str, bool]:
        """Why vectors (n, dim) may not be of the reference's space, and whether that is certain; ("", False) if not."""
        return space_problem(vectors[usable(vectors)], self.vectors) or ("", False)

    @contextmanager
    def cells(self, cells: Any, use_rep: str | None, force: bool) -> Iterator[Cells]:
        """As `open`, for those who need not know where the vectors come from, and `checked`."""
        with self.open(cells, use_rep, force) as (source, _):
            yield self.checked(source)

    def checked(self, source: Cells) -> Cells:
        """The same cells; warns, when all are read, of rows that have nothing in common with the reference.

        `annotate` does so for itself.
        """

        def read(size: int) -> Iterator[Chunk]:
            check = RowCheck(self.vectors, source.num_rows)
            for columns, vectors in source.read(size):
                check.add(vectors)
                yield columns, vectors
            if problem := check.problem():
                warn(f"{source.path}: {problem}")

        return replace(source, read=read)


def lacking(array: Any, key: str, dim: int) -> str:
    """Why an array of obsm, or None, can't be the vectors of the reference; or ""."""
    if array is None:
        return f"obsm has no '{key}', which the reference was made with"
    shape: tuple[int, ...] = getattr(array, "shape", ())
    if len(shape) != 2 or shape[1] != dim:
        return f"obsm '{key}' has {shape[-1] if shape else 'no'} numbers a cell, the reference takes {dim}"
    return ""
