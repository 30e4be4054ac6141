"""What is indexed, or asked for: a file's vectors in the space of an adapter, and its columns."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.annotate.bundle import weights_sha256
from fractal.annotate.query import open_query, tell
from fractal.base.cli import InputError
from fractal.base.storage import Place
from fractal.data.cells import Cells, has_obs, kind_of
from fractal.data.parquet import metadata_of
from fractal.model.embedding import Embedder, embed_matrix
from fractal.search import build
from fractal.search.build import PIECE
from fractal.search.folder import Space

X_FRACTAL = "X_fractal"


@dataclass(frozen=True)
class Opened:
    """A file of vectors, and how they come into the space of an index."""

    source: Cells
    space: Space
    embedder: Embedder | None  # for vectors as an adapter takes them
    facts: dict[str, str]

    def chunks(self, size: int = PIECE) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """Yield (columns, vectors (m, dim) float32). Raises InputError for vectors that are zero or not finite."""
        for table, vectors in self.source.chunks(size, strict=True, obs=True):
            yield table, vectors if self.embedder is None else embed_matrix(self.embedder.adapter, vectors)[0]

    @property
    def cells(self) -> build.Cells:
        return build.Cells(self.source.path.name, self.source.num_rows, self.space, self.chunks, self.facts)


@contextmanager
def open_cells(
    path: Place,
    embedder: Embedder | None = None,
    use_rep: str | None = None,
    embedded: bool = False,
    force: bool = False,
) -> Iterator[Opened]:
    """Open a file whose vectors an adapter has made (they say so, or `embedded` does), takes, or that stay as they are.

    A reference of a PCA projects the cells of an .h5ad without such vectors, and a reference refuses vectors that can't
    come from its embedding, unless `force` takes them; it prints a line for both, as in `fractal annotate`. Raises
    InputError for a file that can't be read, and for vectors that the adapter does not take or did not make.
    """
    own = None if embedder is None else space_of(embedder)
    use_rep = use_rep or (X_FRACTAL if embedded or embedder is None else embedder.use_rep)
    told = told_by(path, use_rep)
    made = embedded or told is not None
    takes = None if own is None or made or embedder is None else embedder.adapter.dim
    with ExitStack() as stack:
        if embedder and embedder.reference and not made:
            source, origin = stack.enter_context(open_query(embedder.reference, path, use_rep, force))
            tell(origin, path)
        else:
            source = stack.enter_context(Cells.open(path, use_rep, takes))
        space = Space(source.dim, **told) if told else own or Space(source.dim)
        if told and own:
            if not set(space.adapters) & set(own.adapters):
                raise InputError(f"{path}: its vectors were made by another adapter than the given one; name that one")
            space = replace(space, adapters=own.adapters)
        if space.dim != source.dim and made:
            raise InputError(f"{path}: its vectors have {source.dim} numbers, those of the adapter {space.dim}")
        if sum(space.blocks or [space.dim]) != space.dim:
            raise InputError(f"{path}: its vectors have {source.dim} numbers, their blocks {sum(space.blocks)}")
        facts = {key: value for key, value in metadata_of(source.schema).items() if key in ("cl_release", "source")}
        yield Opened(source, space, None if made else embedder, facts)


def space_of(embedder: Embedder) -> Space:
    """What an adapter's full vectors are."""
    adapter = embedder.adapter
    blocks = (adapter.scale_dim,) * adapter.num_levels
    hashes = dict.fromkeys([embedder.sha256, weights_sha256(adapter)])
    return Space(sum(blocks), embedder.recipe, blocks, tuple(embedder.levels), tuple(hashes))


def told_by(path: Place, use_rep: str) -> dict[str, Any] | None:
    """What `fractal embed` has written of the vectors, as `Space` has it; None where they are not its output."""
    if kind_of(path) in ("npy", "tiledb", "soma"):
        return None
    if has_obs(path) and not use_rep.startswith(X_FRACTAL):
        return None
    with Cells.open(path, use_rep) as cells:
        facts = cells.facts()
    hashes = [str(facts[name]) for name in ("checkpoint_sha256", "adapter_sha256") if name in facts]
    if not hashes:
        return None
    try:
        if has_obs(path):
            blocks = np.diff([0, *facts["prefix_ends"]])
        else:
            blocks = json.loads(facts["block_widths"])[: int(facts["prefix"])]
        return {
            "recipe": str(facts["recipe"]),
            "blocks": tuple(map(int, blocks)),
            "levels": tuple(map(str, facts.get("levels", ()))),
            "adapters": tuple(dict.fromkeys(hashes)),
        }
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: what it says of its vectors' blocks can't be read; embed it again") from error
