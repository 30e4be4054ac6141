"""The adapters: shapes, what a prefix is, and that a checkpoint gives back what was saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.covariance import empirical_covariance, shrunk_covariance
from sklearn.decomposition import PCA
from torch import nn
from torch.nn.functional import normalize

from fractal.base.cli import InputError
from fractal.hierarchy.levels import LEVELS
from fractal.model.adapter import (
    BLOCK_SCALE,
    RESIDUAL_SCALE,
    SHARPNESS,
    SHRINKAGE,
    TYPICAL,
    FractalAdapter,
    PublishedAdapter,
    build_adapter,
    embed,
    load,
    pick_device,
    save,
)

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


FACTS: dict = {"split": {"seed": 3}, "training": {"epochs": 1}, "validation": None, "versions": {"torch": "2"}}


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
        assert torch.allclose(normalize(adapter.encode(x)[:, : 5 * j], dim=1), adapter.prefix(x, j), atol=1e-6)


def test_a_published_prefix_is_cut_before_the_last_norm():
    adapter = PublishedAdapter(24, 4, 5, 2, 4).eval()
    x = torch.randn(7, 24)
    blocks = adapter.blocks(x)
    for j in range(1, 5):
        expected = normalize(torch.cat([blocks[:, i] for i in range(j)], 1), dim=1)
        assert torch.allclose(adapter.prefix(x, j), expected, atol=1e-6)
        assert torch.allclose(adapter.padded_prefix(blocks, j)[:, : 5 * j], adapter.prefix(x, j), atol=1e-6)
        assert not adapter.padded_prefix(blocks, j)[:, 5 * j :].any()
    assert not torch.allclose(normalize(adapter.encode(x)[:, :5], dim=1), adapter.prefix(x, 1), atol=1e-2)


@pytest.mark.parametrize("dim", [24, 22])  # 8 heads, 1 head
def test_folded_attention_equals_multihead_attention(dim: int):
    adapter = PublishedAdapter(dim, 2, 3, 2, 2).eval()
    heads = 8 if dim % 8 == 0 else 1
    attention = nn.MultiheadAttention(dim, heads, dropout=0.1, batch_first=True).eval()
    with torch.no_grad():
        attention.in_proj_weight[2 * dim :] = adapter.value.weight
        attention.in_proj_bias[2 * dim :] = torch.randn(dim)
        adapter.value.bias.copy_(attention.in_proj_bias[2 * dim :])
        attention.out_proj.load_state_dict(adapter.attended.state_dict())
    x = torch.randn(6, dim)
    expected = attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]
    values = adapter.value(x).unflatten(1, (adapter.heads, -1))
    assert torch.allclose(adapter.attended(adapter.drop_heads(values).flatten(1)), expected, atol=1e-6)


def test_head_dropout_drops_whole_heads():
    adapter = PublishedAdapter(24, 2, 3, 2, 2).train()
    kept = adapter.drop_heads(torch.ones(2000, 8, 3))
    assert torch.all((kept == 0).all(2) | (kept == 1 / 0.9).all(2))
    assert (kept == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_input_length_does_not_matter_to_ours():
    adapter = FractalAdapter(24, 2, 5, PATHS[:, :2]).eval()
    x = torch.randn(7, 24)
    assert torch.allclose(adapter.encode(x), adapter.encode(100 * x), atol=1e-5)


@pytest.mark.parametrize("recipe", ["fractal", "published"])
def test_a_checkpoint_gives_back_the_adapter(tmp_path: Path, recipe: str):
    adapter = build_adapter(config(recipe), CLASSES)
    save(tmp_path / "a.pt", adapter, config(recipe), CLASSES, **FACTS)
    loaded, checkpoint = load(tmp_path / "a.pt")
    x = torch.randn(7, 24)
    assert all(torch.equal(a, b) for a, b in zip(embed(adapter, x), embed(loaded, x), strict=True))
    assert (checkpoint["classes"], checkpoint["split"]) == (CLASSES, {"seed": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_files_that_are_no_checkpoints(tmp_path: Path):
    path = tmp_path / "a.pt"
    with pytest.raises(InputError, match=r"a\.pt: no such checkpoint"):
        load(path)
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(path)
    torch.save({"state": {}}, path)
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(path)
    torch.save(nn.Linear(2, 2), path)  # a pickled object: weights_only refuses to run it
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(path)
    save(path, build_adapter(config("fractal"), CLASSES), config("fractal"), CLASSES, **FACTS)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(path)


@pytest.mark.parametrize("recipe", ["fractal", "published"])
@pytest.mark.parametrize("missing", ["split", "training", "validation", "versions", "classes", "config", "state"])
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path, recipe: str, missing: str):
    save(tmp_path / "a.pt", build_adapter(config(recipe), CLASSES), config(recipe), CLASSES, **FACTS)
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    for value in ("gone", 3):
        checkpoint[missing] = value
        torch.save(checkpoint, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
            load(tmp_path / "a.pt")
    del checkpoint[missing]
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(tmp_path / "a.pt")


MANY = 3_000  # paths and classes: their matrix would take 36 MB, from a file of 1.7 MB
GREEDY: dict[str, dict] = {
    "more paths than anchors": {"paths": PATHS.tolist() * 10_000},
    "a class that no anchor has": {"paths": [*PATHS.tolist()[:-1], [10**9, 2, 0, 3]]},
    "a wide input": {"dim": 10**9},
    "wide blocks": {"scale_dim": 10**9},
    "many blocks": {"num_levels": 10**9},
    "paths of other lengths": {"paths": [[0, 0, 0], *PATHS.tolist()[1:]]},
    "negative classes": {"paths": [[-1, 0, 0, 0], *PATHS.tolist()[1:]]},
    "a level that there is not": {"block_levels": [0, 1, 2, 4]},
    "too many levels": {"levels": ["a"] * 7},
    "a recipe that is no word": {"recipe": "\x1b[2J"},
}


@pytest.mark.parametrize("change", GREEDY.values(), ids=GREEDY.keys())
def test_a_config_that_asks_for_more_than_its_weights_is_refused(tmp_path: Path, change: dict, monkeypatch):
    bad = config("fractal") | change
    save(tmp_path / "a.pt", build_adapter(config("fractal"), CLASSES), bad, CLASSES, **FACTS)
    monkeypatch.setattr("fractal.model.adapter.build_adapter", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(tmp_path / "a.pt")


def test_few_weights_do_not_become_a_large_matrix(tmp_path: Path, monkeypatch):
    """Every path its own class at every level: path_to_class grows with the square of what the file holds."""
    paths = [[i] * 4 for i in range(MANY)]
    state = {
        name: torch.zeros(size) for name, size in FractalAdapter.shapes(config("fractal") | {"paths": paths}).items()
    }
    big = {"config": config("fractal") | {"paths": paths}, "classes": CLASSES, "state": state, **FACTS}
    torch.save(big, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 4_000_000
    monkeypatch.setattr("fractal.model.adapter.build_adapter", lambda *_: pytest.fail("144 MB were taken"))
    with pytest.raises(InputError, match="not a checkpoint"):
        load(tmp_path / "a.pt")


def test_a_weight_that_is_a_view_of_one_number_is_refused(tmp_path: Path, monkeypatch):
    adapter = build_adapter(config("fractal"), CLASSES)
    state = adapter.state_dict() | {"path_anchors": torch.zeros(1).expand(4, 128)}
    torch.save({"config": config("fractal"), "classes": CLASSES, "state": state, **FACTS}, tmp_path / "a.pt")
    monkeypatch.setattr("fractal.model.adapter.build_adapter", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(InputError, match="not a checkpoint"):
        load(tmp_path / "a.pt")


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
        adapter.typical_distance /= 100
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
