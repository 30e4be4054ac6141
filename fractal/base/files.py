"""Outputs that appear whole or not at all, one writer at a time; and folders read as one run wrote them."""

import errno
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from fractal.base.errors import InputError
from fractal.base.paths import check_file, check_folder, real_path
from fractal.base.storage import Location, Remote, stamp, upload

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room: on the disk, in the quota, for so large a file
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of a file system without them
LOCK = ".{}.lock"  # beside a file or folder
MAX_HEADER = 1 << 20  # bytes, for thousands of arrays
READS = 5  # attempts to read a folder that is being replaced
T = TypeVar("T")
P = TypeVar("P", bound=Location)
_locked: dict[Location, tuple[int, Any]] = {}  # path -> the thread that holds it, and its stamp when it was locked


@contextmanager
def locked(path: str | Location) -> Iterator[None]:
    """No other run writes the file or folder `path` meanwhile: enter it before reading what is to be changed.

    A second run waits, with a line on stderr. The same thread may enter it again, as `atomic_write` and `atomic_folder`
    do, which leave what another program has changed since: all that protects a URI, and a file system without locks.
    """
    path = real_path(path)
    if _locked.get(path, (None,))[0] == threading.get_ident():
        yield
        return
    with nullcontext() if isinstance(path, Remote) else file_lock(path):
        _locked[path] = threading.get_ident(), stamp(path)
        try:
            yield
        finally:
            _locked.pop(path, None)


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of the file .NAME.lock beside `path`, which the system releases when a process ends.

    What killed runs have left is removed. Where another run holds it, this waits, or raises an error.
    """
    from filelock import FileLock, SoftFileLock, Timeout  # a tenth of a second, which --help need not wait for

    name = path.with_name(LOCK.format(path.name))
    lock = FileLock(name, timeout=1 if wait else 0, thread_local=False)
    with naming_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            if not wait:
                raise
            print(f"{path}: another run is writing it; waiting until that has ended", file=sys.stderr, flush=True)
            lock.acquire(timeout=-1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            name.unlink(missing_ok=True)
        else:
            restore(path)  # without locks, leftovers stay: they might be in use
    try:
        yield
    finally:
        if lock.is_locked and not isinstance(lock, SoftFileLock):  # a soft one removes its file
            name.unlink(missing_ok=True)  # who waits for it sees that it has lost its name
        lock.release()


def check_unchanged(path: Location) -> None:
    """Raises InputError where another program has written `path` since this one locked it."""
    if path in _locked and stamp(path) != _locked[path][1]:
        raise InputError(f"{path}: another program has changed it meanwhile; it is left like that, run this again")


def read_whole(path: P, read: Callable[[P], T]) -> T:
    """What `read` makes of a folder, all of whose files it opens, or of a file that it opens more than once.

    Where another run has replaced `path` meanwhile, `read` is called again. Raises what `read` does, and InputError
    for links that leave the folder, and where it never sees the same files from first to last.
    """
    for _ in range(READS):
        recover(path)
        before = stamp(path)
        between_renames = not before and isinstance(path, Path) and any(leftovers(path))
        try:
            refuse_links(path)
            result = read(path)
        except (InputError, OSError):
            if stamp(path) == before and not between_renames:
                raise
        else:
            if stamp(path) == before:
                return result
        time.sleep(0.1)
    raise InputError(f"{path}: is being replaced again and again; read it when that has ended")


def refuse_links(folder: Location) -> None:
    """Raises InputError for a link to another file of this machine, which would be shown as a part of the folder."""
    if isinstance(folder, Path) and folder.is_dir():
        for file in folder.rglob("*"):
            if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{file}: is a link that leaves its folder; put the file itself there")


def check_header(path: Path) -> None:
    """Raises ValueError for a safetensors file whose table of contents alone would take gigabytes to read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its table of contents takes {length:,} bytes")


