"""The adapters: shapes, what a prefix is, and that a checkpoint gives back what was saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import empirical_covariance, shrunk_covariance
from sklearn.decomposition import PCA
from torch.nn.functional import normalize

from fractal.base.errors import InputError
from fractal.hierarchy.levels import LEVELS
from fractal.model.adapter import (
    BLOCK_SCALE,
    RESIDUAL_SCALE,
    SHARPNESS,
    SHRINKAGE,
    TYPICAL,
    FractalAdapter,
    embed,
    pick_device,
    truncate_blocks,
)
from fractal.model.checkpoint import build_adapter

PATHS = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 2], [1, 2, 0, 3]])
CLASSES = [["a", "b"], ["a", "b", "c"], ["x"], ["p", "q", "r", "s"]]


def config(recipe: str, levels: int = 4) -> dict:
    """Of the first `levels` of the four levels of CLASSES."""
    paths = {} if recipe == "published" else {"paths": PATHS[:, :levels].tolist()}
    shape = {"dim": 24, "num_levels": levels, "scale_dim": 5}
    return {"recipe": recipe, **shape, "levels": list(LEVELS), "block_levels": [*range(levels)], **paths}


def with_statistics(dim: int, n: int = 300) -> tuple[FractalAdapter, torch.Tensor, torch.Tensor]:
    """An adapter that knows n random cells (n, dim), and the paths that these are on."""
    torch.manual_seed(0)
    path = torch.arange(n) % len(PATHS)
    x = torch.randn(n, dim) * torch.linspace(3, 1, dim) + 2 * torch.randn(len(PATHS), dim)[path] + 1
    adapter = FractalAdapter(dim, 4, 5, PATHS).eval()
    adapter.fit_statistics(x, path, torch.arange(1.0, len(PATHS) + 1))
    return adapter, x, path


@pytest.mark.parametrize("recipe", ["fractal", "mrl", "published"])
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_shapes_and_lengths(recipe: str, levels: int):
    adapter = build_adapter(config(recipe, levels), CLASSES)
    x = torch.randn(7, 24)
    *prefixes, full = embed(adapter, x, batch=3)
    assert full.shape == (7, levels * 5)
    assert [p.shape for p in prefixes] == [(7, 5 * j) for j in range(1, levels)]
    for vectors in (*prefixes, full):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(7), atol=1e-6)


@pytest.mark.parametrize("recipe", ["fractal", "mrl"])
def test_a_prefix_is_a_cut_of_the_full_vector(recipe: str):
    adapter = build_adapter(config(recipe), CLASSES).eval()
    x = torch.randn(7, 24)
    for j in range(1, 5):
        assert torch.allclose(
            normalize(adapter.encode(x)[:, : 5 * j], dim=1), truncate_blocks(adapter.blocks(x), j), atol=1e-6
        )


def test_input_length_does_not_matter_to_ours():
    adapter = FractalAdapter(24, 2, 5, PATHS[:, :2]).eval()
    x = torch.randn(7, 24)
    assert torch.allclose(adapter.encode(x), adapter.encode(100 * x), atol=1e-5)


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda"):
            pick_device("cuda")


def test_blocks_are_made_of_class_probabilities_by_hand():
    """One cell at a time: two opinions on the paths, summed to classes, sharpened, and the anchors' mean under them."""
    adapter, x, _ = with_statistics(24)
    adapter.residual_scale.zero_()
    x = x[:3] + torch.tensor([[0.0], [0.0], [4.0]]) * torch.randn(24)  # the last one is strange
    logits, blocks = (part.detach().double() for part in (adapter(x).logits, adapter(x).blocks))
    whitened = ((normalize(x, dim=1) - adapter.mean) @ adapter.axes).double()
    strange = 0
    for cell in range(3):
        distances = [float((whitened[cell] - mean.double()).square().sum()) for mean in adapter.class_means]
        temperature = max(1.0, min(distances) / adapter.typical_distance.item()) ** 2
        strange += temperature > 1
        network = torch.exp(logits[cell] / temperature - (logits[cell] / temperature).max())
        means = torch.exp(
            torch.stack([(adapter.log_prior[i] - distances[i] / 4) / temperature for i in range(4)]).double()
        )
        path = 0.7 * network / network.sum() + 0.3 * means / means.sum()
        for j, anchors in enumerate(adapter.anchors.detach().double().split(adapter.classes)):
            classes = [sum(path[i] for i in range(4) if PATHS[i, j] == c) for c in range(len(anchors))]
            sharp = [torch.as_tensor(p) ** SHARPNESS[j] for p in classes]
            told = sum(p / sum(sharp) * a / a.norm() for p, a in zip(sharp, anchors, strict=True))
            assert torch.allclose(blocks[cell, j], told * BLOCK_SCALE[j], atol=1e-4)
    assert strange == 1


def test_the_blocks_send_no_gradient_to_the_probabilities():
    adapter = FractalAdapter(24, 2, 5, PATHS[:, :2])
    adapter.blocks(torch.randn(3, 24)).sum().backward()
    assert adapter.path_anchors.grad is None


