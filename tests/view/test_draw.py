"""Panels: as an element of a page and as files, whatever their texts are."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fractal.view import draw
from fractal.view.draw import BAD, GOOD, NONE, Box, Panel
from tests.view.conftest import EVIL

SVG = "{http://www.w3.org/2000/svg}"
NAMES = [draw.short(f"$x_2$ 細胞 {EVIL}"), "b"]
BINS = [{"probability": 0.3, "accuracy": 0.4, "interval": (0.1, 0.7), "cells": 12_345, "middle": 0.35}]
PANELS = [
    draw.lines(NAMES[0], [(0, NAMES[0]), (1, "full")], [[(0, 0.9, (0.8, 1.0)), (1, 1.0, None)]], 0.8, 0.85, (0, 0.9)),
    draw.lines("one prefix", [(0, "full")], [[(0, 0.9, None)], []], 0.8, 0.85, (0, 0.9)),
    draw.boxes(NAMES[0], [Box(0, 0, ".97", GOOD, 0.97, framed=True), Box(1, 1, "3", BAD, 0.2), Box(0, 1, "", NONE)],
               NAMES, NAMES, borders=[1]),
    draw.calibration(NAMES[0], [BINS, []]),
    draw.legend([(NAMES[0], 0), ("raw", ":"), ("right", GOOD)]),
]  # fmt: skip


def texts(image: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(image).iter(f"{SVG}text")]


@pytest.mark.parametrize("panel", PANELS, ids=["lines", "one point", "boxes", "calibration", "legend"])
def test_a_panel_s_texts_are_text_and_its_colours_variables(panel: Panel):
    image = draw.inline(panel, "p1")
    root = ElementTree.fromstring(image)
    assert root.find(f"{SVG}title").text == panel.title  # type: ignore[union-attr]
    assert {element.tag for element in root.iter()} <= {SVG + tag for tag in TAGS}
    assert not re.search(r"(?<!var\(--)#[0-9a-f]{6}", image)
    used = set(re.findall(r"var\(--(\w+)\)", image))
    assert used <= set(draw.LIGHT) == set(draw.DARK)
    ids = re.findall(r' id="([^"]+)"', image)
    assert len(set(ids)) == len(ids)
    assert all(name.startswith("p1-") for name in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', image)) == set(ids)


TAGS = ("svg", "title", "defs", "style", "g", "path", "text", "tspan", "use", "clipPath", "rect")


def test_what_a_panel_says():
    lines, _, boxes, calibration, legend = map(texts, (draw.inline(panel, "x") for panel in PANELS))
    assert NAMES[0] in lines
    assert {".900", "1.000", "raw .850", "full"} <= set(lines)
    assert {".97", "3", "b"} <= set(boxes)
    assert {"12.3k", "probability given"} <= set(calibration)
    assert "right" in legend


def test_a_text_without_room_is_left_out():
    panel = draw.boxes("tree", [Box(0, 0, "leaf", GOOD, height=1), Box(0, 1, "node", GOOD, height=9)], [], [], size=5)
    assert "leaf" not in texts(draw.inline(panel, "x"))
    assert "node" in texts(draw.inline(panel, "x"))


def test_the_same_panel_is_the_same_text():
    assert draw.inline(PANELS[0], "p") == draw.inline(PANELS[0], "p")


def test_files(tmp_path: Path):
    draw.write_files(tmp_path, "figure", PANELS[:2])
    image = (tmp_path / "figure.svg").read_text()
    assert "var(" not in image
    assert {"one prefix", ".900"} <= set(texts(image))
    assert (tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len([*tmp_path.iterdir()]) == 2
    draw.write_files(tmp_path, "figure", PANELS[:2])
    assert (tmp_path / "figure.svg").read_text() == image


@pytest.mark.parametrize(("value", "text"), [(0.9534, ".953"), (1.0, "1.000"), (-0.25, "-.250"), (None, "–")])
def test_shares(value: float | None, text: str):
    assert draw.share(value) == text


@pytest.mark.parametrize(
    ("values", "low"), [([0.95], 0.9), ([0.9], 0.9), ([0.61, 0.99], 0.6), ([], 0.9), ([0.02], 0.0)]
)
def test_the_floor_of_an_axis(values: list[float], low: float):
    assert draw.floor(values) == pytest.approx(low)


def test_names_from_files_are_one_line():
    assert draw.short("a\nb\x1b[31m") == "a b\\x1b[31m"
    assert draw.short("x" * 99) == "x" * 59 + "…"
