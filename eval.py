"""Step 4: how well each prefix tells each level, on test cells that the adapter has never seen.

    uv run python eval.py --model-path data/fractal_adapter_4L.pt

Prints 5-NN accuracy twice, each with a 95 % bootstrap interval over the test cells. `loo` is the published protocol:
every query against the other queries. `bank` takes the neighbours from the training cells, which is what annotating
new cells does. Then the same with every class counting alike, how far the predicted subtype is from the true one in
the Cell Ontology, what a neighbourhood shows at each prefix, the silhouette of every prefix at every level, and
steerability. Several checkpoints, trained on the same cells, become rows of the same tables. `--search` adds what a
shorter vector buys in search.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor
from tqdm import tqdm

from fractal.adapter import Adapter, embed, load, pick_device
from fractal.atlas import LEVELS, fingerprint, open_atlas, read_rows
from fractal.cli import InputError, non_negative_int, positive_int, run, table
from fractal.files import atomic_write, check_output
from fractal.metrics import (
    K,
    bootstrap_interval,
    knn_predict,
    macro_accuracy,
    majority,
    neighbourhood_purity,
    silhouette,
    steerability,
)
from fractal.ontology import CL_SLIM, load_graph, term_distances
from fractal.search import Nearest, nearest
from fractal.split import Split
from fractal.truncation import RECALL, search_table
from fractal.vectors import open_vectors

SEARCHES = 2_000  # queries of --search


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model-path",
        type=Path,
        nargs="+",
        default=[Path("data/fractal_adapter_4L.pt")],
        help="checkpoints of train.py, all with the same split (default: data/fractal_adapter_4L.pt)",
    )
    parser.add_argument(
        "--input",
        type=Path,
        default=Path("data/stratified.parquet"),
        help="the Parquet file that it was trained on (default: %(default)s)",
    )
    parser.add_argument(
        "--all-rows",
        action="store_true",
        help="the input is another file, and all its cells are new: draw the queries from all of it (no `bank` then)",
    )
    parser.add_argument(
        "--num-samples",
        type=positive_int,
        default=5_000,
        help="queries to draw from the test cells; all of them if there are fewer (default: %(default)s)",
    )
    parser.add_argument(
        "--bank",
        choices=["train", "all"],
        default="train",
        help="where neighbours come from: the cells trained on, or all that are not set aside for testing, streamed "
        "from the file, two CPU minutes a million (default: %(default)s)",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also score raw vectors cut short, PCA and LDA (both fitted on the training cells), and the prefixes' "
        "silhouettes on a shuffled tree",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="also show what a shorter vector buys: recall of the full vectors' neighbours among the training cells, "
        "time per query and bytes per cell, for every prefix, for funnels and for hnswlib indexes; some minutes",
    )
    parser.add_argument(
        "--obo", default=CL_SLIM, help="Cell Ontology for the distances, a path or a URL (default: the shipped one)"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="auto takes CUDA, else MPS, else the CPU (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file, unrounded")
    parser.add_argument(
        "--cells-out",
        type=Path,
        help="also write right (True) or wrong per embedding, query and level, and the row numbers, to this .npz",
    )
    parser.add_argument(
        "--rows-out", type=Path, help="also write train.npy and queries.npy, row numbers, to this folder"
    )
    return parser


def choose_rows(
    checkpoint: dict[str, Any], model: Path, path: Path, num_samples: int, seed: int, all_rows: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """-> the training rows, which are the bank, and the query rows. Raises InputError for another file."""
    file = open_atlas(path)
    split = Split.of(checkpoint, model)
    same_file = fingerprint(path) == split.fingerprint
    dim = file.schema_arrow.field("embedding").type.list_size
    if dim != checkpoint["config"]["dim"]:
        raise InputError(f"{path}: its vectors have {dim} numbers, those of {model} {checkpoint['config']['dim']}")
    if all_rows and same_file:
        raise InputError(f"{path}: {model} was trained on it, so its cells are not new; drop --all-rows")
    if all_rows:
        train, pool = np.arange(0), np.arange(file.metadata.num_rows)
    elif not same_file:
        raise InputError(
            f"{path}: not the file that {model} was trained on, so which of its cells are held out is "
            "unknown; name that file, or say --all-rows if all its cells are new"
        )
    else:
        train, _, pool = split.rows(path)
    queries = np.random.default_rng(seed).permutation(pool)[:num_samples]
    if len(queries) < 2:
        raise InputError(f"{path}: {len(queries)} test cells are too few; train with a larger --test-ratio")
    return train, queries


def score(vectors: Tensor, labels: Tensor, neighbours: Tensor | None, distances: Tensor) -> dict[str, Any]:
    """The figures of one embedding, all four levels each.

    labels (n, levels), neighbours (n, 5, levels) the labels of those in the bank, distances (subtypes, subtypes) those
    in the ontology.
    """

    def by_level(values: Sequence[Any]) -> dict[str, Any]:
        return dict(zip(LEVELS, values, strict=True))

    nothing = dict.fromkeys(LEVELS)
    row: dict[str, Any] = {"bank": nothing, "bank_interval": nothing, "bank_macro": nothing, "bank_distance": None}
    row["dims"] = vectors.shape[1]
    protocols = {"loo": knn_predict(vectors, labels)}
    if neighbours is not None:
        protocols["bank"] = majority(neighbours)
    for protocol, predicted in protocols.items():
        right = (predicted == labels).cpu().numpy()
        row[protocol] = by_level((predicted == labels).float().mean(0).tolist())
        row[f"{protocol}_right"] = right
        row[f"{protocol}_interval"] = by_level([bootstrap_interval(column) for column in right.T])
        row[f"{protocol}_macro"] = by_level(macro_accuracy(predicted, labels))
        steps = distances[labels[:, -1].cpu(), predicted[:, -1].cpu()]
        row[f"{protocol}_distance"] = steps.nanmean().item() if steps.isfinite().any() else None
    row["silhouette"] = by_level([silhouette(vectors, labels[:, k]) for k in range(len(LEVELS))])
    agree, row["zoom_subtypes"] = neighbourhood_purity(vectors, labels)
    row["zoom_agree"] = by_level(agree)
    return row


Encoder = Callable[[Tensor], dict[str, Tensor]]  # vectors (m, dim) -> name -> what becomes of them, (m, dims) each


def adapter_encoder(adapter: Adapter, own: str) -> Encoder:
    """The full vectors, then the prefixes, longest first; `own` comes before their names."""
    names = [own + name for name in ("full", *(f"prefix {j}" for j in reversed(range(1, adapter.num_levels))))]
    return lambda x: dict(zip(names, reversed(embed(adapter, x)), strict=True))


def fit_controls(train: Tensor, subtypes: np.ndarray, widths: list[int]) -> Encoder:
    """What one gets without an adapter. PCA and LDA are fitted on the training cells (m, dim), subtypes (m,)."""
    x = train.cpu().numpy()
    pca = PCA(min(widths[-1], *x.shape), random_state=0).fit(x)
    lda = LinearDiscriminantAnalysis().fit(x, subtypes)

    def controls(vectors: Tensor) -> dict[str, Tensor]:
        x, found = vectors.cpu().numpy(), {}
        for name, rotated in (("raw", x), ("PCA", pca.transform(x)), ("LDA", lda.transform(x))):
            for width in (cuts := sorted({min(width, rotated.shape[1]) for width in widths})):
                if name == "raw" and width == x.shape[1]:
                    continue  # the whole of it is there without controls
                cut = torch.from_numpy(np.float32(rotated[:, :width])).to(vectors.device)
                found[name if name != "raw" and width == cuts[-1] else f"{name} {width}d"] = cut
        return found

    return controls


def search_file(path: Path, keep: np.ndarray, queries: Tensor, encoders: list[Encoder]) -> list[np.ndarray]:
    """-> per embedding, in the order of the encoders: (n, 5) row numbers of the queries' nearest kept rows of a file.

    `keep` is a mask (num_rows,). The file is read once, a row group (34 MB) at a time.
    """
    found = [[Nearest(vectors, K) for vectors in encode(queries).values()] for encode in encoders]
    start = 0
    with open_vectors(path) as source, tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="bank") as bar:
        for _, vectors in source.chunks(strict=True):
            bank = torch.from_numpy(vectors[keep[start : start + len(vectors)]]).to(queries.device)
            start += len(vectors)
            for encode, group in zip(encoders, found, strict=True) if len(bank) else ():
                for searched, embedding in zip(group, encode(bank).values(), strict=True):
                    searched.add(embedding)
            bar.update(len(vectors))
    kept = np.flatnonzero(keep)
    return [kept[searched.rows().cpu().numpy()] for group in found for searched in group]


def shuffled_tree(labels: Tensor, seed: int) -> Tensor:
    """The labels (n, levels) if every subtype sat on the path of another: a tree of the same shape, without meaning."""
    subtypes, first = np.unique(labels[:, -1].cpu().numpy(), return_index=True)
    paths = labels[torch.from_numpy(first)]  # one row per subtype
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(subtypes)))
    own = torch.from_numpy(np.searchsorted(subtypes, labels[:, -1].cpu().numpy()))
    return torch.cat([paths[order][own][:, :-1], labels[:, -1:]], dim=1)


def show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def accuracy_table(rows: list[dict[str, Any]], protocol: str) -> str:
    def cell(row: dict[str, Any], level: str) -> str:
        low, high = row[f"{protocol}_interval"][level]
        return f"{row[protocol][level]:.3f} ± {(high - low) / 2:.3f}"

    return table(
        ["Embedding", "Dims", *(level.capitalize() for level in LEVELS), "Sil"],
        [
            [
                row["embedding"],
                f"{row['dims']}d",
                *(cell(row, level) for level in LEVELS),
                show(row["silhouette"]["system"]),
            ]
            for row in rows
        ],
    )


def level_table(rows: list[dict[str, Any]], key: str, more: dict[str, str] | None = None) -> str:
    """One figure per level, `key`, and further columns: title -> key."""
    more = more or {}
    header = ["Embedding", *(level.capitalize() for level in LEVELS), *more]
    return table(
        header,
        [
            [row["embedding"], *(show(row[key][level]) for level in LEVELS), *(show(row[k], 2) for k in more.values())]
            for row in rows
        ],
    )


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    for output in filter(None, (args.json, args.cells_out)):
        check_output(output, args.input, *args.model_path)
    device = pick_device(args.device)
    models = [load(path, device) for path in args.model_path]
    first_path, first_checkpoint = args.model_path[0], models[0][1]
    train_rows, query_rows = choose_rows(
        first_checkpoint, first_path, args.input, args.num_samples, args.seed, args.all_rows
    )
    split = Split.of(first_checkpoint, first_path)
    for path, (_, checkpoint) in zip(args.model_path, models, strict=True):
        if Split.of(checkpoint, path) != split:
            raise InputError(f"{path}: was trained on other cells than {first_path}; evaluate it by itself")
    n, seen = len(query_rows), np.concatenate([query_rows, train_rows])
    if args.search and (args.bank == "all" or len(train_rows) < RECALL):
        raise InputError(f"{args.input}: --search looks among the training cells; drop --bank all and --all-rows")
    if args.bank == "all":
        if args.all_rows:
            raise InputError(f"{args.input}: all its cells are new, so none can be in the bank; drop --bank all")
        seen = seen if args.controls else query_rows  # the controls are fitted on the training cells
    cells = read_rows(args.input, seen)  # one call: labels share their codes
    vectors = torch.from_numpy(cells.vectors).to(device)

    several = len(models) > 1
    encoders: list[Encoder] = [lambda x: {"raw": x}]
    encoders += [
        adapter_encoder(adapter, f"{path.stem} " if several else "")
        for path, (adapter, _) in zip(args.model_path, models, strict=True)
    ]
    if args.controls and len(train_rows):
        widths = sorted({e.shape[1] for adapter, _ in models for e in embed(adapter, vectors[:1])})
        encoders.append(fit_controls(vectors[n:], cells.labels[n:, -1], widths))

    num_bank = len(train_rows)
    found: list[Tensor] = []  # per embedding (n, 5): where the labels of its neighbours in the bank stand in `labels`
    if args.bank == "all":
        keep = ~split.is_test(args.input)
        num_bank = int(keep.sum())
        bank_rows = np.stack(search_file(args.input, keep, vectors[:n], encoders))
        numbers, where = np.unique(bank_rows, return_inverse=True)
        found = list(n + torch.from_numpy(where.reshape(bank_rows.shape)).to(device))
        cells = read_rows(args.input, np.concatenate([query_rows, numbers]))
        vectors = vectors[:n]
    labels = torch.from_numpy(cells.labels).to(device)
    distances = torch.from_numpy(term_distances(cells.classes[-1], load_graph(args.obo)))

    rows: list[dict[str, Any]] = []
    steering, shuffled = [], []
    mixed = shuffled_tree(labels[:n], args.seed)
    for i, encode in enumerate(encoders):
        start = len(rows)
        for name, e in encode(vectors).items():
            if args.bank == "train" and len(train_rows):
                found.append(n + nearest(e[:n], e[n:], K))
            neighbours = labels[found[len(rows)]] if found else None
            rows.append({"embedding": name, **score(e[:n], labels[:n], neighbours, distances)})
            if args.controls and 1 <= i <= len(models):
                values = [silhouette(e[:n], mixed[:, k]) for k in range(len(LEVELS))]
                shuffled.append({"embedding": name, "silhouette": dict(zip(LEVELS, values, strict=True))})
        if 1 <= i <= len(models):  # raw comes before the checkpoints, controls after them
            path, config = args.model_path[i - 1], models[i - 1][1]["config"]
            full, first = rows[start]["loo"], rows[-1]["loo"]
            leaf = LEVELS[config["num_levels"] - 1]
            terms = [first["system"], full["system"], full[leaf], first[leaf]]
            steering.append((f"{path.stem} " if several else "", leaf, terms, steerability(*terms)))
            print(f"{path}: recipe {config['recipe']}, {config['num_levels']} levels x {config['scale_dim']}")
    words = {"train": "training", "all": "other"}
    if args.all_rows:
        print(f"{n:,} cells of {args.input}, which are all new\n")
    else:
        print(f"{n:,} test cells of {args.input}, {num_bank:,} {words[args.bank]} cells in the bank")
        print(f"held out: {f'{len(split.test_studies)} whole studies' if split.test_studies else 'cells'}\n")

    protocols = {"loo": "leave-one-out inside the test cells (loo)"}
    if len(train_rows):
        protocols["bank"] = f"neighbours from the {words[args.bank]} cells (bank)"
    for protocol, title in protocols.items():
        print(f"5-NN accuracy, {title}, ± half of a 95 % interval\n\n{accuracy_table(rows, protocol)}\n")
    for protocol, title in protocols.items():
        print(f"The same, every class counting alike (macro), {title};")
        print("Steps: from the true subtype's term to the predicted one's in the Cell Ontology, mean over the cells\n")
        print(level_table(rows, f"{protocol}_macro", {"Steps": f"{protocol}_distance"}) + "\n")
    print("Zoom: share of a cell's 5 nearest that have its label, and distinct subtypes among its 50 nearest (loo)\n")
    print(level_table(rows, "zoom_agree", {"Of 50": "zoom_subtypes"}) + "\n")
    print("Silhouette (cosine) of each embedding at each level\n")
    print(level_table(rows, "silhouette"))
    if args.controls:
        print("\nThe same with the subtypes shuffled over the paths of the tree: no prefix should show a level\n")
        print(level_table(shuffled, "silhouette"))
    for own, leaf, terms, steer in steering:
        print(
            f"\n{own}Steerability S = (system at prefix 1 - at full) + ({leaf} at full - at prefix 1)\n"
            f"  = ({terms[0]:.3f} - {terms[1]:.3f}) + ({terms[2]:.3f} - {terms[3]:.3f}) = {steer:+.3f}"
        )

    for path, (adapter, _) in zip(args.model_path, models, strict=True) if args.search else ():
        asked = min(n, SEARCHES)
        queries, bank = embed(adapter, vectors[:asked]), embed(adapter, vectors[n:])
        print(f"\nSearch with {path}: {asked:,} test cells against {num_bank:,} training cells\n")
        print(search_table(queries, bank, labels[:asked], labels[n:]))

    if args.rows_out:
        for name, numbers in (("train.npy", train_rows), ("queries.npy", query_rows)):
            with atomic_write(args.rows_out / name) as part, open(part, "wb") as file:
                np.save(file, numbers)
    right: dict[str, Any] = {p: np.stack([row.pop(f"{p}_right") for row in rows]) for p in protocols}
    if args.cells_out:
        with atomic_write(args.cells_out) as part, open(part, "wb") as file:
            np.savez_compressed(file, rows=query_rows, **right)
    if args.json:
        result = {
            "rows": rows,
            "steerability": steering[0][3] if len(steering) == 1 else {own.strip(): s for own, _, _, s in steering},
            "shuffled_tree": shuffled,
            "num_queries": n,
            "num_bank": num_bank,
            "config": [checkpoint["config"] for _, checkpoint in models],
        }
        with atomic_write(args.json) as part:
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
