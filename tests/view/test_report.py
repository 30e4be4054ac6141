"""The page: what it says follows from the figures, whatever these are, and whatever names contain, they are text."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import eval as evaluate
import train
from fractal.annotate.bundle import Bundle, make_reference, write_bundle
from fractal.base.cli import InputError
from fractal.commands import report
from fractal.data.parquet import Cells, fingerprint, read_rows, writing
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.model.adapter import build_adapter
from fractal.model.split import Split
from fractal.score.evaluate import truth_of
from fractal.score.metrics import reliability, wilson_interval
from fractal.view import findings, page, svg
from fractal.view.report import kept_answers, of_atlas, own_cells, score_reference
from fractal.view.scored import Scored, provenance
from tests.conftest import TYPES, clustered, write_h5ad

EVIL = "</text><script>alert(1)</script><img src=x onerror=alert(2)> & \"'`\x1b[31m"
FOUR = [("I", "L", "t", "a"), ("I", "L", "t", "b"), ("I", "M", "m", EVIL), ("S", "S", "f", "d")]
GRAPH = load_graph(CL_SLIM)


def made(
    paths: Sequence[tuple[str, ...]], levels: tuple[str, ...], test: int = 200, blocks: list[int] | None = None
) -> Bundle:
    """A reference of types on these paths with an adapter that was not trained."""
    torch.manual_seed(0)
    blocks = blocks or list(range(len(levels)))
    columns = [np.unique(np.array(column, object), return_inverse=True) for column in zip(*paths, strict=True)]
    classes, labels = [names.tolist() for names, _ in columns], np.stack([codes for _, codes in columns], 1)
    config: dict[str, Any] = {"recipe": "fractal", "dim": 8, "num_levels": len(blocks), "scale_dim": 4}
    config |= {"paths": labels[:, blocks].tolist(), "levels": list(levels), "block_levels": blocks}
    centres = np.random.default_rng(5).normal(size=(len(paths), 8))

    def cells(n: int, seed: int) -> Cells:
        rng = np.random.default_rng(seed)
        types = np.arange(n) % len(paths)
        vectors = centres[types] + 0.8 * rng.normal(size=(n, 8))
        return Cells(vectors.astype(np.float32), labels[types], classes, levels)

    facts = {"source": EVIL, "data": EVIL, "versions": {EVIL: EVIL}, "obsm": "X_pca"}
    adapter, counts = build_adapter(config, classes), dict.fromkeys(paths, 100)
    held_out = cells(test, 2) if test else None
    return make_reference(adapter, config, classes, cells(216, 0), cells(120, 1), counts, held_out, facts, GRAPH)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return made(FOUR, LEVELS)


@pytest.fixture(scope="module")
def scored(bundle: Bundle) -> Scored:
    return score_reference(bundle, "blood", own_cells(bundle, 5_000, 0), True, GRAPH, 0)


@pytest.fixture
def folder(bundle: Bundle, tmp_path: Path) -> Path:
    write_bundle(tmp_path / "blood", bundle)
    return tmp_path / "blood"


class Tags(HTMLParser):
    """What a browser would make elements of: names and attributes; and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names, self.attributes, self.open, self.text = list[str](), list[tuple[str, str]](), list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(text: str) -> Tags:
    """It is whole, small, needs no network and no script, and foreign text is nothing but text."""
    assert len(text.encode()) < 1_000_000
    tags = Tags(text)
    assert not tags.open
    assert not {"script", "img", "link", "iframe", "object", "embed", "image", "use", "a"} & set(tags.names)
    for name, value in tags.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "xlink:href")
        assert "://" not in value or (name, value) == ("xmlns", "http://www.w3.org/2000/svg")
    assert "\x1b" not in text
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan[a-z]*", "", text.lower())
    assert "None" not in tags.text.replace("None of the figures", "")
    for image in re.findall(r"<svg .*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(image)
        assert root.attrib["viewBox"]
    return tags


def said(s: Scored) -> dict[str, str]:
    return {figure.name: figure.conclusion for figure in findings.figures(s.apart())}


# What is said


@given(st.lists(st.integers(0, 100), min_size=1, max_size=6))
def test_the_prefix_to_use_is_the_shortest_that_loses_at_most_a_hundredth(hundredths):
    chosen = findings.choose([value / 100 for value in hundredths])
    good = [j for j, value in enumerate(hundredths) if max(hundredths) - value <= 1]
    assert chosen == min(good)


def test_lists_read_as_english():
    assert findings.joined(["a"]) == "a"
    assert findings.joined(["a", "b"]) == "a and b"
    assert findings.joined(["a", "b", "c"]) == "a, b and c"
    assert findings.some(list("abcdef"), 2) == "a, b and 4 more"


def with_accuracy(s: Scored, values: dict[str, list[float]], raw: float) -> Scored:
    """The accuracies by level of prefix 1, 2, ..., full, and those of the raw vectors, in bank."""
    prefixes = [{**row, "bank": {k: values[k][j] for k in values}} for j, row in enumerate(s.prefixes)]
    return replace(s, prefixes=prefixes, raw={**s.raw, "bank": dict.fromkeys(values, raw)}, controls=[])


def test_which_prefix_for_which_level(scored: Scored):
    values = {"system": [0.99, 0.99, 0.995, 1.0], "lineage": [0.5, 0.9, 0.9, 0.9]}
    values |= {"type": [0.5, 0.6, 0.9, 0.905], "subtype": [0.5, 0.6, 0.7, 0.8]}
    figure = findings.accuracy(with_accuracy(scored, values, 0.85))
    assert figure.conclusion == (
        "Use prefix 1 (4 numbers) for system (.990), prefix 2 (8 numbers) for lineage (.900), prefix 3 (12 numbers) "
        "for type (.900) and the full vector (16 numbers) for subtype (.800): the shortest that lose at most .01 to "
        "the best; but the raw vectors are better for subtype (.850)."
    )
    assert (
        "Do not ask prefix 1 for lineage (loses .400), type (loses .405) and subtype (loses .300)." in figure.cautions
    )
    assert "Do not ask prefix 3 for subtype (loses .100)." in figure.cautions
    assert len(figure.panels) == 4
    best = findings.accuracy(with_accuracy(scored, values, 0.5))
    assert best.conclusion.endswith("to the best.")


def test_the_silhouette_s_sentence_names_the_largest(scored: Scored):
    figure = findings.silhouettes(scored)
    for k, level in enumerate(LEVELS):
        column = [row["silhouette"][level] for row in scored.prefixes]
        prefix = findings.most_separated(scored)[k]
        assert column[prefix] == max(column)
        assert f"{level} ({svg.hundredths(max(column))})" in figure.conclusion
    assert len(figure.panels) == 2  # the shuffled tree beside it
    assert "the hierarchy makes" in figure.conclusion
    assert len(findings.silhouettes(replace(scored, shuffled=[])).panels) == 1


@pytest.mark.parametrize("level", range(4))
def test_mistakes_are_those_that_a_slow_count_finds(scored: Scored, level: int):
    figure = findings.confusions(scored, level)
    assert figure
    labels, guess = scored.truth.labels.numpy(), scored.prefixes[-1]["bank_predicted"]
    names = scored.classes[level]
    pairs: dict[tuple[str, str], int] = {}
    inside = 0
    for row, answer in zip(labels, guess, strict=True):
        if row[level] != answer[level]:
            pair = (names[row[level]], names[answer[level]])
            pairs[pair] = pairs.get(pair, 0) + 1
            parents = [{path[level - 1] for path in FOUR if path[level] == name} for name in pair]
            inside += bool(level and parents[0] & parents[1])
    wrong = sum(pairs.values())
    assert wrong
    assert figure.conclusion.startswith(f"{wrong} of 120 cells are wrong at {LEVELS[level]}")
    if level:
        assert f"{svg.share(inside / wrong)} of these stay inside the right {LEVELS[level - 1]}" in figure.conclusion
    table = {(true, answered): int(cells) for true, answered, cells, _ in figure.rows}
    assert table == {(svg.short(a), svg.short(b)): cells for (a, b), cells in pairs.items()}
    assert max(pairs.values()) == int(figure.rows[0][2])


def test_no_mistake_and_one_class_are_said(scored: Scored):
    right = replace(
        scored, prefixes=[{**row, "bank_predicted": scored.truth.labels.numpy()} for row in scored.prefixes]
    )
    figure = findings.confusions(right, 3)
    assert figure
    assert figure.conclusion == "No mistake among 120 cells at subtype."
    one = replace(scored, paths=np.array([[0, 0, 0, 0], [0, 1, 1, 1]]))
    assert findings.confusions(one, 0) is None
    assert "System: no two classes to tell apart." in findings.accuracy(one).caption
    nothing = replace(scored, paths=np.zeros((1, 4), int))
    assert "says nothing" in findings.accuracy(nothing).conclusion
    check_page(page.render("x", [nothing], [findings.figures(nothing)]))


def test_weak_types_are_named_and_few_cells_are_not_judged(scored: Scored):
    labels, right = scored.truth.labels[:, 3].numpy(), np.ones((120, 4), bool)
    weak = np.flatnonzero(labels == 1)
    right[weak[: len(weak) // 2], 3] = False
    s = replace(scored, prefixes=[{**row, "bank_right": right} for row in scored.prefixes])
    figure = findings.weakest(s, "type")
    assert figure
    value = (len(weak) - len(weak) // 2) / len(weak)
    name = scored.classes[3][1]
    assert f"{svg.short(name)} ({svg.share(value)} of {len(weak)} cells)" in figure.conclusion
    assert figure.conclusion.startswith("Do not trust subtype in ")
    assert figure.cautions[0].startswith("Subtype is often wrong in ")
    fine = findings.weakest(replace(s, prefixes=[{**r, "bank_right": right | True} for r in s.prefixes]), "type")
    assert fine
    assert fine.conclusion.startswith("All 4 classes are right for .800 or more")
    assert not [line for line in fine.cautions if "often wrong" in line]


def score_of(probability: np.ndarray, right: np.ndarray, floor: float = 0.005) -> dict[str, Any]:
    bins = reliability(probability, right)
    error = float(sum(abs(bin["probability"] - bin["accuracy"]) * bin["cells"] for bin in bins) / len(right))
    return {"reliability": bins, "calibration_error": error, "calibration_noise_floor": floor}


def test_probabilities_hold_or_are_too_high_or_too_low_or_both():
    rng = np.random.default_rng(0)
    p = rng.random(4_000)
    assert findings.calibrated(score_of(p, rng.random(4_000) < p, 0.02)) == "holds"
    assert findings.calibrated(score_of(p, np.zeros(4_000, bool))).startswith("too high by .")
    assert findings.calibrated(score_of(p, np.ones(4_000, bool))).startswith("too low by .")
    both = findings.calibrated(score_of(p, p < 0.5))
    assert both.startswith("off by")


def test_tenths_keep_every_cell_and_the_means():
    rng = np.random.default_rng(1)
    p = rng.random(700)
    right = rng.random(700) < p
    bins = findings.tenths(reliability(p, right))
    assert sum(bin["cells"] for bin in bins) == 700
    assert sum(bin["cells"] * bin["accuracy"] for bin in bins) == pytest.approx(right.sum())
    assert sum(bin["cells"] * bin["probability"] for bin in bins) == pytest.approx(p.sum())
    for bin in bins:
        assert bin["interval"] == wilson_interval(bin["accuracy"] * bin["cells"], bin["cells"])
        assert abs(bin["probability"] - bin["place"]) <= 0.05


def test_controls_that_are_better_are_called_so(scored: Scored):
    better = {level: max(row["bank"][level] for row in scored.prefixes) + 0.1 for level in LEVELS}
    s = replace(scored, controls=[{**scored.raw, "embedding": "LDA", "dims": 3, "bank": better}])
    figure = findings.controls(s)
    assert figure
    assert figure.conclusion.startswith("A control is ahead of every prefix at system (")
    assert "of LDA" in figure.cautions[0]
    worse = replace(
        scored,
        controls=[{**scored.raw, "bank": dict.fromkeys(LEVELS, 0.1)}],
        raw={**scored.raw, "bank": dict.fromkeys(LEVELS, 0.1)},
    )
    ahead = findings.controls(worse)
    assert ahead
    assert ahead.conclusion.startswith("The best prefix is ahead of all controls at")
    assert findings.controls(replace(scored, controls=[])) is None


# A page


def test_a_reference_s_page_and_figures_whatever_its_names_are(folder: Path, scored: Scored, capsys):
    out, pictures = folder.parent / "r.html", folder.parent / "figures"
    report.main([str(folder), "--output", str(out), "--figures", str(pictures), "--device", "cpu"])
    text = out.read_text()
    tags = check_page(text)
    assert tags.names.count("h1") == 1
    assert "<script>alert(1)</script>" in tags.text  # as text
    for sentence in said(scored).values():
        assert sentence in tags.text
    assert {"accuracy", "silhouette", "calibration", "answers", "controls", "weakest_type"} <= set(said(scored))
    assert "120 validation cells of the reference" in tags.text
    assert "prefers-color-scheme: dark" in text
    assert "| subtype |" in capsys.readouterr().out
    assert page.render("How good blood is", [scored], [findings.figures(scored)]) == text  # only the input decides

    assert {path.stem for path in pictures.iterdir()} == set(said(scored))
    for name in said(scored):
        image = (pictures / f"{name}.svg").read_text()
        assert "var(" not in image
        assert ElementTree.fromstring(image).tag.endswith("svg")
        assert (pictures / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


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
    s = score_reference(bundle, "x", own_cells(bundle, 5_000, 0), True, GRAPH, 0)
    found = said(s)
    assert s.names[-1] == "full"
    assert len(s.prefixes) == len(blocks)
    assert not {"calibration", "answers", "unseen_bank", "weakest_study"} & set(found)
    tags = check_page(page.render("x", [s], [findings.figures(s)]))
    assert "No probabilities: the reference was made without test cells" in tags.text
    assert "No type was held out" in tags.text


def test_an_adapter_of_one_block(scored: Scored):
    s = replace(scored, prefixes=scored.prefixes[-1:], shuffled=scored.shuffled[:1])
    assert s.names == ["full"]
    assert said(s)["accuracy"].startswith("Use the full vector (16 numbers) for ")
    check_page(page.render("x", [s], [findings.figures(s)]))


def test_several_adapters_are_parts_of_one_page(scored: Scored):
    both = [scored, replace(scored, name=EVIL)]
    tags = check_page(page.render("two", both, [findings.figures(s) for s in both]))
    assert tags.names.count("h2") == 2
    assert "1-accuracy" in [value for name, value in tags.attributes if name == "id"]


def test_a_page_that_fails_leaves_the_old_one(scored: Scored, tmp_path: Path, monkeypatch):
    out = tmp_path / "r.html"
    out.write_text("old")
    monkeypatch.setattr(page, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        page.write("x", [scored], out, None)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize("damage", ["x", {"cells": 9}, {"cells": 9, "levels": {}}])
def test_damaged_scores_are_refused(bundle: Bundle, damage: object):
    own = replace(bundle, facts={**bundle.facts, "scores": damage, "split": "x", "versions": 1, "training": []})
    with pytest.raises(InputError, match=r"blood: the scores in bundle\.json are damaged"):
        kept_answers(own, "blood")
    assert provenance(own.facts, "x")


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
    assert "95 % intervals over 3 studies, resampled whole" in tags.text
    assert "30 cells of 1 unseen type" in tags.text
    assert "Types that were not: 30 cells" in tags.text
    assert "the 90 cells of types that were trained on" in tags.text
    assert "neuron for " in tags.text  # what they are taken for


def test_the_file_of_training_counts_with_its_test_cells_only(bundle: Bundle, stratified: Path):
    split = Split.draw(stratified, fingerprint(stratified))
    own = replace(bundle, facts={**bundle.facts, "split": asdict(split)})
    cells, tests = of_atlas(own, stratified, 5_000, 0), split.rows(stratified)[2]
    assert np.array_equal(cells.vectors, read_rows(stratified, tests).vectors)
    assert cells.said == f"{len(tests)} test cells of {stratified.name}"
    assert cells.groups is None  # cells were held out, not studies
    other = of_atlas(bundle, stratified, 5_000, 0)  # all of it
    assert len(other.vectors) == 600
    assert other.groups is not None
    with pytest.raises(InputError, match="its levels are"):
        of_atlas(replace(bundle, levels=("a", "b")), stratified, 5_000, 0)


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


# eval.py


def test_eval_draws_the_rows_that_it_prints(tmp_path: Path, capsys):
    """Two types held out; names that are HTML; two checkpoints on one page."""
    paths = [("I", "L", "t", f"a{i} {EVIL}") for i in range(3)] + [("S", "M", f"m{i}", f"b{i}") for i in range(3)]
    codes = np.arange(900) % 6
    vectors = clustered([paths[c][3] for c in codes], dim=8, spread=0.7)
    data, out = tmp_path / "cells.parquet", tmp_path / "r.html"
    classes = [np.unique(np.array(column, object), return_inverse=True) for column in zip(*paths, strict=True)]
    with writing(data, 8, False, {"cl_release": "x"}) as writer:
        writer.append(vectors, [(own[codes], names.tolist()) for names, own in classes])
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
                assert value is None or svg.share(value) in tags.text
                assert value is None or f"{value:.3f}" in printed
    assert "Types that were not: " in tags.text
    assert "held out: 2 whole types" in tags.text
    assert "of LDA" in tags.text or "best control" in tags.text

    other = tmp_path / "other.parquet"  # all new: no bank, and no probabilities
    with writing(other, 8, False, {"cl_release": "x"}) as writer:
        writer.append(vectors + 0.1, [(own[codes], names.tolist()) for names, own in classes])
    new = ["--input", str(other), "--device", "cpu", "--all-rows", "--num-samples", "200"]
    evaluate.main([*new, "--model-path", models[0], "--report", str(out)])
    text = check_page(out.read_text()).text
    assert "No probabilities: a checkpoint has none for cells of another file" in text
    assert "Right (loo)" in text


def test_the_seen_mask_decides_what_counts(scored: Scored):
    """`apart` takes the figures of seen types where there are both, and all where there are not."""
    labels = scored.truth.labels
    truth = truth_of(LEVELS, labels, scored.classes, scored.classes, [scored.classes[3][0]], None, GRAPH)
    s = replace(scored, truth=truth)
    row = {**s.prefixes[0], "seen": {"bank": {"x": 1}, "loo": {"x": 2}}, "seen_interval": {"bank": {}, "loo": {}}}
    told = replace(s, prefixes=[row], controls=[], raw=row).apart()
    assert told.prefixes[0]["bank"] == {"x": 1}
    assert told.counted(3).sum() == truth.seen.sum() < len(labels)
    assert scored.apart() is scored
    none_seen = replace(s, truth=SimpleNamespace(**{**vars(truth), "seen": np.zeros(120, bool)}))  # type: ignore[arg-type]
    assert none_seen.apart() is none_seen


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
