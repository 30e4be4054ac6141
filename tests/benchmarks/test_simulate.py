import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hnswlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import simulate
from benchmarks.simulate import BLOCK, LEAST, STUDIES, SYSTEM_SHARES, SimulatedAtlas, apportion, write_release
from fractal.base.errors import InputError
from fractal.data.scimilarity import HEADER, open_release
from fractal.hierarchy.ontology import SHIPPED, build_hierarchy, load_graph

pytestmark = pytest.mark.slow

FILES = ("label_ints.csv", "annotation/reference_labels.tsv", "annotation/labelled_kNN.bin")
CELLS = BLOCK + 1_000  # more than one block, and the last one is not full


@pytest.fixture(scope="module", autouse=True)
def _one_ontology() -> Iterator[None]:
    """Every atlas reads the shipped CL, which takes most of its time: read it once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "load_graph", functools.cache(load_graph))
        yield


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("simulated") / "model_v1.1"
    write_release(directory, CELLS, seed=0)
    return directory


@pytest.fixture(scope="module")
def atlas() -> SimulatedAtlas:
    return SimulatedAtlas(CELLS, seed=0)


def read_bytes(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in FILES]


def test_hnswlib_reads_the_vectors_of_the_blocks(release: Path, atlas: SimulatedAtlas) -> None:
    index = hnswlib.Index(space="cosine", dim=128)
    index.load_index(str(release / FILES[2]))
    vectors = np.concatenate([atlas.block(i)[0] for i in range(atlas.blocks)])
    assert index.get_current_count() == CELLS
    np.testing.assert_array_equal(np.array(index.get_items(np.arange(CELLS))), vectors)


def test_the_index_is_as_long_as_hnswlibs_own_but_for_the_upper_layers(tmp_path: Path) -> None:
    cells = 1_500
    write_release(tmp_path / "m", cells, seed=0)
    index = hnswlib.Index(space="cosine", dim=128)
    index.init_index(max_elements=cells, M=16, ef_construction=20)
    index.add_items(np.random.default_rng(0).normal(size=(cells, 128)).astype(np.float32))
    index.save_index(str(tmp_path / "own.bin"))
    own, ours = (tmp_path / "own.bin").read_bytes(), (tmp_path / "m" / FILES[2]).read_bytes()
    sizes = [np.frombuffer(file, HEADER, 1)[list(HEADER.names or ())[1:6]] for file in (own, ours)]
    assert sizes[0] == sizes[1]
    # after the records, each element's upper links: their length in bytes as a u32, then the links
    at, links = HEADER.itemsize + cells * int(sizes[0]["record_size"][0]), 0
    for _ in range(cells):
        length = int.from_bytes(own[at : at + 4], "little")
        at, links = at + 4 + length, links + length
    assert at == len(own)
    assert links > 0
    assert len(ours) == len(own) - links


def test_vectors_are_finite_and_of_unit_norm(atlas: SimulatedAtlas) -> None:
    vectors = atlas.block(0)[0]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_label_file_has_one_line_per_cell_and_only_known_types(release: Path, atlas: SimulatedAtlas) -> None:
    lines = (release / FILES[1]).read_text(encoding="utf-8").splitlines()
    assert len(lines) == CELLS
    labels, studies = np.concatenate([np.stack(atlas.block(i)[1:3], axis=1) for i in range(atlas.blocks)]).T
    pairs = zip(labels, studies, strict=True)
    assert lines == [f"{atlas.types[label]}\t{atlas.studies[study]}" for label, study in pairs]


def test_our_reader_reads_it_and_the_records_are_not_in_label_order(release: Path, atlas: SimulatedAtlas) -> None:
    opened = open_release(release)
    assert opened.labels.names == (SHIPPED / "scimilarity-types.txt").read_text(encoding="utf-8").splitlines()
    assert not np.array_equal(opened.records["label"], np.arange(CELLS))
    np.testing.assert_array_equal(opened.labels.codes, atlas.labels)
    np.testing.assert_array_equal(np.bincount(opened.labels.codes), atlas.sizes)


def test_names_with_commas_are_quoted(release: Path) -> None:
    lines = (release / FILES[0]).read_text(encoding="utf-8").splitlines()
    assert lines[:3] == [",0", "0,B cell", '1,"CD14-low, CD16-positive monocyte"']


def test_same_seed_same_bytes_other_seed_other_bytes(release: Path, tmp_path: Path) -> None:
    write_release(tmp_path / "again", CELLS, seed=0)
    write_release(tmp_path / "other", CELLS, seed=1)
    assert read_bytes(tmp_path / "again") == read_bytes(release)
    pairs = zip(read_bytes(tmp_path / "other")[1:], read_bytes(release)[1:], strict=True)
    assert all(ours != theirs for ours, theirs in pairs)


def test_blocks_do_not_depend_on_the_order_in_which_they_are_made(atlas: SimulatedAtlas) -> None:
    backwards = [SimulatedAtlas(CELLS, seed=0).block(i) for i in (1, 0)][::-1]
    for i, block in enumerate(backwards):
        for made, expected in zip(block, atlas.block(i), strict=True):
            np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("cells", [1_015, 1_016, 1_100, 1_500, 2_000])
def test_small_releases_hold_five_of_every_type(cells: int) -> None:
    small = SimulatedAtlas(cells, seed=3)
    assert small.sizes.min() >= LEAST
    assert small.sizes.sum() == len(small.labels) == cells
    np.testing.assert_array_equal(np.bincount(small.labels), small.sizes)


def test_proportions_do_not_depend_on_the_size() -> None:
    few, many = SimulatedAtlas(50_000, seed=0), SimulatedAtlas(500_000, seed=0)
    systems = np.array([row.levels[0] for row in build_hierarchy(few.types, load_graph(SHIPPED / "cl-slim.obo"))])
    for name, share in SYSTEM_SHARES.items():
        assert few.sizes[systems == name].sum() / 50_000 == pytest.approx(share, abs=0.001)
    large = few.sizes > 200
    np.testing.assert_allclose(few.sizes[large] * 10, many.sizes[large], rtol=0.05)
    np.testing.assert_array_equal(few.centre, many.centre)


def test_labels_are_noisy_and_mix_granularity() -> None:
    atlas = SimulatedAtlas(2 * BLOCK, seed=0)
    label, true = np.concatenate([np.stack([b[1], b[3]]) for b in map(atlas.block, range(2))], axis=1)
    wrong = label != true
    assert 0.05 < wrong.mean() < 0.25
    assert atlas.below[label[wrong], true[wrong]].mean() > 0.02  # the label is broader than the cell


def test_studies_shift_their_cells() -> None:
    atlas = SimulatedAtlas(4 * BLOCK, seed=0)
    blocks = [atlas.block(i) for i in range(4)]
    vectors = np.concatenate([block[0] for block in blocks])
    study, true = np.concatenate([np.stack([block[2], block[3]]) for block in blocks], axis=1)
    rows = np.flatnonzero(true == np.bincount(true).argmax())
    largest = np.argsort(-np.bincount(study[rows]))[:2]
    means = [vectors[rows[study[rows] == s]].mean(axis=0) for s in largest]
    halves = [vectors[rows[study[rows] == largest[0]]][i::2].mean(axis=0) for i in range(2)]
    assert np.linalg.norm(means[0] - means[1]) > 2 * np.linalg.norm(halves[0] - halves[1])


@given(
    weights=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=40),
    extra=st.integers(0, 10_000),
    least=st.integers(0, 9),
)
@settings(max_examples=200)
def test_apportion(weights: list[float], extra: int, least: int) -> None:
    total = least * len(weights) + extra
    sizes = apportion(np.array(weights), total, np.full(len(weights), least))
    assert sizes.sum() == total
    assert sizes.min() >= least
    order = np.argsort(weights, kind="stable")
    assert np.all(np.diff(sizes[order]) >= -1)  # a heavier one never gets less, but for rounding


@pytest.mark.parametrize(("cells", "seed"), [(1_014, 0), (0, 0), (-5, 0), (5_000, -1)])
def test_bad_input_is_an_input_error(cells: int, seed: int, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--cells|--seed"):
        write_release(tmp_path / "release", cells, seed)
    assert not list(tmp_path.iterdir())


def test_command_line_exits_with_2_and_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.simulate", "--cells", "1000", "--output", str(tmp_path / "release")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SHIPPED.parent)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "1015" in done.stderr


def test_output_that_cannot_be_written_is_one_line(tmp_path: Path, fails: Callable[..., str]) -> None:
    (tmp_path / "taken").write_text("a file")
    assert "taken" in fails(simulate.main, "--output", tmp_path / "taken", "--cells", 2_000)


@pytest.mark.parametrize("older", [False, True])
def test_an_interrupted_write_leaves_what_was_there(
    older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "model_v1.1"
    if older:
        write_release(directory, 2_000, seed=5)
    before = read_bytes(directory) if older else []

    original = SimulatedAtlas.block

    def interrupted(self: SimulatedAtlas, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        if index == 1:
            raise KeyboardInterrupt
        return original(self, index)

    monkeypatch.setattr(simulate.SimulatedAtlas, "block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_release(directory, CELLS, seed=0)
    left = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(directory / name for name in FILES if older)
    assert (read_bytes(directory) if older else []) == before


def test_main_replaces_an_older_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "deep" / "model_v1.1"
    write_release(directory, 1_500, seed=1)
    simulate.main(["--cells", "2000", "--seed", "2", "--output", str(directory)])
    assert "2,000 simulated cells" in capsys.readouterr().out
    assert len(open_release(directory)) == 2_000
    write_release(tmp_path / "fresh", 2_000, seed=2)
    assert read_bytes(directory) == read_bytes(tmp_path / "fresh")
    assert sorted(os.listdir(directory)) == ["annotation", "label_ints.csv"]


def test_studies_are_careless_each_in_its_own_way():
    carelessness = SimulatedAtlas(2_000, 0).carelessness
    assert len(set(carelessness.tolist())) == STUDIES
    assert carelessness.mean() == pytest.approx(1)
