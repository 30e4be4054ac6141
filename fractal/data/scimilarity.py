"""A SCimilarity release on disk (`model_v1.1`): its cell types, its cells' labels and studies, its vectors.

    label_ints.csv                    header ",0", then "0,name" ...: the names of the types
    annotation/reference_labels.tsv   one line per cell, "name" or "name<TAB>study"; line i belongs to index label i
    annotation/labelled_kNN.bin       an hnswlib index with one unit vector per cell

hnswlib would load the whole search graph to hand out the vectors (5 GB and more for 7.9 million cells). The file's
layout is simple, so we map it and read the vectors where they lie, bit for bit what `Index.get_items` returns.

Left out, and counted, are cells that are marked as deleted in the index, and those without a label or, where there are
studies, without a study (see fractal.hierarchy.names).
"""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from fractal.base.errors import InputError
from fractal.base.storage import Location, fetch, locate, same_files
from fractal.data.cells import Cells, Chunk, no_columns
from fractal.data.labels import Labels, coded
from fractal.data.reorder import equal_buckets, reorder
from fractal.data.vectors import usable
from fractal.hierarchy.names import clean, is_missing

# hnswlib 0.8.0, HierarchicalNSW::saveIndex: 96 bytes, little-endian.
HEADER = np.dtype(
    [
        ("offset_level0", "<u8"),  # always 0
        ("max_elements", "<u8"),  # capacity; the file holds `count` records, not this many
        ("count", "<u8"),
        ("record_size", "<u8"),  # level-0 links, vector, label
        ("label_offset", "<u8"),
        ("vector_offset", "<u8"),
        ("max_level", "<i4"),
        ("entry_point", "<u4"),
        ("max_m", "<u8"),
        ("max_m0", "<u8"),  # most links at level 0
        ("m", "<u8"),
        ("mult", "<f8"),
        ("ef_construction", "<u8"),
    ]
)
RELEASE_FILES = ("label_ints.csv", "annotation/reference_labels.tsv", "annotation/labelled_kNN.bin")
SHOWN = 20  # unknown types that a message lists
DELETED = 0x01  # hnswlib's DELETE_MARK, in the third byte of a record


