"""A checkpoint gives back what was saved, and asks for no more memory than its weights."""

import os
import pickle
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from torch import nn

import eval as evaluate
from fractal.base.errors import InputError
from fractal.model.adapter import FractalAdapter, embed
from fractal.model.checkpoint import build_adapter, load, save
from tests.model.test_adapter import CLASSES, PATHS, config

FACTS: dict = {"split": {"seed": 3}, "training": {"epochs": 1}, "validation": None, "versions": {"torch": "2"}}


@pytest.mark.parametrize("recipe", ["fractal", "published"])
def test_a_checkpoint_gives_back_the_adapter(tmp_path: Path, recipe: str):
    adapter = build_adapter(config(recipe), CLASSES)
    save(tmp_path / "a.pt", adapter, config(recipe), CLASSES, **FACTS)
    loaded, checkpoint = load(tmp_path / "a.pt")
    x = torch.randn(7, 24)
    assert all(torch.equal(a, b) for a, b in zip(embed(adapter, x), embed(loaded, x), strict=True))
    assert (checkpoint["classes"], checkpoint["split"]) == (CLASSES, {"seed": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_checkpoint_that_is_compressed_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """15 MB of it may be 15 GB of zeros; torch itself compresses nothing."""
    save(tmp_path / "a.pt", build_adapter(config("fractal"), CLASSES), config("fractal"), CLASSES, **FACTS)
    with ZipFile(tmp_path / "a.pt") as whole, ZipFile(tmp_path / "b.pt", "w", ZIP_DEFLATED) as packed:
        for part in whole.namelist():
            packed.writestr(part, whole.read(part))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it is read"))
    with pytest.raises(InputError, match=r"b\.pt: not a checkpoint"):
        load(tmp_path / "b.pt")


def test_files_that_are_no_checkpoints(tmp_path: Path):
    path = tmp_path / "a.pt"
    with pytest.raises(InputError, match=r"a\.pt: no such checkpoint"):
        load(path)
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(path)
    torch.save({"state": {}}, path)
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(path)
    torch.save(nn.Linear(2, 2), path)  # a pickled object: weights_only refuses to run it
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(path)
    save(path, build_adapter(config("fractal"), CLASSES), config("fractal"), CLASSES, **FACTS)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(path)


@pytest.mark.parametrize("recipe", ["fractal", "published"])
@pytest.mark.parametrize("missing", ["split", "training", "validation", "versions", "classes", "config", "state"])
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path: Path, recipe: str, missing: str):
    save(tmp_path / "a.pt", build_adapter(config(recipe), CLASSES), config(recipe), CLASSES, **FACTS)
    checkpoint = torch.load(tmp_path / "a.pt", weights_only=True)
    for value in ("gone", 3):
        checkpoint[missing] = value
        torch.save(checkpoint, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
            load(tmp_path / "a.pt")
    del checkpoint[missing]
    torch.save(checkpoint, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(tmp_path / "a.pt")


MANY = 3_000  # paths and classes: their matrix would take 36 MB, from a file of 1.7 MB
GREEDY: dict[str, dict] = {
    "more paths than anchors": {"paths": PATHS.tolist() * 10_000},
    "a class that no anchor has": {"paths": [*PATHS.tolist()[:-1], [10**9, 2, 0, 3]]},
    "a wide input": {"dim": 10**9},
    "wide blocks": {"scale_dim": 10**9},
    "many blocks": {"num_levels": 10**9},
    "paths of other lengths": {"paths": [[0, 0, 0], *PATHS.tolist()[1:]]},
    "negative classes": {"paths": [[-1, 0, 0, 0], *PATHS.tolist()[1:]]},
    "a level that there is not": {"block_levels": [0, 1, 2, 4]},
    "too many levels": {"levels": ["a"] * 7},
    "a recipe that is no word": {"recipe": "\x1b[2J"},
}


@pytest.mark.parametrize("change", GREEDY.values(), ids=GREEDY.keys())
def test_a_config_that_asks_for_more_than_its_weights_is_refused(tmp_path: Path, change: dict, monkeypatch):
    bad = config("fractal") | change
    save(tmp_path / "a.pt", build_adapter(config("fractal"), CLASSES), bad, CLASSES, **FACTS)
    monkeypatch.setattr("fractal.model.checkpoint.build_adapter", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(InputError, match=r"a\.pt: not a checkpoint"):
        load(tmp_path / "a.pt")


def test_few_weights_do_not_become_a_large_matrix(tmp_path: Path, monkeypatch):
    """Every path its own class at every level: path_to_class grows with the square of what the file holds."""
    paths = [[i] * 4 for i in range(MANY)]
    state = {
        name: torch.zeros(size) for name, size in FractalAdapter.shapes(config("fractal") | {"paths": paths}).items()
    }
    big = {"config": config("fractal") | {"paths": paths}, "classes": CLASSES, "state": state, **FACTS}
    torch.save(big, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size < 4_000_000
    monkeypatch.setattr("fractal.model.checkpoint.build_adapter", lambda *_: pytest.fail("144 MB were taken"))
    with pytest.raises(InputError, match="not a checkpoint"):
        load(tmp_path / "a.pt")


def test_a_weight_that_is_a_view_of_one_number_is_refused(tmp_path: Path, monkeypatch):
    adapter = build_adapter(config("fractal"), CLASSES)
    state = adapter.state_dict() | {"path_anchors": torch.zeros(1).expand(4, 128)}
    torch.save({"config": config("fractal"), "classes": CLASSES, "state": state, **FACTS}, tmp_path / "a.pt")
    monkeypatch.setattr("fractal.model.checkpoint.build_adapter", lambda *_: pytest.fail("memory was taken"))
    with pytest.raises(InputError, match="not a checkpoint"):
        load(tmp_path / "a.pt")


class Code:
    """Its pickle runs a command where it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_carries_code_does_not_run_it(fails, stratified: Path, tmp_path: Path, zipped: bool):
    path = tmp_path / "a.pt"
    torch.save({"state": Code(tmp_path / "run")}, path, _use_new_zipfile_serialization=zipped)
    assert "not a checkpoint" in fails(evaluate.main, "--model-path", path, "--input", stratified)
    assert not (tmp_path / "run").exists()
    with open(tmp_path / "c", "wb") as file:  # the oracle: pickle itself would have run it
        pickle.dump(Code(tmp_path / "run"), file)
    pickle.loads((tmp_path / "c").read_bytes())
    assert (tmp_path / "run").exists()
