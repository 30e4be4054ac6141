"""Principal components of new cells, from their expression: what a reference keeps of the PCA that it was made with.

The components of a cell are x @ loadings - offset, where x is its expression of the genes that the PCA used. scanpy
keeps the loadings in varm, with rows of zeros (formerly of NaN) for genes that it did not use, but not the means that
it subtracted.
x @ loadings - components gives them back: it is the same for every cell, be the PCA centred or not, also where cells
were left out since. Where it differs between cells, X is no longer what the PCA has seen, and nothing is kept.

New cells must be normalised as the labelled ones were. That is the user's part; what the numbers tell of it is checked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fractal.base.errors import InputError
from fractal.data.expression import EXAMINED, KINDS, Expression, as_texts, gene_names, kind_of, open_expression

# How far X may be from giving the components, both as root mean squares: float32 alone makes 1e-6, a randomised SVD,
# which is not exact, a few hundredths.
MAX_RESIDUAL = 0.1
MIN_WEIGHT = 0.5  # of the squared loadings: what the genes that new cells have must carry
MAX_RATIO = 2.0  # of the mean expression, new cells' to the labelled ones', and the other way round


@dataclass(frozen=True)
class Projection:
    """The loadings of a PCA: genes (g,) str, loadings (g, dim), means of the labelled cells (g,), offset (dim,)."""

    genes: np.ndarray
    loadings: np.ndarray
    means: np.ndarray
    offset: np.ndarray
    kind: str  # one of KINDS
    layer: str = ""  # of AnnData; "" is X

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved: the genes as UTF-8 text, one a line."""
        genes = np.frombuffer("\n".join(self.genes.tolist()).encode(), np.uint8).copy()
        return {"genes": genes, "loadings": self.loadings, "means": self.means, "offset": self.offset}

    def find(self, matrix: Callable[[str], Expression | None]) -> Expression | None:
        """The expression that it projects, of those of `open_expression`."""
        return matrix(self.layer)

    def facts(self) -> dict[str, Any]:
        """What bundle.json says of it."""
        return {"genes": len(self.genes), "kind": self.kind, "layer": self.layer}

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any], dim: int) -> "Projection":
        """The other way. Raises ValueError, or whatever numpy does, unless the parts fit together."""
        genes = np.array(arrays["genes"].tobytes().decode().split("\n"), object)
        loadings, means, offset = (arrays[name] for name in ("loadings", "means", "offset"))
        if (loadings.shape, means.shape, offset.shape) != ((len(genes), dim), (len(genes),), (dim,)):
            raise ValueError("the loadings do not fit the adapter")
        if not all(np.isfinite(part).all() for part in (loadings, means, offset)) or facts["kind"] not in KINDS:
            raise ValueError("the loadings are not finite, or of an unknown kind")
        return Projection(genes, loadings, means, offset, facts["kind"], str(facts["layer"]))

    def components(self, new: Expression, force: bool = False) -> tuple[Callable[[slice], np.ndarray], str]:
        """-> a function rows -> (m, dim) float32, and one line that says what was done.

        A gene that the new cells lack counts as the mean of the labelled ones. Raises InputError where most genes are
        missing, and for numbers of another kind, unless `force`.
        """
        names, place = gene_names(new.var, self.genes)
        column = {name: i for i, name in reversed(list(enumerate(names)))}  # of equal names the first
        found = np.array([gene in column for gene in self.genes])
        weight = (self.loadings**2).sum(1)
        if weight[found].sum() < MIN_WEIGHT * weight.sum() or not found.any():
            raise InputError(
                f"{new.where}: has {found.sum():,} of the {len(found):,} genes of the reference's PCA, too few; they "
                f"are named as {', '.join(self.genes[:3])}, and here as {', '.join(names[:3])}"
            )
        loadings = np.zeros((len(names), self.loadings.shape[1]), np.float32)
        loadings[[column[gene] for gene in self.genes[found]]] = self.loadings[found]
        constant = self.means[~found] @ self.loadings[~found] - self.offset

        def rows(some: slice) -> np.ndarray:
            parts = [x @ loadings + constant for _, x in new.chunks(some.start, some.stop)]
            return np.concatenate(parts).astype(np.float32)

        line = f"projected from {new.where}{place}: {found.sum():,} of {len(found):,} genes"
        if not found.all():
            line += f", the {(~found).sum():,} missing ones at the reference's mean"
        return rows, line + self.check_kind(new, [column[gene] for gene in self.genes[found]], found, force)

    def check_kind(self, new: Expression, columns: list[int], found: np.ndarray, force: bool) -> str:
        """-> "" or what is unusual about the numbers of the first cells. Raises InputError for another kind of them."""
        some, x = next(new.chunks(0, min(EXAMINED, new.num_cells)))
        kind = kind_of(x)
        if kind != self.kind and not force:
            raise InputError(
                f"{new.where}: holds {KINDS[kind]}; those of the reference's PCA were {KINDS[self.kind]}: prepare new "
                "cells in the same way"
            )
        here, there = float(sums(x)[columns].sum()) / (some.stop - some.start), float(self.means[found].sum())
        if kind == self.kind != "scaled" and there > 0 and not 1 / MAX_RATIO <= here / there <= MAX_RATIO:
            return f"; their mean is {here / there:.2g} times the reference's: was it normalised in the same way?"
        return ""


