"""A small reference with names that are HTML, scored, and what a page must be."""

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from fractal.annotate.annotator import Annotator
from fractal.data.atlas import LabelledVectors
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.model.checkpoint import build_adapter
from fractal.reference import Reference, make_reference
from fractal.view.scored import Scored

EVIL = "</text><script>alert(1)</script><img src=x onerror=alert(2)> & \"'`\x1b[31m"
FOUR = [("I", "L", "t", "a"), ("I", "L", "t", "b"), ("I", "M", "m", EVIL), ("S", "S", "f", "d")]
GRAPH = load_graph(CL_SLIM)


def made(
    paths: Sequence[tuple[str, ...]], levels: tuple[str, ...], test: int = 200, blocks: list[int] | None = None
) -> Reference:
    """A reference of types on these paths with an adapter that was not trained."""
    torch.manual_seed(0)
    blocks = blocks or list(range(len(levels)))
    columns = [np.unique(np.array(column, object), return_inverse=True) for column in zip(*paths, strict=True)]
    classes, labels = [names.tolist() for names, _ in columns], np.stack([codes for _, codes in columns], 1)
    config: dict[str, Any] = {"recipe": "fractal", "dim": 8, "num_levels": len(blocks), "scale_dim": 4}
    config |= {"paths": labels[:, blocks].tolist(), "levels": list(levels), "block_levels": blocks}
    centres = np.random.default_rng(5).normal(size=(len(paths), 8))

    def cells(n: int, seed: int) -> LabelledVectors:
        rng = np.random.default_rng(seed)
        types = np.arange(n) % len(paths)
        vectors = centres[types] + 0.8 * rng.normal(size=(n, 8))
        return LabelledVectors(vectors.astype(np.float32), labels[types], classes, levels)

    facts = {"source": EVIL, "data": EVIL, "versions": {EVIL: EVIL}, "obsm": "X_pca"}
    adapter, counts = build_adapter(config, classes), dict.fromkeys(paths, 100)
    held_out = cells(test, 2) if test else None
    annotator = Annotator.of(adapter, cells(216, 0), cells(120, 1), counts, GRAPH)
    return make_reference(annotator, config, classes, held_out, facts)


@pytest.fixture(scope="module")
def bundle() -> Reference:
    return made(FOUR, LEVELS)


@pytest.fixture(scope="module")
def scored(bundle: Reference) -> Scored:
    return replace(bundle, name="blood").score()


@pytest.fixture
def folder(bundle: Reference, tmp_path: Path) -> Path:
    replace(bundle).save(tmp_path / "blood")
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
    assert not {"script", "img", "link", "iframe", "object", "embed", "image", "a"} & set(tags.names)
    ids = [value for name, value in tags.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    for name, value in tags.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href")
        assert name != "xlink:href" or value[1:] in ids  # the page's own markers
        assert "://" not in value or name in ("xmlns", "xmlns:xlink")
    assert "\x1b" not in text
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan[a-z]*", "", text.lower())
    assert "None" not in tags.text.replace("None of the tables", "")
    for image in re.findall(r"<svg .*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(image)
        assert root.attrib["viewBox"]
    return tags