@pytest.mark.parametrize("dim", [24, 3])
def test_distances_are_mahalanobis_distances_under_the_shrunk_covariance(dim: int):
    adapter, x, path = with_statistics(dim)
    unit = normalize(x, dim=1).double().numpy()
    means = np.stack([unit[path == k].mean(0) for k in range(len(PATHS))])
    within = shrunk_covariance(empirical_covariance(unit - means[path], assume_centered=True), SHRINKAGE)
    expected = cdist(unit, means, "mahalanobis", VI=np.linalg.inv(within)) ** 2
    whitened = (normalize(x, dim=1) - adapter.mean) @ adapter.axes
    assert np.allclose(adapter.squared_distances(whitened), expected, rtol=1e-3, atol=1e-3)
    assert adapter.typical_distance.item() == pytest.approx(
        np.quantile(expected.min(1), TYPICAL, method="lower"), rel=1e-3
    )


@pytest.mark.parametrize("dim", [24, 22, 17, 3, 1])
def test_the_blocks_show_slices_of_the_whitened_cell(dim: int):
    """The most varying axes in the last block, as many in each; what the blocks have no room for is left out."""
    adapter, x, _ = with_statistics(dim)
    with torch.inference_mode():
        shown = adapter.blocks(x)
        adapter.residual_scale.zero_()
        shown = (shown - adapter.blocks(x)) / (torch.tensor(RESIDUAL_SCALE)[:, None] * (dim / 128) ** 0.25)
    unit = normalize((normalize(x, dim=1) - adapter.mean) @ adapter.axes, dim=1)
    width = min(5, -(-dim // 4))
    for j in range(4):
        expected = unit[:, width * (3 - j) : width * (4 - j)]
        assert torch.allclose(shown[:, j, : expected.shape[1]], expected, atol=1e-5)
        assert not shown[:, j, expected.shape[1] :].abs().gt(1e-5).any()


def test_chance_moves_products_of_residuals_alike_at_any_width():
    """Of unrelated cells the products of the residuals, full vector before it is made unit length, spread as at 128."""
    torch.manual_seed(0)
    spread = {}
    for dim in (16, 64, 128):
        adapter = FractalAdapter(dim, 4, 32, PATHS).eval()
        with torch.inference_mode():
            blocks = (adapter.residual_scale * adapter.slices(normalize(torch.randn(2_000, dim), dim=1))).flatten(1)
        spread[dim] = (blocks[:1_000] * blocks[1_000:]).sum(1).std().item()
    assert spread[16] == pytest.approx(spread[128], rel=0.1)
    assert spread[64] == pytest.approx(spread[128], rel=0.1)
    wide = FractalAdapter(512, 4, 32, PATHS)  # shows 128 of its 512 numbers, at the same weights
    assert torch.equal(wide.residual_scale, torch.tensor(RESIDUAL_SCALE)[:, None])


def test_axes_come_in_the_order_of_the_principal_axes():
    """Without spread within the paths that differs by direction, whitening only scales them."""
    torch.manual_seed(0)
    x = normalize(torch.randn(400, 6) * torch.tensor([9.0, 5, 3, 2, 1, 0.5]), dim=1)
    adapter = FractalAdapter(6, 2, 3, torch.arange(400)[:, None].repeat(1, 2))  # one cell a path: no spread at all
    adapter.fit_statistics(x, torch.arange(400), torch.ones(400))
    cosine = normalize(adapter.axes.T, dim=1) @ torch.from_numpy(PCA(6).fit(x.numpy()).components_).float().T
    assert torch.allclose(cosine.abs(), torch.eye(6), atol=1e-2)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_cell_far_from_all_means_is_less_sure(share: float, monkeypatch: pytest.MonkeyPatch):
    """The network is as sure of a far cell as of a near one; what the blocks tell of it is less sure."""
    monkeypatch.setattr("fractal.model.adapter.MEANS_SHARE", share)
    adapter, x, _ = with_statistics(24)
    adapter.residual_scale.zero_()
    adapter.sharpness.fill_(1.0)
    anchors = adapter.anchors.detach()
    with torch.inference_mode():
        logits, _, near = adapter(x[:20])
        adapter.typical_distance.div_(100)
        again, _, far = adapter(x[:20])
    assert torch.equal(logits, again)
    mean = normalize(anchors, dim=1).split(adapter.classes)[-1].mean(0) * BLOCK_SCALE[-1]  # all classes alike
    assert ((far[:, -1] - mean).norm(dim=1) < (near[:, -1] - mean).norm(dim=1)).all()


def test_the_statistics_are_the_same_every_time():
    axes = [with_statistics(100, 60)[0].axes for _ in range(2)]  # fewer rows than numbers
    assert torch.equal(*axes)
    assert axes[0].isfinite().all()


def test_six_blocks(tmp_path: Path):
    """Scales of more than four blocks: the last entry is the last block's, the ones before it are repeated."""
    paths = torch.tensor([[0] * 6, [0, 0, 0, 1, 1, 1], [1] * 6])
    adapter = FractalAdapter(24, 6, 5, paths).eval()
    assert adapter.encode(torch.randn(3, 24)).shape == (3, 30)
    assert len(adapter.block_scale) == len(adapter.residual_scale) == 6
    assert adapter.block_scale[-1] == BLOCK_SCALE[-1]
