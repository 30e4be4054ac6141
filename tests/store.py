"""An S3 server on this machine, by moto, that fails on demand: for the tests and benchmarks of
fractal/base/storage.py."""

import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

ERRORS = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}


class Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        pass


class Store:
    """A WSGI application in front of moto's. The next requests of the methods `of` get what `faults` says.

    A fault is a status, "drop" (the connection is closed at once), "cut" (after half the answer), or "late" (what is
    asked is done, the answer takes a second). With `forever` the last one stays.
    """

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.faults: list[int | str] = []
        self.of: tuple[str, ...] = ("GET", "PUT", "POST")
        self.forever = False
        self.requests: list[tuple[str, str, int | str | None]] = []  # method, path, fault
        self.lock = threading.Lock()

    def fail(self, *faults: int | str, of: tuple[str, ...] = ("GET", "PUT", "POST"), forever: bool = False) -> None:
        self.faults, self.of, self.forever = list(faults), of, forever

    def next_fault(self, method: str) -> int | str | None:
        with self.lock:
            if not self.faults or method not in self.of:
                return None
            return self.faults[0] if self.forever and len(self.faults) == 1 else self.faults.pop(0)

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        fault = self.next_fault(environ["REQUEST_METHOD"])
        self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], fault))
        if isinstance(fault, int):
            start(f"{fault} {ERRORS[fault]}", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{ERRORS[fault]}</Code><Message>as the test says</Message></Error>".encode()]
        if fault in (None, "late"):
            answer = self.app(environ, start)
            if fault:
                time.sleep(1)
            return answer
        begun: list[Any] = []
        whole = b"".join(self.app(environ, lambda *said: begun.append(said)))

        def half() -> Iterator[bytes]:
            yield whole[: len(whole) // 2] if fault == "cut" else b""
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)

        start(*begun[0][:2])
        return half()


@contextmanager
def serve(store: Store) -> Iterator[str]:
    """Yield the server's address, such as http://127.0.0.1:41234; the server ends with the block."""
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def client() -> Any:
    """boto3's, for the store that AWS_ENDPOINT_URL names: what the tests look with."""
    return boto3.client("s3")
