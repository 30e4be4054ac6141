"""The explorer's page: what is written into it, and, in a real browser, what it does; torch is the oracle."""

import base64
import csv
import gzip
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn.functional import normalize

import fractal
from fractal.base.errors import InputWarning
from fractal.commands import explore
from fractal.data.cells import Cells
from fractal.data.vectors import usable
from fractal.model.embedding import embed_matrix
from fractal.view import explorer
from fractal.view.explorer import page_annotator, unit, whole_numbers
from fractal.view.genes import read_genes
from fractal.view.maps import Maps
from fractal.view.notebook import InlinePage
from fractal.view.shown import Shown, choose
from tests.conftest import clustered
from tests.conftest import columns as annotated

ROOT = Path(__file__).parents[2]
TYPES = (
    "B cell", "CD14-low, CD16-positive monocyte", "dendritic cell", "endothelial cell of artery",
    "epithelial cell of lung",
    "fibroblast", "mast cell", "natural killer cell", "neuron", "regulatory T cell", "smooth muscle cell",
    "type II pneumocyte",
)  # fmt: skip
DIM = 24


def cells(n: int, seed: int = 0, types: tuple[str, ...] = TYPES, column: str = "cell_type") -> anndata.AnnData:
    """n cells around one place per type, some far from all; the places are the same for every seed."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(len(types), n)
    x = clustered(types, DIM, spread=0.0)[kind] + 0.7 * rng.normal(size=(n, DIM))
    obs = pd.DataFrame(
        {column: np.array(types)[kind], "donor": rng.choice(["a", "b", "c"], n), "genes": rng.integers(500, 5000, n)},
        index=[f"cell {seed}-{i}" for i in range(n)],
    )
    counts = rng.poisson(np.where(kind[:, None] == np.arange(30) % len(types), 6, 0.3)).astype(np.float32)
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(30)])
    return anndata.AnnData(counts, obs=obs, var=var, obsm={"X_scVI": x.astype(np.float32)})


@pytest.fixture(scope="module")
def ref() -> fractal.Reference:
    return fractal.fit(cells(900), labels="cell_type", use_rep="X_scVI", epochs=1, device="cpu")


def layouts_of(ref: fractal.Reference, vectors: np.ndarray) -> np.ndarray:
    """Two of each prefix's own numbers, and of the raw vectors': maps that cost nothing."""
    full, scale = embed_matrix(ref.adapter, vectors)[0], ref.adapter.scale_dim
    parts = [full[:, j * scale : j * scale + 2] for j in range(ref.adapter.num_levels)]
    parts.append(vectors[:, :2] / np.abs(vectors[:, :2]).max() * np.abs(full).max())
    return np.stack([part - part.mean(0) for part in parts])


def write(path: Path, ref: fractal.Reference, adata: anndata.AnnData, labels: str | None, title: str) -> Shown:
    types, columns = choose(adata.obs, labels, ["donor", "genes"], title)
    rows = np.arange(adata.n_obs)
    genes = read_genes(adata, rows)
    some = Shown(adata.obsm["X_scVI"], adata.n_obs, adata.obs_names.tolist(), types, columns, rows, genes)
    page = replace(ref.page(title), reference="blood")
    explorer.write_page(path, page, some, layouts_of(ref, some.vectors))
    return some


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.fixture
def bare_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the built page, which a checkout may lack."""
    path = tmp_path / "template.html"
    path.write_text(f"<html>{explorer.FIRST}<script>code</script>{explorer.REST}</html>")
    monkeypatch.setattr(explorer, "TEMPLATE", path)


