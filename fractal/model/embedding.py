"""The one loop behind `fractal embed` and `Reference.embed`: vectors in, fractal vectors out, chunk by chunk."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fractal.annotate.bundle import Bundle, read_bundle, weights_sha256
from fractal.base.files import read_whole
from fractal.base.storage import Place
from fractal.data.parquet import fingerprint
from fractal.data.vectors import usable
from fractal.hierarchy.levels import LEVELS
from fractal.model.adapter import Adapter, load, truncate_blocks

BATCH = 2_048  # cells; 4 MB of hidden units per layer, which stay in the cache

Append = Callable[[Any, np.ndarray, np.ndarray], None]  # a chunk: columns, vectors (m, dims), blocks (m, dims)


@dataclass(frozen=True)
class Embedder:
    """An adapter and what its vectors must say of it, from a checkpoint of train.py or a reference's folder."""

    adapter: Adapter
    recipe: str
    levels: tuple[str, ...]  # names of the levels that the blocks stand for, coarse to fine
    sha256: str  # of the checkpoint, or of the reference's weights
    use_rep: str  # key of obsm that the adapter was trained on
    reference: Bundle | None = None  # where it comes from one

    @staticmethod
    def open(path: Place, device: torch.device | str = "cpu") -> "Embedder":
        """Raises InputError for a path that is neither."""
        if path.is_dir():
            bundle = read_bundle(path, device)
            levels = block_names(bundle.facts["config"])
            return Embedder(bundle.adapter, bundle.facts["recipe"], levels, bundle.sha256, bundle.use_rep, bundle)
        (adapter, checkpoint), sha256 = read_whole(path, lambda path: (load(path, device), fingerprint(path)))
        config = checkpoint["config"]
        return Embedder(adapter, config["recipe"], block_names(config), sha256, "X_scimilarity")

    def metadata(self, prefix: int) -> dict[str, str]:
        """What a file of its vectors, cut to so many blocks, says of them."""
        levels = self.adapter.num_levels
        return {
            "checkpoint_sha256": self.sha256,
            "adapter_sha256": weights_sha256(self.adapter),  # the same in a reference that was made of it
            "recipe": self.recipe,
            "num_levels": str(levels),
            "block_widths": json.dumps([self.adapter.scale_dim] * levels),
            "prefix": str(prefix),
        }


def block_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The level that each block of an adapter stands for; a level with one class has no block."""
    levels = config.get("levels", LEVELS)
    return tuple(levels[k] for k in config.get("block_levels", range(config["num_levels"])))


@torch.inference_mode()
def embed_matrix(adapter: Adapter, vectors: np.ndarray, prefix: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(n, dim) float32 -> (vectors (n, dims), blocks (n, num_levels * scale_dim)), both float32.

    The vectors have length 1: the first `prefix` blocks, or the full vector where `prefix` is None or all blocks. The
    two differ: a published full vector is no longer prefix, but has passed one more norm. The blocks are those behind
    it, not normalised. A row that is zero or not finite becomes NaN in both.
    """
    adapter.eval()
    device = next(adapter.parameters()).device
    rows = np.flatnonzero(usable(vectors))
    levels = adapter.num_levels
    prefix = prefix or levels
    found = np.full((len(vectors), prefix * adapter.scale_dim), np.nan, np.float32)
    all_blocks = np.full((len(vectors), levels * adapter.scale_dim), np.nan, np.float32)
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        blocks = adapter.blocks(torch.from_numpy(vectors[some]).to(device))
        found[some] = (adapter.full(blocks) if prefix == levels else truncate_blocks(blocks, prefix)).cpu()
        all_blocks[some] = blocks.flatten(1).cpu()
    return found, all_blocks


def embed_chunks(
    adapter: Adapter, chunks: Iterable[tuple[Any, np.ndarray]], num_rows: int, prefix: int | None, append: Append
) -> int:
    """Pass each chunk (columns, vectors (m, dim) float32) and what `embed_matrix` makes of it to `append`.

    -> how many cells have no usable vector, and so NaN.
    """
    invalid = 0
    with tqdm(total=num_rows, unit="cells", unit_scale=True, desc="embed") as bar:
        for columns, vectors in chunks:
            found, blocks = embed_matrix(adapter, vectors, prefix)
            append(columns, found, blocks)
            invalid += int(np.isnan(found[:, 0]).sum())
            bar.update(len(vectors))
    return invalid
