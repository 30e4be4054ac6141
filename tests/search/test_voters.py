"""Annotation by the votes of an index: against exact votes, and what is refused."""

from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

import fractal
import ingest
import train
from fractal.annotate.annotator import Annotator
from fractal.annotate.votes import NEIGHBOURS, TEMPERATURE
from fractal.base.errors import InputError
from fractal.commands import annotate, embed
from fractal.commands import index as index_command
from fractal.commands import reference as reference_command
from fractal.data.atlas import Atlas
from fractal.search import build, open_index, voters
from tests.conftest import TYPES, clustered, write_h5ad


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cells.parquet of 600 cells, ref/ of them, and many/, an index of lists of 40 of 3,000 cells, these 600 first."""
    folder = tmp_path_factory.mktemp("voters")
    labels = TYPES * 500
    cells, model = str(folder / "cells.parquet"), str(folder / "a.pt")
    for name, n in (("cells", 600), ("many", 3_000)):
        path = write_h5ad(folder / f"{name}.h5ad", clustered(labels, spread=0.9)[:n], kind=labels[:n])
        flags = ["--obsm", "X_pca", "--label-key", "kind", "--output", str(folder / f"{name}.parquet")]
        ingest.main(["--h5ad", str(path), *flags])
    quick = ["--epochs", "3", "--val-ratio", "0.3", "--scale-dim", "4", "--device", "cpu"]
    train.main(["--input", cells, "--output", model, *quick])
    made = ["--model-path", model, "--input", cells, "--output", str(folder / "ref"), "--device", "cpu"]
    reference_command.main(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "CELLS_PER_LIST", 40)
        embedded = str(folder / "embedded.parquet")
        embed.main([str(folder / "many.parquet"), "--reference", model, "--output", embedded, "--device", "cpu"])
        index_command.main([embedded, "--output", str(folder / "many")])
    return folder


def exact_votes(annotator: Annotator, vectors: np.ndarray, folder: Path) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """Slow and obvious: the paths of names, and the shares of the votes of their labels."""
    cells = Atlas.open(folder / "many.parquet").read(np.arange(3_000))
    names = [tuple(cells.classes[k][c] for k, c in enumerate(row)) for row in cells.labels.tolist()]
    with torch.inference_mode():
        bank, queries = (annotator.adapter.encode(torch.from_numpy(x)) for x in (cells.vectors, vectors))
    paths, shares = [], []
    for similarity in (queries @ bank.T).double():
        nearest = similarity.argsort(descending=True)[:NEIGHBOURS].tolist()
        weight = (similarity[nearest] / TEMPERATURE).softmax(0).tolist()
        path: tuple[str, ...] = ()
        share = []
        for k in range(4):
            votes: dict[str, float] = {}
            for i, w in zip(nearest, weight, strict=True):
                if names[i][:k] == path:
                    votes[names[i][k]] = votes.get(names[i][k], 0) + w
            path = (*path, max(votes, key=votes.__getitem__))
            share.append(votes[path[-1]])
        paths.append(path)
        shares.append(share)
    return paths, np.array(shares)


def test_votes_of_all_lists_are_exact(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(voters, "LISTS", 10**6)
    monkeypatch.setattr(voters, "REACH", np.inf)
    annotator = fractal.load(folder / "ref", "cpu").run(index=folder / "many").annotator
    vectors = clustered(TYPES * 520, spread=0.9)[-120:]
    raw = annotator.voting(vectors)
    paths, shares = exact_votes(annotator, vectors, folder)
    same = [annotator.tree.paths[p] == path for p, path in zip(raw.path, paths, strict=True)]
    assert np.mean(same) >= 0.98  # float16 swaps near ties
    assert np.allclose(raw.votes[same], shares[same], atol=0.02)


def test_held_out_cells_do_not_vote_for_themselves(folder: Path):
    """All are in the index. With their votes the labels would look surer than they are in new cells."""
    plain = fractal.load(folder / "ref", "cpu").annotator
    asking = fractal.load(folder / "ref", "cpu").run(index=folder / "many").annotator
    itself, others = asking.voting(plain.held_out.vectors), asking.held_out.raw(asking.tree)
    assert (itself.distance < 1e-3).all()
    assert (others.distance > 1e-3).mean() > 0.95
    right = [np.where(raw.path == plain.held_out.path, raw.votes[:, -1], 0).mean() for raw in (itself, others)]
    assert right[0] > right[1]
    assert np.array_equal(asking.held_out.signals, plain.held_out.signals)


def test_what_is_novel_is_so_to_the_reference_whoever_votes(folder: Path):
    plain = fractal.load(folder / "ref", "cpu")
    asking = plain.run(index=folder / "many").annotator
    vectors = clustered(TYPES * 510, spread=0.9)[-60:]
    own, indexed = plain.annotator.voting(vectors), asking.voting(vectors)
    assert np.array_equal(own.signals, indexed.signals)
    assert not np.array_equal(own.votes, indexed.votes)
    assert np.array_equal(plain.annotator.answer(vectors).p_value, asking.answer(vectors).p_value)


def test_the_command_and_python_say_the_same(folder: Path, tmp_path: Path):
    labels = TYPES * 10
    path = write_h5ad(tmp_path / "new.h5ad", clustered(TYPES * 510, spread=0.9)[-60:], kind=labels)
    flags = ["--reference", str(folder / "ref"), "--index", str(folder / "many"), "--obsm", "X_pca", "--device", "cpu"]
    annotate.main([str(path), *flags, "--output", str(tmp_path / "out.h5ad")])
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    adata = anndata.read_h5ad(path)
    fractal.load(folder / "ref", "cpu").annotate(adata, use_rep="X_pca", index=open_index(folder / "many"))
    for name in ("label", "subtype", "status"):
        assert written.obs[f"fractal_{name}"].astype(str).tolist() == adata.obs[f"fractal_{name}"].astype(str).tolist()
    assert np.mean(written.obs["fractal_subtype"].astype(str) == labels) > 0.8
    assert "3,000 of 3,000 cells" in written.uns["fractal"]["annotation"]["index"]
    # CL:0000542, lymphocyte: the others of the index do not vote
    annotate.main([str(path), *flags, "--only", "CL:0000542", "--output", str(tmp_path / "only.h5ad")])
    labels_found = anndata.read_h5ad(tmp_path / "only.h5ad").obs["fractal_subtype"].dropna()  # none of the excluded
    assert set(labels_found) == {"B cell", "natural killer cell", "regulatory T cell"}


def test_an_index_of_an_h5ad_votes_by_its_column_of_labels(folder: Path, tmp_path: Path):
    """Types of TYPES[:2] have names there that nobody knows: these cells have no vote. Others are in the plural."""
    labels = TYPES * 50
    named = [f"my {name}" if name in TYPES[:2] else f"{name}s" for name in labels]
    path = write_h5ad(tmp_path / "cells.h5ad", clustered(labels), mine=named)
    index_command.main(
        [str(path), "--use-rep", "X_pca", "--reference", str(folder / "ref"), "--output", str(tmp_path / "i")]
    )
    ref = fractal.load(folder / "ref", "cpu")
    with pytest.raises(InputError, match="--index-labels"):
        ref.run(index=tmp_path / "i")
    told = ref.run(index=tmp_path / "i", index_labels="mine").annotator
    assert told.voters is not None
    finest = [path[-1] for path in told.tree.paths]
    expected = [-1 if name in TYPES[:2] else finest.index(name) for name in labels]
    assert told.voters.path.tolist() == expected
    found = {told.tree.paths[p][-1] for p in told.voting(clustered(labels)).path}
    assert found == set(TYPES[2:])


def test_what_does_not_fit_is_refused_in_a_line(folder: Path, tmp_path: Path, fails):
    new = write_h5ad(tmp_path / "new.h5ad", clustered(TYPES), kind=TYPES)
    flags = [annotate.main, new, "--obsm", "X_pca", "--reference", folder / "ref", "--output", tmp_path / "o.tsv"]
    index_command.main([str(folder / "many.parquet"), "--output", str(tmp_path / "raw")])
    assert "made by no adapter" in fails(*flags, "--index", tmp_path / "raw")
    other = str(tmp_path / "other.pt")
    quick = ["--epochs", "1", "--seed", "5", "--scale-dim", "4", "--device", "cpu"]
    train.main(["--input", str(folder / "cells.parquet"), "--output", other, *quick])
    index_command.main([str(folder / "many.parquet"), "--reference", other, "--output", str(tmp_path / "other")])
    assert "not that of the index" in fails(*flags, "--index", tmp_path / "other")
    assert "not an index" in fails(*flags, "--index", tmp_path)
    assert "no column 'tissue'" in fails(*flags, "--index", folder / "many", "--index-labels", "tissue")
    assert "another hierarchy" in fails(*flags, "--index", folder / "many", "--index-labels", "level1_system")
    assert "--index-labels" in fails(*flags, "--index-labels", "kind")
    assert not (tmp_path / "o.tsv").exists()
