"""Whose answers are best in studies that nothing has seen? This tool beside six peers, on the same vectors, in one run.

    export FRACTAL_REAL_DATA=...  # the folder of the real atlases
    uv venv celltypist-env && uv pip install --python celltypist-env/bin/python celltypist "scikit-learn<1.7"
    uv run python -m benchmarks.peers --celltypist celltypist-env/bin/python

Each study is held out once (the donors of blood and tonsil in twos), and at most --cells cells of the others are the
labelled ones. All get the same vectors, all choose labels down the tree in the same way (`descend`), and all give their
probabilities as they come. CellTypist is the package, told to take any numbers; it runs in an environment of its own,
since it needs an older scikit-learn. SCimilarity's votes are those of its 50 nearest cells, each weighing 1 / distance.
Every peer is a process of its own; seconds are of computing (learning and answering, without imports). Outputs that are
there are not made again; delete the folder after a change of the code.

Curves: --noise gives wrong labels, drawn at random from the other types, to that share of the labelled cells. The share
of strangers, cells of types that no labelled cell has, needs no new answers: cells are weighed.
"""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from anndata import AnnData
from pandas import DataFrame
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import normalize
from tqdm import tqdm

from benchmarks.controls import HCE, ancestor_matrix
from benchmarks.encoder import timed
from benchmarks.intervals import t_interval
from benchmarks.quality import add_data
from benchmarks.studies import ATLASES, cells_of, groups_of
from fractal.annotate.novelty import NOVEL
from fractal.annotate.votes import descend
from fractal.base.errors import run
from fractal.base.files import atomic_write
from fractal.base.table import table
from fractal.commands.options import positive_int, ratio
from fractal.data.atlas import LabelledVectors
from fractal.fitting import fit
from fractal.hierarchy.ontology import CL_SLIM, build_hierarchy, load_graph
from fractal.hierarchy.tree import Tree
from fractal.model.recipes import Settings
from fractal.model.training import fit as train
from fractal.score.metrics import expected_calibration_error, hierarchical_f1, knn_accuracy, macro_scores
from fractal.search.exact import nearest

SURE = 0.8  # the default confidence of `annotate`
STRANGERS = (0.0, 0.2, 0.4, 0.6, 0.8)
MIN_STRANGERS = 5  # of a study whose strangers are scored
OURS = "fractal"
Arrays = dict[str, np.ndarray]
Spread = tuple[np.ndarray, np.ndarray]  # probabilities (m, paths); how strange each new cell looks (m,)

# --- the peers: labelled vectors (n, dim), their paths (n,), new vectors (m, dim) ------------------------------------


def scikit_learn(model: LogisticRegression | LinearDiscriminantAnalysis) -> Callable[..., Spread]:
    def answer(x: np.ndarray, path: np.ndarray, new: np.ndarray, tree: Tree) -> Spread:
        fitted = make_pipeline(StandardScaler(), model).fit(x, path)
        spread = np.zeros((len(new), len(tree.paths)))
        spread[:, fitted.classes_] = fitted.predict_proba(new)
        return spread, 1 - spread.max(1)

    return answer


def neighbours(k: int, weighted: bool) -> Callable[..., Spread]:
    """Votes of the k nearest by cosine; strange is far from the last of them, or where weighted, from the first."""

    def answer(x: np.ndarray, path: np.ndarray, new: np.ndarray, tree: Tree) -> Spread:
        bank, queries = (normalize(torch.from_numpy(vectors).double(), dim=1) for vectors in (x, new))
        rows = nearest(queries.float(), bank.float(), k)
        distance = (1 - (bank[rows] * queries[:, None]).sum(2)).clamp(min=1e-6).numpy()
        weight = 1 / distance if weighted else np.ones_like(distance)
        spread = np.zeros((len(new), len(tree.paths)))
        for column, votes in zip(path[rows.numpy()].T, weight.T, strict=True):
            spread[np.arange(len(new)), column] += votes
        return spread / spread.sum(1, keepdims=True), distance[:, 0 if weighted else -1]

    return answer


