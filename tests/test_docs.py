"""What the documents say is true: the example runs, links lead somewhere, the oddities are those of the code."""

import importlib.util
import re
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import fractal.__main__
from fractal.hierarchy.ontology import CL_SLIM, build_hierarchy, load_graph
from tests.conftest import clustered

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
HAS_SCANPY = importlib.util.find_spec("scanpy") is not None


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def blood_like() -> anndata.AnnData:
    """700 made cells with the columns of pbmc68k_reduced that the example uses."""
    text = (ROOT / "docs" / "example.md").read_text(encoding="utf-8")
    kinds = re.findall(r'^    "(.+?)": "', text, re.MULTILINE)
    assert len(kinds) == 10
    labels = kinds * 70
    index = [f"cell {i}" for i in range(700)]
    obs = pd.DataFrame({"bulk_labels": pd.Categorical(labels)}, index=index)
    vectors = clustered(labels, dim=20, spread=0.6)
    return anndata.AnnData(np.zeros((700, 1), np.float32), obs=obs, obsm={"X_pca": vectors})


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, monkeypatch, capsys):
    """Where scanpy is not installed, on made cells and without the blocks that call it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fractal, "fit", partial(fractal.fit, epochs=8))
    names: dict[str, object] = {"np": np} if HAS_SCANPY else {"np": np, "cells": blood_like()}
    done = 0
    for block in blocks(ROOT / "docs" / "example.md", "python"):
        if HAS_SCANPY or "sc." not in block:
            exec(compile(block, "docs/example.md", "exec"), names)
            done += 1
    assert done >= 6
    right, new = names["right"], names["new"]
    assert isinstance(new, anndata.AnnData)
    assert isinstance(right, pd.Series)
    assert right.mean() > (0.6 if HAS_SCANPY else 0.9)
    assert new.obsm["X_lineage"].shape[1] * 3 == new.obsm["X_fractal"].shape[1]
    assert (tmp_path / "blood_reference").is_dir()
    assert "of all subtypes are right" in capsys.readouterr().out


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"python -m (benchmarks\.\w+|fractal\.[\w.]+\w)", text):
        assert importlib.util.find_spec(name), name
    for name in re.findall(r"^(?:uv run |)(?:--\S+ \S+ )?fractal (\w+) ", text, re.MULTILINE):
        assert name in fractal.__main__.COMMANDS, name
    for name in re.findall(r"^uv run python (\w+\.py)", text, re.MULTILINE):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_compile(path: Path):
    for block in blocks(path, "python"):
        compile(block, path.name, "exec")


@pytest.mark.parametrize("path", [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda path: path.name)
def test_files_that_a_page_names_exist(path: Path):
    named = re.findall(
        r"\b(?:fractal|tests|benchmarks|explorer|docs)/[a-z_/]+\.(?:py|md|tsx?)", path.read_text(encoding="utf-8")
    )
    assert [name for name in sorted(set(named)) if not (ROOT / name).exists()] == []


def test_the_readme_is_short_and_says_how_to_test():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text) <= 12_000
    assert re.search(r"^.*uv run pytest", text, re.MULTILINE)


def test_the_oddities_are_those_of_the_code():
    text = (ROOT / "docs" / "hierarchy.md").read_text(encoding="utf-8")
    section = text[text.index("## Oddities") : text.index("**T cells")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"][
        2:
    ]
    assert len(rows) > 10
    graph = load_graph(CL_SLIM)
    for subtype, system, lineage, kind, _ in rows:
        assert build_hierarchy([subtype], graph, "error")[0].levels == (system, lineage, kind, subtype)


def test_t_cells_lie_on_as_many_types_as_the_page_says():
    text = (ROOT / "docs" / "hierarchy.md").read_text(encoding="utf-8")
    names = (ROOT / "data" / "scimilarity-types.txt").read_text(encoding="utf-8").splitlines()
    rows = build_hierarchy([name for name in names if name], load_graph(CL_SLIM), "error")
    found = [row.levels for row in rows if "T cell" in row.subtype or "thymocyte" in row.subtype]
    assert f"lie on {len({levels[2] for levels in found})} types; {len(found)} subtypes" in text.replace("\n", " ")
    assert {levels[1] for levels in found} == {"Lymphoid"}
