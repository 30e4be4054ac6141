"""Where files are: on this machine, or at a URI of a store, such as s3://bucket/cells.parquet or gs://bucket/folder.

Reading is Arrow's (s3, gs, abfs, hdfs), or fsspec's where Arrow has no such file system. Writing, to s3 and gs, is
fsspec's: it can give up an upload half-way, while an output stream of Arrow that is dropped becomes half an object.
Keys, regions and endpoints come from where other tools have them (AWS_PROFILE, AWS_ENDPOINT_URL, ...). A URI may name
them as well, as Arrow's do: s3://bucket/cells.parquet?endpoint_override=localhost:9000&scheme=http
"""

from __future__ import annotations

import atexit
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from fractal.base.errors import InputError, needs, reason
from fractal.base.prefetch import prefetch_calls

if TYPE_CHECKING:  # --help needs none of it
    from pyarrow.fs import FileInfo, FileSystem

PIECE = 8 << 20  # bytes of one request
PIECES = 8  # requests under way: one alone is far slower than the network
TIMEOUT = 60  # seconds without a byte from a web server
UPLOAD = 32 << 20  # bytes of a part of an upload; a store takes 10,000 of them
WRITERS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gs")}  # scheme -> package, extra


@dataclass(frozen=True)
class Remote:
    """A file or folder at a URI, with what is used here of pathlib.Path.

    It is no os.PathLike: code that can only open files of this machine fails, and never takes "s3:/..." for one.
    """

    scheme: str
    host: str  # bucket, with a key and a password where the URI names them
    path: str  # begins with / unless it is empty
    query: str = ""

    name = property(lambda self: PurePosixPath(self.path).name)
    stem = property(lambda self: PurePosixPath(self.path).stem)
    suffix = property(lambda self: PurePosixPath(self.path).suffix)
    bucket = property(lambda self: self.host.rpartition("@")[2])

    def __str__(self) -> str:
        """Without keys and options."""
        return f"{self.scheme}://{self.bucket}{self.path}"

    @property
    def parent(self) -> Remote:
        return replace(self, path=str(PurePosixPath(self.path).parent).rstrip("/"))

    def with_name(self, name: str) -> Remote:
        return replace(self, path=str(PurePosixPath(self.path).with_name(name)))

    def __truediv__(self, name: str) -> Remote:
        return replace(self, path=f"{self.path}/{name}".rstrip("/"))

    def resolve(self) -> Remote:
        return self

    def unlink(self, missing_ok: bool = False) -> None:
        if self.exists() or not missing_ok:
            with store_errors(self, "removed"):
                files, inner = file_system(self)
                files.delete_file(inner)

    @property
    def info(self) -> FileInfo:
        """Size, time and kind. Raises InputError where the store does not answer, or denies it."""
        with store_errors(self):
            files, inner = file_system(self)
            return files.get_file_info(inner)

    def exists(self) -> bool:
        return self.info.type.name != "NotFound"

    def is_file(self) -> bool:
        return self.info.is_file

    def is_dir(self) -> bool:
        return self.info.type.name == "Directory"


Location = Path | Remote


@dataclass(frozen=True)
class Web(Remote):
    """A file at an https:// address, read as a whole; its sha256, known before, says that it is the right one."""

    sha256: str = ""

    @property
    def info(self) -> FileInfo:
        from pyarrow.fs import FileInfo, FileType

        return FileInfo(self.path, FileType.File)

    def pieces(self) -> Iterator[bytes]:
        """All bytes in order. Raises InputError, after the last, for another file."""
        from urllib.request import urlopen  # which --help need not wait for

        digest, query = hashlib.sha256(), f"?{self.query}" if self.query else ""
        with store_errors(self), urlopen(f"{self}{query}", timeout=TIMEOUT) as file:
            while piece := file.read(PIECE):
                digest.update(piece)
                yield piece
        if digest.hexdigest() != self.sha256:
            raise InputError(f"{self}: has the sha256 {digest.hexdigest()}, not {self.sha256}; it is not the same file")


def locate_shared(name: str | Location, sha256: str | None = None) -> Location:
    """Where a reference is: as `locate`, or an https:// address with the file's sha256, as URL#sha256=HEX; a type.

    Raises InputError for another address of the web, and one without sha256.
    """
    if not isinstance(name, str) or not re.match("https?://", name, re.IGNORECASE):
        if sha256:
            raise InputError(f"{name}: a sha256 goes with an https:// address; sha256sum checks a file that is here")
        return locate(name)
    address, _, given = name.partition("#sha256=")
    digest = (sha256 or given).casefold()
    parts = re.fullmatch(r"https://([^/?#]+)(/[^?#]*)(?:\?([^#]*))?", address, re.IGNORECASE)
    if not parts or not re.fullmatch("[0-9a-f]{64}", digest):
        raise InputError(f"{name}: a reference is read from an https:// address with its sha256: URL#sha256=64 digits")
    return Web("https", parts[1], parts[2], parts[3] or "", digest)


