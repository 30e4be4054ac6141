"""Annotating the cells of donors that nothing has seen: accuracy, coverage, calibration, and types that are missing.

    export FRACTAL_REAL_DATA=...  # the folder that holds pbmc_tonsil/ (README: Real cells)
    uv run python -m benchmarks.annotation

Every seed holds two blood and two tonsil donors of pbmc_tonsil out. One adapter is trained on all types, and one more
per type of at least 50 cells, on a file from which that type was taken out before anything else. Adapters that are
there are not trained again; delete the output folder after a change of the code. Writes annotation.json and
annotation.md. About ten minutes for three draws on two cores.

Rivals, calibrated on the same validation cells by the same function: logistic regression on the standardised raw
vectors, as CellTypist does on genes; 5-NN on the raw vectors; the adapter's own probabilities; and neighbours of prefix
j for level j.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import ingest
import stratify
import train
from benchmarks.intervals import cluster_bootstrap
from benchmarks.quality import summary, tonsil_and_blood
from fractal.annotate.annotator import Annotator, path_names
from fractal.annotate.answers import Answer, answer
from fractal.annotate.calibration import calibrate, held_out_of
from fractal.annotate.novelty import CAUTION, CAUTIOUS_DEPTH, NOVEL
from fractal.annotate.votes import NEIGHBOURS, Raw, descend
from fractal.base.errors import InputError, run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import non_negative_int
from fractal.data.atlas import Atlas
from fractal.hierarchy.levels import LEVELS
from fractal.hierarchy.ontology import CL_SLIM, build_hierarchy, level_terms, load_graph, term_distances
from fractal.hierarchy.tree import at_or_above
from fractal.model.adapter import FractalAdapter, embed
from fractal.model.checkpoint import load
from fractal.model.split import Split
from fractal.score.metrics import K, calibration_noise_floor, expected_calibration_error
from fractal.search.exact import nearest

MIN_CELLS = 50  # rarer types are not taken out
THRESHOLDS = [0.01, 0.02, 0.03, NOVEL, 0.05, 0.07, 0.1, 0.15]  # that NOVEL might have; CAUTION keeps its ratio to it
OURS = "fractal, neighbours of full"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("FRACTAL_REAL_DATA"),
        help="folder with pbmc_tonsil/model_v1.1 (default: $FRACTAL_REAL_DATA)",
    )
    parser.add_argument(
        "--seeds",
        type=non_negative_int,
        nargs="+",
        default=[3, 4, 5],
        help="draws of donors (default: 3 4 5)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("data/annotation"),
        help="keeps files and adapters (default: %(default)s)",
    )
    return parser


def prepare(data: Path | None, folder: Path) -> list[str | None]:
    """Write without_0.parquet, all cells, and without_i.parquet, all but one type -> None and the types taken out."""
    if data is None:
        raise InputError("FRACTAL_REAL_DATA is not set: name the folder of the atlases with it, or with --data")
    cells = folder / "cells.parquet"
    if not cells.exists():
        ingest.main(["--model-dir", str(data / "pbmc_tonsil" / "model_v1.1"), "--output", str(cells)])
    rows = pq.read_table(cells)
    subtype = rows["level4_subtype"].cast(pa.string())
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(subtype).to_pylist()}
    removed = [None, *sorted(name for name, count in counts.items() if count >= MIN_CELLS)]
    for i, name in enumerate(removed):
        stratified, part = folder / f"without_{i}.parquet", folder / "part.parquet"
        if not stratified.exists():
            pq.write_table(rows if name is None else rows.filter(pc.not_equal(subtype, name)), part)
            stratify.main(["--input", str(part), "--output", str(stratified)])
    return removed


def trained(folder: Path, seed: int, i: int, flags: Sequence[str] = ()) -> tuple[Annotator, list[int], Split, Path]:
    """The reference of a seed that has not seen type i; four donors are held out, or what `flags` say."""
    path, model = folder / f"without_{i}.parquet", folder / f"{seed}_{i}{'_cells' if flags else ''}.pt"
    if not model.exists():
        held_out = flags or tonsil_and_blood(folder / "without_0.parquet", seed, fold=0)
        train.main(["--input", str(path), "--output", str(model), "--seed", str(seed), *held_out])
    adapter, checkpoint = load(model)
    split = Split.of(checkpoint, model)
    atlas = Atlas.open(path)
    train_rows, val_rows, _ = split.rows(atlas)
    cells, validation = atlas.read(train_rows), atlas.read(val_rows)
    counts = atlas.path_counts(~split.is_test(atlas))
    return Annotator.of(adapter, cells, validation, counts), checkpoint["config"]["block_levels"], split, path


def rivals(annotator: Annotator, blocks: list[int], queries: np.ndarray) -> dict[str, list[Raw]]:
    """Name -> what each says of the queries, one entry for all levels or one per level."""
    adapter, x, path = cast(FractalAdapter, annotator.adapter), annotator.vectors, annotator.path
    nodes, num_paths = annotator.tree.nodes, len(annotator.tree.paths)
    nothing = np.zeros(len(queries))  # no rival flags odd cells

    def raw(probability: np.ndarray) -> Raw:
        every = torch.arange(num_paths).expand(len(probability), -1)
        said, share = descend(every, torch.from_numpy(probability), torch.from_numpy(nodes))
        none = np.full(len(queries), -1)
        return Raw(said.numpy(), share.numpy(), np.tile(nothing[:, None], 3), nothing, none, nothing)

    def neighbours(q: torch.Tensor, bank: torch.Tensor, k: int) -> Raw:
        found = path[nearest(q, bank, k).numpy()]
        return raw(np.stack([(found == p).mean(1) for p in range(num_paths)], axis=1))

    q, bank = torch.from_numpy(queries), torch.from_numpy(x)
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000)).fit(x, path)
    spread = np.zeros((len(queries), num_paths))
    spread[:, regression.classes_] = regression.predict_proba(queries)
    pairs = list(zip(embed(adapter, q), embed(adapter, bank), strict=True))
    # a level of one class has no block: there the first prefix answers
    prefixes = [pairs[max(sum(block <= k for block in blocks) - 1, 0)] for k in range(len(annotator.tree.levels))]
    with torch.inference_mode():
        own = adapter(q).logits.softmax(1).double().numpy()
    # the adapter's paths are sorted by codes of sorted names, as the tree's are; both hold all types here
    return {
        "fractal, neighbours of prefix j": [neighbours(a, b, NEIGHBOURS) for a, b in prefixes],
        "fractal, adapter's probabilities": [raw(own)],
        "logistic regression on raw": [raw(spread)],
        "5-NN on raw": [neighbours(q, bank, K)],
    }


def known_cells(folder: Path, seed: int, graph: nx.DiGraph) -> dict[str, dict[str, np.ndarray]]:
    """All types in the reference, test cells of other donors -> method -> arrays, one entry per test cell."""
    annotator, blocks, split, path = trained(folder, seed, 0)
    tree, calibration = annotator.tree, annotator.calibration
    atlas = Atlas.open(path)
    test_rows = split.rows(atlas)[2]
    test = atlas.read(test_rows)
    position = {names: code for code, names in enumerate(tree.paths)}
    test_codes = [position[names] for names in path_names(test)]
    kept = annotator.held_out
    vectors, codes = np.concatenate([kept.vectors, test.vectors]), np.concatenate([kept.path, test_codes])
    donor = atlas.studies[0][test_rows]
    v = len(kept)
    terms = np.array([level_terms(row, graph) for row in build_hierarchy([p[-1] for p in tree.paths], graph)])
    names = sorted({graph.nodes[term]["name"] for term in terms.flat})
    steps = term_distances(names, graph)
    code = np.array([[names.index(graph.nodes[term]["name"]) for term in row] for row in terms])
    true = code[codes[v:], -1]
    id_of = {data["name"]: term for term, data in graph.nodes(data=True)}
    above = np.array([np.isin([id_of[t] for t in names], [*at_or_above(graph, own)]) for own in terms[:, -1]])

    found: dict[str, dict[str, np.ndarray]] = {}
    methods: dict[str, list[Raw]] = {OURS: [annotator.voting(vectors)]}
    methods |= rivals(annotator, blocks, vectors)
    for name, raws in methods.items():
        answers = []
        for raw in raws:
            held_out, tested = (
                Raw(*(field[rows] for field in vars(raw).values())) for rows in (slice(v), slice(v, None))
            )
            own = calibration if name == OURS else calibrate(kept, tree, held_out)
            answers.append(answer(tested, own))
        per_level = answers if len(answers) > 1 else answers * len(LEVELS)
        probability = np.stack([a.probability[:, k] for k, a in enumerate(per_level)], axis=1)
        right = np.stack([tree.nodes[a.path, k] == tree.nodes[codes[v:], k] for k, a in enumerate(per_level)], axis=1)
        depth = per_level[0].depth if len(answers) == 1 else (np.minimum.accumulate(probability, 1) >= 0.8).sum(1)
        paths = np.stack([a.path for a in per_level], axis=1)
        said = code[paths[np.arange(len(depth)), np.maximum(depth - 1, 0)], np.maximum(depth - 1, 0)]
        forced = code[paths[:, -1], -1]
        deeper = per_level[0].confident_depth > per_level[0].depth
        withheld = right[:, -1] & deeper
        found[name] = {
            "probability": probability,
            "right": right,
            "depth": depth,
            "steps": steps[said, true],
            "steps_forced": steps[forced, true],
            "astray": off_path(steps, above[codes[v:]], said),
            "astray_forced": off_path(steps, above[codes[v:]], forced),
            "novel": per_level[0].novel,
            "withheld": withheld,
            "donor": donor,
        }
    return found


def off_path(steps: np.ndarray, above: np.ndarray, said: np.ndarray) -> np.ndarray:
    """(n,) steps from what was said to the nearest term that is true of the cell: itself or an ancestor."""
    return np.where(above, steps[said], np.inf).min(1)


def missing_type(folder: Path, seed: int, i: int, name: str, graph: nx.DiGraph) -> dict[str, float]:
    """Type i out of training, calibration and reference -> what is said of its cells in the held-out donors."""
    annotator, _, split, path = trained(folder, seed, i)
    whole = folder / "without_0.parquet"
    labels = pq.read_table(whole, columns=["level4_subtype", "study"])
    theirs = pc.equal(labels["level4_subtype"].cast(pa.string()), name).to_numpy()
    held_out = pc.is_in(labels["study"].cast(pa.string()), pa.array(split.test_studies)).to_numpy()
    unseen = annotator.answer(Atlas.open(whole).read(np.flatnonzero(theirs & held_out)).vectors)
    atlas = Atlas.open(path)
    others = atlas.read(split.rows(atlas)[2])
    known = annotator.answer(others.vectors)
    right = np.array([annotator.tree.paths[code] for code in known.path])[:, -1] == np.array(path_names(others))[:, -1]

    hierarchy = build_hierarchy([p[-1] for p in annotator.tree.paths], graph)
    terms = np.array([["", *level_terms(row, graph)] for row in hierarchy])  # depth 0 says nothing
    true = nx.descendants(graph, build_hierarchy([name], graph)[0].cl_id)
    ancestor = np.isin(terms[unseen.path, unseen.depth], sorted(true))
    forced = np.isin(terms[unseen.path, -1], sorted(true))
    points: dict[str, float] = {}
    for threshold in THRESHOLDS:
        flagged, depth = at_threshold(unseen, threshold)
        known_flagged, known_depth = at_threshold(known, threshold)
        found = flagged | np.isin(terms[unseen.path, depth], sorted(true))
        withheld = right & (known_depth < known.confident_depth)
        points |= {
            f"found at {threshold:g}": float(found.mean()),
            f"flagged at {threshold:g}": float(flagged.mean()),
            f"known flagged at {threshold:g}": float(known_flagged.mean()),
            f"known withheld at {threshold:g}": float(withheld.mean()),
        }
    return {
        "cells": len(ancestor),
        "flagged": float(unseen.novel.mean()),
        "ancestor": float(ancestor.mean()),
        "either": float((unseen.novel | ancestor).mean()),
        "forced": float(forced.mean()),
        "known_flagged": float(known.novel.mean()),
        **points,
    }


def at_threshold(said: Answer, novel: float) -> tuple[np.ndarray, np.ndarray]:
    """-> which cells (n,) would be flagged, and to which depth (n,) answered, if NOVEL were `novel`."""
    odd = said.p_value < novel * CAUTION / NOVEL
    return said.p_value < novel, np.where(odd, np.minimum(said.confident_depth, CAUTIOUS_DEPTH), said.confident_depth)


def calibration_rows(folder: Path, seed: int) -> dict[str, list[float]]:
    """Does it matter that the validation cells, which calibrate, have chosen the epoch before?

    A third of all cells is held out at random. Half of these score; of the other half, as many as there are validation
    cells calibrate instead of them. -> rows that calibrate -> the largest ECE of the levels, and the shares of cells
    whose p-value is below NOVEL and CAUTION.
    """
    flags = ["--split-seed", str(seed), "--test-ratio", "0.33"]
    annotator, _, split, path = trained(folder, seed, 0, flags)
    atlas = Atlas.open(path)
    test = atlas.read(np.random.default_rng(seed).permutation(split.rows(atlas)[2]))
    position = {names: code for code, names in enumerate(annotator.tree.paths)}
    codes = np.array([position[names] for names in path_names(test)])
    half, n = len(codes) // 2, len(annotator.held_out)
    others = slice(half, half + n)
    never, cells = annotator.voting.ballot(test.vectors[others]), np.full(len(codes[others]), -1)
    fresh = calibrate(
        held_out_of(never, test.vectors[others], codes[others], cells, 0, np.ones(len(cells))), annotator.tree
    )
    raw = annotator.voting(test.vectors[:half])
    right = annotator.tree.nodes[raw.path] == annotator.tree.nodes[codes[:half]]
    found = {}
    for name, calibration in (("validation cells", annotator.calibration), ("cells never used", fresh)):
        said = answer(raw, calibration)
        ece = max(expected_calibration_error(p, hits) for p, hits in zip(said.probability.T, right.T, strict=True))
        found[name] = [ece, float((said.p_value < NOVEL).mean()), float((said.p_value < CAUTION).mean())]
    return found


def known_tables(runs: list[dict[str, dict[str, np.ndarray]]]) -> tuple[str, dict[str, Any]]:
    """All seeds' test cells pooled -> tables and figures."""
    accuracy, error, distance, figures = [], [], [], {}
    for name in runs[0]:
        all_of = {key: np.concatenate([r[name][key] for r in runs]) for key in runs[0][name]}
        right, depth, probability = all_of["right"], all_of["depth"], all_of["probability"]
        at_depth = right[np.arange(len(depth)), np.maximum(depth - 1, 0)][depth > 0]
        ece = [expected_calibration_error(probability[:, k], right[:, k]) for k in range(len(LEVELS))]
        floor = [calibration_noise_floor(probability[:, k]) for k in range(len(LEVELS))]
        cover = [float((depth > k).mean()) for k in range(len(LEVELS))]
        forced = right.mean(0).tolist()
        keys = ("steps", "steps_forced", "astray", "astray_forced", "novel", "withheld")
        means = {key: float(all_of[key].mean()) for key in keys}
        low, high = cluster_bootstrap(all_of["astray"] - all_of["astray_forced"], all_of["donor"])
        figures[name] = {
            "accuracy_at_depth": float(at_depth.mean()), "accuracy_forced": forced, "coverage": cover, "ece": ece,
            "ece_noise_floor": floor,
            **means, "astray_difference_interval": [low, high],
        }  # fmt: skip
        accuracy.append(
            [
                name,
                f"{at_depth.mean():.3f}",
                *(f"{c:.3f}" for c in cover),
                f"{means['novel']:.3f}",
                f"{means['withheld']:.3f}",
            ]
        )
        error.append(
            [
                name,
                *(f"{value:.3f}" for value in forced),
                *(f"{e:.4f} ({f:.4f})" for e, f in zip(ece, floor, strict=True)),
            ]
        )
        distance.append(
            [name, *(f"{means[key]:.3f}" for key in keys[:4]), f"{means['astray'] - means['astray_forced']:+.3f}"]
            + [f"[{low:+.3f}, {high:+.3f}]"]
        )
    n = sum(len(r[OURS]["depth"]) for r in runs)
    levels = [level.capitalize() for level in LEVELS]
    text = (
        f"{n:,} test cells of held-out donors, {len(runs)} draws pooled, confidence 0.8.\n\n"
        "Accuracy at the level reached, share of the cells answered at each level, and flagged as novel; withheld: cut"
        " by the novelty rule, though the subtype would have been right:\n\n"
        + table(["Method", "Accuracy", *levels, "Flagged", "Withheld"], accuracy)
        + "\n\nAccuracy if every level were answered, and expected calibration error (15 bins;"
        " in brackets what perfectly calibrated cells would have):\n\n"
        + table(["Method", *levels, *(f"ECE {level}" for level in LEVELS)], error)
        + "\n\nSteps in the Cell Ontology from the answer to the true subtype, and astray: to the nearest term that is "
        "true of the cell, itself or an ancestor; backed off at 0.8, and forced to a subtype. 95 % interval, "
        "resampling donors, of the last difference:\n\n"
        + table(["Method", "Steps", "forced", "Astray", "forced", "Difference", "Interval"], distance)
    )
    return text, figures


