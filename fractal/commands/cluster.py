"""The stages of the pipeline on many machines, by Ray Data: the rows of the single-machine scripts, in parts.

    fractal cluster ingest   --h5ad cells.h5ad --label-key cell_type --output cells
    fractal cluster stratify --input cells --output stratified
    fractal cluster embed    --input cells --reference data/fractal_adapter_4L.pt --output embedded
    fractal cluster annotate --input cells --reference blood_reference --output labels

Inputs are Parquet files, or folders of them; each output is a folder of Parquet files whose rows, in the order of the
names, are those of the single-machine script. All machines must see the paths. Without --address a Ray of its own is
started here, and stopped at the end. A worker that dies is replaced, and its part made again. (The extra `cluster`.)
"""

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fractal.base.cli import InputError, needs, non_negative_int, num_bytes, positive_int, reason, run
from fractal.base.files import check_paths

if TYPE_CHECKING:  # --help loads nothing heavy
    from fractal.commands.stages import Engine, Task

STARTS = 3  # attempts: Ray gives up after 30 seconds, which a busy machine may need
OBJECTS = 300_000_000  # bytes of Ray's own memory for objects: only numbers of tasks and of cells go there


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fractal cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="ingest|stratify|embed|annotate")
    ingest = stages.add_parser("ingest", help="a release, or an .h5ad -> an atlas; flags as of ingest.py")
    ingest.add_argument("--model-dir", type=Path, help="the model_v1.1 folder of a release")
    ingest.add_argument("--h5ad", type=Path, help="an .h5ad file with an embedding and labels, in its place")
    ingest.add_argument("--obsm", "--use-rep", default="X_scimilarity", help="its embedding (default: %(default)s)")
    ingest.add_argument("--label-key", default="cell_type", help="its column of types (default: %(default)s)")
    ingest.add_argument("--study-key", help="its column of studies (default: none)")
    ingest.add_argument("--levels", nargs="+", default=[], metavar="COLUMN", help="its columns of a tree of your own")
    ingest.add_argument("--label-map", type=Path, metavar="TSV", help="renames labels")
    ingest.add_argument("--hierarchy", type=Path, metavar="TSV", help="the place of each type")
    ingest.add_argument("--obo", help="Cell Ontology, a path or a URL (default: the shipped one)")
    ingest.add_argument("--unmapped", choices=["error", "other"], help="types that CL does not know (default: error)")
    ingest.set_defaults(do=ingest_stage)
    stratify = stages.add_parser("stratify", help="an atlas -> the same cells in a balanced order")
    stratify.add_argument("--input", type=Path, required=True, help="Parquet file, or a folder of them")
    stratify.add_argument("--seed", type=non_negative_int, default=0, help="of the order (default: %(default)s)")
    stratify.add_argument(
        "--memory",
        type=num_bytes,
        default="1GB",
        help="of each task; beside the output as much room is taken as the cells take (default: %(default)s)",
    )
    stratify.set_defaults(do=stratify_stage)
    embed = stages.add_parser("embed", help="cells -> their fractal vectors")
    embed.add_argument("--prefix", type=positive_int, help="keep this many blocks (default: the full vector)")
    embed.set_defaults(do=embed_stage)
    annotate = stages.add_parser("annotate", help="cells -> labels; flags as of fractal annotate")
    annotate.add_argument("--confidence", type=float, default=0.8, help="least probability (default: %(default)s)")
    annotate.add_argument("--novelty", choices=["on", "flag", "off"], default="on", help="(default: %(default)s)")
    annotate.add_argument("--only", nargs="+", default=[], metavar="CL_ID", help="only these types")
    annotate.add_argument("--exclude", nargs="+", default=[], metavar="CL_ID", help="none of these types")
    annotate.add_argument("--obo", help="Cell Ontology, a path or a URL (default: the shipped one)")
    annotate.set_defaults(do=annotate_stage)
    for stage in embed, annotate:
        stage.add_argument("--input", type=Path, required=True, help="Parquet file, or a folder of them")
        stage.add_argument("--reference", type=Path, required=True, help="folder of fractal fit; embed: or checkpoint")
        stage.add_argument("--force", action="store_true", help="take vectors of another embedding")
    for stage in ingest, stratify, embed, annotate:
        stage.add_argument("--output", type=Path, required=True, help="folder to write")
        stage.add_argument("--address", help="of a running Ray, such as auto (default: one is started for this run)")
        stage.add_argument("--workers", type=positive_int, help="of a Ray started here (default: one for each CPU)")
    return parser


@dataclass(frozen=True)
class Said:
    """A task whose bad input comes back as a line: Ray would wrap it in a trace-back, and try again."""

    task: "Task"

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"cells": self.task(int(row["id"])), "error": ""}
        except InputError as error:
            return {"cells": 0, "error": str(error)}


