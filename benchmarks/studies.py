"""Answers in studies that nothing has seen: each study is held out once, and the others make a reference.

    export FRACTAL_REAL_DATA=...  # the folder of the real atlases
    uv run python -m benchmarks.studies --atlases pancreas_studies mouse_organs

`fit` gets the other studies, and `annotate` the one that was held out; the donors of blood and tonsil are held out in
twos. Known cells are of a type that the reference has. Printed are, as means over the studies: known cells that are
flagged, or whose right subtype is withheld, and flagged cells of unknown types at several thresholds (the ROC);
subtypes that are answered and right; and the error that was asked for beside the one that came of it. --fold-cells
shows what it costs that the folds of a large atlas train on a part of it, --by cells what is promised for cells of the
same studies: then fifths of the cells are held out, and `fit` knows no studies. What was done is not done again; delete
the output folder after a change of the code. Constants were chosen with --seed 10. Six trainings a study, of ten
seconds each for 1,500 cells.
"""

import argparse
import contextlib
import io
from pathlib import Path

import numpy as np
from anndata import AnnData
from pandas import DataFrame
from tqdm import tqdm

from benchmarks.quality import add_data, prepare
from fractal.annotate import cross_fit
from fractal.annotate.novelty import CAUTION, NOVEL
from fractal.base.errors import run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import non_negative_int, positive_int
from fractal.data.atlas import Atlas
from fractal.fitting import fit

