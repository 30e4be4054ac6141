"""The built wheel works on its own: in a fresh environment, from an empty folder, without the checkout."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import anndata
import pytest

from tests.test_api import cells

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel; its dependencies are this environment's, by a .pth file."""
    if not shutil.which("uv"):
        pytest.skip("uv builds the wheel, and is not here")
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(["uv", "build", "--wheel", "--out-dir", folder, ROOT], capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"uv could not build, which takes hatchling: {built.stderr[-300:]}")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (wheel,) = folder.glob("*.whl")
    install: list[str | Path] = ["uv", "pip", "install", "--no-deps", "--offline", "--python", python, wheel]
    subprocess.run(install, check=True, capture_output=True)
    (site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_from_the_wheel_alone(python: Path, tmp_path: Path):
    def run(*command: object) -> str:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import fractal; print(fractal.__file__)")
    assert Path(where.strip()).is_relative_to(python.parents[1])
    command = python.parent / "fractal"
    assert "annotate" in run(command, "--help")
    cells(400).write_h5ad(tmp_path / "cells.h5ad")
    cells(100, seed=1).write_h5ad(tmp_path / "new.h5ad")
    flags = ["--labels", "cell_type", "--use-rep", "X_scVI", "--epochs", "2", "--device", "cpu"]
    assert "held out" in run(command, "fit", "cells.h5ad", *flags, "--output", "blood")
    run(command, "annotate", "new.h5ad", "--reference", "blood", "--output", "out.h5ad", "--device", "cpu")
    new = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (new.obs["fractal_subtype"].astype(str) == new.obs["cell_type"].astype(str)).mean() > 0.9


def test_it_holds_the_explorers_page(python: Path):
    (page,) = python.parents[1].glob("lib/python*/site-packages/fractal/shipped/explorer.html")
    assert "Content-Security-Policy" in page.read_text(encoding="utf-8")