def contents(page: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a page holds, read as its own code reads it."""
    about = json.loads(re.search(r'id="about">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    found = {}
    for name, kind, shape, text in re.findall(
        r'id="array-(\w+)" data-type="(\w+)" data-shape="([\d,]*)">([^<]*)</script>', page
    ):
        planes = np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8)
        size = np.dtype(kind).itemsize
        flat = planes.reshape(size, -1).T.copy().view(kind)
        found[name] = flat.reshape([int(n) for n in shape.split(",")])
    return about, found


def test_the_page_holds_what_it_was_given(ref, bare_template, tmp_path: Path):
    adata = cells(200, seed=1)
    some = write(tmp_path / "page.html", ref, adata, "cell_type", "my cells")
    page = (tmp_path / "page.html").read_text()
    about, found = contents(page)
    full = embed_matrix(ref.adapter, some.vectors)[0]
    assert (normalize(torch.from_numpy(full)) * torch.from_numpy(unit(found["fractal"]))).sum(1).min() > 1 - 1e-5
    assert (found["raw"] == whole_numbers(some.vectors)).all()
    maps = layouts_of(ref, some.vectors)
    assert np.allclose(found["maps"] / 32_000, maps / np.abs(maps).max(), atol=1e-4)
    assert [about["nodes"][i]["name"] for i in found["node"]] == list(adata.obs["cell_type"])
    assert [about["columns"][0]["values"][c - 1] for c in found["column_0"]] == list(adata.obs["donor"])
    assert (found["column_1"] == adata.obs["genes"]).all()
    assert (about["title"], about["cells"], about["names"][3]) == ("my cells", 200, "cell 1-3")
    assert page.index("array-maps") < page.index("<script>code") < page.index("array-fractal")  # drawn before unpacked


def test_answers_of_the_reference_are_shown_as_deep_as_they_can_be_trusted(ref, bare_template, tmp_path: Path):
    adata = cells(200, seed=1)
    adata.obsm["X_scVI"][:40] = np.random.default_rng(0).normal(size=(40, DIM))  # like nothing
    write(tmp_path / "page.html", ref, adata, None, "mine")
    about, found = contents((tmp_path / "page.html").read_text())
    answers = annotated(ref.annotator, adata.obsm["X_scVI"])
    assert [about["nodes"][i]["name"] for i in found["node"]] == answers["label"].tolist()
    assert not about["known"]
    assert len({*answers["level"]}) > 1


def test_without_a_path_a_notebook_gets_the_page_of_the_file(ref, bare_template, tmp_path: Path, monkeypatch):
    raw, full = ref.annotator.vectors, embed_matrix(ref.adapter, ref.annotator.vectors)[0]
    ends = tuple(ref.adapter.scale_dim * j for j in range(1, ref.adapter.num_levels + 1))
    layouts = layouts_of(ref, raw)
    monkeypatch.setitem(ref.__dict__, "maps", Maps(full, ends, layouts[:-1]))
    monkeypatch.setitem(ref.__dict__, "raw_map", Maps(raw, (DIM,), layouts[-1:]))
    adata = cells(60, seed=1)
    page = ref.explore(adata, labels="cell_type")
    assert page
    assert ref.explore(adata, tmp_path / "page.html", labels="cell_type") is None
    assert page.text == (tmp_path / "page.html").read_text()
    with Cells.open(adata, "X_scVI") as opened:
        known = ref.shown(opened, "cell_type", ["cell_type"]).labels
        adata.obs["cell_type"] = [f"{name}s" for name in adata.obs["cell_type"]]
        assert ref.shown(opened, "cell_type", ["cell_type"]).labels == known, "the plural is no other type"


def test_no_text_of_the_data_ends_a_script(ref, bare_template, tmp_path: Path):
    adata = cells(60, seed=1)
    adata.obs["donor"] = "</script><script>alert(1)</script><!--"
    write(tmp_path / "page.html", ref, adata, None, "</script><b>")
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page
    assert "alert" in page
    assert "<script>alert" not in page
    assert contents(page)[0]["columns"][0]["values"] == ["</script><script>alert(1)</script><!--"]


@given(arrays(np.float32, (5, 7), elements=st.floats(-1e3, 1e3, width=32)).filter(lambda x: x.any(1).all()))
def test_whole_numbers_keep_the_direction(x):
    whole = whole_numbers(x)
    assert np.abs(whole).max(1).tolist() == [explorer.LARGEST] * 5
    exact = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    assert (exact * unit(whole)).sum(1).min() > 1 - 1e-5


def test_what_is_refused(ref, bare_template, tmp_path: Path, fails, monkeypatch: pytest.MonkeyPatch):
    ref.save(tmp_path / "blood")
    cells(80, seed=1).write_h5ad(tmp_path / "new.h5ad")
    there = [tmp_path / "new.h5ad", "--reference", tmp_path / "blood", "--output", tmp_path / "page.html"]
    assert "no column 'nothing'" in fails(explore.main, *there, "--labels", "nothing")
    assert "only an .h5ad" in fails(explore.main, tmp_path / "x.npy", "--use-rep", "X", *there[1:])
    assert "from an .h5ad" in fails(explore.main, tmp_path / "x.npy", "--genes", "CD3E", *there[1:])
    assert "has no gene CD3E" in fails(explore.main, *there, "--genes", "CD3E")
    assert "name another output" in fails(explore.main, *there[:3], "--output", tmp_path / "new.h5ad")
    monkeypatch.setattr(explorer, "TEMPLATE", tmp_path / "nothing.html")
    assert "is not built" in fails(explore.main, *there)
    assert not (tmp_path / "page.html").exists()


def test_the_lock_holds_no_address():
    assert '"resolved"' not in (ROOT / "explorer" / "package-lock.json").read_text()


@pytest.fixture(scope="module")
def npm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of explorer/ with npm's packages, those of development among them."""
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("no npm on this machine")
    folder = tmp_path_factory.mktemp("npm") / "explorer"
    shutil.copytree(ROOT / "explorer", folder, ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run([npm, "ci", "--prefer-offline"], cwd=folder, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"npm could not install: {installed.stderr[-200:]}")
    return folder


# --- what the page does ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
    )
    if not binary:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    if not explorer.TEMPLATE.is_file():
        pytest.skip("the explorer's page is not built: uv sync --reinstall-package fractal-cells")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        flags = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--no-sandbox"]
        yield driver.chromium.launch(executable_path=binary, args=flags)


class Opened:
    """A page in the browser, and what it said and asked for."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        width, height = options.pop("viewport", (1280, 800))
        self.context = browser.new_context(viewport={"width": width, "height": height}, **options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address, timeout=120_000)  # milliseconds: of a busy machine
        self.wait("document.documentElement.dataset.ready || !document.querySelector('#message').hidden", seconds=120)
        assert self.page.is_hidden("#message"), self.said

    def check(self) -> None:
        assert self.said == []
        assert [url for url in self.asked if not url.startswith(("file:", "blob:"))] == []
        assert len([url for url in self.asked if url.startswith("file:")]) == 1

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until the expression is true. Playwright's own way is code in the page, which the page's policy forbids."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, (condition, self.said)
            time.sleep(0.05)

    def drop(self, name: str, content: bytes) -> None:
        """As a person drops a file on the map; waits for the answers."""
        self.page.evaluate(
            """([name, text]) => {
                const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                const data = new DataTransfer();
                data.items.add(new File([bytes], name));
                const options = { dataTransfer: data, bubbles: true, cancelable: true };
                for (const kind of ["dragover", "drop"])
                    document.querySelector("#points").dispatchEvent(new DragEvent(kind, options));
            }""",
            [name, base64.b64encode(content).decode()],
        )
        self.wait("Boolean(document.querySelector('#yours h2, #yours .error'))", 120)

    def download(self, button: str) -> bytes:
        with self.page.expect_download() as waiting:
            self.page.click(button)
        self.saved = waiting.value.suggested_filename
        return Path(waiting.value.path()).read_bytes()


@pytest.fixture(scope="module")
def shown(ref, browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    some = write(path, ref, cells(800, seed=1), "cell_type", "cells.h5ad")
    about, found = contents(path.read_text())
    opened = Opened(browser, path.as_uri())
    yield SimpleNamespace(
        opened=opened, page=opened.page, path=path, cells=some, about=about, arrays=found, tree=ref.annotator.tree
    )
    opened.check()


def torch_neighbours(rows: np.ndarray, queries: list[int], width: int, k: int) -> torch.Tensor:
    """Cosines of the k nearest other cells, and all cosines, by the first numbers."""
    x = normalize(torch.from_numpy(unit(rows))[:, :width].double(), dim=1)
    cosines = x[queries] @ x.T
    cosines[range(len(queries)), queries] = -2
    return cosines


def painted(page: Any) -> np.ndarray:
    """Which cells have a colour."""
    return np.array(page.evaluate("Array.from(explorer.colours(0))")).reshape(-1, 4)[:, 3] > 0


LIT = "Array.from({ length: explorer.about.cells }, (_, row) => explorer.isLit({ layer: 0, row }))"


@pytest.mark.slow
def test_neighbours_are_those_of_torch_at_every_prefix(shown):
    queries = np.random.default_rng(0).permutation(shown.about["cells"])[:200].tolist()
    for prefix, width in enumerate(shown.about["widths"], 1):
        found = shown.page.evaluate(
            "([rows, prefix]) => rows.map((row) => explorer.neighbours({ layer: 0, row }, prefix, 15))",
            [queries, prefix],
        )
        for kind, rows in ("fractal", shown.arrays["fractal"]), ("raw", shown.arrays["raw"]):
            cosines = torch_neighbours(rows, queries, width if kind == "fractal" else rows.shape[1], 15)
            best = cosines.topk(15, dim=1)
            for i, one in enumerate(found):
                near = one[kind]
                assert np.allclose(near["cosines"], best.values[i], atol=1e-6)
                assert np.allclose(near["cosines"], cosines[i, near["rows"]], atol=1e-6)  # ties may change places
                assert len({*near["rows"]}) == 15


def positions(shown: SimpleNamespace, prefix: float) -> np.ndarray:
    """(n, 2) on the map at a prefix."""
    shown.page.evaluate("prefix => explorer.setPrefix(prefix, false)", prefix)
    rows = "Array.from({ length: explorer.about.cells }, (_, row) => explorer.map.position({ layer: 0, row }))"
    return np.array(shown.page.evaluate(rows))


@pytest.mark.slow
def test_the_slider_changes_the_neighbours_that_are_listed(shown):
    page, row = shown.page, 17
    page.evaluate("row => explorer.choose({ layer: 0, row })", row)
    types = shown.cells.labels
    for prefix, width in enumerate(shown.about["widths"], 1):
        page.keyboard.press(str(prefix))
        shown.opened.wait(f"explorer.map.prefix === {prefix}")
        found = torch_neighbours(shown.arrays["fractal"], [row], width, 15)[0].topk(15).indices.tolist()
        listed = page.locator("#cell .lists > div:first-child li .text").all_inner_texts()
        assert [text.split("\n")[0] for text in listed] == [types[i] for i in found]
        finest = page.locator("#cell .agreement tr:last-child td:nth-child(2)").inner_text()
        share = 100 * np.mean([types[i] == types[row] for i in found])
        assert float(finest.rstrip("%")) == pytest.approx(share, abs=0.51)
    # Between two prefixes the layouts are mixed.
    first, middle, second = (positions(shown, prefix)[3] for prefix in (1, 1.5, 2))
    assert np.allclose(middle, (first + second) / 2, atol=1e-4)
    page.locator("#slider").fill("2.6")  # let go between two stops, it goes to the nearer one
    shown.opened.wait("explorer.map.prefix === 3")
    page.keyboard.press("Escape")
    page.evaluate("explorer.choose(null)")


def as_csv(x: np.ndarray, names: list[str]) -> bytes:
    return pd.DataFrame(x, index=pd.Index(names, name="cell_id")).to_csv().encode()


def as_npy(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def as_parquet(x: np.ndarray, names: list[str], compression: str) -> bytes:
    file = io.BytesIO()
    table = pa.table({"cell_id": names, "embedding": list(x)})
    pq.write_table(table, file, compression=compression)
    return file.getvalue()


@pytest.mark.slow
def test_dropped_files_get_the_labels_and_probabilities_of_torch(shown, ref):
    rng = np.random.default_rng(3)
    x = np.concatenate([cells(150, seed=5).obsm["X_scVI"], rng.normal(size=(30, DIM)).astype(np.float32)])
    x[7], x[8] = np.nan, 0
    names = [f"new {i}" for i in range(len(x))]
    files = [
        ("new.csv", as_csv(x, names), names),
        ("plain.csv", "\n".join(",".join(map(str, row)) for row in x.tolist()).encode(), None),
        ("snappy.parquet", as_parquet(x, names, "snappy"), names),
        ("zstd.parquet", as_parquet(x, names, "zstd"), names),
        ("new.npy", as_npy(x), None),
        ("columns.npy", as_npy(np.asfortranarray(x.astype(np.float64))), None),
    ]
    small, _ = page_annotator(ref.annotator)
    told = annotated(small, x)
    full = embed_matrix(ref.adapter, x)[0]
    ends, layouts = tuple(shown.about["widths"]), shown.arrays["maps"] / np.float32(32_000)
    maps, raw_map = (
        Maps(unit(shown.arrays["fractal"]), ends, layouts[:-1]),
        Maps(unit(shown.arrays["raw"]), (DIM,), layouts[-1:]),
    )
    places = np.concatenate([maps.transform(np.nan_to_num(full)), raw_map.transform(x)])
    for name, content, ids in files:
        shown.opened.drop(name, content)
        assert f"180 cells of {name}" in shown.page.inner_text("#yours h2")
        rows = list(csv.DictReader(io.StringIO(shown.opened.download("#save-yours").decode())))
        assert [row["cell_id"] for row in rows] == (ids or [str(i) for i in range(len(x))])
        for column in ("level", "label", "cl_id", "status", *shown.about["levels"]):
            assert [row[column] for row in rows] == told[column].tolist(), (name, column)
        for column in (*(f"{level}_probability" for level in shown.about["levels"]), "p_value"):
            got = np.array([float(row[column] or "nan") for row in rows])
            assert np.allclose(got, told[column], atol=1e-4, equal_nan=True), (name, column)
        placed = np.array(shown.page.evaluate("explorer.yours.layouts.map((l) => Array.from(l))"), float)
        near = np.abs(placed.reshape(places.shape) - places).max(2)  # a tie may put another cell among the ten nearest
        assert (near[:, np.isfinite(near[0])] < 1e-3).mean() > 0.99
    assert {*told["status"]} >= {"ok", "invalid"}
    row = shown.page.evaluate("explorer.neighbours({ layer: 1, row: 0 }, 1, 15)")
    x0 = normalize(torch.from_numpy(full[:1, : shown.about["widths"][0]]).double())
    bank = normalize(torch.from_numpy(unit(shown.arrays["fractal"])[:, : shown.about["widths"][0]]).double())
    assert np.allclose(row["fractal"]["cosines"], (x0 @ bank.T).topk(15).values[0], atol=1e-5)


@pytest.mark.slow
def test_files_that_do_not_fit_are_refused_in_one_line(shown):
    x = cells(20, seed=5).obsm["X_scVI"]
    wrong = {
        "narrow.csv": (as_csv(x[:, :9], [str(i) for i in range(20)]), f"9 numbers a cell, the reference takes {DIM}"),
        "narrow.npy": (as_npy(x[:, :9]), "9 numbers a cell"),
        "cut.npy": (as_npy(x)[:-8], "cut short"),
        "whole.npy": (as_npy(x.astype(int)), "must hold floats"),
        "not.npy": (b"hello", "no .npy file"),
        "not.parquet": (b"PAR1hello", "not.parquet:"),
        "ragged.csv": (b"\n".join([b",".join([b"1"] * DIM)] * 2) + b"\n1,2\n", "line 3 has 2 fields"),
        "cells.zarr": (b"hello", "CSV, TSV, Parquet and .npy files are read"),
        "empty.csv": (b"", "empty"),
    }
    for name, (content, said) in wrong.items():
        shown.opened.drop(name, content)
        assert said in shown.page.inner_text("#yours .error")


@pytest.mark.slow
def test_missing_numbers_are_invalid_in_every_format(shown):
    x = cells(12, seed=5).obsm["X_scVI"].astype(np.float64)
    x[2, 3], x[5], x[7], x[9, 0], x[10] = np.nan, np.nan, 0, np.inf, 1e-14
    names = [f"new {i}" for i in range(len(x))]
    columns = pd.DataFrame(x, columns=[f"v{k}" for k in range(DIM)])  # pandas writes NaN as null
    file, lists = io.BytesIO(), io.BytesIO()
    columns.assign(cell_id=names).to_parquet(file)
    missing = [None if np.isnan(row).all() else [None if np.isnan(v) else v for v in row] for row in x]
    pq.write_table(pa.table({"cell_id": names, "embedding": pa.array(missing, pa.list_(pa.float32()))}), lists)
    expected = np.where(usable(x.astype(np.float32)), "", "invalid").tolist()
    statuses = []
    for name, content in (
        ("new.csv", as_csv(x, names)),
        ("new.npy", as_npy(x)),
        ("nan.parquet", as_parquet(x, names, "snappy")),
        ("null.parquet", lists.getvalue()),
        ("columns.parquet", file.getvalue()),
    ):
        shown.opened.drop(name, content)
        rows = list(csv.DictReader(io.StringIO(shown.opened.download("#save-yours").decode())))
        statuses.append([row["status"] for row in rows])
        assert [status * (status == "invalid") for status in statuses[-1]] == expected, name
    assert statuses == [statuses[0]] * len(statuses)


@pytest.mark.slow
def test_the_page_tells_what_it_read_and_what_it_left_out(shown, ref):
    x = cells(40, seed=5).obsm["X_scVI"]
    x[0, 1], x[1], x[2, 2], x[3] = np.nan, np.nan, np.inf, 0
    names = [f"new {i}" for i in range(len(x))]
    frame = pd.DataFrame(x, pd.Index(names, name="cell_id"), [f"v{k}" for k in range(DIM)])
    frame["donor"] = "a"
    parquet = io.BytesIO()
    frame.assign(cell_id=names).to_parquet(parquet, index=False)
    others = "names from column 'cell_id'; not read: column 'donor'"
    for name, content, text in (
        ("x.csv", frame.to_csv().encode(), f"{DIM} columns of numbers, {others}"),
        ("x.parquet", parquet.getvalue(), f"{DIM} columns of floats, {others}"),
        ("x.npy", as_npy(x), f"a matrix of 40 x {DIM} numbers"),
    ):
        shown.opened.drop(name, content)
        left_out = "Left out: 2 with missing numbers, 1 with infinite numbers, 1 with zeros alone."
        assert f"Read: {text}. {left_out}" in shown.page.inner_text("#yours")
    depth = np.array(shown.page.evaluate("Array.from(explorer.yours.answers.depth)"))
    table = shown.page.locator("#yours table", has=shown.page.locator("caption", has_text=re.compile("^Answered$")))
    for k, row in enumerate(table.locator("tr").all()[1:]):
        cells_, share, _ = row.locator("td").all_inner_texts()
        assert int(cells_) == (depth > k).sum()
        assert float(share.rstrip("%")) == pytest.approx(100 * (depth > k).sum() / 36, abs=0.51)


@pytest.mark.slow
def test_the_view_moves_to_dropped_cells_and_novel_ones_are_diamonds(shown):
    page = shown.page
    page.evaluate("explorer.map.camera.look([1, 0, 0]); explorer.colourBy('prefix')")
    adata = cells(200, seed=7)
    rng = np.random.default_rng(0)
    near = adata.obsm["X_scVI"][:1] + 0.01 * rng.normal(size=(60, DIM))
    x = np.concatenate([near, rng.normal(size=(2, DIM))]).astype(np.float32)
    shown.opened.drop("neurons.npy", as_npy(x))
    shown.opened.wait("explorer.map.camera.zoom > 3")
    time.sleep(0.5)  # the flight
    to_screen = "explorer.map.camera.toScreen(explorer.map.position({ layer: 1, row }))"
    screen = np.array(page.evaluate(f"Array.from({{ length: {len(near)} }}, (_, row) => {to_screen})"))
    box = page.locator("#points").bounding_box()
    assert ((screen > 0) & (screen < [box["width"], box["height"]])).all(1).mean() > 0.8
    status = np.array(page.evaluate("Array.from(explorer.yours.answers.status)"))
    shape = np.array(page.evaluate("Array.from(explorer.colours(1))")).reshape(-1, 4)[:, 3]
    assert (status == 2).any()
    assert ((shape == 3) == (status == 2)).all()
    page.evaluate("explorer.forget(); explorer.map.camera.look([1, 0, 0])")


@pytest.mark.slow
def test_of_very_many_dropped_cells_all_are_answered_and_some_are_drawn(shown):
    x = np.tile(cells(200, seed=7).obsm["X_scVI"], (101, 1))
    shown.opened.drop("many.npy", as_npy(x))
    assert "20,000 of the cells are drawn" in shown.page.inner_text("#yours")
    has_position = "explorer.map.position({ layer: 1, row }).every(Number.isFinite)"
    assert sum(shown.page.evaluate(f"Array.from({{ length: 20200 }}, (_, row) => {has_position})")) == 20_000
    path = shown.page.evaluate("Array.from(explorer.yours.answers.path)")
    assert path == path[:200] * 101
    shown.page.evaluate("explorer.forget()")


@pytest.mark.slow
def test_the_command_for_an_h5ad_makes_a_file_that_is_read(shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adata = cells(20, seed=6)
    adata.write_h5ad(tmp_path / "new's.h5ad")
    shown.opened.drop("new's.h5ad", (tmp_path / "new's.h5ad").read_bytes())
    message = shown.page.inner_text("#yours .error")
    command = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    shown.opened.drop("new's.csv", (tmp_path / "new's.csv").read_bytes())
    rows = list(csv.DictReader(io.StringIO(shown.opened.download("#save-yours").decode())))
    assert [row["cell_id"] for row in rows] == adata.obs_names.tolist()


@pytest.mark.slow
def test_lasso_counts(shown):
    from matplotlib.path import Path as Polygon

    page = shown.page
    page.keyboard.press("3")
    shown.opened.wait("explorer.map.prefix === 3")
    box = page.locator("#points").bounding_box()
    corners = [(0.3, 0.2), (0.75, 0.25), (0.6, 0.7), (0.5, 0.4), (0.35, 0.65)]
    page.keyboard.down("Shift")
    for i, (x, y) in enumerate(corners):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        if i == 0:
            page.mouse.down()
    page.mouse.up()
    page.keyboard.up("Shift")
    polygon = Polygon(np.array(page.evaluate("explorer.map.lasso")).reshape(-1, 2))
    inside = polygon.contains_points(positions(shown, 3))
    assert 20 < inside.sum() < shown.about["cells"] - 20
    assert page.inner_text("#group h2") == f"{inside.sum():,} cells"
    finest = pd.Series(shown.cells.labels)[inside].value_counts()
    title = page.locator("caption", has_text=re.compile(f"^{shown.about['levels'][-1]}$"))
    table = page.locator("#group table", has=title).locator("tr")
    first = table.nth(1).locator("td").all_inner_texts()
    assert first[0] == f"{finest.iloc[0]:,}"
    atlas = shown.cells.labels.count(table.nth(1).locator("th").inner_text().strip()) / shown.about["cells"]
    assert float(first[2].rstrip("%")) == pytest.approx(100 * atlas, abs=0.51)
    text = shown.opened.download("#group .buttons button:first-child").decode()
    saved = pd.read_csv(io.StringIO(text))
    assert saved["cell_id"].tolist() == np.array(shown.cells.names)[inside].tolist()
    assert saved[shown.about["levels"][-1]].tolist() == np.array(shown.cells.labels)[inside].tolist()
    page.evaluate("explorer.select(null)")


@pytest.mark.slow
def test_selections_combine_and_are_saved_with_their_rule(shown):
    page, labels, names = shown.page, np.array(shown.cells.labels), np.array(shown.cells.names)
    page.evaluate("explorer.forget()")  # what another test has dropped
    at = positions(shown, 4)
    corners = [-0.5, -0.5, 0.2, -0.5, 0.2, 0.4, -0.5, 0.4]
    inside = (at > [-0.5, -0.5]).all(1) & (at < [0.2, 0.4]).all(1)
    wanted = np.isin(labels, ["mast cell", "fibroblast"])
    nodes = [i for i, node in enumerate(shown.about["nodes"]) if node["name"] in ("mast cell", "fibroblast")]
    page.evaluate("explorer.colourBy('prefix')")
    for mode, word, expected in (
        ("and", "and", inside & wanted), ("or", "or", inside | wanted), ("not", "but not", inside & ~wanted)
    ):  # fmt: skip
        page.evaluate("corners => { explorer.select(null); explorer.select(corners); }", corners)
        page.evaluate("nodes => explorer.tick(nodes)", nodes)
        page.select_option("#mode", mode)
        page.click("#tab-types")
        page.locator("#types button", has_text="labelled").click()
        assert page.evaluate("explorer.group") == np.flatnonzero(expected).tolist()
        assert page.evaluate("explorer.ticked.size") == 0
        for change in ("explorer.update({ tab: 'group' })", "explorer.choose({ layer: 0, row: 3 })"):
            page.evaluate(change)
            assert painted(page).tolist() == expected.tolist()
        page.evaluate(
            "nodes => { explorer.choose(null); explorer.update({ tab: 'types' }); explorer.tick(nodes); }", nodes
        )
        assert painted(page).tolist() == (expected | wanted).tolist()  # what is selected stays lit
        page.evaluate("explorer.tick([]); explorer.update({ tab: 'group' })")
        rule, *ids = shown.opened.download("#save-ids").decode().splitlines()
        assert ids == names[expected].tolist()
        assert shown.opened.saved == "cells_cells.txt"
        assert f"Selected: {rule.removeprefix('# cells.h5ad: ')}." in page.inner_text("#group .note >> nth=0")
        table = pd.read_csv(io.BytesIO(shown.opened.download("#group .buttons button:first-child")))
        assert (len(table), table.columns[-1], shown.opened.saved) == (expected.sum(), rule, "cells_group.csv")
        assert re.fullmatch(rf"# cells.h5ad: \(in a lasso at prefix 4: .*\) {word} \(labelled .*mast cell.*\)", rule)
    ratio = {}
    for name in set(labels):
        ratio[name] = (labels[expected] == name).mean() / (labels == name).mean()
    rows = page.locator("#group table:first-of-type tr").all_inner_texts()[1:]
    for row in rows:  # enriched: the finest types among them have the ratio of their shares
        name, _, shown_ratio = row.split("\t")
        if name.removesuffix(" subtype") in ratio:
            assert float(shown_ratio.rstrip("×")) == pytest.approx(ratio[name.removesuffix(" subtype")], abs=0.051)
    page.evaluate("explorer.select(null); explorer.tick([])")


@pytest.mark.slow
def test_what_a_prefix_mixes_up_is_a_table(shown):
    """The worst type first: how many of the 15 nearest have the same label, and the other label that most have."""
    page, labels, width = shown.page, np.array(shown.cells.labels), shown.about["widths"][0]
    page.evaluate("explorer.select(null); explorer.forget(); explorer.setPrefix(1, false); explorer.tick([])")
    page.click("#tab-group")
    page.get_by_role("button", name="What is mixed up, by prefix 1").click()
    expected = {}
    for name in TYPES:
        rows = np.flatnonzero(labels == name).tolist()
        near = labels[torch_neighbours(shown.arrays["fractal"], rows, width, 15).topk(15).indices.numpy()]
        others = pd.Series(near[near != name]).value_counts() / near.size
        expected[name] = ((near == name).mean(), others)
    found = [row.split("\t") for row in page.locator("#group .agreement tr").all_inner_texts()[1:]]
    assert {name.split("\n")[0] for name, *_ in found} == {*TYPES}
    shares = [expected[name.split("\n")[0]][0] for name, *_ in found]
    assert (np.diff(shares) >= -0.002).all()  # a tie may be another cell
    for cell, share, other in found:
        same, others = expected[cell.split("\n")[0]]
        assert float(share.strip().rstrip("%")) == pytest.approx(100 * same, abs=0.51)
        if other == "none":
            assert same == 1
            continue
        name, figure = other.rsplit(" ", 1)
        assert float(figure.rstrip("%")) == pytest.approx(100 * others.max(), abs=0.51)
        assert others[name] == pytest.approx(others.max(), abs=0.002)
    page.select_option("#near-level", label="labels of the lineage")
    head, *rows = page.locator("#group .agreement tr").all_inner_texts()
    assert head.startswith("lineage")
    counts = [int(row.split("\n")[1].split()[0].replace(",", "")) for row in rows]
    assert sum(counts) == shown.about["cells"]
    page.select_option("#near-level", label="labels of the subtype")
    page.evaluate("explorer.setPrefix(2, false)")  # it is of another prefix, and is asked for again
    assert page.locator("#group .agreement").count() == 0
    page.evaluate("explorer.colourBy('prefix')")


@pytest.mark.slow
def test_cells_named_in_the_address_are_selected(shown, browser):
    ids = [shown.cells.names[i] for i in (5, 2, 700)]
    opened = Opened(browser, f"{shown.path.as_uri()}?cells={','.join([*ids, 'of another file'])}")
    assert opened.page.evaluate("explorer.group") == [2, 5, 700]
    assert "3 of 4 are here" in opened.page.evaluate("explorer.selection.rule")
    again = Opened(browser, opened.page.url.replace("?cells=", "?other="))  # the part behind # holds them as well
    assert again.page.evaluate("explorer.group") == [2, 5, 700]
    again.check()
    opened.check()


@pytest.mark.slow
def test_two_maps_share_a_selection(shown, browser):
    """Prefix 2 and the raw vectors, which come first, or two prefixes."""
    opened = Opened(browser, shown.path.as_uri() + "#prefix=2")
    page = opened.page
    page.keyboard.press("v")
    opened.wait("explorer.second?.prefix === 5")
    assert page.locator("#stops2 option").all_inner_texts()[3:] == ["subtype, full vector", "raw vector, as it came"]
    assert page.evaluate("explorer.islands(5).length") == page.evaluate("explorer.islands(2).length")  # of one level
    second = "Array.from({ length: explorer.about.cells }, (_, row) => explorer.second.position({ layer: 0, row }))"
    assert np.allclose(page.evaluate(second), shown.arrays["maps"][4] / 32_000, atol=0.05)  # spread a little
    for prefix, where in ((5, "on the map of the raw vectors"), (4, "at prefix 4")):
        page.select_option("#stops2 select", str(prefix))
        opened.wait(f"explorer.second.prefix === {prefix}")
        inside = (np.abs(page.evaluate(second)) < 0.3).all(1)
        page.evaluate("explorer.select([-0.3, -0.3, 0.3, -0.3, 0.3, 0.3, -0.3, 0.3], explorer.second)")
        assert page.evaluate("explorer.group") == np.flatnonzero(inside).tolist()
        assert where in page.evaluate("explorer.selection.rule")
    page.select_option("#stops2 select", "5")
    opened.wait("explorer.second.prefix === 5")
    with_raw = Opened(browser, page.url)
    with_raw.wait("explorer.second?.prefix === 5")
    with_raw.check()
    page.select_option("#stops2 select", "3")
    opened.wait("explorer.second.prefix === 3")
    assert page.evaluate("explorer.map.prefix") == 2
    again = Opened(browser, page.url)
    again.wait("explorer.second?.prefix === 3")
    assert again.page.is_visible("#points2")
    page.keyboard.press("v")
    assert page.is_hidden("#points2")
    again.check()
    opened.check()


@pytest.mark.slow
def test_names_cover_no_cell_and_no_name_and_are_not_cut(shown):
    page = shown.page
    box = page.locator("#points").bounding_box()
    for prefix in range(1, len(shown.about["widths"]) + 1):
        at = positions(shown, prefix)
        for view in ([1, 0, 0], [3, *at[0].tolist()], [12, *at[5].tolist()]):
            page.evaluate("view => { explorer.map.camera.look(view); explorer.map.drawNow(); }", view)
            screen = np.array(
                page.evaluate("rows => rows.map((row) => explorer.map.camera.toScreen(row))", at.tolist())
            )
            boxes = page.evaluate("explorer.map.nameBoxes")
            assert boxes or view[0] > 1
            for i, (left, top, right, bottom) in enumerate(boxes):
                assert 0 <= left < right <= box["width"]
                assert 0 <= top < bottom <= box["height"]
                covered = (screen > [left, top]).all(1) & (screen < [right, bottom]).all(1)
                assert not covered.any()
                for other in boxes[:i]:
                    assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
        page.evaluate("explorer.choose({ layer: 0, row: 5 }); explorer.map.drawNow()")
        left, top = page.evaluate("explorer.map.camera.toScreen(explorer.map.position({ layer: 0, row: 5 }))")
        for box_ in page.evaluate("explorer.map.nameBoxes"):  # nor the ring around the chosen cell
            assert not (box_[0] < left + 8 and left - 8 < box_[2] and box_[1] < top + 8 and top - 8 < box_[3])
        page.evaluate("explorer.choose(null)")
    page.evaluate("explorer.map.camera.look([1, 0, 0])")


@pytest.mark.slow
def test_cells_that_lie_on_one_another_are_spread(browser, ref, tmp_path: Path):
    adata = cells(300, seed=1)
    types, columns = choose(adata.obs, "cell_type", ["donor"], "x")
    layouts = np.zeros((4, 300, 2), np.float32)
    layouts[:, :70], layouts[:, 299] = 0.5, 1  # 70 in one dot, 229 in another, and one alone
    shown = Shown(adata.obsm["X_scVI"], 300, None, types, columns)
    explorer.write_page(tmp_path / "page.html", ref.page("dots"), shown, layouts)
    opened = Opened(browser, (tmp_path / "page.html").as_uri())
    at = positions(opened, 1)  # type: ignore[arg-type]
    assert len(np.unique((at[:70] / 0.018).round(), axis=0)) > 25  # discs that do not cover each other
    assert np.abs(at[:70] - 0.5).max() < 0.3
    assert at[299].tolist() == [1, 1]
    opened.check()


@pytest.mark.slow
def test_search_by_name_synonym_and_id(shown):
    page = shown.page
    by_name = {node["name"]: node for node in shown.about["nodes"]}
    synonym = by_name["regulatory T cell"]["synonyms"][0]
    page.mouse.move(5, 5)  # not on the legend, where it would light up another type
    for text, name in (
        ("pneumocyte", "type II pneumocyte"),
        (synonym, "regulatory T cell"),
        ("CL:0000097", "mast cell"),
    ):
        page.keyboard.press("/")
        page.keyboard.type(text)
        assert name in page.locator("#tree .row .text").last.inner_text()
        page.keyboard.press("Enter")
        assert page.locator("#tree .row.ticked .text").all_inner_texts() == [name]
        lit = page.evaluate(LIT)
        assert lit == [label == name for label in shown.cells.labels]
    page.keyboard.press("/")
    page.keyboard.type("no such thing")
    assert page.inner_text("#types .empty") == "no such type"
    page.keyboard.press("Escape")
    page.evaluate("explorer.tick([])")


@pytest.mark.slow
def test_the_legend_lights_up_folds_and_counts(shown):
    page = shown.page
    page.click("#tab-types")
    page.mouse.move(5, 5)
    page.keyboard.press("4")
    shown.opened.wait("explorer.map.prefix === 4")
    names = page.locator("#tree .row .text").all_inner_texts()
    counts = page.locator("#tree .row .count").all_inner_texts()
    row = names.index("neuron") if "neuron" in names else names.index("Neural")
    labels = np.array(shown.cells.labels)
    assert counts[row] == str((labels == "neuron").sum())
    page.locator("#tree .row").nth(row).hover()
    assert page.evaluate(LIT) == (labels == "neuron").tolist()
    page.mouse.move(5, 5)
    for name in ("mast cell", "fibroblast"):  # several ticks combine
        page.get_by_label(f"keep {name} lit up", exact=True).last.check()
    page.mouse.move(5, 5)
    page.evaluate("document.activeElement.blur()")
    assert page.evaluate(LIT) == np.isin(labels, ["mast cell", "fibroblast"]).tolist()
    page.evaluate("explorer.tick([])")
    page.locator("#tree .row .name", has_text="Immune").first.click()
    assert len(page.locator("#tree .row").all()) < len(names)
    page.locator("#tree .row .name", has_text="Immune").first.click()
    assert page.locator("#tree .row .text").all_inner_texts() == names
    shown.opened.wait("explorer.map.prefix === 2")  # what was opened is told apart by the second prefix


@pytest.mark.slow
def test_the_slider_opens_the_tree_to_its_level(shown):
    page, tree = shown.page, "#tree .row .text"
    page.click("#tab-types")
    paths = {path[: k + 1] for path in shown.tree.paths if path[-1] in shown.cells.labels for k in range(4)}
    siblings = pd.Series([path[:-1] for path in paths]).value_counts()

    def name_of(path: tuple[str, ...]) -> str | None:
        """A name that repeats the one above has no row, or its level where it has siblings."""
        if len(path) == 1 or path[-1] != path[-2]:
            return path[-1]
        return f"{path[-1]} ({shown.about['levels'][len(path) - 1]})" if siblings[path[:-1]] > 1 else None

    for prefix in (4, 1, 2):
        page.keyboard.press(str(prefix))
        shown.opened.wait(f"explorer.map.prefix === {prefix}")
        open_paths = [path for path in paths if len(path) <= prefix]
        assert set(page.locator(tree).all_inner_texts()) == {name_of(path) for path in open_paths} - {None}
        assert f"the first {shown.about['widths'][prefix - 1]} of" in page.inner_text("#stops") or prefix == 4


@pytest.mark.slow
def test_each_name_stands_below_its_stop_of_the_slider(shown):
    page = shown.page
    slider, names = page.locator("#slider").bounding_box(), page.locator("#stops button").all()
    thumb = 16  # pixels across it, in Chromium
    for i, name in enumerate(names):
        box = name.bounding_box()
        stop = slider["x"] + thumb / 2 + (slider["width"] - thumb) * i / (len(names) - 1)
        assert box["x"] + box["width"] / 2 == pytest.approx(stop, abs=2)


@pytest.mark.slow
def test_genes_colour_the_cells_and_are_compared_between_types(shown):
    page, genes = shown.page, shown.about["genes"]
    values = shown.arrays["genes"] / 255 * np.array([[gene["high"]] for gene in genes])
    page.evaluate("explorer.setPrefix(4, false); explorer.colourBy('prefix')")
    page.click("#tab-genes")
    types = page.locator("#genes thead th").all_inner_texts()
    assert {*types} == {*shown.cells.labels}
    assert page.locator("#genes tbody th").all_inner_texts() == [gene["name"] for gene in genes]
    table = csv.DictReader(io.StringIO(shown.opened.download("#save-genes").decode()))
    for row in table:
        gene = [each["name"] for each in genes].index(row["gene"])
        cells_ = np.array([name == row["subtype"].split(" › ")[-1] for name in shown.cells.labels])
        assert float(row["share of cells"]) == pytest.approx((values[gene, cells_] > 0).mean())
        assert float(row["mean"]) == pytest.approx(values[gene, cells_].mean(), rel=1e-5)
    page.locator("#genes tbody button").nth(2).click()
    column = page.evaluate("({ name: explorer.column.name, codes: Array.from(explorer.column.codes) })")
    assert column["name"] == genes[2]["name"]
    assert np.allclose(column["codes"], values[2], atol=1e-5)
    painted = np.array(page.evaluate("Array.from(explorer.colours(0))")).reshape(-1, 4)
    order = np.argsort(values[2])
    assert painted[order[0], :3].tolist() == [68, 1, 84]
    assert painted[order[-1], :3].tolist() == [253, 231, 37]
    page.click("#tab-types")
    assert page.input_value("#colour") == f"gene:{genes[2]['name']}"
    page.select_option("#colour", "prefix")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (390, 844)], ids=["desktop", "phone"])
def test_axe_finds_nothing(shown, browser, npm_folder, size, scheme):
    """In every tab, with a selection, a cell and dropped cells; axe-core's rules for WCAG and its best practices."""
    axe = (npm_folder / "node_modules" / "axe-core" / "axe.min.js").read_text()
    opened = Opened(browser, shown.path.as_uri(), color_scheme=scheme, reduced_motion="reduce", viewport=size)
    opened.drop("new.npy", as_npy(cells(30, seed=5).obsm["X_scVI"]))
    opened.page.evaluate(axe)
    for state in (
        "explorer.update({ tab: 'yours' })",
        "explorer.update({ tab: 'types' })",
        "explorer.colourBy('column:donor')",
        "explorer.colourBy('gene:GENE3')",
        "explorer.update({ colour: 'prefix', tab: 'genes' })",
        "explorer.choose({ layer: 1, row: 3 })",
        "explorer.tick([1])",
        "explorer.select([-9, -9, 9, -9, 9, 9])",
        "document.querySelector('#ask-near').click()",
        "explorer.showSecond(5)",
        "(explorer.colourBy('prefix'), explorer.update({ tab: 'types' }), explorer.tick([1]))",
        "document.querySelector('#help').showModal()",
    ):
        opened.page.evaluate(state)
        found = opened.page.evaluate("axe.run().then(({ violations }) => violations)")
        assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found] == [], state
    opened.check()


