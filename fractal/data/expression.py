"""Expression, cells x genes, as a file or an AnnData holds it: read by rows, as counts or what was made of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import scipy.sparse as sp
from tqdm.auto import tqdm

from fractal.base.errors import InputError
from fractal.base.storage import Location
from fractal.data.h5ad import InMemory, open_anndata, reading_h5ad, rows_of

NUMBERS = 2**24  # of a piece of expression: 64 MB where it is dense
CSC_ROWS = 32_768  # of a matrix stored by genes, read in one pass over it; 500 MB at 2,000 numbers a cell
EXAMINED = 2_000  # first cells, to see what kind of numbers a matrix holds
SAME_SUM = 0.01  # relative: sums of expm1(x) that differ by less are one total that all cells were scaled to
COUNTS = ("counts", "", "raw")  # layers where counts are looked for, in this order; "" is X

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
    path: Location  # as Cells has it
    num_cells: int
    var: Any  # pandas.DataFrame, a row per gene; its index are the names
    rows: Callable[[slice], Any]  # -> (m, genes), numpy or scipy.sparse
    scale: str = ""  # what its numbers are, for messages; "" where it is not known that counts can be had from them
    logged: bool = False  # counts, up to a factor per cell, by expm1; else the numbers are counts

    def chunks(self, start: int, stop: int, progress: str = "") -> Iterator[tuple[slice, Any]]:
        """Yield (rows, matrix (m, genes)), at most NUMBERS numbers at a time. progress: the title of a bar."""
        size = max(1, NUMBERS // max(1, len(self.var)))
        with tqdm(total=stop - start, unit="cells", unit_scale=True, desc=progress, disable=not progress) as bar:
            for first in range(start, stop, size):
                batch = slice(first, min(first + size, stop))
                yield batch, self.rows(batch)
                bar.update(batch.stop - first)


def kind_of(x: Any) -> str:
    """Which of KINDS a matrix holds."""
    values = x.data if sp.issparse(x) else np.asarray(x)
    if (values < 0).any():
        return "scaled"
    return "normalised" if (values % 1 != 0).any() else "counts"


def as_texts(names: Any) -> np.ndarray:
    """(n,) objects of text; in a numpy array of text each would take as much memory as the longest."""
    return np.array([str(name) for name in names], object)


def gene_names(var: Any, genes: np.ndarray) -> tuple[np.ndarray, str]:
    """The names of new cells' genes, and where they stand: "" for var_names, or the column of var that fits better.

    CELLxGENE has Ensembl ids as var_names, and symbols as var 'feature_name'.
    """
    wanted = set(genes.tolist())
    best, where = as_texts(var.index), ""
    for key in var.columns:
        if var[key].dtype.kind == "O":  # text, also as categories
            names = as_texts(var[key])
            if len(wanted & set(names)) > len(wanted & set(best)):
                best, where = names, f" by var '{key}'"
    return best, where


# --- counts ----------------------------------------------------------------------------------------------------------


def common_total(x: Any) -> float:
    """What the counts of all cells, x (m, genes), were scaled to before log1p; 0 where it is not one number."""
    with np.errstate(over="ignore"):
        sums = np.asarray((x.expm1() if sp.issparse(x) else np.expm1(x)).sum(1, dtype=np.float64)).reshape(-1)
    sums = sums[sums > 0]
    total = float(np.median(sums)) if len(sums) else 0.0
    is_common = total and np.isfinite(total) and (np.abs(sums / total - 1) < SAME_SUM).mean() > 0.99
    return total if is_common else 0.0


def as_counts(x: Any, expression: Expression, first: int) -> sp.csr_matrix:
    """A part (m, genes) of the expression, from cell `first` on -> its counts, up to a factor per cell.

    Raises InputError for numbers that are not of its scale: below 0, not finite, or, of counts, not whole.
    """
    x = sp.csr_matrix(x)
    bad = ~np.isfinite(x.data) | (x.data < 0)
    if not expression.logged:
        bad |= x.data % 1 != 0
    if bad.any():
        cell = first + int(np.searchsorted(x.indptr, np.flatnonzero(bad)[0], "right")) - 1
        shown = f"cell {cell} holds {x.data[bad][0]:g}, the first cells hold {expression.scale}"
        raise InputError(f"{expression.where}: {shown}")
    return x.expm1() if expression.logged else x


def choose_counts(matrix: Callable[[str], Expression | None], where: object) -> Expression:
    """Of layers['counts'], X and raw the first that holds counts, else the first of log-normalised ones.

    The result has its scale. matrix: of `open_expression`. Raises InputError where none does.
    """
    known, others = list[Expression](), list[str]()
    for expression in filter(None, map(matrix, COUNTS)):
        x = next((part for _, part in expression.chunks(0, min(EXAMINED, expression.num_cells))), None)
        if x is None or not (x.nnz if sp.issparse(x) else np.any(x)):
            others.append(f"{expression.where} is empty")
            continue
        kind = kind_of(x)
        if kind == "counts":
            known.append(replace(expression, scale=kind))
        elif kind == "normalised" and (total := common_total(x)):
            known.append(replace(expression, scale=f"log-normalised already, to {total:,.0f} a cell", logged=True))
        else:
            what = KINDS[kind] + (", of no common total" if kind == "normalised" else "")
            is_finite = np.isfinite(x.data if sp.issparse(x) else x).all()
            others.append(f"{expression.where} holds {what if is_finite else 'NaN or infinity'}")
    if not known:
        reasons = "; ".join(others) or "no X, no raw"
        raise InputError(f"{where}: has no counts: {reasons}; bring counts in layers['counts']")
    return min(known, key=lambda expression: expression.logged)


# --- where it lies ---------------------------------------------------------------------------------------------------


@contextmanager
def open_expression(cells: Any) -> Iterator[tuple[Any, Callable[[str], Expression | None]]]:
    """An AnnData, or the path of an .h5ad or .zarr -> what `open_anndata` gives, and a function: layer -> expression.

    Layer "" is X, "raw" that of AnnData.raw; the function gives None for one that is not there.
    """
    with open_anndata(cells) as (file, path):
        yield file, partial(expression_of, file, path)


def expression_of(file: Any, path: Location, layer: str = "") -> Expression | None:
    """A layer of `open_anndata`, whose rows are read as they are asked for."""
    from anndata import io  # half a second

    matrix = file.get({"": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}"))
    if matrix is None:
        return None
    in_memory = isinstance(file, InMemory)
    name = "raw" if layer == "raw" else f"layer '{layer}'" if layer else "X"
    where = name if in_memory else f"{path}: {name}"
    with reading_h5ad(path):
        var = file["raw/var" if layer == "raw" else "var"]
        if sp.issparse(matrix):
            matrix = matrix.tocsr()
        elif not in_memory:
            var, encoding = io.read_elem(var), str(matrix.attrs.get("encoding-type", ""))
            if encoding == "csc_matrix":
                num_cells, num_genes = map(int, matrix.attrs["shape"])
                rows = rows_by_columns(matrix, (num_cells, num_genes), path)
                return Expression(where, path, num_cells, var, rows)
            if encoding.endswith("_matrix"):
                matrix = io.sparse_dataset(matrix)
        if not hasattr(matrix, "shape"):
            return None
    return Expression(where, path, matrix.shape[0], var, rows_of(matrix, path))


def rows_by_columns(group: Any, shape: tuple[int, int], path: Location) -> Callable[[slice], sp.csr_matrix]:
    """Rows of a matrix stored by genes: a pass over it gives CSC_ROWS rows, which are kept for the next calls."""

    @lru_cache(maxsize=1)
    def block(first: int) -> sp.csr_matrix:
        stop = min(first + CSC_ROWS, shape[0])
        with reading_h5ad(path):
            indptr, parts = group["indptr"][:], []
            for at in range(0, int(indptr[-1]), NUMBERS):
                piece = slice(at, min(at + NUMBERS, int(indptr[-1])))
                index = group["indices"][piece]
                keep = np.flatnonzero((index >= first) & (index < stop))
                of_gene = np.searchsorted(indptr, at + keep, "right") - 1
                parts.append((group["data"][piece][keep], index[keep] - first, of_gene))
        if not parts:
            return sp.csr_matrix((stop - first, shape[1]))
        data, row, column = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return sp.coo_matrix((data, (row, column)), shape=(stop - first, shape[1])).tocsr()

    def rows(batch: slice) -> sp.csr_matrix:
        firsts = range(batch.start // CSC_ROWS * CSC_ROWS, batch.stop, CSC_ROWS)
        parts = [block(first)[max(0, batch.start - first) : batch.stop - first] for first in firsts]
        return sp.vstack(parts, format="csr")

    return rows
