"""Outputs that appear whole or not at all."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fractal.base.cli import InputError
from fractal.base.storage import Place, Remote, check_output, place, upload

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room: on the disk, in the quota, for so large a file


@contextmanager
def atomic_write(path: str | Place) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, move it there, else remove it.

    Missing folders are made. File and folder are flushed to disk, so after a crash `path` is the old whole file, the
    new whole file, or nothing. What a killed run has left is removed by the next one that writes the same place. Of
    several runs that write it at once, the file is that of the last one to end. For a URI, the temporary path is one of
    this machine, and what was written there is uploaded.
    Raises InputError for a path that is something else than a file, such as a folder or /dev/null, and for a full disk.
    (`torch.save` must be given an open file for that: of its own ones it only says "iostream error".)
    """
    if isinstance(path, Remote):
        with tempfile.TemporaryDirectory(prefix="fractal-") as temporary:
            yield (part := Path(temporary, path.name))
            with upload(path) as target, open(part, "rb") as file:
                shutil.copyfileobj(file, target, 1 << 24)
        return
    check_file(path)
    with own_folder(path) as (path, folder):
        part = folder / "new"
        try:
            yield part
            flush(part)
            part.replace(path)
            flush(path.parent)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch hides a full disk
            if isinstance(cause, OSError) and (cause.errno is None or cause.errno in FULL):  # numpy gives no number
                reason = os.strerror(cause.errno).lower() if cause.errno else cause
                raise InputError(f"{path}: cannot be written ({reason}); make room") from error
            if isinstance(error, OSError) and error.filename in (
                None,
                str(part),
            ):  # neither Python nor Arrow says where
                error.filename = str(path)
            raise


@contextmanager
def atomic_stream(path: str | Place) -> Iterator[Any]:
    """The same for what is written from first byte to last: for a URI an open file, which is uploaded meanwhile."""
    with upload(path) if isinstance(path, Remote) else atomic_write(path) as target:
        yield target


@contextmanager
def atomic_folder(path: str | Path, names: Collection[str]) -> Iterator[Path]:
    """The same for a folder of files with these names: yield an empty one, which takes the place of `path`.

    The old folder is moved away before the new one takes its name. Where a run is killed between the two, the next one
    puts a whole folder there again (`recover`).
    Raises InputError, before and after the block, for a folder that holds anything else: that would be lost.
    """
    check_folder(path, names)
    with own_folder(path) as (path, folder):
        new, old = folder / "new", folder / "old"
        new.mkdir()
        try:
            yield new
            for file in (*new.iterdir(), new):
                flush(file)
            check_folder(path, names)
            if path.exists():
                path.replace(old)
            new.replace(path)
            flush(path.parent)
        finally:
            if old.exists() and not path.exists():
                old.replace(path)


