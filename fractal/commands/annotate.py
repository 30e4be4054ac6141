"""Label new cells with a bundle of bundle.py, each as deep in the hierarchy as it can be trusted.

    fractal annotate --reference data/reference --input cells.parquet --output cells.tsv
    fractal annotate --reference data/reference --input cells.h5ad --obsm X_pca --output new.h5ad

One row per cell, or columns of obs that begin with fractal_:

    level, label, cl_id                       the deepest answer: none, system, lineage, type or subtype
    {level}, {level}_cl_id, {level}_probability   all four, also those below the level reached
    distance                                  cosine distance to the nearest reference cell, fractal vectors
    typicality                                share of ordinary cells that are as odd as this one, or odder
    status                                    ok; unlike (anything in the reference); invalid (NaN, inf or zero vector)
"""

import argparse
import csv
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fractal.adapter import pick_device
from fractal.atlas import LEVELS
from fractal.cli import InputError, needs, run, table
from fractal.files import atomic_write, check_output
from fractal.h5ad import add_obs, h5ad_copy
from fractal.ontology import CL_SLIM, load_graph
from fractal.reference.annotator import Annotator, Answer, answer
from fractal.reference.bundle import Bundle, check_terms, choose_paths, read_bundle
from fractal.vectors import CHUNK, open_vectors, usable

DEPTHS = ("none", *LEVELS)
STATUSES = ("ok", "unlike", "invalid")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--reference",
        type=Path,
        default=Path("data/reference"),
        help="folder written by bundle.py (default: %(default)s)",
    )
    files.add_argument(
        "--input", type=Path, required=True, help="cells: .h5ad, .npy, Parquet of ingest.py, or a TileDB array's folder"
    )
    files.add_argument("--obsm", default="X_scimilarity", help="of an .h5ad: key of its vectors (default: %(default)s)")
    files.add_argument("--output", type=Path, required=True, help=".tsv, .parquet, or .h5ad (a copy of an .h5ad input)")
    files.add_argument(
        "--obo", default=CL_SLIM, help="Cell Ontology, a path or a URL (default: the shipped CL 2025-07-30)"
    )
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--confidence",
        type=float,
        default=0.8,
        help="a level is answered if its probability is at least this (default: %(default)s)",
    )
    answers.add_argument(
        "--only", nargs="+", default=[], metavar="CL_ID", help="only these types and what is below them, as CL:0000084"
    )
    answers.add_argument(
        "--exclude", nargs="+", default=[], metavar="CL_ID", help="none of these types and of what is below them"
    )
    answers.add_argument(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="auto takes CUDA, else MPS, else the CPU (default: %(default)s)",
    )
    return parser


def annotate(vectors: np.ndarray, annotator: Annotator, bundle: Bundle, confidence: float) -> tuple[Answer, np.ndarray]:
    """vectors (n, dim) float32 -> the answers of those that are usable, and which these are (n,) bool."""
    good = usable(vectors)
    return answer(annotator(vectors[good]), bundle.calibration, confidence), good


def columns_of(found: Answer, good: np.ndarray, bundle: Bundle) -> dict[str, np.ndarray]:
    """Column -> (n,) values, in the order of the output; unusable cells have "" and NaN."""
    n, rows = len(good), np.flatnonzero(good)

    def spread(values: np.ndarray, missing: Any) -> np.ndarray:
        out = np.full(n, missing, object if isinstance(missing, str) else np.float32)
        out[rows] = values
        return out

    names = np.array(bundle.tree.paths, object)[found.path]
    ids = bundle.cl_ids[found.path].astype(object)
    deepest = np.maximum(found.depth - 1, 0)[:, None]

    def at_depth(values: np.ndarray) -> np.ndarray:
        return np.where(found.depth > 0, np.take_along_axis(values, deepest, 1)[:, 0], "")

    columns = {
        "level": spread(np.array(DEPTHS, object)[found.depth], "none"),
        "label": spread(at_depth(names), ""),
        "cl_id": spread(at_depth(ids), ""),
    }
    for k, level in enumerate(LEVELS):
        columns[level] = spread(names[:, k], "")
        columns[f"{level}_cl_id"] = spread(ids[:, k], "")
        columns[f"{level}_probability"] = spread(found.probability[:, k], np.nan)
    columns["distance"] = spread(found.distance, np.nan)
    columns["typicality"] = spread(found.typicality, np.nan)
    columns["status"] = spread(np.where(found.unlike, "unlike", "ok"), "invalid")
    return columns


