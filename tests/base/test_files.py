"""Outputs appear whole or not at all; whatever is left behind by a killed run goes away with the next."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from fractal.base.errors import InputError, run
from fractal.base.files import atomic_folder, atomic_write, check_header, locked, read_whole, recover
from fractal.data.parquet import atlas_table, write_tables
from fractal.data.writers import h5ad_copy
from tests.conftest import write_h5ad


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a child process -> its number."""
    if child := os.fork():
        return child
    signal.alarm(30)  # seconds: a child that waits for one that has failed ends as well
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def killed_while_writing(path: Path) -> None:
    def work() -> None:
        with atomic_write(path) as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert os.waitpid(forked(work), 0)[1] == signal.SIGKILL


def test_the_leftovers_of_killed_runs_go(tmp_path: Path):
    """But neither those of other outputs, nor what only looks like one."""
    killed_while_writing(tmp_path / "b.txt")
    for name in (".a.txt.x1.part", ".a.txt.part", ".a.txt.12345678", ".a.txt.12345678.part"):
        (tmp_path / name).write_text("mine")
    kept = names(tmp_path)
    killed_while_writing(tmp_path / "a.txt")
    assert len(names(tmp_path)) == len(kept) + 2  # its folder and its lock
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("whole")
    assert names(tmp_path) == sorted([*kept, "a.txt"])


def test_two_runs_that_change_one_file_take_turns(tmp_path: Path, capfd):
    """The second one waits, says so, and reads what the first one has written: neither addition is lost."""
    (tmp_path / "a").write_text("0")
    (first_reads, go) = os.pipe()

    def add(text: str, seconds: float) -> None:
        with locked(tmp_path / "a"):
            before = (tmp_path / "a").read_text()
            os.write(go, b"x")
            time.sleep(seconds)
            with atomic_write(tmp_path / "a") as part:
                part.write_text(before + text)

    def second() -> None:
        os.read(first_reads, 1)
        add("2", 0)

    children = [forked(lambda: add("1", 2)), forked(second)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert (tmp_path / "a").read_text() == "012"
    assert names(tmp_path) == ["a"]
    assert capfd.readouterr().err == f"{tmp_path}/a: another run is writing it; waiting until that has ended\n"


def test_two_threads_that_change_one_file_take_turns(tmp_path: Path):
    (tmp_path / "a").write_text("")

    def add(i: int) -> None:
        for _ in range(5):
            with locked(tmp_path / "a"), atomic_write(tmp_path / "a") as part:
                part.write_text((tmp_path / "a").read_text() + str(i))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert sorted((tmp_path / "a").read_text()) == sorted("0123" * 5)


def test_a_link_that_leaves_a_folder_is_not_read(tmp_path: Path):
    (tmp_path / "secret").write_text("of this machine")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    (tmp_path / "a" / "y").symlink_to("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")  # what a folder is called does not matter
    assert read_whole(tmp_path / "link", lambda folder: (folder / "y").read_text()) == "x"
    (tmp_path / "a" / "z").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="a/z: is a link that leaves its folder"):
        read_whole(tmp_path / "a", lambda _: pytest.fail("it is read"))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_program_changes_meanwhile_stays(tmp_path: Path, kind: str):
    """One that knows no lock, as a notebook that writes the same .h5ad; and on a file system without locks."""
    path = tmp_path / "a"
    path.mkdir() if kind == "folder" else path.write_text("old")

    def work() -> None:
        with locked(path):
            (path / "new.txt" if kind == "folder" else path).write_text("theirs")
            if kind == "folder":
                with atomic_folder(path, ["new.txt"]) as new:
                    (new / "new.txt").write_text("ours")
            else:
                with atomic_write(path) as part:
                    part.write_text("ours")

    with pytest.raises(InputError, match="a: another program has changed it meanwhile"):
        work()
    assert (path / "new.txt" if kind == "folder" else path).read_text() == "theirs"
    assert names(tmp_path) == ["a"]


