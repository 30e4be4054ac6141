"""The rooms of fractal/ and the imports between them, as a picture; lines per module, beside an earlier commit.

    uv run python -m benchmarks.rooms --output docs/rooms.svg
    uv run python -m benchmarks.rooms --before fecc771

A number counts the imports of one room from another, module by module; lazy ones count, those for type checkers don't.
The order of the rooms is that of the contract in pyproject.toml, which `uv run lint-imports` holds the code to.
"""

import argparse
import re
import subprocess
import tomllib
from collections import Counter
from pathlib import Path

import grimp
from matplotlib.figure import Figure

from fractal.base.errors import run
from fractal.base.table import table

ROOT = Path(__file__).parents[1]


def read_layers() -> list[list[str]]:
    """Rooms per floor, from the top down, as the contract names them."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    return [re.findall(r"fractal\.(\w+)", layer) for layer in contract[0]["layers"]]


def room_of(module: str) -> str:
    """fractal.view.maps -> view; the package itself, whose names are lazy, is left to the caller."""
    return module.split(".")[1] if "." in module else ""


def count_imports() -> Counter[tuple[str, str]]:
    """(room that imports, room that is imported) -> how many modules of the second the modules of the first import."""
    graph = grimp.build_graph("fractal", exclude_type_checking_imports=True)
    pairs = (
        (room_of(m), room_of(other)) for m in graph.modules for other in graph.find_modules_directly_imported_by(m)
    )
    return Counter((a, b) for a, b in pairs if a and b and a != b)


def count_lines(commit: str | None = None) -> dict[str, int]:
    """Lines of every Python module of fractal/, of the work tree or of a commit."""
    if commit is None:
        files = sorted((ROOT / "fractal").rglob("*.py"))
        return {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    git = ["git", "-C", str(ROOT)]
    names = subprocess.check_output([*git, "ls-tree", "-r", "--name-only", commit, "fractal"], text=True).split()
    python = [name for name in names if name.endswith(".py")]
    return {name: len(subprocess.check_output([*git, "show", f"{commit}:{name}"]).splitlines()) for name in python}


def draw(path: Path) -> None:
    """Rooms from the top floor to the ground along the diagonal; right of a room, what it imports of those below it.

    An import upwards would stand below the diagonal.
    """
    imports, lines = count_imports(), Counter[str]()
    for name, count in count_lines().items():
        lines[name.split("/")[1].removesuffix(".py")] += count
    rooms = [room for layer in read_layers() for room in layer]
    figure = Figure(figsize=(10, 7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(-0.8, len(rooms) - 0.2), ylim=(len(rooms) - 0.4, -0.6))
    for row, room in enumerate(rooms):
        axes.hlines(row, row, len(rooms) - 1, color="#d5dde7", linewidth=1, zorder=0)
        axes.vlines(row, 0, row, color="#d5dde7", linewidth=1, zorder=0)
        style = {"boxstyle": "round,pad=.5", "facecolor": "#eef3f9", "edgecolor": "#33506f"}
        axes.text(row, row, f"{room}\n{lines[room]:,} lines", ha="center", va="center", fontsize=10, bbox=style)
    for (importer, imported), count in imports.items():
        if importer in rooms and imported in rooms:
            x, y = rooms.index(imported), rooms.index(importer)
            axes.scatter(x, y, s=180 + 30 * count, color="#33506f" if x > y else "#c0392b")
            axes.text(x, y, str(count), ha="center", va="center", color="white", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def compare(commit: str) -> str:
    """Markdown: modules of the commit and of the work tree by their rooms, with lines."""
    before, after = count_lines(commit), count_lines()
    rows = [[name, f"{before[name]:,}" if name in before else "", f"{after[name]:,}" if name in after else ""]
            for name in sorted({*before, *after})]  # fmt: skip
    return table(["module", commit, "now"], [*rows, ["total", f"{sum(before.values()):,}", f"{sum(after.values()):,}"]])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the picture, .svg or .png")
    parser.add_argument("--before", metavar="COMMIT", help="print lines per module beside those of this commit")
    args = parser.parse_args(argv)
    if args.output:
        draw(args.output)
    if args.before:
        print(compare(args.before))


if __name__ == "__main__":
    run(main)