def hierarchical_cross_entropy(x: np.ndarray, path: np.ndarray, new: np.ndarray, tree: Tree) -> Spread:
    """Our network with this loss of benchmarks/controls.py; a tenth of the cells chooses the epoch."""
    names = np.array(tree.paths)
    classes, codes = zip(*(np.unique(column, return_inverse=True) for column in names.T), strict=True)
    cells = LabelledVectors(x, np.stack(codes, 1)[path], [list(texts) for texts in classes], tree.levels)
    order = np.random.default_rng(0).permutation(len(x))
    cells = LabelledVectors(cells.vectors[order], cells.labels[order], cells.classes, cells.levels)
    training, validation = cells.split(len(x) - len(x) // 10)
    counts = {tree.paths[code]: int(number) for code, number in enumerate(np.bincount(path)) if number}
    adapter = train(training, validation, counts, Settings(HCE), knn_accuracy).adapter
    kept = np.unique(path[order[: len(training.labels)]])
    kept = kept[np.argsort(names[kept, -1])]  # the adapter's outputs are the finest labels, sorted
    spread = np.zeros((len(new), len(tree.paths)))
    with torch.inference_mode():
        spread[:, kept] = adapter.eval()(torch.from_numpy(new)).logits.softmax(1).double().numpy()
    return spread, 1 - spread.max(1)


PEERS: dict[str, Callable[..., Spread]] = {
    "logistic regression": scikit_learn(LogisticRegression(max_iter=1_000)),
    "shrunken LDA": scikit_learn(LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")),
    "15-NN": neighbours(15, weighted=False),
    "SCimilarity's votes": neighbours(50, weighted=True),
    "hierarchical cross-entropy": hierarchical_cross_entropy,
}
CELLTYPIST = """
import sys, time
import numpy as np
import celltypist
for cells, output in zip(sys.argv[2::2], sys.argv[3::2]):
    with np.load(cells) as file:
        x, path, new, paths = (file[name] for name in ("x", "path", "new", "paths"))
    began = time.process_time()
    genes = [f"number {i}" for i in range(x.shape[1])]
    model = celltypist.train(x, labels=path.astype(str), genes=genes, check_expression=False, n_jobs=1)
    scaled = np.minimum((new - model.scaler.mean_) / model.scaler.scale_, 10)  # as celltypist.annotate does
    spread = np.zeros((len(new), len(paths)))
    spread[:, model.cell_types.astype(int)] = model.predict_labels_and_prob(scaled)[1]
    np.savez(output, spread=spread, odd=1 - spread.max(1), seconds=time.process_time() - began)
"""
ANSWER = "import sys; from benchmarks.peers import answer; answer(*sys.argv[1:])"


def answer(name: str, *files: str) -> None:
    """One process: a peer's answers, or ours; a file of cells, the file of its answers, and so on."""
    for cells, output in zip(files[::2], files[1::2], strict=True):
        with np.load(cells) as file:
            x, path, study, new, paths = (file[key] for key in ("x", "path", "study", "new", "paths"))
        tree, began = Tree.of([tuple(row) for row in paths.tolist()]), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if name == OURS:
                found = ours(x, path, study, new, tree)
            else:
                spread, odd = PEERS[name](x, path, new, tree)
                found = {"spread": spread, "odd": odd}
        np.savez(output, seconds=time.process_time() - began, **found)  # type: ignore[arg-type]


def ours(x: np.ndarray, path: np.ndarray, study: np.ndarray, new: np.ndarray, tree: Tree) -> Arrays:
    types = np.array([names[-1] for names in tree.paths])
    obs = DataFrame({"type": types[path], "study": study}, index=np.arange(len(x)).astype(str))
    annotator = fit(AnnData(obs=obs, obsm={"X": x}), "type", "X", "study").annotator
    said = annotator.answer(new)
    rows = tree.rows([annotator.tree.paths[code] for code in said.path])
    return {"path": rows, "probability": said.probability, "odd": 1 - said.p_value}


# --- figures ---------------------------------------------------------------------------------------------------------


def read(file: Path, tree: Tree) -> Arrays:
    """-> path (m,), probability (m, levels), odd (m,), and sure (m,): by what cells are ranked."""
    with np.load(file) as arrays:
        found = dict(arrays)
    if "path" in found:
        # Most cells share the highest probability, since no calibration cell contradicts it: among equals the more
        # ordinary ones are surer (the p-value). Flagged cells come last.
        ordinary = 1 - found["odd"]
        found["sure"] = found["probability"][:, -1] + 1e-6 * ordinary - (ordinary < NOVEL)
        return found
    spread = found["spread"]
    every = torch.arange(len(tree.paths)).expand(len(spread), -1)
    share = torch.from_numpy(spread / spread.sum(1, keepdims=True))
    path, probability = (part.numpy() for part in descend(every, share, torch.from_numpy(tree.nodes)))
    probability[:, -1] = spread[np.arange(len(path)), path]  # CellTypist's do not add up to 1
    return found | {"path": path, "probability": probability, "sure": probability[:, -1]}


def risk_coverage(sure: np.ndarray, wrong: np.ndarray, weight: np.ndarray | None = None) -> float:
    """The area under the curve of the share of wrong answers among the surest ones; 0 is best.

    Cells (n,) with the same number in `sure` are answered together: the curve runs straight through them.
    """
    weight = np.ones(len(sure)) if weight is None else weight
    number = np.unique(-sure, return_inverse=True)[1]
    size, errors = np.bincount(number, weight), np.bincount(number, weight * wrong)
    size, errors = size[size > 0], errors[size > 0]
    risk = errors.cumsum() / size.cumsum()
    return float(((risk + np.append(risk[0], risk[:-1])) / 2 * size).sum() / size.sum())


def figures(truth: np.ndarray, said: Arrays, tree: Tree, ancestors: np.ndarray) -> dict[str, float]:
    """Of one study: truth (m,) paths, -1 of strangers. All but the last figure are of known cells."""
    known = truth >= 0
    true, path = truth[known], said["path"][known]
    right = tree.nodes[path] == tree.nodes[true]
    found = {level.capitalize(): float(hits.mean()) for level, hits in zip(tree.levels, right.T, strict=True)}
    found["AURC"] = risk_coverage(said["sure"][known], ~right[:, -1])
    found["Macro F1"] = macro_scores(path, true)[1] or 0.0
    found["Hierarchical F1"] = hierarchical_f1(path, true, ancestors) or 0.0
    found["ECE"] = expected_calibration_error(said["probability"][known, -1], right[:, -1])
    enough = (~known).sum() >= MIN_STRANGERS
    found["Novelty AUROC"] = float(roc_auc_score(~known, said["odd"])) if enough else float("nan")
    return found


def strange(truth: np.ndarray, said: Arrays, share: float) -> tuple[float, float]:
    """Of one study: AURC, and the share of sure and wrong subtypes, if that share of its cells were strangers."""
    known, wrong = truth >= 0, said["path"] != truth
    weight = np.where(known, (1 - share) / known.sum(), share / (~known).sum())
    sure_and_wrong = wrong & (said["probability"][:, -1] >= SURE) & (said["sure"] > 0)  # answered to the subtype
    return risk_coverage(said["sure"], wrong, weight), float((weight * sure_and_wrong).sum())


# --- the runs --------------------------------------------------------------------------------------------------------


def splits(atlas: str, args: argparse.Namespace) -> Iterator[tuple[Path, Arrays]]:
    """A folder for each group of studies that is held out, and what goes into its files of cells."""
    cells = cells_of(atlas, args)
    names = sorted(cells.obs["type"].unique())
    path_of = dict(zip(names, [row.levels for row in build_hierarchy(names, load_graph(CL_SLIM))], strict=True))
    rng = np.random.default_rng(0)
    for group in groups_of(atlas, sorted(cells.obs["study"].unique())):
        out = cells.obs["study"].isin(group).to_numpy()
        old, new = cells[np.sort(rng.permutation(np.flatnonzero(~out))[: args.cells])], cells[out]
        paths = sorted({path_of[name] for name in old.obs["type"]})
        code = {path[-1]: i for i, path in enumerate(paths)}
        yield (
            args.output / f"{atlas}_{args.cells}" / "_".join(group),
            {
                "x": old.obsm["X"],
                "path": old.obs["type"].map(code).to_numpy(np.int64),
                "study": old.obs["study"].to_numpy(str),
                "paths": np.array(paths),
                "new": new.obsm["X"],
                "new_study": new.obs["study"].to_numpy(str),
                "truth": new.obs["type"].map(code).fillna(-1).to_numpy(np.int64),
            },
        )


def spoil(path: np.ndarray, share: float) -> np.ndarray:
    """Labels (n,), of which so many are of another type; a larger share spoils the same cells and more."""
    rng, types = np.random.default_rng(1), int(path.max()) + 1
    return np.where(rng.random(len(path)) < share, (path + rng.integers(1, types, len(path))) % types, path)


def make_answers(name: str, jobs: list[tuple[Path, Arrays, float]], celltypist: str | None) -> list[Path]:
    """The files of a peer's answers; a process of its own makes those that are not there."""
    outputs, files = [], list[Path]()
    for folder, arrays, noise in jobs:
        cells, output = folder / f"cells_{noise:g}.npz", folder / f"{name.replace(' ', '_')}_{noise:g}.npz"
        outputs.append(output)
        if not output.exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(cells, **(arrays | {"path": spoil(arrays["path"], noise)}))  # type: ignore[arg-type]
            files += [cells, output]
    if files:
        python, code = (celltypist or "", CELLTYPIST) if name == "CellTypist" else (sys.executable, ANSWER)
        _, memory = timed(python, code, [Path(name), *files])
        (outputs[0].parent.parent / f"{name}.GB").write_text(f"{memory}\n")
    return outputs


Study = tuple[np.ndarray, Arrays, dict[str, float]]  # truth, answers, figures


def studies_of(name: str, arrays: Arrays, file: Path, graph: nx.DiGraph) -> list[Study]:
    """The answers of a file, study by study."""
    memory = float((file.parent.parent / f"{name}.GB").read_text())
    tree = Tree.of([tuple(row) for row in arrays["paths"].tolist()])
    said, ancestors = read(file, tree), ancestor_matrix(tree.paths, graph).numpy() > 0
    found = []
    for study in np.unique(arrays["new_study"]):
        rows = arrays["new_study"] == study
        truth, here = arrays["truth"][rows], {key: said[key][rows] for key in ("path", "probability", "odd", "sure")}
        if (truth >= 0).any():
            costs = {"Seconds": float(said["seconds"]), "GB": memory}
            found.append((truth, here, figures(truth, here, tree, ancestors) | costs))
    return found


def main_tables(found: dict[str, list[Study]]) -> list[str]:
    """Means over the studies; and what this tool's figures are more, with intervals over the studies."""
    frames = {name: DataFrame([row for _, _, row in studies]) for name, studies in found.items()}
    header = list(frames[OURS].columns)
    means = [[name, *(f"{value:.3f}" for value in frame.mean())] for name, frame in frames.items()]
    differences = []
    for name, frame in frames.items():
        if name != OURS:
            more = [(frames[OURS][key] - frame[key]).dropna().to_numpy() for key in header[:-2]]
            differences.append([f"{OURS} - {name}", *map(with_interval, more)])
    return [table(["", *header], means), table(["", *header[:-2]], differences)]


def with_interval(values: np.ndarray) -> str:
    """The mean of (studies,); its interval from three studies on."""
    low, high = t_interval(values) if len(values) > 2 else (float("nan"), float("nan"))
    interval = "" if np.isnan(low) else f" [{low:+.3f}, {high:+.3f}]"
    return f"{values.mean():+.3f}{interval}" if len(values) else "-"


def strangers_table(found: dict[str, list[Study]]) -> str:
    """Means over the studies that have strangers."""
    rows = []
    for name, studies in found.items():
        some = [(truth, said) for truth, said, _ in studies if (truth < 0).sum() >= MIN_STRANGERS]
        means = [np.mean([strange(*study, share) for study in some], 0) for share in STRANGERS]
        rows.append([name, *(f"{area:.3f}, {wrong:.3f}" for area, wrong in means)])
    return table(["AURC, sure and wrong", *(f"{share:.0%} strangers" for share in STRANGERS)], rows)


def noise_table(by_noise: dict[float, dict[str, list[Study]]]) -> str:
    names = list(next(iter(by_noise.values())))
    means = {(name, noise): DataFrame([row for _, _, row in found[name]]).mean()
             for noise, found in by_noise.items() for name in names}  # fmt: skip
    rows = [[name, *(f"{means[name, noise]['Subtype']:.3f}, {means[name, noise]['AURC']:.3f}" for noise in by_noise)]
            for name in names]  # fmt: skip
    return table(["Subtype, AURC", *(f"{noise:.0%} wrong labels" for noise in by_noise)], rows)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--atlases", nargs="+", choices=ATLASES, default=ATLASES, help="(default: all)")
    parser.add_argument("--celltypist", help="Python of an environment with celltypist (default: without it)")
    parser.add_argument("--cells", type=positive_int, default=4_000, help="labelled, at most (default: %(default)s)")
    parser.add_argument("--noise", type=ratio, nargs="+", default=[0.0], help="shares of wrong labels (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("data/peers"), help="(default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    names, graph, text = [OURS, *PEERS, *(["CellTypist"] if args.celltypist else [])], load_graph(CL_SLIM), []
    for atlas in args.atlases:
        by_noise = {noise: {name: list[Study]() for name in names} for noise in args.noise}
        groups = list(splits(atlas, args))
        for name in tqdm(names, desc=atlas, unit="peer"):
            jobs = [(folder, arrays, noise) for noise in args.noise for folder, arrays in groups]
            for (_, arrays, noise), file in zip(jobs, make_answers(name, jobs, args.celltypist), strict=True):
                by_noise[noise][name] += studies_of(name, arrays, file, graph)
        found = by_noise[args.noise[0]]
        parts = main_tables(found)
        if any((truth < 0).sum() >= MIN_STRANGERS for truth, _, _ in found[OURS]):
            parts.append(strangers_table(found))
        if len(args.noise) > 1:
            parts.append(noise_table(by_noise))
        text.append(f"## {atlas}, {len(found[OURS])} studies\n\n" + "\n\n".join(parts))
        print("\n" + text[-1], flush=True)
    with atomic_write(args.output / "peers.md") as part:
        part.write_text("\n\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
