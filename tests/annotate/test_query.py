"""New cells of an AnnData or a file: which vectors are taken, what is refused, and what is warned of."""

from pathlib import Path

import anndata
import numpy as np
import pytest

from fractal.annotate.query import Intake, lacking
from fractal.base.errors import InputError
from tests.annotate.conftest import cells


@pytest.fixture
def intake() -> Intake:
    return Intake("X_a", 8, cells(400, 0).vectors)


def adata(**obsm: np.ndarray) -> anndata.AnnData:
    return anndata.AnnData(np.zeros((len(next(iter(obsm.values()))), 1), np.float32), obsm=obsm)


def test_vectors_of_obsm_are_taken_in_memory_and_from_a_file(intake: Intake, tmp_path: Path, recwarn):
    x = cells(150, 1).vectors
    adata(X_a=x, X_b=x * 2).write_h5ad(tmp_path / "new.h5ad")
    for new in (adata(X_a=x, X_b=x * 2), tmp_path / "new.h5ad"):
        for key, expected in ((None, x), ("X_b", x * 2)):
            with intake.open(new, key, False) as (opened, origin):
                assert origin.vectors == f"obsm '{key or 'X_a'}'"
                assert origin.warning == ""
                assert np.array_equal(np.concatenate([chunk for _, chunk in opened.chunks()]), expected)
    assert not recwarn.list


def test_vectors_of_another_embedding_are_refused_unless_forced(intake: Intake):
    other = np.random.default_rng(2).normal(size=(300, 8)).astype(np.float32)
    with (
        pytest.raises(InputError, match="adata: obsm 'X_a': the vectors do not come from the reference's embedding"),
        intake.open(adata(X_a=other), None, False),
    ):
        pass
    forced = intake.open(adata(X_a=other), None, True)
    with pytest.warns(UserWarning, match="adata: the vectors do not come") as caught:
        opened, origin = forced.__enter__()
    assert opened.num_rows == 300
    assert origin.warning.startswith("the vectors do not come")
    assert Path(caught[0].filename).name == "test_query.py"  # the line that called the package


def test_rows_of_another_embedding_are_noticed_wherever_they_lie(intake: Intake, recwarn):
    """Behind the first 16,384 rows, which alone are looked at before; for embed, index, search, map and explore."""
    x = np.tile(cells(400, 1).vectors, (45, 1))
    with intake.cells(adata(X_a=x), None, False) as opened:
        assert sum(len(chunk) for _, chunk in opened.chunks()) == 18_000
    assert not recwarn.list
    x[17_000:] = np.random.default_rng(2).normal(size=(1_000, 8))
    with intake.cells(adata(X_a=x), None, False) as opened:
        chunks = opened.chunks()
        next(chunks)
        with pytest.warns(UserWarning, match="adata: rows 17,.* have nothing in common with the reference's cells"):
            list(chunks)


def test_what_an_obsm_lacks_is_said():
    assert lacking(None, "X_a", 8) == "obsm has no 'X_a', which the reference was made with"
    assert lacking(np.zeros((3, 5)), "X_a", 8) == "obsm 'X_a' has 5 numbers a cell, the reference takes 8"
    assert lacking(np.zeros((3, 8)), "X_a", 8) == ""