@dataclass(frozen=True)
class Release:
    """An opened release of n cells. Row i is line i of the label file and label i of the index."""

    labels: Labels  # its types are all that label_ints.csv names, in the order of their numbers
    records: np.ndarray  # (n,) memory map with fields `mark`, `vector` (dim float32) and `label`
    index_path: Path
    check_same: Callable[[], None] = lambda: None  # raises InputError where a file of the release has been replaced

    @property
    def dim(self) -> int:
        return self.records.dtype["vector"].shape[0]

    def __len__(self) -> int:
        return len(self.records)

    def cells(self, scratch: str | Path | None = None) -> Cells:
        """Its cells to read; they have no names. See `chunks`."""
        read = partial(self.chunks, scratch=scratch)
        return Cells(self.index_path, len(self), self.dim, pa.schema([]), (), read, lambda _: pa.table({}))

    def chunks(self, size: int = 65_536, scratch: str | Path | None = None) -> Iterator[Chunk]:
        """Yield vectors (m, dim) float32 in row order, whatever the order of the records, in one pass.

        An index built with several threads holds its records nearly, but not quite, in row order: memory is two chunks
        of `size` rows. Of records in another order most wait in a temporary file in `scratch` (see `reorder`).
        Raises InputError for NaN, inf or zero vectors of cells that are not left out, and for index labels that are not
        the row numbers.
        """
        start, row = 0, np.dtype((np.float32, (self.dim,)))
        for vectors in reorder(self.records_by_chunk(size), equal_buckets(len(self), size), row, scratch):
            bad = np.flatnonzero(~usable(vectors) & (self.labels.codes[start : start + len(vectors)] >= 0))
            if len(bad):
                raise InputError(
                    f"{self.index_path}: the vector of cell {start + bad[0]} is zero or not finite; empty line "
                    f"{start + bad[0] + 1} of reference_labels.tsv to leave it out, or make or download the index again"
                )
            yield no_columns(len(vectors)), vectors
            start += len(vectors)

    def records_by_chunk(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (labels (m,) int64, vectors (m, dim) float32) as they stand in the index."""
        seen = np.zeros(len(self), bool)
        for start in range(0, len(self), size):
            # Each chunk has its map: the pages are let go with it, and the whole file never counts as memory.
            records = map_records(self.index_path, self.records.dtype, start, min(size, len(self) - start))
            labels = records["label"]
            if labels.max() >= len(self) or seen[labels].any() or len(np.unique(labels)) < len(labels):
                raise InputError(
                    f"{self.index_path}: its labels are not the numbers 0 to {len(self) - 1:,}, each once; "
                    "row i of the label file must be label i of the index"
                )
            seen[labels] = True
            if start + size >= len(self):  # with the last ones, after which nobody asks for more
                self.check_same()
            yield labels.astype(np.int64), records["vector"]


def open_release(model_dir: str | Location) -> Release:
    """Open and validate a `model_v1.1` folder without reading its vectors.

    Raises InputError if a file is missing or damaged, if labels and vectors differ in number, or if a cell's type
    is not in label_ints.csv.
    """
    model_dir = fetch(locate(model_dir), RELEASE_FILES)  # the index is mapped
    types_path, labels_path, index_path = (model_dir / name for name in RELEASE_FILES)
    for path in (types_path, labels_path, index_path):
        if not path.is_file():
            raise InputError(f"{path}: no such file; --model-dir takes the model_v1.1 folder of a SCimilarity release")
    check_same = same_files(model_dir)
    types = read_types(types_path)
    label_codes, names, study_codes, studies = read_labels(labels_path)
    position = {clean(name): code for code, name in reversed(list(enumerate(types)))}
    unknown = [(code, name) for code, name in enumerate(names) if name not in position]
    if unknown:
        shown = [f"'{name}' (line {np.flatnonzero(label_codes == code)[0] + 1})" for code, name in unknown[:SHOWN]]
        more = f"; and {len(unknown) - SHOWN:,} more" if len(unknown) > SHOWN else ""
        raise InputError(f"{labels_path}: these types are not in {types_path.name}: {'; '.join(shown)}{more}")
    records = open_index(index_path)
    deleted = deleted_cells(index_path, records)
    if (label_codes[len(records) :] < 0).all():  # empty lines at the end
        label_codes = label_codes[: len(records)]
        study_codes = None if study_codes is None else study_codes[: len(records)]
    if len(records) != len(label_codes):
        problem = line_problem(len(records), len(label_codes), int(deleted.sum()))
        raise InputError(
            f"{index_path}: holds {len(records):,} vectors, but {labels_path.name} has {len(label_codes):,} lines; "
            f"{problem}; line i must name cell i"
        )
    type_codes = np.array([*(position[name] for name in names), -1], np.int32)[label_codes]
    reasons = {
        "are marked as deleted in the index": deleted,
        "have no label": label_codes < 0,
        "have no study": np.zeros(len(records), bool) if study_codes is None else study_codes < 0,
    }
    notes, left_out = [], np.zeros(len(records), bool)
    for why, cells in reasons.items():
        if lost := int((cells & ~left_out).sum()):
            notes.append(f"{lost:,} of {len(records):,} cells left out: they {why}")
        left_out |= cells
    type_codes[left_out] = -1
    if not (type_codes >= 0).any():
        raise InputError(f"{model_dir}: no cell is left: {'; '.join(notes)}")
    cleaned_types = ["" if is_missing(name) else clean(name) for name in types]
    return Release(
        Labels(cleaned_types, type_codes, studies, study_codes, notes=notes), records, index_path, check_same
    )


def line_problem(cells: int, lines: int, deleted: int) -> str:
    """What is wrong with a label file of so many lines, and the way out."""
    if deleted and lines == cells - deleted:
        return f"it leaves out the {deleted:,} cells that are marked as deleted: give each of them an empty line"
    if lines > cells:
        return f"{lines - cells:,} lines too many: cells stand there twice, or it is of another release"
    also = f", also the {deleted:,} cells that are marked as deleted" if deleted else ""
    return f"{cells - lines:,} lines are missing{also}: it is cut short, or of another release"


def deleted_cells(path: Path, records: np.ndarray, size: int = 65_536) -> np.ndarray:
    """(n,) bool by label: what `mark_deleted` was called for. `Release.chunks` refuses labels that are no rows."""
    deleted = np.zeros(len(records), bool)
    for start in range(0, len(records), size):
        part = map_records(path, records.dtype, start, min(size, len(records) - start))
        labels = part["label"][part["mark"] & DELETED > 0]
        deleted[labels[labels < len(records)]] = True
    return deleted


def read_types(path: Path) -> list[str]:
    """The type names of label_ints.csv, in the order of their numbers."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        names = [name for _, name in rows[1:]]
        numbers = [int(number) for number, _ in rows[1:]]
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected a header ',0' and then lines such as '0,B cell' ({error})") from error
    if numbers != list(range(len(numbers))) or len(set(names)) != len(names) or not names:
        raise InputError(f"{path}: expected numbers 0, 1, 2, ... and a different name beside each")
    return names


def read_labels(path: Path) -> tuple[np.ndarray, list[str], np.ndarray | None, list[str]]:
    """-> type codes (n,) int64, type names, study codes (n,) int64 or None, study names; code -1 where there is none.

    Names are cleaned (fractal.hierarchy.names). Arrow's reader makes dictionary codes as it goes: eight million lines
    never become Python strings.
    """
    text = pa.dictionary(pa.int32(), pa.string())
    lines = path.read_bytes()
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(lines if lines[-1:] in (b"\n", b"") else lines + b"\n"),  # else Arrow takes one line for none
            read_options=pyarrow.csv.ReadOptions(autogenerate_column_names=True),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            convert_options=pyarrow.csv.ConvertOptions(column_types={"f0": text, "f1": text}),
        )
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: expected one line per cell, 'type' or 'type<TAB>study' ({error})") from error
    if table.num_columns > 2:
        raise InputError(f"{path}: has {table.num_columns} columns; expected 'type' or 'type<TAB>study' on each line")
    (codes, names), *study = map(coded, table.columns)
    return (codes, names, *study[0]) if study and study[0][1] else (codes, names, None, [])


