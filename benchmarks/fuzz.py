"""Feed damaged files to every reader: each must be read, or be refused with an InputError.

    uv run python -m benchmarks.fuzz --executions 1000 --scale

Small valid files are damaged at random (bits flipped, bytes overwritten, cut out, doubled, swapped between files,
numbers replaced by extreme ones) and read again. An execution fails if anything but InputError is raised, if the
process dies, if it takes more than a second of CPU time, or if memory grows by 64 MB, hundreds of times the size of
the file. Execution i of a target depends on the seed and i only, so a failure can be repeated with --only TARGET
--first i --executions 1; its file is kept in --output. A stopped run goes on where it was.
"""

import argparse
import io
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from anndata import AnnData
from tqdm import tqdm

from fractal.annotate.annotator import Annotator
from fractal.annotate.answers import answer_columns
from fractal.annotate.card import model_card
from fractal.base.errors import InputError, run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import non_negative_int, positive_int
from fractal.data import parquet, scimilarity
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.data.cells import Cells, npy_cells
from fractal.data.labels import Labels, read_map
from fractal.hierarchy import levels, ontology
from fractal.model.checkpoint import build_adapter, load, save
from fractal.model.split import MIN_VALIDATION, Split
from fractal.reference import make_reference, read_reference

BATCH = 5_000  # executions per process
CPU_LIMIT, MEMORY_LIMIT = 1.0, 64  # seconds and MB of one execution
LEVELS: dict[str, Any] = {"levels": list(levels.LEVELS), "block_levels": [0, 3]}  # of a checkpoint
SPLIT = asdict(Split("0" * 64, 9, 0, 0.2, 0.1, 0))
EXTREMES = [0, 1, 2, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@dataclass(frozen=True)
class Target:
    seeds: list[bytes]  # valid files
    read: Callable[[Path], object]
    share: int  # of the executions with --scale: the slower a reader, the fewer
    wrap: Callable[[bytes], bytes] = bytes  # what is done to the damaged bytes before they are a file


@dataclass
class Progress:
    executions: int = 0
    accepted: int = 0
    refused: int = 0
    failures: dict[str, list[int]] = field(default_factory=dict)  # what happened -> in which executions
    slowest: float = 0.0  # CPU seconds
    growth: float = 0.0  # MB of resident memory that a batch gained after its first tenth
    cpu: float = 0.0  # seconds


def damage(rng: random.Random, seeds: list[bytes]) -> bytes:
    """One to eight random changes to a random seed; half of them near its beginning or its end, where headers are."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        place = rng.choice((rng.random(), rng.random(), rng.random() ** 4, 1 - rng.random() ** 4))
        at, length = int(place * len(data)), rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + length] = rng.randbytes(length)
            case 2:
                data[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
            case 3:
                data[at : at + 4] = struct.pack("<I", rng.choice(EXTREMES) & 0xFFFFFFFF)
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length] * rng.choice((1, 2, 50))
            case 6:
                other = rng.choice(seeds)
                start = rng.randrange(len(other))
                data[at : at + length] = other[start : start + length]
            case 7:
                del data[at:]
    return bytes(data)


# The readers, and small valid files for them.


def read_index(path: Path) -> None:
    records = scimilarity.open_index(path)
    if len(records) <= 1_000:
        release = scimilarity.Release(Labels(["a"], np.zeros(len(records), np.int32)), records, path)
        for _ in release.chunks(5):
            pass


def index_file(n: int, dim: int) -> bytes:
    record = np.dtype([("links", "V68"), ("vector", "<f4", dim), ("label", "<u8")])  # M = 8
    header = (0, n + 2, n, record.itemsize, 68 + 4 * dim, 68, 0, 0, 8, 16, 8, 0.5, 200)
    records = np.zeros(n, record)
    records["vector"], records["label"] = 0.5, np.random.default_rng(n).permutation(n)
    return np.array(header, scimilarity.HEADER).tobytes() + records.tobytes() + bytes(4 * n)


def read_obo(path: Path) -> None:
    ontology.build_hierarchy(["B cell", "blob", "native cell", "T cell"], ontology.load_graph(path), "other")


def obo_file() -> bytes:
    anchors = ontology.SYSTEM_ANCHORS | ontology.STEM_ANCHOR | ontology.LINEAGE_ANCHORS
    terms = [f"[Term]\nid: {term}\nname: {name} {term}\nis_a: CL:0000000 ! cell" for term, name in anchors.items()]
    return "\n\n".join([
        "format-version: 1.2\ndata-version: cl/releases/2025-07-30/cl.owl",
        "[Term]\nid: CL:0000000\nname: cell", *terms,
        '[Term]\nid: CL:0000236\nname: B cell\nsynonym: "B-cell" EXACT []\nis_a: CL:0000542 {a="b"} ! lymphocyte',
        "[Term]\nid: CL:0000084\nname: T cell\nis_a: CL:0000542\nrelationship: part_of UBERON:0000178 ! blood",
        "[Term]\nid: CL:0000003\nname: obsolete native cell\nis_obsolete: true",
        "[Typedef]\nid: part_of\nname: part of\n",
    ]).encode()  # fmt: skip


def read_parquet(path: Path) -> None:
    atlas = Atlas.open(path)
    if atlas.num_rows > 10_000:
        return
    atlas.read(np.arange(min(7, atlas.num_rows)))
    atlas.path_counts(np.ones(atlas.num_rows, bool))
    for _ in atlas.vectors():
        pass
    if atlas.has_studies:
        atlas.codes("study")


def parquet_file(sizes: list[int], has_study: bool) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a")
        columns = 5 if has_study else 4
        tables = [parquet.atlas_table(np.ones((n, 3)), [(np.arange(n) % 3, ["a", "b", "ü"])] * columns) for n in sizes]
        parquet.write_tables(path, tables, {"cl_release": "2025-07-30"})
        return path.read_bytes()


def foreign_parquet_file() -> bytes:
    """The same columns as another program may write them: plain strings, snappy, no metadata of ours."""
    file = io.BytesIO()
    own = pq.read_table(io.BytesIO(parquet_file([9], True))).replace_schema_metadata()
    pq.write_table(own.set_column(1, "level1_system", own["level1_system"].cast("string")), file)
    return file.getvalue()


def checkpoint_file(recipe: str) -> bytes:
    config = {"recipe": recipe, "dim": 8, "num_levels": 2, "scale_dim": 2, "paths": [[0, 0], [0, 1], [1, 2]], **LEVELS}
    classes = [["a", "b"], ["a", "b", "c"], ["a", "b", "c"], ["a", "b", "c"]]
    with TemporaryDirectory() as folder:
        path = Path(folder, "a")
        torch.manual_seed(0)
        save(
            path,
            build_adapter(config, classes),
            config,
            classes,
            split=SPLIT,
            training={},
            versions={},
            validation=None,
        )
        return path.read_bytes()


def h5ad_file() -> bytes:
    obs = pd.DataFrame({"kind": ["B cell", None, "T cell", "ü", "B cell"], "donor": [*"aabba"]}, index=[*"abcde"])
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.h5ad")
        AnnData(np.zeros((5, 1), np.float32), obs, obsm={"X_pca": np.ones((5, 3), np.float32)}).write_h5ad(path)
        return path.read_bytes()


def read_h5ad(path: Path) -> None:
    """As ingest.py and `fractal fit` do, which know the format by the name."""
    named = path.with_suffix(".h5ad")
    named.write_bytes(path.read_bytes())
    with Cells.open(named, "X_pca") as cells:
        cells.labels("kind", "donor")
        for _ in cells.chunks(2):
            pass


def npy_file(dtype: str) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ones((5, 3), dtype))
    return file.getvalue()


def read_npy(path: Path) -> None:
    if (source := npy_cells(path)).num_rows <= 1_000:
        for _ in source.chunks(2):
            pass


def make_folder(folder: Path) -> None:
    paths: list[tuple[str, ...]] = [("a", "b", "c", "d"), ("a", "b", "c", "e")]
    config = {"recipe": "fractal", "dim": 8, "num_levels": 2, "scale_dim": 2, "paths": [[0, 0], [0, 1]], **LEVELS}
    classes = [["a"], ["b"], ["c"], ["d", "e"]]
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(MIN_VALIDATION, 8)).astype(np.float32)
    labels = np.zeros((MIN_VALIDATION, 4), np.int64)
    labels[::2, 3] = 1
    cells = LabelledVectors(x, labels, classes)
    facts = {"cl_release": "2025-07-30", "split": SPLIT, "versions": {"torch": "2"}}
    counts: dict[tuple[str, ...], int] = dict.fromkeys(paths, 60)
    annotator = Annotator.of(build_adapter(config, classes), cells, cells, counts)
    make_reference(annotator, config, classes, None, facts).save(folder)


def use_folder(folder: Path) -> None:
    """Read it and annotate with it, as `fractal annotate` does."""
    reference = read_reference(folder)
    vectors = np.random.default_rng(1).normal(size=(3, reference.adapter.dim)).astype(np.float32)
    answer_columns(reference.annotator.answer(vectors), reference.annotator.tree)
    model_card(reference.facts, 0)


def read_checkpoint(path: Path) -> None:
    """As train.py's readers do: the adapter, and the split that it carries."""
    Split.of(load(path)[1], path)


def reads_folder(folder: Path, name: str) -> Callable[[Path], object]:
    """A reader of one file of a bundle whose hashes agree, as those of a hostile one do."""
    whole = json.loads((folder / "bundle.json").read_text())

    def read(path: Path) -> None:
        (folder / name).write_bytes(path.read_bytes())
        if name != "bundle.json":
            hashes = {**whole["sha256"], name: parquet.fingerprint(path)}
            (folder / "bundle.json").write_text(json.dumps({**whole, "sha256": hashes}))
        use_folder(folder)

    return read


def targets(scratch: Path) -> dict[str, Target]:
    """The readers; in `scratch` they keep what they need."""
    bundles = {}
    for name in ("bundle.json", "held_out.safetensors", "hierarchy.tsv", "adapter.safetensors", "cells.safetensors"):
        make_folder(scratch / name)
        bundles[name] = Target([(scratch / name / name).read_bytes()], reads_folder(scratch / name, name), 5)
    checkpoint = checkpoint_file("fractal")
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickle_name = next(name for name in members if name.endswith("data.pkl"))

    def with_pickle(data: bytes) -> bytes:
        """A checkpoint whose zip is whole and whose pickle is not: no checksum stands in the way."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, data if name == pickle_name else content)
        return file.getvalue()

    types = [b',0\n0,B cell\n1,"CD14-low, CD16-positive monocyte"\n2,T cell\n', ",0\r\n0,ü\r\n1,b\r\n".encode()]
    labels = [b"B cell\ts1\nT cell\ts2\nB cell\ts2\n" * 5, b"B cell\nT cell\n\nNA\n", "ü\ts 1\r\nb\ts2\r\n".encode()]
    parquets = [parquet_file([5, 4], True), parquet_file([3], False), foreign_parquet_file()]
    checkpoints = [checkpoint, checkpoint_file("published")]
    return {
        "index": Target([index_file(12, 4), index_file(3, 16)], read_index, 350),
        "labels": Target(labels, scimilarity.read_labels, 250),
        "types": Target(types, scimilarity.read_types, 230),
        "map": Target([b"B\tB cell\nT\t\n", "ü\ta\r\nb\tc\r\n".encode()], read_map, 30),
        "h5ad": Target([h5ad_file()], read_h5ad, 2),
        "npy": Target([npy_file("f4"), npy_file("f2"), npy_file(">f8")], read_npy, 20),
        "obo": Target([obo_file()], read_obo, 30),
        "parquet": Target(parquets, read_parquet, 40),
        "checkpoint": Target(checkpoints, read_checkpoint, 10),
        "checkpoint pickle": Target([members[pickle_name]], read_checkpoint, 20, with_pickle),
        **bundles,
    }


def execute(target: Target, data: bytes, path: Path) -> str | None:
    """Read `data` -> "accepted", "refused", or what else happened."""
    path.unlink(missing_ok=True)  # a new file: some file systems flush one that is cut to nothing and written again
    path.write_bytes(data)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        target.read(path)
        outcome = "accepted"
    except InputError:
        outcome = "refused"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__} in {Path(where.filename).name}:{where.name}: {str(error)[:80]}"
    if time.process_time() - began > CPU_LIMIT:
        outcome = f"more than {CPU_LIMIT:g} s"
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > MEMORY_LIMIT * 1024:
        outcome = f"more than {MEMORY_LIMIT} MB"
    return outcome


def resident() -> float:
    """MB of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20


def batch(name: str, target: Target, first: int, count: int, seed: int, output: Path, shared: mmap.mmap) -> Progress:
    """Executions first .. first + count - 1, in this process. `shared` always holds the number of the present one."""
    warnings.simplefilter("ignore")
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 2**31,) * 2)  # a lie about sizes must not take the machine
    found, path, settled = Progress(), Path(output, f".{name}.input"), 0.0
    for i in range(first, first + count):
        shared[:8] = struct.pack("<q", i)
        signal.setitimer(signal.ITIMER_PROF, 10)  # kills a process that computes for ever
        signal.alarm(600)  # and one that waits for ever
        began = time.process_time()
        outcome = execute(target, target.wrap(damage(random.Random(f"{seed} {name} {i}"), target.seeds)), path)
        found.slowest = max(found.slowest, time.process_time() - began)
        if outcome == "accepted":
            found.accepted += 1
        elif outcome == "refused":
            found.refused += 1
        else:
            found.failures.setdefault(str(outcome), []).append(i)
        if i == first + count // 10:
            settled = resident()
    found.executions, found.growth, found.cpu = count, max(0.0, resident() - settled), time.process_time()
    return found


