"""What commands read and write is checked before any work."""

import os
from pathlib import Path

import pytest

from fractal.base.errors import InputError
from fractal.base.paths import check_folder, check_paths, real_paths


@pytest.fixture
def files(tmp_path: Path) -> Path:
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
def test_no_output_is_an_input(files: Path, source: str, output: str, says: str):
    with pytest.raises(InputError, match=says):
        check_paths({"--in": files / source, "--not given": None}, {"--out": files / output})


def test_writers_that_are_nobodys_input(files: Path):
    check_paths({"--in": files / "a", "--obo": "https://x.org/a"}, {"--out": files / "new", "--json": None})
    check_paths({"--in": files / "folder"}, {"--out": files / "folder" / "new"})
    check_paths({"--in": files / "a"}, {"--out": files / "a"}, in_place=[("--out", "--in")])
    check_paths({"--in": files / "a"}, {}, folders={"--out": files / "folder"})
    with pytest.raises(InputError, match="is the input of --other"):  # in place for one, not for the other
        check_paths({"--in": files / "a", "--other": files / "a"}, {"--out": files / "a"}, [("--out", "--in")])


def test_two_outputs_at_one_place(files: Path):
    for one, other in (("new", "new"), ("a", "hard"), ("new", "folder/../new")):
        with pytest.raises(InputError, match=r"--json .*is the output of --out as well"):
            check_paths({}, {"--out": files / one, "--json": files / other})


def test_an_output_folder_that_holds_an_input(files: Path):
    for source in ("folder", "folder/deep/b"):
        with pytest.raises(InputError, match="holds the input of --in"):
            check_paths({"--in": [files / "a", files / source]}, {}, folders={"--out": files / "folder"})
    with pytest.raises(InputError, match="is not a folder"):
        check_paths({}, {}, folders={"--out": files / "a"})


@pytest.mark.parametrize("where", ["--in", "--out", "--folder"])
def test_a_name_that_is_not_utf_8(tmp_path: Path, where: str):
    names = {
        flag: tmp_path / (os.fsdecode(b"\xff") if flag == where else flag) for flag in ("--in", "--out", "--folder")
    }
    with pytest.raises(InputError, match=f"^{where} .*: its name is not UTF-8"):
        check_paths({"--in": names["--in"]}, {"--out": names["--out"]}, folders={"--folder": names["--folder"]})


def test_a_folder_with_many_other_files_shows_five(tmp_path: Path):
    for count, shown in ((5, r"\(1, 2, 3, 4, 5\)"), (6, r"\(1, 2, 3, 4, 5, \.\.\.\)")):
        (tmp_path / str(count)).touch()
        for i in range(count):
            (tmp_path / str(i + 1)).touch()
        with pytest.raises(InputError, match=shown):
            check_folder(tmp_path, ["own"])


def test_flags_that_were_not_given_name_no_path():
    assert real_paths({"--a": None, "--b": "", "--c": [], "--d": ["", "x"]}) == [("--d", Path.cwd() / "x")]