def open_index(path: Path) -> np.ndarray:
    """Map an hnswlib index -> (count,) records with `vector` (dim float32) and `label` (uint64), nothing read yet.

    Raises InputError if the header contradicts itself or the file is shorter than it says.
    """
    size = path.stat().st_size
    if size < HEADER.itemsize:
        raise InputError(f"{path}: {size} bytes are too few for an hnswlib index; download it again")
    # Python integers from here on: sums of two uint64 from a lying header must not wrap around.
    header = dict(zip(HEADER.names or (), np.fromfile(path, HEADER, 1)[0].item(), strict=True))
    width = header["label_offset"] - header["vector_offset"]
    sane = (
        header["offset_level0"] == 0
        and header["vector_offset"] == 4 + 4 * header["max_m0"]
        and 4 <= width <= 4 * 65_536
        and width % 4 == 0
        and header["record_size"] == header["label_offset"] + 8
        and header["count"] <= header["max_elements"]
    )
    if not sane:
        raise InputError(
            f"{path}: not an index written by hnswlib, its header contradicts itself (a BFIndex has no graph: make one "
            "with hnswlib.Index(space='cosine', ...))"
        )
    needed = HEADER.itemsize + header["count"] * header["record_size"]
    if size < needed:
        raise InputError(f"{path}: cut short, {size:,} bytes of at least {needed:,}; download it again")
    record = np.dtype(
        {
            "names": ["mark", "vector", "label"],
            "formats": ["u1", ("<f4", (width // 4,)), "<u8"],
            "offsets": [2, header["vector_offset"], header["label_offset"]],
            "itemsize": header["record_size"],
        }
    )
    if header["count"] == 0:
        raise InputError(f"{path}: the index holds no vectors")
    return map_records(path, record, 0, header["count"])


def map_records(path: Path, record: np.dtype, start: int, count: int) -> np.ndarray:
    return np.memmap(path, record, "r", HEADER.itemsize + start * record.itemsize, (count,))