ATLASES = ["pancreas_studies", "mouse_organs", "fetal_organs", "pbmc_tonsil"]
IN_TWOS = {"pbmc_tonsil"}
ERRORS = (0.01, 0.05, 0.1)
THRESHOLDS = (0.01, 0.02, 0.03, NOVEL, CAUTION, 0.07, 0.1, 0.15)
MIN_KNOWN = 50  # known cells of a study that may be the worst
Study = dict[str, np.ndarray]  # an entry per cell


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--atlases", nargs="+", choices=ATLASES, default=ATLASES, help="(default: all)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of fit (default: %(default)s)")
    parser.add_argument(
        "--by", choices=["studies", "cells"], default="studies", help="what is held out (default: %(default)s)"
    )
    parser.add_argument(
        "--fold-cells",
        type=positive_int,
        default=cross_fit.FOLD_CELLS,
        help="that a fold of fit trains on, at most (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=Path("data/studies"), help="(default: %(default)s)")
    return parser


def cells_of(atlas: str, args: argparse.Namespace) -> AnnData:
    opened = Atlas.open(prepare(atlas, 0, args.data, args.output))
    cells, (codes, names) = opened.read(np.arange(opened.num_rows)), opened.studies
    finest = np.array(cells.classes[-1], object)[cells.labels[:, -1]]
    obs = DataFrame({"type": finest, "study": np.array(names, object)[codes]}, index=np.arange(len(codes)).astype(str))
    return AnnData(obs=obs, obsm={"X": cells.vectors})


def groups_of(atlas: str, names: list[str]) -> list[list[str]]:
    """The studies that are held out together."""
    order = np.random.default_rng(0).permutation(len(names)) if atlas in IN_TWOS else np.arange(len(names))
    size = 2 if atlas in IN_TWOS else 1
    return [[names[i] for i in order[k : k + size]] for k in range(0, len(names), size)]


def answers_for(cells: AnnData, held_out: list[str], study: str | None, seed: int) -> Study:
    """Fit on the other studies, annotate these."""
    out = cells.obs["study"].isin(held_out).to_numpy()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        reference = fit(cells[~out].copy(), "type", "X", study, seed=seed)
    new = cells[out]
    annotator = reference.annotator
    found = annotator.answer(new.obsm["X"])
    types = new.obs["type"].to_numpy(object)
    path_of = {path[-1]: path for path in annotator.tree.paths}
    known = np.array([name in path_of for name in types])
    nothing = ("",) * found.probability.shape[1]
    true = np.array([path_of.get(name, nothing) for name in types], object)
    controls = [annotator.calibration.control(error) for error in ERRORS]
    return {
        "study": new.obs["study"].to_numpy(str),
        "known": known,
        "right": np.array(annotator.tree.paths, object)[found.path] == true,
        "probability": found.probability,
        "p_value": found.p_value,
        "confidence": np.tile([control.confidence for control in controls], (len(types), 1)),
        "guaranteed": np.tile([control.unit for control in controls], (len(types), 1)),
        "held_out": np.full(len(types), reference.facts["held_out"]),
    }


def depth_of(study: Study, confidence: np.ndarray | float, caution: float = CAUTION) -> np.ndarray:
    """How many levels are answered (n,); caution 0 is without the novelty rule."""
    depth = (study["probability"] >= np.reshape(confidence, (-1, 1))).sum(1)
    return np.where(study["p_value"] < caution, np.minimum(depth, 2), depth)


def wrong_of(study: Study, depth: np.ndarray) -> np.ndarray:
    """(n,) bool: is the deepest label neither the cell's nor above it?"""
    return (depth > 0) & ~study["right"][np.arange(len(depth)), np.maximum(depth - 1, 0)]


def mean(values: list[float]) -> str:
    values = [value for value in values if not np.isnan(value)]
    return f"{np.mean(values):.3f}" if values else "-"


def share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def novelty_table(studies: list[Study]) -> str:
    unknown = np.concatenate([study["p_value"][~study["known"]] for study in studies])
    rows = []
    for threshold in THRESHOLDS:
        flagged = [study["p_value"][study["known"]] < threshold for study in studies]
        withheld = []
        for study in studies:
            deeper = depth_of(study, 0.8, 0.0) > depth_of(study, 0.8, max(threshold, CAUTION))
            withheld.append(share((deeper & study["right"][:, -1])[study["known"]]))
        worst = max((share(hits) for hits in flagged if len(hits) >= MIN_KNOWN), default=float("nan"))
        found = f"{share(unknown < threshold):.3f}" if len(unknown) else "-"
        name = f"{threshold:g}{', the default' if threshold == NOVEL else ''}"
        rows.append([name, mean([share(hits) for hits in flagged]), f"{worst:.3f}", mean(withheld), found])
    header = ["Flagged at a p-value below", "Known flagged", "worst study", "Right and withheld"]
    return table([*header, f"Unknown flagged, of {len(unknown):,}"], rows)


def answers_table(studies: list[Study]) -> str:
    rows = []
    for study in studies:
        known, right = study["known"], study["right"][:, -1]
        deep = depth_of(study, 0.8) == study["right"].shape[1]
        forced = [share(right), share(right[known])]
        rows.append([share(known), *forced, share(deep), share(right[deep]), share(right[deep & known])])
    header = ["Known", "Forced subtypes right", "of known cells", "Subtype answered", "right", "of known cells"]
    return table(["", *header], [["mean of the studies", *(mean(list(column)) for column in np.transpose(rows))]])


def error_table(studies: list[Study]) -> str:
    rows = []
    for k, error in enumerate(ERRORS):
        figures = []
        for study in studies:
            known, depth = study["known"], depth_of(study, study["confidence"][:, k])
            wrong = wrong_of(study, depth)
            figures.append(
                [share(wrong[known]), share(wrong), share(wrong[depth > 0]), share(depth == study["right"].shape[1])]
            )
        columns = np.transpose(figures)
        worst = np.nanmax(columns[0])
        units = {name or "target" for study in studies for name in study["guaranteed"][:, k]}
        rows.append(
            [f"{error:g}", ", ".join(sorted(units)), mean(list(columns[0])), f"{worst:.3f}", *map(mean, columns[1:])]
        )
    header = [
        "Error asked for",
        "Holds for",
        "Wrong, of known cells",
        "worst study",
        "of all cells",
        "of answered cells",
    ]
    return table([*header, "Subtype answered"], rows)


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    cross_fit.FOLD_CELLS = args.fold_cells
    text = []
    for atlas in args.atlases:
        cells = cells_of(atlas, args)
        studies, held_out = [], set()
        by_study = args.by == "studies"
        if not by_study:
            cells.obs["study"] = np.random.default_rng(args.seed).permutation(cells.n_obs) % 5
            cells.obs["study"] = "fifth " + cells.obs["study"].astype(str)
        groups = groups_of(atlas if by_study else "", sorted(cells.obs["study"].unique()))
        for group in tqdm(groups, unit="reference", desc=atlas):
            file = args.output / f"{atlas}_{args.seed}_{args.fold_cells}_{'_'.join(group)}.npz"
            if not file.exists():
                arrays = answers_for(cells, group, "study" if by_study else None, args.seed)
                with atomic_write(file) as part, open(part, "wb") as stream:
                    np.savez(stream, **arrays)  # type: ignore[arg-type]
            with np.load(file) as arrays:
                together = dict(arrays)
            held_out |= set(together["held_out"])
            for name in group:
                rows = together["study"] == name
                studies.append({key: values[rows] for key, values in together.items()})
        parts = [novelty_table(studies), answers_table(studies), error_table(studies)]
        text.append(
            f"## {atlas}: {len(studies)} {'studies' if by_study else 'fifths of the cells'}\n\n" + "\n\n".join(parts)
        )
        print("\n" + text[-1])
    with atomic_write(args.output / "studies.md") as part:
        part.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
