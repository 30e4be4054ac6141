"""Who is held out: which rows of a file are trained on, validated on and tested on."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from fractal.base.errors import InputError, printable
from fractal.data.atlas import Atlas

VAL_RATIO = 0.15
TEST_CELLS = 5_000  # at most are scored: a standard error of .004 at an accuracy of .9
MIN_VALIDATION, MIN_PER_TYPE = 100, 5  # cells: a standard error of .04 at an accuracy of .8; fewer say little
MIN_TYPE = 10  # cells: a smaller type is not held out, it would say nothing in a test
HOLDOUTS = ("cells", "study", "type")


def held_out(num_rows: int, ratio: float, seed: int, fold: int = 0) -> np.ndarray:
    """(num_rows,) bool: which rows are set aside for testing, a uniform draw of about `ratio` < 1 of the file.

    Philox is a counter-based generator: the number of row i is a hash of (seed, i), whatever the file's length. The
    folds 0, 1, ... below 1 / ratio share no row.
    """
    drawn = np.random.Philox(key=seed).random_raw(num_rows) * 2.0**-64  # in [0, 1]
    return (drawn >= fold * ratio) & (drawn < (fold + 1) * ratio)


def draw_studies(atlas: Atlas, ratio: float, seed: int) -> list[str]:
    """Studies in random order, as many as it takes to hold `ratio` of the cells; never all of them."""
    codes, names = atlas.studies
    if len(names) < 2:
        raise InputError(
            f"{atlas.path}: all its cells are of one study, so none can be held out; hold out cells instead"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    share = np.cumsum(np.bincount(codes)[order]) / len(codes)
    count = min(int(np.searchsorted(share, ratio)) + 1, len(names) - 1)
    return sorted(names[i] for i in order[:count])


def draw_types(atlas: Atlas, ratio: float, seed: int) -> list[str]:
    """A share of the types that have at least MIN_TYPE cells: at least one, and all but two of the atlas's at most."""
    codes, names = atlas.finest
    large = np.flatnonzero(np.bincount(codes) >= MIN_TYPE)
    count = min(max(1, round(ratio * len(large))), len(large), len(names) - 2)
    if count < 1:
        raise InputError(
            f"{atlas.path}: holding out a type takes one with {MIN_TYPE} cells and two others; hold out cells instead"
        )
    return sorted(names[i] for i in np.random.default_rng(seed).permutation(large)[:count])


