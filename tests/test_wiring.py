"""What mutants of the code showed to be untested, and one rule in the places that it holds for: small, by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TYPES, clustered, write_h5ad
from test_ingest import as_anndata_0_7

import eval as evaluate
import fractal
import ingest
import stratify
import train
from fractal.adapter import FractalAdapter
from fractal.cli import InputError
from fractal.commands import annotate, embed, export, fit, reference

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
