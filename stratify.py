"""Step 2: the same rows in a balanced order, so that the first N of them hold every subtype as evenly as sizes allow.

    uv run python stratify.py --input data/scimilarity_embeddings.parquet

The rows are dealt in rounds: the first round holds one cell of every subtype, the second another one of every subtype
that has two, and so on. Which cell, and the order within a round, is drawn at random from the seed.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from fractal.base.errors import run
from fractal.base.paths import check_paths
from fractal.base.storage import scratch
from fractal.commands.options import add
from fractal.data.atlas import Atlas
from fractal.data.parquet import ROW_GROUP, vector_list, write_tables
from fractal.data.reorder import equal_buckets, reorder, round_robin
from fractal.hierarchy.levels import column_names


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "Parquet file of ingest.py, or a folder of such files (default: %(default)s)"
    add(parser, "--input", default=Path("data/scimilarity_embeddings.parquet"), help=text)
    text = "file to write, or folder/part-{}.parquet for many (default: %(default)s)"
    add(parser, "--output", default=Path("data/stratified.parquet"), help=text)
    add(parser, "--seed", help="of the order within a round (default: %(default)s)")
    add(parser, "--memory")
    return parser


def with_positions(atlas: Atlas, order: np.ndarray, bar: tqdm) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read a file once, from first row to last -> (positions in `order` (m,) int64, vectors (m, dim) float32)."""
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    start = 0
    for vectors in atlas.vectors():
        yield position[start : start + len(vectors)], vectors
        bar.update(len(vectors))
        start += len(vectors)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_paths({"--input": args.input}, {"--output": args.output})
    atlas = Atlas.open(args.input)
    schema, finest = atlas.schema, column_names(atlas.levels)[-1]
    columns = {name: atlas.column(name) for name in schema.names if name != "embedding"}
    labels, names = atlas.finest
    order = round_robin(labels, args.seed)

    # The output is put together so many row groups at a time, while those before them are still being written.
    held = max(1, args.memory // (2 * 4 * atlas.dim * ROW_GROUP))

    def tables(bar: tqdm) -> Iterator[pa.Table]:
        source, start = with_positions(atlas, order, bar), 0
        ends, row = equal_buckets(len(order), held * ROW_GROUP), np.dtype((np.float32, (atlas.dim,)))
        for bucket in reorder(source, ends, row, scratch(args.output)):
            for vectors in np.split(bucket, range(ROW_GROUP, len(bucket), ROW_GROUP)):
                rows = pa.array(order[start : start + len(vectors)])
                arrays = {name: column.take(rows) for name, column in columns.items()}
                yield pa.table({**arrays, "embedding": vector_list(vectors)}).select(schema.names).cast(schema)
                bar.update(len(rows))
                start += len(rows)

    with tqdm(total=2 * len(order), unit="cells", unit_scale=True, desc="read and write") as bar:
        write_tables(args.output, tables(bar), {**atlas.metadata, "stratified": finest})

    rarest = int(np.bincount(labels).min())
    print(
        f"{len(order):,} cells of {len(names)} subtypes written to {args.output}; the first "
        f"{rarest * len(names):,} hold {rarest:,} of each"
    )


if __name__ == "__main__":
    run(main)
