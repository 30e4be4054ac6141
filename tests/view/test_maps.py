"""Maps that belong together: layouts, new cells, the file, the reference's cache, the command."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save
from sklearn.metrics import silhouette_score

import fractal
from fractal.annotate.folder import MAPS
from fractal.base.errors import InputError
from fractal.commands.map import main
from fractal.model.embedding import cut_matrix
from fractal.view import maps as module
from fractal.view.maps import Maps, amid, fit_maps, kept_maps, turned
from tests.conftest import clustered

KINDS = ["B cell", "fibroblast", "regulatory T cell"] * 120


def nested(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors (n, 16) of two blocks, the system (n,) that block 1 tells and the type (n,) that both tell.

    System 0 has three types, system 1 two, system 2 one, so its island does not split.
    """
    centres, rng = np.random.default_rng(7).normal(size=(2, 6, 8)), np.random.default_rng(seed)
    kind = rng.integers(0, 6, n)
    system = np.array([0, 0, 0, 1, 1, 2])[kind]
    blocks = [centres[0][system], centres[1][kind]]
    vectors = np.concatenate(blocks, axis=1) + 0.15 * rng.normal(size=(n, 16))
    return vectors.astype(np.float32), system, kind


@pytest.fixture(scope="module")
def fitted() -> Maps:
    return fit_maps(nested(240)[0], [8, 16])


def test_islands_split_where_they_are(fitted: Maps):
    _, system, kind = nested(240)
    coarse, fine = fitted.layouts
    assert fitted.layouts.shape == (2, 240, 2)
    assert fitted.layouts.dtype == np.float32
    assert abs(fitted.layouts).max() == 1
    assert silhouette_score(coarse, system) > 0.5
    assert silhouette_score(fine, kind) > 0.5
    assert silhouette_score(coarse[system == 0], kind[system == 0]) < 0.2  # prefix 1 does not tell its types
    whole = system == 2
    assert np.median(np.linalg.norm(fine[whole] - coarse[whole], axis=1)) < 0.05 * np.ptp(coarse, axis=0).max()
    for of in range(3):  # what an island falls into lies around its place
        middle = coarse[system == of].mean(0)
        own, others = (np.linalg.norm(fine[mask].mean(0) - middle) for mask in (system == of, system != of))
        assert own < others


