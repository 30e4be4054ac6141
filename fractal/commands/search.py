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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fractal.base.errors import InputError
from fractal.base.paths import check_paths
from fractal.base.storage import locate
from fractal.commands.options import add, check_suffix, command, positive_int

if TYPE_CHECKING:  # torch takes seconds to load, and --help does not need it
    import numpy as np

    from fractal.search import Index
    from fractal.search.source import Source


def get_parser() -> argparse.ArgumentParser:
    parser = command("search", __doc__)
    files = parser.add_argument_group("files")
    files.add_argument("--query", type=locate, required=True, help="cells: .h5ad, .zarr, .npy, Parquet or TileDB")
    files.add_argument("--index", type=Path, required=True, help="folder of `fractal index`")
    add(files, "--reference", help="reference of `fractal fit`, or checkpoint, that made the index; embeds the queries")
    add(files, "--embedded")
    add(
        files,
        "--use-rep",
        help="of an .h5ad: key of its vectors in obsm (default: what the reference takes; with --embedded X_fractal)",
    )
    add(files, "--output", help=".parquet, .tsv, or .h5ad (the hits as cells, with their vectors)")
    files.add_argument("--summary", type=locate, help="the whole summary, all values, as a .tsv")
    what = parser.add_argument_group("what is searched")
    what.add_argument("-k", type=positive_int, help="hits per query (default: 10; 100 with --group-by)")
    add(what, "--prefix", help="compare the first blocks only: 1 is like mine in system")
    what.add_argument("--group-by", metavar="COLUMN", help="one query per group of cells, by up to 8 representatives")
    what.add_argument("--where", metavar="CONDITION", help="only cells with, such as \"tissue == 'lung'\"")
    add(what, "--only", help="only these: labels of any level, or CL ids")
    add(what, "--columns", help="columns of the hits (default: all)")
    what.add_argument("--lists", type=positive_int, help="lists to open per query: more find more, all are exact")
    add(what, "--obo", help="Cell Ontology for CL ids, a path or a URL (default: the shipped CL 2025-07-30)")
    add(what, "--force", "--device")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Raises InputError, before any work, for flags that do not go together."""
    check_suffix("--output", args.output, (".parquet", ".tsv", ".h5ad"))
    check_suffix("--summary", args.summary, (".tsv",))
    inputs = {"--query": args.query, "--index": args.index, "--reference": args.reference, "--obo": args.obo}
    check_paths(inputs, {"--output": args.output, "--summary": args.summary})
    if args.embedded and args.reference:
        raise InputError("--embedded: the queries need no --reference then; drop one of them")


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_flags(args)
    from fractal.hierarchy.ontology import CL_SLIM
    from fractal.reference import open_embedder
    from fractal.search import open_index
    from fractal.search.filters import mask_of
    from fractal.search.source import open_cells, space_of

    index = open_index(args.index)
    embedder = open_embedder(args.reference, args.device) if args.reference else None
    if embedder:
        if not index.space.adapters:
            raise InputError(f"{args.index}: holds vectors as they came, made by no adapter; drop --reference")
        index.check_adapter(space_of(embedder).adapters, str(args.reference))
    keep = mask_of(index, args.where, args.only, args.obo or CL_SLIM)
    with open_cells(args.query, embedder, args.use_rep, args.embedded, args.force) as source:
        if index.space.adapters and not (source.space.adapters or args.embedded):
            raise InputError(
                f"{args.query}: name the adapter that embeds its vectors with --reference, or say --embedded"
            )
        index.check_adapter(source.space.adapters, str(args.query))
        print(search_cells(args, index, source, keep))


def search_cells(args: argparse.Namespace, index: "Index", source: "Source", keep: "np.ndarray | None") -> str:
    """Write the hits and the summary -> what is printed."""
    import pyarrow as pa
    from tqdm.auto import tqdm

    from fractal.commands.output import write_new_h5ad, write_parquet, write_tsv
    from fractal.search import Hits
    from fractal.search.enrichment import enrichment, summary
    from fractal.search.query import search

    names, found = list[str](), list[Hits]()

    def tables() -> Iterator[pa.Table]:
        k, num_rows = args.k or (100 if args.group_by else 10), source.cells.num_rows
        with tqdm(total=num_rows, unit="cells", unit_scale=True, desc="search") as bar:
            for batch, hits in search(
                source, index, k, args.group_by, prefix=args.prefix, keep=keep, probes=args.lists
            ):
                names.extend(batch)
                found.append(hits)
                yield index.table(hits, batch, args.columns)
                bar.update(num_rows if args.group_by else len(batch))

    suffix = args.output.suffix.casefold() if args.output else ""
    if suffix == ".tsv":
        write_tsv(args.output, tables())
    elif suffix == ".parquet":
        write_parquet(args.output, ((table, {}) for table in tables()), {})
    else:
        kept = [table for table in tables() if suffix]
    hits = Hits.concat(found)
    if suffix == ".h5ad":  # at once: to look up the hits' vectors takes a pass through the index
        write_new_h5ad(
            args.output, pa.concat_tables(kept), {"X_fractal": index.vectors_of(hits.cells[hits.cells >= 0])}
        )
    enriched = enrichment(index, hits, names if args.group_by else ["all queries"] * len(names), keep=keep)
    if args.summary:
        write_tsv(args.summary, [enriched])
    among = len(index) if keep is None else int(keep.sum())
    kind, to = "groups" if args.group_by else "cells", f" -> {args.output}" if args.output else ""
    line = f"{len(names):,} {kind} of {args.query}, {int((hits.cells >= 0).sum()):,} hits among {among:,} cells{to}"
    return f"{line}\n\n{summary(enriched)}"
