"""The page: whole, without network or script; whatever names contain, they are text."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import eval as evaluate
import train
from fractal.commands import report
from fractal.data.parquet import atlas_table, write_tables
from fractal.hierarchy.levels import LEVELS
from fractal.reference import Reference
from fractal.view import findings, page
from fractal.view.draw import share
from fractal.view.scored import Scored
from tests.conftest import clustered
from tests.view.conftest import EVIL, check_page, made


def names_of(s: Scored) -> set[str]:
    return {section.name for section in findings.sections(s.apart())}


@pytest.mark.slow
def test_a_reference_s_page_and_figures_whatever_its_names_are(bundle: Reference, folder: Path, scored: Scored, capsys):
    out, pictures = folder.parent / "r.html", folder.parent / "figures"
    report.main([str(folder), "--output", str(out), "--figures", str(pictures), "--device", "cpu"])
    text = out.read_text()
    tags = check_page(text)
    assert tags.names.count("h1") == 1
    assert "<script>alert(1)</script>" in tags.text  # as text
    sections = findings.sections(scored.apart())
    assert {"answers", "types", "calibration", "mistakes_4", "mistakes_1", "prefixes"} <= names_of(scored)
    for section in sections:
        assert all(" ".join(cell.split()) in tags.text for row in section.rows for cell in row)
    assert "120 held-out cells of the reference" in tags.text
    assert "prefers-color-scheme: dark" in text
    assert "| subtype |" in capsys.readouterr().out
    in_notebook = replace(bundle, name="blood").report()
    assert in_notebook
    assert in_notebook.text == text  # the page of the file; only the input decides

    drawn = {section.name for section in sections if section.panels}
    assert {path.stem for path in pictures.iterdir()} == drawn
    for name in drawn:
        image = (pictures / f"{name}.svg").read_text()
        assert "var(" not in image
        assert ElementTree.fromstring(image).tag.endswith("svg")
        assert (pictures / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("paths", "levels"),
    [
        ([("a", "x"), ("a", "y"), ("b", "z")], ("kind", "name")),
        ([("o", "a", "x"), ("o", "a", "y"), ("o", "b", "z")], ("all", "kind", "name")),
        ([(f"s{i % 9}", f"l{i % 18}", f"t{i % 36}", f"a cell with quite a long name, {i}") for i in range(72)], LEVELS),
    ],
    ids=["two levels", "three, the first of one class", "72 types"],
)
def test_other_trees(paths: list[tuple[str, ...]], levels: tuple[str, ...]):
    blocks = [k for k in range(len(levels)) if len({path[k] for path in paths}) > 1]
    bundle = made(paths, levels, test=0, blocks=blocks)
    s = bundle.score()
    assert s.names[-1] == "full"
    assert len(s.prefixes) == len(blocks)
    assert not {"answers", "calibration", "unseen"} & names_of(s)
    tags = check_page(page.render("x", [s], [findings.sections(s)]))
    assert "No probabilities: the reference was made without test cells" in tags.text
    assert "No type was held out" in tags.text


def test_an_adapter_of_one_block(scored: Scored):
    s = replace(scored, prefixes=scored.prefixes[-1:])
    assert s.names == ["full"]
    assert {row[1] for row in findings.prefixes(s).rows} == {"full (16)"}
    check_page(page.render("x", [s], [[findings.prefixes(s)]]))


def test_several_adapters_are_parts_of_one_page(scored: Scored):
    both = [scored, replace(scored, name=EVIL)]
    tags = check_page(page.render("two", both, [[findings.prefixes(s)] for s in both]))
    assert tags.names.count("h2") == 2
    assert "1-prefixes" in [value for name, value in tags.attributes if name == "id"]


def test_a_page_that_fails_leaves_the_old_one(scored: Scored, tmp_path: Path, monkeypatch):
    out = tmp_path / "r.html"
    out.write_text("old")
    monkeypatch.setattr(page, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write("x", [scored], out, None)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.slow
def test_eval_draws_the_rows_that_it_prints(tmp_path: Path, capsys):
    """Two types held out; names that are HTML; two checkpoints on one page."""
    paths = [("I", "L", "t", f"a{i} {EVIL}") for i in range(3)] + [("S", "M", f"m{i}", f"b{i}") for i in range(3)]
    codes = np.arange(900) % 6
    vectors = clustered([paths[c][3] for c in codes], dim=8, spread=0.7)
    data, out = tmp_path / "cells.parquet", tmp_path / "r.html"
    classes = [np.unique(np.array(column, object), return_inverse=True) for column in zip(*paths, strict=True)]
    columns = [(own[codes], names.tolist()) for names, own in classes]
    write_tables(data, [atlas_table(vectors, columns)], {"cl_release": "x"})
    flags = ["--input", str(data), "--device", "cpu"]
    models = [str(tmp_path / "one.pt"), str(tmp_path / "two.pt")]
    more = ["--epochs", "1", "--scale-dim", "4", "--test-types", paths[0][3], "b1"]
    train.main([*flags, "--output", models[0], *more])
    shutil.copy(*models)
    capsys.readouterr()
    evaluate.main([*flags, "--model-path", *models, "--controls", "--report", str(out), "--json", str(tmp_path / "j")])
    tags, result = check_page(out.read_text()), json.loads((tmp_path / "j").read_text())
    assert "bank_predicted" not in result["rows"][0]
    assert tags.names.count("h2") == 2
    printed = capsys.readouterr().out
    for row in result["rows"][:9]:  # raw and two times four; the controls are drawn in one protocol
        for protocol, level in (("bank", "lineage"), ("loo", "subtype")):
            for who in ("seen", "unseen"):
                value = row[who][protocol][level]
                assert value is None or share(value) in tags.text
                assert value is None or f"{value:.3f}" in printed
    assert "Types that were not: " in tags.text
    assert "held out: 2 whole types" in tags.text
    assert "Best control" in tags.text

    other = tmp_path / "other.parquet"  # all new: no bank, and no probabilities
    write_tables(other, [atlas_table(vectors + 0.1, columns)], {"cl_release": "x"})
    new = ["--input", str(other), "--device", "cpu", "--all-rows", "--num-samples", "200"]
    evaluate.main([*new, "--model-path", models[0], "--report", str(out)])
    text = check_page(out.read_text()).text
    assert "No probabilities: a checkpoint has none for cells of another file" in text
    assert ", by loo." in text


@pytest.mark.slow
def test_a_browser_shows_it_and_runs_nothing(folder: Path, tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no Chromium here")
    out = tmp_path / "r.html"
    report.main([str(folder), "--output", str(out), "--device", "cpu"])
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/b"]
    done = subprocess.run([browser, *flags, "--dump-dom", out.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<svg") == out.read_text().count("<svg")
    assert "CONSOLE" not in done.stderr
    picture = tmp_path / "r.png"
    subprocess.run([browser, *flags, f"--screenshot={picture}", out.as_uri()], capture_output=True, timeout=120)
    assert picture.stat().st_size > 20_000
