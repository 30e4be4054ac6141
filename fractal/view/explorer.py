"""Cells and a reference -> one HTML page to look at: maps that morph, neighbours, new cells; no server, no request.

The page's code is TypeScript, in explorer/, bundled into data/explorer.html when the package is built. This module puts
the data into it: small things as JSON, arrays as base64 of gzip, byte planes apart so that gzip finds their order.

What the page computes is what torch computes on the same numbers:

- Vectors are whole numbers of 11 bits, with one factor per cell, 2 bytes a number and 1.4 in the file. The
  cosines that the page ranks by are those of these numbers.
- New cells pass through the adapter's weights (float32). Their labels are voted for by at most BANK of the reference's
  cells, balanced over the types, and calibrated as the reference's; among fewer cells a neighbour is farther, which
  VALIDATION cells measure. A larger reference answers a little better: `fractal annotate`.
"""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fractal.annotate.annotator import Annotator
from fractal.annotate.answers import CONFIDENCE
from fractal.annotate.discriminant import TEMPERATURE as SOFTNESS
from fractal.annotate.neighbours import Neighbours
from fractal.annotate.novelty import CAUTION, CAUTIOUS_DEPTH, NOVEL
from fractal.annotate.votes import NEIGHBOURS, TEMPERATURE, Voting
from fractal.base.errors import InputError
from fractal.base.files import atomic_write
from fractal.data.reorder import round_robin
from fractal.hierarchy.ontology import CL_SLIM, SHIPPED, load_graph
from fractal.hierarchy.tree import Labels, Tree, nodes_of
from fractal.model.adapter import MEANS_SHARE, MEANS_TEMPERATURE, TAU, FractalAdapter
from fractal.model.embedding import embed_matrix
from fractal.view.colours import UNKNOWN, colours_of
from fractal.view.shown import Shown, encoded

TEMPLATE = SHIPPED / "explorer.html"
BANK, VALIDATION = 8_000, 4_000
LARGEST = 1_023  # of a vector's numbers: 11 bits with the sign
FIRST, REST = "<!-- first -->", "<!-- vectors -->"  # where the template takes data: what the map needs, and the vectors
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Page:
    """What a page shows beside its cells."""

    annotator: Annotator  # a reference's
    blocks: Sequence[str]  # the level that each block stands for
    title: str
    reference: str  # its name
    facts: Mapping[str, str]  # provenance, lines of "About"


def check_template() -> None:
    """Raises InputError, before any work, where the page's code is missing."""
    if not TEMPLATE.is_file():
        raise InputError(
            f"{TEMPLATE}: the explorer's page is not built, which takes npm's packages once; go online and say "
            "`uv sync --reinstall-package fractal-cells`, or `pip install .`"
        )


def write_page(path: Path, page: Page, shown: Shown, layouts: np.ndarray) -> int:
    """Write the page -> its size in bytes. Raises InputError as `contents`.

    layouts (P, n, 2): of each prefix, in one frame, and maybe one more, of the vectors as they came.
    """
    text = html(page, shown, layouts).encode()
    with atomic_write(path) as part:
        part.write_bytes(text)
    return len(text)