@pytest.mark.slow
def test_the_keyboard_reaches_every_control(shown, browser):
    """With Tab alone: each button, input and select that is shown, the map and the tree."""
    opened = Opened(browser, shown.path.as_uri())
    page = opened.page
    for tab in ("types", "genes", "cell", "group", "yours"):
        page.evaluate("tab => { explorer.update({ tab }); document.activeElement.blur(); }", tab)
        wanted = page.evaluate(
            """() => {
                const all = [...document.querySelectorAll("button, input, select, canvas[tabindex]")];
                const shown = all.filter((one) => one.checkVisibility() && one.tabIndex >= 0);
                shown.forEach((one, i) => (one.dataset.number = i));
                return shown.length;
            }"""
        )
        reached = set()
        for _ in range(wanted + 10):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.dataset.number ?? ''"))
        assert reached >= {str(i) for i in range(wanted)}, tab
    opened.check()


@pytest.mark.slow
def test_a_link_brings_the_view_back(shown, browser):
    page = shown.page
    page.evaluate("explorer.colourBy('column:donor'); explorer.select([-0.4, -0.4, 0.4, -0.4, 0.4, 0.4, -0.4, 0.4])")
    page.evaluate(
        "explorer.setPrefix(2, false); explorer.choose({ layer: 0, row: 42 }); explorer.map.camera.look([2, 0.1, 0.1])"
    )
    again = Opened(browser, page.url)
    for what in (
        "explorer.map.prefix",
        "explorer.cell",
        "explorer.group",
        "explorer.map.camera.view.map((v) => v.toFixed(2))",
    ):
        assert again.page.evaluate(what) == page.evaluate(what), what
    assert again.page.inner_text("#cell") == page.inner_text("#cell")
    again.check()
    for hash in ("#prefix=99&cell=-5&type=77777&colour=column:none&view=1,2&lasso=a,b", "#prefix=NaN", "#%%%"):
        other = Opened(browser, shown.path.as_uri() + hash)  # anybody may have written it
        assert 1 <= other.page.evaluate("explorer.map.prefix") <= len(shown.about["widths"])
        other.check()
    page.evaluate(
        "explorer.choose(null); explorer.select(null); explorer.colourBy('prefix'); explorer.map.camera.look([1, 0, 0])"
    )