def test_a_folder_is_read_as_one_run_wrote_it(tmp_path: Path):
    """It is replaced between the reads of its two files; the first attempt sees a mixture."""
    path, seen = tmp_path / "a", list[str]()

    def write(text: str) -> None:
        with atomic_folder(path, ["x", "y"]) as new:
            for name in "xy":
                (new / name).write_text(text)

    def read(folder: Path) -> str:
        x = (folder / "x").read_text()
        if not seen:
            write("2")
        seen.append(x + (folder / "y").read_text())
        return seen[-1]

    write("1")
    assert read_whole(path, read) == "22"
    assert seen == ["12", "22"]

    def replaced_each_time(_: Path) -> None:
        write("3")

    with pytest.raises(InputError, match="is being replaced again and again"):
        read_whole(path, replaced_each_time)


def test_a_reader_does_not_wait_for_a_run_that_writes(tmp_path: Path):
    with locked(tmp_path / "a"):
        reader = threading.Thread(target=recover, args=(tmp_path / "a",))
        reader.start()
        reader.join(20)
        waits = reader.is_alive()
    assert not waits


def test_where_files_cannot_be_locked_nothing_is_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    killed_while_writing(tmp_path / "a")
    left = names(tmp_path)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with atomic_write(tmp_path / "a") as part:
        part.write_text("x")
    assert names(tmp_path) == sorted({*left, "a"} - {".a.lock"})


