"""Scoring: types that were held out, controls that can't be fitted, intervals, and what eval.py refuses or warns of."""

import json
from pathlib import Path

import networkx as nx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import eval as evaluate
import train
from fractal.data.parquet import writing
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.ontology import CL_SLIM, load_graph, term_distances
from fractal.score.intervals import wilson_interval
from fractal.score.table import count_copies, ontology_ancestors, score, truth_of
from tests.conftest import TYPES, clustered

CLASSES = [["Immune"], ["Lymphoid", "Myeloid"], ["B", "T"], ["B cell", "T cell", "blob"]]


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    return load_graph(CL_SLIM)


def test_ontology_distances_by_hand(graph: nx.DiGraph):
    """is_a in CL: a memory B cell is a B cell by two steps or fewer, T cell and B cell meet at lymphocyte."""
    steps = term_distances(["B cell", "T cell", "lymphocyte of B lineage", "no such cell"], graph)
    assert steps[0, 0] == 0
    assert steps[0, 2] == 1
    assert steps[0, 1] > 1
    assert np.isnan(steps[3]).all()


def test_ancestors_are_the_term_and_all_above_but_the_root(graph: nx.DiGraph):
    above = ontology_ancestors(["B cell", "lymphocyte of B lineage", "no such cell"], graph)
    assert above[0].sum() == len(nx.descendants(graph, "CL:0000236"))  # itself, and all but "cell"
    assert (above[0] & above[1]).sum() == above[1].sum() == above[0].sum() - 1
    assert not above[2].any()


