"""The whole pipeline on a simulated release, in about two minutes: uv run python demo.py

It runs the four scripts one after the other, just as you would, and prints each command. With --counts it starts at
simulated counts instead: an encoder of random weights in the files of SCimilarity's, then fit and annotate.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval as evaluate
import ingest
import stratify
import train
from benchmarks import simulate, simulate_counts
from fractal.base.errors import run
from fractal.commands import annotate, fit

Step = tuple[str, Callable[[list[str]], None], list[Any]]  # as typed, the function behind it, its flags
CELLS = 60_000  # of the simulated release; the real one has 7,913,892
DEMO = Path("data/demo")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-dir",
        type=Path,
        help="run on this release instead: a model_v1.1 folder in SCimilarity's file layout (default: a simulated one)",
    )
    parser.add_argument("--counts", action="store_true", help="from simulated counts to labels, in under a minute")
    return parser


def counts_steps() -> list[Step]:
    folder = DEMO / "counts"
    model, reference = folder / "model_v1.1", folder / "reference"
    new = [folder / "new.h5ad", "--reference", reference, "--output", folder / "labels.h5ad", "--truth", "cell_type"]
    cells = [folder / "labelled.h5ad", "--labels", "cell_type", "--model", model, "--study", "donor"]
    return [
        ("python -m benchmarks.simulate_counts", simulate_counts.main, ["--output", folder]),
        ("fractal fit", fit.main, [*cells, "--output", reference]),
        ("fractal annotate", annotate.main, new),
    ]


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    release = args.model_dir or DEMO / "model_v1.1"
    embeddings, stratified, model = (
        DEMO / "embeddings.parquet",
        DEMO / "stratified.parquet",
        DEMO / "fractal_adapter_4L.pt",
    )
    steps: list[Step] = [
        ("python ingest.py", ingest.main, ["--model-dir", release, "--output", embeddings]),
        ("python stratify.py", stratify.main, ["--input", embeddings, "--output", stratified]),
        ("python train.py", train.main, ["--input", stratified, "--output", model]),
        ("python eval.py", evaluate.main, ["--model-path", model, "--input", stratified]),
    ]
    if args.counts:
        print("These cells are SIMULATED: made-up counts of made-up genes, encoded by random weights.")
        steps = counts_steps()
    elif args.model_dir is None:
        print(f"These cells are SIMULATED: {CELLS:,} made-up vectors in the file layout of a SCimilarity release.")
        steps.insert(0, ("python -m benchmarks.simulate", simulate.main, ["--cells", CELLS, "--output", release]))
    began = time.perf_counter()
    for name, step, flags in steps:
        words = [str(flag) for flag in flags]
        print(f"\n$ uv run {name} {' '.join(words)}\n", flush=True)
        step(words)
    print(f"\n{time.perf_counter() - began:.0f} s in all; the files are in {DEMO}/")
    if args.model_dir is None:
        print(
            "The figures above are of SIMULATED cells and say nothing about real ones. On a real release:\n"
            "  uv run python demo.py --model-dir data/models/scimilarity/model_v1.1"
        )


if __name__ == "__main__":
    run(main)