def test_a_crash_finds_file_and_name_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """First the file, then its new name, then the folder that holds the name."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(fd: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def noting_replace(old: Path, new: Path) -> None:
        done.append(f"{old} -> {new}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    with atomic_write(tmp_path / "a") as part:
        part.write_text("x")
    assert done == [str(part), f"{part} -> {tmp_path / 'a'}", str(tmp_path)]


def test_processes_that_write_the_same_place(tmp_path: Path):
    children = []
    for i in range(6):
        if child := os.fork():
            children.append(child)
            continue
        for _ in range(20):
            with atomic_write(tmp_path / "a") as part:
                part.write_bytes(bytes([i]) * 100_000)
        os._exit(0)
    seen = set()
    while children:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            assert status == 0
            children.remove(done)
        if (tmp_path / "a").exists():
            content = (tmp_path / "a").read_bytes()
            assert len(content) == 100_000
            assert len(set(content)) == 1
            seen.add(content[0])
    assert seen
    assert names(tmp_path) == ["a"]


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "big disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "big disk" / "a")
    for text in ("new", "newer"):
        with atomic_write(tmp_path / "a") as part:
            part.write_text(text)
        assert (tmp_path / "big disk" / "a").read_text() == text
    assert (tmp_path / "a").is_symlink()
    assert names(tmp_path / "big disk") == ["a"]


def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.txt").write_text("old")
    both = ["old.txt", "new.txt"]
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "a", both) as new:
        (new / "missing" / "new.txt").write_text("new")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old.txt"]
    with atomic_folder(tmp_path / "a", both) as new:
        (new / "new.txt").write_text("new")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new.txt"]


@pytest.mark.parametrize("other", ["notes.txt", "mine.txt/"])
@pytest.mark.parametrize("late", [False, True])
def test_a_folder_with_other_files_stays(tmp_path: Path, other: str, late: bool):
    """Also where the other file came while the new folder was being made."""
    (tmp_path / "a").mkdir()

    def add() -> None:
        (tmp_path / "a" / other).mkdir() if other.endswith("/") else (tmp_path / "a" / other).touch()

    if not late:
        add()

    def write() -> None:
        with atomic_folder(tmp_path / "a", ["mine.txt"]) as new:
            assert late
            (new / "mine.txt").touch()
            add()

    with pytest.raises(InputError, match=rf"holds what would be lost \({other.strip('/')}\)"):
        write()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == [other.strip("/")]


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path: Path):
    (tmp_path / "a").touch()
    with pytest.raises(InputError, match="is not a folder"), atomic_folder(tmp_path / "a", []):
        raise AssertionError("the work has begun")


@pytest.fixture
def between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Replace the folder `a` in a child process; when the new one is to take its name, `act`."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.txt").write_text("old")
    replace = Path.replace

    def run_until(act: Callable[[], None]) -> None:
        def acting(path: Path, target: Path) -> Path:
            if path.name == "new":
                act()
            return replace(path, target)

        def work() -> None:
            monkeypatch.setattr(Path, "replace", acting)
            with suppress(OSError), atomic_folder(tmp_path / "a", ["old.txt"]) as new:
                (new / "new.txt").write_text("new")

        os.waitpid(forked(work), 0)

    return run_until


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(tmp_path: Path, between_two_renames):
    def fail() -> None:
        raise OSError("no")

    between_two_renames(fail)
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old.txt"]


@pytest.mark.parametrize("new_is_there", [True, False])
def test_a_run_killed_between_the_two_renames(tmp_path: Path, between_two_renames, new_is_there: bool):
    between_two_renames(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert not (tmp_path / "a").exists()
    if not new_is_there:  # it has been tampered with: then the old one
        shutil.rmtree(next(tmp_path.glob(".a.*.part")) / "new")
    recover(tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == (["new.txt"] if new_is_there else ["old.txt"])


def test_what_is_no_file_is_not_replaced(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path(os.devnull)):
        with pytest.raises(InputError, match=f"{path}: is not a file"), atomic_write(path):
            raise AssertionError("the work has begun")
    assert names(tmp_path) == ["folder", "pipe"]


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process may grow beyond 300 kB: writing fails then as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_parquet(path: Path) -> None:
    write_tables(path, [atlas_table(np.ones((100, 1_000)), [(np.zeros(100, int), ["a"])] * 4)], {})


def write_with(function: Callable[[Path], object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with atomic_write(path) as part:
            function(part)

    return write


@pytest.mark.parametrize(
    "write",
    [
        write_parquet,
        write_with(lambda part: torch.save(torch.ones(100_000), open(part, "wb"))),  # noqa: SIM115
        write_with(lambda part: np.save(open(part, "wb"), np.ones(100_000))),  # noqa: SIM115
        write_with(lambda part: part.write_text("x" * 400_000)),
    ],
    ids=["parquet", "torch", "numpy", "text"],
)
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    small_disk: None, tmp_path: Path, write: Callable[[Path], None], older: bool, capsys
):
    if older:
        (tmp_path / "a").write_text("old")
    with pytest.raises(SystemExit) as stop:
        run(lambda: write(tmp_path / "a"))
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {tmp_path}/a: cannot be written (")
    assert line.endswith("); make room\n")
    assert line.count("\n") == 1
    assert names(tmp_path) == ["a"] * older
    assert not older or (tmp_path / "a").read_text() == "old"


def test_a_full_disk_under_a_folder_names_it_and_leaves_the_old_one(small_disk: None, tmp_path: Path):
    """A file of it, or a temporary one that has no name."""
    (tmp_path / "a").mkdir()
    for name in ("x", None):

        def write(folder: Path, name: str | None = name) -> None:
            with open(folder / name, "wb") if name else TemporaryFile(dir=folder) as file:
                file.write(bytes(400_000))

        with (
            pytest.raises(InputError, match=r"/a: cannot be written \(file too large\); make room"),
            atomic_folder(tmp_path / "a", ["x"]) as new,
        ):
            write(new)
        assert names(tmp_path) == ["a"]
        assert names(tmp_path / "a") == []


@pytest.mark.parametrize(
    "fill",
    [
        lambda file: file.create_dataset("big", data=np.ones(100_000)),
        lambda file: [file.create_group(f"{i}") for i in range(4_000)],
    ],
    ids=["data", "metadata"],
)
def test_a_full_disk_under_a_copy_of_an_h5ad(small_disk: None, tmp_path: Path, fill: Callable[[Any], object]):
    """HDF5 has an OSError for data, and for metadata a ValueError, or a RuntimeError when the file is closed."""
    source = write_h5ad(tmp_path / "x.h5ad", np.ones((4, 3), np.float32), kind=["B cell"] * 4)
    with (
        pytest.raises(InputError, match=r"new.h5ad: cannot be written \(file too large\); make room"),
        h5ad_copy(source, tmp_path / "new.h5ad") as file,
    ):
        fill(file)
    assert names(tmp_path) == ["x.h5ad"]


def test_a_table_of_contents_that_would_take_gigabytes(tmp_path: Path):
    """Of a safetensors file: its length stands in the first eight bytes."""
    save_file({"a": np.zeros(3)}, tmp_path / "whole")
    check_header(tmp_path / "whole")
    (tmp_path / "huge").write_bytes((10**8).to_bytes(8, "little") + b"{" + b" " * 1_000)
    with pytest.raises(ValueError, match="its table of contents takes 100,000,000 bytes"):
        check_header(tmp_path / "huge")