@pytest.mark.slow
def test_a_picture_of_the_map(shown):
    from matplotlib.image import imread

    shown.page.keyboard.press("1")
    shown.opened.wait("explorer.map.prefix === 1")
    picture = imread(io.BytesIO(shown.opened.download("#tool-png")), format="png")
    assert picture.shape[1] > shown.page.locator("#points").bounding_box()["width"]  # a legend stands beside the map
    colours = {tuple(int(node["colour"][i : i + 2], 16) for i in (1, 3, 5)) for node in shown.about["nodes"][1:]}
    there = {tuple(c) for c in (255 * picture[::1, ::1, :3]).round().astype(int).reshape(-1, 3).tolist()}
    assert len(colours & there) >= 4
    assert (picture[..., :3] > 0.99).all(2).mean() > 0.5  # on white ground


@pytest.mark.slow
def test_without_the_network_and_in_the_dark(shown, browser):
    dark = Opened(browser, shown.path.as_uri(), color_scheme="dark", offline=True)
    assert dark.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    dark.page.keyboard.press("d")
    assert dark.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    refused = dark.page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => error.message)")
    assert refused == "Failed to fetch"
    assert any("Content Security Policy" in line for line in dark.said)  # it is the page that forbids it
    assert not any(url.startswith("http") for url in dark.asked)