@dataclass(frozen=True)
class Split:
    """Which rows of a file are trained on, validated on and tested on; the checkpoint carries it."""

    fingerprint: str  # of the file
    num_rows: int
    seed: int  # of the split (--split-seed); that of the weights is another
    test_ratio: float
    val_ratio: float = VAL_RATIO  # of the samples
    max_samples: int = 0  # 0: all rows that are not test rows
    holdout: str = "cells"  # or "study": whole studies; or "type": all cells of a few types, and cells of the others
    test_studies: tuple[str, ...] = ()
    test_types: tuple[str, ...] = ()
    fold: int = 0  # which cells are held out: of a fifth each, the folds 0 to 4 hold every cell once

    def __post_init__(self) -> None:
        """Raises ValueError for what can't be: a split also comes from a checkpoint, which may be damaged."""
        whole = all(type(n) is int and 0 <= n < 2**63 for n in (self.num_rows, self.seed, self.max_samples, self.fold))
        shares = all(isinstance(r, float | int) and 0 <= r < 1 for r in (self.test_ratio, self.val_ratio))
        names = all(
            isinstance(group, tuple) and all(isinstance(name, str) for name in group)
            for group in (self.test_studies, self.test_types)
        )
        if not (whole and shares and names and isinstance(self.fingerprint, str) and self.holdout in HOLDOUTS):
            raise ValueError("not a split")

    @staticmethod
    def draw(
        atlas: Atlas,
        seed: int = 0,
        test_ratio: float = 0.2,
        holdout: str | None = None,
        test_studies: Sequence[str] = (),
        test_types: Sequence[str] = (),
        fold: int = 0,
    ) -> "Split":
        """Draw who is held out, as far as it is not given. `holdout` follows from names of studies or types.

        Raises InputError for arguments that contradict each other or the file.
        """
        named = "study" if test_studies else "type" if test_types else None
        holdout = holdout or named or "cells"
        if (test_studies and holdout != "study") or (test_types and holdout != "type"):
            kind = "studies" if test_studies else "types"
            raise InputError(f"{atlas.path}: --holdout {holdout} takes no names of {kind}")
        if fold and holdout != "cells":
            raise InputError(f"--fold {fold}: folds are of cells, and --holdout is {holdout}; leave it out")
        if fold and (fold + 1) * test_ratio > 1.001:
            raise InputError(f"--fold {fold}: there are {int(1.001 / test_ratio)} of --test-ratio {test_ratio}")
        if holdout == "study" and not test_studies and test_ratio:
            test_studies = draw_studies(atlas, test_ratio, seed)
        if holdout == "type" and not test_types and test_ratio:
            test_types = draw_types(atlas, test_ratio, seed)
        return Split(
            atlas.fingerprint,
            atlas.num_rows,
            seed,
            test_ratio,
            holdout=holdout,
            test_studies=tuple(test_studies),
            test_types=tuple(test_types),
            fold=fold,
        )

    def sampled(self, atlas: Atlas, max_samples: int = 0, val_ratio: float | None = None) -> "Split":
        """With so many samples, of which this share is validated on.

        `val_ratio` None is VAL_RATIO, or more in a small file: enough for MIN_VALIDATION cells and MIN_PER_TYPE per
        type, but never more than half.
        """
        split = replace(self, max_samples=max_samples, val_ratio=VAL_RATIO if val_ratio is None else val_ratio)
        if val_ratio is None:
            samples = split.sample_rows(atlas)
            wanted = max(MIN_VALIDATION, MIN_PER_TYPE * len(np.unique(atlas.finest[0][samples])))
            if wanted > VAL_RATIO * len(samples) > 0:
                split = replace(split, val_ratio=min(wanted, len(samples) // 2) / len(samples))
        return split

    @staticmethod
    def of(checkpoint: dict[str, Any], model: Path) -> "Split":
        """That of a checkpoint. Raises InputError for one without, or with that of an older version.

        Older versions took other rows for the same numbers, so their checkpoints can't be scored any more.
        """
        try:
            split = checkpoint["split"]
            if set(split) != {field.name for field in fields(Split)}:
                raise ValueError("other fields")
            names = {name: tuple(split[name]) for name in ("test_studies", "test_types")}
            return Split(**{**split, **names})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{model}: carries no split of this version of train.py; train it again to know its test cells"
            ) from error

    def is_test(self, atlas: Atlas) -> np.ndarray:
        """(num_rows,) bool. Copies of one vector are all test cells, or none is, where cells are held out.

        Raises InputError for a study or a type that the file does not have, and for another number of rows.
        """
        if self.num_rows != (there := atlas.num_rows):  # before memory is taken for them
            raise InputError(f"{atlas.path}: has {there:,} rows, and the split is of {self.num_rows:,}; name that file")
        if self.holdout == "study":
            return is_named(atlas, self.test_studies, "study")
        drawn = held_out(self.num_rows, self.test_ratio, self.seed, self.fold)[atlas.first_copies]
        return drawn | is_named(atlas, self.test_types, "type")

    def sample_rows(self, atlas: Atlas, is_test: np.ndarray | None = None) -> np.ndarray:
        """The rows that are trained or validated on, ascending: `max_samples` of those that are no test rows.

        They are balanced over the types where they are not all. A copy of a test cell is none of them.
        """
        is_test = self.is_test(atlas) if is_test is None else is_test
        first = atlas.first_copies
        tested = np.zeros(self.num_rows, bool)
        tested[first[is_test]] = True
        rest = np.flatnonzero(~is_test & ~tested[first])
        return atlas.balanced_rows(rest, self.max_samples or len(rest), self.seed)

    def rows(self, atlas: Atlas) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> training, validation and test rows, each ascending. No two share a vector.

        The test rows of `holdout` "cells" keep the file's mix of types.
        """
        is_test = self.is_test(atlas)
        rest = self.sample_rows(atlas, is_test)
        draw = np.random.default_rng(self.seed).permutation(len(rest))
        num_val = round(self.val_ratio * len(rest))
        validate = np.zeros(self.num_rows, bool)
        validate[rest[draw[:num_val]]] = True
        # A copy follows the first of its kind that is among these rows.
        _, place, group = np.unique(atlas.first_copies[rest], return_index=True, return_inverse=True)
        is_val = validate[rest[place]][group]
        return rest[~is_val], rest[is_val], np.flatnonzero(is_test)


def is_named(atlas: Atlas, wanted: Sequence[str], kind: str) -> np.ndarray:
    """(num_rows,) bool: rows of these studies or types. Raises InputError for names that there are not."""
    if not wanted:
        return np.zeros(atlas.num_rows, bool)
    codes, names = atlas.studies if kind == "study" else atlas.finest
    if unknown := sorted(set(wanted) - set(names)):
        missing, listed = printable(", ".join(unknown[:20])), printable(", ".join(names[:20]))
        raise InputError(f"{atlas.path}: has no {kind} {missing}; it has {listed}{', ...' if len(names) > 20 else ''}")
    return np.isin(np.array(names, object), list(wanted))[codes]