Sink = Callable[[dict[str, np.ndarray]], None]


@contextmanager
def table_sink(path: Path) -> Iterator[Sink]:
    """Write chunks of columns to a .tsv or Parquet file as they come."""
    with atomic_write(path) as part:
        if path.suffix == ".tsv":
            with open(part, "w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, delimiter="\t", lineterminator="\n")

                def write_tsv(columns: dict[str, np.ndarray]) -> None:
                    if file.tell() == 0:
                        writer.writerow(columns)
                    text = [
                        [f"{v:.4g}" for v in values] if values.dtype == np.float32 else values
                        for values in columns.values()
                    ]
                    writer.writerows(zip(*text, strict=True))

                yield write_tsv
        else:
            writers: list[pq.ParquetWriter] = []

            def write_parquet(columns: dict[str, np.ndarray]) -> None:
                chunk = pa.table({name: pa.array(values) for name, values in columns.items()})
                if not writers:
                    writers.append(pq.ParquetWriter(part, chunk.schema))
                writers[0].write_table(chunk)

            try:
                yield write_parquet
            finally:
                for open_writer in writers:
                    open_writer.close()


@contextmanager
def h5ad_sink(source: Path, target: Path) -> Iterator[Sink]:
    """Gather the columns, as codes, and write them into a copy of the .h5ad."""
    pandas = needs("pandas", "h5ad")
    chunks: list[dict[str, Any]] = []

    def gather(columns: dict[str, np.ndarray]) -> None:
        chunks.append({k: v if v.dtype == np.float32 else pandas.Categorical(v) for k, v in columns.items()})

    with h5ad_copy(source, target) as file:
        yield gather
        joined = {
            f"fractal_{name}": np.concatenate([c[name] for c in chunks])
            if isinstance(chunks[0][name], np.ndarray)
            else pandas.api.types.union_categoricals([c[name] for c in chunks])
            for name in chunks[0]
        }
        add_obs(file, joined)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.output.suffix not in (".tsv", ".parquet", ".h5ad"):
        raise InputError(f"{args.output}: name a .tsv, .parquet or .h5ad file with --output")
    if args.output.suffix == ".h5ad" and args.input.suffix != ".h5ad":
        raise InputError(f"{args.output}: an .h5ad is only written for an .h5ad --input; name a .tsv or .parquet")
    if args.output.suffix != ".h5ad":
        check_output(args.output, args.input)
    if not 0 < args.confidence <= 1:
        raise InputError(f"--confidence {args.confidence:g}: must be above 0 and at most 1")
    bundle = read_bundle(args.reference, pick_device(args.device))
    graph = load_graph(args.obo)
    check_terms(bundle, graph, args.reference, args.obo)
    keep = choose_paths(bundle, graph, args.only, args.exclude)

    levels, statuses, labels = Counter[str](), Counter[str](), Counter[str]()
    with open_vectors(args.input, args.obsm, bundle.adapter.dim) as vectors:
        annotator = bundle.annotator(keep)
        sink = h5ad_sink(args.input, args.output) if args.output.suffix == ".h5ad" else table_sink(args.output)
        with sink as write, tqdm(total=vectors.num_rows, unit="cells", unit_scale=True, desc="annotate") as bar:
            for _, chunk in vectors.chunks(CHUNK):
                columns = columns_of(*annotate(chunk, annotator, bundle, args.confidence), bundle)
                write(columns)
                levels.update(columns["level"])
                statuses.update(columns["status"])
                labels.update(columns["label"])
                bar.update(len(chunk))

    print(
        f"{vectors.num_rows:,} cells of {args.input} -> {args.output}: "
        + ", ".join(f"{statuses[s]:,} {s}" for s in STATUSES)
    )
    print("deepest level answered: " + ", ".join(f"{levels[d]:,} {d}" for d in reversed(DEPTHS)) + "\n")
    shown = [[label or "(none)", f"{n:,}", f"{100 * n / vectors.num_rows:.1f}"] for label, n in labels.most_common(20)]
    print(table(["Deepest label", "Cells", "%"], shown))


if __name__ == "__main__":
    run(main)
