"""Labelled cells -> a reference, in one go: ingest, balance, train, calibrate, score.

The cells of a path pass through a temporary Parquet file, so that memory does not grow with them; those of an AnnData
stay in memory.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fractal.annotate.annotator import Annotator
from fractal.annotate.cross_fit import cross_fit, draw_folds, path_names
from fractal.annotate.projection import Projection, learn
from fractal.annotate.vague_labels import without_vague
from fractal.base.errors import InputError, in_python
from fractal.base.storage import Location, locate
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.data.cells import Cells
from fractal.data.encoder import Encoder, open_encoded, read_encoder
from fractal.data.ingestion import atlas_in_memory, order_warning, place_cells, write_atlas
from fractal.data.labels import read_map
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.hierarchy.tree import Tree, terms_of
from fractal.model.adapter import pick_device
from fractal.model.distributed import Group
from fractal.model.recipes import Settings, find_recipe
from fractal.model.split import Split
from fractal.model.training import Fitted
from fractal.model.training import fit as fit_adapter
from fractal.reference import Reference, make_reference
from fractal.score.metrics import knn_accuracy

if TYPE_CHECKING:
    from anndata import AnnData
    from networkx import DiGraph


@in_python
def fit(
    cells: "AnnData | str | Path",
    labels: str | None = None,
    use_rep: str = "X_scimilarity",
    study: str | None = None,
    *,
    levels: Sequence[str] = (),
    label_map: Mapping[str, str] | str | Path | None = None,
    unmapped: str = "error",
    vague: Sequence[str] = (),
    not_vague: Sequence[str] = (),
    hierarchy: str | Path | None = None,
    tree: str = "published",
    recipe: str = "fractal",
    max_cells: int = 100_000,
    epochs: int = 20,
    seed: int = 0,
    device: str = "auto",
    model: str | Path | None = None,
) -> Reference:
    """Labelled cells -> a reference. The cells are not changed.

        ref = fractal.fit("blood.h5ad", labels="cell_type", use_rep="X_scVI", study="donor")

    Parameters
    ----------
    cells : AnnData, or path or URI of an .h5ad or .zarr
    labels : str, column of obs with names or ids of the Cell Ontology; cells without a label are left out
    use_rep : str, key of obsm
    study : str, column of obs such as the donor. Whole studies are held out then, for scores and calibration, where
        most of their cells have a type of another study; all cells are in the reference
    levels : 2 to 6 columns of obs, coarse to fine, in place of the ontology
    label_map : dict of name -> CL name or id, or a TSV of both; an empty one leaves its cells out
    unmapped : "error" or "other", for names that CL does not know
    vague, not_vague : labels that other studies divide, as "T cell" into CD4 and CD8, and whose cells are left out, and
        labels that are to stay; by default the cells and their studies decide, see `fractal.annotate.vague_labels`
    hierarchy : path of an edited table of ingest.py
    tree : "published" (system, lineage, type, subtype) or "cellxgene" (system, subclass, type), of the ontology
    recipe : "fractal" or "published"
    max_cells : int, to train on and to keep, balanced over the finest level
    epochs, seed, device : of the training
    model : path of SCimilarity's encoder (the folder model_v1.1), which makes the vectors from counts, in place of
        obsm; the reference then encodes new cells itself

    Raises
    ------
    InputError : for bad input.
    """
    check_labels(labels, levels, label_map, hierarchy, unmapped, tree)
    if isinstance(label_map, str | Location):
        label_map = read_map(locate(label_map))
    settings, graph = Settings(find_recipe(recipe), epochs=epochs, seed=seed), load_graph(CL_SLIM)
    encoder = read_encoder(model, pick_device(device)) if model else None
    with ExitStack() as stack:
        with open_labelled(cells, use_rep, encoder) as opened:
            read = opened.labels(labels or "", study, label_map, levels)
            plan = place_cells(read, graph, opened.path, locate(hierarchy) if hierarchy else None, unmapped, tree)
            plan = without_vague(plan, opened, graph, vague, not_vague, seed)
            if isinstance(cells, str | Location):  # streamed, so that memory does not grow with the file
                path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "cells.parquet"
                write_atlas(path, opened, plan)
                atlas: Atlas = Atlas.open(path)
            else:
                atlas = atlas_in_memory(opened, plan)
        projection, kept = (None, "") if encoder else learn(cells, use_rep)
        for line in filter(None, [*plan.hierarchy.notes, order_warning(atlas), kept]):
            print(line)
        name = locate(cells).name if isinstance(cells, str | Location) else "an AnnData"
        facts = {"obsm": use_rep, "data": name, "source": name}
        if encoder:
            facts["encoder"] = asdict(encoder.link)
        train = Training(atlas, settings, device)
        return train_reference(train, study is not None, max_cells, graph, facts, projection)


@contextmanager
def open_labelled(cells: Any, use_rep: str, encoder: Encoder | None) -> Iterator[Cells]:
    """The cells with vectors of obsm, or of an encoder, whose message is printed."""
    if encoder is None:
        with Cells.open(cells, use_rep) as opened:
            yield opened
        return
    with open_encoded(cells, encoder) as (opened, line):
        print(line)
        yield opened


def check_labels(
    labels: str | None, levels: Sequence[str], label_map: Any, hierarchy: str | Path | None, unmapped: str, rules: str
) -> None:
    """Raises InputError for arguments of `fit` that contradict each other."""
    if bool(labels) == bool(levels):
        raise InputError("give either labels, a column of the Cell Ontology's names, or levels, columns of your own")
    tree = "levels" if levels else "hierarchy" if hierarchy else ""  # in place of the ontology's
    given = {
        "label_map": levels and label_map,
        "hierarchy": levels and hierarchy,
        "unmapped": tree and unmapped != "error",
        "tree": tree and rules != "published",
    }
    if ignored := [name for name, has in given.items() if has]:
        raise InputError(f"{', '.join(ignored)}: without effect beside {tree}; leave out one or the other")


@dataclass(frozen=True)
class Training:
    """Trains on rows of an atlas, as often as cross-fitting needs it."""

    atlas: Atlas
    settings: Settings
    device: str

    def __call__(
        self, training: LabelledVectors, validation: LabelledVectors, counted: np.ndarray, epochs: int | None = None
    ) -> Fitted:
        """counted (n,) bool: which rows of the atlas say how frequent types are."""
        settings = replace(self.settings, epochs=epochs or self.settings.epochs)
        counts, group = self.atlas.path_counts(counted), Group(device=pick_device(self.device))
        fitted = fit_adapter(training, validation, counts, settings, knn_accuracy, group=group)
        if fitted.stopped:
            raise fitted.stopped
        return fitted


def train_reference(
    train: Training,
    by_study: bool,
    max_cells: int,
    graph: "DiGraph",
    facts: Mapping[str, Any],
    projection: Projection | None,
) -> Reference:
    """Cross-fit, for scores and calibration; then train on all cells, for the median of the folds' best epochs."""
    atlas, seed = train.atlas, train.settings.seed
    folds = draw_folds(atlas, by_study, seed)
    every = np.ones(atlas.num_rows, bool)
    counts = atlas.path_counts(every)
    paths = sorted(counts)
    tree = Tree.of(paths, atlas.levels, terms_of(paths, graph), np.array([counts[path] for path in paths]))
    held_out, best = cross_fit(atlas, folds, tree, train, seed)
    split = Split.draw(atlas, seed, test_ratio=0.0).sampled(atlas, max_cells, val_ratio=0.0)
    rows = split.sample_rows(atlas)
    training, nothing = atlas.read(rows).split(len(rows))
    epochs = int(np.median(best))
    print(f"all: {len(rows):,} cells train, for {epochs} epochs, the median of the folds' best")
    fitted = train(training, nothing, every, epochs)
    facts = {
        **facts,
        "cl_release": graph.graph["release"],
        "held_out": folds.about,
        "split": asdict(split),
        "training": {**fitted.training(train.settings), "best_epochs_of_folds": best},
    }
    study = atlas.studies[0][rows].astype(np.int64) if by_study else np.zeros(len(rows), np.int64)
    path = tree.rows(path_names(training))
    annotator = Annotator(fitted.adapter.eval(), tree, training.vectors, path, study, held_out)
    studies = [f"study {code + 1}" for code in held_out.study] if folds.by_study else None  # names stay at home
    return make_reference(annotator, fitted.config, fitted.classes, None, facts, projection, studies)
