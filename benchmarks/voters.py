"""Annotation by all cells of an index, beside the reference's own cells: labels, probabilities, and time.

    uv run python -m benchmarks.voters --reference FOLDER --index FOLDER --input CELLS.parquet

The cells are drawn from a file with labels; one that is also in the index does not vote for itself. Calibration error
(ECE) is that of the finest level; its probabilities are calibrated anew by the votes
of the index. Exact votes: all lists of the index.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fractal.annotate.annotator import Annotator
from fractal.annotate.answers import answer
from fractal.annotate.cross_fit import path_names
from fractal.annotate.votes import SAME, Raw, count
from fractal.base.errors import run
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas
from fractal.reference import read_reference
from fractal.score.metrics import expected_calibration_error
from fractal.search import open_index, voters


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="folder of a reference")
    parser.add_argument("--index", type=Path, required=True, help="folder of an index that was made with it")
    parser.add_argument("--input", type=Path, required=True, help="Parquet of ingest.py: cells to label")
    parser.add_argument("--cells", type=positive_int, default=20_000, help="of these (default: %(default)s)")
    parser.add_argument("--exact", type=positive_int, default=500, help="asked exactly, too (default: %(default)s)")
    return parser


def votes_of_others(annotator: Annotator, vectors: np.ndarray) -> Raw:
    """A voter that is the cell itself, of a cosine above SAME, has no vote."""
    ballot = annotator.voting.ballot(vectors)
    cosine = np.where(ballot.cosine > SAME, -np.inf, ballot.cosine)
    return count(replace(ballot, cosine=cosine), annotator.tree)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    reference = read_reference(args.reference)
    index, plain = open_index(args.index), reference.annotator
    indexed = reference.run(index=index).annotator
    total = Atlas.open(args.input).num_rows
    rows = np.sort(np.random.default_rng(0).permutation(total)[: args.cells])
    cells = Atlas.open(args.input).read(rows)
    true, codes = np.array(path_names(cells), object), np.array(plain.tree.paths, object)
    lines = []
    for name, annotator in (("the reference's", plain), ("the index's", indexed)):
        votes_of_others(annotator, cells.vectors[:2_000])  # warm
        wall, cpu = time.perf_counter(), time.process_time()
        raw = votes_of_others(annotator, cells.vectors)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        found = answer(raw, annotator.calibration)
        right = codes[raw.path] == true
        errors = expected_calibration_error(found.probability[:, -1], right[:, -1])
        voting = len(plain.path) if annotator is plain else len(index)
        accuracy = [f"{right[:, k].mean():.3f}" for k in range(len(plain.tree.levels))]
        rate = [f"{len(rows) / wall:,.0f}", f"{len(rows) / cpu:,.0f}"]
        lines.append([name, f"{voting:,}", *accuracy, f"{errors:.3f}", f"{found.novel.mean():.3f}", *rate])
    header = ["Votes of", "Cells", *plain.tree.levels, "ECE", "Novel", "Cells/s", "Cells/CPU s"]
    print(f"{len(rows):,} cells of {args.input}, {torch.get_num_threads()} threads\n\n{table(header, lines)}\n")

    some = cells.vectors[: args.exact]
    paths = {}
    for lists, reach in ((voters.LISTS, voters.REACH), (voters.LISTS, np.inf), (len(index.centroids), np.inf)):
        voters.LISTS, voters.REACH = lists, reach
        paths[lists, reach] = votes_of_others(indexed, some).path
    for (lists, reach), path in paths.items():
        same = [f"{(path == other).mean():.4f}" for other in list(paths.values())[1:]]
        right = (codes[path] == true[: len(path)])[:, -1].mean()
        print(
            f"{lists:,} lists, reach {reach}: of {len(path)} answers {same[0]} are those of 32 lists without "
            f"reach, {same[1]} those of all lists; {right:.3f} are right"
        )


if __name__ == "__main__":
    run(main)
