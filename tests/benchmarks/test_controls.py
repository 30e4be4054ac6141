"""The controls: the hierarchical loss against a slow version, and that they train and are scored like a recipe."""

import json
import math
from pathlib import Path
from unittest.mock import patch

import networkx as nx
import pytest
import torch
from torch.nn.functional import normalize

import eval as evaluate
from benchmarks import controls
from benchmarks.controls import HierarchicalObjective, ancestor_matrix, shuffled_tree
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.model.adapter import TAU, FractalAdapter
from fractal.model.checkpoint import load
from fractal.model.objective import TrainingRows

pytestmark = pytest.mark.slow

LABELS = torch.tensor(
    [[0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 2], [1, 2, 2, 3], [1, 2, 2, 3], [1, 2, 3, 4], [0, 0, 0, 0]]
)
FREQUENCY = torch.tensor([90.0, 1, 5, 3, 1])  # cells of each path in the whole file


def test_ancestors_of_blood_cells_by_hand():
    """A term is above the types that CL says; the tree's nodes stand in for a type that CL does not know."""
    graph = load_graph(CL_SLIM)
    known = [("I", "B cell"), ("I", "T cell"), ("S", "fibroblast")]
    matrix = ancestor_matrix(known, graph)
    assert matrix.shape[0] == 3
    columns = matrix.T.tolist()
    assert columns.count([1, 0, 0]) >= 1  # B cell itself, and what is only above it
    assert [1, 1, 0] in columns  # lymphocyte
    assert [1, 1, 1] in columns  # cell
    assert [1, 0, 1] not in columns
    terms = {"CL:0000236", "CL:0000084", "CL:0000057"}
    above = terms.union(*(nx.descendants(graph, term) for term in terms))
    assert len(columns) == len(above)
    own = ancestor_matrix([("I", "x1"), ("I", "x2"), ("S", "x3")], graph).T.tolist()
    assert sorted(own) == sorted([[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    mixed = ancestor_matrix([("I", "B cell"), ("I", "x2")], graph).T.tolist()
    assert [1, 1] in mixed  # I is above both
    assert [0, 1] in mixed


def test_the_hierarchical_loss_equals_the_slow_version():
    torch.manual_seed(0)
    levels = [3, 3, 3]
    paths, path = LABELS[:, levels].unique(dim=0, return_inverse=True)
    x, adapter = torch.randn(7, 12), FractalAdapter(12, 3, 4, paths).eval()
    ancestors = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 1], [1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).float()
    objective = HierarchicalObjective(adapter, TrainingRows(x, path, FREQUENCY, path.bincount(), paths, []), ancestors)
    sampled = [int((path == c).sum()) + 0.5 for c in range(5)]
    natural = [int(f) + 0.5 for f in FREQUENCY]
    expected, rows = 0.0, [6, 0, 3, 4]
    for row in rows:
        logits, _, blocks = adapter(x[row : row + 1])
        softmaxes = [logits[0].tolist()]
        for j in (1, 2, 3):
            prefix = normalize(blocks[0, :j].flatten(), dim=0).detach()
            softmaxes.append([float(prefix @ p / p.norm()) / TAU for p in objective.prototypes[j - 1].detach()])
        for scores in softmaxes:
            odds = [
                math.exp(s) * (here / sum(sampled)) / (file / sum(natural))
                for s, here, file in zip(scores, sampled, natural, strict=True)
            ]
            for term in range(4):
                if ancestors[path[row], term]:
                    below = sum(o for o, inside in zip(odds, ancestors[:, term], strict=True) if inside)
                    expected -= math.log(below / sum(odds)) / (11 / 5) / len(rows)  # 11 ones in 5 rows
    assert objective(adapter, torch.tensor(rows)).item() == pytest.approx(expected, rel=1e-4)
    objective(adapter, torch.tensor(rows)).backward()
    assert all(p.grad is not None for p in [*adapter.parameters(), *objective.parameters()])


def test_the_hierarchical_loss_of_a_certain_mistake_is_finite():
    """A probability that is 0 in float32: the loss is that of 1e-8."""
    torch.manual_seed(0)
    adapter = FractalAdapter(8, 2, 4, torch.tensor([[0, 0], [1, 1]]))
    path, frequency = torch.tensor([0, 0, 0, 1]), torch.tensor([3.0, 1.0])
    rows = TrainingRows(torch.randn(4, 8), path, frequency, path.bincount(), adapter.paths, [])
    objective = HierarchicalObjective(adapter, rows, torch.eye(2))
    sure = torch.tensor([[0.0, 1_000.0]])
    with patch.object(adapter, "forward", return_value=(sure, None, torch.randn(1, 2, 4))):
        loss = objective(adapter, torch.tensor([0]))
    assert loss.isfinite()
    assert loss > -math.log(1e-8) - 0.1


@pytest.mark.parametrize("name", ["mrl", "hce"])
def test_a_control_is_trained_and_scored_like_a_recipe(stratified: Path, tmp_path: Path, name: str, capsys):
    model, figures = tmp_path / "control.pt", tmp_path / "a.json"
    argv = ["train", name, "--input", str(stratified), "--output", str(model), "--epochs", "3", "--scale-dim", "8"]
    controls.main([*argv, "--batch-size", "64", "--device", "cpu"])
    assert capsys.readouterr().out.startswith(f"recipe {name}: lr 0.002, batch 64")
    adapter, checkpoint = load(model)
    assert checkpoint["config"]["recipe"] == name
    paths = torch.tensor(checkpoint["config"]["paths"])
    assert (paths == paths[:, :1]).all()  # every block tells the finest level
    assert isinstance(adapter, FractalAdapter)
    evaluate.main(["--model-path", str(model), "--input", str(stratified), "--json", str(figures), "--device", "cpu"])
    rows = {row["embedding"]: row for row in json.loads(figures.read_text())["rows"]}
    assert rows["full"]["loo"]["subtype"] > 0.8


def test_the_ontology_of_hce_is_read(stratified: Path, fails, tmp_path: Path):
    argv = ["train", "hce", "--input", stratified, "--output", tmp_path / "a.pt", "--obo", tmp_path / "none.obo"]
    assert "none.obo" in fails(controls.main, *argv)
    assert not (tmp_path / "a.pt").exists()


def test_a_shuffled_tree_has_the_same_shape():
    tree = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 2], [1, 2, 3, 3], [1, 2, 3, 4]])
    labels = tree[torch.randint(0, 5, (200,))]
    mixed = shuffled_tree(labels, seed=0)
    assert torch.equal(mixed[:, 3], labels[:, 3])
    assert not torch.equal(mixed, labels)
    paths, before = {tuple(row[:3]) for row in mixed.tolist()}, {tuple(row[:3]) for row in labels.tolist()}
    assert paths == before
    assert len({tuple(row) for row in mixed.tolist()}) == 5  # one path per subtype


def test_silhouettes_on_a_shuffled_tree(stratified: Path, tmp_path: Path, capsys):
    """The systems lie apart in the true tree only; the subtypes stay as they are."""
    model = tmp_path / "m.pt"
    argv = ["--input", str(stratified), "--output", str(model), "--epochs", "3", "--scale-dim", "8", "--device", "cpu"]
    controls.train_recipe("fractal", argv)
    capsys.readouterr()
    controls.main(["shuffled", "--model-path", str(model), "--input", str(stratified)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines[:2]] == [["full", "true"], ["full", "shuffled"]]
    assert lines[-1][0] == "prefix 1"
    assert float(lines[-2][2]) > 0.5 > float(lines[-1][2])
    assert all(true[-1] == mixed[-1] for true, mixed in zip(lines[::2], lines[1::2], strict=True))
