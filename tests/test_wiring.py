"""What mutants of the code showed to be untested, and one rule in the places that it holds for: small, by hand."""

from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import eval as evaluate
import fractal
import ingest
import stratify
import train
from benchmarks.annotation import off_path
from benchmarks.simulate import STUDIES, SimulatedAtlas
from fractal.__main__ import COMMANDS, start
from fractal.__main__ import main as call
from fractal.annotate.card import model_card
from fractal.annotate.space import Comparison
from fractal.base.errors import InputError, reason
from fractal.base.files import check_folder, real_paths
from fractal.commands import annotate, embed, fit, reference
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.data.parquet import writing
from fractal.hierarchy.matching import match_names, singular
from fractal.hierarchy.ontology import CL_SLIM, load_graph, read_hierarchy, tree_of_columns
from fractal.model.published import PublishedAdapter
from fractal.model.split import Split
from fractal.score.embeddings import Subset, fit_controls
from fractal.score.table import score, truth_of
from tests.conftest import TYPES, clustered, write_h5ad
from tests.test_ingest import as_anndata_0_7

# One rule everywhere: inputs, flags, formats


def test_a_column_of_anndata_0_7_is_read_by_annotate_too(tmp_path: Path):
    """--truth and --over: names, not the codes "0", "1", and none for a cell without a label."""
    path = write_h5ad(tmp_path / "x.h5ad", clustered(TYPES[:3]), kind=pd.Categorical(["neuron", None, "B cell"]))
    as_anndata_0_7(path)
    with Cells.open(path, "X_pca") as cells:
        codes, names = cells.codes("kind")
        assert (codes.tolist(), names) == ([1, -1, 0], ["B cell", "neuron"])
        with pytest.raises(InputError, match="obs has no column '__categories'; it has kind$"):
            cells.codes("__categories")


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


# What mutants showed to be untested


@pytest.fixture(scope="module")
def graph() -> nx.DiGraph:
    return load_graph(CL_SLIM)


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
        Cells.open(tmp_path / "x.parquet"),
    ):
        pass


def test_a_level_s_name_may_hold_underscores(tmp_path: Path):
    with writing(tmp_path / "a", 2, False, {}, levels=("cell_class", "cell_sub_class")) as writer:
        writer.append(np.ones((1, 2), np.float32), [(np.array([0]), ["x"])] * 2)
    assert (
        Atlas.open(tmp_path / "a").read(np.array([0])).levels
        == Atlas.open(tmp_path / "a").levels
        == ("cell_class", "cell_sub_class")
    )


def test_without_studies_to_test_on_no_row_is_a_test_row(tmp_path: Path):
    with writing(tmp_path / "a", 2, True, {}) as writer:
        writer.append(np.eye(2, dtype=np.float32), [(np.array([0, 1]), ["x", "y"])] * 5)
    split = Split.draw(Atlas.open(tmp_path / "a"), test_ratio=0.0, holdout="study")
    assert split.is_test(Atlas.open(tmp_path / "a")).tolist() == [False, False]


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


def test_studies_are_careless_each_in_its_own_way():
    carelessness = SimulatedAtlas(2_000, 0).carelessness
    assert len(set(carelessness.tolist())) == STUDIES
    assert carelessness.mean() == pytest.approx(1)


def test_controls_are_fitted_on_cells_that_lie_close_together():
    x = 1 + 0.01 * torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    encode, failed = fit_controls(x, np.arange(60) % 3, [2])
    assert not failed
    assert {"PCA", "LDA"} <= set(encode(Subset(x, np.arange(60))))


def test_a_card_names_the_file_that_it_was_made_from_and_its_columns():
    facts = {
        "recipe": "fractal", "reference_cells": 5, "reference_types": 2, "training_cells": 9, "config": {"dim": 3},
        "split": {"fingerprint": "0123abc"}, "source": "s.h5ad", "data": "d.parquet", "versions": {"torch": "2.10"},
        "scores": {"cells": 3, "flagged": 0.5, "levels": {"k": {"coverage": 0.25} | dict.fromkeys(
            ("accuracy", "accuracy_forced", "calibration_error", "calibration_noise_floor"))}},
    }  # fmt: skip
    card = model_card(facts, 3)
    assert "Made from `d.parquet` (sha256 `0123abc`), with `torch 2.10`;\nformat 3 of the folder." in card
    assert "as those of\n`s.h5ad`." in card
    assert "release `none`." in card
    assert "release `2025-07-30`." in model_card(facts | {"cl_release": "2025-07-30"}, 3)
    bare = {name: value for name, value in facts.items() if name not in ("split", "source", "data", "versions")}
    assert "Made from `unknown` (sha256 `unknown`), with unknown;" in model_card(bare, 3)
    assert "3 cells held out (`drawn at random`): 0.250 answered down to the `k`; 0.500 flagged as novel" in card
    assert "in the worst study" not in card
    header = "| Level | Answered | Accuracy | If all were answered | ECE | ECE by chance |"
    assert header in card
    assert "| `k`   |    0.250 |        - |" in card


