"""Which cells of an index are like mine, of which types, and in which studies and tissues?

    fractal search --query new.h5ad --reference blood_reference --index data/index --output hits.parquet
    fractal search --query new.h5ad --reference blood_reference --index data/index --group-by leiden
    fractal search --query new.h5ad ... --prefix 2 --where "tissue == 'lung' and age >= 40" --only CL:0000084

A row per hit: query (its cell's name, else its number), rank, id, row (in the indexed file, which `source` names),
similarity (cosine), and the columns of the index. The summary says which values of its columns the hits have more often
than the atlas: fold change, p-value of the hypergeometric test, and q-value (Benjamini and Hochberg). Hits are
neighbours of each other and no independent draws: take the order from it, and no proof.
"""

import argparse
import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fractal.base.cli import InputError, add_device, add_force, needs, positive_int, run
from fractal.base.files import atomic_write, check_paths
from fractal.base.storage import place

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    import pyarrow as pa

    from fractal.search import Hits, Index

CHUNK = 4_096  # queries at a time
FORMATS = (".parquet", ".tsv", ".h5ad")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    files = parser.add_argument_group("files")
    files.add_argument("--query", type=place, required=True, help="cells: .h5ad, .zarr, .npy, Parquet or TileDB")
    files.add_argument("--index", type=Path, required=True, help="folder of `fractal index`")
    files.add_argument(
        "--reference",
        "--model-path",
        dest="reference",
        type=Path,
        help="folder of `fractal fit`, or checkpoint of train.py, that made the index; embeds the queries",
    )
    files.add_argument(
        "--embedded",
        action="store_true",
        help="the queries are fractal vectors already (as Parquet of embed says itself)",
    )
    files.add_argument(
        "--use-rep",
        "--obsm",
        dest="use_rep",
        help="of an .h5ad: key of its vectors in obsm (default: what the reference takes; with --embedded X_fractal)",
    )
    files.add_argument("--output", type=Path, help=".parquet, .tsv, or .h5ad (the hits as cells, with their vectors)")
    files.add_argument("--summary", type=Path, help="the whole summary, all values, as a .tsv")
    what = parser.add_argument_group("what is searched")
    what.add_argument("-k", type=positive_int, help="hits per query (default: 10; 100 with --group-by)")
    what.add_argument("--prefix", type=positive_int, help="compare the first blocks only: 1 is like mine in system")
    what.add_argument(
        "--group-by", metavar="COLUMN", help="one query per group, the mean of its cells: obs of an .h5ad"
    )
    what.add_argument("--where", metavar="CONDITION", help="only cells with, such as \"tissue == 'lung'\"")
    what.add_argument(
        "--only", nargs="+", default=[], metavar="TERM", help="only these: labels of any level, or CL ids"
    )
    what.add_argument("--columns", nargs="+", metavar="COLUMN", help="columns of the hits (default: all)")
    what.add_argument("--lists", type=positive_int, help="lists to open per query: more find more, all are exact")
    what.add_argument("--obo", help="Cell Ontology for CL ids, a path or a URL (default: the shipped CL 2025-07-30)")
    add_force(what)
    add_device(what)
    return parser


Sink = Callable[["pa.Table", "Hits"], None]


