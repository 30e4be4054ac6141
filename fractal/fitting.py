"""Labelled cells -> a reference, in one go: ingest, balance, train, calibrate, score.

The cells of a path pass through a temporary Parquet file, so that memory does not grow with them; those of an AnnData
stay in memory.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fractal.annotate.annotator import Annotator
from fractal.annotate.projection import learn
from fractal.base.errors import InputError, in_python
from fractal.base.storage import Place
from fractal.base.storage import place as place_of
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.data.encoder import Encoder, open_encoded, read_encoder
from fractal.data.ingestion import atlas_in_memory, place_cells, write_atlas
from fractal.data.labels import read_map
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.model.adapter import pick_device
from fractal.model.distributed import Group
from fractal.model.recipes import Settings, find_recipe
from fractal.model.split import TEST_CELLS, Split
from fractal.model.training import fit as train
from fractal.reference import Reference, make_reference, versions
from fractal.score.metrics import knn_accuracy

if TYPE_CHECKING:
    from anndata import AnnData
    from networkx import DiGraph

TEST_RATIO = 0.2  # of the cells, only to say how good the reference is
MIN_CELLS = 375  # below, all cells are needed to train and calibrate on


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
    hierarchy: str | Path | None = None,
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
    study : str, column of obs such as the donor: whole studies are held out where each type stays in another one
    levels : 2 to 6 columns of obs, coarse to fine, in place of the ontology
    label_map : dict of name -> CL name or id, or a TSV of both; an empty one leaves its cells out
    unmapped : "error" or "other", for names that CL does not know
    hierarchy : path of an edited table of ingest.py
    recipe : "fractal" or "published"
    max_cells : int, to train and calibrate on, balanced over the finest level
    epochs, seed, device : of the training
    model : path of SCimilarity's encoder (the folder model_v1.1), which makes the vectors from counts, in place of
        obsm; the reference then encodes new cells itself

    Raises
    ------
    InputError : for bad input.
    """
    check_labels(labels, levels, label_map, hierarchy, unmapped)
    if isinstance(label_map, str | Place):
        label_map = read_map(place_of(label_map))
    settings, graph = Settings(find_recipe(recipe), epochs=epochs, seed=seed), load_graph(CL_SLIM)
    encoder = read_encoder(model, pick_device(device)) if model else None
    with ExitStack() as stack:
        with open_labelled(cells, use_rep, encoder) as opened:
            read = opened.labels(labels or "", study, label_map, levels)
            plan = place_cells(read, graph, opened.path, place_of(hierarchy) if hierarchy else None, unmapped)
            if isinstance(cells, str | Place):  # streamed, so that memory does not grow with the file
                path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "cells.parquet"
                write_atlas(path, opened, plan)
                atlas: Atlas = Atlas.open(path)
            else:
                atlas = atlas_in_memory(opened, plan)
        for line in plan.hierarchy.notes:
            print(line)
        split = hold_out(atlas, study is not None, max_cells, seed)
        name = place_of(cells).name if isinstance(cells, str | Place) else "an AnnData"
        facts = {
            "obsm": use_rep,
            "data": name,
            "source": name,
            **({"encoder": asdict(encoder.link)} if encoder else {}),
        }
        return train_reference(
            atlas, split, settings, device, graph, facts, None if encoder else learned(cells, use_rep)
        )


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
    labels: str | None, levels: Sequence[str], label_map: Any, hierarchy: str | Path | None, unmapped: str
) -> None:
    """Raises InputError for arguments of `fit` that contradict each other."""
    if bool(labels) == bool(levels):
        raise InputError("give either labels, a column of the Cell Ontology's names, or levels, columns of your own")
    tree = "levels" if levels else "hierarchy" if hierarchy else ""  # in place of the ontology's
    given = {
        "label_map": levels and label_map,
        "hierarchy": levels and hierarchy,
        "unmapped": tree and unmapped != "error",
    }
    if ignored := [name for name, has in given.items() if has]:
        raise InputError(f"{', '.join(ignored)}: without effect beside {tree}; leave out one or the other")


def learned(cells: Any, use_rep: str) -> Any:
    """The Projection of these cells, if obsm[use_rep] is a PCA; what was learnt, or why not, is printed."""
    projection, line = learn(cells, use_rep)
    if line:
        print(line)
    return projection


def train_reference(
    atlas: Atlas,
    split: Split,
    settings: Settings,
    device: str,
    graph: "DiGraph",
    facts: Mapping[str, Any],
    projection: Any = None,
) -> Reference:
    """Train on an atlas's training cells, calibrate on its validation cells, score on its test cells."""
    train_rows, val_rows, test_rows = split.rows(atlas)
    training, validation = atlas.read(np.concatenate([train_rows, val_rows])).split(len(train_rows))
    counts = atlas.path_counts(~split.is_test(atlas))
    group = Group(device=pick_device(device))
    fitted = train(training, validation, counts, settings, knn_accuracy, group=group)
    if fitted.stopped:
        raise fitted.stopped
    drawn = np.sort(np.random.default_rng(settings.seed).permutation(test_rows)[:TEST_CELLS])
    test = atlas.read(drawn) if len(drawn) else None
    studies = atlas.study_names(drawn) if split.test_studies else None
    facts = {
        **facts,
        "cl_release": graph.graph["release"],
        "held_out": f"whole studies: {', '.join(split.test_studies)}" if split.test_studies else "drawn at random",
        "split": asdict(split),
        "training": fitted.training(settings),
        "validation": fitted.validation,
        "versions": versions(),
    }
    annotator = Annotator.of(fitted.adapter, training, validation, counts, graph)
    return make_reference(annotator, fitted.config, fitted.classes, test, facts, projection, studies)


def hold_out(atlas: Atlas, by_study: bool, max_cells: int, seed: int) -> Split:
    """Who is tested on, and who calibrates: of a few hundred cells none is tested on, so that enough are left for that.

    `by_study`: whole studies are tested on, as many as hold TEST_RATIO of the cells, but none that has the only cells
    of a type; where there are no such studies, cells are drawn.
    """
    types, _ = atlas.finest
    test_ratio = TEST_RATIO if len(types) >= MIN_CELLS else 0.0
    held_out: list[str] = []
    if by_study and test_ratio:
        codes, names = atlas.studies
        counts = np.zeros((len(names), types.max() + 1), np.int64)
        np.add.at(counts, (codes, types), 1)
        left = counts.sum(0)
        for study in np.random.default_rng(seed).permutation(len(names)).tolist():
            if (left > counts[study]).all():
                held_out.append(names[study])
                left = left - counts[study]
            if left.sum() <= (1 - test_ratio) * len(types):
                break
    return Split.draw(atlas, seed=seed, test_ratio=test_ratio, max_samples=max_cells, test_studies=sorted(held_out))