def sums(x: Any) -> np.ndarray:
    """(genes,) float64, of a dense or sparse matrix."""
    return np.asarray(x.sum(0, dtype=np.float64)).reshape(-1)


# --- what a reference keeps ------------------------------------------------------------------------------------------


def learn(cells: Any, use_rep: str) -> tuple[Projection | None, str]:
    """The labelled cells, an AnnData or the path of an .h5ad -> the PCA behind obsm[use_rep], and a line about it.

    None where `use_rep` is no PCA of scanpy's, or one that X no longer gives. One pass over X.
    """
    loadings_key, params_key = ("PCs", "pca") if use_rep == "X_pca" else (use_rep, use_rep)
    with open_expression(cells) as (parts, expression):
        empty: dict[str, Any] = {}
        varm, facts = parts.get("varm", empty), parts.get("uns", empty).get(params_key)
        if use_rep not in parts.get("obsm", empty) or loadings_key not in varm:
            return None, ""
        params = facts.get("params", empty) if hasattr(facts, "get") else empty
        layer = as_text(params.get("layer", "")) if hasattr(params, "get") else ""
        x = expression(layer)
        if x is None:
            return None, f"obsm '{use_rep}': without the expression that it was made of, new cells can't be projected"
        loadings, components = np.asarray(varm[loadings_key][:], np.float32), parts["obsm"][use_rep]
        return measure(x, loadings, components, use_rep, layer)


def learn_together(files: Sequence[Any], use_rep: str) -> tuple[Projection | None, str]:
    """As `learn`, of the first of several files. Raises InputError for one that has a PCA of its own."""
    first, line = learn(files[0], use_rep)
    for file in files[1:]:
        other, _ = learn(file, use_rep)
        if first and other and not np.array_equal(other.loadings, first.loadings):
            where = "an AnnData" if hasattr(file, "obsm") else file
            raise InputError(f"{where}: obsm '{use_rep}' is a PCA of its own; make one of the cells of all files")
    return first, line


def as_text(value: Any) -> str:
    """A string of uns, which HDF5 gives as a dataset of bytes."""
    value = value[()] if hasattr(value, "shape") else value
    return value.decode() if isinstance(value, bytes) else str(value)


def measure(
    x: Expression, loadings: np.ndarray, components: Any, use_rep: str, layer: str
) -> tuple[Projection | None, str]:
    """x (n, genes), loadings (genes, dim) and components (n, dim) -> what `learn` gives."""
    if loadings.shape != (len(x.var), components.shape[1]):
        return None, ""
    used = np.isfinite(loadings).all(1) & (loadings != 0).any(1)
    loadings = np.where(used[:, None], loadings, np.float32(0))
    total, kinds = np.zeros(len(x.var)), set[str]()
    sums_of = np.zeros((2, components.shape[1]))  # of the residuals, and of their squares
    square, cells = 0.0, 0
    for rows, part in x.chunks(0, x.num_cells, "loadings"):
        expected = np.asarray(components[rows], np.float64)
        residual = part @ loadings - expected
        good = np.isfinite(residual).all(1)
        sums_of += residual[good].sum(0), (residual[good] ** 2).sum(0)
        square += float((expected[good] ** 2).sum())
        cells += int(good.sum())
        total += sums(part)
        kinds.add(kind_of(part))
    offset, residual_square = sums_of / max(1, cells)
    residual_square -= offset**2
    genes = as_texts(x.var.index)[used]
    why = ""
    if not cells or residual_square.sum() > MAX_RESIDUAL**2 * square / cells:
        why = f"{x.where} times the loadings does not give it, so X has changed since"
    elif not np.isfinite(total[used]).all():
        why = f"{x.where} holds numbers that are not finite"
    elif len(set(genes)) < len(genes) or any("\n" in gene for gene in genes):
        why = "the names of the genes are not unique (see var_names_make_unique), or of several lines"
    if why:
        return None, f"obsm '{use_rep}': {why}; the reference will not project new cells, they must bring their own"
    kind = next(kind for kind in ("scaled", "normalised", "counts") if kind in kinds)
    means = (total[used] / x.num_cells).astype(np.float32)
    line = f"obsm '{use_rep}': the reference keeps the loadings of {len(genes):,} genes, and projects new cells itself"
    return Projection(genes, loadings[used], means, offset.astype(np.float32), kind, layer), line
