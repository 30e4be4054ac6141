"""A folder of files in one .zip, so that it can be sent and published; read again without trust in who made it.

The files are not compressed: vectors hardly get smaller. So no archive holds more than its own size, and the same files
make the same archive, byte for byte.
"""

import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo, is_zipfile

from fractal.base.errors import InputError, reason
from fractal.base.files import atomic_write
from fractal.base.storage import Location, Web

READABLE = 0o644 << 16  # for who unpacks it by hand


def is_archive(path: Location) -> bool:
    """Whether there is one file, or is to be one, and no folder."""
    return isinstance(path, Web) or (path.suffix.casefold() == ".zip" and not path.is_dir())


def write_archive(path: Path, files: Mapping[str, bytes]) -> None:
    """Write files, name -> content, whole or not at all."""
    with atomic_write(path) as part, ZipFile(part, "w") as archive:
        for name, content in files.items():
            info = ZipInfo(name)  # of 1980: no clock in it
            info.external_attr = READABLE
            archive.writestr(info, content)


def names_in(path: Path) -> list[str]:
    """The names of an archive's files; none of what is no archive."""
    if not is_zipfile(path):
        return []
    with ZipFile(path) as archive:
        return archive.namelist()


@contextmanager
def unpacked(path: Path, names: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder with the files of an archive, which may have these names only.

    What its table of contents says is checked before any file is read. Raises InputError for no archive or a damaged
    one, and for what `write_archive` does not make: other names (so none leaves the folder), a name twice, compression.
    """
    with tempfile.TemporaryDirectory(prefix="fractal-") as temporary:
        folder = Path(temporary, path.stem)
        folder.mkdir()
        try:
            with ZipFile(path) as archive:
                check_contents(path, archive.infolist(), names)
                archive.extractall(folder)  # at most file_size bytes of each, and their CRC-32
        except InputError:
            raise
        except Exception as error:  # zipfile raises what its parser and the system happen to raise
            raise InputError(f"{path}: can't be unpacked ({reason(error)}); get or make it again") from error
        yield folder


def check_contents(path: Path, infos: list[ZipInfo], names: Collection[str]) -> None:
    """Raises InputError, see `unpacked`."""
    found = [info.filename for info in infos]
    if others := [name for name in found if name not in names or found.count(name) > 1]:
        raise InputError(f"{path}: holds {others[0]!r}, which is no file of it or there twice; nothing was unpacked")
    sizes = [(info.compress_type, info.compress_size) == (ZIP_STORED, info.file_size) for info in infos]
    if not all(sizes) or sum(info.file_size for info in infos) > path.stat().st_size:
        raise InputError(f"{path}: is compressed, or says that it holds more than its size; save it again as a .zip")
