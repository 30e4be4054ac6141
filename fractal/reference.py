"""The Python API: labelled cells -> a reference, and what a reference does with new cells.

`fit` does in one go what the scripts do step by step: ingest, balance, train, calibrate. The cells of a path pass
through a temporary Parquet file, so that memory does not grow with them; those of an AnnData stay in memory.
"""

import platform
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fractal import __version__
from fractal.annotate.annotator import NOVELTY
from fractal.annotate.bundle import CONFIDENCE, Bundle, make_reference, read_bundle, write_bundle
from fractal.annotate.projection import learn
from fractal.annotate.query import Origin, vectors_of
from fractal.base.cli import InputError
from fractal.base.storage import Place, fetch
from fractal.base.storage import place as place_of
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.data.ingestion import atlas_in_memory, place_cells, write_atlas
from fractal.data.labels import read_map
from fractal.data.outputs import facts as embedding_facts
from fractal.data.vectors import usable
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.model.adapter import pick_device
from fractal.model.distributed import Group
from fractal.model.embedding import block_names, embed_matrix
from fractal.model.recipes import Settings, find_recipe
from fractal.model.split import TEST_CELLS, Split
from fractal.model.training import fit as train
from fractal.score.answers import answer_table
from fractal.score.metrics import knn_accuracy

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

    from fractal.search import Index
    from fractal.view.maps import Maps

TEST_RATIO = 0.2  # of the cells, only to say how good the reference is
MIN_CELLS = 375  # below, all cells are needed to train and calibrate on


