"""The losses, each against a slow and obvious version that loops over cells in Python."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fractal.model.adapter import TAU, FractalAdapter, truncate_blocks
from fractal.model.objective import SMOOTHING, PrefixObjective, TrainingRows, log_ratio

LABELS = torch.tensor(
    [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 2], [1, 2, 2, 3], [1, 2, 2, 3], [1, 2, 3, 4], [0, 0, 0, 0]]
)


FREQUENCY = torch.tensor([90, 1, 5, 3, 1])  # cells of each path in the whole file


def training_rows(x: Tensor, path: Tensor, lineages: Tensor) -> TrainingRows:
    """Rows x (n, dim) on the paths path (n,), which are as frequent in the file as FREQUENCY says."""
    frequency = FREQUENCY[: len(lineages)].float()
    return TrainingRows(x, path, frequency, path.bincount(minlength=len(lineages)), lineages, [])


def fractal_parts(levels: list[int]) -> tuple[FractalAdapter, PrefixObjective, Tensor, Tensor]:
    """-> an adapter, its objective, the vectors and each row's path."""
    paths, path = LABELS[:, levels].unique(dim=0, return_inverse=True)
    x = torch.randn(7, 12)
    adapter = FractalAdapter(12, len(levels), 3, paths).eval()
    return adapter, PrefixObjective(adapter, training_rows(x, path, paths)), x, path


@pytest.mark.parametrize("levels", [[0, 1, 2, 3], [3, 3, 3, 3], [0, 1]])
def test_the_loss_equals_the_slow_version(levels: list[int]):
    adapter, objective, x, path = fractal_parts(levels)
    rows = [6, 0, 3, 4, 2]

    def shifted(logits: list[float], classes: list[int], count: int) -> Tensor:
        """Add log(share among the training rows) - log(share in the file), half a cell being added to every class."""
        here = [sum(classes[int(p)] == c for p in path) + 0.5 for c in range(count)]
        file = [sum(int(FREQUENCY[p]) for p in range(len(classes)) if classes[p] == c) + 0.5 for c in range(count)]
        return torch.tensor(
            [v + math.log(h / sum(here)) - math.log(f / sum(file)) for v, h, f in zip(logits, here, file, strict=True)]
        )

    expected = 0.0
    for row in rows:
        logits, _, _ = adapter(x[row : row + 1])
        own = list(range(len(adapter.paths)))
        target = path[row : row + 1]
        found = shifted(logits[0].tolist(), own, len(own))[None]
        expected += cross_entropy(found, target, label_smoothing=SMOOTHING).item() / len(rows)
        for j in range(len(levels)):
            prefix = truncate_blocks(adapter.blocks(x[row : row + 1]), j + 1)[0].detach()
            own = objective.prototypes.split(adapter.classes)[j][:, : 3 * (j + 1)].detach()
            cosines = [float(prefix @ p / p.norm()) / TAU for p in own]
            found = shifted(cosines, adapter.paths[:, j].tolist(), len(cosines))[None]
            expected += cross_entropy(found, adapter.paths[target, j], label_smoothing=SMOOTHING).item() / len(rows)
    assert objective(adapter, torch.tensor(rows)).item() == pytest.approx(expected, rel=1e-5)


def test_equal_frequencies_shift_nothing():
    assert torch.allclose(log_ratio(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 5.0])), torch.zeros(2))
    shift = log_ratio(torch.tensor([50.0, 50.0]), torch.tensor([90.0, 10.0]))
    assert shift[1] - shift[0] == pytest.approx(math.log(90.5 / 10.5))


def test_a_rare_path_counts_by_its_frequency_in_the_file():
    """With other frequencies the same vectors have another loss."""
    torch.manual_seed(0)
    adapter, objective, x, path = fractal_parts([0, 1, 2, 3])
    shift = objective.logit_adjustment[0]
    assert shift.argmin() == FREQUENCY.argmax()  # common in the file, less so among the training rows
    assert not torch.allclose(shift, shift.mean().expand(5), atol=0.1)
