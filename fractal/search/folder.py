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
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fractal.base.errors import InputError, reason
from fractal.base.files import read_whole
from fractal.data.parquet import fingerprint

VERSION = 1
MANIFEST, CENTROIDS = "index.json", "centroids.npy"
MAX_PARTS = 100
NO_COLUMN = "none"  # stands alone in the stream of a file without columns, so that it has as many rows as cells
WAY_OUT = "make it again with `fractal index`"
DAMAGES = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, pa.ArrowException)


def part_names(part: int) -> tuple[str, str, str]:
    return f"sizes-{part}.npy", f"vectors-{part}.bin", f"columns-{part}.arrow"


def disk_blocks() -> int:
    """Grows when this process reads from the disk, what it has read ahead counted in. 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock


OWN_FILES = (MANIFEST, CENTROIDS, *(name for part in range(MAX_PARTS) for name in part_names(part)))


@dataclass(frozen=True)
class Space:
    """What the vectors of an index are."""

    dim: int
    recipe: str = ""  # of the adapter that made them; "" where they were taken as they are
    blocks: tuple[int, ...] = ()  # widths of the adapter's blocks
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
class Batch:
    """The columns of some cells, mapped, as they were written."""

    path: Path
    first: int  # the number of its first cell in the index
    data: pa.RecordBatch
    validated: set[str] = field(default_factory=set)  # columns

    @property
    def cells(self) -> slice:
        return slice(self.first, self.first + len(self.data))

    def column(self, name: str, kind: pa.DataType | None = None) -> pa.Array:
        """A column; where there is none, nulls of the type `kind`, by default text."""
        if name not in self.data.schema.names:
            return pa.nulls(len(self.data), kind or pa.string())
        if name not in self.validated:  # Arrow does not look at what it maps, and may read beyond its end
            try:
                self.data[name].validate(full=True)
            except pa.ArrowException as error:
                raise InputError(f"{self.path}: damaged ({reason(error)}); {WAY_OUT}") from error
            self.validated.add(name)
        return self.data[name]


@dataclass(frozen=True)
class Part:
    """The cells of one source. Its files are mapped when it is opened: what replaces them later is not seen."""

    source: str
    first: int  # the number of its first cell in the index
    sizes: np.ndarray  # (lists,) int64
    starts: np.ndarray  # (lists + 1,) int64, where in the file each list begins
    dim: int
    path: Path  # of its vectors
    data: np.ndarray  # these, (bytes,) uint8, mapped read-only: copy-on-write would count against the memory
    batches: list[Batch]

    @staticmethod
    def open(folder: Path, number: int, source: str, first: int, centroids: np.ndarray) -> "Part":
        """Raises one of DAMAGES for files that do not fit together."""
        sizes, vectors, columns = (folder / name for name in part_names(number))
        counts, data, dim = np.load(sizes), np.memmap(vectors, np.uint8, "r"), centroids.shape[1]
        if counts.dtype != np.int64 or counts.shape != (len(centroids),) or (counts < 0).any() or not counts.any():
            raise ValueError("the sizes are not those of the lists")
        starts = np.concatenate([[0], np.cumsum(counts * (2 * dim + 8))])
        batches, end = list[Batch](), first
        for batch in pa.ipc.open_stream(pa.memory_map(str(columns))):
            batches.append(Batch(columns, end, batch))
            end += len(batch)
        if starts[-1] != len(data) or end - first != counts.sum():
            raise ValueError("its files have different numbers of cells")
        return Part(source, first, counts, starts, dim, vectors, data, batches)

    @property
    def cells(self) -> int:
        return int(self.sizes.sum())

    def vectors(self, number: int) -> np.ndarray:
        """The vectors of a list, (m, dim) float16, mapped."""
        start, size = self.starts[number], self.sizes[number]
        return self.data[start : start + 2 * self.dim * size].view("<f2").reshape(size, self.dim)

    def read_ahead(self, number: int) -> None:
        """Have the system read a list, and go on meanwhile."""
        start, end = (int(byte) for byte in self.starts[number : number + 2])
        start -= start % mmap.PAGESIZE
        mapped: Any = self.data.base  # the mmap.mmap of np.memmap
        if end > start and hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
            mapped.madvise(mmap.MADV_WILLNEED, start, end - start)

    def rows(self, number: int) -> np.ndarray:
        """The rows of a list's cells in the source, (m,) int64."""
        start = self.starts[number] + 2 * self.dim * self.sizes[number]
        return self.checked(np.frombuffer(self.data[start : self.starts[number + 1]], "<i8"))

    def checked(self, rows: np.ndarray) -> np.ndarray:
        """Rows as they are. Raises InputError for those of no cell."""
        if rows.size and not 0 <= rows.min() <= rows.max() < self.cells:
            raise InputError(f"{self.path}: damaged, it names cells that are not there; {WAY_OUT}")
        return rows


