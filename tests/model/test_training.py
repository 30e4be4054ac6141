"""The training loop, each of its parts against an obvious version, and what a stopped run leaves behind."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn.functional import normalize

import train
from fractal.base.errors import run
from fractal.data.atlas import LabelledVectors
from fractal.data.parquet import atlas_table, write_tables
from fractal.hierarchy.levels import LEVELS
from fractal.model import training
from fractal.model.checkpoint import load
from fractal.model.objective import PrefixObjective
from fractal.model.recipes import FRACTAL, PUBLISHED, RECIPES, Counts, Settings
from fractal.model.training import EMA_DECAY, Validator
from fractal.model.training import fit as fit_with
from fractal.score.metrics import knn_accuracy

TREE = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 2], [1, 2, 3, 3], [1, 2, 3, 4]])
CLASSES = [["A", "B"], ["a", "b", "c"], ["k", "l", "m", "n"], ["p", "q", "r", "s", "t"]]


def cells(n: int, seed: int = 0, tree: np.ndarray = TREE, classes: list = CLASSES, levels=LEVELS, dim: int = 16):
    """n cells around one random centre per type, every type as often."""
    centres = np.random.default_rng(1).normal(size=(len(tree), dim))
    types = np.arange(n) % len(tree)
    vectors = centres[types] + 0.5 * np.random.default_rng(seed).normal(size=(n, dim))
    return LabelledVectors(vectors.astype(np.float32), tree[types], classes, levels)


def counts_of(numbers: list[int]) -> dict[tuple[str, ...], int]:
    paths = [tuple(CLASSES[k][c] for k, c in enumerate(row)) for row in TREE]
    return dict(zip(paths, numbers, strict=True))


def fit(train: LabelledVectors, validation: LabelledVectors, counts: Counts, settings: Settings) -> training.Fitted:
    return fit_with(train, validation, counts, settings, knn_accuracy)


NOBODY = cells(0)
SHORT = Settings(epochs=1, batch_size=32, scale_dim=4)
SMALL = ["--batch-size", "32", "--scale-dim", "4", "--device", "cpu"]


def test_the_saved_weights_are_the_moving_average(monkeypatch):
    """Of the weights after each step, by hand; the published recipe saves the last ones as they are."""
    steps: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        done = step(self, *args, **kwargs)
        steps.append([p.detach().clone() for p in self.param_groups[0]["params"]])
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    fitted = fit(cells(100), NOBODY, counts_of([20] * 5), Settings(epochs=1, batch_size=32, scale_dim=4))
    average = steps[0]
    for weights in steps[1:]:
        average = [EMA_DECAY * a + (1 - EMA_DECAY) * w for a, w in zip(average, weights, strict=True)]
    saved = list(fitted.adapter.parameters())
    assert len(steps) == 30
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(saved, average[: len(saved)], strict=True))
    assert not torch.allclose(saved[0], steps[-1][0], atol=1e-3)
    steps.clear()
    fitted = fit(cells(100), NOBODY, {}, Settings(PUBLISHED, epochs=2, batch_size=32, scale_dim=4))
    assert all(torch.equal(a, b) for a, b in zip(fitted.adapter.parameters(), steps[-1], strict=True))


@pytest.mark.parametrize(("recipe", "rises"), [("fractal", True), ("published", False)])
def test_the_learning_rate_rises_for_a_tenth_and_falls(monkeypatch, recipe: str, rises: bool):
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    fit(
        cells(320), NOBODY, counts_of([1] * 5), Settings(RECIPES[recipe], epochs=2, batch_size=32, scale_dim=4, lr=0.01)
    )
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.01)
    assert peak == (len(rates) // 10 - 1 if rises else 0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.001 * 0.2


def test_the_statistics_are_those_of_the_training_cells():
    x = cells(100)
    fitted = fit(x, NOBODY, counts_of([20] * 5), SHORT)
    unit = normalize(torch.from_numpy(x.vectors), dim=1).numpy()
    assert np.allclose(fitted.adapter.mean, unit.mean(0), atol=1e-6)  # type: ignore[arg-type]
    assert not np.allclose(fitted.adapter.axes, np.eye(16), atol=0.1)  # type: ignore[arg-type]
    assert np.allclose(fitted.adapter.log_prior, np.log(1 / 5))  # type: ignore[arg-type]


def test_the_loss_knows_how_frequent_the_paths_are_in_the_file(monkeypatch):
    seen = []

    def noting(adapter, rows):
        seen.append(rows.frequency.tolist())
        return PrefixObjective(adapter, rows)

    settings = replace(SHORT, recipe=replace(FRACTAL, objective=noting))
    fit(cells(100), NOBODY, counts_of([500, 3, 20, 7, 1]), settings)
    assert seen == [[500, 3, 20, 7, 1]]


@pytest.mark.parametrize(
    ("own_level", "block_levels"), [(True, [0, 1, 2, 3]), (False, [0, 1, 2, 3]), (True, [1, 3, 3, 3])]
)
def test_validation_equals_scikit_learn(monkeypatch, own_level: bool, block_levels: list[int]):
    """Full vector at the blocks' levels and, where prefixes have their own level, each prefix at it."""
    bank, queries = cells(200), cells(80, seed=2)
    of_bank, of_queries = (  # what an adapter might make of them: 4 blocks of 2, the types tell less in each
        2 * c.vectors[:, :8] + np.random.default_rng(3).normal(size=(len(c.vectors), 8)) * np.arange(8)
        for c in (bank, queries)
    )
    x, y, val_x, val_y = (torch.from_numpy(a) for c in (bank, queries) for a in (c.vectors, c.labels))
    validator = Validator((x, y, val_x, val_y), block_levels, own_level, knn_accuracy)

    def embedded(_, asked):
        known, made = (queries, of_queries) if len(asked) == 80 else (bank, of_bank)
        rows = (asked[:, None] == torch.from_numpy(known.vectors)).all(2).int().argmax(1)
        return [normalize(torch.from_numpy(made)[rows, : 2 * j].float(), dim=1) for j in (1, 2, 3, 4)]

    monkeypatch.setattr(training, "embed", embedded)
    accuracy, score = validator(None)  # type: ignore[arg-type]

    def expected(width: int, level: int) -> float:
        knn = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
        knn.fit(of_bank[:, :width], bank.labels[:, level])
        near = bank.labels[:, level][knn.kneighbors(of_queries[:, :width], return_distance=False)]
        votes = [max(row, key=lambda c: (list(row).count(c), -list(row).index(c))) for row in near]  # ties: nearest
        return float((np.array(votes) == queries.labels[:, level]).mean())

    full = [expected(8, level) for level in range(4)]
    assert accuracy == pytest.approx(full)
    scores = [full[k] for k in block_levels]
    if own_level:
        scores += [expected(2 * (j + 1), k) for j, k in enumerate(block_levels[:-1])]
    assert score == pytest.approx(sum(scores) / len(scores))