@pytest.mark.slow
def test_answers_of_the_reference_colour_the_cells_and_are_explained(ref, browser, tmp_path: Path):
    adata = cells(300, seed=1)
    adata.obsm["X_scVI"][:60] += np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    adata.obsm["X_scVI"][:20] = np.random.default_rng(1).normal(size=(20, DIM))  # like nothing
    write(tmp_path / "page.html", ref, adata, None, "mine")
    answers = annotated(ref.annotator, adata.obsm["X_scVI"])
    opened = Opened(browser, (tmp_path / "page.html").as_uri())
    page, levels = opened.page, list(ref.levels)
    columns = page.evaluate("explorer.cells.columns.map((c) => ({ ...c, codes: Array.from(c.codes) }))")
    held = {column["name"]: column for column in columns}
    named = [held["status"]["values"][code - 1] for code in held["status"]["codes"]]
    assert named == answers["status"].tolist()
    depth = [levels.index(level) + 1 if level in levels else 0 for level in answers["level"]]
    assert held["answered level"]["codes"] == depth
    for level in levels:
        assert np.allclose(held[f"probability of the {level}"]["codes"], answers[f"{level}_probability"], atol=1e-4)
    shallow = next(i for i, d in enumerate(depth) if 0 < d < len(levels))
    page.evaluate("row => explorer.choose({ layer: 0, row })", shallow)
    text = page.inner_text("#cell")
    assert f"It stops at the {answers['level'][shallow]}" in text
    assert f"{answers[levels[-1]][shallow]}: no answer" in text
    novel = answers["status"].tolist().index("novel")
    page.evaluate("row => explorer.choose({ layer: 0, row })", novel)
    assert "Novel: only" in page.inner_text("#cell")
    page.keyboard.press("1")
    page.click("#tab-types")
    if 0 in depth:  # grey, and no category of its own
        assert page.locator("#tree .row .text").last.inner_text() == "no answer"
    page.select_option("#colour", "column:status")
    counts = dict(zip(*(page.locator(f"#values .{part}").all_inner_texts() for part in ("text", "count")), strict=True))
    assert counts == {name: str(n) for name, n in pd.Series(answers["status"]).value_counts().items()}
    assert "like no type of the reference" in page.locator("#values .name", has_text="novel").get_attribute("title")
    page.locator("#values .row", has_text="novel").hover()
    assert page.evaluate(LIT) == (answers["status"] == "novel").tolist()
    page.get_by_label("keep novel lit up").check()
    page.get_by_role("button", name="Select cells with status novel").click()
    assert page.evaluate("explorer.group") == np.flatnonzero(answers["status"] == "novel").tolist()
    page.locator("#ask-near").click()  # the labels of novel cells are best guesses
    guesses = pd.Series(answers[levels[-1]])[answers["status"] == "novel"].value_counts()
    near = page.locator("#group .agreement tr th:first-child").all_inner_texts()[1:]
    assert {text.split("\n")[0]: int(text.split("\n")[1].split()[0]) for text in near} == guesses.to_dict()
    guess = held["best guess"]
    assert [guess["values"][code - 1] for code in guess["codes"]] == list(answers[levels[-1]])
    opened.check()


