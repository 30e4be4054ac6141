"""How to store vectors: float32 in Parquet, and prefixes in a byte or a bit a number.

    uv run python -m benchmarks.encodings
    uv run python -m benchmarks.encodings --model-path ADAPTER.pt --input CELLS.parquet

Without an adapter: seconds of computing to write and read Parquet, and the size of the file. The vectors are SIMULATED;
"Arrow's default" is snappy with a dictionary. fractal/data/parquet.py writes the second line's way.

With an adapter: what becomes of each prefix at its own level, among cells of a file drawn at random. Recall: the share
of a cell's 10 nearest others by float32 that are found again. Accuracy: leave-one-out 5-NN, labels of the prefix's
level. Order: how often two cells of one class of that level have a higher cosine than two of different ones.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from benchmarks.simulate import SimulatedAtlas
from fractal.base.errors import run
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas
from fractal.data.parquet import ROW_GROUP
from fractal.model.adapter import embed
from fractal.model.checkpoint import load
from fractal.score.metrics import knn_accuracy
from fractal.search.exact import nearest

REPEATS = 5  # the best counts
NEIGHBOURS = 10  # recall is the share of these that int8 vectors find again
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
    parser.add_argument("--cells", type=positive_int, help="vectors (default: 200000, or 5000 of --input)")
    parser.add_argument("--model-path", type=Path, help="checkpoint whose prefixes are looked at")
    parser.add_argument(
        "--input", type=Path, default=Path("data/stratified.parquet"), help="labelled cells (default: %(default)s)"
    )
    return parser


def quantize(vectors: np.ndarray) -> np.ndarray:
    """(n, dims) float32 -> int8: each row has a factor of its own, which no cosine sees, and so all of the range."""
    largest = np.abs(vectors).max(axis=1, keepdims=True, initial=1e-30)
    return np.rint(vectors * (127 / largest)).astype(np.int8)


def recall(exact: Tensor, int8: Tensor) -> tuple[float, float]:
    """-> the mean share of a cell's 10 nearest other cells that int8 vectors find again, and the cosine that is lost.

    The cells of a type lie so close together that which ten are nearest hangs on the last digits; the second figure,
    how much farther away (by exact cosine) the ten are that int8 vectors find, tells whether that matters.
    """
    ours, theirs = nearest(exact, k=NEIGHBOURS), nearest(int8.float(), k=NEIGHBOURS)
    again = (ours[:, :, None] == theirs[:, None, :]).any(2).float().mean().item()
    near, found = (torch.einsum("nd,nkd->", exact, exact[rows]).item() / rows.numel() for rows in (ours, theirs))
    return again, near - found


def prefix_ways(vectors: Tensor) -> dict[str, Tensor]:
    """Unit vectors (n, dims) -> by way of storing them, what a search by cosine sees."""
    centred = vectors - vectors.mean(0)
    turned = torch.linalg.qr(torch.randn(len(centred.T), len(centred.T), generator=torch.manual_seed(0)))[0]

    def int8(values: Tensor, largest: Tensor) -> Tensor:
        return (values * (127 / largest)).round().clamp(-127, 127) * largest

    return {
        "float32": vectors,
        "float16": vectors.half().float(),
        "int8, one factor": int8(vectors, vectors.abs().max()),
        "int8, a factor a number": int8(vectors, vectors.abs().amax(0)),
        "int8, a factor a cell": torch.from_numpy(quantize(vectors.numpy())).float(),
        "int8, rotated": int8(vectors @ turned, (vectors @ turned).abs().max()),
        "int8, centred": int8(centred, centred.abs().amax(0)),
        "bits": vectors.sign(),
        "bits, centred": centred.sign(),
        "bits, centred and rotated": (centred @ turned).sign(),
    }


def order(vectors: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of the cosine of 200,000 random pairs, for being of one class; NaN with one class."""
    one, other = torch.randint(len(labels), (2, 200_000), generator=torch.manual_seed(0))
    same, cosine = labels[one] == labels[other], cosine_similarity(vectors[one], vectors[other])
    apart = one != other
    return roc_auc_score(same[apart], cosine[apart]) if same.any() and not same.all() else float("nan")


def prefix_rows(args: argparse.Namespace) -> list[list[str]]:
    adapter, checkpoint = load(args.model_path)
    drawn = np.random.default_rng(0).permutation(Atlas.open(args.input).num_rows)[: args.cells or 5_000]
    cells = Atlas.open(args.input).read(np.sort(drawn))
    labels, rows = torch.from_numpy(cells.labels), []
    prefixes = embed(adapter, torch.from_numpy(cells.vectors))
    for j, (vectors, level) in enumerate(zip(prefixes, checkpoint["config"]["block_levels"], strict=True), 1):
        for way, seen in tqdm(prefix_ways(vectors).items(), unit="way", desc=f"prefix {j}"):
            again, lost = recall(vectors, seen)
            accuracy = knn_accuracy(seen, labels[:, level : level + 1])[0]
            figures = [f"{again:.3f}", f"{lost:.0e}", f"{accuracy:.4f}", f"{order(seen, labels[:, level]):.4f}"]
            rows.append([str(j), cells.levels[level], way, *figures])
    return rows


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.model_path:
        header = ["Prefix", "Level", "Stored as", "Recall", "Cosine lost", "Accuracy", "Order"]
        print(table(header, prefix_rows(args)))
        return
    atlas = SimulatedAtlas(args.cells or 200_000)
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
