"""The folder of an index. All numbers are little-endian.

    index.json         the format's version, what the vectors are, and for every file its length and sha256
    centroids.npy      (lists, dim) float32 of length 1: what each list of cells lies around
    sizes-0.npy        (lists,) int64: how many cells each list has
    vectors-0.bin      list after list: its cells' vectors (m, dim) float16 of length 1, then their rows (m,) int64
    columns-0.arrow    an Arrow stream of all other columns, `cell_id` among them, in the order of the source's rows
    sizes-1.npy ...    the same for the cells that `--add` has added, part by part

The layout of vectors-0.bin is that of faiss's inverted lists on disk, so that faiss searches the mapped file. No file
here is one that faiss parses.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.base.cli import InputError, reason
from fractal.base.files import recover
from fractal.data.parquet import fingerprint

VERSION = 1
MANIFEST, CENTROIDS = "index.json", "centroids.npy"
MAX_PARTS = 100
NO_COLUMN = "none"  # stands in the stream of a file without columns, so that it has as many rows as cells
WAY_OUT = "make it again with `fractal index`"


def part_names(part: int) -> tuple[str, str, str]:
    return f"sizes-{part}.npy", f"vectors-{part}.bin", f"columns-{part}.arrow"


OWN_FILES = (MANIFEST, CENTROIDS, *(name for part in range(MAX_PARTS) for name in part_names(part)))


@dataclass(frozen=True)
class Space:
    """What the vectors of an index are."""

    dim: int
    recipe: str = ""  # of the adapter that made them; "" where they were taken as they are
    blocks: tuple[int, ...] = ()  # widths of the adapter's blocks
    levels: tuple[str, ...] = ()  # names of the levels that the blocks stand for
    adapters: tuple[str, ...] = ()  # sha256 of the adapter: of its checkpoint, of its weights, or of both

    def prefix_width(self, prefix: int) -> int:
        """Numbers of a prefix. Raises InputError where the vectors can't be cut there."""
        if not self.blocks:
            raise InputError("the indexed vectors are as they came, not an adapter's, so there is no --prefix to cut")
        if self.recipe == "published" and prefix < len(self.blocks):
            raise InputError(
                "a prefix of recipe `published` is no cut of its full vector, so --prefix can't be searched"
            )
        if not 1 <= prefix <= len(self.blocks):
            raise InputError(f"prefix {prefix} of {len(self.blocks)}: name one from 1 to {len(self.blocks)}")
        return sum(self.blocks[:prefix])


@dataclass(frozen=True)
class Part:
    """The cells of one source, mapped from their three files."""

    folder: Path
    number: int
    source: str
    sizes: np.ndarray  # (lists,) int64
    dim: int

    @property
    def cells(self) -> int:
        return int(self.sizes.sum())

    @property
    def path(self) -> Path:
        return self.folder / part_names(self.number)[1]

    @cached_property
    def data(self) -> np.ndarray:
        """Its bytes, mapped copy-on-write: torch takes no array that is read-only."""
        return np.memmap(self.path, np.uint8, "c")

    @cached_property
    def starts(self) -> np.ndarray:
        """(lists + 1,) int64, where in the file each list begins."""
        return np.concatenate([[0], np.cumsum(self.sizes * (2 * self.dim + 8))])

    def vectors(self, number: int) -> np.ndarray:
        """The vectors of a list, (m, dim) float16, mapped."""
        start, size = self.starts[number], self.sizes[number]
        return self.data[start : start + 2 * self.dim * size].view("<f2").reshape(size, self.dim)

    def rows(self, number: int) -> np.ndarray:
        """The rows of a list's cells in the source, (m,) int64. Raises InputError for numbers that are none."""
        start = self.starts[number] + 2 * self.dim * self.sizes[number]
        return self.checked(np.frombuffer(self.data[start : self.starts[number + 1]], "<i8"))

    def checked(self, rows: np.ndarray) -> np.ndarray:
        if rows.size and not 0 <= rows.min() <= rows.max() < self.cells:
            raise InputError(f"{self.path}: damaged, it names cells that are not there; {WAY_OUT}")
        return rows

    @cached_property
    def batches(self) -> list[pa.RecordBatch]:
        """The columns, mapped, as they were written."""
        path = self.folder / part_names(self.number)[2]
        try:
            batches = list(pa.ipc.open_stream(pa.memory_map(str(path))))
            if sum(len(batch) for batch in batches) != self.cells:
                raise pa.ArrowInvalid("it has another number of cells")
            return batches
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: damaged ({reason(error)}); {WAY_OUT}") from error

    def batch(self, number: int) -> pa.RecordBatch:
        """One of the batches, looked through: Arrow does not look at what it maps, and may read beyond its end."""
        if number not in self.looked_through:
            try:
                self.batches[number].validate(full=True)
            except pa.ArrowException as error:
                path = self.folder / part_names(self.number)[2]
                raise InputError(f"{path}: damaged ({reason(error)}); {WAY_OUT}") from error
            self.looked_through.add(number)
        return self.batches[number]

    @cached_property
    def looked_through(self) -> set[int]:
        return set()


