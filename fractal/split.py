"""Who is held out: which rows of a file are trained on, validated on and tested on."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fractal.atlas import study_codes
from fractal.cli import InputError


def held_out(num_rows: int, ratio: float, seed: int, fold: int = 0) -> np.ndarray:
    """(num_rows,) bool: which rows are set aside for testing, a uniform draw of about `ratio` < 1 of the file.

    Philox is a counter-based generator: the number of row i is a hash of (seed, i), whatever the file's length. The
    folds 0, 1, ... below 1 / ratio share no row.
    """
    place = np.random.Philox(key=seed).random_raw(num_rows) * 2.0**-64  # in [0, 1]
    return (place >= fold * ratio) & (place < (fold + 1) * ratio)


def draw_studies(path: str | Path, ratio: float, seed: int) -> list[str]:
    """Studies in random order, as many as it takes to hold `ratio` of the cells; never all of them."""
    codes, names = study_codes(path)
    if len(names) < 2:
        raise InputError(f"{path}: all its cells are of one study, so none can be held out; hold out cells instead")
    order = np.random.default_rng(seed).permutation(len(names))
    share = np.cumsum(np.bincount(codes)[order]) / len(codes)
    count = min(int(np.searchsorted(share, ratio)) + 1, len(names) - 1)
    return sorted(names[i] for i in order[:count])


@dataclass(frozen=True)
class Split:
    """Which rows of a file are trained on, validated on and tested on; the checkpoint carries it."""

    fingerprint: str
    num_rows: int
    seed: int
    test_ratio: float
    val_ratio: float
    max_samples: int  # 0: all rows that are not test rows
    test_studies: list[str] = field(default_factory=list)  # whole studies are held out; none: cells are
    fold: int = 0  # which cells are: of a fifth each, the folds 0 to 4 hold every cell once

    @staticmethod
    def of(checkpoint: dict[str, Any], model: Path) -> "Split":
        """That of a checkpoint. Raises InputError for one without."""
        try:
            return Split(**checkpoint["split"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{model}: carries no split of train.py; train it again") from error

    def is_test(self, path: str | Path) -> np.ndarray:
        """(num_rows,) bool. Raises InputError for a study that the file does not have."""
        if not self.test_studies:
            return held_out(self.num_rows, self.test_ratio, self.seed, self.fold)
        codes, names = study_codes(path)
        if unknown := sorted(set(self.test_studies) - set(names)):
            raise InputError(f"{path}: has no study {', '.join(unknown)}; it has {', '.join(names[:20])}")
        return np.isin(np.array(names, object), self.test_studies)[codes]

    def rows(self, path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> training, validation and test rows, each ascending.

        Training and validation share the first `max_samples` rows that are no test rows; of a stratified file
        these are balanced over subtypes, while the test rows keep the file's own mix.
        """
        is_test = self.is_test(path)
        rest = np.flatnonzero(~is_test)[: self.max_samples or None]
        draw = np.random.default_rng(self.seed).permutation(len(rest))
        num_val = round(self.val_ratio * len(rest))
        return np.sort(rest[draw[num_val:]]), np.sort(rest[draw[:num_val]]), np.flatnonzero(is_test)