class Reference:
    """An adapter and labelled cells, ready to label and embed new ones. `fit` and `load` make it."""

    def __init__(self, bundle: Bundle, name: str = "", folder: Path | None = None) -> None:
        self.bundle, self.name, self.folder = bundle, name, folder

    @property
    def use_rep(self) -> str:
        """Key of obsm whose vectors it was made of, and which it takes by default."""
        return self.bundle.use_rep

    @property
    def sha256(self) -> str:
        """Of the adapter's weights as `save` writes them."""
        return self.bundle.sha256

    def __repr__(self) -> str:
        """What it holds, and how good its answers are on cells that were held out."""
        facts, adapter, scores = self.bundle.facts, self.bundle.adapter, self.bundle.facts["scores"]
        text = (
            f"Reference of {len(self.bundle.path):,} cells of {len(self.bundle.tree.paths)} types, from obsm "
            f"'{self.use_rep}' of {adapter.dim} numbers; {adapter.num_levels} blocks of {adapter.scale_dim}"
        )
        if self.bundle.projection:
            text += f"\nIt projects cells without such vectors itself, by {len(self.bundle.projection.genes):,} genes"
        if not scores["cells"]:
            return f"{text}\nThe cells are too few for some to be held out: nothing is known of its quality."
        kind = facts.get("held_out", "cells drawn at random")
        return f"{text}\n\nOn {scores['cells']:,} cells held out ({kind}):\n\n{answer_table(scores['levels'], 3)}"

    def save(self, folder: str | Path) -> None:
        """Write the reference's folder, whole or not at all. Raises InputError where something else lies there."""
        write_bundle(Path(folder), self.bundle)
        self.name, self.folder = Path(folder).resolve().name, Path(folder)

    def annotate(
        self,
        adata: "AnnData",
        key_added: str = "fractal",
        use_rep: str | None = None,
        *,
        confidence: float = CONFIDENCE,
        novelty: str = "on",
        force: bool = False,
        index: "Index | str | Path | None" = None,
        index_labels: str | None = None,
    ) -> None:
        """Label the cells of `adata` in place, each as deep in the hierarchy as it can be trusted.

        obs gets `{key_added}_label`, `_level`, `_cl_id` (the deepest answer), `_status` (ok, novel, withheld, invalid)
        and for every level its name, CL id and probability, also below the answer; text as categories, numbers as
        float32. uns[key_added]["annotation"] gets the reference's name, the versions, the confidence and a warning.

        confidence: a level is answered if its probability is at least this. novelty: "on" withholds the fine labels of
        odd cells, "flag" only marks them, "off" does neither. index: all cells of an index (see `search`) vote in place
        of the reference's, and the probabilities are calibrated anew; index_labels: its column with the reference's
        finest labels, where it has no columns of levels. Where vectors are missing, of another width, or as a body
        can't come from the reference's embedding, a reference of a PCA projects the cells from X, and says so. Raises
        InputError where it can't; `force` takes vectors of another embedding.
        """
        from pandas import Categorical

        if not 0 < confidence <= 1:
            raise InputError(f"confidence {confidence:g}: must be above 0 and at most 1")
        if novelty not in NOVELTY:
            raise InputError(f"novelty '{novelty}': is one of {', '.join(NOVELTY)}")
        vectors, origin = self.vectors_of(adata, use_rep, force)
        bundle = self.bundle
        if index is not None:
            from fractal.search.voters import with_index

            bundle = with_index(bundle, index, index_labels)
        for name, values in bundle.annotate(vectors, confidence, novelty).items():
            adata.obs[f"{key_added}_{name}"] = Categorical(values) if values.dtype == object else values
        about = bundle.about(self.name or "not saved", confidence, novelty, origin.vectors, origin.warning)
        adata.uns[key_added] = {**adata.uns.get(key_added, {}), "annotation": about}

    def embed(
        self,
        adata: "AnnData",
        prefix: int | None = None,
        use_rep: str | None = None,
        key_added: str = "X_fractal",
        *,
        force: bool = False,
    ) -> None:
        """Add obsm[key_added] (n, dims) float32 of length 1 in place: the full vector, or its first `prefix` blocks.

        A cell whose vector is zero or not finite gets NaN. uns["fractal"] says what `fractal.truncate` must know, so
        only the full vector is to be truncated; recipe `published` gets obsm["X_fractal_blocks"] for that. Vectors are
        found, projected or refused as in `annotate`. Raises InputError for these, ValueError for another prefix.
        """
        adapter, recipe = self.bundle.adapter, self.bundle.facts["recipe"]
        if prefix is not None and not 1 <= prefix <= adapter.num_levels:
            raise ValueError(f"prefix {prefix} of {adapter.num_levels}")
        adata.obsm[key_added], blocks = embed_matrix(adapter, self.vectors_of(adata, use_rep, force)[0], prefix)
        if prefix in (None, adapter.num_levels):
            if recipe == "published":
                adata.obsm[f"{key_added}_blocks"] = blocks
            told = embedding_facts(adapter, recipe, self.sha256, block_names(self.bundle.facts["config"]))
            adata.uns["fractal"] = {**adata.uns.get("fractal", {}), **told}

    def search(
        self,
        adata: "AnnData",
        index: "Index | str | Path",
        k: int = 10,
        *,
        group_by: str | None = None,
        use_rep: str | None = None,
        force: bool = False,
        **options: Any,
    ) -> "DataFrame":
        """The k nearest cells of an index (`fractal.open_index`, or its path) for each cell -> a row per hit.

        group_by: a column of obs; one query per group, the mean of its cells. options: prefix, where, only and columns,
        as `fractal search` has them. Raises InputError for an index of another adapter.
        """
        from fractal.search.query import search_vectors

        if group_by is not None and group_by not in adata.obs:
            raise InputError(f"obs has no column '{group_by}'; it has {', '.join(map(str, adata.obs))}")
        vectors, _ = self.vectors_of(adata, use_rep, force)
        if not usable(vectors).all():
            bad = int((~usable(vectors)).argmax())
            raise InputError(f"the vector of cell {bad} is zero or not finite; leave it out")
        names = adata.obs_names.astype(str).tolist()
        groups = None if group_by is None else adata.obs[group_by].tolist()
        embedded = embed_matrix(self.bundle.adapter, vectors)[0]
        return search_vectors(index, self.sha256, embedded, names, groups, k, **options)

    @cached_property
    def maps(self) -> "Maps":
        """A layout of the reference's cells per prefix (fractal.view.maps), kept in its folder if it has one."""
        from fractal.view.maps import maps_of

        return maps_of(self.bundle, self.folder)

    def map(self, adata: "AnnData", use_rep: str | None = None, *, force: bool = False) -> None:
        """Place the cells of `adata` on the reference's maps, in place, without refitting.

        obsm gets "X_fractal_umap_1" (prefix 1), "X_fractal_umap_2", ... (n, 2) float32, within about [-1, 1]; a cell
        whose vector is zero or not finite gets NaN. The first call lays out the reference's cells, which takes minutes
        for 20,000. Vectors are found, projected or refused as in `annotate`. Raises InputError for these.
        """
        from fractal.view.maps import OBSM, fractal_vectors

        places = self.maps.transform(fractal_vectors(self.bundle, self.vectors_of(adata, use_rep, force)[0]))
        for j, layout in enumerate(places, 1):
            adata.obsm[OBSM.format(j)] = layout

    def explore(
        self,
        adata: "AnnData",
        path: str | Path,
        labels: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        use_rep: str | None = None,
        max_cells: int = 20_000,
        force: bool = False,
    ) -> None:
        """Write one HTML page to look at the cells, which opens from disk and sends nothing: docs/explore.md.

        labels: column of obs with the cells' types, named as the reference's finest; without it the reference's answers
        are shown. columns: other columns to colour by; by default text of 2 to 60 values. max_cells: drawn at random.
        Vectors are found or refused as in `annotate`. Raises InputError for these and for recipe `published`.
        """
        from fractal.view.explorer import explore

        vectors, _ = self.vectors_of(adata, use_rep, force)
        maps, name = self.maps, self.name or "a reference"
        explore(self.bundle, maps, adata, vectors, Path(path), labels, columns, max_cells, name)

    def vectors_of(self, adata: "AnnData", use_rep: str | None, force: bool) -> tuple[np.ndarray, Origin]:
        """Vectors (n, dim) float32 of new cells, and where they come from, which is said if it is not obsm."""
        vectors, origin = vectors_of(self.bundle, adata, use_rep, force)
        if origin.projected:
            print(origin.vectors)
        if origin.warning:
            warnings.warn(f"{origin.vectors}: {origin.warning}", stacklevel=3)
        return vectors, origin


