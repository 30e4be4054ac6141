"""The `hce` control: the same network, with cross-entropy over all ancestors of a cell's class.

Hierarchical cross-entropy (Cultrera di Montesano et al. 2026, doi 10.1038/s43588-025-00945-z): the probability of a
term of the Cell Ontology is the sum over the classes at or below it, and a cell is asked for each term at or above its
own class. A mistake within a lineage then costs less than one between systems.
"""

from collections.abc import Sequence

import networkx as nx
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fractal.hierarchy.ontology import match_names
from fractal.model.adapter import TAU, FractalAdapter
from fractal.model.objective import log_ratio


def ancestor_matrix(paths: Sequence[tuple[str, ...]], graph: nx.DiGraph) -> Tensor:
    """-> (num_paths, num_terms) float32: 1 where a path's last label is at or below a term, else 0.

    Terms are the CL terms at or above any of the last labels. For labels that CL does not know, they are the nodes of
    the tree: the first label, the first two, and so on.
    """
    matched = match_names({names[-1] for names in paths}, graph)
    terms: list[set[str | tuple[str, ...]]] = []
    for names in paths:
        term = matched[names[-1]][0]
        above = {term, *nx.descendants(graph, term)} if term in graph else nodes(names)  # edges run child -> parent
        terms.append({*above})
    columns = sorted(set().union(*terms), key=str)
    known = [here | nodes(names) for here, names in zip(terms, paths, strict=True)]
    return torch.tensor([[column in here for column in columns] for here in known], dtype=torch.float32)


def nodes(names: tuple[str, ...]) -> set[tuple[str, ...]]:
    """("a", "b") -> {("a",), ("a", "b")}: the nodes of the tree on the way to a type."""
    return {names[:k] for k in range(1, len(names) + 1)}


class HierarchicalObjective(nn.Module):
    """The loss of a batch. As in the `mrl` control, every prefix has prototypes of the leaf classes.

    x (n, dim) are all training rows, path (n,) the number of each row's path, frequency (num_paths,) how many cells of
    the file are on each path, ancestors (num_paths, num_terms) from `ancestor_matrix`, sampled (num_paths,) how many
    training rows are on each path (None: those of `path`, all of them).
    """

    def __init__(
        self,
        adapter: FractalAdapter,
        x: Tensor,
        path: Tensor,
        frequency: Tensor,
        ancestors: Tensor,
        sampled: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.x, self.path, self.ancestors = x, path, ancestors
        sampled = (path.bincount(minlength=len(frequency)) if sampled is None else sampled).float()
        self.logit_adjustment = log_ratio(sampled, frequency.float())  # see fractal/model/objective.py
        # Terms differ in number by class, so the sum over them is divided by their mean number: the loss is then of
        # the size of one cross-entropy, and a deep class still counts more than a shallow one.
        self.weight = ancestors / ancestors.sum(1).mean()
        self.prototypes = nn.ParameterList(
            torch.randn(len(frequency), j * adapter.scale_dim, device=x.device)
            for j in range(1, adapter.num_levels + 1)
        )

    def forward(self, adapter: FractalAdapter, rows: Tensor) -> Tensor:
        """The loss of the training rows with these numbers (b,)."""
        logits, _, blocks = adapter(self.x.index_select(0, rows))
        weight = self.weight.index_select(0, self.path[rows])  # (b, num_terms)
        loss = logits.new_zeros(())
        prefixes = [normalize(blocks[:, : j + 1].flatten(1), dim=1) for j in range(adapter.num_levels)]
        cosines = [
            prefix @ normalize(own, dim=1).T / TAU for prefix, own in zip(prefixes, self.prototypes, strict=True)
        ]
        for scores in (logits, *cosines):
            probability = (scores + self.logit_adjustment).softmax(1) @ self.ancestors  # (b, num_terms)
            loss = loss - (weight * probability.clamp(1e-8, 1).log()).sum() / len(rows)
        return loss