def check_folder(path: str | Path, names: Collection[str]) -> None:
    """Raises InputError for a folder that can't be replaced by one with these files, since it holds something else."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is not a folder, so it can't be replaced by one; name another output")
    others = sorted(p.name for p in path.iterdir() if p.name not in names or not p.is_file()) if path.exists() else []
    if others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise InputError(f"{path}: holds what would be lost ({shown}); name another output, or move these files away")


Paths = Place | str | Sequence[Place | str] | None  # what one flag names; None and "" are flags that were not given


def check_paths(
    inputs: Mapping[str, Paths],
    outputs: Mapping[str, Paths],
    in_place: Collection[tuple[str, str]] = (),
    folders: Mapping[str, Paths] | None = None,
) -> None:
    """A script's declaration of what it reads and writes, by flag: {"--input": args.input, ...}.

    Inputs are files, URLs of the web (which no output can be) or folders, of which every file counts. `outputs` are
    files, `folders` are folders to write, on this machine. Pairs (output flag, input flag) of `in_place` may name the
    same file.
    Raises InputError for an output that is an input, or a file of an input folder; for an output folder that holds an
    input; for two outputs at one place; and for an output that can't be a file, or a folder, at all. Links count as
    what they lead to. Raises it as well for a name that is not UTF-8. To be called before any work is done.
    """
    sources, files, new_folders = real_paths(inputs), real_paths(outputs), real_paths(folders or {})
    for flag, path in sources + files + new_folders:
        if str(path) != str(path).encode(errors="replace").decode():
            raise InputError(f"{flag} {path}: its name is not UTF-8, which Parquet can't do without; rename it")
    for flag, path in files:
        check_file(path, f"{flag} ")
    for flag, path in new_folders:
        if isinstance(path, Remote):
            raise InputError(f"{flag} {path}: name a folder of this machine, and copy it when it is done")
        if path.exists() and not path.is_dir():
            raise InputError(f"{flag} {path}: is not a folder, so it can't be replaced by one; name another output")
    written = files + new_folders
    for i, (flag, path) in enumerate(written):
        for other, earlier in written[:i]:
            if same_place(path, earlier):
                raise InputError(f"{flag} {path}: is the output of {other} as well; name another one")
    for source_flag, source in sources:
        for flag, path in files:
            if same_place(path, source):
                if (flag, source_flag) not in in_place:
                    raise InputError(f"{flag} {path}: is the input of {source_flag}; name another output")
            elif is_below(path, source):
                raise InputError(f"{flag} {path}: is a file of {source_flag} {source}; name another output")
        for flag, path in new_folders:
            if isinstance(path, Path) and isinstance(source, Path) and source.exists() and source.is_relative_to(path):
                raise InputError(f"{flag} {path}: holds the input of {source_flag}, {source}; name another output")


def check_file(path: str | Place, flag: str = "") -> None:
    """Raises InputError for an output that is there and no file, such as a folder or /dev/null."""
    if isinstance(path, Remote):
        check_output(path, flag)
        return
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise InputError(f"{flag}{path}: is not a file, so it can't be replaced by one; name another output")


def real_paths(flags: Mapping[str, Paths]) -> list[tuple[str, Place]]:
    """(flag, path without links, or URI) for each path that a flag names. Raises InputError for a URI as a Path."""
    many = [(flag, [value] if isinstance(value, str | Place) else value or []) for flag, value in flags.items()]
    found = [(flag, name) for flag, names in many for name in names if str(name)]
    for flag, name in found:
        if isinstance(name, Path) and re.fullmatch("[a-z][a-z0-9+.-]+:", name.parts[0] if name.parts else ""):
            raise InputError(f"{flag} {name}: can't be at a URI; name a file or folder of this machine")
    web = re.compile("https?://")
    places = [(flag, Path(name) if isinstance(name, str) and web.match(name) else place(name)) for flag, name in found]
    return [(flag, path if isinstance(path, Remote) else Path(os.path.realpath(path))) for flag, path in places]


def same_place(one: Place, other: Place) -> bool:
    """Also where both are names (hard links) of one file."""
    if isinstance(one, Remote) or isinstance(other, Remote):
        return str(one) == str(other)
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def is_below(path: Place, folder: Place) -> bool:
    """Whether an output is a file of a folder; in a store, where a folder is no more than a name, or would be one."""
    if isinstance(path, Remote) or isinstance(folder, Remote):
        return str(path).startswith(f"{folder}/")
    return folder.is_dir() and path.exists() and any(path.samefile(file) for file in files_below(folder))


def files_below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (path for name in names if (path := Path(root, name)).exists())  # not: a link that leads nowhere


@contextmanager
def own_folder(path: str | Path) -> Iterator[tuple[Path, Path]]:
    """-> where `path` leads (a link stays a link), and a new folder beside it for this run alone, removed at the end.

    Its name is random. The file `lock` in it is locked for as long as this process lives, which the system sees to, on
    a shared folder also for other machines: process numbers say nothing there, nor between two containers.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        folder.mkdir()
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except FileNotFoundError:  # another run took the empty folder for a leftover
            continue
        with suppress(OSError):  # a file system without locks: there, leftovers stay
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "lock").exists():  # else another run was faster, as above
            break
        os.close(lock)
    try:
        yield path, folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def recover(path: str | Path) -> None:
    """Remove what killed runs that wrote `path` have left; a folder that they had moved away is put back first."""
    path = Path(os.path.realpath(path))
    leftover = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.part")
    for folder in path.parent.iterdir():
        if leftover.fullmatch(folder.name) and not folder.is_symlink() and (lock := lock_of_the_dead(folder)):
            for whole in (folder / "new", folder / "old"):  # `old` is there only where `new` is whole
                if (folder / "old").exists() and whole.exists() and not path.exists():
                    whole.replace(path)
            with suppress(OSError):  # it is another user's
                shutil.rmtree(folder)
            os.close(lock)


def lock_of_the_dead(folder: Path) -> int | None:
    """The lock of a run's folder, if that run has ended; None while it lives, or where this can't be told."""
    with suppress(OSError):
        folder.rmdir()  # killed before it had a lock
    lock = None
    try:
        lock = os.open(folder / "lock", os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if lock is not None:
            os.close(lock)
        return None
    return lock


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