@contextmanager
def tsv_sink(path: Path) -> Iterator[Sink]:
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")

        def write(table: "pa.Table", _: "Hits | None" = None) -> None:
            if file.tell() == 0:
                writer.writerow(table.column_names)
            columns = [column.to_pylist() for column in table.columns]
            writer.writerows(
                [f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in zip(*columns, strict=True)
            )

        yield write


@contextmanager
def parquet_sink(path: Path) -> Iterator[Sink]:
    from fractal.data.parquet import table_writer

    with atomic_write(path) as part, table_writer(part) as write:
        yield lambda table, _: write(table)


@contextmanager
def h5ad_sink(path: Path, index: "Index") -> Iterator[Sink]:
    """An AnnData with a row per hit: obs is the table, obsm["X_fractal"] the hits' vectors."""
    import pyarrow as pa

    anndata = needs("anndata", "h5ad")
    tables: list[pa.Table] = []
    cells: list[np.ndarray] = []

    def gather(table: pa.Table, hits: "Hits") -> None:
        tables.append(table)
        cells.append(hits.cells[hits.cells >= 0])

    with atomic_write(path) as part:
        yield gather
        obs = pa.concat_tables(tables).to_pandas()
        text = obs.select_dtypes("object").columns
        obs[text] = obs[text].fillna("").astype(str)  # HDF5 has no text that is missing
        obs.index = [f"{query}-{rank}" for query, rank in zip(obs["query"], obs["rank"], strict=True)]
        obsm = {"X_fractal": index.vectors_of(np.concatenate(cells))}
        anndata.AnnData(obs=obs, obsm=obsm).write_h5ad(part)


@contextmanager
def no_sink() -> Iterator[Sink]:
    yield lambda table, hits: None


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError, before any work, for flags that do not go together."""
    if args.output and args.output.suffix not in FORMATS:
        raise InputError(f"{args.output}: name a .parquet, .tsv or .h5ad file with --output")
    if args.summary and args.summary.suffix != ".tsv":
        raise InputError(f"{args.summary}: name a .tsv file with --summary")
    inputs = {"--query": args.query, "--index": args.index, "--reference": args.reference, "--obo": args.obo}
    check_paths(inputs, {"--output": args.output, "--summary": args.summary})
    if args.embedded and args.reference:
        raise InputError("--embedded: the queries need no --reference then; drop one of them")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    from tqdm import tqdm

    from fractal.hierarchy.ontology import CL_SLIM
    from fractal.model.adapter import pick_device
    from fractal.model.embedding import Embedder
    from fractal.search import open_index
    from fractal.search.enrichment import enrichment, summary
    from fractal.search.index import Hits
    from fractal.search.query import mask, questions
    from fractal.search.source import open_cells, space_of

    index = open_index(args.index)
    embedder = Embedder.open(args.reference, pick_device(args.device)) if args.reference else None
    if embedder:
        if not index.space.adapters:
            raise InputError(f"{args.index}: holds vectors as they came, made by no adapter; drop --reference")
        index.check_adapter(space_of(embedder).adapters, str(args.reference))
    keep = mask(index, args.where, args.only, args.obo or CL_SLIM)
    k = args.k or (100 if args.group_by else 10)
    sinks: dict[str, Any] = {".tsv": tsv_sink, ".parquet": parquet_sink}
    names: list[str] = []
    found: list[Hits] = []
    with open_cells(args.query, embedder, args.use_rep, args.embedded, args.force) as opened:
        if index.space.adapters and not (opened.space.adapters or args.embedded):
            raise InputError(
                f"{args.query}: name the adapter that embeds its vectors with --reference, or say --embedded"
            )
        index.check_adapter(opened.space.adapters, str(args.query))
        if args.output is None:
            sink = no_sink()
        elif args.output.suffix == ".h5ad":
            sink = h5ad_sink(args.output, index)
        else:
            sink = sinks[args.output.suffix](args.output)
        with sink as write, tqdm(total=opened.source.num_rows, unit="cells", unit_scale=True, desc="search") as bar:
            for some, vectors in questions(opened, args.group_by, CHUNK):
                hits = index.search(vectors, k, args.prefix, keep, args.lists)
                write(index.table(hits, some, args.columns), hits)
                names += some
                found.append(hits)
                bar.update(opened.source.num_rows if args.group_by else len(some))
    joined = Hits(np.concatenate([h.cells for h in found]), np.concatenate([h.similarity for h in found]))
    groups = names if args.group_by else ["all queries"] * len(names)
    enriched = enrichment(index, joined, groups, keep=keep)
    if args.summary:
        with tsv_sink(args.summary) as write:
            write(enriched, joined)
    among = len(index) if keep is None else int(keep.sum())
    kind = "groups" if args.group_by else "cells"
    print(
        f"{len(names):,} {kind} of {args.query}, {int((joined.cells >= 0).sum()):,} hits among {among:,} cells"
        + (f" -> {args.output}" if args.output else "")
        + "\n"
    )
    print(summary(enriched))


if __name__ == "__main__":
    run(main)