@dataclass(frozen=True)
class Folder:
    """An opened index: mapped, nothing of it in memory but the centroids."""

    path: Path
    space: Space
    centroids: np.ndarray  # (lists, dim) float32
    parts: tuple[Part, ...]
    metadata: dict[str, Any]  # index.json

    @property
    def cells(self) -> int:
        return sum(part.cells for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(length for length, _ in self.metadata["files"].values())


def open_folder(path: Path) -> Folder:
    """Small files are compared with their sha256, of large ones only the length is (`check_files` reads them whole).

    Raises InputError for a folder that is none, of another version, cut short or changed.
    """
    try:
        metadata = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if metadata["version"] != VERSION:
            raise InputError(f"{path}: an index of version {metadata['version']}, this reads {VERSION}; {WAY_OUT}")
        check_small(path, metadata["files"])
        known, sources, files = metadata["space"], metadata["sources"], metadata["files"]
        blocks, adapters = map(int, known["blocks"]), map(str, known["adapters"])
        space = Space(int(known["dim"]), str(known["recipe"]), tuple(blocks), tuple(adapters))
        if not sources or set(files) != {CENTROIDS, *(name for i in range(len(sources)) for name in part_names(i))}:
            raise ValueError("files are missing")
        if space.blocks and (min(space.blocks) < 1 or sum(space.blocks) != space.dim):
            raise ValueError("the blocks are not those of the vectors")
        centroids = np.load(path / CENTROIDS)
        if centroids.dtype != np.float32 or centroids.shape != (len(centroids), space.dim) or not len(centroids):
            raise ValueError("the centroids are of another width")
        parts = list[Part]()
        for i, source in enumerate(sources):
            parts.append(Part.open(path, i, str(source), sum(part.cells for part in parts), centroids))
        return Folder(path, space, centroids, tuple(parts), metadata)
    except DAMAGES as error:
        raise InputError(f"{path}: not an index, or a damaged one ({reason(error)}); {WAY_OUT}") from error


def check_small(path: Path, files: dict[str, tuple[int, str]]) -> None:
    """Raises InputError for files that are missing or of another length, and for .npy of another sha256."""
    for name, (length, sha256) in files.items():
        file = path / name
        if name not in OWN_FILES or not file.is_file() or file.stat().st_size != length:
            raise InputError(f"{file}: missing, or not as long as it was written; {WAY_OUT}")
        if name.endswith(".npy") and fingerprint(file) != sha256:
            raise InputError(f"{file}: not the file that the index was made with; {WAY_OUT}")


def check_files(path: str | Path) -> int:
    """Read every file and compare it with its sha256 -> bytes read. Raises InputError for one that was changed."""

    def check(path: Path) -> int:
        folder = open_folder(path)
        for name, (_, sha256) in folder.metadata["files"].items():
            if fingerprint(path / name) != sha256:
                raise InputError(f"{path / name}: changed or damaged since it was written; {WAY_OUT}")
        return folder.num_bytes

    return read_whole(Path(path), check)


def write_manifest(folder: Path, metadata: dict[str, Any], names: Sequence[str]) -> None:
    """Complete the metadata with the length and the sha256 of the files `names`, and write them."""
    known = metadata.get("files", {})
    files = {n: known[n] if n in known else (Path(folder, n).stat().st_size, fingerprint(folder / n)) for n in names}
    text = json.dumps({**metadata, "version": VERSION, "files": files}, indent=1)
    (folder / MANIFEST).write_text(f"{text}\n", "utf-8")
