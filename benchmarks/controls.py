"""Controls for the question what the hierarchy brings: two more recipes, and a tree without meaning.

    uv run python -m benchmarks.controls train mrl --input data/stratified.parquet --output data/mrl.pt
    uv run python -m benchmarks.controls shuffled --model-path data/adapter.pt --input data/stratified.parquet

`train` trains the network of the recipe `fractal` with another loss; more flags are those of train.py. eval.py scores
its checkpoints beside others.

  mrl   every prefix on the labels of the finest level: Matryoshka representation learning (Kusupati et al. 2022)
  hce   hierarchical cross-entropy (Cultrera di Montesano et al. 2026, doi 10.1038/s43588-025-00945-z): the probability
        of a term of the Cell Ontology is the sum over the classes at or below it, and a cell is tested on each term at
        or above its class. A mistake within a lineage then costs less than one between systems.

`shuffled` prints the silhouette of every prefix at every level, beside those on a tree whose subtypes have changed
their paths with each other: no prefix should show a level of that tree, but for the finest, which stays as it is.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import train
from fractal.base.errors import run
from fractal.base.table import table
from fractal.commands.options import non_negative_int, positive_int
from fractal.data.atlas import Atlas
from fractal.hierarchy.matching import match_names
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.hierarchy.tree import at_or_above
from fractal.model.adapter import TAU, FractalAdapter, embed
from fractal.model.checkpoint import load
from fractal.model.objective import PrefixObjective, TrainingRows, log_ratio
from fractal.model.recipes import Recipe
from fractal.model.split import Split
from fractal.score.metrics import silhouette


def ancestor_matrix(paths: Sequence[tuple[str, ...]], graph: nx.DiGraph) -> Tensor:
    """-> (num_paths, num_terms) float32: 1 where a path's last label is at or below a term, else 0.

    Terms are the CL terms at or above any of the last labels. For labels that CL does not know, they are the nodes of
    the tree: the first label, the first two, and so on.
    """
    matched = match_names({names[-1] for names in paths}, graph)
    terms: list[set[str | tuple[str, ...]]] = []
    for names in paths:
        term = matched[names[-1]][0]
        above = at_or_above(graph, term) or nodes(names)
        terms.append({*above})
    columns = sorted(set().union(*terms), key=str)
    known = [here | nodes(names) for here, names in zip(terms, paths, strict=True)]
    return torch.tensor([[column in here for column in columns] for here in known], dtype=torch.float32)


def nodes(names: tuple[str, ...]) -> set[tuple[str, ...]]:
    """("a", "b") -> {("a",), ("a", "b")}: the nodes of the tree on the way to a type."""
    return {names[:k] for k in range(1, len(names) + 1)}


class HierarchicalObjective(nn.Module):
    """The loss of a batch of the training rows. As in `mrl`, every prefix has prototypes of the finest classes.

    ancestors (num_paths, num_terms), from `ancestor_matrix`; None: of the paths' labels in this ontology, `graph`.
    """

    def __init__(
        self,
        adapter: FractalAdapter,
        rows: TrainingRows,
        ancestors: Tensor | None = None,
        graph: nx.DiGraph | None = None,
    ) -> None:
        super().__init__()
        if ancestors is None:
            ancestors = ancestor_matrix(rows.names, graph or load_graph(CL_SLIM)).to(rows.x.device)
        self.x, self.path, self.ancestors = rows.x, rows.path, ancestors
        self.logit_adjustment = log_ratio(rows.sampled.float(), rows.frequency)  # see fractal/model/objective.py
        # Terms differ in number by class, so the sum over them is divided by their mean number: the loss is then of
        # the size of one cross-entropy, and a deep class still counts more than a shallow one.
        self.weight = ancestors / ancestors.sum(1).mean()
        self.prototypes = nn.ParameterList(
            torch.randn(len(ancestors), j * adapter.scale_dim, device=rows.x.device)
            for j in range(1, adapter.num_levels + 1)
        )

    def forward(self, adapter: FractalAdapter, rows: Tensor) -> Tensor:
        """The loss of the training rows with these numbers (b,)."""
        logits, _, blocks = adapter(self.x.index_select(0, rows))
        weight = self.weight.index_select(0, self.path[rows])  # (b, num_terms)
        loss = logits.new_zeros(())
        prefixes = [normalize(blocks[:, : j + 1].flatten(1), dim=1) for j in range(adapter.num_levels)]
        pairs = zip(prefixes, self.prototypes, strict=True)
        cosines = [prefix @ normalize(prototypes, dim=1).T / TAU for prefix, prototypes in pairs]
        for scores in (logits, *cosines):
            probability = (scores + self.logit_adjustment).softmax(1) @ self.ancestors  # (b, num_terms)
            loss = loss - (weight * probability.clamp(1e-8, 1).log()).sum() / len(rows)
        return loss


MRL = Recipe("mrl", PrefixObjective, own_level=False)
HCE = Recipe("hce", HierarchicalObjective, own_level=False)
CONTROLS = {recipe.name: recipe for recipe in (MRL, HCE)}


def train_recipe(name: str, argv: list[str], obo: str | Path = CL_SLIM) -> None:
    """train.py with any recipe, also one of these controls; `obo`: the ontology of `hce`."""
    if name in CONTROLS:
        recipe = CONTROLS[name]
        if recipe == HCE:
            recipe = replace(HCE, objective=partial(HierarchicalObjective, graph=load_graph(obo)))
        train.main(argv, recipe)
    else:
        train.main(["--recipe", name, *argv])


def shuffled_tree(labels: Tensor, seed: int) -> Tensor:
    """The labels (n, levels) if every subtype sat on the path of another: a tree of the same shape, without meaning."""
    subtypes, first = np.unique(labels[:, -1].cpu().numpy(), return_index=True)
    paths = labels[torch.from_numpy(first)]  # one row per subtype
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(subtypes)))
    subtype = torch.from_numpy(np.searchsorted(subtypes, labels[:, -1].cpu().numpy()))
    return torch.cat([paths[order][subtype][:, :-1], labels[:, -1:]], dim=1)


def silhouettes(model: Path, path: Path, num_samples: int, seed: int) -> str:
    """A table: a line per prefix and level, on test cells, in the true tree and in a shuffled one."""
    adapter, checkpoint = load(model)
    atlas = Atlas.open(path)
    pool = Split.of(checkpoint, model).rows(atlas)[2]
    cells = atlas.read(np.random.default_rng(seed).permutation(pool)[:num_samples])
    labels = torch.from_numpy(cells.labels)
    trees = {"true": labels, "shuffled": shuffled_tree(labels, seed)}
    *prefixes, full = embed(adapter, torch.from_numpy(cells.vectors))
    embeddings = {"full": full} | {f"prefix {j}": e for j, e in reversed([*enumerate(prefixes, 1)])}
    rows = []
    for name, e in embeddings.items():
        for tree, its_labels in trees.items():
            widths = [silhouette(e, column) for column in its_labels.T]
            rows.append([name, tree, *("-" if width is None else f"{width:.3f}" for width in widths)])
    return table(["Embedding", "Tree", *(level.capitalize() for level in cells.levels)], rows)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a control; all further flags are those of train.py")
    training.add_argument("control", choices=list(CONTROLS))
    training.add_argument("--obo", default=CL_SLIM, help="ontology of hce, a path or a URL (default: the shipped one)")
    shuffled = commands.add_parser("shuffled", help="silhouettes on a shuffled tree")
    shuffled.add_argument("--model-path", type=Path, required=True, help="checkpoint of train.py")
    shuffled.add_argument("--input", type=Path, required=True, help="the Parquet file that it was trained on")
    shuffled.add_argument("--num-samples", type=positive_int, default=5_000, help="test cells (default: %(default)s)")
    shuffled.add_argument("--seed", type=non_negative_int, default=0, help="of both draws (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = get_parser()
    args, more = parser.parse_known_args(argv)
    if args.command == "train":
        train_recipe(args.control, more, args.obo)
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    else:
        print(silhouettes(args.model_path, args.input, args.num_samples, args.seed))


if __name__ == "__main__":
    run(main)
