"""Do the vectors of new cells come from the reference's embedding?

Two embeddings of one width look alike to a program. So every number of a cell is foretold from its other numbers: an
eighth of the numbers is that of the reference cell which is nearest by the other seven eighths. The eighth itself has
had no say, so where numbers mean something else, what is foretold has nothing in common with it, whatever the types.

Two statistics say how much the cells and what is foretold of them vary together, each around its own mean: a shift
between batches takes no part. A query of at least MANY_CELLS is refused where they do not vary together (`agreement`),
or many numbers vary the other way round (`against`), as those do whose sign was turned. All else is a warning.
"""

from dataclasses import dataclass

import numpy as np

from fractal.data.vectors import usable

PARTS = 8
SCALE = 0.4  # numbers are divided by their spread to this power: by 0 a few large ones decide, by 1 noise does
SAMPLE, BANK = 500, 4_000  # cells of either side that are compared: a quarter of a second
MIN_CELLS, MANY_CELLS = 10, 100  # with fewer nothing is said, or nothing is certain
# Chosen on four atlases, each study against the others (benchmarks/spaces.py, seeds 10 to 14).
MIN_AGREEMENT = 0.06  # studies .15 and more, single types .07, what means something else .05 and less
MAX_AGAINST = 0.28  # studies .21 and less, single types .26
MAX_GAIN = 0.04  # of cosine, by turning the sign of one number round
MAX_COSINE = 0.3  # of cells and what is foretold of them: beyond, they lie where reference cells do
RUNS, MIN_RUN = 40, 50  # a query is looked at in so many runs of rows, of so many cells at least
MAX_BLOCKS = 5  # that a warning names

OTHER = (
    "the vectors do not come from the reference's embedding: each of their numbers has nothing in common with what "
    "the others let expect"
)
TURNED = "the vectors do not come from the reference's embedding: many of their numbers vary the other way round"
WARNING = "it may be another embedding, or types that the reference lacks: "
SIGN = (
    "number {} fits the reference's cells better with its sign turned round: it tells this batch from them, or was "
    "turned"
)
ROWS = "rows {} have nothing in common with the reference's cells: they may come from another embedding"


@dataclass(frozen=True)
class Comparison:
    """Cells and what is foretold of them."""

    cells: int
    agreement: float  # correlation of all numbers, about 0 in another embedding
    against: float  # share of what varies together that does so the other way round, 0 to 1
    cosine: float  # mean over the cells
    number: int  # that brings the cells nearer when its sign is turned round,
    gain: float  # and by how much of cosine, the half of it

    def is_other(self) -> bool:
        """Do the numbers mean something else? Those of one type may vary by chance alone, but lie near its cells."""
        return self.agreement < MIN_AGREEMENT and self.cosine < MAX_COSINE

    def is_turned(self) -> bool:
        """Are the signs of many numbers turned round?"""
        return self.against > MAX_AGAINST and self.cosine < MAX_COSINE


class Bank:
    """A sample of the reference's vectors (m, dim), to compare others with."""

    def __init__(self, reference: np.ndarray, seed: int = 0) -> None:
        self.cells = draw(reference, BANK, np.random.default_rng(seed))
        self.scale = self.cells.std(0) ** SCALE + 1e-9
        self.scaled = self.cells / self.scale
        self.squares = self.scaled**2

    def foretell(self, cells: np.ndarray) -> np.ndarray:
        """cells (n, dim) of length 1 -> the same, each number foretold."""
        scaled = cells / self.scale
        products, squares = scaled @ self.scaled.T, scaled**2
        foretold = np.empty_like(cells)
        dim = cells.shape[1]
        for part in (np.arange(dim)[i::PARTS] for i in range(min(PARTS, dim))):
            rest = np.delete(np.arange(dim), part)
            lengths = np.outer(squares[:, rest].sum(1), self.squares[:, rest].sum(1)).clip(1e-12) ** 0.5
            cosine = (products - scaled[:, part] @ self.scaled[:, part].T) / lengths
            foretold[:, part] = self.cells[cosine.argmax(1)][:, part]
        return foretold

    def compare(self, cells: np.ndarray) -> Comparison:
        """cells (n, dim), of length 1."""
        foretold = self.foretell(cells)
        a, b = ((x - x.mean(0)) / self.scale for x in (cells, foretold))
        together = (a * b).mean(0)
        products = (cells * foretold).mean(0)
        return Comparison(
            len(cells),
            float(together.sum() / ((a**2).mean(0).sum() * (b**2).mean(0).sum() + 1e-12) ** 0.5),
            float(np.maximum(-together, 0).sum() / (abs(together).sum() + 1e-12)),
            float(products.sum()),
            int(products.argmin()),
            float(-products.min()),
        )


def draw(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` of the rows, in order, float64 of length 1."""
    rows = np.sort(rng.permutation(len(vectors))[:count])
    some = vectors[rows].astype(np.float64)
    return some / np.linalg.norm(some, axis=1, keepdims=True)


def space_problem(vectors: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[str, bool] | None:
    """vectors (n, dim) and reference (m, dim) float32, usable -> what is unusual, and whether it is certain; or None.

    n < MIN_CELLS: None.
    """
    if len(vectors) < MIN_CELLS or vectors.shape[1] < 2 or len(reference) < MIN_CELLS:
        return None
    compared = Bank(reference, seed).compare(draw(vectors, SAMPLE, np.random.default_rng(seed)))
    certain = compared.cells >= MANY_CELLS
    if compared.is_other():
        return (OTHER, True) if certain else (WARNING + OTHER, False)
    if certain and compared.is_turned():
        return TURNED, True
    return (SIGN.format(compared.number + 1), False) if certain and compared.gain > MAX_GAIN else None


class RowCheck:
    """Looks at the rows of a query for a block of another embedding: in runs of a fortieth of them, MIN_RUN at least.

    A block of a twentieth holds a whole run, wherever it lies. `add` takes the rows in order, in chunks of many runs,
    and `problem` says which runs have nothing in common with the reference.
    """

    def __init__(self, reference: np.ndarray, num_rows: int) -> None:
        self.bank = Bank(reference) if reference.shape[1] > 1 and len(reference) >= MIN_CELLS else None
        self.length = max(MIN_RUN, num_rows // RUNS)
        self.row = 0  # that comes next
        self.strange = list[tuple[int, int]]()  # first row, and that after the last

    def add(self, vectors: np.ndarray) -> None:
        """vectors (n, dim) float32, usable or not."""
        for run in np.split(vectors, range(self.length, len(vectors), self.length)):
            first, self.row = self.row, self.row + len(run)
            run = run[usable(run)]
            if self.bank is None or len(run) < MIN_RUN // 2:
                continue
            if self.bank.compare(draw(run, MIN_RUN, np.random.default_rng(0))).is_other():
                if self.strange and self.strange[-1][1] == first:
                    first = self.strange.pop()[0]
                self.strange.append((first, self.row))

    def problem(self) -> str:
        """A line, or ""; the rows are counted from 1."""
        blocks = [f"{first + 1:,} to {last:,}" for first, last in self.strange[:MAX_BLOCKS]]
        more = ", ..." if len(self.strange) > MAX_BLOCKS else ""
        return ROWS.format(", ".join(blocks) + more) if blocks else ""
