"""The stages of the pipeline on many machines, by Ray Data: the rows of the single-machine scripts, in parts.

    fractal cluster ingest   --h5ad cells.h5ad --label-key cell_type --output cells
    fractal cluster stratify --input cells --output stratified
    fractal cluster embed    --input cells --reference data/fractal_adapter_4L.pt --output embedded
    fractal cluster annotate --input cells --reference blood_reference --output labels

Inputs are Parquet files, or folders of them; each output is a folder of Parquet files whose rows, in the order of the
names, are those of the single-machine script. All machines must see the paths. Without --address a Ray is started here,
and stopped at the end. A worker that dies is replaced, and its part made again. (The extra `cluster`.)
"""

import argparse
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fractal.base.errors import InputError, InputWarning, needs, reason, warn
from fractal.base.files import locked
from fractal.base.paths import check_paths
from fractal.commands.options import add, command, positive_int

if TYPE_CHECKING:  # --help loads nothing heavy
    from fractal.commands.stages import Engine, Task

STARTS = 3  # attempts: Ray gives up after 30 seconds, which a busy machine may need
OBJECTS = 300_000_000  # bytes of Ray's memory for objects: only numbers of tasks and of cells go there


def get_parser() -> argparse.ArgumentParser:
    parser = command("cluster", __doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="ingest|stratify|embed|annotate")
    ingest = stages.add_parser("ingest", help="a release, or an .h5ad -> an atlas; flags as of ingest.py")
    ingest.add_argument("--model-dir", type=Path, help="the model_v1.1 folder of a release")
    ingest.add_argument("--h5ad", type=Path, help="an .h5ad file with an embedding and labels, instead of a release")
    add(ingest, "--use-rep", default="X_scimilarity", help="its embedding (default: %(default)s)")
    ingest.add_argument("--label-key", default="cell_type", help="its column of types (default: %(default)s)")
    ingest.add_argument("--study-key", help="its column of studies (default: none)")
    add(ingest, "--levels", "--label-map", "--hierarchy", "--obo", "--unmapped")
    stratify = stages.add_parser("stratify", help="an atlas -> the same cells in a balanced order")
    add(stratify, "--seed")
    add(
        stratify,
        "--memory",
        help="of each task; beside the output as much room is taken as the cells take (default: %(default)s)",
    )
    embed = stages.add_parser("embed", help="cells -> their fractal vectors")
    add(embed, "--prefix")
    annotate = stages.add_parser("annotate", help="cells -> labels; flags as of fractal annotate")
    add(annotate, "--confidence", "--error", "--novelty", "--only", "--exclude", "--obo")
    for stage in embed, annotate:
        add(stage, "--reference", type=Path, required=True)
        add(stage, "--force")
    for stage in stratify, embed, annotate:
        stage.add_argument("--input", type=Path, required=True, help="Parquet file, or a folder of them")
    for stage in ingest, stratify, embed, annotate:
        stage.add_argument("--output", type=Path, required=True, help="folder to write")
        stage.add_argument("--address", help="of a running Ray, such as auto (default: one is started for this run)")
        stage.add_argument("--workers", type=positive_int, help="of a Ray started here (default: one for each CPU)")
    return parser


def task_result(task: "Task", row: dict[str, Any]) -> dict[str, Any]:
    """Bad input comes back as a line: Ray would wrap it in a trace-back, and try again. Warnings come back, too."""
    number, error = int(row["id"]), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InputWarning)
        try:
            cells = task(number)
        except InputError as bad:
            cells, error = 0, str(bad)
    lines = [f"part {number}: {each.message}" for each in caught if issubclass(each.category, InputWarning)]
    return {"cells": cells, "error": error, "warnings": "\n".join(lines)}


@contextmanager
def ray_engine(address: str | None, workers: int | None) -> Iterator["Engine"]:
    """Runs tasks by Ray Data, one for each row of a range; a task whose worker dies is run again, by another one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    options: dict[str, Any] = {"address": address}
    if address is None:  # "local" starts another Ray even where one runs on this machine
        options = {"address": "local", "num_cpus": workers, "include_dashboard": False, "object_store_memory": OBJECTS}
        # under `uv run` it would start each worker by `uv run`, too; they have this Python at hand
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray, data = needs("ray", "cluster"), needs("ray.data", "cluster")
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(**options, logging_level=logging.ERROR, log_to_driver=False)
            break
        except Exception as error:  # it has no class for a start that takes too long
            ray.shutdown()
            if attempt == STARTS:
                raise InputError(f"Ray does not start: {reason(error)}") from error
    data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def each(task: "Task", count: int, name: str) -> Iterator[int]:
        from tqdm.auto import tqdm

        results = data.range(count, override_num_blocks=count).map(partial(task_result, task))
        try:
            for row in tqdm(results.iter_rows(), total=count, unit="part", desc=name):
                for line in row["warnings"].splitlines():
                    warn(line)
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
    names = ("input", "reference", "model_dir", "h5ad", "label_map", "hierarchy", "obo")
    inputs = {f"--{name.replace('_', '-')}": getattr(args, name, None) for name in names}
    table = args.output.with_name(f"{args.output.stem}.hierarchy.tsv") if args.stage == "ingest" else None
    check_paths(inputs, {"the hierarchy of --output": table}, folders={"--output": args.output})
    if args.address and args.workers:
        raise InputError(f"--workers {args.workers}: a Ray that runs has workers already; leave it out, or --address")
    if args.stage == "ingest" and bool(args.model_dir) == bool(args.h5ad):
        raise InputError("name either --model-dir or --h5ad")
    if args.stage == "annotate":
        from fractal.annotate.run import check_answers

        check_answers(args.confidence, args.novelty, args.error)
    with locked(args.output), ray_engine(args.address, args.workers) as engine:
        from fractal.commands import stages

        cells = getattr(stages, args.stage)(args, engine)
        parts = len(list(args.output.glob("part-*.parquet")))  # before another run may replace them
    print(f"{cells:,} cells written to {args.output}, {parts:,} parts")
