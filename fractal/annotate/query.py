"""New cells for a reference: their vectors in obsm, or, where it keeps a PCA or knows an encoder, made from expression.

One rule for an AnnData in memory and for files: obsm is taken where it is there and can come from the reference's
space. Else the cells are projected or encoded, if the reference can do that, and else they are refused.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fractal.annotate.projection import Projection
from fractal.annotate.space import RowCheck, space_problem
from fractal.base.errors import InputError
from fractal.data.cells import Cells, cells_of_anndata, cells_of_file, has_obs, has_obsm
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
        """Open new cells, of an AnnData or a path. Raises InputError where there is nothing to take or to project.

        `force` takes vectors that can't come from the reference's embedding.
        """
        key, in_memory = use_rep or self.use_rep, hasattr(cells, "obsm")
        several = in_memory or has_obsm(cells)
        with ExitStack() as stack:
            problem, expression, parts, matrix = "", None, None, None
            if self.projection and key == self.use_rep and (in_memory or has_obs(cells)):
                parts, matrix = stack.enter_context(open_expression(cells))
                if problem := lacking(parts.get("obsm", {}).get(key), key, self.dim):
                    expression = self.projection.find(matrix)
            if expression is None:
                source = stack.enter_context(Cells.open(cells, key, self.dim))
                _, chunk = next(iter(source.chunks(CHUNK)))
                odd, certain = self.problem(chunk)
                if force or not certain:
                    yield source, Origin(f"obsm '{key}'" if several else "", odd)
                    return
                problem = f"obsm '{key}': {odd}" if several else odd
                if self.projection and matrix:
                    with suppress(InputError):  # no counts: then the first problem is the one to tell
                        expression = self.projection.find(matrix)
            if expression is None:
                where, way = "adata" if in_memory else cells, "with --use-rep, or go on with --force"
                raise InputError(f"{where}: {problem}; name the right vectors {way}")
            rows, origin = self.projected(expression, problem, force)
            shape = (expression.num_cells, self.dim)
            made = cells_of_anndata if in_memory else cells_of_file
            yield made(cells if in_memory else parts, expression.path, shape, np.float32, rows), origin

    def projected(
        self, expression: Expression, problem: str, force: bool
    ) -> tuple[Callable[[slice], np.ndarray], Origin]:
        """-> a function: rows -> vectors (m, dim). Raises InputError where the expression does not fit either."""
        assert self.projection is not None
        rows, line = self.projection.components(expression, force)
        odd, certain = self.problem(rows(slice(0, min(CHUNK, expression.num_cells))))
        if certain and not force:
            raise InputError(f"{problem}; {line}; but {odd}. Is the expression normalised as the reference's?")
        return rows, Origin(f"{problem}; {line}", odd, projected=True)

    def problem(self, vectors: np.ndarray) -> tuple[str, bool]:
        """Why vectors (n, dim) may not be of the reference's space, and whether that is certain; ("", False) if not."""
        return space_problem(vectors[usable(vectors)], self.vectors) or ("", False)

    def row_check(self, num_rows: int) -> RowCheck:
        """To look at all rows of a query, as they come."""
        return RowCheck(self.vectors, num_rows)

    @contextmanager
    def printed(self, cells: Any, use_rep: str | None, force: bool) -> Iterator[Cells]:
        """As `open`; a line is printed where vectors are projected, or a warning about them."""
        with self.open(cells, use_rep, force) as (source, origin):
            tell(origin, cells)
            yield source


def tell(origin: Origin, path: object) -> None:
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
