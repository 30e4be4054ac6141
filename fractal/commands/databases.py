"""Cells with their vectors into a vector database: LanceDB, DuckDB, Qdrant (its local mode), or Parquet for any other.

One table, or collection, `cells`. Its columns: `row`, the cell's number in the source; `cell_id` where the cells have
names; every further column of the source (of an .h5ad: obs); the prefix that makes a shortlist, `prefix_3` for three
blocks; and `full`. Both vectors have length 1. The source is streamed, and the output is there whole or not at all.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from fractal.base.cli import InputError, needs
from fractal.base.files import atomic_folder, atomic_write, flush
from fractal.data.cells import Cells, has_obs
from fractal.data.vectors import CHUNK, usable

if TYPE_CHECKING:
    from fractal.model.embedding import Embedder

Append = Callable[[pa.Table], None]
TABLE = "cells"


@contextmanager
def parquet(path: Path, schema: pa.Schema) -> Iterator[Append]:
    with atomic_write(path) as part, pq.ParquetWriter(part, schema) as writer:
        yield writer.write_table


@contextmanager
def duckdb(path: Path, schema: pa.Schema) -> Iterator[Append]:
    package = needs("duckdb", "databases")
    with atomic_write(path) as part:
        part.unlink(missing_ok=True)  # an empty file is no database
        with closing(package.connect(str(part))) as database:
            database.register("chunk", schema.empty_table())
            database.execute(f"create table {TABLE} as from chunk")

            def append(chunk: pa.Table) -> None:
                database.register("chunk", chunk)
                database.execute(f"insert into {TABLE} from chunk")

            yield append


@contextmanager
def database_folder(path: Path) -> Iterator[Path]:
    """A new folder, whole or not at all. Raises InputError for one that holds anything."""
    with atomic_folder(path, ()) as part:
        yield part
        for file in part.rglob("*"):
            flush(file)


@contextmanager
def lancedb(path: Path, schema: pa.Schema) -> Iterator[Append]:
    package = needs("lancedb", "databases")
    with database_folder(path) as part:
        yield package.connect(str(part)).create_table(TABLE, schema=schema).add


@contextmanager
def qdrant(path: Path, schema: pa.Schema) -> Iterator[Append]:
    package = needs("qdrant_client", "databases")
    models = package.models
    sizes = {field.name: field.type.list_size for field in schema if pa.types.is_fixed_size_list(field.type)}
    with database_folder(path) as part, closing(package.QdrantClient(path=str(part))) as client:
        cosine = models.Distance.COSINE
        client.create_collection(
            TABLE, {n: models.VectorParams(size=size, distance=cosine) for n, size in sizes.items()}
        )

        def append(chunk: pa.Table) -> None:
            vectors = {n: np.stack(chunk[n].combine_chunks().to_numpy(zero_copy_only=False)) for n in sizes}
            payloads = chunk.drop_columns([*sizes, "row"]).to_pylist()
            client.upsert(TABLE, models.Batch(ids=chunk["row"].to_pylist(), vectors=vectors, payloads=payloads))

        yield append


WRITERS = {"lancedb": lancedb, "duckdb": duckdb, "qdrant": qdrant, "parquet": parquet}


def export(
    embedder: "Embedder", source_path: Path, use_rep: str, to: str, output: Path, prefix: int
) -> tuple[int, int]:
    """Write all cells of a file with prefix `prefix` and the full vector -> how many, and how many were left out.

    Left out are those whose vector is zero or not finite; the others keep their `row`. Raises InputError for a source
    with a column that is named as one of those written.
    """
    with Cells.open(source_path, use_rep, embedder.adapter.dim) as source:
        others = source.table() if has_obs(source_path) else None
        width = embedder.adapter.scale_dim
        sizes = {f"prefix_{prefix}": prefix * width, "full": embedder.adapter.num_levels * width}
        schema = schema_of(source, others, sizes, embedder)
        with WRITERS[to](output, schema) as append:
            left_out = write(source, others, embedder, prefix, schema, append)
    return source.num_rows - left_out, left_out


def schema_of(source: Cells, others: pa.Table | None, sizes: dict[str, int], embedder: "Embedder") -> pa.Schema:
    known = [*source.schema, *(others.schema if others is not None else ())]
    if taken := {"row", *sizes} & {field.name for field in known}:
        raise InputError(f"{source.path}: has a column '{min(taken)}', as the export writes one; rename it")
    fields = [pa.field(field.name, plain(field.type)) for field in known]
    vectors = [pa.field(name, pa.list_(pa.float32(), size)) for name, size in sizes.items()]
    about = {"recipe": embedder.recipe, "checkpoint_sha256": embedder.sha256}
    return pa.schema([pa.field("row", pa.int64()), *fields, *vectors], about)


def plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def write(
    source: Cells, others: pa.Table | None, embedder: "Embedder", prefix: int, schema: pa.Schema, append: Append
) -> int:
    import torch

    from fractal.model.adapter import embed

    start = left_out = 0
    with tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="export") as bar:
        for table, chunk in source.chunks(CHUNK):
            good = np.flatnonzero(usable(chunk))
            columns = dict(zip(table.column_names, table.columns, strict=True))
            if others is not None:
                part = others.slice(start, len(chunk))
                columns |= dict(zip(part.column_names, part.columns, strict=True))
            vectors = embed(embedder.adapter, torch.from_numpy(chunk[good]))
            arrays: dict[str, Any] = {name: column.take(pa.array(good)) for name, column in columns.items()}
            arrays["row"] = pa.array(start + good)
            for name, values in (f"prefix_{prefix}", vectors[prefix - 1]), ("full", vectors[-1]):
                arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.numpy().reshape(-1)), values.shape[1])
            if len(good):
                append(pa.table([arrays[field.name].cast(field.type) for field in schema], schema=schema))
            start, left_out = start + len(chunk), left_out + len(chunk) - len(good)
            bar.update(len(chunk))
    return left_out
