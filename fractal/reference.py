"""A reference: an adapter and labelled cells, which label and embed new cells; the Python API."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
import pyarrow as pa
import torch

from fractal import __version__
from fractal.annotate.annotator import Annotator
from fractal.annotate.answers import CONFIDENCE, annotation_columns, as_obs
from fractal.annotate.card import headline
from fractal.annotate.folder import MAPS, RAW_MAP, VERSION, read_parts, write_folder
from fractal.annotate.projection import Projection
from fractal.annotate.query import Intake
from fractal.annotate.run import Run, check_answers, read_clusters
from fractal.annotate.truth import Truth, report
from fractal.annotate.votes import COPIES, NEIGHBOURS
from fractal.base.archive import is_archive
from fractal.base.errors import InputError, in_python
from fractal.base.files import read_whole
from fractal.base.storage import Location, fetch, locate, locate_shared
from fractal.data.cells import Cells, has_obs
from fractal.data.encoder import EncoderLink
from fractal.data.parquet import CELL_ID, fingerprint
from fractal.data.writers import facts as embedding_facts
from fractal.data.writers import updated
from fractal.hierarchy.names import several
from fractal.hierarchy.ontology import CL_SLIM, load_graph
from fractal.model import checkpoint as checkpoints
from fractal.model.adapter import Adapter
from fractal.model.embedding import Embedder, block_names, cut_matrix, embed_matrix, weights_sha256
from fractal.score.answers import answer_table
from fractal.search import Index, open_index
from fractal.search.filters import mask_of
from fractal.search.query import search
from fractal.search.source import Source, space_of
from fractal.search.voters import index_voters
from fractal.view import page as pages
from fractal.view.colours import label_colours
from fractal.view.explorer import Page, check_template, html, write_page
from fractal.view.genes import read_genes
from fractal.view.labelled import atlas_cells, held_out_cells, obs_cells
from fractal.view.maps import OBSM, Maps, kept_maps, turned
from fractal.view.notebook import InlinePage
from fractal.view.report import score_reference
from fractal.view.scored import Scored
from fractal.view.shown import Shown, read_shown

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame


@dataclass
class Reference:
    """An adapter and labelled cells, ready to label and embed new ones. `fractal.fit` and `fractal.load` make it."""

    annotator: Annotator
    facts: dict[str, Any]  # bundle.json
    projection: Projection | None = None  # from expression to vectors
    name: str = ""
    folder: Path | None = None
    model: Path | None = None  # where the encoder of its cells lies now, if it has moved

    @property
    def adapter(self) -> Adapter:
        return self.annotator.adapter

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels of its hierarchy, coarse to fine."""
        return self.annotator.tree.levels

    @property
    def use_rep(self) -> str:
        """Key of obsm whose vectors it was made of, and which it takes by default."""
        return str(self.facts.get("obsm") or "X_scimilarity")

    @cached_property
    def sha256(self) -> str:
        """Of the adapter's weights as `save` writes them."""
        return weights_sha256(self.adapter)

    @property
    def intake(self) -> Intake:
        """What reads new cells for it."""
        encoder = EncoderLink(**self.facts["encoder"]) if self.facts.get("encoder") else None
        if encoder and self.model:
            encoder = replace(encoder, folder=str(self.model))
        return Intake(self.use_rep, self.adapter.dim, self.annotator.vectors, self.projection or encoder)

    @property
    def embedder(self) -> Embedder:
        blocks = block_names(self.facts["config"])
        intake, recipe = self.intake, self.facts["recipe"]
        return Embedder(self.adapter, recipe, blocks, self.sha256, self.use_rep, intake.cells, intake.checked)

    def __repr__(self) -> str:
        """What it holds, and how good its answers are on cells that were held out."""
        scores, tree = self.facts["scores"], self.annotator.tree
        text = (
            f"Reference of {len(self.annotator.path):,} cells of {len(tree.paths)} types, from obsm '{self.use_rep}' "
            f"of {self.adapter.dim} numbers; {self.adapter.num_levels} blocks of {self.adapter.scale_dim}"
        )
        if self.projection:
            text += f"\nIt projects cells without such vectors itself, by {len(self.projection.genes):,} genes"
        if encoder := self.facts.get("encoder"):
            text += f"\nIt encodes cells without such vectors itself, by the encoder of {encoder['folder']}"
        if not scores["cells"]:
            return f"{text}\nThe cells are too few for some to be held out: nothing is known of its quality."
        return f"{text}\n\n{headline(self.facts)}\n\n{answer_table(scores['levels'], 3)}"

    @in_python
    def save(self, path: str | Path) -> None:
        """Write the reference, whole or not at all: a folder, or one file if the name ends in .zip.

        Raises InputError where something else lies there.
        """
        path = Path(path)
        write_folder(path, (self.annotator, self.facts, self.projection))
        self.name, self.folder = path.resolve().name, None if is_archive(path) else path

    @in_python
    def annotate(
        self,
        adata: "AnnData",
        key_added: str = "fractal",
        use_rep: str | None = None,
        *,
        confidence: float = CONFIDENCE,
        error: float | None = None,
        novelty: str = "on",
        force: bool = False,
        index: Index | str | Path | None = None,
        index_labels: str | None = None,
        over: str | None = None,
        markers: bool = False,
        truth: str | None = None,
        only: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
    ) -> None:
        """Label the cells of `adata` in place, each as deep in the hierarchy as it can be trusted.

        obs gets `{key_added}_label`, `_level`, `_cl_id` (the deepest answer), `_status` (ok, novel, withheld, excluded,
        invalid) and for every level its name, CL id and probability, also below the answer; text as categories, numbers
        as float32. uns[key_added]["annotation"] gets the reference's name, the versions, the confidence and a warning,
        and uns[f"{key_added}_label_colors"] colours that follow the tree. Columns of an earlier annotation with this
        key go.

        Parameters
        ----------
        adata : AnnData, whose obsm[use_rep], or what the reference projects, is read
        key_added : str, what the names of the columns begin with
        use_rep : str, default the key that the reference was made with
        confidence : float in (0, 1]; a level is answered if its probability is at least this
        error : float in (0, 1), in place of a confidence: at most this share of all cells gets a label that is neither
            theirs nor above theirs; printed is for whom that is guaranteed (see `Calibration.control`)
        novelty : "on" withholds the fine labels of unusual cells, "flag" only marks them, "off" does neither
        force : bool; take vectors of another embedding
        index : Index or path; its cells vote in place of the reference's, with probabilities calibrated anew
        index_labels : str, a column of the index with the reference's finest labels, by name or as the Cell Ontology
            knows them, where it has no columns of levels
        over : str, column of obs of a clustering: all cells of a cluster get one label, and uns[key_added]["groups"] is
            a table of these: the probability of the label, the share of the cells that agree, why it is not deeper;
            cells with a missing value or -1 are in no cluster
        markers : bool; with over, uns[key_added]["markers"] is a table of the ten genes that each cluster has most
            clearly more of than all other cells, from counts or log-normalised values in layers["counts"], X or raw
        truth : str, column of obs of known labels, by name or as the Cell Ontology knows them: prints how good the
            answers are
        only, exclude : str or sequence of labels of the reference or terms of the Cell Ontology, as "T cell" or
            "CL:0000084": only these types and what is below them, or none of them

        Raises
        ------
        InputError : where vectors are missing, of another width, or as a whole can't come from the reference's
            embedding, and the reference can't project the cells from X instead (it says so where it does).
        """
        if markers and not over:
            raise InputError("markers: are of clusters; name their column of obs with over")
        run = self.run(confidence, error, novelty, index, index_labels, only=only, exclude=exclude)
        for line in run.lines:
            print(line)
        with self.intake.open(adata, use_rep, force) as (cells, origin):
            groups, known = (cells.codes(key) if key else None for key in (over, truth))
            if markers and groups:
                run.add_markers(adata, groups)
            columns = pa.concat_tables(run.columns(cells, origin, groups)).drop_columns(CELL_ID)
        for name in annotation_columns(adata.obs, key_added):
            del adata.obs[name]
        for name, values in as_obs(columns).items():
            adata.obs[f"{key_added}_{name}"] = values
        tree, labels = run.annotator.tree, adata.obs[f"{key_added}_label"].cat.categories
        adata.uns[f"{key_added}_label_colors"] = label_colours(tree.paths, labels)
        adata.uns[key_added] = updated(adata.uns.get(key_added), run.results)
        if known is not None:
            print(report(run.answered, Truth.of(truth or "", *known, tree, self.graph()), tree))

    def run(
        self,
        confidence: float = CONFIDENCE,
        error: float | None = None,
        novelty: str = "on",
        index: Index | str | Path | None = None,
        index_labels: str | None = None,
        *,
        only: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        obo: Any = None,
    ) -> Run:
        """What `annotate` does, for any cells; obo: of the Cell Ontology in place of the shipped one."""
        check_answers(confidence, novelty, error)
        annotator, lines = self.annotator, list[str]()
        about = {
            "reference": self.name or "not saved",
            "adapter_sha256": self.sha256,
            "cl_release": str(self.facts.get("cl_release", "")),
            "novelty": novelty,
            "fractal_version": __version__,
            "reference_format": VERSION,
        }
        if index is not None:
            least = NEIGHBOURS + COPIES
            voters = index_voters(index, self.sha256, annotator.tree, self.graph(obo), index_labels, least)
            annotator = annotator.with_voters(voters)
            lines.append(f"{voters} vote; probabilities by {len(annotator.held_out):,} held-out cells")
            about["index"] = str(voters)
        annotator = annotator.restricted(self.choose(obo, several(only), several(exclude)))
        if error is not None:
            control = annotator.calibration.control(error)
            lines.append(str(control))
            confidence, about["error"] = control.confidence, error
        results = {"annotation": {**about, "confidence": confidence}, "groups": None, "markers": None}
        return Run(annotator, confidence, novelty, lines, results)

    def choose(self, obo: Any, only: Sequence[str], exclude: Sequence[str]) -> np.ndarray | None:
        """The mask of paths for `Annotator.restricted`, by terms of the ontology `obo` (None: the shipped one).

        Raises InputError where that ontology lacks terms of the reference, and for terms where it has none.
        """
        tree, where, graph = self.annotator.tree, self.name or "the reference", self.graph(obo)
        if graph is not None:
            tree.check_terms(graph, where, obo or CL_SLIM, self.facts.get("cl_release", "unknown"))
        return tree.choose(graph, only, exclude)

    def graph(self, obo: Any = None) -> nx.DiGraph | None:
        """The Cell Ontology `obo`, by default the shipped one; None where no label is one of its terms."""
        return load_graph(obo or CL_SLIM) if self.annotator.tree.cl_ids.any() else None

    @in_python
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
        read, projected or refused as in `annotate`. Raises InputError for these, ValueError for another prefix.
        """
        adapter, recipe = self.adapter, self.facts["recipe"]
        if prefix is not None and not 1 <= prefix <= adapter.num_levels:
            raise ValueError(f"prefix {prefix} of {adapter.num_levels}")
        adata.obsm[key_added], blocks = embed_matrix(adapter, self.vectors_of(adata, use_rep, force), prefix)
        if prefix in (None, adapter.num_levels):
            if recipe == "published":
                adata.obsm[f"{key_added}_blocks"] = blocks
            about = embedding_facts(adapter, recipe, self.sha256, self.embedder.levels)
            adata.uns["fractal"] = {**adata.uns.get("fractal", {}), **about}

    @in_python
    def search(
        self,
        adata: "AnnData",
        index: Index | str | Path,
        k: int = 10,
        *,
        prefix: int | None = None,
        where: str | None = None,
        only: Sequence[str] = (),
        group_by: str | None = None,
        columns: Sequence[str] | None = None,
        use_rep: str | None = None,
        force: bool = False,
    ) -> "DataFrame":
        """The k nearest cells of an index for each cell -> a row per hit: query, rank, id, row, source, similarity, ...

        Parameters
        ----------
        adata : AnnData, whose vectors are read, projected or refused as in `annotate`
        index : of `fractal.open_index`, or its path
        k : int, default 10
        prefix : int, default all; compare so many first blocks only
        where : str, default none; a condition that cells must meet, as "tissue == 'lung'"
        only : str, default all; labels of any level, or CL ids, that cells must have
        group_by : str, default none; a column of obs: one query per group, by up to 8 representatives of its cells
        columns : str, default all; the index's, that the hits get
        use_rep, force : see `annotate`

        Raises
        ------
        InputError : for an index of another adapter, and for filters and columns that don't fit.
        """
        index = index if isinstance(index, Index) else open_index(index)
        index.check_adapter([self.sha256], "the reference")
        keep, columns = mask_of(index, where, several(only)), several(columns)
        with self.intake.cells(adata, use_rep, force) as cells:
            source = Source(cells, space_of(self.embedder), self.embedder)
            found = search(source, index, k, group_by, prefix=prefix, keep=keep)
            return pa.concat_tables([index.table(hits, names, columns) for names, hits in found]).to_pandas()

    @cached_property
    def maps(self) -> Maps:
        """A layout of the reference's cells per prefix (fractal.view.maps), kept in its folder if it has one."""
        ends = [self.adapter.scale_dim * j for j in range(1, self.adapter.num_levels + 1)]
        path = self.folder / MAPS if self.folder else None
        return kept_maps(path, cut_matrix(self.adapter, self.annotator.vectors), ends)

    @cached_property
    def raw_map(self) -> Maps:
        """One layout of the same cells by the vectors as they came, kept likewise."""
        vectors = self.annotator.vectors
        return kept_maps(self.folder / RAW_MAP if self.folder else None, vectors, [vectors.shape[1]])

    def layouts(self, vectors: np.ndarray) -> np.ndarray:
        """Place cells (n, dim) at each prefix, and last by the vectors as they came -> (prefixes + 1, n, 2) float32."""
        raw = turned(self.raw_map, self.maps.layouts[-1]).transform(vectors)
        return np.concatenate([self.maps.transform(cut_matrix(self.adapter, vectors)), raw])

    @in_python
    def map(self, adata: "AnnData", use_rep: str | None = None, *, force: bool = False) -> None:
        """Place the cells of `adata` on the reference's maps, in place, without refitting.

        obsm gets "X_fractal_umap_1" (prefix 1), "X_fractal_umap_2", ... (n, 2) float32, within about [-1, 1]; a cell
        whose vector is zero or not finite gets NaN. The first call lays out the reference's cells, which takes minutes
        for 20,000. Vectors are read, projected or refused as in `annotate`. Raises InputError for these.
        """
        positions = self.maps.transform(cut_matrix(self.adapter, self.vectors_of(adata, use_rep, force)))
        for j, layout in enumerate(positions, 1):
            adata.obsm[OBSM.format(j)] = layout

    @in_python
    def explore(
        self,
        adata: "AnnData",
        path: str | Path | None = None,
        labels: str | None = None,
        *,
        columns: Sequence[str] | None = None,
        genes: Sequence[str] | None = None,
        use_rep: str | None = None,
        max_cells: int = 20_000,
        force: bool = False,
    ) -> InlinePage | None:
        """One HTML page to look at the cells, which opens from disk and sends nothing: docs/explore.md.

        Parameters
        ----------
        adata : AnnData
        path : of the page to write; without one the page is returned, and a notebook shows it
        labels : str, column of obs with the cells' types, by name or as the Cell Ontology knows them; by default the
            reference's answers
        columns : other columns to colour by; by default those of text with 2 to 60 values
        genes : at most 500, to colour by; by default the types' markers, where there are counts
        use_rep, force : as in `annotate`
        max_cells : int, drawn at random

        Raises
        ------
        InputError : for a column that is not there, for vectors as in `annotate`, and for recipe `published`.
        """
        check_template()
        with self.intake.cells(adata, use_rep, force) as cells:
            shown = self.shown(cells, labels, several(columns), max_cells)
        shown = replace(shown, genes=read_genes(adata, shown.rows, several(genes) or None))
        layouts = self.layouts(shown.vectors)
        if path is None:
            return InlinePage(html(self.page("AnnData"), shown, layouts), "Explorer")
        write_page(Path(path), self.page("AnnData"), shown, layouts)
        return None

    def shown(
        self, cells: Cells, labels: str | None, columns: Sequence[str] | None, max_cells: int | None = None
    ) -> Shown:
        """As `read_shown`, labels named as the reference's finest where they mean one by the Cell Ontology."""
        shown = read_shown(cells, labels, columns, max_cells)
        if shown.labels is None:
            return shown
        names = list(dict.fromkeys(shown.labels))
        meant = dict(zip(names, self.annotator.tree.find(names, self.graph()), strict=True))
        return replace(shown, labels=[(meant[name] or (name,))[-1] for name in shown.labels])

    def page(self, title: str) -> Page:
        """What a page of the explorer shows beside its cells."""
        facts = {
            "Reference made of": str(self.facts.get("source") or self.facts.get("data", "")),
            "Reference cells": f"{len(self.annotator.path):,} of {len(self.annotator.tree.paths)} types",
            "Vectors": self.use_rep,
            "Cell Ontology": str(self.facts.get("cl_release", "")),
            "Adapter": self.sha256[:16],
            "Fractal Cells": __version__,
        }
        return Page(self.annotator, self.embedder.levels, title, self.name or "a reference", facts)

    @in_python
    def report(
        self,
        path: str | Path | None = None,
        cells: "AnnData | str | Path | None" = None,
        labels: str | None = None,
        *,
        figures: str | Path | None = None,
        **options: Any,
    ) -> InlinePage | None:
        """One HTML page that says how good the reference is: docs/report.md.

        path : of the page to write; without one the page is returned, and a notebook shows it. figures : folder to
        write the figures to, as .svg and .png. cells, labels, options : as in `score`, which says what it raises.
        """
        out, folder = (None if name is None else Path(name) for name in (path, figures))
        pages.check_output(out, folder)
        scored = self.score(cells, labels, **options)
        title = f"How good {scored.name} is"
        if out or folder:
            pages.write(title, [scored], out, folder)
        return None if out else pages.inline(title, scored)

    def score(
        self,
        cells: "AnnData | str | Path | None" = None,
        labels: str | None = None,
        *,
        levels: Sequence[str] = (),
        study: str | None = None,
        use_rep: str | None = None,
        force: bool = False,
        num_samples: int = 5_000,
        obo: str | None = None,
        seed: int = 0,
        annotated: "AnnData | str | Path | None" = None,
    ) -> Scored:
        """How good the reference is, on labelled cells, for `report` to show.

        Parameters
        ----------
        cells : AnnData, or path or URI of an .h5ad, .zarr or Parquet of ingest.py; by default the reference's held-out
            cells. Of the file of training only the test cells count.
        labels : str, column of obs with names or ids of the Cell Ontology, or the reference's finest names
        levels : columns of obs, one a level, coarse to fine, in place of labels
        study : str, column of obs: studies or donors; intervals are over these, not over cells
        use_rep, force : as in `annotate`
        num_samples : int, cells to draw
        obo : path or URL of the Cell Ontology; by default the shipped one
        seed : int, of the draw
        annotated : AnnData, .h5ad or .zarr that `annotate` has answered with `over`: also show its clusters, and their
            markers, if it has them

        Raises
        ------
        InputError : for cells without labels or usable vectors, and of another embedding; for `annotated` without
            clusters, or by another reference.
        """
        clusters = None if annotated is None else read_clusters(annotated, self.sha256)
        graph, name = load_graph(obo or CL_SLIM), self.name or "the reference"
        tree, own = self.annotator.tree, cells is None
        if cells is None:
            labelled = held_out_cells(self.annotator, num_samples, seed)
        else:
            in_memory = hasattr(cells, "obsm")
            with self.intake.open(cells if in_memory else locate(cells), use_rep, force) as (opened, origin):
                if in_memory or has_obs(cells):
                    columns = opened.labels(labels or "", study, None, several(levels))
                    labelled = obs_cells(opened, columns, tree, graph, num_samples, seed)
                else:
                    labelled = atlas_cells(opened.path, tree, self.facts, num_samples, seed)
            labelled.notes.extend(line for line in (origin.vectors * origin.projected, origin.warning) if line)
        scored = score_reference(self.annotator, self.facts, name, self.sha256, labelled, own, graph)
        return replace(scored, clusters=clusters)

    def vectors_of(self, adata: "AnnData", use_rep: str | None, force: bool) -> np.ndarray:
        """Vectors (n, dim) float32 of new cells."""
        with self.intake.cells(adata, use_rep, force) as cells:
            (_, vectors), *_ = cells.chunks(cells.num_rows)
        return vectors


