"""Expression, cells x genes, as a file or an AnnData holds it: read by rows, as counts or what was made of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from fractal.base.errors import InputError, needs
from fractal.base.storage import Place
from fractal.data.h5ad import reading_h5ad

NUMBERS = 2**24  # of a piece of expression: 64 MB where it is dense
EXAMINED = 2_000  # first cells, to see what kind of numbers a matrix holds
SAME_SUM = 0.01  # relative: sums of expm1(x) that differ by less are one total that all cells were scaled to
COUNTS = ("counts", "X", "raw")  # where counts are looked for, in this order

# What kind of numbers an expression matrix holds.
KINDS = {
    "counts": "whole numbers, as counts are",
    "normalised": "numbers from 0 up that are not whole, as normalised ones are",
    "scaled": "numbers below 0, as scaled ones are",
}


@dataclass(frozen=True)
class Expression:
    """Cells x genes, dense or sparse, read by rows."""

    where: str  # the file and the matrix, for errors
    num_cells: int
    var: Any  # pandas.DataFrame, a row per gene; its index are the names
    rows: Callable[[slice], Any]  # -> (m, genes), numpy or scipy.sparse
    by_column: bool = False  # stored by genes: reading rows passes over the whole matrix

    def chunks(self, start: int, stop: int) -> Iterator[tuple[slice, Any]]:
        """Yield (rows, matrix (m, genes)), at most NUMBERS numbers at a time, 16 times as many of a matrix by genes."""
        size = max(1, NUMBERS * (16 if self.by_column else 1) // max(1, len(self.var)))
        for first in range(start, stop, size):
            batch = slice(first, min(first + size, stop))
            yield batch, self.rows(batch)


def kind_of(x: Any) -> str:
    """Which of KINDS a matrix holds."""
    values = x.data if sp.issparse(x) else np.asarray(x)
    if (values < 0).any():
        return "scaled"
    return "normalised" if (values % 1 != 0).any() else "counts"


def gene_names(var: Any, genes: np.ndarray) -> tuple[np.ndarray, str]:
    """The names of new cells' genes, and where they stand: "" for var_names, or the column of var that fits better.

    CELLxGENE has Ensembl ids as var_names, and symbols as var 'feature_name'.
    """
    wanted = set(genes.tolist())
    best, where = np.asarray(var.index).astype(str), ""
    for key in var.columns:
        if var[key].dtype.kind == "O":  # text, also as categories
            names = np.asarray(var[key]).astype(str)
            if len(wanted & set(names)) > len(wanted & set(best)):
                best, where = names, f" by var '{key}'"
    return best, where


# --- counts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How numbers give counts, up to a factor per cell: as they are, or by expm1."""

    logged: bool
    message: str


def scale_of(x: Any) -> Scale | None:
    """What the first cells of a matrix, (m, genes), are; None where counts can't be had from it."""
    kind = kind_of(x)
    if kind == "counts":
        return Scale(False, "counts")
    if kind == "normalised":
        with np.errstate(over="ignore"):
            sums = np.asarray((x.expm1() if sp.issparse(x) else np.expm1(x)).sum(1, dtype=np.float64)).reshape(-1)
        sums = sums[sums > 0]
        total = float(np.median(sums)) if len(sums) else 0.0
        if total and np.isfinite(total) and (np.abs(sums / total - 1) < SAME_SUM).mean() > 0.99:
            return Scale(True, f"log-normalised already, to {total:,.0f} a cell")
    return None


def as_counts(x: Any, scale: Scale, where: str, first: int) -> sp.csr_matrix:
    """A matrix (m, genes) whose first row is cell `first` -> its counts, up to a factor per cell.

    Raises InputError for numbers that are not of this scale: below 0, not finite, or, of counts, not whole.
    """
    x = sp.csr_matrix(x)
    bad = ~np.isfinite(x.data) | (x.data < 0)
    if not scale.logged:
        bad |= x.data % 1 != 0
    if bad.any():
        cell = first + int(np.searchsorted(x.indptr, np.flatnonzero(bad)[0], "right")) - 1
        raise InputError(f"{where}: cell {cell} holds {x.data[bad][0]:g}, the first cells hold {scale.message}")
    return x.expm1() if scale.logged else x


