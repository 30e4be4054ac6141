"""Genes of the explorer's page, a byte for each cell and gene: those that a person names, else the types' markers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from fractal.base.errors import InputError, warn
from fractal.data.expression import Expression, choose_counts, open_expression
from fractal.data.markers import SYMBOLS, Moments, log_normalised, symbols

MAX_GENES = 500  # 10 MB at 20,000 cells, before compression
MARKERS, OF_TYPE, FEWEST = 60, 10, 5  # markers of a page, and of a type, which has at least so many cells
MAX_READ = 200_000  # cells of a file that is read for markers without --genes: more take minutes
FAR = 2.0  # least t of a marker


@dataclass(frozen=True)
class Genes:
    """Expression of m genes in the n cells of a page."""

    names: Sequence[str]
    values: sp.csc_matrix  # (n, m) float32
    unit: str  # what the values are
    are_chosen: bool = False  # else they are all genes of the file, of which `markers` chooses

    def markers(self, types: np.ndarray) -> "Genes":
        """The genes that set each type apart, in the order of the types, codes (n,) from 1; 0 is none.

        By Welch's t of the type against all other cells, as in scanpy's rank_genes_groups; the best of each type first,
        then the second, until there are MARKERS.
        """
        moments = Moments(types.max(initial=0) + 1, len(self.names))
        moments.add(self.values.tocsr(), types)
        kinds = [k for k, n in enumerate(moments.cells) if k and FEWEST <= n < len(types)]
        t = np.array([moments.compare(kind)["score"] for kind in kinds]).reshape(len(kinds), len(self.names))
        best = np.argsort(-t, axis=1, kind="stable")[:, :OF_TYPE]
        chosen = dict[int, int]()  # gene -> the type that brought it
        for rank in range(best.shape[1]):
            for kind, gene in enumerate(best[:, rank].tolist()):
                if t[kind, gene] > FAR and len(chosen) < MARKERS:
                    chosen.setdefault(gene, kind)
        genes = sorted(chosen, key=lambda gene: chosen[gene])
        return replace(self, names=[self.names[g] for g in genes], values=self.values[:, genes], are_chosen=True)

    def encoded(self) -> tuple[list[dict[str, Any]], np.ndarray]:
        """-> name, lowest and highest value of each gene, and (m, n) uint8: 0 is the lowest, 255 the highest."""
        x = self.values.toarray().T
        low, high = x.min(1, initial=0, keepdims=True), x.max(1, initial=0, keepdims=True)
        ends = zip(self.names, low[:, 0].tolist(), high[:, 0].tolist(), strict=True)
        about = [{"name": name, "low": first, "high": last, "unit": self.unit} for name, first, last in ends]
        return about, np.rint((x - low) * (255 / np.where(high > low, high - low, 1))).astype(np.uint8)


def read_genes(source: Any, rows: np.ndarray, names: Sequence[str] | None = None) -> Genes | None:
    """The expression of cells `rows` (n,), ascending, of an AnnData or of the path of an .h5ad or .zarr.

    Values are log1p of counts, scaled to 10,000 a cell; of a file without counts those of X. Without `names` all genes,
    or None for a file without counts or of more than MAX_READ cells. Warns of names that it lacks; raises InputError
    where none of them is there.
    """
    where = source if isinstance(source, Path | str) else "adata"
    with open_expression(source) as (_, matrix):
        try:
            expression = choose_counts(matrix, where)
            if names is None:
                return read(expression, rows, find(expression, None)) if expression.num_cells <= MAX_READ else None
        except InputError:
            if names is None:
                return None
            if (as_it_is := matrix("")) is None:
                raise
            expression = as_it_is
        genes = read(expression, rows, find(expression, names))
    if missing := [name for name in names if name not in genes.names]:
        warn(f"{where}: has no gene {', '.join(missing)}")
    return replace(genes, are_chosen=True)


def read(expression: Expression, rows: np.ndarray, columns: dict[str, int]) -> Genes:
    """Of these genes and their columns; as counts where it has a scale."""
    parts = []
    for batch, x in expression.chunks(0, expression.num_cells):
        values = sp.csr_matrix(x[rows[(rows >= batch.start) & (rows < batch.stop)] - batch.start])
        if expression.scale:
            values = log_normalised(values, expression, batch.start)
        parts.append(values[:, list(columns.values())].astype(np.float32))
    unit = "log1p of counts, 10,000 a cell" if expression.scale else "as in X"
    return Genes(list(columns), sp.vstack(parts, format="csc"), unit)


def find(expression: Expression, names: Sequence[str] | None) -> dict[str, int]:
    """Genes -> columns: all, as people call them, or these, by var_names or the symbols that have more of them."""
    var = expression.var
    columns = [var.index, *(var[key] for key in SYMBOLS if key in var)] if names else [symbols(var)]
    known = [{str(name): column for column, name in reversed([*enumerate(each)])} for each in columns]
    if names is None:
        return known[0]
    wanted = dict.fromkeys(names)
    by = max(known, key=lambda columns: len(columns.keys() & wanted.keys()))
    if not by.keys() & wanted.keys() or len(wanted) > MAX_GENES:
        what = f"has no gene {', '.join([*wanted][:3])}; its genes are called {', '.join([*by][-3:])}"
        raise InputError(f"{expression.where}: {what}; --genes takes at most {MAX_GENES} of them")
    return {name: by[name] for name in wanted if name in by}


def names_of(words: Sequence[str]) -> list[str]:
    """What --genes takes: names of genes, or a text file of them."""
    path = Path(words[0])
    if len(words) > 1 or not path.is_file():
        return list(words)
    try:
        return path.read_text(encoding="utf-8").replace(",", " ").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}; --genes takes names, or a text file of them") from error
