"""Cells that training has not seen the like of: types and studies held out whole, and whether the bar is met.

    export FRACTAL_REAL_DATA=...  # the folder that holds one per real atlas, pbmc_tonsil and so on
    uv run python -m benchmarks.unseen

Unseen types: a share of the types is held out, and some cells of the others; five draws of each real atlas, one of each
simulated one. Unseen studies: every study of the pancreas atlas, one at a time; the donors of blood and tonsil, in
twos; a share of the studies of each simulated atlas. Simulated are 60,000 cells, three seeds. At most 10,000 cells are
trained and validated on, whatever the recipe, because the published one is slow (--max-samples).

All recipes and controls are scored on the same cells. Intervals are of 95 %: for types, a bootstrap that resamples the
types; for studies, Student's over their means. Two runs at a time, a core each. Checkpoints and figures that are there
are not made again, so a run that was cut off goes on. Writes unseen.json and unseen.md.
"""

import argparse
import contextlib
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.intervals import cluster_bootstrap, t_interval
from benchmarks.quality import LONGER, add_data, own_embedding, prepare, train_and_score
from fractal.base.errors import run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import non_negative_int, positive_int
from fractal.data.atlas import Atlas
from fractal.hierarchy.levels import LEVELS

RECIPES = ["fractal", "mrl", "hce", "published"]
METHODS = ["raw", "LDA", "published", "mrl", "hce", "fractal"]  # of the tables in short
SIMULATED_CELLS = 60_000
TYPE_DRAWS = 5
ATLAS_SEEDS = 3
STUDY_ATLASES = ["pbmc_tonsil", "pancreas_studies", "simulated"]  # an organ is no study of the others
ATLASES = ["pbmc_tonsil", "fetal_organs", "pancreas_studies", "mouse_organs", "simulated"]
SMALL = {"fetal_organs", "pancreas_studies", "mouse_organs"}  # for the published recipe, see quality.py
TOLERANCE = 0.01  # how far below raw unseen types may be
GAIN = 0.02  # how far above raw the prefixes are to be, in the mean over the sets


@dataclass(frozen=True)
class Draw:
    """One split: what it holds out, and of which atlas."""

    kind: str  # "types" or "studies"
    atlas: str
    number: int  # of the draw; for a simulated atlas also its seed
    studies: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        if self.studies:
            return ["--test-studies", *self.studies]
        return ["--holdout", "type" if self.kind == "types" else "study"]


