"""Vectors that are written to files: those of the adapter, NaN where a cell has no usable vector."""

import numpy as np
import pytest
import torch

from fractal.model.adapter import BATCH, Adapter, FractalAdapter, embed
from fractal.model.embedding import block_names, cut_matrix, embed_matrix
from fractal.model.published import PublishedAdapter

PATHS = torch.tensor([[0, 0], [0, 1], [1, 2]])
ADAPTERS = {"fractal": FractalAdapter(6, 2, 3, PATHS), "published": PublishedAdapter(6, 2, 3, 2, 3)}


@pytest.fixture(params=list(ADAPTERS))
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return ADAPTERS[request.param]


@pytest.mark.parametrize("prefix", [None, 1, 2])
def test_vectors_and_blocks_are_the_adapters(adapter: Adapter, prefix: int | None):
    x = np.random.default_rng(0).normal(size=(BATCH + 5, 6)).astype(np.float32)
    x[3], x[7, 2] = 0, np.nan
    vectors, blocks = embed_matrix(adapter, x, prefix)
    assert (
        np.flatnonzero(np.isnan(vectors).any(1)).tolist() == np.flatnonzero(np.isnan(blocks).any(1)).tolist() == [3, 7]
    )
    good = np.delete(np.arange(len(x)), [3, 7])
    expected = embed(adapter, torch.from_numpy(x[good]), batch=100)[(prefix or 2) - 1]
    assert np.allclose(vectors[good], expected, atol=1e-6)
    with torch.inference_mode():
        assert np.allclose(blocks[good], adapter.blocks(torch.from_numpy(x[good])).flatten(1), atol=1e-6)


def test_without_a_usable_vector_all_is_nan(adapter: Adapter):
    for n in 0, 2:
        vectors, blocks = embed_matrix(adapter, np.zeros((n, 6), np.float32), 1)
        assert (vectors.shape, blocks.shape) == ((n, 3), (n, 6))
        assert np.isnan(vectors).all()
        assert np.isnan(blocks).all()


def test_vectors_that_can_be_cut(adapter: Adapter):
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    first = cut_matrix(adapter, x)[:, :3]
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    assert np.allclose(first, embed_matrix(adapter, x, 1)[0], atol=1e-6)


def test_a_level_of_one_class_has_no_block():
    config = {"num_levels": 2, "levels": ["a", "b", "c"], "block_levels": [0, 2]}
    assert block_names(config) == ("a", "c")