def load(folder: str | Path, device: str = "auto") -> Reference:
    """A reference from its folder. Runs no code from it. Raises InputError for one that is missing or damaged."""
    path = place_of(folder)
    return Reference(read_bundle(path, pick_device(device)), path.resolve().name, fetch(path))


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
) -> Reference:
    """Labelled cells, an AnnData or the path of an .h5ad, -> a reference. The cells are not changed.

    labels: column of obs with names or ids of the Cell Ontology; cells without a label are left out. levels: 2 to 6
    columns of obs, coarse to fine, in place of the ontology. use_rep: key of obsm. study: column of obs, such as the
    donor: whole studies are held out then, where that leaves no type without training cells. label_map: own name ->
    CL name or id, or a TSV of both; an empty one leaves its cells out. unmapped: "error" or "other", for names that CL
    does not know. hierarchy: an edited table of ingest.py. max_cells: to train and calibrate on, balanced over the
    finest level. Raises InputError for bad input.
    """
    if bool(labels) == bool(levels):
        raise InputError("give either labels, a column of the Cell Ontology's names, or levels, columns of your own")
    own = "levels" if levels else "hierarchy" if hierarchy else ""  # a tree in place of the ontology's
    given = {
        "label_map": levels and label_map,
        "hierarchy": levels and hierarchy,
        "unmapped": own and unmapped != "error",
    }
    if ignored := [name for name, has in given.items() if has]:
        raise InputError(f"{', '.join(ignored)}: without effect beside {own}; leave out one or the other")
    if isinstance(label_map, str | Place):
        label_map = read_map(place_of(label_map))
    place = pick_device(device)
    graph, table = load_graph(CL_SLIM), place_of(hierarchy) if hierarchy else None
    with ExitStack() as stack:
        with Cells.open(cells, use_rep) as opened:
            found = opened.labels(labels or "", study, label_map, levels)
            plan = place_cells(found, graph, opened.path, table, unmapped)
            if isinstance(cells, str | Place):  # streamed, so that memory does not grow with the file
                path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "cells.parquet"
                write_atlas(path, opened, plan)
                atlas: Atlas = Atlas.open(path)
            else:
                atlas = atlas_in_memory(opened, plan)
        for line in plan.hierarchy.notes:
            print(line)
        projection, note = learn(cells, use_rep)
        if note:
            print(note)
        split = hold_out(atlas, study is not None, max_cells, seed)
        train_rows, val_rows, test_rows = split.rows(atlas)
        training, validation = atlas.read(np.concatenate([train_rows, val_rows])).split(len(train_rows))
        counts = atlas.path_counts(~split.is_test(atlas))
        settings = Settings(find_recipe(recipe), epochs=epochs, seed=seed)
        fitted = train(training, validation, counts, settings, knn_accuracy, group=Group(device=place))
        if fitted.stopped:
            raise fitted.stopped
        drawn = np.sort(np.random.default_rng(seed).permutation(test_rows)[:TEST_CELLS])
        test = atlas.read(drawn) if len(drawn) else None
    name = place_of(cells).name if isinstance(cells, str | Place) else "an AnnData"
    facts = {
        "obsm": use_rep,
        "data": name,
        "source": name,
        "cl_release": graph.graph["release"],
        "held_out": f"whole studies: {', '.join(split.test_studies)}" if split.test_studies else "drawn at random",
        "split": asdict(split),
        "training": fitted.training(settings),
        "validation": fitted.validation,
        "versions": {
            "fractal": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    adapter, config, classes = fitted.adapter, fitted.config, fitted.classes
    return Reference(
        make_reference(adapter, config, classes, training, validation, counts, test, facts, graph, projection)
    )


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
