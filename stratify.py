"""Step 2: the same rows in a balanced order, so that the first N of them hold every subtype as evenly as sizes allow.

    uv run python stratify.py --input data/scimilarity_embeddings.parquet

The rows are dealt in rounds: the first round holds one cell of every subtype, the second another one of every subtype
that has two, and so on. Which cell, and the order within a round, is drawn at random from the seed.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from tqdm import tqdm

from fractal.atlas import LEVEL_COLUMNS, ROW_GROUP, open_atlas, read_vectors, reading, text_codes, writing
from fractal.cli import non_negative_int, run


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        type=Path,
        default=Path("data/scimilarity_embeddings.parquet"),
        help="Parquet file of ingest.py (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/stratified.parquet"), help="file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=non_negative_int, default=0, help="of the order within a round (default: %(default)s)"
    )
    return parser


def round_robin(labels: np.ndarray, seed: int) -> np.ndarray:
    """The balanced order of n rows with these labels (n,) int -> (n,) int64 row numbers."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_label = np.argsort(labels[shuffled], kind="stable")  # positions in `shuffled`, label by label
    size = np.bincount(labels)
    first = np.repeat(np.cumsum(size) - size, size)
    turn = np.empty(len(labels), np.int64)  # a row with turn k is the k-th of its label
    turn[by_label] = np.arange(len(labels)) - first
    return shuffled[np.argsort(turn, kind="stable")]


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    schema = open_atlas(args.input).schema_arrow
    with reading(args.input):
        cells = pq.read_table(args.input, memory_map=True)  # with its copies 12 GB for SCimilarity's 7.9 million cells
    vectors = read_vectors(cells, args.input)
    names = [*LEVEL_COLUMNS, *(["study"] if "study" in schema.names else [])]
    columns = [text_codes(cells, name, args.input) for name in names]
    subtypes = columns[LEVEL_COLUMNS.index("level4_subtype")]
    order = round_robin(subtypes[0], args.seed)

    metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    with (
        writing(args.output, vectors.shape[1], "study" in names, metadata) as writer,
        tqdm(total=len(order), unit="cells", unit_scale=True, desc="stratify") as bar,
    ):
        for start in range(0, len(order), ROW_GROUP):
            rows = order[start : start + ROW_GROUP]
            writer.append(vectors[rows], [(codes[rows], values) for codes, values in columns])
            bar.update(len(rows))

    rarest = int(np.bincount(subtypes[0]).min())
    print(
        f"{len(order):,} cells of {len(subtypes[1])} subtypes written to {args.output}; the first "
        f"{rarest * len(subtypes[1]):,} hold {rarest:,} of each"
    )


if __name__ == "__main__":
    run(main)
