"""Which cells a search may return: a condition on their columns, and terms of the hierarchy.

A condition is written as in Python, `tissue == 'lung' and donor != 'd7'`, but not run as such: it is parsed, and only
comparisons, `in`, `and`, `or`, `not`, names, text and numbers are taken.
"""

import ast
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fractal.base.errors import InputError, reason
from fractal.data.parquet import CELL_ID
from fractal.hierarchy.ontology import CL_SLIM, build_hierarchy, load_graph
from fractal.hierarchy.tree import at_or_below
from fractal.search.folder import Batch
from fractal.search.index import Index

COMPARE: dict[type[ast.cmpop], Callable[..., pa.Array]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.In: pc.is_in,
    ast.NotIn: lambda values, several: pc.invert(pc.is_in(values, several)),
}
HOW = "write it as tissue == 'lung' and age >= 40, or tissue in ['lung', 'blood'], or column('a name') == 'x'"
# what parsing and comparing raise: an integer may be too large, brackets too deep, a text no UTF-8
FAILURES = (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError, pa.ArrowException)


def mask_of(index: Index, where: str | None, only: Sequence[str], obo: str | Path = CL_SLIM) -> np.ndarray | None:
    """What both filters leave, (len(index),) bool; None without filters. Raises InputError where that is nothing."""
    masks = [where_mask(index, where)] if where else []
    masks += [only_mask(index, only, obo)] if only else []
    if not masks:
        return None
    keep = np.logical_and.reduce(masks)
    if not keep.any():
        raise InputError(f"{index.folder.path}: no cell passes the filter; ask for more")
    return keep


def where_mask(index: Index, condition: str) -> np.ndarray:
    """The cells that meet a condition -> (len(index),) bool. A cell without a value meets no comparison with it.

    Raises InputError for a condition that is no such one, and for a column that there is not.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # Python's own, of code that it would run
            tree = ast.parse(condition.strip(), mode="eval").body
        return np.concatenate([evaluate(tree, batch, index) for batch in index.batches])
    except FAILURES as error:
        raise InputError(f"--where {condition}: can't be applied ({reason(error)}); {HOW}") from error


def evaluate(node: ast.expr, batch: Batch, index: Index) -> np.ndarray:
    """A node of a condition -> (m,) bool for the cells of a batch. Raises one of FAILURES for what is none."""
    match node:
        case ast.BoolOp(op, values):
            both = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return both.reduce([evaluate(value, batch, index) for value in values])
        case ast.UnaryOp(ast.Not(), operand):
            return ~evaluate(operand, batch, index)
        case ast.Compare(left, [op], [right]) if type(op) in COMPARE:
            name = name_of(left)
            if name != CELL_ID:
                index.check_columns([name])
            values = batch.column(name, index.types.get(name))
            coded = pa.types.is_dictionary(values.type)  # codes are compared by what they mean
            distinct = values.dictionary if coded else values
            passes = COMPARE[type(op)](distinct, constant_of(right, op, distinct.type))
            passes = pc.and_(passes, pc.is_valid(distinct))
            return pc.fill_null(passes.take(values.indices) if coded else passes, False).to_numpy(False)
    raise ValueError(f"{ast.unparse(node)} is no comparison")


def name_of(node: ast.expr) -> str:
    """Of the column that `tissue`, `cell.type`, or `column('any name')` means."""
    match node:
        case ast.Call(ast.Name("column"), [ast.Constant(str(name))], []):
            return name
        case ast.Name() | ast.Attribute():
            return ast.unparse(node)
    raise ValueError(f"{ast.unparse(node)} is no column's name")


def constant_of(node: ast.expr, op: ast.cmpop, kind: pa.DataType) -> pa.Scalar | pa.Array:
    """A text or a number; after `in`, a list of them."""
    value = ast.literal_eval(node)
    several = isinstance(value, list | tuple | set)
    if several != isinstance(op, ast.In | ast.NotIn):
        raise ValueError("'in' takes a list, other comparisons take one value")
    if not all(isinstance(one, str | int | float) for one in (value if several else [value])):
        raise ValueError(f"{ast.unparse(node)} is neither text (in quotes) nor a number")
    return pa.array(list(value), kind) if several else pa.scalar(value)


def only_mask(index: Index, terms: Sequence[str], obo: str | Path) -> np.ndarray:
    """The cells of these labels, of any level, and of these CL terms and all below them -> (len(index),) bool.

    Raises InputError for a label that no cell has, and for a term that the ontology does not know.
    """
    levels = [name for name in index.columns if re.match("level[0-9]", name)]
    if not levels:
        raise InputError(f"{index.folder.path}: has no columns of levels, so --only can't be applied; use --where")
    ids = {term for term in terms if term.startswith("CL:")}
    wanted = {level: set(terms) for level in levels}
    if ids:
        graph = load_graph(obo)
        if unknown := sorted(ids - set(graph)):
            raise InputError(f"{unknown[0]}: not a term of CL {graph.graph['release']}; write it as CL:0000084")
        below, names = at_or_below(graph, ids), sorted(index.counts(levels[-1]))
        rows = build_hierarchy(names, graph, "other")
        wanted[levels[-1]] |= {name for name, row in zip(names, rows, strict=True) if row.cl_id in below}
    mask, present = np.zeros(len(index), bool), ids
    for level in levels:
        for values, codes, cells in index.coded(level):
            chosen = np.array([value in wanted[level] for value in values] + [False], bool)  # the last: of no value
            mask[cells] |= chosen[codes]
            present |= wanted[level] & set(values)
    if missing := [term for term in terms if term not in present]:
        raise InputError(f"--only {missing[0]}: no cell of {index.folder.path} has this label, at any level")
    if not mask.any():
        raise InputError(f"--only {' '.join(terms)}: no cell of {index.folder.path} is one, or below one")
    return mask