def example(graph: nx.DiGraph) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> vectors and labels of 6 B, 6 T and 6 unseen cells, and of neighbours: the unseen have T cells."""
    labels = torch.tensor([[0, 0, 0, 0]] * 6 + [[0, 0, 1, 1]] * 6 + [[0, 0, 1, 2]] * 6)
    labels[-1, 1] = 1
    x = torch.eye(3)[labels[:, 3]] + 0.01 * torch.randn(18, 3, generator=torch.Generator().manual_seed(0))
    guess = labels.clone()
    guess[12:] = torch.tensor([0, 0, 1, 1])
    return x, labels, guess[:, None].expand(-1, 5, -1)


def test_an_unseen_type_counts_in_bank_where_its_class_was_trained_on(graph: nx.DiGraph):
    x, labels, neighbours = example(graph)
    trained = [["Immune"], ["Lymphoid"], ["B", "T"], ["B cell", "T cell"]]
    truth = truth_of(LEVELS, labels, CLASSES, trained, ["blob"], None, graph)
    row = score(x, truth, neighbours)
    assert row["loo"] == dict.fromkeys(LEVELS, 1.0) | {"lineage": 17 / 18}
    assert row["unseen"]["loo"] == {"system": 1.0, "lineage": 5 / 6, "type": 1.0, "subtype": 1.0}
    # the one unseen cell of the lineage Myeloid does not count there: nothing Myeloid was trained on
    assert row["unseen"]["bank"] == {"system": 1.0, "lineage": 1.0, "type": 1.0, "subtype": None}
    assert row["seen"]["bank"] == dict.fromkeys(LEVELS, 1.0)
    assert row["bank"] == dict.fromkeys(LEVELS, 1.0)
    assert row["unseen_interval"]["loo"]["type"] is None  # one type says nothing of others
    assert row["seen_interval"]["loo"]["type"] == wilson_interval(12, 12)
    assert row["bank_distance_cells"] == 12  # blob is no term of the ontology
    assert row["bank_distance"] == 0
    assert row["loo_macro_f1"]["subtype"] == 1
    assert row["triplets"] == {"seen": None, "unseen": pytest.approx(row["triplets"]["unseen"])}


def test_a_predicted_sibling_is_some_steps_away(graph: nx.DiGraph):
    x, labels, neighbours = example(graph)
    swapped = neighbours.clone()
    swapped[:6] = labels[6]  # all B cells taken for T cells
    truth = truth_of(LEVELS, labels, CLASSES, CLASSES, [], None, graph)
    row = score(x, truth, swapped)
    steps = term_distances(["B cell", "T cell"], graph)[0, 1]
    assert row["bank_distance"] == pytest.approx(steps / 2)
    assert 0.3 < row["bank_hierarchical_f1"] < 1
    assert row["unseen"]["loo"] == dict.fromkeys(LEVELS)


def test_exact_copies_are_counted():
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    neighbours = np.stack([x[[1, 2]], x[[1, 0]], x[[0, 1]] + 1e-6])
    assert count_copies(x[:3], neighbours) == 1


def checkpoint_of(data: Path, out: Path, *flags: str) -> Path:
    train.main(["--input", str(data), "--output", str(out), "--epochs", "1", "--scale-dim", "4", *flags])
    return out


def test_types_held_out_are_scored_apart(stratified: Path, tmp_path: Path, capsys):
    model = checkpoint_of(stratified, tmp_path / "t.pt", "--test-types", "B cell", "fibroblast")
    out = tmp_path / "t.json"
    argv = ["--model-path", str(model), "--input", str(stratified), "--json", str(out), "--controls"]
    evaluate.main([*argv, "--rows-out", str(tmp_path / "rows")])
    printed = capsys.readouterr().out
    assert "held out: 2 whole types" in printed
    result = json.loads(out.read_text())
    for row in result["rows"]:
        lines = [line.split() for line in printed.splitlines() if line.startswith(f"| {row['embedding']} ")]
        assert {"unseen", "seen"} <= {word for line in lines for word in line}
        assert row["unseen"]["bank"]["subtype"] is None
        assert row["unseen"]["bank"]["system"] is not None  # a B cell's system has other types
        assert row["seen"]["bank"]["subtype"] is not None
    table = pq.read_table(stratified, columns=["level4_subtype"])["level4_subtype"].to_pylist()
    queries, bank = (np.load(tmp_path / "rows" / f"{name}.npy") for name in ("queries", "train"))
    unseen = np.isin(np.array(table, object), ["B cell", "fibroblast"])
    assert result["num_unseen"] == unseen[queries].sum() == unseen.sum()
    assert not unseen[bank].any()
    raw = result["rows"][0]
    share = unseen[queries].mean()
    apart = share * raw["unseen"]["loo"]["subtype"] + (1 - share) * raw["seen"]["loo"]["subtype"]
    assert raw["loo"]["subtype"] == pytest.approx(apart)


def test_copies_and_another_ontology_are_said(stratified: Path, tmp_path: Path, capsys):
    """Every cell of another file twice; the file says that it was made with another release."""
    model = checkpoint_of(stratified, tmp_path / "m.pt")
    vectors, codes = clustered(TYPES * 4), np.arange(24) % 6
    with writing(tmp_path / "twice", 16, False, {"cl_release": "2020-01-01", "anchors_sha256": "0"}) as writer:
        writer.append(np.repeat(vectors, 2, axis=0), [(np.repeat(codes, 2), TYPES)] * 4)
    argv = ["--model-path", str(model), "--input", str(tmp_path / "twice"), "--all-rows"]
    capsys.readouterr()
    evaluate.main(argv)
    printed = capsys.readouterr().out
    assert "warning: 48 test cells have an exact copy among other test cells" in printed
    assert "has another tree than this version's anchors make" in printed
    assert "was made with Cell Ontology 2020-01-01, and steps are counted in 2025-07-30" in printed


def test_two_checkpoints_of_one_name_are_both_in_the_json(stratified: Path, tmp_path: Path):
    one = checkpoint_of(stratified, tmp_path / "one" / "m.pt")
    two = checkpoint_of(stratified, tmp_path / "two" / "m.pt", "--seed", "1")
    argv = ["--model-path", str(one), str(two), "--input", str(stratified), "--json", str(tmp_path / "a.json")]
    evaluate.main(argv)
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["steerability"]) == ["one/m", "two/m"]
    assert len({row["embedding"] for row in result["rows"]}) == len(result["rows"])


def test_flags_are_checked_before_any_work(fails, tmp_path: Path):
    """No input is there, and none is looked for."""
    (tmp_path / "file").touch()
    argv = [evaluate.main, "--input", tmp_path / "none", "--model-path", tmp_path / "m.pt"]
    assert "is a file; name a folder" in fails(*argv, "--rows-out", tmp_path / "file")
    same = tmp_path / "x.json"
    assert "name another" in fails(*argv, "--json", same, "--cells-out", same)
    assert "--controls needs the training cells" in fails(*argv, "--all-rows", "--controls")
    assert "none can be in the bank" in fails(*argv, "--all-rows", "--bank", "all")