def batch_in_child(name: str, target: Target, first: int, count: int, seed: int, output: Path) -> Progress:
    """The same in a forked process. One that dies is a failure of the execution that it was in."""
    shared = mmap.mmap(-1, 8)
    result = Path(output, f".{name}.result")
    child = os.fork()
    if child == 0:
        try:
            result.write_text(json.dumps(asdict(batch(name, target, first, count, seed, output, shared))))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    try:
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    if os.WIFSIGNALED(status):
        (dead_in,) = struct.unpack("<q", shared[:8])
        failures = {f"killed by {signal.Signals(os.WTERMSIG(status)).name}": [dead_in]}
        if dead_in > first:  # the ones before it, once more, for their counts
            before = batch_in_child(name, target, first, dead_in - first, seed, output)
            before.executions += 1
            before.failures = merged(before.failures, failures)
            return before
        return Progress(1, failures=failures)
    if status:
        raise InputError(f"{name}: the harness itself failed, see above")
    return Progress(**json.loads(result.read_text()))


def merged(a: dict[str, list[int]], b: dict[str, list[int]]) -> dict[str, list[int]]:
    return {key: a.get(key, []) + b.get(key, []) for key in a | b}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--executions", type=positive_int, default=1_000, help="per target, in all (default: %(default)s)"
    )
    parser.add_argument(
        "--scale",
        action="store_true",
        help="--executions is thousands for all targets together, and slow readers get fewer: 1000 is a million",
    )
    parser.add_argument("--only", nargs="+", metavar="TARGET", help="these targets (default: all)")
    parser.add_argument("--first", type=non_negative_int, default=0, help="number of the first execution (default: 0)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of all damage (default: 0)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("data/fuzz"),
        help="folder of the counts so far and of files that failed; delete it to start again (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    scratch = TemporaryDirectory()
    known = targets(Path(scratch.name))
    if unknown := set(args.only or []) - set(known):
        raise InputError(f"--only: there is no target {', '.join(unknown)}; there are {', '.join(known)}")
    rows = []
    for name in args.only or known:
        target = known[name]
        wanted = args.executions * target.share if args.scale else args.executions
        log = args.output / f"{name}-{args.seed}-{args.first}.json"
        total = Progress(**json.loads(log.read_text())) if log.exists() else Progress()
        with tqdm(total=wanted, initial=total.executions, unit="files", desc=name, mininterval=1) as bar:
            while total.executions < wanted:
                first = args.first + total.executions
                count = min(BATCH, wanted - total.executions)
                found = batch_in_child(name, target, first, count, args.seed, args.output)
                for what, where in found.failures.items():
                    if what not in total.failures:
                        data = damage(random.Random(f"{args.seed} {name} {where[0]}"), target.seeds)
                        Path(args.output, f"{name}-{args.seed}-{where[0]}").write_bytes(target.wrap(data))
                total = Progress(
                    total.executions + found.executions,
                    total.accepted + found.accepted,
                    total.refused + found.refused,
                    merged(total.failures, found.failures),
                    max(total.slowest, found.slowest),
                    max(total.growth, found.growth),
                    total.cpu + found.cpu,
                )
                with atomic_write(log) as part:
                    part.write_text(json.dumps(asdict(total)))
                bar.update(found.executions)
        for what, where in total.failures.items():
            print(f"{name}: {len(where)} x {what}; for one, execution {where[0]}", file=sys.stderr)
        failed = sum(map(len, total.failures.values()))
        counts = [total.executions, total.accepted, total.refused, failed]
        rate = total.executions / max(total.cpu, 1e-9)
        rows.append([name, *(f"{n:,}" for n in counts), f"{total.slowest:.2f}", f"{total.growth:.1f}", f"{rate:,.0f}"])
    header = ["Reader", "Executions", "Read", "Refused", "Failed", "Slowest (CPU s)", "Growth (MB)", "Files per CPU s"]
    print(table(header, rows))
    if any(row[4] != "0" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