@contextmanager
def ray_engine(address: str | None, workers: int | None) -> Iterator["Engine"]:
    """Runs tasks by Ray Data, one for each row of a range; a task whose worker dies is run again, by another one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    if address is None:  # under `uv run` it would start each worker by `uv run`, too; they have this Python at hand
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray = needs("ray", "cluster")
    data = needs("ray.data", "cluster")
    from tqdm import tqdm

    # "local" starts a Ray of its own even where another one runs on this machine
    own = {"address": "local", "num_cpus": workers, "include_dashboard": False, "object_store_memory": OBJECTS}
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    where = own if address is None else {"address": address}
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(**where, **quiet)
            break
        except Exception as error:  # it has no class of its own for a start that takes too long
            ray.shutdown()
            if attempt == STARTS:
                raise InputError(f"Ray does not start: {reason(error)}") from error
    context = data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def each(task: "Task", count: int, name: str) -> Iterator[int]:
        numbers = data.range(count, override_num_blocks=count).map(Said(task).__call__)
        try:
            for row in tqdm(numbers.iter_rows(), total=count, unit="part", desc=name):
                if row["error"]:
                    raise InputError(row["error"])
                yield row["cells"]
        except ray.exceptions.RayError as error:
            raise InputError(f"Ray gave up: {reason(error)}; see its logs, and run it again") from error

    try:
        yield each
    finally:
        ray.shutdown()


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    inputs = ("input", "reference", "model_dir", "h5ad", "label_map", "hierarchy", "obo")
    named = {f"--{name.replace('_', '-')}": getattr(args, name, None) for name in inputs}
    beside = {"the hierarchy of --output": hierarchy_path(args.output)} if args.stage == "ingest" else {}
    check_paths(named, beside, folders={"--output": args.output})
    if args.address and args.workers:
        raise InputError(f"--workers {args.workers}: a Ray that runs has its own; leave it out, or --address")
    stage: Callable[[argparse.Namespace, Engine], int] = args.do
    with ray_engine(args.address, args.workers) as engine:
        cells = stage(args, engine)
    parts = len(list(args.output.glob("part-*.parquet")))
    print(f"{cells:,} cells written to {args.output}, {parts:,} parts")


def hierarchy_path(output: Path) -> Path:
    return output.with_name(f"{output.stem}.hierarchy.tsv")


def ingest_stage(args: argparse.Namespace, engine: "Engine") -> int:
    from fractal.commands.stages import ingest, ingest_release
    from fractal.data.cells import Cells
    from fractal.data.ingestion import place_cells
    from fractal.data.labels import read_map
    from fractal.data.scimilarity import open_release
    from fractal.hierarchy.ontology import CL_SLIM, load_graph, write_hierarchy

    if bool(args.model_dir) == bool(args.h5ad):
        raise InputError("name either --model-dir or --h5ad")
    graph = load_graph(args.obo or CL_SLIM)
    label_map = read_map(args.label_map) if args.label_map else None
    if args.h5ad:
        with Cells.open(args.h5ad, args.obsm) as cells:
            labels = cells.labels(args.label_key, args.study_key, label_map, args.levels)
    else:
        release = open_release(args.model_dir)
        labels = release.labels if label_map is None else release.labels.mapped(label_map, args.label_map)
    plan = place_cells(labels, graph, args.h5ad or args.model_dir, args.hierarchy, args.unmapped)
    for note in plan.hierarchy.notes:
        print(note)
    if args.h5ad:
        count = ingest(plan, args.h5ad, args.obsm, args.output, engine)
    else:
        count = ingest_release(plan, release, args.output, engine)
    hierarchy = plan.hierarchy
    write_hierarchy(hierarchy_path(args.output), hierarchy.levels, hierarchy.classes)
    return count


def stratify_stage(args: argparse.Namespace, engine: "Engine") -> int:
    from fractal.commands.stages import Pieces, stratify

    pieces = Pieces.of(args.input)
    dim = pieces.schema.field("embedding").type.list_size
    return stratify(pieces, args.output, args.seed, args.memory // (2 * 4 * dim), engine)


def embed_stage(args: argparse.Namespace, engine: "Engine") -> int:
    from fractal.annotate.query import open_query, tell
    from fractal.commands.stages import Pieces, embed
    from fractal.data.cells import Cells
    from fractal.model.embedding import Embedder

    pieces = Pieces.of(args.input)
    first = pieces.groups[0][0]
    embedder = Embedder.open(args.reference)
    levels = embedder.adapter.num_levels
    if (args.prefix or 1) > levels:
        raise InputError(f"{args.reference}: has {levels} blocks, --prefix {args.prefix} asks for more")
    if embedder.reference:
        with open_query(embedder.reference, first, None, args.force) as (_, origin):
            tell(origin, first)
    else:
        with Cells.open(first, dim=embedder.adapter.dim):
            pass
    return embed(pieces, args.reference, args.output, args.prefix, embedder.metadata(args.prefix or levels), engine)


def annotate_stage(args: argparse.Namespace, engine: "Engine") -> int:
    from fractal.annotate.bundle import check_terms, choose_paths, read_bundle
    from fractal.annotate.query import open_query, tell
    from fractal.commands.stages import Pieces, annotate
    from fractal.hierarchy.ontology import CL_SLIM, load_graph

    if not 0 < args.confidence <= 1:
        raise InputError(f"--confidence {args.confidence:g}: must be above 0 and at most 1")
    pieces = Pieces.of(args.input)
    bundle, keep = read_bundle(args.reference), None
    if bundle.cl_ids.any():
        graph = load_graph(args.obo or CL_SLIM)
        check_terms(bundle, graph, args.reference, args.obo or CL_SLIM)
        keep = choose_paths(bundle, graph, args.only, args.exclude)
    elif args.only or args.exclude:
        raise InputError(f"{args.reference}: has no CL ids, so --only and --exclude can't be applied")
    first = pieces.groups[0][0]
    with open_query(bundle, first, None, args.force) as (_, origin):
        tell(origin, first)
    return annotate(pieces, args.reference, args.output, keep, args.confidence, args.novelty, engine)


if __name__ == "__main__":
    run(main)