@pytest.fixture(scope="module")
def few_steps() -> Iterator[None]:
    """For what does not depend on how good the layouts are."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EARLY", "LATE", "REFINE"):
            patch.setattr(module, name, 20)
        yield


def test_the_same_seed_gives_the_same_maps(few_steps):
    vectors = nested(60)[0]
    one, other, third = (fit_maps(vectors, [8, 16], seed=seed).layouts for seed in (0, 0, 1))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, third)


def test_new_cells_are_placed_amid_their_neighbours(fitted: Maps):
    new = nested(50, seed=3)[0]
    new[7], new[9, 0] = 0, np.nan
    places = fitted.transform(new)
    assert places.shape == (2, 50, 2)
    assert np.isnan(places[:, [7, 9]]).all()
    for j, end in enumerate(fitted.prefix_ends):
        for i in set(range(50)) - {7, 9}:
            bank, query = fitted.vectors[:, :end], new[i, :end]
            cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
            rows = np.argsort(-cosine)[:10]
            points = fitted.layouts[j][rows]
            distance = np.linalg.norm(points - np.median(points, axis=0), axis=1)
            assert np.allclose(places[j, i], points[distance.argsort()[:5]].mean(axis=0), atol=1e-6)


def test_new_cells_do_not_stand_in_lines():
    """Around one spot, the medians of 10 of 60 cells share rows and columns; positions must not."""
    rng = np.random.default_rng(0)
    cells = rng.normal(size=(60, 2)).astype(np.float32)
    chosen = np.array([rng.choice(60, 10, replace=False) for _ in range(200)])
    points = amid(cells[chosen])
    assert all(len(np.unique(points[:, axis].round(5))) > 190 for axis in (0, 1))


def test_fitted_cells_keep_their_places(fitted: Maps):
    assert np.allclose(fitted.transform(3 * fitted.vectors), fitted.layouts, atol=1e-6)  # length does not matter


@pytest.mark.parametrize(
    ("vectors", "ends", "line"),
    [
        (np.ones((5, 4), np.float32), [2, 4], "5 cells are too few for a map; it takes 20"),
        (np.ones((30, 4), np.float32), [2, 5], "prefixes that end at 2, 5: do not fit vectors of 4"),
        (np.zeros((30, 4), np.float32), [2, 4], "the vector of cell 0 is zero or not finite"),
    ],
)
def test_what_can_not_be_laid_out(vectors: np.ndarray, ends: list[int], line: str):
    with pytest.raises(InputError, match=line):
        fit_maps(vectors, ends)


def test_vectors_of_another_width_are_not_placed(fitted: Maps):
    with pytest.raises(InputError, match=r"the maps take \(n, 16\)"):
        fitted.transform(np.ones((3, 15), np.float32))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openTSNE", None)
    with pytest.raises(InputError, match=r"openTSNE is missing; install fractal-cells with its extra `maps`"):
        fit_maps(nested(60)[0], [8, 16])


def test_equal_cells_are_laid_out_all_the_same(few_steps):
    vectors = np.repeat(nested(30)[0], 2, axis=0)
    vectors[:20] = vectors[0]
    assert np.isfinite(fit_maps(vectors, [8, 16]).layouts).all()


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(fitted: Maps, tmp_path: Path):
    fitted.save(tmp_path / "maps.safetensors")
    again = Maps.load(tmp_path / "maps.safetensors")
    assert np.array_equal(again.layouts, fitted.layouts)
    assert np.array_equal(again.vectors, fitted.vectors)
    assert (again.prefix_ends, dict(again.facts)) == ((8, 16), dict(fitted.facts))
    assert {"seed", "method", "openTSNE", "fractal_version"} <= set(again.facts)


def test_damaged_maps_are_refused(fitted: Maps, tmp_path: Path):
    path = tmp_path / "maps.safetensors"
    fitted.save(path)
    whole = path.read_bytes()
    newer = whole.replace(b'version\\": 1', b'version\\": 9')
    nested = save({"vectors": np.zeros(3)}, {"fractal_maps": "[" * 100_000 + "]" * 100_000})
    many = json.dumps({f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}).encode()
    tensors = len(many).to_bytes(8, "little") + many
    for damaged in (b"", whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1]), newer, nested, tensors):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"maps\.safetensors: .* delete it"):
            Maps.load(path)


# --- of a reference --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    data = anndata.AnnData(np.zeros((len(KINDS), 1), np.float32), obsm={"X_pca": clustered(KINDS, spread=0.4)})
    data.obs_names = [f"cell {i}" for i in range(len(KINDS))]
    data.obs["kind"] = KINDS
    return data


@pytest.fixture(scope="module")
def folder(few_steps, cells: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("maps") / "reference"
    fractal.fit(cells, labels="kind", use_rep="X_pca", epochs=1).save(path)
    assert fractal.load(path).maps.prefix_ends
    return path


def not_again(*_: object, **__: object) -> Maps:
    raise AssertionError("the maps are laid out a second time")


def test_maps_are_made_once(folder: Path, cells: anndata.AnnData, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "fit_maps", not_again)
    reference, new = fractal.load(folder), cells.copy()
    assert len(reference.maps.vectors) == len(reference.annotator.vectors)
    reference.map(new)
    keys = [key for key in new.obsm if key.startswith("X_fractal_umap")]
    assert keys == [f"X_fractal_umap_{j + 1}" for j in range(len(reference.maps.layouts))]
    own = reference.maps.transform(cut_matrix(reference.adapter, new.obsm["X_pca"]))
    assert np.array_equal(new.obsm["X_fractal_umap_1"], own[0])


def test_a_layout_is_turned_and_mirrored_towards_another(fitted: Maps):
    like = fitted.layouts[-1]
    angle, side = 2.0, np.array([[-1, 0], [0, 1]])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ side
    other = replace(fitted, layouts=(like @ turn)[None].astype(np.float32))
    assert np.allclose(turned(other, like).layouts[0], like, atol=1e-5)
    beyond = turned(replace(other, layouts=2 * other.layouts), like).layouts
    assert np.abs(beyond).max() == pytest.approx(1)


def test_maps_of_other_cells_are_replaced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = fractal.load(folder)
    keep = np.array([path[-1] != "fibroblast" for path in bundle.annotator.tree.paths])
    other = replace(bundle, annotator=bundle.annotator.restricted(keep))
    replace(other).save(tmp_path / "other")
    shutil.copy(folder / MAPS, tmp_path / "other" / MAPS)
    made: list[int] = []

    def counted(vectors: np.ndarray, ends: list[int], *, seed: int) -> Maps:
        made.append(len(vectors))
        return Maps(vectors, tuple(ends), np.zeros((len(ends), len(vectors), 2), np.float32), {"seed": seed})

    monkeypatch.setattr(module, "fit_maps", counted)
    for _ in range(2):
        assert len(fractal.load(tmp_path / "other").maps.vectors) == len(other.annotator.vectors)
    assert made == [len(other.annotator.vectors)]
    replace(bundle).save(tmp_path / "other")  # a reference that is made again has no maps of the one before
    assert not (tmp_path / "other" / MAPS).exists()


def test_kept_maps_are_those_of_the_vectors_the_prefixes_and_the_seed(fitted: Maps, tmp_path: Path, monkeypatch):
    path = tmp_path / "maps.safetensors"
    fitted.save(path)
    made: list[int] = []

    def counted(*_: object, seed: int) -> Maps:
        made.append(seed)
        return fitted

    monkeypatch.setattr(module, "fit_maps", counted)
    rounded = fitted.vectors + np.float32(1e-6)  # as another processor may round
    assert np.array_equal(kept_maps(path, rounded, [8, 16]).layouts, fitted.layouts)
    assert not made
    for vectors, ends, seed in (
        (fitted.vectors + np.float32(0.01), [8, 16], 0),
        (fitted.vectors[1:], [8, 16], 0),
        (fitted.vectors, [4, 16], 0),
        (fitted.vectors, [8, 16], 1),
    ):
        assert kept_maps(path, vectors, ends, seed=seed) is fitted
    assert made == [0, 0, 0, 1]


def test_a_folder_that_can_not_be_written_is_no_obstacle(
    fitted: Maps, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Maps, "save", refused)
    monkeypatch.setattr(module, "fit_maps", lambda *_, **__: fitted)
    assert kept_maps(folder / MAPS, fitted.vectors, fitted.prefix_ends) is fitted
    assert "can't be written" in capsys.readouterr().err


# --- the command -----------------------------------------------------------------------------------------------------


def test_files_get_their_maps(folder: Path, cells: anndata.AnnData, tmp_path: Path, capsys):
    new = cells.copy()
    new.obsm["X_pca"][3] = np.nan
    reference = fractal.load(folder)
    reference.embed(new)
    new.write_h5ad(tmp_path / "new.h5ad")
    reference.map(new)
    flags = ["--reference", str(folder), "--output"]
    main([str(tmp_path / "new.h5ad"), *flags, str(tmp_path / "out.h5ad")])
    assert "360 cells placed on the maps of" in (said := capsys.readouterr().out)
    assert "NaN for 1 cells" in said
    main([str(tmp_path / "new.h5ad"), *flags, str(tmp_path / "embedded.h5ad"), "--embedded"])
    for name in ("out", "embedded"):
        written = anndata.read_h5ad(tmp_path / f"{name}.h5ad")
        for j in range(1, len(reference.maps.layouts) + 1):
            found, expected = written.obsm[f"X_fractal_umap_{j}"], new.obsm[f"X_fractal_umap_{j}"]
            assert np.isnan(found[3]).all()
            assert np.allclose(found, expected, atol=1e-6, equal_nan=True)

    table = pa.table({"cell_id": ["a", "b"], "embedding": cells.obsm["X_pca"][:2].tolist(), "study": ["s", "t"]})
    pq.write_table(table, tmp_path / "cells.parquet")
    main([str(tmp_path / "cells.parquet"), *flags, str(tmp_path / "out.parquet"), "--force"])
    main([str(tmp_path / "out.parquet"), *flags, str(tmp_path / "again.parquet"), "--force"])
    for name in ("out", "again"):
        written = pq.read_table(tmp_path / f"{name}.parquet")
        assert written.schema.field("fractal_umap_2").type == pa.list_(pa.float32(), 2)
        assert written["study"].to_pylist() == ["s", "t"]
        assert np.allclose(written["fractal_umap_2"].to_pylist(), new.obsm["X_fractal_umap_2"][:2], atol=1e-6)
        assert len(set(written.column_names)) == len(written.column_names)


def test_bad_input_is_said_in_a_line(folder: Path, cells: anndata.AnnData, tmp_path: Path, fails: Callable[..., str]):
    cells.write_h5ad(tmp_path / "x.h5ad")
    np.save(tmp_path / "x.npy", cells.obsm["X_pca"])
    reference = ["--reference", folder, "--output"]
    for argv, line in (
        ([tmp_path / "x.npy", *reference, tmp_path / "y.h5ad"], "only written for an .h5ad input"),
        ([tmp_path / "x.h5ad", *reference, tmp_path / "y.tsv"], "name a .parquet or .h5ad file with --output"),
        ([tmp_path / "x.h5ad", *reference, folder / MAPS], "name a .parquet or .h5ad"),
        ([tmp_path / "x.h5ad", *reference, tmp_path / "y.h5ad", "--embedded"], "has no obsm 'X_fractal'"),
        ([tmp_path / "no.h5ad", *reference, tmp_path / "y.h5ad"], "no such file"),
    ):
        assert line in fails(main, *argv)
    assert not list(tmp_path.glob("y*"))


def test_help_names_the_columns(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "X_fractal_umap_1" in capsys.readouterr().out
