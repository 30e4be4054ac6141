"""Outputs that appear whole or not at all."""

import ctypes
import errno
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fractal.cli import InputError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room: on the disk, in the quota, for so large a file


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, move it there, else remove it.

    Missing folders are made. File and folder are flushed to disk, so after a crash `path` is the old whole file, the
    new whole file, or nothing. What a killed run has left is removed by the next one that writes the same place.
    Raises InputError for a path that is something else than a file, such as a folder or /dev/null, and for a full disk.
    (`torch.save` must be given an open file for that: of its own ones it only says "iostream error".)
    """
    check_output(path)
    path, part = beside(path)
    try:
        yield part
        flush(part)
        part.replace(path)
        flush(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch hides a full disk behind its own
        if isinstance(cause, OSError) and (
            cause.errno is None or cause.errno in FULL
        ):  # numpy only says how far it got
            reason = os.strerror(cause.errno).lower() if cause.errno else cause
            raise InputError(f"{path}: cannot be written ({reason}); make room") from error
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # neither Python nor Arrow says where
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: yield an empty one, which takes the place of `path` when the block ends well.

    On Linux in one step; elsewhere a run killed between two renames leaves nothing, and the next run the new one.
    """
    path, part = beside(path)
    new, old = part / "new", part / "old"
    new.mkdir(parents=True)
    try:
        yield new
        for file in (*new.iterdir(), new):
            flush(file)
        if path.exists() and not exchange(new, path):
            path.replace(old)
        if new.exists() and not path.exists():
            new.replace(path)
        flush(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(part, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step -> whether this system can: Python has no call for Linux's."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


Paths = Path | str | Sequence[Path | str] | None  # what one flag names; None and "" are flags that were not given


def check_paths(
    inputs: Mapping[str, Paths],
    outputs: Mapping[str, Paths],
    in_place: Collection[tuple[str, str]] = (),
    folders: Mapping[str, Paths] | None = None,
) -> None:
    """A script's declaration of what it reads and writes, by flag: {"--input": args.input, ...}.

    Inputs are files, URLs (which no output can be) or folders, of which every file counts. `outputs` are files,
    `folders` are folders to write. Pairs (output flag, input flag) of `in_place` may name the same file.
    Raises InputError for an output that is an input, or a file of an input folder; for an output folder that holds an
    input; for two outputs at one place; and for an output that can't be a file, or a folder, at all. Links count as
    what they lead to. To be called before any work is done.
    """
    files, new_folders = real_paths(outputs), real_paths(folders or {})
    for flag, path in files:
        if path.exists() and not path.is_file():
            raise InputError(f"{flag} {path}: is not a file, so it can't be replaced by one; name another output")
    for flag, path in new_folders:
        if path.exists() and not path.is_dir():
            raise InputError(f"{flag} {path}: is not a folder, so it can't be replaced by one; name another output")
    written = files + new_folders
    for i, (flag, path) in enumerate(written):
        for other, earlier in written[:i]:
            if same_place(path, earlier):
                raise InputError(f"{flag} {path}: is the output of {other} as well; name another one")
    for source_flag, source in real_paths(inputs):
        for flag, path in files:
            if same_place(path, source):
                if (flag, source_flag) not in in_place:
                    raise InputError(f"{flag} {path}: is the input of {source_flag}; name another output")
            elif source.is_dir() and path.exists() and any(path.samefile(file) for file in files_below(source)):
                raise InputError(f"{flag} {path}: is a file of {source_flag} {source}; name another output")
        for flag, path in new_folders:
            if source.exists() and source.is_relative_to(path):
                raise InputError(f"{flag} {path}: holds the input of {source_flag}, {source}; name another output")


def real_paths(flags: Mapping[str, Paths]) -> list[tuple[str, Path]]:
    """(flag, path without links) for each path that a flag names."""
    many = [(flag, [value] if isinstance(value, str | Path) else value or []) for flag, value in flags.items()]
    return [(flag, Path(os.path.realpath(path))) for flag, paths in many for path in paths if str(path)]


def same_place(one: Path, other: Path) -> bool:
    """Also where both are names (hard links) of one file."""
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def files_below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (path for name in names if (path := Path(root, name)).exists())  # not: a link that leads nowhere


def check_output(path: str | Path, *inputs: Path | None) -> None:
    """Raises InputError for an output that can't be a file, or is an input: a script says so before it works for it."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a file, so it can't be replaced by one; name another output")
    if path.exists() and any(source and source.exists() and path.samefile(source) for source in inputs):
        raise InputError(f"{path}: is the input; name another output")


def beside(path: str | Path) -> tuple[Path, Path]:
    """-> where `path` leads (a link stays a link), and a temporary path beside it, whose folder is made and tidied."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    return path, path.with_name(f".{path.name}.{os.getpid()}.part")


def remove_leftovers(path: Path) -> None:
    """Of runs that wrote `path` and were killed."""
    for left in path.parent.iterdir():
        if (pid := part_of(left.name, path.name)) and not is_running(pid):
            with suppress(OSError):  # another run was faster, or it is another user's
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def part_of(name: str, output: str) -> int:
    """The process that wrote `name` as its temporary file for `output`; 0 for any other file."""
    pid = name.removeprefix(f".{output}.").removesuffix(".part")
    return int(pid) if name == f".{output}.{pid}.part" and pid.isdecimal() and pid.isascii() else 0


def is_running(pid: int) -> bool:
    """Of a process on this machine. A number that was given to a new process counts as running: nothing is lost."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    return True


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