@contextmanager
def atomic_write(path: str | Location) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, move it there, else remove it.

    Missing folders are made. After a crash `path` is the old whole file, the new one, or nothing; what a killed run has
    left is removed by the next one. Runs that write it at once take turns (`locked`). For a URI, the temporary path is
    one of this machine, whose contents are uploaded.
    Raises InputError for a path that is no file, for a full disk, and where another program has written it meanwhile.
    (Give `torch.save` an open file: of one that it opens it only says "iostream error".)
    """
    if isinstance(path, Remote):
        with tempfile.TemporaryDirectory(prefix="fractal-") as temporary, locked(path):
            with naming_errors(Path(temporary)):
                yield (part := Path(temporary, path.name))
            check_unchanged(path)
            with upload(path) as target, open(part, "rb") as file:
                shutil.copyfileobj(file, target, 1 << 24)
        return
    check_file(path)
    with part_folder(path) as (path, folder):
        yield (part := folder / "new")
        flush(part)
        check_unchanged(path)
        part.replace(path)
        flush(path.parent)


@contextmanager
def atomic_stream(path: str | Location) -> Iterator[Any]:
    """The same for what is written from first byte to last: for a URI an open file, which is uploaded meanwhile."""
    if isinstance(path, Remote):
        with locked(path), upload(path) as target:
            yield target
            check_unchanged(path)
    else:
        with atomic_write(path) as part:
            yield part


@contextmanager
def atomic_folder(path: str | Path, names: Collection[str]) -> Iterator[Path]:
    """The same for a folder of files with these names: yield an empty one, which replaces `path`.

    The old folder is moved away before the new one takes its name. Where a run is killed between the two, the next one
    puts a whole folder there again (`recover`).
    Raises InputError, before and after the block, for a folder that holds anything else: that would be lost.
    """
    check_folder(path, names)
    with part_folder(path) as (path, folder):
        new, old = folder / "new", folder / "old"
        new.mkdir()
        try:
            yield new
            for file in (*new.iterdir(), new):
                flush(file)
            check_folder(path, names)
            check_unchanged(path)
            if path.exists():
                path.replace(old)
            new.replace(path)
            flush(path.parent)
        finally:
            if old.exists() and not path.exists():
                old.replace(path)


@contextmanager
def part_folder(path: str | Path) -> Iterator[tuple[Path, Path]]:
    """-> where `path` leads (a link stays a link), and a new folder beside it for this run, removed at the end."""
    path = Path(os.path.realpath(path))
    with naming_errors(path), locked(path):
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
        try:
            yield path, folder
            _locked[path] = threading.get_ident(), stamp(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Errors of temporary files name `path`. Raises InputError for a full disk."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch hides a full disk
        by_hdf5 = re.search(r"errno = (\d+)", str(error))  # in its text only
        number = int(by_hdf5[1]) if by_hdf5 else cause.errno if isinstance(cause, OSError) else None
        by_numpy = isinstance(cause, OSError) and re.search(r"requested and \d+ written", str(cause))  # it has no errno
        if number in FULL or by_numpy:
            reason = os.strerror(number).lower() if number else cause
            raise InputError(f"{path}: cannot be written ({reason}); make room") from error
        if isinstance(error, OSError):  # neither Python nor Arrow names the file of a failing write
            where = str(error.filename or "")
            if not where or where.startswith(str(path.with_name(f".{path.name}."))):
                error.filename = str(path)
        raise


def restore(path: Path) -> None:
    """Remove what killed runs that wrote `path` have left; a folder that they had moved away is put back first."""
    for folder in leftovers(path):
        new, old = folder / "new", folder / "old"
        if old.exists() and not path.exists():
            (new if new.exists() else old).replace(path)  # `old` is there only where `new` is whole
        shutil.rmtree(folder, ignore_errors=True)  # it may be another user's


def leftovers(path: Path) -> Iterator[Path]:
    """The folders of runs that write `path`, or were killed when they did."""
    name = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}\.part")
    for folder in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        if name.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink():
            yield folder


def recover(path: str | Location) -> None:
    """For readers: as `restore`, unless a run is writing `path`."""
    path = real_path(path)
    if not isinstance(path, Remote) and (path.with_name(LOCK.format(path.name)).exists() or any(leftovers(path))):
        with suppress(OSError, InputError), file_lock(path, wait=False):  # a run that lives, or another user's folder
            pass


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