@dataclass(frozen=True)
class Result:
    """What eval.py wrote of a draw: its JSON, its arrays, and the study of each cell."""

    draw: Draw
    figures: dict[str, Any]
    cells: dict[str, np.ndarray]
    studies: np.ndarray | None

    def embeddings(self) -> list[str]:
        return [row["embedding"] for row in self.figures["rows"]]

    def right(self, protocol: str, name: str, level: int) -> np.ndarray:
        """(n,) bool. The name "RECIPE own" is the prefix with the level's own block, which differs between draws."""
        recipe, _, which = name.partition(" ")
        if which == "own":
            config = next(config for config in self.figures["config"] if config["recipe"] == recipe)
            name = f"{recipe} {own_embedding(config, level) or 'full'}"
        return self.cells[protocol][self.embeddings().index(name)][:, level]

    def units(self) -> np.ndarray:
        """(n,) what each cell is a draw of: its study, or its type; simulated atlases share none."""
        names = np.array(self.figures["classes"][-1])[self.cells["labels"][:, -1]]
        own = names if self.studies is None else self.studies.astype(str)
        return np.char.add(f"{self.draw.number}: ", own) if self.draw.atlas == "simulated" else own


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--atlases", nargs="+", choices=ATLASES, default=ATLASES, help="(default: all)")
    parser.add_argument("--kinds", nargs="+", choices=["types", "studies"], default=["types", "studies"])
    parser.add_argument(
        "--draws", type=positive_int, default=TYPE_DRAWS, help="of unseen types per real atlas (default: %(default)s)"
    )
    parser.add_argument(
        "--max-samples",
        type=non_negative_int,
        default=10_000,
        help="cells to train and validate on, 0 takes all (default: %(default)s)",
    )
    parser.add_argument("--jobs", type=positive_int, default=2, help="draws at a time (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("data/unseen"), help="(default: %(default)s)")
    return parser


def in_twos(names: list[str], seed: int = 0) -> list[tuple[str, ...]]:
    """Seeded pairs that hold every name once; of an odd number the last stands alone."""
    order = np.random.default_rng(seed).permutation(len(names))
    return [tuple(names[i] for i in order[k : k + 2]) for k in range(0, len(names), 2)]


def list_draws(kind: str, atlas: str, draws: int, stratified: Path) -> list[Draw]:
    if atlas == "simulated":
        return [Draw(kind, atlas, seed) for seed in range(ATLAS_SEEDS)]
    if kind == "types":
        return [Draw(kind, atlas, seed) for seed in range(draws)]
    names = Atlas.open(stratified).studies[1]
    groups = in_twos(names) if atlas == "pbmc_tonsil" else [(name,) for name in names]
    return [Draw(kind, atlas, number, group) for number, group in enumerate(groups)]


def place(draw: Draw, args: argparse.Namespace) -> tuple[Path, Path]:
    """-> the stratified file of a draw, and the folder of its runs."""
    stratified = prepare(draw.atlas, draw.number, args.data, args.output, SIMULATED_CELLS)
    return stratified, args.output / f"{draw.kind}_{draw.atlas}" / str(draw.number)


def run_draw(draw: Draw, args: argparse.Namespace) -> None:
    """Train all recipes on a draw and score them side by side, unless that is done."""
    stratified, folder = place(draw, args)
    if (folder / "figures.json").exists():
        return
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    folder.mkdir(parents=True, exist_ok=True)
    flags = dict.fromkeys(RECIPES, ["--max-samples", str(args.max_samples), *draw.flags])
    if draw.atlas in SMALL:
        flags["published"] = flags["published"] + LONGER
    files = folder / "figures.json", folder / "cells.npz"
    with (
        open(folder / "log.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        train_and_score(stratified, folder, flags, draw.number, *files, both=["--device", "cpu"])


def run_all(draws: list[Draw], args: argparse.Namespace) -> None:
    """In `args.jobs` processes; one job stays in this one."""
    with tqdm(total=len(draws), unit="draw", desc="unseen") as bar:
        if args.jobs == 1:
            for draw in draws:
                run_draw(draw, args)
                bar.update()
            return
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as workers:
            for job in as_completed([workers.submit(run_draw, draw, args) for draw in draws]):
                job.result()
                bar.update()


def read_result(draw: Draw, args: argparse.Namespace) -> Result:
    stratified, folder = place(draw, args)
    with np.load(folder / "cells.npz") as arrays:
        cells = dict(arrays)
    studies = Atlas.open(stratified).studies[0][cells["rows"]] if draw.kind == "studies" else None
    return Result(draw, json.loads((folder / "figures.json").read_text(encoding="utf-8")), cells, studies)


def pool(results: list[Result], who: str, protocol: str, level: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The cells that count, of all draws -> per draw their mask, and of them together the unit and the weight.

    who: "unseen" or "seen" types, whose unit is the type and where every draw weighs the same; or "studies", whose
    unit is the study, and each weighs the same.
    """
    masks, units, weights = [], [], []
    for result in results:
        seen = result.cells["seen"]
        mask = {"unseen": ~seen, "seen": seen, "studies": np.ones_like(seen)}[who].copy()
        if protocol == "bank":
            mask &= result.cells["counts"][:, level]
        own = result.units()[mask]
        _, place_of, size = np.unique(own, return_inverse=True, return_counts=True)
        masks.append(mask)
        units.append(own)
        weights.append(1 / size[place_of] if who == "studies" else np.full(len(own), 1 / max(len(own), 1)))
    return masks, np.concatenate(units), np.concatenate(weights)


def values(results: list[Result], masks: list[np.ndarray], protocol: str, name: str, level: int) -> np.ndarray:
    """Right (1.0) or wrong of the cells that count, of all draws."""
    found = [result.right(protocol, name, level)[mask] for result, mask in zip(results, masks, strict=True)]
    return np.concatenate(found).astype(float)


@dataclass(frozen=True)
class Line:
    """One figure of the bar: ours beside the best of the others, and what is asked of their difference."""

    bar: str
    cells: str
    figure: str
    ours: float
    best: float
    best_name: str
    difference: float
    interval: tuple[float, float]
    asked: float

    @property
    def verdict(self) -> str:
        if self.difference >= self.asked:
            return "met"
        return "not met" if self.interval[1] < self.asked else "open"  # below, but the interval does not exclude it

    def row(self) -> list[str]:
        low, high = self.interval
        return [
            self.bar, self.cells, self.figure, f"{self.ours:.3f}", f"{self.best:.3f} {self.best_name}",
            f"{self.difference:+.3f} [{low:+.3f}, {high:+.3f}]", f"{self.asked:+.2f}", self.verdict,
        ]  # fmt: skip


def compare(
    bar: str, results: list[Result], who: str, protocol: str, level: int, ours: str, others: list[str], asked: float
) -> Line | None:
    """Accuracy at a level, paired over the cells; None where no cell counts."""
    masks, units, weights = pool(results, who, protocol, level)
    if not len(units):
        return None
    own = values(results, masks, protocol, ours, level)
    scores = {name: values(results, masks, protocol, name, level) for name in others}
    means = {name: float(np.average(right, weights=weights)) for name, right in scores.items()}
    best = max(means, key=means.__getitem__)
    difference = own - scores[best]
    if who == "studies":
        interval = t_interval([difference[units == unit].mean() for unit in np.unique(units)])
    else:
        interval = cluster_bootstrap(difference, units, weights)
    mean = float(np.average(own, weights=weights))
    figure = f"{who} {protocol} {LEVELS[level]}, {ours}"
    return Line(bar, results[0].draw.atlas, figure, mean, means[best], best, mean - means[best], interval, asked)


def compare_f1(bar: str, results: list[Result], protocol: str, level: int, ours: str, others: list[str]) -> Line:
    """Macro F1 at a level; the draws, of one or two studies each, are the unit."""
    rows = [
        {row["embedding"]: row[f"{protocol}_macro_f1"][LEVELS[level]] for row in r.figures["rows"]} for r in results
    ]
    means = {name: float(np.mean([row[name] for row in rows])) for name in [ours, *others]}
    best = max(others, key=means.__getitem__)
    interval = t_interval([row[ours] - row[best] for row in rows])
    figure = f"studies {protocol} {LEVELS[level]} macro F1, {ours}"
    difference = means[ours] - means[best]
    return Line(bar, results[0].draw.atlas, figure, means[ours], means[best], best, difference, interval, 0.0)


def shared_names(results: list[Result], ours: bool) -> list[str]:
    """The embeddings that all draws have: those of `fractal`, or all others."""
    common = set.intersection(*(set(result.embeddings()) for result in results))
    return [name for name in results[0].embeddings() if name in common and name.startswith("fractal ") == ours]


def bar_1(results: list[Result]) -> list[Line | None]:
    full = [name for name in shared_names(results, ours=False) if "prefix" not in name]
    return [
        compare("1", results, "unseen", "loo", 3, "fractal full", ["raw"], -TOLERANCE),
        compare("1", results, "seen", "loo", 3, "fractal full", full, 0.0),
    ]


def bar_2(results: list[Result]) -> list[Line | None]:
    others = ["raw", "LDA", "mrl full", "mrl own", "published full", "published own"]
    others = [name for name in others if name.endswith(" own") or name in shared_names(results, ours=False)]
    return [compare("2", results, "unseen", "bank", level, "fractal own", others, 0.0) for level in range(3)]


def bar_2_gain(found: dict[str, list[Result]]) -> list[Line]:
    """The prefixes above raw, in the mean over the sets, which are the unit of the interval."""
    lines = []
    for level in range(3):
        each = [
            compare("2", results, "unseen", "bank", level, "fractal own", ["raw"], 0.0) for results in found.values()
        ]
        some = [line for line in each if line]
        if some:
            ours, raw = (float(np.mean([getattr(line, key) for line in some])) for key in ("ours", "best"))
            interval = t_interval([line.difference for line in some])
            figure = f"unseen bank {LEVELS[level]}, own prefix"
            lines.append(Line("2", f"mean of {len(some)} sets", figure, ours, raw, "raw", ours - raw, interval, GAIN))
    return lines


def bar_3(results: list[Result]) -> list[Line | None]:
    others = [name for name in shared_names(results, ours=False) if "prefix" not in name and not name.startswith("PCA")]
    others = [name for name in others if name == "LDA" or not name.startswith("LDA")]
    pairs = [(protocol, level) for protocol in ("loo", "bank") for level in range(len(LEVELS))]
    accuracy = [compare("3", results, "studies", p, k, "fractal full", others, 0.0) for p, k in pairs]
    return [*accuracy, *(compare_f1("3", results, p, k, "fractal full", others) for p, k in pairs)]


def overview(results: list[Result], who: str) -> str:
    """Accuracy of every embedding at every level, loo and bank, mean over the draws (over the studies)."""
    columns = [(protocol, level) for protocol in ("loo", "bank") for level in range(len(LEVELS))]
    pooled = {column: pool(results, who, *column) for column in columns}
    names = shared_names(results, ours=True) + shared_names(results, ours=False)
    lines = []
    for name in names:
        means = []
        for (protocol, level), (masks, units, weights) in pooled.items():
            right = values(results, masks, protocol, name, level)
            means.append(f"{np.average(right, weights=weights):.3f}" if len(units) else "-")
        lines.append([name, *means])
    return table(["Embedding", *(f"{protocol} {LEVELS[level]}" for protocol, level in columns)], lines)


def mean_of(results: list[Result], who: str, protocol: str, level: int, name: str) -> float:
    """Accuracy; NaN where no cell counts, or not all draws have this embedding."""
    masks, units, weights = pool(results, who, protocol, level)
    recipe, _, which = name.partition(" ")
    if not len(units) or (which != "own" and name not in set.intersection(*(set(r.embeddings()) for r in results))):
        return float("nan")
    return float(np.average(values(results, masks, protocol, name, level), weights=weights))


def macro_f1(results: list[Result], protocol: str, name: str) -> float:
    """Of the subtypes, mean over the draws; NaN where not all of them have it."""
    found = [row for r in results for row in r.figures["rows"] if row["embedding"] == name]
    values = [row[f"{protocol}_macro_f1"][LEVELS[-1]] for row in found]
    return float(np.mean(values)) if len(values) == len(results) else float("nan")


def in_short(types: dict[str, list[Result]], studies: dict[str, list[Result]]) -> str:
    """The figures that docs/results.md shows: the full vectors, and at coarser levels the prefix made for the level."""
    full = [name if name in ("raw", "LDA") else f"{name} full" for name in METHODS]
    own = [name if name in ("raw", "LDA") else f"{name} own" for name in METHODS]
    of_types, of_studies = [], []
    for atlas, results in types.items():
        lines = {"loo subtype": [mean_of(results, "unseen", "loo", 3, name) for name in full]}
        for level in range(3):
            means = [mean_of(results, "unseen", "bank", level, name) for name in own]
            lines[f"bank {LEVELS[level]}, prefix {level + 1}"] = means
        of_types += [[atlas, figure, *(f"{mean:.3f}" for mean in means)] for figure, means in lines.items()]
    for atlas, results in studies.items():
        for protocol in ("loo", "bank"):
            means = [mean_of(results, "studies", protocol, 3, name) for name in full]
            of_studies.append([atlas, protocol, *(f"{mean:.3f}" for mean in means)])
            means = [macro_f1(results, protocol, name) for name in full]
            of_studies.append([atlas, f"{protocol}, macro F1", *(f"{mean:.3f}" for mean in means)])
    unseen_types = table(["Unseen types", "Figure", *METHODS], of_types)
    unseen_studies = table(["Unseen studies", "Subtype", *METHODS], of_studies)
    return f"In short, means over the draws\n\n{unseen_types}\n\n{unseen_studies}\n"


def row_of(result: Result, name: str) -> dict[str, Any]:
    """What eval.py says of an embedding; the name "RECIPE lineage" is the prefix with the block of the lineage."""
    recipe, _, which = name.partition(" ")
    if which == "lineage":
        config = next(config for config in result.figures["config"] if config["recipe"] == recipe)
        name = f"{recipe} {own_embedding(config, LEVELS.index('lineage')) or 'full'}"
    return next((row for row in result.figures["rows"] if row["embedding"] == name), {})


def agreement(types: dict[str, list[Result]]) -> str:
    """Do the vectors agree with the trees? Centroids with the hierarchy, mistakes with the Cell Ontology."""
    names = {name: name if name in ("raw", "LDA") else f"{name} full" for name in METHODS}
    names |= {f"{recipe}, prefix 2": f"{recipe} lineage" for recipe in ("mrl", "fractal")}
    lines = []
    for atlas, results in types.items():
        for title, key in (("triplets, seen types", "seen"), ("triplets, unseen types", "unseen"), ("loo hF1", "")):
            means = []
            for name in names.values():
                rows = [row_of(result, name) for result in results]
                found = [row.get("triplets", {}).get(key) if key else row.get("loo_hierarchical_f1") for row in rows]
                known = [value for value in found if value is not None]
                means.append(f"{np.mean(known):.3f}" if known else "-")
            lines.append([atlas, title, *means])
    text = table(["Types held out", "Figure", *names], lines)
    return (
        "Triplets: two types and a third that leaves their path of the hierarchy earlier; how often the centroids of "
        "their cells say so too. hF1: F1 over all terms of the Cell Ontology at or above the predicted subtype. Means "
        f"over the draws\n\n{text}\n"
    )


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    sets = [(k, a) for k in args.kinds for a in args.atlases if k == "types" or a in STUDY_ATLASES]
    draws = {}
    for kind, atlas in sets:  # the files are made before the processes share them
        files = [place(Draw(kind, atlas, seed), args)[0] for seed in range(ATLAS_SEEDS if atlas == "simulated" else 1)]
        draws[kind, atlas] = list_draws(kind, atlas, args.draws, files[0])
    run_all([draw for own in draws.values() for draw in own], args)
    found = {key: [read_result(draw, args) for draw in own] for key, own in draws.items()}
    types = {atlas: results for (kind, atlas), results in found.items() if kind == "types"}
    studies = {atlas: results for (kind, atlas), results in found.items() if kind == "studies"}
    lines = [line for bar in (bar_1, bar_2) for results in types.values() for line in bar(results) if line]
    lines += [*bar_2_gain(types), *(line for results in studies.values() for line in bar_3(results) if line)]
    header = ["Bar", "Cells", "Figure", "Fractal", "Best other", "Difference", "Asked", "Verdict"]
    parts = [
        f"The bar: {sum(line.verdict == 'met' for line in lines)} of {len(lines)} met; open: below, but the interval "
        f"does not exclude it\n\n{table(header, [line.row() for line in lines])}\n",
        in_short(types, studies),
        agreement(types),
    ]
    for atlas, results in types.items():
        for who in ("unseen", "seen"):
            parts.append(f"{atlas}, types held out: {who} types, {len(results)} draws\n\n{overview(results, who)}\n")
    for atlas, results in studies.items():
        parts.append(f"{atlas}, studies held out, {len(results)} draws\n\n{overview(results, 'studies')}\n")
    text = "\n".join(parts)
    kept = {
        "bar": [{**asdict(line), "verdict": line.verdict} for line in lines],
        "draws": [{**asdict(r.draw), "figures": r.figures} for results in found.values() for r in results],
        "max_samples": args.max_samples,
    }
    for name, content in (("unseen.md", text), ("unseen.json", json.dumps(kept, indent=1))):
        with atomic_write(args.output / name) as part:
            part.write_text(content + "\n", encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    run(main)