def choose_counts(candidates: list[Expression], where: str) -> tuple[Expression, Scale]:
    """Of layers['counts'], X and raw the first that holds counts, else the first that holds log-normalised ones.

    Raises InputError where none does.
    """
    known: list[tuple[Expression, Scale]] = []
    others: list[str] = []
    for expression in candidates:
        x = next((part for _, part in expression.chunks(0, min(EXAMINED, expression.num_cells))), None)
        if x is None or not (x.nnz if sp.issparse(x) else np.any(x)):
            others.append(f"{expression.where} is empty")
        elif scale := scale_of(x):
            known.append((expression, scale))
        else:
            others.append(f"{expression.where} holds {KINDS[kind_of(x)]}, of another total in each cell")
    if not known:
        raise InputError(
            f"{where}: has no counts: {'; '.join(others) or 'no X, no raw'}; bring counts in layers['counts']"
        )
    return min(known, key=lambda pair: pair[1].logged)


# --- where it lies ---------------------------------------------------------------------------------------------------


def in_memory(adata: Any, layer: str = "") -> Expression | None:
    """X, a layer, or "raw" of an AnnData, which may be backed; None where it has none."""
    holder = adata.raw if layer == "raw" else adata
    matrix = None if holder is None else holder.X if layer in ("", "raw") else adata.layers.get(layer)
    if matrix is None:
        return None
    if sp.issparse(matrix):
        matrix = matrix.tocsr()
    where = "raw" if layer == "raw" else f"layer '{layer}'" if layer else "X"
    return Expression(where, adata.n_obs, holder.var, matrix.__getitem__)


def on_disk(file: Any, path: Place, layer: str = "") -> Expression | None:
    """X, a layer, or "raw" of an open .h5ad or .zarr; None where it has none. Rows are read as they are asked for."""
    io = needs("anndata", "h5ad").io
    name = {"": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    matrix = file.get(name)
    if matrix is None:
        return None
    encoding = str(matrix.attrs.get("encoding-type", ""))
    with reading_h5ad(path):
        var = io.read_elem(file["raw/var" if layer == "raw" else "var"])
        if encoding == "csc_matrix":
            shape = tuple(int(n) for n in matrix.attrs["shape"])
            where = f"{path}: {name}"
            return Expression(where, shape[0], var, lambda rows: csc_rows(matrix, shape, rows, path), by_column=True)
        if encoding.endswith("_matrix"):
            matrix = io.sparse_dataset(matrix)
        elif not hasattr(matrix, "shape"):
            return None

    def read(rows: slice) -> Any:
        with reading_h5ad(path):
            return matrix[rows]

    return Expression(f"{path}: {name}", matrix.shape[0], var, read)


def csc_rows(group: Any, shape: tuple[int, ...], rows: slice, path: Place) -> sp.csr_matrix:
    """Rows of a matrix that is stored by columns -> CSR; one pass over it, in pieces of NUMBERS numbers."""
    with reading_h5ad(path):
        indptr = group["indptr"][:]
        found = []
        for start in range(0, int(indptr[-1]), NUMBERS):
            piece = slice(start, min(start + NUMBERS, int(indptr[-1])))
            index = group["indices"][piece]
            keep = np.flatnonzero((index >= rows.start) & (index < rows.stop))
            column = np.searchsorted(indptr, start + keep, "right") - 1
            found.append((group["data"][piece][keep], index[keep] - rows.start, column))
    data, row, column = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else ([], [], [])
    return sp.coo_matrix((data, (row, column)), shape=(rows.stop - rows.start, shape[1])).tocsr()


def counts_in_memory(adata: Any, where: str = "adata") -> tuple[Expression, Scale]:
    """The counts of an AnnData. Raises InputError where it has none, see `choose_counts`."""
    found = [in_memory(adata, layer) for layer in ("counts", "", "raw")]
    return choose_counts([expression for expression in found if expression], where)


def counts_on_disk(file: Any, path: Place) -> tuple[Expression, Scale]:
    """The counts of an open .h5ad or .zarr. Raises InputError where it has none, see `choose_counts`."""
    found = [on_disk(file, path, layer) for layer in ("counts", "", "raw")]
    return choose_counts([expression for expression in found if expression], str(path))
