"""Vectors in, fractal vectors out."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from fractal.data.cells import Cells
from fractal.data.vectors import usable
from fractal.hierarchy.levels import LEVELS
from fractal.model.adapter import Adapter, FractalAdapter, blocks_of, truncate_blocks

OpenCells = Callable[[Any, str | None, bool], AbstractContextManager[Cells]]  # cells, use_rep, force


@dataclass(frozen=True)
class Embedder:
    """An adapter, what its vectors must say of it, and the way new cells come to it.

    `fractal.reference.open_embedder` makes one, of a checkpoint of train.py or of a reference's folder.
    """

    adapter: Adapter
    recipe: str
    levels: tuple[str, ...]  # names of the levels that the blocks stand for, coarse to fine
    sha256: str  # of the checkpoint, or of the reference's weights
    use_rep: str  # key of obsm that the adapter was trained on
    open: OpenCells  # refuses vectors that can't be of that embedding; a reference of a PCA may project cells
    checked: Callable[[Cells], Cells] = lambda cells: cells  # warns of rows that can't be; what `open` gives is checked

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


def weights(adapter: Adapter) -> bytes:
    """As a safetensors file; its own save_file would make files that only their owner reads."""
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in adapter.state_dict().items()})


def weights_sha256(adapter: Adapter) -> str:
    return hashlib.sha256(weights(adapter)).hexdigest()


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
    rows, levels, width = usable(vectors), adapter.num_levels, adapter.scale_dim
    prefix = prefix or levels
    blocks = blocks_of(adapter, torch.from_numpy(vectors[rows]).to(next(adapter.parameters()).device))
    result = np.full((len(vectors), prefix * width), np.nan, np.float32)
    all_blocks = np.full((len(vectors), levels * width), np.nan, np.float32)
    result[rows] = (adapter.full(blocks) if prefix == levels else truncate_blocks(blocks, prefix)).cpu()
    all_blocks[rows] = blocks.flatten(1).cpu()
    return result, all_blocks


def cut_matrix(adapter: Adapter, vectors: np.ndarray) -> np.ndarray:
    """(n, dim) float32 -> (n, num_levels * scale_dim) float32, whose first numbers are the prefixes, of any length.

    These are the full vectors, or, for recipe `published`, whose full vectors can't be cut, the blocks behind them.
    """
    full, blocks = embed_matrix(adapter, vectors)
    return full if isinstance(adapter, FractalAdapter) else blocks
