"""Which cells a search may return: a condition on their columns, and terms of the hierarchy.

A condition is written as in Python, `tissue == 'lung' and donor != 'd7'`, but not run as such: it is parsed, and only
comparisons, `in`, `and`, `or`, `not`, names, text and numbers are taken.
"""

import ast
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fractal.base.errors import InputError
from fractal.data.parquet import CELL_ID
from fractal.hierarchy.ontology import CL_SLIM, build_hierarchy, load_graph
from fractal.hierarchy.tree import at_or_below
from fractal.search.index import Index

COMPARE: dict[type[ast.cmpop], Callable[..., pa.Array]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
HOW = "write it as tissue == 'lung' and age >= 40, or tissue in ['lung', 'blood'], or column('a name') == 'x'"
UNREADABLE = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)  # what Python's parser may raise
Constant = str | int | float | bool


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
        tree = ast.parse(condition.strip(), mode="eval").body
    except UNREADABLE as error:
        raise InputError(f"--where {condition}: can't be read; {HOW}") from error
    batches = (part.batch(i) for part in index.parts for i in range(len(part.batches)))
    try:
        return np.concatenate([evaluate(tree, batch, index) for batch in batches])
    except (pa.ArrowException, TypeError, RecursionError) as error:
        raise InputError(f"--where {condition}: compares what can't be compared ({error}); {HOW}") from error


def evaluate(node: ast.expr, batch: pa.RecordBatch, index: Index) -> np.ndarray:
    """A node of a condition -> (m,) bool for the cells of a batch."""
    match node:
        case ast.BoolOp(op, values):
            both = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return both.reduce([evaluate(value, batch, index) for value in values])
        case ast.UnaryOp(ast.Not(), operand):
            return ~evaluate(operand, batch, index)
        case ast.Compare(left, [op], [right]):
            return compare(op, column_of(left, batch, index), constant_of(right), node)
    raise InputError(f"--where {ast.unparse(node)}: is not taken; {HOW}")


def compare(op: ast.cmpop, values: pa.Array, constant: Constant | list[Constant], node: ast.expr) -> np.ndarray:
    """One comparison of a column, (m,) bool; False where there is no value. Codes are compared by what they mean."""
    coded = pa.types.is_dictionary(values.type)
    distinct = values.dictionary if coded else values
    if isinstance(op, ast.In | ast.NotIn):
        if not isinstance(constant, list):
            raise InputError(f"--where: 'in' takes a list, such as ['lung', 'blood']; {HOW}")
        passes = pc.is_in(distinct, pa.array(constant, distinct.type))
        if isinstance(op, ast.NotIn):
            passes = pc.and_(pc.invert(passes), pc.is_valid(distinct))
    elif type(op) in COMPARE and not isinstance(constant, list):
        passes = COMPARE[type(op)](distinct, pa.scalar(constant))
    else:
        raise InputError(f"--where {ast.unparse(node)}: is not taken; {HOW}")
    passes = passes.take(values.indices) if coded else passes
    return pc.fill_null(passes, False).to_numpy(zero_copy_only=False)


def column_of(node: ast.expr, batch: pa.RecordBatch, index: Index) -> pa.Array:
    """`tissue`, `cell.type`, or `column('any name')` of a batch; null where it has none."""
    match node:
        case ast.Call(ast.Name("column"), [argument], []):
            name = constant_of(argument)
        case ast.Name() | ast.Attribute():
            name = ast.unparse(node)
        case _:
            raise InputError(f"--where {ast.unparse(node)}: is no column's name; {HOW}")
    if name != CELL_ID:
        index.check_columns([str(name)])
    return batch[name] if name in batch.schema.names else pa.nulls(len(batch), index.types.get(str(name), pa.string()))


def constant_of(node: ast.expr) -> Constant | list[Constant]:
    """A text, a number, or a list of them."""
    try:
        value = ast.literal_eval(node)
    except UNREADABLE:
        value = None
    several = isinstance(value, list | tuple | set)
    values = list(value) if several else [value]
    if not all(isinstance(one, str | int | float) for one in values):
        raise InputError(f"--where {ast.unparse(node)}: is neither text (in quotes) nor a number; {HOW}")
    return values if several else value


def only_mask(index: Index, terms: Sequence[str], obo: str | Path) -> np.ndarray:
    """The cells of these labels, of any level, and of these CL terms and all below them -> (len(index),) bool.

    Raises InputError for a label that no cell has, and for a term that the ontology does not know.
    """
    levels = [name for name in index.columns if re.match("level[0-9]", name)]
    if not levels:
        raise InputError(f"{index.folder.path}: has no columns of levels, so --only can't be applied; use --where")
    wanted, ids = {level: set(terms) for level in levels}, [term for term in terms if term.startswith("CL:")]
    if ids:
        graph = load_graph(obo)
        if unknown := [term for term in ids if term not in graph]:
            raise InputError(f"{unknown[0]}: not a term of CL {graph.graph['release']}; write it as CL:0000084")
        below = at_or_below(graph, ids)
        names = sorted(index.counts(levels[-1]))
        rows = build_hierarchy(names, graph, "other")
        wanted[levels[-1]] |= {name for name, row in zip(names, rows, strict=True) if row.cl_id in below}
    mask, present = np.zeros(len(index), bool), set(ids)
    for level in levels:
        for values, codes, cells in index.coded(level):
            chosen = np.array([value in wanted[level] for value in values] + [False], bool)  # the last: of no value
            mask[cells] |= chosen[codes]
            present.update(value for value in values if value in wanted[level])
    if missing := [term for term in terms if term not in present]:
        raise InputError(f"--only {missing[0]}: no cell of {index.folder.path} has this label, at any level")
    if not mask.any():
        raise InputError(f"--only {' '.join(terms)}: no cell of {index.folder.path} is one, or below one")
    return mask
