"""No version that pyproject.toml admits has a published advisory that we know of."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LAST_AFFECTED = {
    "filelock": "3.20.2",  # CVE-2026-22701; CVE-2025-68146 before 3.20.1
    "onnx": "1.20.1",  # CVE-2026-27489, -28500, -34445
    "pyarrow": "23.0.0",  # CVE-2026-25087; CVE-2023-47248 before 14.0.1
    "scikit-learn": "1.4.2",  # CVE-2024-5206
    "torch": "2.9.1",  # CVE-2026-24747; CVE-2025-32434 before 2.6
    "tqdm": "4.66.2",  # CVE-2024-34062
}


@pytest.mark.parametrize("package", LAST_AFFECTED)
def test_affected_versions_are_not_admitted(package: str):
    lines = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    found = [required for line in lines if (required := Requirement(line)).name == package]
    assert found
    assert not any(required.specifier.contains(LAST_AFFECTED[package]) for required in found)


def test_the_package_needs_no_compiler():
    """hnswlib is published as source only; tests and benchmarks use it, and `uv sync` installs it for them."""
    lines = PROJECT["dependencies"] + sum(PROJECT["optional-dependencies"].values(), [])
    assert "hnswlib" not in {Requirement(line).name for line in lines}
    package = Path(__file__).parent.parent / "fractal"
    modules = [path.read_text(encoding="utf-8") for path in package.rglob("*.py")]
    assert not [text for text in modules if re.search(r"^\s*(import|from) hnswlib", text, re.M)]
