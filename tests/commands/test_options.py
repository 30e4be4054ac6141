"""Flags that name files, of all commands and scripts: no output takes the place of an input."""

from pathlib import Path

import numpy as np
import pytest

import eval as evaluate
import ingest
import stratify
import train
from fractal.__main__ import COMMANDS, start
from fractal.__main__ import main as call
from fractal.base.errors import InputError
from fractal.commands import annotate, embed, fit, reference
from tests.conftest import TYPES, clustered

H5AD = ["--h5ad", "a.h5ad"]


READS_AND_WRITES: list[tuple] = [  # script, flags that are needed, flags of inputs, flags of outputs, ending
    (ingest, H5AD, ["--h5ad", "--obo", "--label-map", "--hierarchy"], ["--output"], ""),
    (ingest, H5AD, ["--h5ad", "--obo"], ["--write-label-map"], ""),
    (stratify, [], ["--input"], ["--output"], ""),
    (train, [], ["--input"], ["--output"], ""),
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
        said = fails(main, *argv, *needed, "--output", tmp_path / "ref")
        assert said.startswith(f"error: --output {tmp_path / 'ref'}: holds the input of {source or 'input'}, ")
    assert (tmp_path / "ref" / "mine").read_text() == "mine"


def test_a_key_of_obsm_is_refused_where_there_is_none(fails, tmp_path: Path):
    np.save(tmp_path / "x.npy", clustered(TYPES))
    argv = [tmp_path / "x.npy", "--reference", tmp_path, "--output", tmp_path / "o.tsv", "--use-rep", "X_pca"]
    assert "only an .h5ad has several vectors" in fails(annotate.main, *argv)


def test_the_command_line_names_its_commands(monkeypatch, capsys):
    for argv in (["fractal"], ["fractal", "-h"], ["fractal", "--help"]):
        monkeypatch.setattr("sys.argv", argv)
        start()
        said = capsys.readouterr().out
        assert said.startswith("usage: fractal COMMAND ...\n\n  ")
        assert said.endswith("Each has its own help: fractal COMMAND --help\n")
        assert all(f"\n  {name:12}{text}\n" in said for name, text in COMMANDS.items())
    monkeypatch.setattr("sys.argv", ["fractal", "fit", "--help"])
    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: fractal fit ")
    with pytest.raises(InputError, match=r"^fractal a\\x1bb: there is no such command; there are encode, fit, "):
        call(["a\x1bb"])


def test_an_input_is_asked_for(fails):
    message = fails(annotate.main, "--reference", "r", "--output", "o.tsv")
    assert message == "error: name one input: fractal annotate new.h5ad --reference FOLDER --output FILE"
