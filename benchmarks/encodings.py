"""How to store float32 vectors in Parquet: seconds of computing to write and read them, and the size of the file.

    uv run python -m benchmarks.encodings

The vectors are SIMULATED; "Arrow's default" is snappy with a dictionary. fractal/atlas.py writes the second line's way.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fractal.atlas import ROW_GROUP
from fractal.cli import positive_int, run, table
from fractal.simulate import Atlas

REPEATS = 5  # the best counts
PLAIN = {"use_dictionary": False, "write_statistics": False}
SPLIT = PLAIN | {"use_byte_stream_split": True}
WAYS: dict[str, dict] = {
    "plain, none, with statistics": {"use_dictionary": False, "compression": "none"},
    "plain, none": PLAIN | {"compression": "none"},
    "plain, lz4": PLAIN | {"compression": "lz4"},
    "plain, zstd": PLAIN | {"compression": "zstd"},
    "byte-stream-split, none": SPLIT | {"compression": "none"},
    "byte-stream-split, lz4": SPLIT | {"compression": "lz4"},
    "byte-stream-split, zstd": SPLIT | {"compression": "zstd"},
    "Arrow's default": {},
}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=positive_int, default=200_000, help="vectors (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    atlas = Atlas(args.cells)
    vectors = np.concatenate([atlas.block(i)[0] for i in tqdm(range(atlas.blocks), unit="block", desc="simulate")])
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    cells, rows = pa.table({"embedding": column}), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.parquet"
        for name, options in WAYS.items():
            seconds = np.empty((REPEATS, 2))
            for repeat in range(REPEATS):
                began = time.process_time()  # of all threads
                pq.write_table(cells, path, row_group_size=ROW_GROUP, **options)
                written = time.process_time()
                pq.read_table(path)
                seconds[repeat] = written - began, time.process_time() - written
            rows.append([name, *(f"{best:.2f}" for best in seconds.min(axis=0)), f"{path.stat().st_size / 1e6:.1f}"])
    print(table(["Encoding, codec", "Write", "Read", "File MB"], rows))


if __name__ == "__main__":
    run(main)
