"""Labelled cells -> a reference, in one go: ingest, balance, train, calibrate, score.

The cells of a path pass through a temporary Parquet file, so that memory does not grow with them; those of an AnnData
stay in memory.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from networkx import DiGraph

from fractal.annotate.annotator import Annotator
from fractal.annotate.cross_fit import cross_fit, draw_folds, path_names
from fractal.annotate.projection import Projection, learn_together
from fractal.annotate.vague_labels import without_vague
from fractal.base.errors import InputError, in_python
from fractal.base.storage import Location, locate, locate_shared
from fractal.data.atlas import Atlas, LabelledVectors
from fractal.data.cells import Cells
from fractal.data.encoder import OBSM, Encoder, open_encoded, read_encoder
from fractal.data.ingestion import Plan, atlas_in_memory, copies_warning, order_warning, place_cells, write_atlas
from fractal.data.labels import read_map
from fractal.hierarchy.names import several
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.hierarchy.tree import Tree, terms_of
from fractal.model.adapter import pick_device
from fractal.model.distributed import Group
from fractal.model.recipes import Settings, find_recipe
from fractal.model.split import Split
from fractal.model.training import Fitted
from fractal.model.training import fit as fit_adapter
from fractal.reference import Reference, make_reference, read_reference
from fractal.score.metrics import knn_accuracy

if TYPE_CHECKING:
    from anndata import AnnData


@in_python
def fit(
    cells: "AnnData | str | Path | Sequence[AnnData | str | Path]",
    labels: str | None = None,
    use_rep: str | None = None,
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
    update: Reference | str | Path | None = None,
) -> Reference:
    """Labelled cells -> a reference. The cells are not changed.

        ref = fractal.fit("blood.h5ad", labels="cell_type", use_rep="X_scVI", study="donor")
        ref = fractal.fit(["tonsil.h5ad", "spleen.h5ad"], labels="cell_type", study="donor", update=ref)

    Parameters
    ----------
    cells : AnnData, or path or URI of an .h5ad or .zarr; or several, which count as one
    labels : str, column of obs with names or ids of the Cell Ontology; cells without a label are left out
    use_rep : str, key of obsm, by default "X_scimilarity", or that of the reference to update
    study : str, column of obs such as the donor. Whole studies are held out then, for scores and calibration, where
        three tenths of their cells have a type of another study; all cells are in the reference
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
    update : Reference, or where one is (see `fractal.load`). The cells that it keeps, their types and studies are
        taken before those of `cells`, whose studies are new ones. New cells are read as `Reference.annotate` does

    Raises
    ------
    InputError : for bad input.
    """
    levels, vague, not_vague = (several(names) for names in (levels, vague, not_vague))
    check_labels(labels, levels, label_map, hierarchy, unmapped, tree)
    if isinstance(label_map, str | Location):
        label_map = read_map(locate(label_map))
    settings, graph = Settings(find_recipe(recipe), epochs=epochs, seed=seed), load_graph(CL_SLIM)
    old = read_old(update, model)
    encoder = read_encoder(model, pick_device(device)) if model else None
    files = list(cells) if isinstance(cells, list | tuple) else [cells]
    kept = [kept_cells(old, labels, levels, study)] if old else []
    with ExitStack() as stack:
        with open_labelled(files, use_rep, encoder, old, kept) as opened:
            read = opened.labels(labels or "", study, label_map, levels)
            plan = place_cells(read, graph, opened.path, locate(hierarchy) if hierarchy else None, unmapped, tree)
            if old and plan.hierarchy.levels != old.levels:
                raise InputError(f"the reference has the levels {', '.join(old.levels)}; give its --tree or --levels")
            plan = without_vague(plan, opened, graph, vague, not_vague, seed)
            if all(isinstance(file, str | Location) for file in files):  # streamed: memory does not grow with them
                path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "cells.parquet"
                write_atlas(path, opened, plan)
                atlas: Atlas = Atlas.open(path)
            else:
                atlas = atlas_in_memory(opened, plan)
        facts, line = sources(files, opened, plan, old, encoder)
        facts["obsm"] = use_rep = use_rep or (old.use_rep if old else OBSM)
        projection, projects = (old.projection if old else None), ""
        if not (old or encoder):
            projection, projects = learn_together(files, use_rep)
        for text in filter(None, [*plan.hierarchy.notes, line, order_warning(atlas), copies_warning(atlas), projects]):
            print(text)
        return train_reference(atlas, settings, device, study is not None, max_cells, graph, facts, projection)


def read_old(update: Reference | str | Path | None, model: Any) -> Reference | None:
    """The reference to update. Raises InputError for an encoder beside it."""
    if model and update is not None:
        raise InputError(
            "--model: the reference of --update knows its encoder, if it has one; leave out one of the two"
        )
    return read_reference(locate_shared(update)) if isinstance(update, str | Location) else update


@contextmanager
def open_labelled(
    files: Sequence[Any],
    use_rep: str | None,
    encoder: Encoder | None = None,
    old: Reference | None = None,
    kept: Sequence[Cells] = (),
) -> Iterator[Cells]:
    """The kept cells, then those of the files, as the old reference takes them, of an encoder, or of obsm."""
    if not files:
        raise InputError("there are no cells: name a file, or give an AnnData")
    with ExitStack() as stack:
        parts = list(kept)
        for file in files:
            if old:
                parts.append(stack.enter_context(old.intake.cells(file, use_rep, False)))
            elif encoder:
                opened, line = stack.enter_context(open_encoded(file, encoder))
                print(line)
                parts.append(opened)
            else:
                parts.append(stack.enter_context(Cells.open(file, use_rep or OBSM)))
        yield Cells.chain(parts)


def kept_cells(reference: Reference, labels: str | None, levels: Sequence[str], study: str | None) -> Cells:
    """The cells of a reference, with columns called as those of the new cells. Raises InputError without `study`."""
    cells, paths = reference.annotator, reference.annotator.tree.paths
    columns = {labels: (cells.path, [path[-1] for path in paths])} if labels else {}
    for k, name in enumerate(levels[: len(reference.levels)]):  # "child (parent)" of `tree_of_columns` becomes "child"
        columns[name] = cells.path, [path[k].removesuffix(f" ({path[k - 1]})" * bool(k)) for path in paths]
    studies = [f"study {code} of the reference" for code in range(cells.study.max() + 1)]
    if study:
        columns[study] = cells.study, studies
    elif len(studies) > 1:
        raise InputError(
            f"the reference has {len(studies)} studies; name the column of those of the new cells: --study"
        )
    table = pa.table({name: pa.DictionaryArray.from_arrays(*column) for name, column in columns.items()})

    def rows(some: slice) -> pa.Table:
        return table.slice(some.start, some.stop - some.start)

    path, x = Path(reference.name or "the reference"), cells.vectors
    return Cells.from_matrix(path, x.shape, x.dtype, x.__getitem__, rows)


def sources(
    files: Sequence[Any], cells: Cells, plan: Plan, old: Reference | None, encoder: Encoder | None
) -> tuple[dict[str, Any], str]:
    """-> provenance of the cells that `fit` takes, and, where they are of several sources, a line about it."""
    names = [locate(file).name if isinstance(file, str | Location) else "an AnnData" for file in files]
    made = asdict(encoder.link) if encoder else old.facts.get("encoder") if old else None
    facts: dict[str, Any] = {"data": ", ".join(names), "source": ", ".join(names)} | ({"encoder": made} if made else {})
    if old:
        facts |= {key: f"{old.facts.get(key)}, {facts[key]}" for key in ("data", "source")}
        names.insert(0, f"the reference {old.name} (adapter {old.sha256[:16]})")
    if len(names) == 1:
        return facts, ""
    ends = np.cumsum([part.num_rows for part in cells.parts])[:-1]
    taken = [int(part.sum()) for part in np.split(plan.classes >= 0, ends)]
    facts["cells_from"] = [{"name": name, "cells": n} for name, n in zip(names, taken, strict=True)]
    return facts, "cells: " + ", ".join(f"{n:,} of {name}" for name, n in zip(names, taken, strict=True))


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


def train_reference(
    atlas: Atlas,
    settings: Settings,
    device: str,
    by_study: bool,
    max_cells: int,
    graph: DiGraph,
    facts: Mapping[str, Any],
    projection: Projection | None,
) -> Reference:
    """Cross-fit, for scores and calibration; then train on all cells, for the median of the folds' best epochs."""
    group, seed = Group(device=pick_device(device)), settings.seed

    def train(
        training: LabelledVectors, validation: LabelledVectors, counted: np.ndarray, settings: Settings = settings
    ) -> Fitted:
        """counted (n,) bool: which rows of the atlas say how frequent types are."""
        counts = atlas.path_counts(counted)
        fitted = fit_adapter(training, validation, counts, settings, knn_accuracy, group=group)
        if fitted.stopped:
            raise fitted.stopped
        return fitted

    folds = draw_folds(atlas, by_study, seed)
    every = np.ones(atlas.num_rows, bool)
    counts = atlas.path_counts(every)
    paths = sorted(counts)
    terms = terms_of(paths, graph, atlas.levels)
    tree = Tree.of(paths, atlas.levels, terms, np.array([counts[path] for path in paths]))
    study = atlas.studies[0].astype(np.int64) if by_study else np.zeros(atlas.num_rows, np.int64)
    held_out, best = cross_fit(atlas, folds, tree, study, train, seed)
    split = Split.draw(atlas, seed, test_ratio=0.0).sampled(atlas, max_cells, val_ratio=0.0)
    rows = split.sample_rows(atlas)
    training, nothing = atlas.read(rows).split(len(rows))
    epochs = int(np.median(best))
    print(f"all: {len(rows):,} cells train; number of epochs: {epochs}, the median of the folds' best")
    fitted = train(training, nothing, every, replace(settings, epochs=epochs))
    facts = {
        **facts,
        "cl_release": graph.graph["release"],
        "held_out": folds.about,
        "split": asdict(split),
        "training": {**fitted.training(settings), "best_epochs_of_folds": best},
    }
    path = tree.rows(path_names(training))
    annotator = Annotator(fitted.adapter.eval(), tree, training.vectors, path, study[rows], held_out)
    studies = [f"study {code + 1}" for code in held_out.study] if folds.by_study else None  # names stay at home
    return make_reference(annotator, fitted.config, fitted.classes, None, facts, projection, studies)
