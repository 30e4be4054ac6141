"""Which cells a search may find: a condition on their columns, and terms of the hierarchy.

A condition is written as in Python, `tissue == 'lung' and donor != 'd7'`, but not run as such: it is parsed, and only
comparisons, `in`, `and`, `or`, `not`, names, text and numbers are taken.
"""

import ast
from collections.abc import Callable, Sequence
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fractal.base.cli import InputError
from fractal.data.parquet import CELL_ID
from fractal.hierarchy.ontology import build_hierarchy, load_graph
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


def where(index: Index, condition: str) -> np.ndarray:
    """The cells that meet a condition -> (len(index),) bool. A cell without a value meets no comparison with it.

    Raises InputError for a condition that is no such one, and for a column that there is not.
    """
    try:
        tree = ast.parse(condition.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise InputError(f"--where {condition}: can't be read; {HOW}") from error
    masks = []
    for part in index.parts:
        for i in range(len(part.batches)):
            batch = part.batch(i)
            try:
                masks.append(mask_of(tree, batch, index))
            except (pa.ArrowException, TypeError, RecursionError) as error:
                raise InputError(f"--where {condition}: compares what can't be compared ({error}); {HOW}") from error
    return np.concatenate(masks)


def mask_of(node: ast.expr, batch: pa.RecordBatch, index: Index) -> np.ndarray:
    """A node of a condition -> (m,) bool for the cells of a batch."""
    if isinstance(node, ast.BoolOp):
        both = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return both.reduce([mask_of(value, batch, index) for value in node.values])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ~mask_of(node.operand, batch, index)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        name, constant, op = column_name(node.left, index), value_of(node.comparators[0]), node.ops[0]
        if name not in batch.schema.names:
            return np.zeros(len(batch), bool)
        values = batch[name]
        kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        if isinstance(op, ast.In | ast.NotIn):
            if not isinstance(constant, list):
                raise InputError(f"--where: 'in' takes a list, such as ['lung', 'blood']; {HOW}")
            found = compared(values, lambda some: pc.is_in(some, pa.array(constant, kind)))
            # as for !=, a cell without a value is not among the others
            return found if isinstance(op, ast.In) else ~found & ~values.is_null().to_numpy(zero_copy_only=False)
        if type(op) in COMPARE and not isinstance(constant, list):
            return compared(values, lambda some: COMPARE[type(op)](some, pa.scalar(constant)))
    raise InputError(f"--where {ast.unparse(node)}: is not taken; {HOW}")


def compared(values: pa.Array, test: Callable[[pa.Array], pa.Array]) -> np.ndarray:
    """The test of each value, (m,) bool; codes are tested by their names. No value: False."""
    if pa.types.is_dictionary(values.type):
        passes = pc.fill_null(test(values.dictionary), False).to_numpy(zero_copy_only=False)
        codes = values.indices.fill_null(len(passes)).to_numpy(zero_copy_only=False)
        return np.append(passes, False)[codes]
    return pc.fill_null(test(values), False).to_numpy(zero_copy_only=False)


def column_name(node: ast.expr, index: Index) -> str:
    """`tissue`, `cell.type`, or `column('any name')`."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "column"
        and not node.keywords
    ):
        name = value_of(node.args[0]) if len(node.args) == 1 else None
    elif isinstance(node, ast.Name | ast.Attribute):
        name = ast.unparse(node)
    else:
        raise InputError(f"--where {ast.unparse(node)}: is no column's name; {HOW}")
    there = [CELL_ID, *index.columns]
    if name not in there:
        raise InputError(f"{index.folder.path}: has no column '{name}'; it has {', '.join(there[1:]) or 'none'}")
    return str(name)


def value_of(node: ast.expr) -> str | int | float | bool | list[str | int | float | bool]:
    """A text, a number, or a list of them."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise InputError(f"--where {ast.unparse(node)}: is neither text (in quotes) nor a number; {HOW}") from error
    values = list(value) if isinstance(value, list | tuple | set) else [value]
    if not all(isinstance(one, str | int | float) for one in values):
        raise InputError(f"--where {ast.unparse(node)}: is neither text (in quotes) nor a number; {HOW}")
    return values if isinstance(value, list | tuple | set) else value


def only(index: Index, terms: Sequence[str], obo: str | Path) -> np.ndarray:
    """The cells of some labels, of any level, and of some CL terms and all below them -> (len(index),) bool.

    Raises InputError for a label that no cell has, and for a term that the ontology does not know.
    """
    levels = [name for name in index.columns if name[:5] == "level" and name[5:6].isdigit()]
    if not levels:
        raise InputError(f"{index.folder.path}: has no columns of levels, so --only can't be applied; use --where")
    ids = [term for term in terms if term.startswith("CL:")]
    finest = set(index.counts(levels[-1]))
    wanted = {term: set(levels) for term in terms if term not in ids}
    if ids:
        graph = load_graph(obo)
        if unknown := [term for term in ids if term not in graph]:
            raise InputError(f"{unknown[0]}: not a term of CL {graph.graph['release']}; write it as CL:0000084")
        below = set(ids).union(*(nx.ancestors(graph, term) for term in ids))  # edges run child -> parent
        names = sorted(finest)
        rows = build_hierarchy(names, graph, "other")
        wanted |= {name: {levels[-1]} for name, row in zip(names, rows, strict=True) if row.cl_id in below}
    mask = np.zeros(len(index), bool)
    seen: set[str] = set()
    for level in levels:
        for values, codes, cells in index.coded(level):
            chosen = np.array([value in wanted and level in wanted[value] for value in values] + [False], bool)
            mask[cells] |= chosen[codes]
            seen |= {value for value, there in zip(values, chosen, strict=False) if there}
    if missing := [term for term in terms if term not in ids and term not in seen]:
        raise InputError(f"--only {missing[0]}: no cell of {index.folder.path} has this label, at any level")
    if not mask.any():
        raise InputError(f"--only {' '.join(terms)}: no cell of {index.folder.path} is one, or below one")
    return mask
