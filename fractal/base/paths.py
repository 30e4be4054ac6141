"""What a command reads and writes, checked before any work: no output may take the place of an input."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

from fractal.base.errors import InputError
from fractal.base.storage import Location, Remote, check_output, locate

Paths = Location | str | Sequence[Location | str] | None  # of one flag; None and "" where it was not given


def check_paths(
    inputs: Mapping[str, Paths],
    outputs: Mapping[str, Paths],
    in_place: Collection[tuple[str, str]] = (),
    folders: Mapping[str, Paths] | None = None,
) -> None:
    """A script's declaration of what it reads and writes, by flag; to be called before any work is done.

    inputs: {"--input": args.input, ...}, files, URLs of the web, or folders, of which every file counts; outputs:
    files; in_place: pairs (output flag, input flag) that may name the same file; folders: to write, on this machine.
    Raises InputError for an output that is an input, or a file of an input folder; for an output folder that holds an
    input; for two outputs with one path; for an output that can't be a file, or a folder, at all; for a name that is
    not UTF-8. Links count as what they lead to.
    """
    sources, files, new_folders = (real_paths(flags) for flags in (inputs, outputs, folders or {}))
    for flag, path in files:
        check_file(path, f"{flag} ")
    for flag, path in new_folders:
        check_folder(path, None, f"{flag} ")
    for (other, earlier), (flag, path) in combinations(files + new_folders, 2):
        if is_same(path, earlier):
            raise InputError(f"{flag} {path}: is the output of {other} as well; name another one")
    for (source_flag, source), (flag, path) in product(sources, files):
        if is_same(path, source) and (flag, source_flag) not in in_place:
            raise InputError(f"{flag} {path}: is the input of {source_flag}; name another output")
        if is_below(path, source):
            raise InputError(f"{flag} {path}: is a file of {source_flag} {source}; name another output")
    for (source_flag, source), (flag, path) in product(sources, new_folders):
        if isinstance(source, Path) and source.exists() and source.is_relative_to(str(path)):
            raise InputError(f"{flag} {path}: holds the input of {source_flag}, {source}; name another output")


def check_file(path: str | Location, flag: str = "") -> None:
    """Raises InputError for an output that is there and no file, such as a folder or /dev/null."""
    path = real_path(path)
    if isinstance(path, Remote):
        check_output(path, flag)
    if path.exists() and not path.is_file():
        raise InputError(f"{flag}{path}: is not a file, so it can't be replaced by one; name another output")


def check_folder(path: str | Location, names: Collection[str] | None, flag: str = "") -> None:
    """Raises InputError for an output that is there and no folder, or holds anything but files with these names."""
    path = real_path(path)
    if isinstance(path, Remote):
        raise InputError(f"{flag}{path}: name a folder of this machine, and copy it when it is done")
    if path.exists() and not path.is_dir():
        raise InputError(f"{flag}{path}: is not a folder, so it can't be replaced by one; name another output")
    files = path.iterdir() if path.exists() and names is not None else ()
    if others := sorted(file.name for file in files if file.name not in (names or ()) or not file.is_file()):
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise InputError(f"{path}: holds what would be lost ({shown}); name another output, or move these away")


def real_path(path: str | Location) -> Location:
    """Without links."""
    return path if isinstance(path, Remote) else Path(os.path.realpath(path))


def real_paths(flags: Mapping[str, Paths]) -> list[tuple[str, Location]]:
    """(flag, path without links, or URI) for each path that a flag names. Raises InputError for a URI as a Path."""
    many = [(flag, [value] if isinstance(value, str | Location) else value or []) for flag, value in flags.items()]
    paths: list[tuple[str, Location]] = []
    for flag, name in [(flag, name) for flag, names in many for name in names if str(name)]:
        if str(name) != str(name).encode(errors="replace").decode():
            raise InputError(f"{flag} {name}: its name is not UTF-8, which Parquet can't do without; rename it")
        if isinstance(name, Path) and re.fullmatch("[a-z][a-z0-9+.-]+:", name.parts[0] if name.parts else ""):
            raise InputError(f"{flag} {name}: can't be at a URI; name a file or folder of this machine")
        on_the_web = isinstance(name, str) and re.match("https?://", name)
        paths.append((flag, real_path(Path(str(name)) if on_the_web else locate(name))))
    return paths


def is_same(one: Location, other: Location) -> bool:
    """Also where both are names (hard links) of one file."""
    if isinstance(one, Remote) or isinstance(other, Remote):
        return str(one) == str(other)
    return one == other or (one.exists() and other.exists() and one.samefile(other))


def is_below(path: Location, folder: Location) -> bool:
    """Whether an output is a file of a folder; in a store, where a folder is no more than a name, or would be one."""
    if isinstance(path, Remote) or isinstance(folder, Remote):
        return str(path).startswith(f"{folder}/")
    below = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return path.exists() and any(file.exists() and path.samefile(file) for file in below)  # a link may lead nowhere
