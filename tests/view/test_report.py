"""A reference, scored on its validation cells or on labelled cells of a file."""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fractal.base.errors import InputError
from fractal.commands import report
from fractal.data.atlas import Atlas
from fractal.hierarchy.levels import LEVELS
from fractal.model.split import Split
from fractal.reference import Reference
from fractal.score.table import truth_of
from fractal.view.labelled import atlas_cells
from fractal.view.scored import Scored
from tests.conftest import TYPES, clustered, write_h5ad
from tests.view.conftest import FOUR, GRAPH, check_page


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


def test_the_file_of_training_counts_with_its_test_cells_only(bundle: Reference, stratified: Path):
    atlas = Atlas.open(stratified)
    split = Split.draw(atlas)
    own = replace(bundle, facts={**bundle.facts, "split": asdict(split)})
    tree = own.annotator.tree
    cells, tests = atlas_cells(stratified, tree, own.facts, 5_000, 0), split.rows(atlas)[2]
    assert np.array_equal(cells.vectors, atlas.read(tests).vectors)
    assert cells.title == f"{len(tests)} test cells of {stratified.name}"
    assert cells.groups is None  # cells were held out, not studies
    other = atlas_cells(stratified, tree, bundle.facts, 5_000, 0)  # all of it
    assert len(other.vectors) == 600
    assert other.groups is not None
    with pytest.raises(InputError, match="its levels are"):
        atlas_cells(stratified, replace(tree, levels=("a", "b")), bundle.facts, 5_000, 0)


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


def test_the_seen_mask_decides_what_counts(scored: Scored):
    """`apart` takes the figures of seen types where there are both, and all where there are not."""
    labels = scored.truth.labels
    truth = truth_of(LEVELS, labels, scored.classes, scored.classes, [scored.classes[3][0]], None, GRAPH)
    s = replace(scored, truth=truth)
    row = {**s.prefixes[0], "seen": {"bank": {"x": 1}, "loo": {"x": 2}}, "seen_interval": {"bank": {}, "loo": {}}}
    apart = replace(s, prefixes=[row], controls=[], raw=row).apart()
    assert apart.prefixes[0]["bank"] == {"x": 1}
    assert apart.counted(3).sum() == truth.seen.sum() < len(labels)
    assert scored.apart() is scored
    none_seen = replace(s, truth=SimpleNamespace(**{**vars(truth), "seen": np.zeros(120, bool)}))  # type: ignore[arg-type]
    assert none_seen.apart() is none_seen
