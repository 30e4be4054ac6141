"""How fast training is: a step beside the floor of its own matrix work, and whole runs beside the published recipe's.

    uv run python -m benchmarks.quality --datasets simulated --seeds 1     # makes the atlas
    uv run python -m benchmarks.training --input data/quality/simulated_0/stratified.parquet

A step's floor is its floating-point operations in linear layers and similarity products, forward and backward, over the
rate of a 4096-cubed float32 product, which is timed in between. `--yardstick` names another program that takes --input,
--max-samples, --iters and --style plain and prints "median 85.0 ms"; its steps are timed in turn with ours.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

import eval as evaluate
import train
from fractal.base.errors import run
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.hierarchy.levels import LEVELS
from fractal.model.adapter import FractalAdapter
from fractal.model.checkpoint import load
from fractal.model.recipes import RECIPES

ROWS = 117_647  # less 15 % for validation: 100,000 to train on


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="Parquet file of stratify.py, 150,000 cells or more")
    parser.add_argument("--rounds", type=positive_int, default=3, help="times that steps are timed (default: 3)")
    parser.add_argument(
        "--epochs",
        type=int,
        nargs="+",
        default=[2, 4, 20],
        help="of fractal's runs; 20 20 20 for three of 20 (default: 2 4 20)",
    )
    parser.add_argument("--published", action="store_true", help="also a whole run of the published recipe, 10 minutes")
    parser.add_argument("--yardstick", type=Path, help="another program, see above")
    return parser


def matrix_rate(size: int = 4096) -> float:
    """Floating-point operations a second of a float32 product, size cubed."""
    a, b = torch.randn(2, size, size)
    began = time.perf_counter()
    a @ b
    return 2 * size**3 / (time.perf_counter() - began)


def step_times(flags: list[str]) -> list[float]:
    """Seconds of the single steps of one run of train.py."""
    ticks = []

    class Clock(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            ticks.append(time.perf_counter())
            return super().update(n)

    with patch("fractal.model.training.tqdm", Clock):
        train.main(flags)
    return [after - before for before, after in zip(ticks[5:], ticks[6:], strict=False)]


def step_operations(adapter: FractalAdapter, batch: int) -> int:
    """Operations of a step: 2 per weight and row in each product, once forward and twice backward.

    The products are those of the linear layers, of the paths' anchors, and of each prefix with its prototypes. What
    is multiplied with the input, or with probabilities that are detached, costs one product back.
    """
    linear = sum(layer.weight.numel() for layer in adapter.modules() if isinstance(layer, torch.nn.Linear))
    first = adapter.linear.weight.numel() + next(adapter.mlp.parameters()).numel()
    prototypes = sum(k * (j + 1) * adapter.scale_dim for j, k in enumerate(adapter.classes))
    shown = adapter.path_to_class.numel() + adapter.axes.numel() + adapter.class_means.numel()  # forward only
    anchors = adapter.anchors.numel()  # forward, and back into the anchors
    return 2 * batch * (3 * (linear + adapter.path_anchors.numel() + prototypes) - first + shown + 2 * anchors)


def whole_run(flags: list[str], source: Path, model: Path) -> tuple[float, dict[str, Any]]:
    """Train and score -> seconds of train.py, with reading and validation, and the row of the full vector."""
    began = time.perf_counter()
    train.main([*flags, "--input", str(source), "--output", str(model), "--max-samples", str(ROWS)])
    seconds = time.perf_counter() - began
    figures = model.with_suffix(".json")
    evaluate.main(["--input", str(source), "--model-path", str(model), "--json", str(figures)])
    return seconds, json.loads(figures.read_text(encoding="utf-8"))["rows"][1]


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        model = Path(name) / "adapter.pt"
        few = ["--input", str(args.input), "--output", str(model), "--epochs", "1", "--val-ratio", "0"]
        few += ["--max-samples", "30000"]  # 58 steps of 512
        medians: dict[str, list[float]] = {"fractal": [], "published": [], "yardstick": [], "floor": []}
        for _ in range(args.rounds):
            medians["published"].append(statistics.median(step_times([*few, "--recipe", "published"])))
            medians["fractal"].append(statistics.median(step_times(few)))
            rate = statistics.median(matrix_rate() for _ in range(3))
            adapter = load(model)[0]
            assert isinstance(adapter, FractalAdapter)
            medians["floor"].append(step_operations(adapter, RECIPES["fractal"].batch_size) / rate)
            if args.yardstick:
                command = [sys.executable, str(args.yardstick), "--input", str(args.input), "--max-samples", "30000"]
                out = subprocess.run([*command, "--iters", "40", "--style", "plain"], capture_output=True, check=True)
                found = re.search(r"median ([\d.]+) ms", out.stdout.decode())
                medians["yardstick"].append(float(found[1]) / 1e3 if found else float("nan"))
        runs = []
        if args.published:
            flags = ["--recipe", "published", "--patience", "20"]
            runs.append(("published, 20 epochs", *whole_run(flags, args.input, model)))
        for epochs in args.epochs:
            flags = ["--epochs", str(epochs), "--patience", str(epochs)]
            runs.append((f"fractal, {epochs} epochs", *whole_run(flags, args.input, model)))

    rows = []
    per_epoch = {"fractal": 512, "floor": 512, "published": 256, "yardstick": 256}
    for name, values in medians.items():
        if values:
            step = statistics.median(values)
            ratios = [value / floor for value, floor in zip(values, medians["floor"], strict=True)]
            spread = f"{min(values) * 1e3:.1f} to {max(values) * 1e3:.1f}"
            epoch = step * 100_000 / per_epoch[name]
            rows.append([name, f"{step * 1e3:.1f}", spread, f"{epoch:.1f}", f"{statistics.median(ratios):.2f}"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds\n")
    print(table(["Step", "ms", "Range", "s per 100,000 rows", "Times the fractal step's floor"], rows))
    print(
        f"\n100,000 training rows; seconds of train.py in all, 5-NN accuracy of the full vector (loo) on {args.input}\n"
    )
    accuracy = [[k, f"{s:.1f}", *(f"{row['loo'][level]:.3f}" for level in LEVELS)] for k, s, row in runs]
    print(table(["Run", "Seconds", *LEVELS], accuracy))


if __name__ == "__main__":
    run(main)
