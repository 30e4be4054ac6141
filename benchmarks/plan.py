"""From measured lines of benchmarks/scale.py to what a stage takes at any size; see docs/scale.md.

The model has two numbers for each stage and quantity: what Python's start and the libraries take, and what each cell
takes. stratify.py has a third of each: a cell that does not fit into its --memory goes through a temporary file, and of
those that do fit two such parts are held at once. All are at least 0, by least squares of the relative errors.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from fractal.base.errors import InputError
from fractal.base.table import table

SIZES = (10**6, 10**7, 10**8, 10**9, 10**10)
HELD = 917_504  # cells of 128 numbers that stratify.py holds by default: 14 row groups in 1 GB
# Bytes a cell that a stage reads and writes, on disk or over a network: a record of the release's index, an atlas's
# row, a row of labels. In the cluster's stratify each row is written and read once more on its way.
RECORD, ROW, LABELS = 656, 520, 20
MOVED = {
    "ingest": RECORD + ROW,
    "stratify": 4 * ROW,
    "train, all cells, 1 epoch": 3 * ROW,  # hashed, searched for copies, and read
    "embed": 2 * ROW,
    "annotate": ROW + LABELS,
}


@dataclass(frozen=True)
class Line:
    """One measured run of a stage."""

    stage: str
    cells: int
    cpu: float  # seconds
    memory: float  # bytes, of pages that the system can't take back

    @staticmethod
    def read(path: Path) -> list["Line"]:
        """The last line of each stage and size. Raises InputError for a file that `--json` did not write."""
        try:
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            lines = [Line(line["stage"], line["cells"], line["cpu"], line["RssAnon"]) for line in found]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: holds no lines of benchmarks.scale --json ({error})") from error
        return list({(line.stage, line.cells): line for line in lines}.values())


def cpu_terms(stage: str, cells: np.ndarray) -> np.ndarray:
    """(n,) -> (n, 2 or 3): what the coefficients of a stage's computing are multiplied with."""
    columns = [np.ones(len(cells)), cells]
    return np.stack(columns + ([np.maximum(0, cells - HELD)] if stage == "stratify" else []), axis=1)


def memory_terms(stage: str, cells: np.ndarray) -> np.ndarray:
    columns = [np.ones(len(cells)), cells]
    return np.stack(columns + ([np.minimum(cells, 2 * HELD)] if stage == "stratify" else []), axis=1)


@dataclass(frozen=True)
class Model:
    """Of one stage: seconds of computing and bytes of memory at any number of cells."""

    stage: str
    cpu: np.ndarray  # coefficients of `cpu_terms`
    memory: np.ndarray  # and of `memory_terms`

    @staticmethod
    def fit(stage: str, lines: Sequence[Line]) -> "Model":
        cells = np.array([line.cells for line in lines], float)

        def solve(columns: np.ndarray, values: Sequence[float]) -> np.ndarray:
            scale = 1e6  # cells, so that the coefficients are of similar size
            size = np.array([1.0, *[scale] * (columns.shape[1] - 1)])
            return nnls(columns / size / np.array(values)[:, None], np.ones(len(values)))[0] / size

        cpu = solve(cpu_terms(stage, cells), [line.cpu for line in lines])
        return Model(stage, cpu, solve(memory_terms(stage, cells), [line.memory for line in lines]))

    def seconds(self, cells: int) -> float:
        return float(cpu_terms(self.stage, np.array([cells], float))[0] @ self.cpu)

    def bytes(self, cells: int) -> float:
        return float(memory_terms(self.stage, np.array([cells], float))[0] @ self.memory)


def fitted(lines: Sequence[Line]) -> list[tuple[Model, Line]]:
    """Per stage that was measured at three sizes or more: the model of all but the largest, and the line of that."""
    found = []
    for stage in dict.fromkeys(line.stage for line in lines):
        own = sorted((line for line in lines if line.stage == stage), key=lambda line: line.cells)
        if len(own) >= 3:
            found.append((Model.fit(stage, own[:-1]), own[-1]))
    return found


def tables(lines: Sequence[Line], price: float) -> str:
    """The model, its check at the largest size, and the plan. price: dollars for an hour of one core."""
    found = fitted(lines)
    if not found:
        raise InputError("a model takes three sizes of a stage at least: two to fit, and the largest to check")
    check, plan = [], []
    for model, line in found:
        numbers = [f"{model.cpu[0]:.1f}", f"{1e6 * model.cpu[1:].sum():.1f}"]
        numbers += [f"{model.memory[0] / 1e6:,.0f}", f"{model.memory[1]:.0f}"]
        pairs = (model.seconds(line.cells), line.cpu), (model.bytes(line.cells) / 1e6, line.memory / 1e6)
        for own, measured in pairs:
            numbers += [f"{own:,.0f}", f"{measured:,.0f}", f"{100 * (own / measured - 1):+.0f} %"]
        check.append([model.stage, f"{line.cells:,}", *numbers])
    for name, value in (
        ("core hours", lambda model, n: f"{model.seconds(n) / 3600:,.2f}"),
        ("memory, GB", lambda model, n: f"{model.bytes(n) / 1e9:,.1f}"),
        ("moved, GB", lambda model, n: f"{MOVED[model.stage] * n / 1e9:,.1f}" if model.stage in MOVED else ""),
        ("dollars", lambda model, n: f"{price * model.seconds(n) / 3600:,.2f}"),
    ):
        plan += [[f"{model.stage}: {name}", *(value(model, n) for n in SIZES)] for model, _ in found]
    head = ["Stage", "Checked at", "CPU s, fixed", "us a cell", "MB, fixed", "bytes a cell"]
    head += ["CPU s, model", "measured", "off", "MB, model", "measured", "off"]
    return table(head, check) + "\n\n" + table(["One process", *(f"{n:.0e}" for n in SIZES)], plan)
