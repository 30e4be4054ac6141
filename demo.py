"""The whole pipeline on a simulated release, in about two minutes: uv run python demo.py

It runs the four scripts one after the other, just as you would, and prints each command.
"""

import argparse
import time
from pathlib import Path

import eval as evaluate
import ingest
import stratify
import train
from benchmarks import simulate
from fractal.base.cli import run

CELLS = 60_000  # of the simulated release; the real one has 7,913,892
DEMO = Path("data/demo")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-dir",
        type=Path,
        help="run on this release instead: a model_v1.1 folder in SCimilarity's file layout (default: a simulated one)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    release = args.model_dir or DEMO / "model_v1.1"
    embeddings, stratified, model = (
        DEMO / "embeddings.parquet",
        DEMO / "stratified.parquet",
        DEMO / "fractal_adapter_4L.pt",
    )
    steps = [
        ("ingest.py", ingest.main, ["--model-dir", release, "--output", embeddings]),
        ("stratify.py", stratify.main, ["--input", embeddings, "--output", stratified]),
        ("train.py", train.main, ["--input", stratified, "--output", model]),
        ("eval.py", evaluate.main, ["--model-path", model, "--input", stratified]),
    ]
    if args.model_dir is None:
        print(f"These cells are SIMULATED: {CELLS:,} made-up vectors in the file layout of a SCimilarity release.")
        steps.insert(0, ("-m benchmarks.simulate", simulate.main, ["--cells", CELLS, "--output", release]))
    began = time.perf_counter()
    for name, step, flags in steps:
        words = [str(flag) for flag in flags]
        print(f"\n$ uv run python {name} {' '.join(words)}\n", flush=True)
        step(words)
    print(f"\n{time.perf_counter() - began:.0f} s in all; the files are in {DEMO}/")
    if args.model_dir is None:
        print(
            "The figures above are of SIMULATED cells and say nothing about real ones. On a real release:\n"
            "  uv run python demo.py --model-dir data/models/scimilarity/model_v1.1"
        )


if __name__ == "__main__":
    run(main)
