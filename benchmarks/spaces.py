"""Does `fractal annotate` notice vectors of another space, and leave honest ones alone?

    export FRACTAL_REAL_DATA=...  # the folder that holds the real atlases
    uv run python -m benchmarks.spaces

Every study (donor, organ) is a query once, and so is each of its types with at least 30 cells; the reference are the
cells of the other studies. Then the vectors of every study are changed as they would be in another space, and a block
of 5 % of its rows, of 100 at least, is replaced by random numbers. The limits in fractal/annotate/space.py were chosen
on these atlases with --seed 10 to 14, which draws other cells and changes.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.quality import prepare
from fractal.annotate.space import RowCheck, space_problem
from fractal.base.errors import InputError, run
from fractal.base.table import table
from fractal.commands.options import non_negative_int
from fractal.data.atlas import Atlas

ATLASES = ("pancreas_studies", "fetal_organs", "mouse_organs", "pbmc_tonsil")
HALVES = 10  # draws of half of the signs, of every study
MIN_QUERY = 30  # cells of a single type
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def turned(*numbers: int) -> Change:
    """Turn the signs of these numbers, from 0, round."""
    return lambda x, _: np.where(np.isin(np.arange(x.shape[1]), numbers), -x, x)


def half_turned(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return turned(*rng.permutation(x.shape[1])[: x.shape[1] // 2])(x, rng)


def rotated(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (x @ np.linalg.qr(rng.normal(size=(x.shape[1],) * 2))[0]).astype(np.float32)


def own_components(x: np.ndarray, _: np.random.Generator) -> np.ndarray:
    """Principal components of these cells alone."""
    centred = x - x.mean(0)
    return (centred @ np.linalg.svd(centred, full_matrices=False)[2].T).astype(np.float32)


CHANGES: dict[str, Change] = {
    "own principal components": own_components,
    "numbers in another order": lambda x, rng: x[:, rng.permutation(x.shape[1])],
    "rotated": rotated,
    "half of the signs turned": half_turned,
    "random numbers": lambda x, rng: rng.normal(size=x.shape).astype(np.float32),
    "sign of number 1 turned": turned(0),
    "signs of 1 and 2 turned": turned(0, 1),
    "sign of number 8 turned": turned(7),
}


def queries(vectors: np.ndarray, types: np.ndarray, rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """What is asked of a study's cells: honest queries, and changed ones."""
    names, counts = np.unique(types, return_counts=True)
    single = [vectors[types == name] for name in names[counts >= MIN_QUERY]]
    honest = {"honest: a study": [vectors], "honest: ten of its cells": [vectors[:10]], "honest: one type": single}
    full_rank = {name: change for name, change in CHANGES.items() if len(vectors) > vectors.shape[1]}
    draws = {name: HALVES if change is half_turned else 1 for name, change in full_rank.items()}
    return honest | {name: [change(vectors, rng) for _ in range(draws[name])] for name, change in full_rank.items()}


def rows_problem(vectors: np.ndarray, reference: np.ndarray, rng: np.random.Generator | None) -> str:
    """What is said of the rows of a study; with `rng` a block of them is made of random numbers."""
    if rng is not None:
        size = max(100, len(vectors) // 20)
        start = int(rng.integers(len(vectors) - size))
        vectors = vectors.copy()
        vectors[start : start + size] = rng.normal(size=(size, vectors.shape[1]))
    check = RowCheck(reference, len(vectors))
    check.add(vectors)
    return check.problem()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FRACTAL_REAL_DATA"), help="folder of the atlases")
    parser.add_argument("--output", type=Path, default=Path("data/quality"), help="keeps files (default: %(default)s)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if args.data is None:
        raise InputError("FRACTAL_REAL_DATA is not set: name the folder of the atlases with it, or with --data")
    found: dict[str, dict[str, list[str]]] = {}
    for name_of_atlas in ATLASES:
        atlas = Atlas.open(prepare(name_of_atlas, 0, args.data, args.output))
        cells, (studies, names) = atlas.read(np.arange(atlas.num_rows)), atlas.studies
        for study in tqdm(range(len(names)), unit="study", desc=name_of_atlas):
            own, rest = studies == study, cells.vectors[studies != study]
            rng = np.random.default_rng([args.seed, study])
            blocks = {"honest: its runs of rows": None} | ({"5 % foreign rows": rng} if own.sum() >= 200 else {})
            for name, foreign in blocks.items():
                reported = "warned" if rows_problem(cells.vectors[own], rest, foreign) else "passed"
                found.setdefault(name, {}).setdefault(name_of_atlas, []).append(reported)
            for name, group in queries(cells.vectors[own], cells.labels[own, -1], rng).items():
                for query in group:
                    problem = space_problem(query, rest, args.seed)
                    verdict = "passed" if problem is None else "refused" if problem[1] else "warned"
                    found.setdefault(name, {}).setdefault(name_of_atlas, []).append(verdict)

    def cell(verdicts: list[str]) -> str:
        return f"{verdicts.count('refused')} + {verdicts.count('warned')} of {len(verdicts)}" if verdicts else "-"

    rows = [[name, *(cell(of_atlas.get(atlas, [])) for atlas in ATLASES)] for name, of_atlas in found.items()]
    print("Refused + warned, of the queries\n\n" + table(["Query", *ATLASES], rows))


if __name__ == "__main__":
    run(main)
