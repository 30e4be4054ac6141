"""Eight kinds of files that people have, small, and what comes out of each, from Python and from the shell."""

import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import fractal
from fractal.base.errors import InputError
from fractal.commands import annotate, embed, fit

# The table of docs/questions.md; each test below shows one row of it.
WHAT_COMES_OUT = {
    "30 numbers of scVI": "a reference; blocks of 8 numbers, so that 30 become 32 and not 128",
    'CELLxGENE: CL ids, some "unknown"': 'a reference; "unknown" cells are left out and counted',
    'CellTypist\'s plurals ("NK cells")': "a reference; found in CL without a label map, CL ids in the answer",
    "Blood only": "a reference; one system, so no block is spent on it, and a line says so",
    "Brain, types outside CL": "with your own `--levels`: a reference with these levels, in answers and blocks",
    "450 cells": "a reference of all of them; each is held out once, to calibrate and to say how good it is",
    "More cells than `--max-cells`, sorted by type": "a reference with equal numbers of each type, as sizes allow",
    "Expression only": "an error that says how to make a vector; nothing is written",
}

IMMUNE = ["B cell", "T cell", "natural killer cell", "CD14-positive monocyte", "plasma cell", "dendritic cell"]


def made(labels: Sequence[object], dim: int = 30, key: str = "X_scVI", seed: int = 0, **obs: object) -> anndata.AnnData:
    """Cells around one centre per label, in a space that depends on the label's name only."""
    names = sorted({str(label) for label in labels})
    rng = np.random.default_rng(seed)
    centres = {name: np.random.default_rng(zlib.crc32(name.encode())).normal(size=dim) for name in names}
    vectors = np.stack([centres[str(label)] for label in labels]) + 0.4 * rng.normal(size=(len(labels), dim))
    table = pd.DataFrame({"cell_type": pd.Categorical(labels), **obs}, index=[f"cell {i}" for i in range(len(labels))])
    return anndata.AnnData(np.zeros((len(labels), 3), np.float32), obs=table, obsm={key: vectors.astype(np.float32)})


def drawn(types: Sequence[str], n: int, seed: int = 0) -> list[str]:
    return np.random.default_rng(seed).choice(types, n).tolist()


