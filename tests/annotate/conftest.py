"""A small reference, made without training, of four types of two systems; and cells of these."""

import numpy as np
import pytest
import torch

from fractal.annotate.annotator import Annotator
from fractal.data.atlas import LabelledVectors
from fractal.hierarchy.levels import LEVELS
from fractal.model.checkpoint import build_adapter
from fractal.reference import Reference, make_reference

CLASSES = [["I", "S"], ["L", "M"], ["f", "m", "t"], ["a", "b", "c", "d"]]
LABELS = np.array([[0, 0, 2, 0], [0, 0, 2, 1], [0, 1, 1, 2], [1, 0, 0, 3]])
PATHS = [tuple(CLASSES[k][c] for k, c in enumerate(row)) for row in LABELS.tolist()]
CENTRES = np.random.default_rng(5).normal(size=(4, 8))


def cells(n: int, seed: int) -> LabelledVectors:
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 4, n)
    x = (CENTRES[types] + 0.3 * rng.normal(size=(n, 8))).astype(np.float32)
    return LabelledVectors(x, LABELS[types], CLASSES)


@pytest.fixture(scope="session")
def reference() -> Reference:
    torch.manual_seed(0)
    config = {"recipe": "fractal", "dim": 8, "num_levels": 4, "scale_dim": 4, "paths": LABELS.tolist(),
              "levels": list(LEVELS), "block_levels": [0, 1, 2, 3]}  # fmt: skip
    counts = dict(zip(PATHS, (700, 100, 100, 100), strict=True))
    evil = "</td><script>alert(1)</script> [x](javascript:1) `\x1b[31m\n# x"
    facts = {"source": evil, "data": evil, "versions": {evil: evil}, "split": {"fingerprint": evil}}
    adapter = build_adapter(config, CLASSES)
    annotator = Annotator.of(adapter, cells(200, 0), cells(400, 1), counts)
    return make_reference(annotator, config, CLASSES, cells(300, 2), facts)
