"""The published loss against a version with one Python step per cell and pair, and what it draws."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fractal.model import published
from fractal.model.adapter import truncate_blocks
from fractal.model.objective import TrainingRows
from fractal.model.published import PublishedAdapter, PublishedObjective, published_loss
from tests.model.test_objective import LABELS, training_rows


def published_rows(num_levels: int = 4) -> TrainingRows:
    lineages, path = LABELS[:, :num_levels].unique(dim=0, return_inverse=True)
    return training_rows(torch.randn(7, 16), path, lineages)


def slow_published(adapter: PublishedAdapter, blocks: tuple, labels: Tensor, mask: Tensor, j: int) -> float:
    """The published loss with one Python step per cell and per pair."""
    anchor, leaf_positive, again, prefix_positive = blocks
    n, num_levels, scale_dim = anchor.shape

    def full(block_rows: Tensor) -> Tensor:
        return torch.stack([normalize(adapter.norm_full(torch.cat(list(b))), dim=0) for b in block_rows])

    def contrast(a: Tensor, p: Tensor) -> float:
        losses = []
        for i in range(n):
            logits = [float(a[i] @ p[k]) / 0.07 for k in range(n)]
            losses.append(math.log(sum(math.exp(v) for v in logits)) - logits[i])
        return sum(losses) / n

    def margin(z: Tensor, y: Tensor) -> float:
        losses = []
        for i in range(n):
            positive = [float(z[i] @ z[k]) for k in range(n) if k != i and y[k] == y[i]]
            negative = [float(z[i] @ z[k]) for k in range(n) if y[k] != y[i]]
            if positive and negative:
                losses.append(max(0.0, sum(negative) / len(negative) - sum(positive) / len(positive) + 0.2))
        return sum(losses) / len(losses) if losses else 0.0

    masked = torch.stack([torch.stack([anchor[i, s] * mask[i, s] for s in range(num_levels)]) for i in range(n)])
    leaf = full(masked)
    loss = contrast(leaf, full(leaf_positive)) + 0.5 * margin(leaf, labels[:, -1])
    loss += float(cross_entropy(adapter.leaf(leaf), labels[:, -1]))
    rows = []
    for b in again:
        cut = torch.cat([b[s] for s in range(j)])
        rows.append(torch.cat([cut / cut.norm(), torch.zeros((num_levels - j) * scale_dim)]))
    prefix = torch.stack(rows)
    side = contrast(prefix, full(prefix_positive)) + 0.5 * margin(prefix, labels[:, j - 1])
    if j == 1:
        side += float(cross_entropy(adapter.top(prefix), labels[:, 0]))
    if j == num_levels:
        side += float(cross_entropy(adapter.leaf(prefix), labels[:, -1]))
    return loss + 0.6 * side


@pytest.mark.parametrize(("num_levels", "j"), [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 2), (4, 3), (4, 4)])
def test_the_published_loss_equals_the_slow_version(num_levels: int, j: int):
    adapter = PublishedAdapter(16, num_levels, 3, 2, 5).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():  # so that the norms' weights are not all one
            parameter.add_(0.1 * torch.randn_like(parameter))
        blocks = tuple(adapter.blocks(torch.randn(7, 16)) for _ in range(4))
        mask = torch.randint(0, 2, (7, num_levels)).float()
        labels = LABELS[:, :num_levels]
        found = published_loss(adapter, blocks, labels, mask, j)
        assert found.item() == pytest.approx(slow_published(adapter, blocks, labels, mask, j), rel=1e-4)


def test_published_positives_are_others_of_the_same_class():
    adapter = PublishedAdapter(16, 4, 3, 2, 5)
    objective = PublishedObjective(adapter, published_rows())
    rows = torch.arange(7).repeat(300)
    for level in range(4):
        drawn = objective.positives(rows, level)
        assert torch.equal(LABELS[drawn, level], LABELS[rows, level])
        for row in range(7):
            others = {i for i in range(7) if i != row and LABELS[i, level] == LABELS[row, level]} or {row}
            assert set(drawn[rows == row].tolist()) == others  # never itself, and each of them in turn


def test_the_published_draws(monkeypatch: pytest.MonkeyPatch):
    """What forward hands to the loss: j is the mode of the lengths drawn, positives and masks fit to it."""
    torch.manual_seed(0)
    seen: list[tuple[Tensor, int]] = []
    drawn, levels = [], []
    multinomial, positives = torch.multinomial, PublishedObjective.positives

    def spy_multinomial(*args, **kwargs) -> Tensor:
        drawn.append(multinomial(*args, **kwargs) + 1)
        return drawn[-1] - 1

    def spy_positives(self: PublishedObjective, rows: Tensor, level: int) -> Tensor:
        levels.append(level)
        return positives(self, rows, level)

    def spy_loss(adapter: PublishedAdapter, blocks: tuple, labels: Tensor, mask: Tensor, j: int) -> Tensor:
        seen.append((mask, j))
        return torch.zeros(())

    monkeypatch.setattr(torch, "multinomial", spy_multinomial)
    monkeypatch.setattr(PublishedObjective, "positives", spy_positives)
    monkeypatch.setattr(published, "published_loss", spy_loss)
    adapter = PublishedAdapter(16, 4, 3, 2, 5)
    objective = PublishedObjective(adapter, published_rows())
    for size in [256] * 200 + [3] * 100:  # among three, every length is at times the mode
        objective(adapter, torch.randint(0, 7, (size,)))
    js = [j for _, j in seen]
    for lengths, j in zip(drawn, js, strict=True):
        counts = [int((lengths == k).sum()) for k in range(1, 5)]
        assert j == 1 + counts.index(max(counts))
    assert sum(j == 1 for j in js[:200]) / 200 == pytest.approx(0.97, abs=0.04)  # so prefix 1 gets nearly all
    assert set(js) == {1, 2, 3, 4}
    assert levels == [level for j in js for level in (-1, j - 1)]
    kept = torch.cat([mask for mask, _ in seen]).mean(0)
    assert kept.tolist() == pytest.approx([0.95, 0.9, 0.8, 0.7], abs=0.01)


def test_published_objective_runs_and_has_gradients():
    torch.manual_seed(0)
    adapter = PublishedAdapter(16, 3, 3, 2, 4)
    objective = PublishedObjective(adapter, published_rows(3))
    objective(adapter, torch.arange(7)).backward()
    assert all(p.grad is not None for name, p in adapter.named_parameters() if not name.startswith(("top", "leaf")))


def test_a_published_prefix_is_cut_before_the_last_norm():
    adapter = PublishedAdapter(24, 4, 5, 2, 4).eval()
    x = torch.randn(7, 24)
    blocks = adapter.blocks(x)
    for j in range(1, 5):
        expected = normalize(torch.cat([blocks[:, i] for i in range(j)], 1), dim=1)
        assert torch.allclose(truncate_blocks(blocks, j), expected, atol=1e-6)
        assert torch.allclose(adapter.padded_prefix(blocks, j)[:, : 5 * j], truncate_blocks(blocks, j), atol=1e-6)
        assert not adapter.padded_prefix(blocks, j)[:, 5 * j :].any()
    assert not torch.allclose(normalize(adapter.encode(x)[:, :5], dim=1), truncate_blocks(blocks, 1), atol=1e-2)


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


def test_the_blocks_of_the_published_adapter_equal_the_slow_version():
    """Each scale adds .1 / (1 + .3 i) of the projected input, i from 0, to the output of the one shared block."""
    torch.manual_seed(0)
    adapter = PublishedAdapter(16, 3, 3, 2, 5).eval()
    x = torch.randn(4, 16)
    first = h = adapter.input(x)
    for i in range(3):
        h = h + adapter.attended(adapter.value(adapter.norm1(h)))
        h = h + adapter.ffn(adapter.norm2(h)) + 0.1 / (1 + 0.3 * i) * first
        assert torch.allclose(adapter.blocks(x)[:, i], adapter.scales[i](h), atol=1e-6)
    bound = (6 / 64) ** 0.5
    for end, of_end in ((-bound, adapter.value.weight.min()), (bound, adapter.value.weight.max())):
        assert of_end.item() == pytest.approx(end, rel=0.05)
    assert not adapter.value.bias.any()
    assert not adapter.attended.bias.any()