def locate(name: str | Path | Remote) -> Location:
    """A path, or a Remote for text such as s3://bucket/key; an argparse type.

    Raises InputError for a URI of the web, one without a bucket, one with an empty name in it, and for no name at all;
    TypeError for what is no path.
    """
    if isinstance(name, Path | Remote):
        return name
    if not isinstance(name, str):
        raise TypeError(f"expected a path or a URI, not {type(name).__name__}")
    if not name:
        raise InputError("a name is empty; give a path or a URI")
    parts = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/?]*)(/[^?]*)?(?:\?(.*))?", name, re.DOTALL)
    if not parts:
        return Path(name)
    scheme, host, path, query = (part or "" for part in parts.groups())
    scheme = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}.get(scheme.lower(), scheme.lower())
    if scheme == "file":
        return Path(path)
    if scheme in ("http", "https"):
        raise InputError(f"{name}: cells are not read from a web page; download the file first")
    if scheme in WRITERS and not host:
        raise InputError(f"{name}: names no bucket; it is {scheme}://bucket/name")
    if "//" in path.rstrip("/"):
        raise InputError(f"{name}: has an empty name between two slashes; write one slash, or rename the object")
    return Remote(scheme, host, path.rstrip("/"), query)


@contextmanager
def store_errors(path: Location, verb: str = "read") -> Iterator[None]:
    """Turn the errors of a store into one line that names the URI. On this machine, errors stay what they are."""
    try:
        yield
    except (InputError, ValueError):  # ValueError: Arrow's for damaged data
        raise
    except Exception as error:  # of any class: Arrow's, OSError, botocore's, aiohttp's
        if isinstance(path, Path):
            raise
        message = reason(error.__cause__ if error.__cause__ and not str(error) else error)
        raise InputError(
            f"{path}: cannot be {verb}, its store says: {message}; "
            "check the name, the credentials and the endpoint, or try again later"
        ) from error


def file_system(path: Location) -> tuple[FileSystem, str]:
    """-> Arrow's file system, and what `path` is called in it."""
    if isinstance(path, Path):
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(use_mmap=True), os.path.realpath(path)
    files, root = connect(path.scheme, path.host, path.query, os.environ.get("AWS_ENDPOINT_URL"))
    return files, f"{root.rstrip('/')}{path.path}"


@lru_cache(maxsize=8)  # one pool of connections for a bucket
def connect(scheme: str, host: str, query: str, _: str | None) -> tuple[FileSystem, str]:
    import pyarrow as pa
    import pyarrow.fs as pa_fs

    uri, shown = f"{scheme}://{host}", f"{scheme}://{host.rpartition('@')[2]}"
    try:
        return pa_fs.FileSystem.from_uri(uri + (f"?{query}" if query else ""))
    except pa.ArrowInvalid as error:
        if "nrecognized" not in str(error):
            raise InputError(f"{shown}: not a URI of a store ({reason(error)})") from error
    import fsspec

    try:
        files, root = fsspec.url_to_fs(uri)
    except Exception as error:  # of any class
        raise InputError(f"{uri}: files of {scheme}:// can't be read ({reason(error)}); s3:// and gs:// can") from error
    return pa_fs.PyFileSystem(pa_fs.FSSpecHandler(files)), root


def open_random(path: Location) -> Any:
    """What h5py and numpy read from: the path itself, or a file of the store with 1 MB of it in memory."""
    if isinstance(path, Path):
        return path
    with store_errors(path):
        files, inner = file_system(path)
        return io.BufferedReader(files.open_input_file(inner), 1 << 20)


def pieces(path: Location) -> Iterator[bytes]:
    """All bytes of a file in order, with several requests under way."""
    if isinstance(path, Web):
        yield from path.pieces()
        return
    with store_errors(path):
        files, inner = file_system(path)
        with files.open_input_file(inner) as file:
            starts = range(0, file.size(), PIECE)
            yield from prefetch_calls((partial(file.read_at, PIECE, start) for start in starts), PIECES)


def listed(path: Location, recursive: bool) -> list[FileInfo]:
    """A file, or what is in a folder, sorted."""
    from pyarrow.fs import FileSelector

    with store_errors(path):
        files, inner = file_system(path)
        info = files.get_file_info(inner)
        infos = [info] if info.is_file else files.get_file_info(FileSelector(inner, recursive=recursive))
    return sorted(infos, key=lambda info: info.path)


def names_below(path: Location) -> list[str]:
    """The files of a folder and of the folders in it, sorted, by their names from there on; [""] for a file.

    Without the hidden ones: those that begin with . or _, and those in folders that do.
    """
    start = len(file_system(path)[1])
    names = [info.path[start:].strip("/") for info in listed(path, recursive=True) if info.is_file]
    return [name for name in names if not re.search(r"(^|/)[._]", name)]


def download(path: Location, target: Path) -> None:
    """Copy a file to one of this machine."""
    if isinstance(path, Path):
        shutil.copyfile(path, target)
        return
    with open(target, "wb") as file:
        file.writelines(pieces(path))