@pytest.fixture(scope="module")
def answered(ref, browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A page of answers: 5 mast cells, some cells between types, some like nothing."""
    adata = cells(400, seed=1)
    adata = adata[~((adata.obs["cell_type"] == "mast cell") & (adata.obs.groupby("cell_type").cumcount() > 4))].copy()
    adata.obsm["X_scVI"][:60] += np.random.default_rng(0).normal(size=(60, DIM)).astype(np.float32)
    adata.obsm["X_scVI"][:20] = np.random.default_rng(1).normal(size=(20, DIM))
    path = tmp_path_factory.mktemp("answered") / "page.html"
    write(path, ref, adata, None, "mine.h5ad")
    opened = Opened(browser, path.as_uri())
    answers = annotated(ref.annotator, adata.obsm["X_scVI"])
    yield SimpleNamespace(
        opened=opened, page=opened.page, answers=answers, levels=list(ref.levels), names=adata.obs_names
    )
    opened.check()


@pytest.mark.slow
def test_the_tree_adds_up_at_every_level(answered):
    page, levels = answered.page, answered.levels
    sums = """(tops) => tops.map((top) => {
        const count = (one) => Number(one.querySelector(":scope > .row .count, :scope.row .count").textContent);
        const below = [...(top.id ? top : top.querySelector(":scope > .below")).children];
        return [top.id ? explorer.about.cells : count(top), below.reduce((sum, one) => sum + count(one), 0)];
    })"""
    page.click("#tab-types")
    for prefix in range(1, len(levels) + 1):
        page.evaluate("prefix => explorer.setPrefix(prefix, false)", prefix)
        for whole, parts in page.locator("#tree, .branch:has(> .below)").evaluate_all(sums):
            assert whole == parts
        rows = page.locator("#tree .row input").evaluate_all("(all) => all.map((one) => one.ariaLabel)")
        assert len(rows) == len({*rows})  # no name stands for two things
    stops = [i for i, label in enumerate(rows) if "no answer at the" in label]
    for i in stops:
        parts = re.fullmatch(r"keep (.*), no answer at the (\w+) lit up", rows[i])
        assert parts
        top, level = parts.groups()
        page.locator("#tree .row input").nth(i).check()
        page.mouse.move(5, 5)
        page.evaluate("document.activeElement.blur()")
        depth = np.array(page.evaluate("Array.from(explorer.cells.answers.depth)"))
        lit = np.array(page.evaluate(LIT))
        assert lit.sum() > 0
        assert (depth[lit] == levels.index(level)).all()
        assert {*answered.answers["label"][lit]} == {top.split(" (")[0]}
        again = page.evaluate("location.hash")
        assert f"type={page.evaluate('[...explorer.ticked][0]')}" in again
        page.evaluate("explorer.tick([])")
    assert stops


@pytest.mark.slow
def test_unsure_cells_of_a_type_are_exported_in_four_steps(answered):
    page, answers = answered.page, answered.answers
    is_unsure = answers["level"] != answered.levels[-1]
    name = pd.Series(answers["subtype"])[is_unsure].value_counts().index[0]
    page.click("#tab-types")
    page.select_option("#colour", label="unsure subtype, best guess")
    assert {each["name"] for each in page.evaluate("explorer.islands(4)")} <= {*answers["subtype"]}
    page.get_by_label(f"keep {name} lit up", exact=True).check()
    page.get_by_role("button", name="Select cells with").click()
    wanted = is_unsure & (answers["subtype"] == name)
    _, *ids = answered.opened.download("#save-ids").decode().splitlines()
    assert ids == answered.names[wanted].tolist()
    assert answered.opened.saved == "mine_cells.txt"
    table = page.locator("#group table", has=page.locator("caption", has_text=re.compile("^subtype$")))
    assert table.locator("tr").nth(1).inner_text().split() == ["no", "answer", str(wanted.sum()), "100%", *[
        table.locator("tr").nth(1).locator("td").last.inner_text()
    ]]  # fmt: skip
    page.evaluate("explorer.select(null); explorer.colourBy('prefix')")


@pytest.mark.slow
def test_tables_of_neighbours_agree_and_labels_of_few_cells_stand_last(answered):
    page, guesses = answered.page, answered.answers["subtype"]
    page.evaluate("explorer.setPrefix(4, false); explorer.select(null); explorer.update({ tab: 'group' })")
    page.locator("#ask-near").click()
    few = {name for name, n in pd.Series(guesses).value_counts().items() if n <= 15}
    rows = page.locator("#group .agreement tr").all_inner_texts()[1:]
    assert {row.split("\n")[0] for row in rows[-len(few) :]} == few
    most = (int((guesses == "mast cell").sum()) - 1) / 15
    (mast,) = [row for row in rows if row.startswith("mast cell")]
    assert f"of at most {100 * most:.0f}%" in mast
    for row in (3, 100):  # the same of a cell, and of a group of this cell alone
        page.evaluate("row => explorer.choose({ layer: 0, row })", row)
        of_cell = page.locator("#cell .agreement").last.locator("tr").last.locator("td").first.inner_text()
        listed = page.locator("#cell .lists > div:first-child .text").all_inner_texts()
        near = page.evaluate("row => explorer.neighbours({ layer: 0, row }, 4, 15).fractal.rows", row)
        assert [text.split("\n")[0].removesuffix(" ?") for text in listed] == guesses[near].tolist()
        page.evaluate("row => explorer.selectCells([[row], []], 'one')", row)
        assert page.inner_text("#group h2") == "1 cell"
        page.locator("#ask-near").click()
        assert page.locator("#group .agreement td").first.inner_text() == of_cell
    page.evaluate("explorer.choose(null); explorer.select(null)")


@pytest.mark.slow
def test_the_first_view_has_the_most_islands(browser, ref, tmp_path: Path):
    adata = cells(300, seed=1)
    types, columns = choose(adata.obs, "cell_type", ["donor"], "x")
    codes = pd.Categorical(types).codes
    angle = 2 * np.pi * codes / len(TYPES)
    ring = np.stack([np.cos(angle), np.sin(angle)], 1) + 0.01 * np.random.default_rng(0).normal(size=(300, 2))
    layouts = np.stack([0.01 * ring, 0.01 * ring, ring, 0.01 * ring]).astype(np.float32)
    layouts[[0, 1, 3], 0] = 1
    shown = Shown(adata.obsm["X_scVI"], 300, None, types, columns)
    explorer.write_page(tmp_path / "page.html", ref.page("rings"), shown, layouts)
    opened = Opened(browser, (tmp_path / "page.html").as_uri())
    assert opened.page.evaluate("explorer.map.prefix") == 3
    opened.page.keyboard.press("v")  # a page without a map of the raw vectors does not offer it
    assert opened.page.locator("#stops2 option").count() == 4
    opened.page.click("#tab-genes")
    assert "made without genes" in opened.page.inner_text("#genes")
    assert f"blocks: {', '.join(ref.page('rings').blocks)}. A prefix" in opened.page.locator("#help").text_content()
    opened.check()


@pytest.mark.slow
def test_hostile_names_do_nothing(browser, tmp_path: Path):
    evil = [
        "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "=cmd|'/c calc'!A1", "constructor",
        "__proto__", "a & b \" ' > \u202e \U0001f9ec",
    ]  # fmt: skip
    adata = cells(700, types=tuple(evil), column="finest")
    adata.obs["coarse"] = ["<b>x</b>" if name < "b" else "javascript:alert(3)" for name in adata.obs["finest"]]
    adata.obs["donor"] = "<svg onload=alert(4)>"
    adata.obs_names = [f"<i>{i}</i>" for i in range(700)]
    ref = fractal.fit(adata, levels=["coarse", "finest"], use_rep="X_scVI", epochs=2, device="cpu")
    write(tmp_path / "evil.html", ref, adata, "finest", "<h1 onclick=alert(5)>")
    opened = Opened(browser, (tmp_path / "evil.html").as_uri())
    page = opened.page
    assert page.inner_text("#title h1") == "<h1 onclick=alert(5)>"
    for act in (
        "explorer.choose({ layer: 0, row: 3 })",
        "explorer.select([-9, -9, 9, -9, 9, 9])",
        "explorer.colourBy('column:donor')",
    ):
        page.evaluate(act)
    opened.drop("<img src=x onerror=alert(6)>.npy", as_npy(adata.obsm["X_scVI"][:50]))
    page.evaluate("explorer.colourBy('prefix')")
    page.click("#tab-types")
    page.fill("#search", "<img")
    assert evil[0] in page.inner_text("#tree")
    page.keyboard.press("Escape")
    assert {*evil} <= {*page.locator("#tree .text").all_inner_texts()}
    assert page.locator("main img, main svg, main script, #search b").count() == 0
    table = opened.download("#group .buttons button:first-child") if page.is_visible("#group") else b""
    assert b"\n=cmd" not in table
    page.wait_for_timeout(200)
    opened.check()


@pytest.mark.slow
def test_a_notebook_s_iframe_shows_the_page(browser, shown, tmp_path: Path):
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><p>cell</p>{InlinePage(shown.path.read_text(), 'cells')._repr_html_()}")
    tab, messages = browser.new_page(), list[str]()
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.goto(path.as_uri())
    frame, end = tab.frames[1], time.monotonic() + 120
    while not frame.evaluate("document.documentElement.dataset.ready ?? ''"):
        assert time.monotonic() < end
        time.sleep(0.1)
    frame.evaluate("explorer.setPrefix(1, false)")
    assert frame.evaluate("explorer.map.prefix") == 1
    assert frame.evaluate("(() => { try { return parent.document.title } catch { return 'none' } })()") == "none"
    tab.close()
    assert messages == []


# --- the command, and the sources ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_and_the_api(ref, browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ref.save("blood")
    new = cells(300, seed=2)
    new.write_h5ad("new.h5ad")
    explore.main(["new.h5ad", "--reference", "blood", "--max-cells", "250", "--columns", "donor", "genes"])
    about, found = contents(Path("explorer.html").read_text())
    assert (about["title"], about["reference"], about["cells"], about["total"]) == ("new.h5ad", "blood", 250, 300)
    assert found["maps"].shape == (len(about["blocks"]) + 1, 250, 2)  # and of the raw vectors
    assert Path("blood/raw_map.safetensors").is_file()
    assert len(about["genes"]) == len(found["genes"])  # markers
    argv = ["new.h5ad", "--reference", "blood", "--genes", "GENE1", "GENE29", "none", "--output", "genes.html"]
    with pytest.warns(InputWarning, match=r"new\.h5ad: has no gene none"):
        explore.main(argv)
    about, found = contents(Path("genes.html").read_text())
    assert [gene["name"] for gene in about["genes"]] == ["GENE1", "GENE29"]
    assert found["genes"].shape == (2, 300)
    explore.main(["new.h5ad", "--reference", "blood", "--embedding-atlas", "--labels", "cell_type"])
    table = pq.read_table("cells.parquet").to_pandas()
    assert {"cell_id", *about["levels"], "donor", "x_1", f"y_{len(about['blocks'])}", "neighbors"} <= {*table}
    assert table[about["levels"][-1]].tolist() == new.obs["cell_type"].tolist()
    fractal.load("blood").explore(new, "api.html", labels="cell_type", max_cells=100)
    about, found = contents(Path("api.html").read_text())
    assert about["known"]
    assert [column["name"] for column in about["columns"]] == ["donor"]
    Opened(browser, (tmp_path / "api.html").as_uri()).check()


@pytest.mark.slow
def test_the_typescript_is_sound(npm_folder):
    checked = subprocess.run(["npm", "run", "check"], cwd=npm_folder, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