def missing_table(found: dict[str, list[dict[str, float]]]) -> str:
    keys = ("flagged", "ancestor", "either", "forced", "known_flagged")
    rows = [
        [name, f"{sum(r['cells'] for r in runs):,.0f}", *(f"{np.mean([r[key] for r in runs]):.3f}" for key in keys)]
        for name, runs in found.items()
    ]
    means = [f"{np.mean([r[key] for runs in found.values() for r in runs]):.3f}" for key in keys]
    header = ["Type taken out", "Cells", "Flagged", "True ancestor", "Either", "Subtype forced", "Known flagged"]
    return table(header, [*rows, ["mean over types", "", *means]])


def threshold_table(found: dict[str, list[dict[str, float]]]) -> str:
    """The ROC points, means over the types, each the mean of its draws."""
    keys = ("flagged", "found", "known flagged", "known withheld")
    rows = []
    for threshold in THRESHOLDS:
        means = [
            np.mean([np.mean([r[f"{key} at {threshold:g}"] for r in runs]) for runs in found.values()]) for key in keys
        ]
        rows.append([f"{threshold:g}{' (default)' if threshold == NOVEL else ''}", *(f"{mean:.3f}" for mean in means)])
    header = ["p-value below", "Unknown flagged", "Found", "Known flagged", "Known withheld"]
    return table(header, rows)


