"""Which levels get a block, how wide it is, and how frequent the paths are."""

import numpy as np
import pytest
import torch

from fractal.model.preparation import choose_levels, default_scale_dim, path_frequency

TREE = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 2], [1, 2, 3, 3], [1, 2, 3, 4]])


def test_path_frequency_by_hand():
    """Two training paths of levels (lineage, lineage, type); what training has not seen counts nowhere."""
    classes = [["Immune"], ["L", "M"], ["B", "T", "mono"], ["b1", "m1", "t1"]]
    paths = torch.tensor([[0, 0, 1], [1, 1, 2]])
    counts: dict[tuple[str, ...], int] = {
        ("Immune", "L", "T", "t1"): 7,
        ("Immune", "L", "T", "t2 that training never saw"): 2,
        ("Immune", "M", "mono", "m1"): 5,
        ("Immune", "L", "B", "b1"): 100,
        ("Neural", "Glial", "x", "y"): 1_000,
    }
    assert path_frequency(counts, classes, [1, 1, 2], paths).tolist() == [9, 5]


def test_levels_of_one_class_get_no_block_unless_asked_for():
    labels = torch.from_numpy(TREE)
    assert choose_levels(labels, None) == [0, 1, 2, 3]
    assert choose_levels(labels, 2) == [0, 1]
    one_system = torch.from_numpy(TREE[:3])
    assert choose_levels(one_system, None) == [1, 2, 3]
    assert choose_levels(one_system, 4) == [1, 1, 2, 3]
    assert choose_levels(one_system, 4, published=True) == [0, 1, 2, 3]
    only_leaves = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
    assert choose_levels(only_leaves, None) == choose_levels(only_leaves, 2) == [3, 3]
    with pytest.raises(ValueError, match="one type"):
        choose_levels(labels[:1], None)


@pytest.mark.parametrize(
    ("dim", "levels", "expected"), [(128, 4, 32), (30, 4, 8), (50, 4, 16), (4, 4, 8), (128, 2, 32), (10_000, 6, 32)]
)
def test_block_widths_follow_the_input(dim: int, levels: int, expected: int):
    assert default_scale_dim(dim, levels) == expected
