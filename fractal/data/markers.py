"""Genes that set groups of cells apart, so that a person can check what the groups were called.

Welch's t-test of the cells of a group against all other cells, on expression scaled to 10,000 a cell and log1p, as
scanpy.tl.rank_genes_groups(method="t-test") ranks genes. No p-value is given: the groups were often made from the
same expression, and cells of one sample are no independent draws.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.stats import ttest_ind_from_stats

from fractal.data.expression import Expression, as_counts, as_texts

TOTAL = 10_000  # counts a cell, after scaling
SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name")  # of var, as CELLxGENE and scanpy have them
LEAST = 3  # cells of a group; fewer have no variance to speak of


class Moments:
    """Of groups of cells: how many, per gene the sums of expression and of its squares, and the cells with a count.

    cells (groups,) int64; sums (3, groups, genes) float64.
    """

    def __init__(self, num_groups: int, num_genes: int) -> None:
        self.cells, self.sums = np.zeros(num_groups, np.int64), np.zeros((3, num_groups, num_genes))

    def add(self, x: sp.csr_matrix, groups: np.ndarray) -> None:
        """x (n, genes) of cells of these groups (n,)."""
        shape = (len(self.cells), len(groups))
        member = sp.csr_matrix((np.ones(len(groups)), (groups, np.arange(len(groups)))), shape)
        self.cells += np.bincount(groups, minlength=len(self.cells))
        for sums, values in zip(self.sums, (x, x.power(2), x.sign()), strict=True):
            sums += (member @ values).toarray()

    def compare(self, group: int) -> pd.DataFrame:
        """A row per gene, with the numbers of `markers`: a group against all other cells, those of none too.

        The score of a gene without variance is 0.
        """
        own, sides, shares = np.arange(len(self.cells)) == group, [], []
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for chosen in (own, ~own):
                n = self.cells[chosen].sum()
                total, squares, present = (sums[chosen].sum(0) for sums in self.sums)
                mean = total / n
                variance = (squares - n * mean**2) / (n - 1)
                sides.append((mean, np.sqrt(np.maximum(variance, 0)), n))
                shares.append(present / n)
            score = ttest_ind_from_stats(*sides[0], *sides[1], equal_var=False).statistic
            score = np.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)
            fold = np.log2((np.expm1(sides[0][0]) + 1e-9) / (np.expm1(sides[1][0]) + 1e-9))
        return pd.DataFrame({"score": score, "log2_fold_change": fold, "share": shares[0], "share_of_rest": shares[1]})


def log_normalised(x: Any, expression: Expression, first: int) -> sp.csr_matrix:
    """Rows (m, genes) of expression -> log1p of TOTAL a cell. Raises InputError as `as_counts` does."""
    counts = as_counts(x, expression, first).astype(np.float64)
    total = np.asarray(counts.sum(1)).reshape(-1)
    return (sp.diags_array(TOTAL / np.where(total > 0, total, 1)) @ counts).log1p().tocsr()


def symbols(var: pd.DataFrame) -> np.ndarray:
    """(genes,) objects of text, what people call the genes: var_names, or a column of symbols beside Ensembl ids.

    A gene without a symbol keeps its id.
    """
    names = as_texts(var.index)
    if np.mean([name.startswith("ENS") for name in names[:1_000]]) > 0.5:
        for column in SYMBOLS:
            if column in var:
                known = var[column].notna().to_numpy() & (as_texts(var[column]) != "")
                return np.where(known, as_texts(var[column]), names)
    return names


def markers(
    expression: Expression, codes: np.ndarray, names: Sequence[str], top: int = 10, progress: str = ""
) -> pd.DataFrame:
    """The `top` genes that each group has most clearly more of than all other cells.

    expression: of `choose_counts`; codes: (n,) int, the group of each cell, -1 for none; names: of the groups. A group
    of fewer than 3 cells, or that leaves fewer, gets no genes. progress: title of a bar; "" shows none.
    Returns a row per group and gene, the clearest first: group, gene, score (Welch's t), log2_fold_change (of mean
    expression, after expm1), share and share_of_rest (of cells with a count).
    Raises InputError for numbers that are not of the expression's scale.
    """
    genes, moments = symbols(expression.var), Moments(len(names) + 1, len(expression.var))
    for rows, x in expression.chunks(0, len(codes), progress):
        groups = np.where(codes[rows] < 0, len(names), codes[rows])  # the last row: cells of no group
        moments.add(log_normalised(x, expression, rows.start), groups)
    tables = [pd.DataFrame(columns=["group", "gene", "score", "log2_fold_change", "share", "share_of_rest"])]
    for group, name in enumerate(names):
        if min(cells := moments.cells[group], len(codes) - cells) < LEAST:
            continue
        table = pd.concat([pd.DataFrame({"group": name, "gene": genes}), moments.compare(group)], axis=1)
        tables.append(table[table["score"] > 0].nlargest(top, "score"))
    return pd.concat(tables[1:] or tables, ignore_index=True)