@pytest.mark.parametrize("levels", [["a"], ["a", "a"], [*"abcdefg"]])
def test_a_hierarchy_of_another_number_of_levels_is_refused(tmp_path: Path, levels: list[str]):
    text = "\t".join(["cl_id", *levels, "path"]) + "\n" + "\t".join(["", *(f"x{i}" for i in range(len(levels))), ""])
    (tmp_path / "t.tsv").write_text(text + "\n")
    with pytest.raises(InputError, match="the names of 2 to 6 levels"):
        read_hierarchy(tmp_path / "t.tsv")


def test_any_level_but_the_coarsest_may_be_missing():
    labels = [("A", "", ""), ("A", "b", ""), ("A", "", "c")]
    _, rows, _ = tree_of_columns(["k", "l", "m"], labels)
    assert [rows[path].levels for path in labels] == [("A", "A", "A"), ("A", "b", "b"), ("A", "A", "c")]


def test_names_of_cells_that_are_no_text_are_refused(tmp_path: Path):
    columns = {"cell_id": [1], "embedding": pa.array([[1, 2]], pa.list_(pa.float32(), 2)), "level1_a": ["x"]}
    pq.write_table(pa.table(columns | {"level2_b": ["y"]}), tmp_path / "a")
    with pytest.raises(InputError, match="a: 'cell_id' is int64, expected text"):
        Atlas.open(tmp_path / "a")


def test_flags_that_were_not_given_name_no_path():
    assert real_paths({"--a": None, "--b": "", "--c": [], "--d": ["", "x"]}) == [("--d", Path.cwd() / "x")]


def test_the_two_terms_that_are_matched_by_hand_are_known_by_their_ids(graph: nx.DiGraph):
    found = match_names(["native cell", "CL:0000003", "CL:0000548"], graph)
    assert set(found.values()) == {("CL:0000003", "manual"), ("CL:0000548", "manual")}


def test_without_a_bank_its_figures_are_there_and_empty(graph: nx.DiGraph):
    labels = torch.tensor([[0, 0]] * 4 + [[0, 1]] * 4)
    truth = truth_of(("k", "t"), labels, [["A"], ["x", "y"]], [["A"], ["x", "y"]], [], None, graph)
    row = score(torch.randn(8, 3), truth, None)
    for kind in ("seen", "unseen"):
        assert row[kind]["bank"] == row[f"{kind}_interval"]["bank"] == {"k": None, "t": None}
    assert row["unseen"]["loo"] == {"k": None, "t": None}
    assert row["bank"] == row["bank_interval"] == row["bank_macro_f1"] == {"k": None, "t": None}


@pytest.mark.parametrize(
    ("agreement", "against", "cosine", "other", "turned"),
    [
        (0.05, 0.5, 0.2, True, True), (0.06, 0.27, 0.2, False, False), (0.05, 0.5, 0.3, False, False),
        (0.2, 0.3, 0.2, False, True),
    ],
)  # fmt: skip
def test_when_another_space_is_certain(agreement: float, against: float, cosine: float, other: bool, turned: bool):
    compared = Comparison(200, agreement, against, cosine, 0, 0.0)
    assert compared.is_other() == other
    assert compared.is_turned() == turned


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


def test_the_package_lists_what_it_has():
    assert {"Reference", "fit", "load", "truncate", "__version__"} <= set(dir(fractal))
    with pytest.raises(AttributeError, match="^module 'fractal' has no attribute 'fitt'$"):
        _ = fractal.fitt


def test_the_way_from_an_answer_to_the_nearest_term_that_is_true():
    """Three terms in a row. True of the cells are the first two, the first two, and the first alone."""
    steps = np.array([[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    true = np.array([[True, True, False], [True, True, False], [True, False, False]])
    assert off_path(steps, true, np.array([2, 1, 2])).tolist() == [1, 0, 2]


def test_an_input_is_asked_for(fails):
    message = fails(annotate.main, "--reference", "r", "--output", "o.tsv")
    assert message == "error: name one input: fractal annotate new.h5ad --reference FOLDER --output FILE"
