"""Cells to index, or to search by: a file's vectors in the space of an adapter, and its columns."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fractal.base.errors import InputError
from fractal.base.storage import Location
from fractal.data.cells import Cells, Chunk, has_obs, kind_of
from fractal.model.embedding import Embedder, embed_matrix, weights_sha256
from fractal.search.folder import Space

X_FRACTAL = "X_fractal"


@dataclass(frozen=True)
class Source:
    """Cells whose vectors lie in `space`, or are embedded there chunk by chunk."""

    cells: Cells
    space: Space
    embedder: Embedder | None = None  # for vectors as an adapter takes them

    @property
    def name(self) -> str:
        return self.cells.path.name

    def chunks(self, size: int, progress: str = "") -> Iterator[Chunk]:
        """Yield (columns, vectors (m, dim) float32). Raises InputError for vectors that are zero or not finite."""
        for table, vectors in self.cells.chunks(size, strict=True, obs=True, progress=progress):
            yield table, vectors if self.embedder is None else embed_matrix(self.embedder.adapter, vectors)[0]


@contextmanager
def open_cells(
    path: Location,
    embedder: Embedder | None = None,
    use_rep: str | None = None,
    embedded: bool = False,
    force: bool = False,
) -> Iterator[Source]:
    """Open a file whose vectors an adapter has made (they say so, or `embedded` does), takes, or that stay as they are.

    A reference of a PCA projects the cells of an .h5ad without such vectors, and a reference refuses vectors that can't
    come from its embedding, unless `force` takes them; it prints a line for both, as in `fractal annotate`. Raises
    InputError for a file that can't be read, and for vectors that the adapter does not take or did not make.
    """
    use_rep = use_rep or (X_FRACTAL if embedded or embedder is None else embedder.use_rep)
    made_by = space_in(path, use_rep)
    made = embedded or made_by is not None
    with ExitStack() as stack:
        opened = embedder.open(path, use_rep, force) if embedder and not made else Cells.open(path, use_rep)
        cells = stack.enter_context(opened)
        space = made_by or (space_of(embedder) if embedder else Space(cells.dim))
        if made_by and embedder:
            adapters = space_of(embedder).adapters
            if not set(space.adapters) & set(adapters):
                raise InputError(f"{path}: its vectors were made by another adapter than the given one; name that one")
            space = replace(space, adapters=adapters)
        if made and space.dim != cells.dim:
            raise InputError(f"{path}: its vectors have {cells.dim} numbers, those of its adapter {space.dim}")
        yield Source(cells, space, None if made else embedder)


def space_of(embedder: Embedder) -> Space:
    """What an adapter's full vectors are."""
    adapter = embedder.adapter
    blocks = (adapter.scale_dim,) * adapter.num_levels
    hashes = dict.fromkeys([embedder.sha256, weights_sha256(adapter)])
    return Space(sum(blocks), embedder.recipe, blocks, tuple(hashes))


def space_in(path: Location, use_rep: str) -> Space | None:
    """What `fractal embed` has written of the vectors of a file; None where they are not its output."""
    if kind_of(path) in ("npy", "tiledb", "soma") or (has_obs(path) and not use_rep.startswith(X_FRACTAL)):
        return None
    with Cells.open(path, use_rep) as cells:
        facts: Mapping[str, Any] = cells.facts()
    hashes = [str(facts[name]) for name in ("checkpoint_sha256", "adapter_sha256") if name in facts]
    if not hashes:
        return None
    try:
        if has_obs(path):
            blocks = np.diff([0, *facts["prefix_ends"]]).astype(int).tolist()
        else:
            blocks = [int(width) for width in json.loads(facts["block_widths"])[: int(facts["prefix"])]]
        return Space(sum(blocks), str(facts["recipe"]), tuple(blocks), tuple(dict.fromkeys(hashes)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: what it says of its vectors' blocks can't be read; embed it again") from error
