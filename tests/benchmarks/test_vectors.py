"""The counts behind docs/vectors.md, and that what other environments run is Python."""

import zipfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from benchmarks import vectors

pytestmark = pytest.mark.slow


def cells(genes: list[str], donors: list[str]) -> anndata.AnnData:
    obs = pd.DataFrame(
        {"donor": donors, "cell_ontology_class": "T cell"}, index=[f"cell{i}" for i in range(len(donors))]
    )
    counts = np.arange(len(donors) * len(genes), dtype=np.float32).reshape(len(donors), -1)
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=genes))


def test_mouse_genes_are_renamed_to_their_human_orthologs(tmp_path: Path):
    """Ins1 has an ortholog that the human cells lack; Rps2 is none of the mouse cells' genes; Gcg and Sst stay."""
    cells(["SST", "GCG", "ACTB"], ["human1"]).write_h5ad(tmp_path / "raw-Baron_human.h5ad")
    cells(["Ins1", "Gcg", "Sst"], ["mouse1", "mouse2"]).write_h5ad(tmp_path / "raw-Baron_mouse.h5ad")
    pairs = "gene.name,human.gene.name\nIns1,INS\nGcg,GCG\nSst,SST\nRps2,ACTB\n"
    (tmp_path / "gene_matches_1v1_mouse2human.csv").write_text(pairs)
    with zipfile.ZipFile(tmp_path / "sample.zip", "w") as archive:
        for path in [*tmp_path.glob("*.h5ad"), *tmp_path.glob("*.csv")]:
            archive.write(path, path.name)
    human, mouse = vectors.read_counts(tmp_path / "sample.zip", tmp_path / "out")
    assert list(human.var_names) == ["SST", "GCG", "ACTB"]
    assert list(mouse.var_names) == ["GCG", "SST"]
    assert mouse.X.tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize("way", vectors.WAYS)
def test_the_other_environments_code_compiles(way: str):
    compile(vectors.GENES + vectors.WAYS[way][1].replace("EPOCHS", "2"), way, "exec")
