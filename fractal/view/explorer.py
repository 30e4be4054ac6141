"""Cells and a reference -> one HTML page to look at: maps that morph, neighbours, new cells; no server, no request.

The page's code is TypeScript, in explorer/, bundled into data/explorer.html when the package is built. This module puts
the data into it: small things as JSON, arrays as base64 of gzip, byte planes apart so that gzip finds their order.

What the page computes is what torch computes on the same numbers:

- Vectors are whole numbers of 11 bits, each cell with a factor of its own, 2 bytes a number and 1.4 in the file. The
  cosines that the page ranks by are those of these numbers.
- New cells pass through the adapter's own weights (float32). Their labels are voted for by at most BANK of the
  reference's cells, balanced over the types, and calibrated anew on at most VALIDATION of its held-out cells, so the
  probabilities hold for the page's own votes. A larger reference answers a little better: `fractal annotate`.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fractal import __version__
from fractal.annotate.annotator import Annotator
from fractal.annotate.answers import CAUTION, CAUTIOUS_DEPTH, CONFIDENCE, NOVEL
from fractal.annotate.neighbours import Neighbours
from fractal.annotate.votes import NEIGHBOURS, TEMPERATURE, Voting
from fractal.base.cli import InputError
from fractal.base.files import atomic_write
from fractal.data.reorder import round_robin
from fractal.data.vectors import usable
from fractal.hierarchy.names import clean, is_missing
from fractal.hierarchy.ontology import CL_SLIM, SHIPPED, load_graph
from fractal.hierarchy.tree import Tree
from fractal.model.adapter import MEANS_SHARE, MEANS_TEMPERATURE, TAU, Adapter, FractalAdapter
from fractal.model.embedding import block_names, embed_matrix
from fractal.view.colours import UNKNOWN, colours_of
from fractal.view.maps import Maps, fractal_vectors

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame, Series

    from fractal.reference import Reference as Bundle

TEMPLATE = SHIPPED / "explorer.html"
MAX_CELLS = 20_000  # shown by default; a page of 128-d vectors then stays under 15 MB
BANK, VALIDATION = 8_000, 4_000
LARGEST = 1_023  # of a vector's numbers: 11 bits with the sign
MAX_VALUES = 200  # of a column that colours cells
DEFAULT_COLUMNS, DEFAULT_VALUES = 8, 60
FIRST, REST = "<!-- first -->", "<!-- vectors -->"  # where the template takes data: what the map needs, and the vectors


@dataclass(frozen=True)
class Cells:
    """The cells of a page, n of the `total` of their file."""

    vectors: np.ndarray  # (n, dim) float32, usable
    total: int
    names: Sequence[str] | None = None
    labels: Sequence[str] | None = None  # of the finest level; None: the reference's answers are shown
    columns: Mapping[str, Series] = field(default_factory=dict)


def check_template() -> None:
    """Raises InputError, before any work, where the page's code is missing."""
    if not TEMPLATE.is_file():
        raise InputError(
            f"{TEMPLATE}: the explorer's page is not built, which takes npm's packages once; go online and say "
            "`uv sync --reinstall-package fractal-cells`, or `pip install .`"
        )


def write_page(path: Path, bundle: Bundle, cells: Cells, layouts: np.ndarray, title: str, reference: str) -> int:
    """Write the page -> its size in bytes. Arguments as of `page`; raises InputError as it does."""
    text = page(bundle, cells, layouts, title, reference).encode()
    with atomic_write(path) as part:
        part.write_bytes(text)
    return len(text)