def fetch(path: Location, names: tuple[str, ...] | None = None) -> Path:
    """The same file or folder on this machine: itself, or a temporary copy that lives as long as this process.

    `names`: of a folder, these files only. For what must be mapped into memory, and for small files. Raises InputError
    for what is not there.
    """
    return path if isinstance(path, Path) else copied(path, names, stamp(path))


@lru_cache
def copied(path: Remote, names: tuple[str, ...] | None, _: tuple[Any, ...]) -> Path:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    folder = Path(tempfile.mkdtemp(prefix="fractal-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / path.name
    if path.is_file():
        download(path, target)
        return target
    for name in names_below(path) if names is None else names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (path / name).is_file():  # else whoever reads it says what is missing
            download(path / name, target / name)
    return target


def scratch(output: Location) -> Path | None:
    """The folder for temporary files: beside an output; the system's where that is at a URI (TMPDIR names another)."""
    return output.parent if isinstance(output, Path) else None


def stamp(path: Location) -> tuple[Any, ...]:
    """Changes with a file, or with any file of a folder: sizes and times. Empty where there is none."""
    if isinstance(path, Web):
        return (path.sha256,)
    if not path.exists():
        return ()
    return tuple((info.path, info.size, info.mtime_ns) for info in listed(path, recursive=True) if info.is_file)


def same_files(path: Location) -> Callable[[], None]:
    """-> a check, which raises InputError where a file of `path` has been replaced since now."""
    before = stamp(path)

    def check() -> None:
        if stamp(path) != before:
            raise InputError(f"{path}: has been replaced while it was read; run this again")

    return check


def writer(path: Remote) -> tuple[Any, str]:
    """-> fsspec's file system, and what `path` is called in it. Raises InputError where nothing is written."""
    if path.scheme not in WRITERS:
        raise InputError(f"{path}: is not written to; name an output on this machine, at s3:// or at gs://")
    import fsspec

    needs(*WRITERS[path.scheme])
    return fsspec.filesystem(path.scheme, **fsspec_options(path)), f"{path.bucket}{path.path}"


def fsspec_options(path: Remote) -> dict[str, Any]:
    """The options of a URI, as s3fs and gcsfs take them."""
    options, given, key = dict[str, Any](), dict(parse_qsl(path.query)), path.host.rpartition("@")[0]
    if endpoint := given.get("endpoint_override"):
        options["endpoint_url"] = f"{given.get('scheme', 'https')}://{endpoint}"
    if path.scheme == "s3":
        if key:
            options["key"], options["secret"] = key.split(":", 1)
        if region := given.get("region"):
            options["client_kwargs"] = {"region_name": region}
    elif key == "anonymous":
        options["token"] = "anon"
    return options


def check_output(path: Remote, flag: str = "") -> None:
    """Raises InputError for an output that can't be written, before any work: a folder, a bucket that is not there."""
    if not path.name:
        raise InputError(f"{flag}{path}: names no file; name one in it")
    writer(path)
    if not replace(path, path="").exists():
        raise InputError(f"{flag}{path}: there is no bucket {path.bucket}; make it first")


@contextmanager
def upload(path: Remote) -> Iterator[IO[bytes]]:
    """Yield a file to write to; the object is there, whole, when the block has ended well.

    After an error and Ctrl-C the parts that the store has are given up, and an old object stays. (A process that is
    killed leaves parts that no listing shows; a lifecycle rule of the bucket removes them.)
    """
    with store_errors(path, "written"):
        files, inner = writer(path)
        file = files.open(inner, "wb", block_size=UPLOAD, autocommit=False)
    try:
        # Ctrl-C waits here for the store's answer, which names the upload: without it nothing could be given up.
        with store_errors(path, "written"), ThreadPoolExecutor(1) as thread:
            thread.submit(file._initiate_upload).result()
        file.offset = 0  # fsspec's mark of an upload that has begun
        yield file
        with store_errors(path, "written"):
            file.close()  # sends the last part
            file.commit()
    except BaseException:
        with suppress(Exception):  # the store may be out of reach
            file.discard()
        file.closed = True  # else it would send the rest when it is collected
        raise


def tiledb_config(path: Location) -> dict[str, str]:
    """TileDB's options to reach the same store."""
    if isinstance(path, Path) or path.scheme != "s3":
        return {}
    given = dict(parse_qsl(path.query))
    scheme, _, endpoint = os.environ.get("AWS_ENDPOINT_URL", "").rpartition("://")
    endpoint = given.get("endpoint_override", endpoint)
    options = {
        "endpoint_override": endpoint,
        "scheme": given.get("scheme", scheme or "https"),
        "region": given.get("region", os.environ.get("AWS_DEFAULT_REGION", "")),
        "use_virtual_addressing": "false" if endpoint else "",
    }
    return {f"vfs.s3.{key}": value for key, value in options.items() if value}


def zarr_store(path: Location) -> Any:
    """What zarr.open_group takes: a path, or a store of fsspec's."""
    if isinstance(path, Path):
        return path
    if path.scheme in WRITERS:
        needs(*WRITERS[path.scheme])
    store = needs("zarr", "zarr").storage.FsspecStore
    return store.from_url(str(path), storage_options=fsspec_options(path), read_only=True)