def html(page: Page, shown: Shown, layouts: np.ndarray) -> str:
    check_template()
    about, arrays = contents(page, shown, layouts)
    facts = json.dumps(about, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c")  # no tag can end here
    parts = [f'<script type="application/json" id="about">{facts}</script>']
    parts += [
        f'<script type="application/octet-stream" id="array-{name}" data-type="{values.dtype.name}" '
        f'data-shape="{",".join(map(str, values.shape))}">{packed(values)}</script>'
        for name, values in arrays.items()
    ]
    heavy = 1 + [*arrays].index("fractal")  # what stands before draws the map
    first, rest = "\n".join(parts[:heavy]), "\n".join(parts[heavy:])
    return TEMPLATE.read_text(encoding="utf-8").replace(FIRST, first).replace(REST, rest)


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


def page_annotator(annotator: Annotator) -> tuple[Annotator, np.ndarray]:
    """The reference as the page holds it, see the module's text: fewer cells, whose neighbours are farther.

    -> with the cells that vote, (m, dim) int16.
    """
    rows = np.sort(round_robin(annotator.path, 0)[:BANK])  # as equally many per type as there are
    vectors, path, study = annotator.vectors[rows], annotator.path[rows], annotator.study[rows]
    small = replace(annotator, vectors=vectors, path=path, study=study)
    voting = Voting(small.adapter, vectors, path, study, small.tree)
    bank = whole_numbers(voting.neighbours.bank.cpu().numpy())
    voting.neighbours = Neighbours(torch.from_numpy(unit(bank)).to(voting.device))
    asking = np.random.default_rng(0).permutation(annotator.held_out.vectors)[:VALIDATION]
    far, farther = (np.sort(of.ballot(asking).signals[:, 0]) for of in (annotator.voting, voting))
    (values, weight), *others = annotator.calibration.signals
    signals = [(np.interp(values, far, farther), weight), *others]
    small.voting, small.calibration = voting, replace(annotator.calibration, signals=signals)
    return small, bank


def contents(page: Page, shown: Shown, layouts: np.ndarray) -> tuple[dict[str, Any], Arrays]:
    """What the page is given as JSON, and its arrays, in the order in which the page reads them.

    Raises InputError for recipe `published` and for a column of too many values.
    """
    adapter, tree = page.annotator.adapter, page.annotator.tree
    if not isinstance(adapter, FractalAdapter):
        raise InputError(
            f"{page.reference}: of recipe published, whose prefixes are no cuts of the full vector; explore takes a "
            "reference of another recipe"
        )
    nodes = [(), *nodes_of(tree.paths)]  # each before what is below it; the first is the root
    position = {node: i for i, node in enumerate(nodes)}
    node, answers = node_of_cells(page.annotator, shown, position)
    columns, column_arrays = encoded(shown.columns)
    voting, voting_arrays = page_voting(*page_annotator(page.annotator), position)
    is_finest = np.array([len(labels) == len(tree.levels) for labels in nodes])
    genes = shown.genes
    if genes and not genes.are_chosen:
        genes = genes.markers(np.where(is_finest[node], node, 0))
    genes_about, genes_bytes = genes.encoded() if genes and genes.names else ([], None)
    about = {
        "title": page.title,
        "reference": page.reference,
        "cells": len(shown.vectors),
        "total": shown.total,
        "levels": list(tree.levels),
        "blocks": list(page.blocks),
        "widths": [j * adapter.scale_dim for j in range(1, adapter.num_levels + 1)],
        "nodes": node_table(tree, nodes),
        "unknown": UNKNOWN,
        "known": shown.labels is not None,
        "columns": columns,
        "genes": genes_about,
        "names": None if shown.names is None else list(shown.names),
        "adapter": about_adapter(adapter),
        "annotator": {**voting, "cells": len(page.annotator.path)},
        "facts": dict(page.facts),
    }
    arrays = {
        "maps": np.rint(layouts * (32_000 / np.abs(layouts).max())).astype(np.int16),
        "node": node.astype(np.uint16),
        **column_arrays,
        **answers,
        **({} if genes_bytes is None else {"genes": genes_bytes}),
        "fractal": whole_numbers(embed_matrix(adapter, shown.vectors)[0]),
        "raw": whole_numbers(shown.vectors),
        **weights(adapter),
        **voting_arrays,
    }
    return about, arrays


def node_of_cells(annotator: Annotator, shown: Shown, position: Mapping[Labels, int]) -> tuple[np.ndarray, Arrays]:
    """-> the deepest node (n,) that is known of each cell, and, where no labels are given, the reference's answers.

    A given label is the name of a type, at the finest level; others than the reference's are the root, "no label".
    The answers (n,), probabilities (n, levels) in ten-thousandths; status: 0 ok, 1 withheld, 2 novel.
    """
    paths = annotator.tree.paths
    if shown.labels is not None:
        path_of = {path[-1]: path for path in paths}
        return np.array([position[path_of.get(name, ())] for name in shown.labels]), {}
    answer = annotator.answer(shown.vectors)
    node = [position[paths[p][:d]] for p, d in zip(answer.path, answer.depth, strict=True)]
    return np.array(node), {
        "answer_path": answer.path.astype(np.uint16),
        "answer_depth": answer.depth.astype(np.uint8),
        "answer_probability": np.rint(10_000 * answer.probability).astype(np.uint16),
        "answer_p_value": answer.p_value.astype(np.float32),
        "answer_status": np.where(answer.novel, 2, answer.depth < answer.confident_depth).astype(np.uint8),
    }


def node_table(tree: Tree, nodes: Sequence[Labels]) -> list[dict[str, Any]]:
    """For the legend and the search box: names, parents (rows), colours, CL ids and synonyms."""
    ids: dict[Labels, str] = {}
    for path, terms in zip(tree.paths, tree.cl_ids.tolist(), strict=True):
        ids |= {path[: k + 1]: term for k, term in enumerate(terms)}
    graph = load_graph(CL_SLIM) if any(ids.values()) else None
    colours, position = colours_of(tree.paths), {node: i for i, node in enumerate(nodes)}
    return [
        {
            "name": node[-1] if node else "",
            "parent": position[node[:-1]] if node else -1,
            "colour": colours.get(node, UNKNOWN),
            "id": (term := ids.get(node, "")),
            "synonyms": list(graph.nodes[term]["synonyms"]) if graph is not None and term in graph else [],
        }
        for node in nodes
    ]


def about_adapter(adapter: FractalAdapter) -> dict[str, Any]:
    """The numbers of the page's forward pass; its arrays are `weights`."""
    return {
        "levels": adapter.num_levels,
        "scaleDim": adapter.scale_dim,
        "classes": adapter.classes,
        "tau": TAU,
        "meansShare": MEANS_SHARE,
        "meansTemperature": MEANS_TEMPERATURE,
        "typicalDistance": float(adapter.typical_distance),
        "blockScale": adapter.block_scale[:, 0].tolist(),
        "residualScale": adapter.residual_scale[:, 0].tolist(),
        "sharpness": adapter.sharpness[:, 0].tolist(),
    }


def page_voting(small: Annotator, bank: np.ndarray, position: Mapping[Labels, int]) -> tuple[dict[str, Any], Arrays]:
    """What the page's annotator holds of the reference, and its calibration; `position` of the nodes of each path."""
    discriminant, calibration = small.voting.discriminant, small.calibration
    about = {
        "neighbours": NEIGHBOURS,
        "temperature": TEMPERATURE,
        "softness": SOFTNESS,
        "novel": NOVEL,
        "caution": CAUTION,
        "cautiousDepth": CAUTIOUS_DEPTH,
        "confidence": CONFIDENCE,
        "votes": [[x.tolist(), p.tolist()] for x, p in calibration.votes],
        "paths": [[position[path[:k]] for k in range(1, len(path) + 1)] for path in small.tree.paths],
        "heldOut": len(small.held_out),
    }
    return about, {
        "bank": bank,
        "bank_path": small.path.astype(np.uint16),
        "discriminant": np.ascontiguousarray(discriminant.axes.T),
        "discriminant_means": discriminant.means,
        "signals": np.array([column for column, _ in calibration.signals]),
        "signal_weights": np.array([weight for _, weight in calibration.signals]),
        "ood_score": np.array(calibration.ood_score[0]),
        "ood_weights": np.array(calibration.ood_score[1]),
    }


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
        **{name: state[name] for name in ("path_anchors", "anchors", "class_means", "log_prior")},
        "paths": state["paths"].astype(np.uint16),
    }
