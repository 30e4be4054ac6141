"""How large, how soon there and how smooth is the explorer's page? In headless Chromium, drawing in software.

    uv run python -m benchmarks.explorer
    uv run python -m benchmarks.explorer --pages explorer.html

SIMULATED cells of 128 numbers and 203 types, and an untrained adapter of the default size: neither speed nor size
depend on what it has learned. Without a graphics card this is the slow end.
An empty page stands beside, since times and frames hang on what else the machine does.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fractal.annotate.annotator import Annotator
from fractal.base.errors import run
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.atlas import LabelledVectors as Labelled
from fractal.hierarchy.levels import LEVELS
from fractal.model.checkpoint import build_adapter
from fractal.reference import Reference, make_reference
from fractal.view.explorer import Page, html
from fractal.view.shown import Shown

DIM, TYPES = 128, 203
PATHS = np.stack([np.arange(TYPES) // size for size in (29, 12, 2, 1)], axis=1)  # codes per level: 7, 17, 102, 203
SECONDS = 4  # of morphing
QUERIES = 50
FLAGS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]

MORPH = """(milliseconds) => new Promise((done) => {
    const began = performance.now();
    let frames = 0;
    const frame = (now) => {
        frames++;
        const last = explorer.about.widths.length - 1;
        explorer.map.prefix = 1 + last * (0.5 - 0.5 * Math.cos((now - began) / 400));
        explorer.map.drawNow();
        if (now - began < milliseconds) requestAnimationFrame(frame);
        else done((1000 * frames) / (performance.now() - began));
    };
    requestAnimationFrame(frame);
})"""
IDLE = """(milliseconds) => new Promise((done) => {
    const began = performance.now();
    let frames = 0;
    const frame = (now) => {
        frames++;
        if (now - began < milliseconds) requestAnimationFrame(frame);
        else done((1000 * frames) / (performance.now() - began));
    };
    requestAnimationFrame(frame);
})"""
ASK = """(queries) => {
    const began = performance.now();
    for (let i = 0; i < queries; i++) explorer.neighbours({ layer: 0, row: i }, explorer.about.widths.length);
    return (performance.now() - began) / queries;
}"""
LABEL = """(count) => {
    const { annotator, raw } = explorer.vectors;
    const began = performance.now();
    for (let row = 0; row < count; row += 64) annotator.answer(raw.rows.slice(row * raw.dim, (row + 64) * raw.dim));
    return (1000 * count) / (performance.now() - began);
}"""
DROP = """async (count) => {
    const { raw } = explorer.vectors;
    const header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${count}, ${raw.dim}), }`.padEnd(117) + "\\n";
    const start = Uint8Array.from([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, header.length, 0]);
    const file = new File([start, header, raw.rows.slice(0, count * raw.dim)], "cells.npy");
    const began = performance.now();
    await explorer.take(file);
    return (1000 * count) / (performance.now() - began);
}"""


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cells", type=positive_int, nargs="+", help="sizes of pages to make (default: 20000 50000, without --pages)"
    )
    parser.add_argument("--pages", type=Path, nargs="+", help="pages to measure")
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium", help="(default: %(default)s)")
    return parser


def vectors_of(path: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Codes (n,) of types -> (n, DIM) float32 around one centre per type."""
    centres = np.random.default_rng(0).normal(size=(TYPES, DIM))
    return (centres[path] + 0.7 * rng.normal(size=(len(path), DIM))).astype(np.float32)


def reference(rng: np.random.Generator) -> Reference:
    names = [[f"{level} {code}" for code in range(PATHS[:, k].max() + 1)] for k, level in enumerate(LEVELS)]
    config = {"recipe": "fractal", "dim": DIM, "num_levels": 4, "scale_dim": 32, "paths": PATHS.tolist()}
    config |= {"levels": list(LEVELS), "block_levels": [0, 1, 2, 3]}
    adapter = build_adapter(config, names)
    train, held_out = rng.integers(0, TYPES, 12_000), rng.integers(0, TYPES, 3_000)
    first, second = (Labelled(vectors_of(path, rng), PATHS[path], names) for path in (train, held_out))
    counts = {tuple(names[k][c] for k, c in enumerate(row)): 1_000 for row in PATHS.tolist()}
    return make_reference(Annotator.of(adapter, first, second, counts), config, names)


def simulated_page(bundle: Reference, count: int, rng: np.random.Generator) -> str:
    path = rng.integers(0, TYPES, count)
    centres = rng.uniform(-0.9, 0.9, size=(4, TYPES, 2))
    layouts = [centres[k][PATHS[path, k]] + rng.normal(scale=0.02, size=(count, 2)) for k in range(4)]
    labels = [bundle.annotator.tree.paths[p][-1] for p in rng.integers(0, TYPES, count)]
    page = Page(bundle.annotator, LEVELS, f"{count:,} simulated cells", "untrained", {})
    return html(page, Shown(vectors_of(path, rng), count, labels=labels), np.stack(layouts).astype(np.float32))


def wait(tab: Any, condition: str) -> None:
    """Playwright's own way is code in the page, which the page's policy forbids."""
    while not tab.evaluate(condition):
        time.sleep(0.1)


def measure(browser: Any, path: Path) -> list[str]:
    """-> first paint and ready in seconds, frames a second, milliseconds a query, cells a second.

    These are labelled by one thread, and, dropped on the page, labelled and put on the map by all.
    """
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto(path.as_uri())
    paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
    if "<canvas" not in path.read_text(encoding="utf-8")[:400_000]:
        wait(tab, f"({paint}) !== null")
        figures = [tab.evaluate(paint) / 1e3, None, None, tab.evaluate(IDLE, SECONDS * 1_000), *[None] * 3]
    else:
        wait(tab, "document.documentElement.dataset.ready")
        marks = [
            tab.evaluate(f"performance.getEntriesByName('{name}')[0].startTime") / 1e3 for name in ("map", "ready")
        ]
        rates = [tab.evaluate(MORPH, SECONDS * 1_000), tab.evaluate(ASK, QUERIES), tab.evaluate(LABEL, 512)]
        rates.append(tab.evaluate(DROP, 4_096))
        figures = [tab.evaluate(paint) / 1e3, *marks, *rates]
    tab.close()
    return ["-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in figures]


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        blank = Path(folder) / "empty page"
        blank.with_suffix(".html").write_text("<!doctype html><title>empty</title><p>empty</p>", encoding="utf-8")
        pages = [blank.with_suffix(".html"), *(args.pages or [])]
        sizes = args.cells or ([] if args.pages else [20_000, 50_000])
        if sizes:
            rng = np.random.default_rng(0)
            bundle = reference(rng)
            for count in sizes:
                pages.append(Path(folder) / f"{count} cells.html")
                pages[-1].write_text(simulated_page(bundle, count, rng), encoding="utf-8")
        browser = driver.chromium.launch(executable_path=args.browser, args=FLAGS)
        rows = [[path.stem, f"{path.stat().st_size / 1e6:.1f}", *measure(browser, path)] for path in pages]
    header = ["Page", "MB", "First paint s", "Map s", "Ready s", "Frames/s", "Query ms", "Labelled/s", "Dropped/s"]
    print(table(header, rows))


if __name__ == "__main__":
    run(main)
