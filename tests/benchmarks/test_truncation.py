"""Search with every prefix: its results against a full sort, and what the table says of sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import train
from benchmarks import truncation
from benchmarks.truncation import funnel, search_table
from fractal.hierarchy.levels import LEVELS
from fractal.search.exact import nearest
from tests.search.test_exact import cells

pytestmark = pytest.mark.slow


@pytest.fixture
def lines() -> dict[str, list[str]]:
    """Search -> its line. Four blocks of 2 numbers, 4,000 cells, whose last label tells the half of the first axis."""
    torch.manual_seed(0)
    x = torch.randn(4_050, 8)
    labels = torch.zeros(4_050, 4, dtype=torch.int64)
    labels[:, 3] = (x[:, 0] > 0).long()
    prefixes = [normalize(x[:, : 2 * j], dim=1) for j in range(1, 5)]
    text = search_table([p[:50] for p in prefixes], [p[50:] for p in prefixes], labels[:50], labels[50:], LEVELS)
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    lines = {line[0]: line for line in found}
    cosines = prefixes[-1][:50] @ prefixes[-1][50:].T
    for name, width in (("prefix 1", 2), ("prefix 3", 6)):
        cut = normalize(x[:, :width], dim=1)
        ours = (cut[:50] @ cut[50:].T).argsort(1, descending=True)[:, :10]
        truth = cosines.argsort(1, descending=True)[:, :10]
        share = sum(len(set(a) & set(b)) for a, b in zip(ours.tolist(), truth.tolist(), strict=True)) / 500
        lines[f"expected, {name}"] = [f"{share:.3f}"]
    return lines


def test_recall_equals_a_full_sort(lines: dict[str, list[str]]):
    assert lines["exact, full"][5] == "1.000"
    for name in ("prefix 1", "prefix 3"):
        assert lines[f"exact, {name}"][5] == lines[f"expected, {name}"][0]
    assert float(lines["hnswlib, full"][5]) > 0.9
    assert float(lines["funnel, prefix 1 (2,000) > full (10)"][5]) > float(lines["exact, prefix 1"][5])


def test_bytes_per_cell(lines: dict[str, list[str]]):
    assert [lines[f"exact, {name}"][1] for name in ("full", "full, float16", "prefix 1")] == ["32", "16", "8"]
    assert lines["funnel, prefix 2 (2,000) > prefix 3 (100) > full (10)"][1] == "72"  # 16 + 24 + 32
    assert int(lines["hnswlib, full"][1]) > 32 + 4 * 32  # 2 M = 32 links of 4 bytes, M = 16


def test_accuracy_is_that_of_the_neighbours(lines: dict[str, list[str]]):
    assert lines["exact, full"][6:9] == ["1.000"] * 3  # one class each
    assert 0.8 < float(lines["exact, full"][9]) <= 1


def test_it_takes_a_checkpoint_and_its_file(stratified: Path, tmp_path: Path, capsys):
    model = tmp_path / "m.pt"
    argv = ["--input", str(stratified), "--device", "cpu"]
    train.main([*argv, "--output", str(model), "--epochs", "1", "--scale-dim", "4"])
    capsys.readouterr()
    truncation.main([*argv, "--model-path", str(model)])
    text = capsys.readouterr().out
    full = next(line.split("|") for line in text.splitlines() if line.startswith("| exact, full "))
    assert full[6].strip() == "1.000"  # recall
    assert "test cells against" in text


def slow_funnel(query: np.ndarray, bank: np.ndarray, widths: list[int], keep: list[int]) -> list[int]:
    left = list(range(len(bank)))
    for width, k in zip(widths, keep, strict=True):
        cosine = {
            i: query[:width] @ bank[i, :width] / np.linalg.norm(query[:width]) / np.linalg.norm(bank[i, :width])
            for i in left
        }
        left = sorted(left, key=lambda i: -cosine[i])[:k]
    return left


def test_a_funnel_by_hand():
    queries, bank, widths, keep = cells(12, 9, 0), cells(300, 9, 1), [2, 5, 9], [60, 20, 4]
    stages = [[normalize(x[:, :width], dim=1) for width in widths] for x in (queries, bank)]
    found = funnel(stages[0], stages[1], keep).tolist()
    assert found == [slow_funnel(q, bank.double().numpy(), widths, keep) for q in queries.double().numpy()]


def test_a_funnel_that_keeps_all_is_exact():
    queries, bank = cells(12, 9, 0), cells(300, 9, 1)
    unit = normalize(queries, dim=1), normalize(bank, dim=1)
    short = [normalize(x[:, :3], dim=1) for x in unit]
    assert torch.equal(funnel([short[0], unit[0]], [short[1], unit[1]], [300, 7]), nearest(queries, bank, 7))