@dataclass(frozen=True)
class Folder:
    """An opened index: mapped, nothing of it in memory but the centroids."""

    path: Path
    space: Space
    centroids: np.ndarray  # (lists, dim) float32
    parts: tuple[Part, ...]
    facts: dict[str, Any]  # index.json


def read_folder(path: str | Path) -> Folder:
    """Open an index. Raises InputError for a folder that is none, of another version, cut short or changed.

    Small files are compared with their sha256; of large ones only the length is (`check_files` reads them whole).
    """
    path = Path(path)
    if path.parent.is_dir():
        recover(path)  # of a run that was killed just as it put the folder there
    try:
        facts = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = facts["version"], dict(facts["files"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: not an index ({MANIFEST} cannot be read); make one with `fractal index`") from error
    if version != VERSION:
        raise InputError(f"{path}: an index of version {version}, this reads {VERSION}; {WAY_OUT}")
    for name, (length, sha256) in files.items():
        file = path / name
        if name not in OWN_FILES or not file.is_file() or file.stat().st_size != length:
            raise InputError(f"{file}: missing, or not as long as it was written; {WAY_OUT}")
        if name.endswith(".npy") and fingerprint(file) != sha256:
            raise InputError(f"{file}: not the file that the index was made with; {WAY_OUT}")
    try:
        told = facts["space"]
        space = Space(
            int(told["dim"]),
            str(told["recipe"]),
            tuple(map(int, told["blocks"])),
            tuple(map(str, told["levels"])),
            tuple(map(str, told["adapters"])),
        )
        centroids = np.load(path / CENTROIDS)
        parts = tuple(
            Part(path, i, str(source), np.load(path / part_names(i)[0]), space.dim)
            for i, source in enumerate(facts["sources"])
        )
        check_consistent(space, centroids, parts, files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: a damaged index ({reason(error)}); {WAY_OUT}") from error
    return Folder(path, space, centroids, parts, facts)


def check_consistent(space: Space, centroids: np.ndarray, parts: Sequence[Part], files: dict[str, Any]) -> None:
    """Raises ValueError, or whatever numpy does, unless what was read fits together."""
    if not parts or set(files) != {CENTROIDS, *(name for part in parts for name in part_names(part.number))}:
        raise ValueError("files are missing")
    if centroids.dtype != np.float32 or centroids.ndim != 2 or centroids.shape[1] != space.dim or not len(centroids):
        raise ValueError("the centroids are of another width")
    if space.blocks and (min(space.blocks) < 1 or sum(space.blocks) != space.dim):
        raise ValueError("the blocks are not those of the vectors")
    for part in parts:
        if part.sizes.dtype != np.int64 or part.sizes.shape != (len(centroids),) or (part.sizes < 0).any():
            raise ValueError("the sizes are not those of the lists")
        if part.cells < 1 or part.starts[-1] != files[part_names(part.number)[1]][0]:
            raise ValueError("the vectors are not as many as the lists hold")


def check_files(folder: Folder) -> int:
    """Read every file and compare it with its sha256 -> bytes read. Raises InputError for one that was changed."""
    for name, (_, sha256) in folder.facts["files"].items():
        if fingerprint(folder.path / name) != sha256:
            raise InputError(f"{folder.path / name}: changed or damaged since it was written; {WAY_OUT}")
    return sum(length for length, _ in folder.facts["files"].values())


def write_manifest(folder: Path, facts: dict[str, Any], names: Sequence[str]) -> None:
    """Complete the facts with the length and the sha256 of the files `names`, and write them."""
    known = facts.get("files", {})
    files = {n: known[n] if n in known else (Path(folder, n).stat().st_size, fingerprint(folder / n)) for n in names}
    (folder / MANIFEST).write_text(json.dumps({**facts, "version": VERSION, "files": files}, indent=1) + "\n", "utf-8")