class Shell:
    """What the commands do, as the Python API does it: `fractal fit` made the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, command: Callable[[list[str]], None], new: anndata.AnnData) -> None:
        new.write_h5ad(self.folder / "new.h5ad")
        argv = ["new.h5ad", "--reference", "ref", "--output", "new.h5ad"]
        command([str(self.folder / part) if part[:1] != "-" else part for part in argv] + ["--device", "cpu"])
        out = anndata.read_h5ad(self.folder / "new.h5ad")
        new.obs, new.uns = out.obs, out.uns
        for key in out.obsm:
            new.obsm[key] = out.obsm[key]

    def annotate(self, new: anndata.AnnData) -> None:
        self.run(annotate.main, new)

    def embed(self, new: anndata.AnnData) -> None:
        self.run(embed.main, new)


Fit = Callable[..., fractal.Reference | Shell]


# `fit` of a file is tested with every format in tests/data and tests/base, too
@pytest.fixture(params=["python", pytest.param("shell", marks=pytest.mark.slow)])
def fitted(request: pytest.FixtureRequest, tmp_path: Path) -> Fit:
    """A function labelled cells -> a reference that labels and embeds new ones; one epoch."""

    def in_python(adata: anndata.AnnData, labels: str = "cell_type", levels: Sequence[str] = (), **more: Any):
        column = None if levels else labels
        ref = fractal.fit(adata, column, "X_scVI", levels=levels, epochs=1, device="cpu", **more)
        print(ref)
        ref.save(tmp_path / "ref")
        return fractal.load(tmp_path / "ref")

    def in_the_shell(adata: anndata.AnnData, labels: str = "cell_type", levels: Sequence[str] = (), **more: Any):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        kind = ["--levels", *levels] if levels else ["--labels", labels]
        flags = [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        argv = [str(tmp_path / "cells.h5ad"), *kind, "--use-rep", "X_scVI", "--output", str(tmp_path / "ref")]
        fit.main([*argv, *flags, "--epochs", "1", "--device", "cpu"])
        return Shell(tmp_path)

    return in_python if request.param == "python" else in_the_shell


def share_right(
    ref: fractal.Reference | Shell, new: anndata.AnnData, truth: Sequence[str], name: str = "subtype"
) -> float:
    if f"fractal_{name}" not in new.obs:
        ref.annotate(new)
    return float(np.mean(new.obs[f"fractal_{name}"].astype(str).to_numpy() == np.array(truth)))


def test_the_questions_page_has_this_table():
    text = (Path(__file__).parents[2] / "docs" / "questions.md").read_text(encoding="utf-8")
    assert "".join(f"| {kind} | {what} |\n" for kind, what in WHAT_COMES_OUT.items()) in text


def test_thirty_numbers_of_scvi(fitted: Fit):
    """Narrow vectors: blocks follow the input, a 30-d cell does not become 128-d."""
    ref = fitted(made(drawn([*IMMUNE, "fibroblast", "hepatocyte"], 700)))
    new = made(labels := drawn(IMMUNE, 80, seed=1), seed=1)
    assert share_right(ref, new, labels) > 0.9
    ref.embed(new)
    assert new.obsm["X_fractal"].shape[1] == 32
    assert new.uns["fractal"]["block_width"] == 8


def test_columns_of_cellxgene(fitted: Fit, capsys):
    """Ids of the ontology as labels, "unknown" cells; these are left out, counted, and never a class."""
    ids = {"CL:0000236": "B cell", "CL:0000084": "T cell", "CL:0000057": "fibroblast"}
    data = made([*drawn(list(ids), 580), *["unknown"] * 20])
    data.obs = data.obs.rename(columns={"cell_type": "cell_type_ontology_term_id"})
    ref = fitted(data, "cell_type_ontology_term_id")
    assert "20 of 600 cells left out" in capsys.readouterr().out
    new = made(asked := drawn(list(ids), 60, seed=1), seed=1)
    assert share_right(ref, new, [ids[name] for name in asked]) > 0.9
    assert "unknown" not in set(new.obs["fractal_subtype"].astype(str))


def test_plurals_of_celltypist(fitted: Fit):
    """ "B cells", "Monocytes", "NK cells": found in the ontology without a map."""
    plurals = {
        "B cells": "CL:0000236",
        "Monocytes": "CL:0000576",
        "NK cells": "CL:0000623",
        "Fibroblasts": "CL:0000057",
    }
    ref = fitted(made(drawn(list(plurals), 600)))
    new = made(asked := drawn(list(plurals), 60, seed=1), seed=1)
    ref.annotate(new)
    assert share_right(ref, new, [plurals[name] for name in asked], "subtype_cl_id") > 0.9


def test_an_immune_set(fitted: Fit, capsys):
    """One system: the levels below are still told."""
    ref = fitted(made(drawn(IMMUNE, 700)))
    assert "none for system, where all training cells are of one class" in capsys.readouterr().out
    new = made(labels := drawn(IMMUNE, 80, seed=1), seed=1)
    assert share_right(ref, new, labels) > 0.9
    assert set(new.obs["fractal_system"].astype(str)) == {"Immune"}
    assert set(new.obs["fractal_lineage"].astype(str)) == {"Lymphoid", "Innate Lymphoid", "Myeloid", "Immune"}
    ref.embed(new)
    assert list(new.uns["fractal"]["levels"]) == ["lineage", "type", "subtype"]


def test_a_brain_with_levels_of_its_own(fitted: Fit):
    """Types that CL does not have: own columns are the tree."""
    tree = {"L2/3 IT_1": "L2/3 IT", "L2/3 IT_2": "L2/3 IT", "L5 ET_1": "L5 ET", "Pvalb_1": "Pvalb", "Sst_1": "Sst"}
    top = {"L2/3 IT": "Glutamatergic", "L5 ET": "Glutamatergic", "Pvalb": "GABAergic", "Sst": "GABAergic"}
    clusters = drawn(list(tree), 700)
    levels: dict[str, Any] = {"subclass": [tree[c] for c in clusters], "class": [top[tree[c]] for c in clusters]}
    ref = fitted(made(clusters, **levels), levels=["class", "subclass", "cell_type"])
    new = made(asked := drawn(list(tree), 80, seed=1), seed=1)
    assert share_right(ref, new, asked, "cell_type") > 0.9
    assert share_right(ref, new, [tree[c] for c in asked], "subclass") > 0.9
    assert share_right(ref, new, [top[tree[c]] for c in asked], "class") > 0.9
    ref.embed(new)
    assert list(new.uns["fractal"]["levels"]) == ["class", "subclass", "cell_type"]
    assert fractal.truncate(new.obsm["X_fractal"], new.uns["fractal"], 1).shape[1] < new.obsm["X_fractal"].shape[1]


def test_450_cells(fitted: Fit, capsys):
    """Few: all of them make the reference, and each is held out once, to calibrate and to be tested on."""
    ref = fitted(made(drawn(IMMUNE, 450)))
    printed = capsys.readouterr().out
    assert re.search(r"Reference of 450 cells", printed)
    assert re.search(r"\b450 cells held out", printed)
    assert share_right(ref, made(labels := drawn(IMMUNE, 60, seed=1), seed=1), labels) > 0.9


def test_a_file_sorted_by_type(fitted: Fit, capsys):
    """More cells than are trained on, one type after the other: each has its share."""
    labels = sorted([*["B cell"] * 1_200, *["T cell"] * 900, *["fibroblast"] * 200, *["hepatocyte"] * 150])
    ref = fitted(made(labels), max_cells=600)
    assert "cells of 4 types" in capsys.readouterr().out
    asked = ["B cell", "T cell", "fibroblast", "hepatocyte"] * 15
    assert share_right(ref, made(asked, seed=1), asked) > 0.95


def test_expression_only(fails, tmp_path: Path):
    """No vectors at all: told how to get some."""
    labels = drawn(IMMUNE, 50)
    counts = scipy.sparse.csr_matrix(np.random.default_rng(0).poisson(0.5, (50, 200)).astype(np.float32))
    data = anndata.AnnData(counts, obs=pd.DataFrame({"cell_type": labels}, index=[f"cell {i}" for i in range(50)]))
    data.write_h5ad(tmp_path / "counts.h5ad")
    base = [tmp_path / "counts.h5ad", "--labels", "cell_type", "--output", tmp_path / "ref"]
    message = fails(fit.main, *base, "--use-rep", "X_pca")
    assert "counts.h5ad: has no obsm 'X_pca'" in message
    assert "normalize_total, log1p, pca" in message
    with pytest.raises(InputError, match="normalize_total, log1p, pca"):
        fractal.fit(data, "cell_type", "X_scVI")
    assert not (tmp_path / "ref").exists()


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
