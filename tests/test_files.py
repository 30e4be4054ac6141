"""Outputs appear whole or not at all; whatever is left behind by a killed run goes away with the next."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fractal.atlas import writing
from fractal.cli import InputError, run
from fractal.files import atomic_folder, atomic_write, check_paths, is_running


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_leftovers_of_killed_runs_go(tmp_path: Path, dead: int):
    kept = [f".b.txt.{dead}.part", f".a.txt.{os.getppid()}.part", ".a.txt.x1.part", f".a.txt.{dead}", ".a.txt.part"]
    for name in [*kept, f".a.txt.{dead}.part", f".a.txt.{2**70}.part"]:
        (tmp_path / name).write_text("half")
    with atomic_write(tmp_path / "a.txt") as part:
        part.write_text("whole")
    assert names(tmp_path) == sorted([*kept, "a.txt"])
    assert is_running(os.getpid())
    assert is_running(1)  # of another user, for most
    assert not is_running(dead)


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
    part = tmp_path / f".a.{os.getpid()}.part"
    with atomic_write(tmp_path / "a") as path:
        path.write_text("x")
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


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path, dead: int, monkeypatch, in_one_step: bool):
    if not in_one_step:
        monkeypatch.setattr("fractal.files.exchange", lambda *_: False)
    for name in ("a", f".a.{dead}.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old.txt").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "a") as new:
        (new / "missing" / "new.txt").write_text("new")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old.txt"]
    with atomic_folder(tmp_path / "a") as new:
        (new / "new.txt").write_text("new")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new.txt"]


def test_a_folder_that_cannot_be_moved_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.txt").write_text("old")
    replace = Path.replace

    def fails(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError("no")
        return replace(path, target)

    monkeypatch.setattr("fractal.files.exchange", lambda *_: False)  # a system that can't
    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old.txt"]


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
    with writing(path, 1_000, False, {}) as writer:
        writer.append(np.ones((100, 1_000), np.float32), [(np.zeros(100, int), ["a"])] * 4)


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


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A file, a hard link and a link to it, and a folder with a file and a link to the first one."""
    (tmp_path / "a").write_text("a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    (tmp_path / "soft").symlink_to(tmp_path / "a")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "b").write_text("b")
    (tmp_path / "folder" / "to a").symlink_to(tmp_path / "a")
    (tmp_path / "folder" / "nowhere").symlink_to(tmp_path / "none")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "output", "says"),
    [
        ("a", "a", "is the input of --in"),
        ("a", "hard", "is the input of --in"),
        ("a", "soft", "is the input of --in"),
        ("a", "folder/../a", "is the input of --in"),
        ("soft", "hard", "is the input of --in"),
        ("folder", "folder/deep/b", "is a file of --in"),
        ("folder", "a", "is a file of --in"),
        ("folder", "hard", "is a file of --in"),
        ("missing", "missing", "is the input of --in"),
        ("a", "folder", "is not a file"),
    ],
)
def test_no_output_is_an_input(places: Path, source: str, output: str, says: str):
    with pytest.raises(InputError, match=says):
        check_paths({"--in": places / source, "--not given": None}, {"--out": places / output})


def test_outputs_that_are_nobodys_input(places: Path):
    check_paths({"--in": places / "a", "--obo": "https://x.org/a"}, {"--out": places / "new", "--json": None})
    check_paths({"--in": places / "folder"}, {"--out": places / "folder" / "new"})
    check_paths({"--in": places / "a"}, {"--out": places / "a"}, in_place=[("--out", "--in")])
    check_paths({"--in": places / "a"}, {}, folders={"--out": places / "folder"})
    with pytest.raises(InputError, match="is the input of --other"):  # in place for one, not for the other
        check_paths({"--in": places / "a", "--other": places / "a"}, {"--out": places / "a"}, [("--out", "--in")])


def test_two_outputs_at_one_place(places: Path):
    for one, other in (("new", "new"), ("a", "hard"), ("new", "folder/../new")):
        with pytest.raises(InputError, match=r"--json .*is the output of --out as well"):
            check_paths({}, {"--out": places / one, "--json": places / other})


def test_an_output_folder_that_holds_an_input(places: Path):
    for source in ("folder", "folder/deep/b"):
        with pytest.raises(InputError, match="holds the input of --in"):
            check_paths({"--in": [places / "a", places / source]}, {}, folders={"--out": places / "folder"})
    with pytest.raises(InputError, match="is not a folder"):
        check_paths({}, {}, folders={"--out": places / "a"})