def page(bundle: Bundle, cells: Cells, layouts: np.ndarray, title: str, reference: str) -> str:
    """layouts (prefixes, n, 2), in one frame; title and reference are shown. Raises InputError as `contents` does."""
    check_template()
    template = TEMPLATE.read_text(encoding="utf-8")
    about, arrays = contents(bundle, cells, layouts, title, reference)
    facts = json.dumps(about, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")  # no tag can end here
    parts = [f'<script type="application/json" id="about">{facts}</script>']
    parts += [
        f'<script type="application/octet-stream" id="array-{name}" data-type="{values.dtype.name}" '
        f'data-shape="{",".join(map(str, values.shape))}">{packed(values)}</script>'
        for name, values in arrays.items()
    ]
    heavy = next(i for i, name in enumerate(arrays) if name == "fractal")  # what stands before draws the map
    first, rest = parts[: heavy + 1], parts[heavy + 1 :]
    return template.replace(FIRST, "\n".join(first)).replace(REST, "\n".join(rest))


def packed(values: np.ndarray) -> str:
    """base64 of gzip of the bytes of an array, little-endian: first of all first bytes, then all second ones, ..."""
    flat = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(-1)
    planes = flat.view(np.uint8).reshape(len(flat), values.dtype.itemsize).T.tobytes()
    return base64.b64encode(gzip.compress(planes, 6, mtime=0)).decode()


def whole_numbers(vectors: np.ndarray) -> np.ndarray:
    """(n, dim) -> int16 of at most LARGEST; the cosine of two rows is that of the vectors to about 1e-4."""
    x = vectors.astype(np.float64)
    return np.rint(x * (LARGEST / np.abs(x).max(axis=1, keepdims=True))).astype(np.int16)


def unit(whole: np.ndarray) -> np.ndarray:
    """(n, dim) int16 -> float32 of length 1, as the page makes them."""
    x = whole.astype(np.float64)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


class PageVoting(Voting):
    """The annotator whose bank is that of the page: `whole_numbers` of the full vectors."""

    def __init__(self, adapter: Adapter, vectors: np.ndarray, path: np.ndarray, tree: Tree) -> None:
        super().__init__(adapter, vectors, path, tree)
        assert isinstance(self.neighbours, Neighbours)  # the reference's own cells vote here, not an index
        self.bank = whole_numbers(self.neighbours.bank.cpu().numpy())
        self.neighbours = Neighbours(torch.from_numpy(unit(self.bank)).to(self.device))


def page_reference(bundle: Bundle, seed: int = 0) -> tuple[Annotator, PageVoting]:
    """The reference as the page holds it, see the module's text: fewer cells, calibrated on its own votes."""
    rng = np.random.default_rng(seed)
    rows = balanced(bundle.path, BANK, seed)
    held_out = np.sort(rng.permutation(len(bundle.validation_path))[:VALIDATION])
    small = replace(
        bundle.annotator,
        vectors=bundle.vectors[rows],
        path=bundle.path[rows],
        validation_vectors=bundle.validation_vectors[held_out],
        validation_path=bundle.validation_path[held_out],
    )
    voting = PageVoting(small.adapter, small.vectors, small.path, small.tree)
    small.__dict__["voting"] = voting  # the cached property
    return small.calibrated(), voting


def balanced(path: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` rows of (n,) paths, sorted, as equally many per path as there are."""
    return np.sort(round_robin(path, seed)[:count])


def nodes_of(tree: Tree) -> list[tuple[str, ...]]:
    """The nodes of the tree, each before what is below it; the first, (), is the root."""
    return sorted({path[:k] for path in tree.paths for k in range(len(path) + 1)})


def contents(
    bundle: Bundle, cells: Cells, layouts: np.ndarray, title: str, reference: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the page is told, and its arrays, in the order in which the page reads them.

    Raises InputError for recipe `published` and for a column of too many values.
    """
    adapter = bundle.adapter
    if not isinstance(adapter, FractalAdapter):
        raise InputError(
            f"{reference}: of recipe {bundle.facts['recipe']}, whose prefixes are no cuts of the full vector; explore "
            "takes a reference of another recipe"
        )
    full = embed_matrix(adapter, cells.vectors)[0]
    widths = [j * adapter.scale_dim for j in range(1, adapter.num_levels + 1)]
    nodes = nodes_of(bundle.tree)
    position = {node: i for i, node in enumerate(nodes)}
    node, answers = node_of_cells(bundle, cells, position)
    columns, column_arrays = encoded(cells.columns)
    small, annotator = page_reference(bundle)
    about = {
        "title": title,
        "reference": reference,
        "cells": len(cells.vectors),
        "total": cells.total,
        "levels": list(bundle.levels),
        "blocks": list(block_names(bundle.facts["config"])),
        "widths": widths,
        "nodes": nodes_told(bundle, nodes),
        "unknown": UNKNOWN,
        "known": cells.labels is not None,
        "columns": columns,
        "names": list(cells.names) if cells.names is not None else None,
        "adapter": {
            "levels": adapter.num_levels,
            "scaleDim": adapter.scale_dim,
            "classes": adapter.classes,
            "tau": TAU,
            "meansShare": MEANS_SHARE,
            "meansTemperature": MEANS_TEMPERATURE,
            "familiar": float(adapter.typical_distance),
            "blockScale": adapter.block_scale[:, 0].tolist(),
            "residualScale": adapter.residual_scale[:, 0].tolist(),
            "sharpness": adapter.sharpness[:, 0].tolist(),
        },
        "annotator": {
            "neighbours": NEIGHBOURS,
            "temperature": TEMPERATURE,
            "novel": NOVEL,
            "caution": CAUTION,
            "cautiousDepth": CAUTIOUS_DEPTH,
            "confidence": CONFIDENCE,
            "votes": small.calibration.votes,
            "paths": [[position[path[:k]] for k in range(1, len(path) + 1)] for path in bundle.tree.paths],
            "cells": len(bundle.path),
            "heldOut": len(small.validation_path),
        },
        "facts": provenance(bundle),
    }
    arrays = {
        "maps": np.rint(layouts * (32_000 / np.abs(layouts).max())).astype(np.int16),
        "node": node.astype(np.uint16 if len(nodes) < 2**16 else np.uint32),
        **column_arrays,
        **answers,
        "fractal": whole_numbers(full),
        "raw": whole_numbers(cells.vectors),
        **weights(adapter),
        "bank": annotator.bank,
        "bank_path": small.path.astype(np.uint16 if len(bundle.tree.paths) < 2**16 else np.uint32),
        "whiten": np.ascontiguousarray(annotator.whiten.T),
        "whitened_means": annotator.means,
        "signals": np.array([column for column, _ in small.calibration.signals]),
        "signal_weights": np.array([weight for _, weight in small.calibration.signals]),
        "ood_score": np.array(small.calibration.ood_score[0]),
        "ood_weights": np.array(small.calibration.ood_score[1]),
    }
    return about, arrays


def node_of_cells(
    bundle: Bundle, cells: Cells, position: Mapping[tuple[str, ...], int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """-> the deepest node (n,) that is known of each cell, and, where no labels are given, the reference's answers.

    A given label is the name of a type, at the finest level; others than the reference's are the root, "no label".
    The arrays of the answers: path (n,), depth (n,), probability (n, levels) in ten-thousandths, p-value (n,) and
    status (n,): 0 ok, 1 withheld, 2 novel.
    """
    if cells.labels is not None:
        path_of = {path[-1]: path for path in bundle.tree.paths}
        return np.array([position[path_of.get(name, ())] for name in cells.labels]), {}
    answer = bundle.answer(cells.vectors)
    paths = [bundle.tree.paths[p][:d] for p, d in zip(answer.path, answer.depth, strict=True)]
    arrays = {
        "answer_path": answer.path.astype(np.uint16 if len(bundle.tree.paths) < 2**16 else np.uint32),
        "answer_depth": answer.depth.astype(np.uint8),
        "answer_probability": np.rint(10_000 * answer.probability).astype(np.uint16),
        "answer_p_value": answer.p_value.astype(np.float32),
        "answer_status": np.where(answer.novel, 2, answer.depth < answer.confident_depth).astype(np.uint8),
    }
    return np.array([position[path] for path in paths]), arrays


def nodes_told(bundle: Bundle, nodes: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """For the legend and the search box: names, parents (rows), colours, CL ids and synonyms."""
    ids: dict[tuple[str, ...], str] = {}
    for path, terms in zip(bundle.tree.paths, bundle.cl_ids.tolist(), strict=True):
        ids |= {path[: k + 1]: term for k, term in enumerate(terms)}
    graph = load_graph(CL_SLIM) if any(ids.values()) else None
    colours, position = colours_of(bundle.tree.paths), {node: i for i, node in enumerate(nodes)}
    told = []
    for node in nodes:
        term = ids.get(node, "")
        told.append(
            {
                "name": node[-1] if node else "",
                "parent": position[node[:-1]] if node else -1,
                "colour": colours.get(node, UNKNOWN),
                "id": term,
                "synonyms": list(graph.nodes[term]["synonyms"]) if graph is not None and term in graph else [],
            }
        )
    return told


def encoded(columns: Mapping[str, Series]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Columns of the file -> what the page is told of each, and the arrays: codes with 0 for missing, or float32."""
    from pandas import Categorical

    told, arrays = [], dict[str, np.ndarray]()
    for i, (name, values) in enumerate(columns.items()):
        if values.dtype.kind in "iuf":
            numbers = values.to_numpy(np.float32, na_value=np.nan)
            known = numbers[np.isfinite(numbers)]
            low, high = np.quantile(known, [0.01, 0.99]).tolist() if len(known) else (0.0, 1.0)
            told.append({"name": name, "low": low, "high": high})
            arrays[f"column_{i}"] = numbers
            continue
        text = values.astype(object).map(lambda value: None if value is None or is_missing(str(value)) else str(value))
        codes = Categorical(text)
        if len(codes.categories) > MAX_VALUES:
            raise InputError(f"column '{name}' has {len(codes.categories)} values, at most {MAX_VALUES} can be shown")
        told.append({"name": name, "values": list(codes.categories)})
        arrays[f"column_{i}"] = (codes.codes + 1).astype(np.uint8 if len(codes.categories) < 256 else np.uint16)
    return told, arrays


def weights(adapter: FractalAdapter) -> dict[str, np.ndarray]:
    """What the page's forward pass takes, float32; matrices as (outputs, inputs), one output a row."""
    state = {name: tensor.detach().cpu().numpy() for name, tensor in adapter.state_dict().items()}
    layers = [i for i, layer in enumerate(adapter.mlp) if isinstance(layer, torch.nn.Linear)]
    return {
        "mean": state["mean"],
        "axes": np.ascontiguousarray(state["axes"].T),
        "linear": state["linear.weight"],
        **{f"mlp_{k}_weight": state[f"mlp.{i}.weight"] for k, i in enumerate(layers)},
        **{f"mlp_{k}_bias": state[f"mlp.{i}.bias"] for k, i in enumerate(layers)},
        "path_anchors": state["path_anchors"],
        "anchors": state["anchors"],
        "class_means": state["class_means"],
        "log_prior": state["log_prior"],
        "paths": state["paths"].astype(np.uint16),
    }


def provenance(bundle: Bundle) -> dict[str, str]:
    """Lines for the page's "About"."""
    return {
        "Reference made of": str(bundle.facts.get("source") or bundle.facts.get("data", "")),
        "Reference cells": f"{len(bundle.path):,} of {len(bundle.tree.paths)} types",
        "Vectors": bundle.use_rep,
        "Cell Ontology": str(bundle.facts.get("cl_release", "")),
        "Adapter": bundle.sha256[:16],
        "Fractal Cells": __version__,
    }


def choose(
    frame: DataFrame, labels: str | None, columns: Sequence[str] | None, where: Path | str
) -> tuple[list[str] | None, dict[str, Series]]:
    """The table of the cells -> their labels, and the columns to colour by, see `fractal explore --help`.

    Raises InputError for a column that is not there.
    """
    own = [name for name in sorted(map(str, frame.columns)) if re.match(r"level[1-9]_.", name)]  # of an atlas
    labels = labels or (own[-1] if own else None)
    if missing := [name for name in [*(columns or ()), *([labels] if labels else [])] if name not in frame]:
        raise InputError(
            f"{where}: has no column '{missing[0]}'; it has {', '.join(map(str, frame.columns)) or 'none'}"
        )
    if columns is None:
        some = [name for name in frame if name not in (*own, labels) and frame[name].dtype.kind not in "iufM"]
        columns = [name for name in some if 2 <= frame[name].nunique() <= DEFAULT_VALUES][:DEFAULT_COLUMNS]
    types = None if labels is None else [clean(str(name)) for name in frame[labels]]
    return types, {name: frame[name] for name in columns}


def explore(
    bundle: Bundle,
    maps: Maps,
    adata: AnnData,
    vectors: np.ndarray,
    path: Path,
    labels: str | None,
    columns: Sequence[str] | None,
    max_cells: int,
    reference: str,
) -> int:
    """`Reference.explore`: the page of an AnnData whose cells have these vectors (n, dim) float32 -> its bytes."""
    check_template()
    rows = np.random.default_rng(0).permutation(len(vectors))[:max_cells]
    rows = np.sort(rows[usable(vectors[rows])])
    if not len(rows):
        raise InputError("none of the cells has a usable vector")
    types, shown = choose(adata.obs.iloc[rows], labels, columns, "adata.obs")
    cells = Cells(vectors[rows], len(vectors), adata.obs_names[rows].astype(str).tolist(), types, shown)
    layouts = maps.transform(fractal_vectors(bundle, cells.vectors))
    return write_page(path, bundle, cells, layouts, "AnnData", reference)