def rows_table(found: list[dict[str, list[float]]]) -> str:
    header = ["Calibrated on", "Largest ECE", f"p-value below {NOVEL}", f"below {CAUTION}"]
    columns = {name: np.array([run[name] for run in found]).T for name in found[0]}
    return table(header, [[name, *(summary(list(c), len(found)) for c in cells)] for name, cells in columns.items()])


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    removed = prepare(args.data, args.output)
    graph = load_graph(CL_SLIM)
    runs, missing = [], dict[str, list[dict[str, float]]]()
    rows = [calibration_rows(args.output, seed) for seed in args.seeds]
    with tqdm(total=len(args.seeds) * len(removed), unit="adapter", desc="annotation") as bar:
        for seed in args.seeds:
            for i, name in enumerate(removed):
                if name is None:
                    runs.append(known_cells(args.output, seed, graph))
                else:
                    missing.setdefault(name, []).append(missing_type(args.output, seed, i, name, graph))
                bar.update()
    text, figures = known_tables(runs)
    text += (
        "\n\nTypes that the reference lacks, in the held-out donors, mean of the draws: the answer is flagged "
        f"(p-value below {NOVEL}), or its deepest label is a true ancestor (below {CAUTION} it is at most a "
        "lineage). Subtype forced: share of the cells whose forced subtype is a true ancestor:\n\n"
        f"{missing_table(missing)}\n\n"
        "The same at other thresholds. Found: flagged, or answered by a true ancestor. Known: cells of other types; "
        "withheld: cut by the novelty rule, though the subtype would have been right:\n\n"
        f"{threshold_table(missing)}\n\n"
        "Which cells calibrate: the validation cells, which have chosen the epoch as well, or as many that nothing was "
        f"chosen on. Scored on a sixth of the cells, drawn at random; mean ± standard deviation of {len(rows)} draws:"
        f"\n\n{rows_table(rows)}\n"
    )
    for file, content in (
        ("annotation.md", text),
        ("annotation.json", json.dumps([figures, missing, rows], indent=1) + "\n"),
    ):
        with atomic_write(args.output / file) as part:
            part.write_text(content, encoding="utf-8")
    print("\n" + text)


if __name__ == "__main__":
    run(main)
