"""House rules that no linter knows: sizes, and who imports the benchmarks. Imports of rooms: `uv run lint-imports`."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ["ingest.py", "stratify.py", "train.py", "eval.py", "demo.py"]
MODULES = sorted((ROOT / "fractal").rglob("*.py"))
API = {"fitting.py", "reference.py"}  # the Python API: a keyword for each choice


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def lines_of(node: ast.FunctionDef) -> int:
    """Without the docstring, which is long where there are many parameters."""
    docstring = ast.get_docstring(node, clean=False) or ""
    return (node.end_lineno or node.lineno) - node.lineno + 1 - len(docstring.splitlines())


def test_no_function_is_longer_than_60_lines():
    paths = [*MODULES, *(ROOT / name for name in SCRIPTS)]
    lengths = {f"{path.relative_to(ROOT)}:{node.name}": lines_of(node) for path in paths for node in functions(path)}
    assert {name: length for name, length in lengths.items() if length > 60} == {}


def test_no_function_but_the_api_takes_more_than_7_parameters():
    counts = {}
    for path in MODULES:
        for node in functions(path):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            counts[f"{path.relative_to(ROOT / 'fractal')}:{node.name}"] = len(
                [n for n in names if n not in ("self", "cls")]
            )
    assert {name: count for name, count in counts.items() if count > 7 and name.split(":")[0] not in API} == {}


def test_the_scripts_are_short():
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in SCRIPTS}
    assert {name: count for name, count in lines.items() if count >= 200} == {}


def test_only_tests_of_the_benchmarks_import_them():
    others = [path for path in (ROOT / "tests").rglob("*.py") if path.parent.name != "benchmarks"]
    importing = [
        path.name
        for path in others
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "benchmarks"
    ]
    assert importing == []