def test_the_recipes_that_train_prefixes_choose_by_them(monkeypatch):
    chosen: dict[str, bool] = {}

    def noting(*args):
        chosen[recipe] = args[2]
        return Validator(*args)

    monkeypatch.setattr(training, "Validator", noting)
    for recipe in RECIPES:
        fit(
            cells(100),
            cells(20, 1),
            counts_of([1] * 5),
            Settings(RECIPES[recipe], epochs=1, batch_size=32, scale_dim=4),
        )
    assert chosen == {"fractal": True, "published": False}


@pytest.mark.parametrize("recipe", ["fractal", "published"])
def test_an_atlas_of_one_system(capsys, recipe: str):
    blood = cells(90, tree=TREE[:3])
    fitted = fit(blood, NOBODY, counts_of([1] * 5), Settings(RECIPES[recipe], epochs=1, batch_size=32, scale_dim=4))
    assert "3 blocks of 4: lineage, type, subtype; none for system, where all" in capsys.readouterr().out
    config = fitted.config
    assert (config["num_levels"], config["block_levels"], config["levels"]) == (3, [1, 2, 3], list(LEVELS))


@pytest.mark.parametrize("levels", [2, 3, 5, 6])
@pytest.mark.parametrize("recipe", ["fractal", "published"])
def test_any_tree_of_2_to_6_levels(fails, tmp_path: Path, levels: int, recipe: str):
    """From a file to a checkpoint that loads."""
    names = tuple(["one", "two", "three", "four", "five", "six"][:levels])
    tree = np.array([[i // 2 ** (levels - 1 - k) for k in range(levels)] for i in range(2**levels)])
    labels = [f"{names[k]} {c}" for k in range(levels) for c in range(2 ** (k + 1))]
    classes = [[label for label in labels if label.startswith(f"{name} ")] for name in names]
    x = cells(40 * len(tree) // 4, tree=tree, classes=classes, levels=names)
    columns = [(x.labels[:, k], classes[k]) for k in range(levels)]
    write_tables(tmp_path / "a", [atlas_table(x.vectors, columns, names)], {})
    argv = [
        "--input",
        tmp_path / "a",
        "--output",
        tmp_path / "a.pt",
        "--recipe",
        recipe,
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    if recipe == "published" and levels > 4:
        assert "a: the published recipe has 2 to 4 levels, not" in fails(train.main, *argv)
        argv += ["--num-levels", "4"]
    train.main([str(a) for a in argv])
    adapter, checkpoint = load(tmp_path / "a.pt")
    assert checkpoint["config"]["levels"] == list(names)
    assert adapter.num_levels == (4 if recipe == "published" else levels) if levels > 4 else levels
    assert set(checkpoint["validation"]) == {*names, "score"}
    too_many = [*argv[:6], "--epochs", "1", "--num-levels", "6"]
    if levels < 6:
        assert f"has {levels} levels" in fails(train.main, *too_many)


def test_split_and_weights_have_their_own_seeds(stratified: Path, tmp_path: Path):
    argv = ["--input", str(stratified), "--epochs", "1", *SMALL]
    made = {}
    for name, more in (("a", []), ("weights", ["--seed", "1"]), ("split", ["--split-seed", "1"])):
        train.main([*argv, "--output", str(tmp_path / name), *more])
        made[name] = torch.load(tmp_path / name, weights_only=True)
    assert made["a"]["split"] == made["weights"]["split"] != made["split"]["split"]
    assert (made["weights"]["training"]["seed"], made["split"]["split"]["seed"]) == (1, 1)
    assert not torch.equal(made["a"]["state"]["anchors"], made["weights"]["state"]["anchors"])


def test_no_trace_is_left_in_torch():
    """Numbers below 1e-38 are numbers again, and the user's random numbers go on where they were."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit(cells(100), NOBODY, counts_of([1] * 5), SHORT)
    assert float(torch.tensor(1e-40) * 1) > 0
    assert torch.equal(torch.rand(4), expected)


def test_loading_leaves_random_numbers_alone(stratified: Path, tmp_path: Path):
    train.main(["--input", str(stratified), "--output", str(tmp_path / "a.pt"), "--epochs", "1", *SMALL])
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load(tmp_path / "a.pt")
    assert torch.equal(torch.rand(4), expected)


# A run that is stopped


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_never_takes_the_place_of_a_finished_one(
    stratified: Path, tmp_path: Path, monkeypatch, capsys, name: str, code: int
):
    output, partial = tmp_path / "a.pt", tmp_path / "a.partial.pt"
    flags = ["--input", str(stratified), "--output", str(output), *SMALL]
    train.main([*flags, "--epochs", "1"])
    finished = output.read_bytes()
    validate, validations = training.Validator.__call__, []

    def stopping(self, adapter):
        validations.append(adapter)
        if len(validations) == 3:  # it begins after two whole epochs
            signal.raise_signal(getattr(signal, name))
        return validate(self, adapter)

    monkeypatch.setattr(training.Validator, "__call__", stopping)
    with pytest.raises(SystemExit) as stop:
        run(lambda: train.main([*flags, "--epochs", "100000", "--patience", "100000"]))
    assert stop.value.code == code
    assert output.read_bytes() == finished
    adapter, checkpoint = load(partial)
    done = checkpoint["training"]
    assert done["partial"] is True
    assert 1 <= done["best_epoch"] <= done["epochs_done"] == 2
    line = f"interrupted: 2 of 100000 epochs done; epoch {done['best_epoch']}, the best of them, "
    assert line + f"written to {partial}" in capsys.readouterr().err
    train.main([*flags, "--epochs", "1"])  # a finished run removes its own partial one
    assert output.read_bytes() == finished
    assert not partial.exists()
    assert torch.load(output, weights_only=True)["training"]["partial"] is False


def test_ctrl_c_in_the_first_epoch_leaves_nothing(stratified: Path, tmp_path: Path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Validator, "__call__", interrupted)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        run(lambda: train.main(["--input", str(stratified), "--output", str(tmp_path / "a.pt"), "--scale-dim", "4"]))
    assert "interrupted: nothing half-written was left behind\n" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_the_partial_checkpoint_is_no_input(fails, stratified: Path, tmp_path: Path):
    data = tmp_path / "a.partial.pt"
    os.replace(stratified, data)
    assert "is the input of --input" in fails(train.main, "--input", data, "--output", tmp_path / "a.pt")
