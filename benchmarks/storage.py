"""What does it cost to read an atlas from an S3 server instead of from disk?

    uv run python -m benchmarks.storage

A folder of Parquet files, vectors and labels, is read three ways in turn: from disk; from a server on this machine
(moto's, in a process of its own); and as the same requests once more, sent bare, their answers thrown away. That is the
server's own time. Overhead is (store - server) / disk. moto is one process of Python that copies a whole object for
each request, so its own time is long; files of 34 MB keep that in proportion.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any
from urllib.error import HTTPError

import numpy as np

from fractal.base.errors import run
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas
from fractal.data.parquet import ROW_GROUP, Parquet, atlas_table, write_tables

DIM, SUBTYPES, BUCKET = 128, 203, "cells"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=positive_int, default=2_000_000, help="512 bytes each (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="(default: %(default)s)")
    parser.add_argument("--serve", type=Path, metavar="LOG", help=argparse.SUPPRESS)  # in a process of its own
    return parser


def serve(log: Path) -> None:
    """Print the port, and serve until the process is ended; a line of `log` for each request."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    WSGIRequestHandler.log = lambda *_: None  # type: ignore[method-assign]
    app = DomainDispatcherApplication(create_backend_app)

    def logged(environ: dict[str, Any], start: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if method in ("GET", "HEAD"):
            print(json.dumps([method, f"{path}?{environ['QUERY_STRING']}", environ.get("HTTP_RANGE")]), file=lines)
        return app(environ, start)

    with open(log, "w", buffering=1, encoding="utf-8") as lines:
        server = make_server("127.0.0.1", 0, logged, threaded=True)
        print(server.port, flush=True)
        server.serve_forever()


@contextmanager
def server(log: Path) -> Iterator[str]:
    argv = [sys.executable, "-m", "benchmarks.storage", "--serve", str(log)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


def write_atlas(folder: Path, cells: int) -> None:
    """A file for each row group of random vectors and labels."""
    rng = np.random.default_rng(0)
    names = [f"type {i:03}" for i in range(SUBTYPES)]
    for part, start in enumerate(range(0, cells, ROW_GROUP)):
        n = min(ROW_GROUP, cells - start)
        table = atlas_table(rng.standard_normal((n, DIM), np.float32), [(rng.integers(0, SUBTYPES, n), names)] * 4)
        write_tables(folder / f"part-{part:05}.parquet", [table], {})


def read_all(path: str) -> int:
    """All columns -> bytes of the vectors."""
    return sum(t["embedding"].nbytes for t in Parquet.open(path).tables())


def send_again(url: str, requests: list[str]) -> int:
    """As many at a time as reading has under way."""

    def send(line: str) -> int:
        method, path, some = json.loads(line)
        request = urllib.request.Request(url + path, method=method, headers={"Range": some} if some else {})
        total = 0
        with suppress(HTTPError), urllib.request.urlopen(request) as answer:  # 404: is there a file atlas? No
            while piece := answer.read(1 << 20):
                total += len(piece)
        return total

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(send, requests))


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.serve:
        serve(args.serve)
        return
    import boto3

    with tempfile.TemporaryDirectory() as temporary, server(log := Path(temporary, "requests")) as url:
        os.environ |= {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        folder = Path(temporary, "atlas")
        write_atlas(folder, args.cells)
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET, ACL="public-read")
        names = sorted(file.name for file in folder.iterdir())
        for name in names:
            client.upload_file(str(folder / name), BUCKET, f"atlas/{name}", ExtraArgs={"ACL": "public-read"})
        done = len(log.read_text().splitlines())
        read_all(f"s3://{BUCKET}/atlas")  # connects
        requests = log.read_text().splitlines()[done:]
        ways: dict[str, Callable[[], int]] = {
            "disk": lambda: read_all(str(folder)),
            "server": lambda: send_again(url, requests),
            "store": lambda: read_all(f"s3://{BUCKET}/atlas"),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, read in ways.items():
                began, used = time.perf_counter(), time.process_time()
                size = read()
                seconds[way].append(time.perf_counter() - began)
                cpu[way].append(time.process_time() - used)
                assert size >= 4 * DIM * args.cells, way
        first = next(Atlas.open(f"s3://{BUCKET}/atlas").vectors())
        assert np.array_equal(first, next(Atlas.open(str(folder)).vectors()))
    rows = [
        [way, *(f"{value:.2f}" for value in (min(seconds[way]), median(seconds[way]), median(cpu[way])))]
        for way in ways
    ]
    overhead = [(s - h) / d for d, h, s in zip(*seconds.values(), strict=True)]
    rows.append(["(store - server) / disk", f"{min(overhead):.2f}", f"{median(overhead):.2f}", ""])
    gb = 4 * DIM * args.cells / 1e9
    print(f"{gb:.1f} GB in {len(names)} files, {len(requests)} requests; {args.repeats} times, in turn\n")
    print(table(["Seconds", "Best", "Median", "CPU of this process"], rows))


if __name__ == "__main__":
    run(main)
