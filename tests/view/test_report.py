"""A reference, scored on its validation cells or on labelled cells of a file."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fractal.base.errors import InputError
from fractal.commands import report
from fractal.reference import Reference
from tests.conftest import TYPES, clustered, write_h5ad
from tests.view.conftest import FOUR, check_page


@pytest.mark.parametrize(
    "damage", [{"scores": "x"}, {"scores": {"cells": 9}}, {"scores": {"cells": 9, "levels": {}}}, {"split": "x"}]
)
def test_damaged_facts_are_refused(bundle: Reference, damage: dict[str, object]):
    with pytest.raises(InputError, match=r"blood: bundle\.json is damaged .* make the reference again"):
        replace(bundle, name="blood", facts={**bundle.facts, **damage}).score()


# Labelled cells of a file


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """90 cells of the reference's types, 30 of one that it lacks and CL has, 10 of none, from three donors."""
    rng = np.random.default_rng(5)
    centres, codes = rng.normal(size=(4, 8)), np.arange(90) % 4
    vectors = np.concatenate([centres[codes], rng.normal(size=(1, 8)).repeat(40, 0)]) + 0.3 * rng.normal(size=(130, 8))
    kinds = [*(FOUR[c][3] for c in codes), *["neuron"] * 30, *["no such cell"] * 10]
    donors = [f"donor {i % 3}" for i in range(130)]
    return write_h5ad(tmp_path / "new.h5ad", vectors.astype(np.float32), kind=kinds, donor=donors)


def test_labelled_cells_of_a_file(folder: Path, new: Path):
    out = folder.parent / "r.html"
    flags = ["--labels", "kind", "--output", str(out), "--device", "cpu"]
    report.main([str(folder), "--input", str(new), "--study", "donor", *flags])
    tags = check_page(out.read_text())
    assert "120 cells of new.h5ad" in tags.text
    assert "10 cells left out, neither the reference nor the ontology has: no such cell" in tags.text
    assert "95 % intervals over 3 studies" in tags.text
    assert "30 cells of 1 unseen type" in tags.text
    assert "Types that were not: 30" in tags.text
    assert "90 cells of types that were trained on" in tags.text
    assert "neuron for " in tags.text  # what they are taken for


def test_what_can_t_be_done_is_said_in_a_line(fails, folder: Path, new: Path, tmp_path: Path):
    out = tmp_path / "r.html"
    assert "--output" in fails(report.main, folder)
    assert "name an .html file" in fails(report.main, folder, "--output", tmp_path / "r.pdf")
    assert "no column 'x'" in fails(report.main, folder, "--output", out, "--input", new, "--labels", "x")
    assert "--labels" in fails(report.main, folder, "--output", out, "--input", new)
    assert "--labels" in fails(report.main, folder, "--output", out, "--labels", "x")
    assert str(tmp_path / "none") in fails(report.main, tmp_path / "none", "--output", out)
    assert "2 to 6" in fails(report.main, folder, "--output", out, "--input", new, "--levels", "kind")
    assert "4 levels" in fails(report.main, folder, "--output", out, "--input", new, "--levels", "donor", "kind")
    wide = write_h5ad(tmp_path / "w.h5ad", clustered(TYPES * 10, dim=9), kind=TYPES * 10)
    assert "9 numbers" in fails(report.main, folder, "--output", out, "--input", wide, "--labels", "kind")
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in fails(report.main, folder, "--figures", file)
    assert not out.exists()