def make_reference(
    annotator: Annotator,
    config: dict[str, Any],
    classes: list[list[str]],
    test: Any = None,
    facts: Mapping[str, Any] | None = None,
    projection: Projection | None = None,
    studies: Sequence[str] | None = None,
) -> Reference:
    """An annotator -> a reference, scored on n test cells (LabelledVectors) that nothing has seen.

    config, classes: those of the checkpoint. facts: provenance, for bundle.json and the card. projection: where the
    vectors are those of a PCA. studies: (n,) that of each test cell, where whole studies are held out.
    """
    facts, tree = facts or {}, annotator.tree
    versions = {
        "fractal": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    about: dict[str, Any] = {
        **{"training": {}, "split": {}, "validation": None},  # as of a checkpoint; the facts have them where known
        **facts,
        "versions": versions | facts.get("versions", {}),
        "config": config,
        "classes": classes,
        "recipe": config["recipe"],
        "levels": list(tree.levels),
        "reference_cells": len(annotator.path),
        "reference_types": len(np.unique(annotator.path)),
        "training_cells": int(tree.counts.sum()),
        **({"projection": projection.facts()} if projection else {}),
        "scores": annotator.scores(test, studies),
    }
    return Reference(annotator, about, projection)


@in_python
def load(
    path: str | Path, device: str = "auto", model: str | Path | None = None, *, sha256: str | None = None
) -> Reference:
    """A reference from its folder or .zip. Runs no code from it. Raises InputError for one that is missing or damaged.

        ref = fractal.load("https://example.org/blood.zip", sha256="9f86d081...")

    Parameters
    ----------
    path : of a folder or a .zip, on this machine or at a URI; or the https:// address of a .zip
    device : of torch
    model : where SCimilarity's encoder lies now, for a reference that was made with one and no longer finds it
    sha256 : of a .zip at an https:// address, which is not read without one; it may stand after URL#sha256=, too
    """
    return read_reference(locate_shared(path, sha256), device, Path(model) if model else None)


def read_reference(path: Location, device: str = "cpu", model: Path | None = None) -> Reference:
    parts = read_parts(path, device)
    return Reference(*parts, path.resolve().name, None if is_archive(path) else fetch(path), model)


def open_embedder(path: Location, device: str = "cpu", model: Path | None = None) -> Embedder:
    """Of a checkpoint of train.py, which knows no cells, or a reference; model as in `load`.

    Raises InputError for neither.
    """
    if path.is_dir() or is_archive(path):
        return read_reference(path, device, model).embedder
    (adapter, checkpoint), sha256 = read_whole(path, lambda path: (checkpoints.load(path, device), fingerprint(path)))

    def open_cells(cells: Any, use_rep: str | None, force: bool) -> Any:
        return Cells.open(cells, use_rep or "X_scimilarity", adapter.dim)

    config = checkpoint["config"]
    return Embedder(adapter, config["recipe"], block_names(config), sha256, "X_scimilarity", open_cells)


def load_adapter(path: Location, device: str = "cpu") -> tuple[Adapter, dict[str, Any]]:
    """A checkpoint of train.py, or a reference -> the adapter, and what it says beside it."""
    if path.is_dir() or is_archive(path):
        reference = read_reference(path, device)
        return reference.adapter, reference.facts
    return checkpoints.load(path, device)
