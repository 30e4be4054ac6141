"""What mutants of the code showed to be untested, and one rule in the places that it holds for: small, by hand."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TYPES, clustered, write_h5ad
from test_ingest import as_anndata_0_7

import eval as evaluate
import fractal
import ingest
import stratify
import train
from fractal.adapter import FractalAdapter, PublishedAdapter
from fractal.atlas import levels_of, read_rows, writing
from fractal.cli import InputError, reason
from fractal.commands import annotate, embed, export, fit, reference
from fractal.evaluate import fit_controls
from fractal.files import check_folder
from fractal.hierarchical import HierarchicalObjective
from fractal.matching import singular
from fractal.reference.card import model_card
from fractal.reference.truth import report
from fractal.simulate import STUDIES, Atlas
from fractal.split import Split
from fractal.vectors import open_vectors

# One rule everywhere: inputs, flags, formats


def test_a_column_of_anndata_0_7_is_read_by_annotate_too(tmp_path: Path):
    """--truth and --over: names, not the codes "0", "1", and none for a cell without a label."""
    path = write_h5ad(tmp_path / "x.h5ad", clustered(TYPES[:3]), kind=pd.Categorical(["neuron", None, "B cell"]))
    as_anndata_0_7(path)
    found = annotate.read_obs(path, "kind")
    assert found is not None
    codes, names = found
    assert (codes.tolist(), names) == ([1, -1, 0], ["B cell", "neuron"])
    with pytest.raises(InputError, match="obs has no column '__categories'; it has kind$"):
        annotate.read_obs(path, "__categories")


H5AD = ["--h5ad", "a.h5ad"]
READS_AND_WRITES: list[tuple] = [  # script, flags that are needed, flags of inputs, flags of outputs, ending
    (ingest, H5AD, ["--h5ad", "--obo", "--label-map", "--hierarchy"], ["--output"], ""),
    (ingest, H5AD, ["--h5ad", "--obo"], ["--write-label-map"], ""),
    (stratify, [], ["--input"], ["--output"], ""),
    (train, [], ["--input", "--obo"], ["--output"], ""),
    (evaluate, [], ["--input", "--model-path", "--obo"], ["--json", "--cells-out"], ""),
    (annotate, ["a.npy", "--reference", "ref"], ["--obo", "--reference"], ["--output"], ".tsv"),
    (embed, ["a.npy"], ["--reference"], ["--output"], ".npy"),
    (fit, ["a.h5ad", "--use-rep", "X", "--labels", "k"], ["--label-map", "--hierarchy"], ["--write-label-map"], ""),
]
WAYS = [
    (script.main, needed, i, o, end) for script, needed, ins, outs, end in READS_AND_WRITES for i in ins for o in outs
]


@pytest.mark.parametrize(
    ("main", "needed", "source", "output", "ending"), WAYS, ids=lambda v: getattr(v, "__module__", None) or str(v)
)
def test_no_script_writes_onto_what_it_reads(
    fails, tmp_path: Path, monkeypatch, main, needed: list[str], source: str, output: str, ending: str
):
    """Whichever flags name it; said before anything is read."""
    monkeypatch.chdir(tmp_path)
    one = tmp_path / f"one{ending}"
    one.write_text("mine")
    flags = [flag for flag in needed if flag != source] if source not in needed else needed[: needed.index(source)]
    message = fails(main, *flags, source, one, output, one)
    assert any(words in message for words in ("is the input of", "takes --labels and --use-rep only"))
    assert one.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == [one.name]


@pytest.mark.parametrize(
    ("main", "needed", "sources"),
    [
        (fit.main, ["--use-rep", "X", "--labels", "k"], ["", "--label-map", "--hierarchy"]),
        (reference.main, [], ["--model-path", "--input", "--obo"]),
    ],
)
def test_no_folder_takes_the_place_of_what_is_read(fails, tmp_path: Path, main, needed: list[str], sources: list[str]):
    (tmp_path / "ref").mkdir()
    (tmp_path / "ref" / "mine").write_text("mine")
    for source in sources:
        argv = (
            ["a.h5ad"] * (main is fit.main and source != "") + [source] * (source != "") + [tmp_path / "ref" / "mine"]
        )
        assert "holds the input of" in fails(main, *argv, *needed, "--output", tmp_path / "ref")
    assert (tmp_path / "ref" / "mine").read_text() == "mine"


def test_the_partial_checkpoint_is_no_ontology_either(fails, tmp_path: Path):
    (tmp_path / "cl.partial.pt").write_text("mine")
    argv = ["--input", tmp_path / "none", "--recipe", "hce", "--obo", tmp_path / "cl.partial.pt"]
    assert "is the input of --obo" in fails(train.main, *argv, "--output", tmp_path / "cl.pt")


def test_a_key_of_obsm_is_refused_where_there_is_none(fails, tmp_path: Path):
    np.save(tmp_path / "x.npy", clustered(TYPES))
    argv = [tmp_path / "x.npy", "--reference", tmp_path, "--output", tmp_path / "o.tsv", "--use-rep", "X_pca"]
    assert "only an .h5ad has several vectors" in fails(annotate.main, *argv)


def test_fit_refuses_what_it_would_ignore(fails, tmp_path: Path):
    """No input is there: flags come first."""
    none = str(tmp_path / "none.h5ad")
    for more, words in (
        ({"levels": ["a", "b"], "label_map": {"x": "B cell"}}, "label_map: without effect beside levels"),
        ({"levels": ["a", "b"], "hierarchy": "t.tsv"}, "hierarchy: without effect beside levels"),
        ({"levels": ["a", "b"], "unmapped": "other"}, "unmapped: without effect beside levels"),
        ({"labels": "a", "hierarchy": "t.tsv", "unmapped": "other"}, "unmapped: without effect beside hierarchy"),
    ):
        with pytest.raises(InputError, match=words):
            fractal.fit(none, **more)
    argv = [none, "--use-rep", "X", "--labels", "a", "--write-label-map", tmp_path / "m.tsv"]
    assert "leave out --study, --max-cells" in fails(fit.main, *argv, "--study", "donor", "--max-cells", "5")


def test_an_adapter_of_128_numbers_can_be_exported(tmp_path: Path):
    """Whitening stretches directions of little variance by a thousand, and with them float32's rounding: above 1e-5."""
    torch.manual_seed(0)
    leaf = torch.arange(60)
    path = torch.arange(1_200) % 60
    x = torch.randn(1_200, 128) * torch.linspace(1, 0.001, 128) + torch.randn(60, 128)[path]
    adapter = FractalAdapter(128, 4, 8, torch.stack([leaf // 8, leaf // 4, leaf // 2, leaf], 1)).eval()
    adapter.fit_statistics(x, path, torch.ones(60))
    assert 1e-5 < export.export(adapter, tmp_path / "a.onnx") < 1e-3


# What mutants showed to be untested


def test_the_reason_of_an_error_is_its_first_line_or_its_kind():
    assert reason(ValueError("a\nb")) == "a"
    assert reason(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("word", "expected"),
    [("cells", "cell"), ("progenies", "progeny"), ("microvillus", "microvillus"), ("basis", "basis"),
     ("abscess", "abscess"), ("T", "T"), ("as", "as"), ("ies", "ie")],
)  # fmt: skip
def test_singular_by_hand(word: str, expected: str):
    assert singular(word) == expected


def test_a_file_of_empty_vectors_says_so(tmp_path: Path):
    pq.write_table(pa.table({"embedding": pa.array([[], []], pa.list_(pa.float32()))}), tmp_path / "x.parquet")
    with (
        pytest.raises(InputError, match=r"x\.parquet: its first cell has an empty vector"),
        open_vectors(tmp_path / "x.parquet"),
    ):
        pass


def test_a_level_s_name_may_hold_underscores(tmp_path: Path):
    with writing(tmp_path / "a", 2, False, {}, levels=("cell_class", "cell_sub_class")) as writer:
        writer.append(np.ones((1, 2), np.float32), [(np.array([0]), ["x"])] * 2)
    assert (
        read_rows(tmp_path / "a", np.array([0])).levels == levels_of(tmp_path / "a") == ("cell_class", "cell_sub_class")
    )


def test_without_studies_to_test_on_no_row_is_a_test_row(tmp_path: Path):
    with writing(tmp_path / "a", 2, True, {}) as writer:
        writer.append(np.eye(2, dtype=np.float32), [(np.array([0, 1]), ["x", "y"])] * 5)
    split = Split.draw(tmp_path / "a", "", test_ratio=0.0, holdout="study")
    assert split.is_test(tmp_path / "a").tolist() == [False, False]


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


def test_a_folder_with_many_other_files_shows_five(tmp_path: Path):
    for count, shown in ((5, r"\(1, 2, 3, 4, 5\)"), (6, r"\(1, 2, 3, 4, 5, \.\.\.\)")):
        (tmp_path / str(count)).touch()
        for i in range(count):
            (tmp_path / str(i + 1)).touch()
        with pytest.raises(InputError, match=shown):
            check_folder(tmp_path, ["own"])


def test_the_hierarchical_loss_of_a_certain_mistake_is_finite():
    """A probability that is 0 in float32: the loss is that of 1e-8."""
    torch.manual_seed(0)
    adapter = FractalAdapter(8, 2, 4, torch.tensor([[0, 0], [1, 1]]))
    objective = HierarchicalObjective(
        adapter, torch.randn(4, 8), torch.tensor([0, 0, 0, 1]), torch.tensor([3.0, 1.0]), torch.eye(2)
    )
    sure = torch.tensor([[0.0, 1_000.0]])
    with patch.object(adapter, "logits_and_blocks", return_value=(sure, torch.randn(1, 2, 4))):
        loss = objective(adapter, torch.tensor([0]))
    assert loss.isfinite()
    assert loss > -np.log(1e-8) - 0.1


def test_studies_are_careless_each_in_its_own_way():
    carelessness = Atlas(2_000, 0).carelessness
    assert len(set(carelessness.tolist())) == STUDIES
    assert carelessness.mean() == pytest.approx(1)


def test_controls_are_fitted_on_cells_that_lie_close_together():
    x = 1 + 0.01 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    encode, failed = fit_controls(x, np.arange(60) % 3, [2])
    assert not failed
    assert {"PCA", "LDA"} <= set(encode(x))


def test_a_card_names_the_file_that_it_was_made_from_and_its_columns():
    facts = {
        "recipe": "fractal", "reference_cells": 5, "reference_types": 2, "training_cells": 9, "config": {"dim": 3},
        "split": {"fingerprint": "0123abc"}, "scores": {"cells": 3, "flagged": 0.5, "levels": {"k": dict.fromkeys(
            ("coverage", "accuracy", "accuracy_forced", "calibration_error", "calibration_noise_floor"))}},
    }  # fmt: skip
    card = model_card(facts, 3)
    assert "Made from `unknown` (sha256 `0123abc`), with unknown" in card
    assert "release `none`." in card
    assert "On 3 test cells" in card
    assert "(50.0% are flagged as novel)" in card
    header = "| Level | Answered | Accuracy | If all were answered | ECE | ECE by chance |"
    assert header in card
    assert "| `k`   |        - |" in card


def test_what_a_report_calls_its_columns():
    """One cell answered wrongly at the finest level, none answered right there."""
    answered = {
        "k": np.array(["I"], object), "t": np.array(["y"], object), "level": np.array(["k"], object),
        "status": np.array(["ok"], object),
    }  # fmt: skip
    text = report(answered, np.array([0]), ["x"], [("I", "x"), ("I", "y")], ("k", "t"), "kind")
    assert "| Level | Accuracy, all cells | Answered | Accuracy, answered |" in text
    assert "| t     |               0.000 |    0.000 |                  - |" in text
    assert "| Confusion (true -> answered) | Cells | Share of the type |" in text
    assert "| x -> y                       |     1 |             1.000 |" in text
