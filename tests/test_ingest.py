"""ingest.py on the files that people bring: their spellings, their labels' gaps, their own trees, their flags."""

import csv
import re
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import ingest
from fractal.base.errors import InputError
from fractal.data.atlas import Atlas
from fractal.data.cells import Cells
from fractal.data.ingestion import place_cells
from fractal.data.labels import read_map
from fractal.hierarchy.ontology import CL_SLIM, load_graph, read_hierarchy
from tests.conftest import TYPES, clustered, write_h5ad, write_release


def run(path: Path, out: Path, *flags: object) -> pd.DataFrame:
    """Ingest an .h5ad of `write_h5ad` -> its Parquet file as a table."""
    base = ["--h5ad", path, "--obsm", "X_pca", "--output", out]
    ingest.main([str(word) for word in (*base, *flags)])
    return pq.read_table(out).to_pandas()


def made(tmp_path: Path, **obs: list) -> Path:
    count = len(next(iter(obs.values())))
    return write_h5ad(tmp_path / "cells.h5ad", clustered([str(i) for i in range(count)]), **obs)


# --- names and spellings ---------------------------------------------------------------------------------------------


def test_spellings_of_one_term_become_one_type_and_a_single_own_name_stays(tmp_path: Path, capsys):
    kinds = ["B cell", "B-cell", "B lymphocyte", "b  cells", "NK cells", "Lymphocyte", "lymphocyte", "T cells"]
    found = run(made(tmp_path, cell_type=kinds), tmp_path / "o.parquet")
    assert found["level4_subtype"].tolist() == ["B cell"] * 4 + ["NK cells", "lymphocyte", "lymphocyte", "T cells"]
    # The parent of a B cell that is a class of its own, too: both are called the same at level 3.
    assert found["level3_type"].tolist()[5:7] == ["lymphocyte"] * 2
    said = capsys.readouterr().out
    assert "names of one CL term made one type: B cell = B cell, B lymphocyte, B-cell, b cells; lymphocyte =" in said
    assert "taken as another spelling: NK cells -> natural killer cell; T cells -> T cell" in said
    with open(tmp_path / "o.hierarchy.tsv", encoding="utf-8") as file:
        table = {row["subtype"]: row["cl_id"] for row in csv.DictReader(file, delimiter="\t")}
    assert table["NK cells"] == "CL:0000623"
    assert len(table) == 4  # one row per class


def test_a_type_that_is_also_a_parent_has_one_name_at_level_3(tmp_path: Path):
    found = run(made(tmp_path, cell_type=["Lymphocytes", "T cell", "innate lymphoid cell"]), tmp_path / "o.parquet")
    assert found["level3_type"].tolist()[:2] == ["lymphocyte", "lymphocyte"]


@pytest.mark.parametrize("text", ["CL:0000236", "CL_0000236", "http://purl.obolibrary.org/obo/CL_0000236"])
def test_cl_ids_are_labels(tmp_path: Path, text: str):
    found = run(made(tmp_path, kind=[text, "neuron", text]), tmp_path / "o.parquet", "--label-key", "kind")
    assert found["level4_subtype"].tolist() == ["B cell", "neuron", "B cell"]


def test_missing_labels_are_left_out_and_counted(tmp_path: Path, capsys):
    kinds = ["B cell", "unknown", "nan", None, "NA", "", " Unknown ", "neuron"]
    donors = ["a", "a", "a", "a", "a", "a", "a", "unknown"]
    path = made(tmp_path, cell_type=kinds, donor=donors)
    found = run(path, tmp_path / "o.parquet", "--unmapped", "other", "--study-key", "donor")
    assert found["level4_subtype"].tolist() == ["B cell"]
    assert found["study"].tolist() == ["a"]
    said = capsys.readouterr().out
    assert "7 of 8 cells left out: 6 without a label in obs 'cell_type'; 1 without a study in obs 'donor'" in said


