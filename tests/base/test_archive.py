"""A .zip of a folder comes back as it was, and one that somebody else has made does no harm."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fractal.base.archive import is_archive, names_in, unpacked, write_archive
from fractal.base.errors import InputError

FILES = {"a.bin": np.random.default_rng(0).bytes(10_000), "b.txt": b"text"}


def test_what_is_packed_comes_back_and_takes_the_same_bytes_again(tmp_path: Path):
    for name in ("one.zip", "two.zip"):
        write_archive(tmp_path / name, FILES)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    assert names_in(tmp_path / "one.zip") == list(FILES)
    with unpacked(tmp_path / "one.zip", FILES) as folder:
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES
    assert not folder.exists()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:  # as any other program reads it
        archive.extractall(tmp_path / "by hand")
    assert (tmp_path / "by hand" / "a.bin").read_bytes() == FILES["a.bin"]


def test_a_folder_whose_name_ends_in_zip_is_a_folder(tmp_path: Path):
    (tmp_path / "old.zip").mkdir()
    assert not is_archive(tmp_path / "old.zip")
    assert is_archive(tmp_path / "new.ZIP")
    assert names_in(Path(__file__)) == []


def made(path: Path, *names: str, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in names:
            archive.writestr(name, bytes(1 << 20))


def larger_than_it_is(path: Path) -> None:
    """Its table of contents says 2 GB of a file of a megabyte, stored."""
    made(path, "a.bin")
    data, size = path.read_bytes(), (1 << 20).to_bytes(4, "little")
    at = data.rindex(b"PK\x01\x02")
    path.write_bytes(data[:at] + data[at:].replace(size, (1 << 31).to_bytes(4, "little")))


def with_a_changed_byte(path: Path) -> None:
    made(path, "a.bin")
    data = bytearray(path.read_bytes())
    data[5_000] = 1
    path.write_bytes(data)


EVIL: dict[str, tuple[Callable[[Path], object], str]] = {
    "a path that leaves it": (lambda path: made(path, "a.bin", "../evil"), r"holds '\.\./evil'"),
    "an absolute path": (lambda path: made(path, "/tmp/evil"), "holds '/tmp/evil'"),
    "a foreign file": (lambda path: made(path, "a.bin", "setup.py"), "holds 'setup.py'"),
    "a folder": (lambda path: made(path, "a.bin/"), "holds 'a.bin/'"),
    "a bomb": (lambda path: made(path, "a.bin", compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "sizes that are not so": (larger_than_it_is, "holds more than its size"),
    "a changed byte": (with_a_changed_byte, "can't be unpacked .*CRC"),
    "no archive": (lambda path: path.write_text("a web page"), "can't be unpacked .*not a zip file"),
}


@pytest.mark.parametrize("name", EVIL)
def test_other_archives_are_refused(name: str, tmp_path: Path):
    make, message = EVIL[name]
    make(tmp_path / "x.zip")
    with pytest.raises(InputError, match=rf"x\.zip: .*{message}"), unpacked(tmp_path / "x.zip", FILES):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path):
    made(tmp_path / "x.zip", "a.bin", "a.bin")
    with pytest.raises(InputError, match="holds 'a.bin'.*twice"), unpacked(tmp_path / "x.zip", FILES):
        pass