def test_a_release_with_missing_labels(tmp_path: Path, capsys):
    names = ["B cell", "unknown", "CL:0000540", "B cell"]
    write_release(tmp_path / "m", clustered(names), names, types=["B cell", "unknown", "CL:0000540"])
    ingest.main(["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "o.parquet")])
    assert pq.read_table(tmp_path / "o.parquet")["level4_subtype"].to_pylist() == ["B cell", "neuron", "B cell"]
    assert "1 of 4 cells left out: they have no label" in capsys.readouterr().out


def test_blanks_are_stripped_and_what_is_left_is_quoted(tmp_path: Path, fails):
    found = run(made(tmp_path, cell_type=["B\u00a0cell ", " B  cell", "B cell"]), tmp_path / "o.parquet")
    assert found["level4_subtype"].tolist() == ["B cell"] * 3
    path = made(tmp_path, cell_type=["blob\x07"] * 3)
    assert "'blob" in fails(ingest.main, "--h5ad", path, "--obsm", "X_pca", "--output", tmp_path / "p")


def test_obsolete_terms_follow_the_ontology(tmp_path: Path, capsys, fails):
    found = run(made(tmp_path, cell_type=["CL:0000053", "bone matrix secreting cell"]), tmp_path / "o.parquet")
    assert found["level4_subtype"].tolist() == ["ameloblast", "osteoblast"]
    assert "obsolete in CL, replaced as it says: CL:0000053 -> ameloblast" in capsys.readouterr().out
    path = made(tmp_path, cell_type=["CL:0000013"] * 2)  # CL only says what to consider: that is not decided here
    line = fails(ingest.main, "--h5ad", path, "--obsm", "X_pca", "--output", tmp_path / "p")
    assert "CL:0000013 (obsolete; odontocyte?)" in line


# --- label maps ------------------------------------------------------------------------------------------------------


def test_label_maps(tmp_path: Path, capsys):
    path = made(tmp_path, cell_type=["mine", "yours", "theirs", "nobody's"])
    (tmp_path / "m.tsv").write_bytes(
        "\ufeffmine\tB cell\n\nyours \tCL:0000540\nnobody's\t\nextra\tT cell\n"
        "theirs\tB cell\tCL:0000236\thow\n".encode()
    )
    found = run(path, tmp_path / "o.parquet", "--label-map", tmp_path / "m.tsv")
    assert found["level4_subtype"].tolist() == ["B cell", "neuron", "B cell"]
    said = capsys.readouterr().out
    assert "names that no cell has: extra" in said
    assert "1 of 4 cells left out: their label is mapped to nothing" in said
    (tmp_path / "m.tsv").write_text("mine\tB cell\nmine\tT cell\n")
    with pytest.raises(InputError, match="'mine' has two targets, 'B cell' and 'T cell' in line 2"):
        read_map(tmp_path / "m.tsv")


def test_a_label_map_works_for_a_release(tmp_path: Path):
    names = ["mine", "B cell", "drop"]
    write_release(tmp_path / "m", clustered(names), names, types=names)
    (tmp_path / "m.tsv").write_text("mine\tneuron\ndrop\t\n")
    argv = ["--model-dir", str(tmp_path / "m"), "--output", str(tmp_path / "o.parquet")]
    ingest.main([*argv, "--label-map", str(tmp_path / "m.tsv")])
    assert pq.read_table(tmp_path / "o.parquet")["level4_subtype"].to_pylist() == ["neuron", "B cell"]


CELLTYPIST = {  # name as such models write it -> what its guess, or its term, must be one of
    "B cells": ["B cell"],
    "Age-associated B cells": ["age-associated B cell"],
    "CD16+ NK cells": ["CD16-positive, CD56-dim natural killer cell, human"],
    "Classical monocytes": ["classical monocyte"],
    "Double-positive thymocytes": ["double-positive, alpha-beta thymocyte"],
    "Early erythroid": ["erythroid progenitor cell", "erythroid lineage cell"],
    "Follicular helper T cells": ["T follicular helper cell"],
    "HSC/MPP": ["hematopoietic stem cell", "hematopoietic multipotent progenitor cell"],
    "ILC3": ["group 3 innate lymphoid cell"],
    "Intermediate macrophages": ["macrophage"],
    "Kupffer cells": ["Kupffer cell"],
    "MAIT cells": ["mucosal invariant T cell"],
    "Megakaryocytes/platelets": ["platelet", "megakaryocyte"],
    "Proliferative germinal center B cells": ["germinal center B cell"],
    "Tem/Effector helper T cells": ["helper T cell"],
    "Trm cytotoxic T cells": ["cytotoxic T cell"],
    "natural kiler cell": ["natural killer cell"],
    "pDC": ["plasmacytoid dendritic cell"],
}


def test_a_written_label_map_guesses_and_can_be_read_again(tmp_path: Path, capsys):
    kinds = [*CELLTYPIST, "Doublets", "B cells"]
    path = made(tmp_path, cell_type=kinds)
    template = tmp_path / "map.tsv"
    base = ["--h5ad", str(path), "--obsm", "X_pca", "--output", str(tmp_path / "o.parquet")]
    ingest.main([*base, "--write-label-map", str(template)])
    assert not (tmp_path / "o.parquet").exists()
    with open(template, encoding="utf-8") as file:
        rows = {row[0]: row[1:] for row in csv.reader(file, delimiter="\t")}
    for name, right in CELLTYPIST.items():
        assert (rows[name][0] or rows[name][4].split(" or ")[0]) in right, name
    assert rows["B cells"] == ["B cell", "CL:0000236", "spelling", "2", ""]
    assert rows["HSC/MPP"][:3] == ["", "", "unmapped"]
    assert " or " in rows["HSC/MPP"][4]
    assert rows["Doublets"] == ["", "", "unmapped", "1", ""]
    assert "1 have none" in capsys.readouterr().out
    ingest.main([*base, "--label-map", str(template)])  # unedited: no guess is taken
    known = [name for name in kinds if rows[name][0]]
    assert pq.read_table(tmp_path / "o.parquet").num_rows == len(known) < len(kinds) - 1


# --- the user's own tree ---------------------------------------------------------------------------------------------


def brain(tmp_path: Path) -> Path:
    return made(
        tmp_path,
        subclass=["L5 IT", "Vip", "Vip", "L5 IT", "odd", "odd"],
        group=["Glut", "GABA", "GABA", "Glut", "GABA", "Glut"],
        cluster=["L5 IT_1", "Vip_1", None, "L5 IT_2", "odd_1", "odd_2"],
    )


def test_own_levels(tmp_path: Path, capsys):
    out = tmp_path / "o.parquet"
    found = run(brain(tmp_path), out, "--levels", "group", "subclass", "cluster")
    assert Atlas.open(out).levels == ("group", "subclass", "cluster")
    assert found["level1_group"].tolist() == ["Glut", "GABA", "GABA", "Glut", "GABA", "Glut"]
    # A label under two parents becomes two; a missing finer label is the one above it.
    assert found["level2_subclass"].tolist() == ["L5 IT", "Vip", "Vip", "L5 IT", "odd (GABA)", "odd (Glut)"]
    assert found["level3_cluster"].tolist() == ["L5 IT_1", "Vip_1", "Vip", "L5 IT_2", "odd_1", "odd_2"]
    assert "labels with several parents made one type under each: odd (GABA); odd (Glut)" in capsys.readouterr().out
    for fine, coarse in (("level3_cluster", "level2_subclass"), ("level2_subclass", "level1_group")):
        assert (found.groupby(fine, observed=True)[coarse].nunique() == 1).all()


def test_own_levels_that_are_none(tmp_path: Path, fails):
    base = ["--h5ad", brain(tmp_path), "--obsm", "X_pca", "--output", tmp_path / "o", "--levels"]
    assert "2 to 6 columns" in fails(ingest.main, *base, "group")
    assert "obs has no column 'kind'" in fails(ingest.main, *base, "group", "kind")


def test_an_edited_hierarchy(tmp_path: Path, fails):
    path = made(tmp_path, cell_type=["B cell", "neuron", "T cells"])
    run(path, tmp_path / "a.parquet")
    table = tmp_path / "a.hierarchy.tsv"
    levels, rows = read_hierarchy(table)
    assert levels == ("system", "lineage", "type", "subtype")
    assert {row.levels for row in rows.values()} == {
        tuple(row) for row in pq.read_table(tmp_path / "a.parquet").to_pandas().iloc[:, -4:].itertuples(index=False)
    }
    edited = tmp_path / "mine.tsv"
    edited.write_text("cl_id\tbig\tsmall\tpath\nCL:0000236\tblood\tB\t\n\tbrain\tneuron\t\nCL:0000084\tblood\tT\t\n")
    found = run(path, tmp_path / "b.parquet", "--hierarchy", edited)
    assert found["level1_big"].tolist() == ["blood", "brain", "blood"]
    assert found["level2_small"].tolist() == ["B", "neuron", "T"]  # by CL id where the name is not in the table
    base = ["--h5ad", path, "--obsm", "X_pca", "--output", tmp_path / "o", "--hierarchy", edited]
    edited.write_text("cl_id\tbig\tsmall\tpath\n\tbrain\tneuron\t\n")
    assert "has no row for these names: B cell; T cells" in fails(ingest.main, *base)
    for text, words in {
        "": "or empty",
        "name\tbig\n": "first line must be cl_id",
        "cl_id\tbig\tsmall\tpath\n\tbrain\t\t\n": "row 2 has a level without a label",
        "cl_id\tbig\tsmall\tpath\n\ta\tb\n": "row 2 has 3 columns",
        "cl_id\tbig\tsmall\tpath\n\ta\tb\t\n\tc\tb\t\n": "'b' stands in two rows",
    }.items():
        edited.write_text(text)
        assert words in fails(ingest.main, *base)


# --- files, flags and what is said -----------------------------------------------------------------------------------


def test_cell_names_and_the_hierarchys_name(tmp_path: Path):
    path = made(tmp_path, cell_type=["B cell", "unknown", "neuron"])
    found = run(path, tmp_path / "hierarchy.parquet")
    assert found["cell_id"].tolist() == ["cell 0", "cell 2"]
    run(path, tmp_path / "second.parquet")
    assert {file.name for file in tmp_path.glob("*.tsv")} == {"hierarchy.hierarchy.tsv", "second.hierarchy.tsv"}
    assert ingest.hierarchy_path(ingest.OUTPUT).name == "hierarchy.tsv"


@pytest.mark.parametrize(
    "flags",
    [
        ["--model-dir", "x", "--h5ad", "y"],
        ["--obsm", "X_pca"],
        ["--study-key", "donor"],
        ["--label-key", "kind", "--model-dir", "x"],
        ["--h5ad", "y", "--levels", "a", "b", "--label-key", "kind"],
        ["--h5ad", "y", "--levels", "a", "b", "--hierarchy", "t"],
        ["--h5ad", "y", "--write-label-map", "a", "--label-map", "b"],
        ["--h5ad", "y", "--hierarchy", "a", "--unmapped", "other"],
    ],
)
def test_a_flag_without_effect_is_refused(fails, flags: list[str]):
    assert "without effect beside" in fails(ingest.main, *flags)


def test_the_output_is_no_table_and_no_input(tmp_path: Path, fails):
    path = made(tmp_path, cell_type=["B cell", "neuron"])
    base = ["--h5ad", path, "--obsm", "X_pca"]
    assert "ends in .parquet" in fails(ingest.main, *base, "--output", tmp_path / "o.tsv")
    fails(ingest.main, *base, "--output", path)
    (tmp_path / "o.hierarchy.tsv").write_text("a\tneuron\n")
    fails(ingest.main, *base, "--output", tmp_path / "o.parquet", "--label-map", tmp_path / "o.hierarchy.tsv")
    assert (tmp_path / "o.hierarchy.tsv").read_text() == "a\tneuron\n"


def test_exact_copies_are_counted(tmp_path: Path, capsys):
    x = clustered(TYPES)
    path = write_h5ad(tmp_path / "x.h5ad", np.concatenate([x, x[:2], x[:1]]), cell_type=[*TYPES, *TYPES[:2], TYPES[0]])
    run(path, tmp_path / "o.parquet")
    assert "3 cells are exact copies of another one's vector" in capsys.readouterr().out


def test_columns_of_two_dimensions_or_none(tmp_path: Path, fails):
    path = made(tmp_path, cell_type=["B cell", "neuron"], donor=["a", "b"])
    with h5py.File(path, "r+") as file:
        for name, values in {"cell_type": np.zeros((2, 2)), "donor": 3.0}.items():
            del file["obs"][name]
            anndata.io.write_elem(file["obs"], name, values)
    base = ["--h5ad", path, "--obsm", "X_pca", "--output", tmp_path / "o"]
    assert "obs 'cell_type' has 2 dimensions" in fails(ingest.main, *base)
    assert "obs 'donor' has 0 dimensions" in fails(ingest.main, *base, "--label-key", "donor")


def as_anndata_0_7(path: Path) -> None:
    """Rewrite obs as AnnData 0.7 did: integer codes, whose names lie in obs/__categories."""
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        obs.attrs["encoding-version"] = "0.1.0"
        for name in list(obs.attrs["column-order"]):
            codes, names = obs[name]["codes"][:], obs[name]["categories"].asstr()[:]
            del obs[name]
            text = h5py.string_dtype()
            obs.require_group("__categories").create_dataset(name, data=names.astype(object), dtype=text)
            obs.create_dataset(name, data=codes).attrs["categories"] = obs["__categories"][name].ref
        for key in ("encoding-type", "encoding-version"):
            for dataset in obs["__categories"].values():
                dataset.attrs.pop(key, None)


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning")
def test_files_of_anndata_0_7(tmp_path: Path):
    kinds = pd.Categorical(["neuron", None, "B cell", "neuron"])
    path = write_h5ad(tmp_path / "x.h5ad", clustered(["a"] * 4), cell_type=kinds, donor=pd.Categorical(list("bbab")))
    as_anndata_0_7(path)
    expected = anndata.read_h5ad(path).obs  # the oracle
    found = run(path, tmp_path / "o.parquet", "--study-key", "donor", "--unmapped", "other")
    keep = expected["cell_type"].notna().to_numpy()
    assert found["level4_subtype"].tolist() == expected["cell_type"][keep].tolist() == ["neuron", "B cell", "neuron"]
    assert found["study"].tolist() == expected["donor"][keep].tolist()
    assert found["cell_id"].tolist() == expected.index[keep].tolist()


# --- AnnData in memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"study": "donor"}, {"levels": ["donor", "cell_type"]}, {"label_map": True}])
def test_memory_and_file_follow_the_same_rules(tmp_path: Path, flags: dict, capsys):
    path = made(tmp_path, cell_type=["B cells", "unknown", "neuron", "mine"], donor=["a", "b", None, "b"])
    (tmp_path / "m.tsv").write_text("mine\tT cell\n")
    words = {"study": ["--study-key", "donor"], "levels": ["--levels", "donor", "cell_type"]}
    argv = [word for flag in flags for word in words.get(flag, ["--label-map", tmp_path / "m.tsv"])]
    if flags == {"levels": ["donor", "cell_type"]}:
        table = run(path, tmp_path / "o.parquet", *argv)
    else:
        table = run(path, tmp_path / "o.parquet", *argv, "--unmapped", "other")
    said = capsys.readouterr().out
    label_map = read_map(tmp_path / "m.tsv") if "label_map" in flags else None
    with Cells.open(anndata.read_h5ad(path), "X_pca") as cells:
        labels = cells.labels("cell_type", flags.get("study"), label_map, flags.get("levels", ()))
        (_, vectors), names = next(cells.chunks()), cells.names
    plan = place_cells(labels, load_graph(CL_SLIM), "adata", unmapped="other")
    keep = plan.classes >= 0
    *levels, finest = plan.columns(slice(None))[: len(plan.hierarchy.levels)]
    assert [finest[1][code] for code in finest[0]] == table.iloc[:, -1 - ("study" in table)].tolist()
    assert names is not None
    assert names[keep].tolist() == table["cell_id"].tolist()
    assert (plan.studies is None) == ("study" not in table)
    if plan.studies is not None and plan.study_codes is not None:
        assert [plan.studies[code] for code in plan.study_codes[keep]] == table["study"].tolist()
    assert np.array_equal(vectors[keep], np.stack(table["embedding"]))
    assert all(note in said for note in labels.notes)
    assert re.search("cells left out", " ".join(labels.notes))


def test_a_zarr_of_anndata_is_read_like_its_h5ad(tmp_path: Path, h5ad: Path):
    anndata.read_h5ad(h5ad).write_zarr(tmp_path / "cells.zarr")
    tables = []
    for path in (h5ad, tmp_path / "cells.zarr"):
        flags = ["--obsm", "X_pca", "--label-key", "kind", "--study-key", "donor"]
        ingest.main(["--h5ad", str(path), *flags, "--output", str(tmp_path / "cells.parquet")])
        tables.append(pq.read_table(tmp_path / "cells.parquet"))
    assert len(tables[0]) == 59
    assert tables[0].equals(tables[1])
