"""A simulated SCimilarity release of any size: the exact file layout, made-up cells.

    uv run python -m benchmarks.simulate --cells 60000 --output data/simulated/model_v1.1 --seed 0

What it imitates, in the order in which it happens:
  sizes     long-tailed cell counts per type; every system has its published share of the atlas
  studies   a type is seen in few studies, and unevenly; a study belongs to one tissue
  labels    the label comes first, and the study decides what the cell really is: a coarse study writes
            "T cell" on some of its subtypes, one study always mistakes a type for its sibling, and a few
            labels anywhere are wrong
  geometry  a cell lies around its type's centre, which shares parts with its system, lineage, level-3 type
            and ontology ancestors, in one of several modes (states, tissues); it may lie between two types,
            runs continuous programs, may be a doublet; its study shifts it
  encoder   a curved map to 128 dimensions whose curvature moves with the study, then the unit sphere

The constants in `SimulationParams` make the raw vectors score like the published ones (benchmarks/calibration.py shows
it). No figure measured on such a release says anything about real cells.
"""

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import networkx as nx
import numpy as np
from tqdm import tqdm

from fractal.base.errors import InputError, run
from fractal.base.files import atomic_write
from fractal.base.paths import check_paths
from fractal.data.scimilarity import HEADER
from fractal.hierarchy.ontology import SHIPPED, build_hierarchy, load_graph

SYSTEM_SHARES = {  # published
    "Immune": 0.544,
    "Epithelial": 0.121,
    "Neural": 0.080,
    "Stromal": 0.069,
    "Other": 0.059,
    "Muscle": 0.050,
    "Endothelial": 0.049,
    "Stem/Progenitor": 0.028,
}
LEAST = 5  # cells of every type, however small the release
BLOCK = 8_192  # rows that are made at once, from a random generator of their own: memory stays flat
DIM, LATENT, HIDDEN, MODES, PROGRAMS, STUDIES, TISSUES = 128, 48, 96, 5, 32, 72, 14


@dataclass(frozen=True)
class SimulationParams:
    """The calibrated constants. Lengths are in units of the latent space, rates are shares of the cells."""

    size_sd: float = 1.6  # of the log cell counts inside a system: how long the tail is
    # a type's centre: the parts it shares with its system, lineage, level-3 type, nobody, CL ancestors
    system: float = 1.43
    lineage: float = 0.65
    type: float = 0.2
    subtype: float = 0.6
    ancestors: float = 0.5
    mode_shared: float = 0.4  # a mode's offset from that centre: the part that the lineage shares,
    mode_own: float = 0.5  # and the type's own
    continuum: float = 0.25  # share of cells on the way from their own type to a sibling
    doublets: float = 0.08  # share of cells that are two cells
    programs: float = 0.72  # length of the continuous programs
    noise: float = 0.31  # length of the heavy-tailed noise inside the latent space
    ambient: float = 0.25  # and of that in all 128 dimensions
    shift: float = 0.35  # how far a study moves its cells
    warp: float = 2.4  # length of the curved part of the encoder,
    warp_gain: float = 1.6  # how sharply it bends,
    warp_study: float = 0.6  # and how far a study moves the bends
    # what a label hides, in a study of average care
    far: float = 0.051  # a cell of another system
    near: float = 0.035  # a cell of the same system, another level-3 type
    close: float = 0.01  # a cell of the same level-3 type
    habit: float = 0.02  # one certain sibling: heavy-tailed, most (type, study) pairs never, a few always
    coarse: float = 0.08  # share of studies that label coarsely


KNOBS = SimulationParams()


class Draw:
    """Draws from many discrete distributions at once: `Draw(weights)(rows, rng)`, weights (rows, choices)."""

    def __init__(self, weights: np.ndarray) -> None:
        steps = np.cumsum(weights, axis=1, dtype=np.float64)
        # row i is lifted by i, which makes one sorted array: one searchsorted serves any mix of rows
        self.steps = (steps / steps[:, -1:] + np.arange(len(steps))[:, None]).ravel()
        self.choices = steps.shape[1]

    def __call__(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One choice for every entry of `rows` (n,) -> (n,) int64."""
        hits = np.searchsorted(self.steps, rows + rng.random(len(rows)), side="right")
        return np.minimum(hits - rows * self.choices, self.choices - 1)


def apportion(weights: np.ndarray, total: int, least: np.ndarray) -> np.ndarray:
    """Whole numbers (int64) that sum to `total`: proportional to `weights`, but nowhere below `least`."""
    raised = np.zeros(len(weights), bool)
    target = least.astype(float)
    while not raised.all():
        target = np.where(raised, least, weights * (total - least[raised].sum()) / weights[~raised].sum())
        if not np.any(short := ~raised & (target < least)):
            break
        raised |= short
    target = np.maximum(target, least)
    whole = np.floor(target + 1e-9).astype(np.int64)
    whole[np.argsort(whole - target, kind="stable")[: total - whole.sum()]] += 1  # the largest fractions
    return whole


class SimulatedAtlas:
    """The fixed world of one seed, the same at any size; `block` makes its cells.

    types, studies   names; codes below point into them
    levels           (203, 4) int, the class of every type at every level
    sizes, labels    (203,) int64 cells per type; (cells,) uint8 the type that each row is labelled with
    blocks           how many blocks of BLOCK rows there are
    """

    def __init__(self, cells: int, seed: int = 0, knobs: SimulationParams = KNOBS) -> None:
        self.types = (SHIPPED / "scimilarity-types.txt").read_text(encoding="utf-8").splitlines()
        self.studies = [f"simulated-{i:02d}" for i in range(STUDIES)]
        least = LEAST * len(self.types)
        if not least <= cells < 2**32:  # hnswlib counts in 32 bits
            raise InputError(f"--cells {cells}: must be at least {least}, {LEAST} of every type, and below 2**32")
        if seed < 0:
            raise InputError(f"--seed {seed}: must not be negative")
        self.cells, self.seed, self.knobs, self.blocks = cells, seed, knobs, math.ceil(cells / BLOCK)
        graph = load_graph(SHIPPED / "cl-slim.obo")
        rows = build_hierarchy(self.types, graph)
        columns = zip(*(row.levels for row in rows), strict=True)
        self.levels = np.stack([np.unique(column, return_inverse=True)[1] for column in columns], axis=1)

        rng = np.random.default_rng([seed, 1])
        self._set_sizes([row.levels[0] for row in rows], rng)
        self._set_kinship([row.cl_id for row in rows], graph)
        self._set_studies(rng)
        self._set_mistakes(rng)
        self._set_geometry(rng)
        self.labels = np.repeat(np.arange(len(self.types), dtype=np.uint8), self.sizes)
        np.random.default_rng([seed, 2]).shuffle(self.labels)

    def _set_sizes(self, system: Sequence[str], rng: np.random.Generator) -> None:
        """`shares` and `sizes` (203,), system by system, so that many small types cannot bend its share."""
        members = [np.flatnonzero(np.array(system) == name) for name in SYSTEM_SHARES]
        least = np.array([LEAST * len(types) for types in members])
        totals = apportion(np.array(list(SYSTEM_SHARES.values())), self.cells, least)
        self.shares, self.sizes = np.zeros(len(system)), np.zeros(len(system), np.int64)
        for types, share, total in zip(members, SYSTEM_SHARES.values(), totals, strict=True):
            # quantiles in random order, not free draws: seeds differ in which type is large, not in the tail
            quantiles = [NormalDist().inv_cdf((i + 0.5) / len(types)) for i in range(len(types))]
            weights = np.exp(self.knobs.size_sd * rng.permutation(quantiles))
            self.shares[types] = share * weights / weights.sum()
            self.sizes[types] = apportion(weights, total, np.full(len(types), LEAST))

    def _set_kinship(self, ids: Sequence[str], graph: nx.DiGraph) -> None:
        """`features` (203, terms): ancestors, by information; `kinship`: their cosine; `below`: is_a."""
        above = [nx.descendants(graph, i) if i in graph else set() for i in ids]  # edges run child -> parent
        terms = sorted(set(ids).union(*above))
        features = np.array([[t == own or t in up for t in terms] for own, up in zip(ids, above, strict=True)])
        features = features * np.log(len(ids) / features.sum(axis=0))  # an ancestor of all says nothing
        self.features = features / np.linalg.norm(features, axis=1, keepdims=True)
        self.kinship = self.features @ self.features.T
        self.below = np.array([[own in up for up in above] for own in ids])  # is the column a kind of the row?

    def _set_studies(self, rng: np.random.Generator) -> None:
        """Which studies hold a type, how coarsely a study labels, and how carelessly."""
        count, lineage = len(self.types), self.levels[:, 1]
        tissue = rng.integers(0, TISSUES, STUDIES)
        coarse = rng.random(STUDIES) < self.knobs.coarse
        self.coarseness = np.where(coarse, rng.uniform(0.4, 0.8, STUDIES), rng.uniform(0, 0.05, STUDIES))
        self.carelessness = np.exp(rng.normal(0, 0.6, STUDIES))
        self.carelessness /= self.carelessness.mean()

        fit = 1.5 * rng.normal(size=(lineage.max() + 1, TISSUES))[lineage][:, tissue]  # (types, studies)
        fit += rng.normal(size=(count, TISSUES))[:, tissue] + rng.normal(size=(count, STUDIES))
        fit += 2 * np.where(self.below.any(axis=1), 1, -1)[:, None] * self.coarseness
        seen = np.argsort(np.argsort(-fit, axis=1), axis=1) < np.clip(120 * self.shares**0.45, 2, 30)[:, None]
        self.study_of = Draw(seen * np.exp(0.9 * rng.normal(size=fit.shape) + 0.3 * fit))

    def _set_mistakes(self, rng: np.random.Generator) -> None:
        """What the cells of a (label, study) pair really are: `kind` picks one of six draws."""
        knobs, count = self.knobs, len(self.types)
        same = [self.levels[:, None, k] == self.levels[None, :, k] for k in range(4)]
        likely = np.exp(6 * self.kinship) * self.shares  # the alike are confused, and the common more often
        itself = 1e-9 * np.eye(count)  # for a type without such relatives
        self.sibling = Draw(likely * (same[1] & ~same[3]) + itself)
        self.others = [
            Draw(likely * ~same[0]),
            Draw(likely * (same[0] & ~same[2]) + itself),
            Draw(likely * (same[2] & ~same[3]) + itself),
            Draw(self.below * self.shares + itself),
        ]
        self.habit = self.sibling(np.repeat(np.arange(count), STUDIES), rng)  # (types * studies,)
        chance = np.zeros((count, STUDIES, 6))
        chance[:, :, 1:4] = np.outer(0.5 + 0.5 * self.carelessness, (knobs.far, knobs.near, knobs.close))
        chance[:, :, 4] = np.outer(self.below.any(axis=1), self.coarseness)
        often = rng.gamma(0.35, 1 / 0.35, (count, STUDIES)) * self.carelessness
        chance[:, :, 5] = np.minimum(knobs.habit * often, 0.7)
        chance[:, :, 0] = np.maximum(1 - chance.sum(axis=2), 0.05)
        self.kind = Draw(chance.reshape(-1, 6))

    def _set_geometry(self, rng: np.random.Generator) -> None:
        """Where the cells of a (type, mode) pair lie and how they spread, and the encoder; all float32."""
        knobs, count = self.knobs, len(self.types)

        def arrows(*shape: int) -> np.ndarray:
            return rng.normal(size=(*shape, LATENT)) / math.sqrt(LATENT)  # of about unit length

        system, lineage, kind, own = self.levels.T
        lineages = lineage.max() + 1
        centre = knobs.system * arrows(system.max() + 1)[system] + knobs.lineage * arrows(lineages)[lineage]
        centre += knobs.type * arrows(kind.max() + 1)[kind] + knobs.subtype * arrows(count)[own]
        centre += knobs.ancestors * self.features @ arrows(self.features.shape[1])
        mode = knobs.mode_shared * arrows(lineages, MODES)[lineage] + knobs.mode_own * arrows(count, MODES)
        self.centre = (centre[:, None] + mode).reshape(-1, LATENT).astype(np.float32)
        mixture = rng.gamma(1.0, 1.0, (count, 1, MODES)) * rng.gamma(0.8, 1.0, (1, STUDIES, MODES)) + 1e-3
        self.mode_of = Draw(mixture.reshape(-1, MODES))
        # Each (lineage, mode) uses other programs, so the spread inside a type differs from place to place and
        # no single whitening of the space can take it away.
        use = np.exp(rng.normal(size=(lineages, MODES, PROGRAMS)))[lineage]
        use *= np.exp(0.35 * rng.normal(size=(count, 1, PROGRAMS)))
        use *= np.exp(0.25 * rng.normal(size=(count, 1, 1))) / np.sqrt((use**2).mean(axis=2, keepdims=True))
        self.use = use.reshape(-1, PROGRAMS).astype(np.float32)
        self.programs = (knobs.programs * arrows(PROGRAMS) / math.sqrt(PROGRAMS)).astype(np.float32)
        self.spread = np.exp(rng.normal(0, 0.25, (count, 1))).astype(np.float32)

        # studies differ along ten common directions, and each a little in its own
        common = rng.normal(size=(STUDIES, 10)) @ arrows(10) / math.sqrt(10)
        self.shift = (knobs.shift * (common + 0.5 * arrows(STUDIES))).astype(np.float32)
        moves = rng.normal(size=(STUDIES, 8)) @ rng.normal(size=(8, HIDDEN)) / math.sqrt(8)
        self.bend_study = (knobs.warp_study * moves).astype(np.float32)
        self.flat = np.linalg.qr(rng.normal(size=(DIM, LATENT)))[0].T.astype(np.float32)
        self.bend = (knobs.warp_gain * rng.normal(size=(LATENT, HIDDEN))).astype(np.float32)
        self.again = (1.5 * rng.normal(size=(HIDDEN, HIDDEN)) / math.sqrt(HIDDEN)).astype(np.float32)
        self.curved = (knobs.warp * rng.normal(size=(HIDDEN, DIM)) / math.sqrt(DIM * HIDDEN)).astype(np.float32)
        self.offset = (0.35 * rng.normal(size=DIM) / math.sqrt(DIM)).astype(np.float32)

    def block(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The rows from index * BLOCK on -> vectors (n, 128) float32 of unit norm, labels, studies, true types.

        The last three are codes, (n,) int64; the true type is what the cell is, whatever its label says.
        """
        rng = np.random.Generator(np.random.SFC64([self.seed, index, 3]))
        label = self.labels[index * BLOCK : (index + 1) * BLOCK].astype(np.int64)
        study = self.study_of(label, rng)
        pair = label * STUDIES + study
        true = np.choose(self.kind(pair, rng), [label, *(draw(label, rng) for draw in self.others), self.habit[pair]])
        return self._embed(true, study, rng), label, study, true

    def _embed(self, true: np.ndarray, study: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Types and studies (n,) -> vectors (n, 128) float32 of unit norm."""
        knobs, n = self.knobs, len(true)

        def normal(width: int, length: float = 1.0) -> np.ndarray:
            return np.float32(length / math.sqrt(width)) * rng.standard_normal((n, width), np.float32)

        mode = self.mode_of(true * STUDIES + study, rng)
        z = self.centre[true * MODES + mode]
        # at most half of the way, for beyond it the cell would be of the other type
        way = 0.5 * rng.random((n, 1), np.float32) * (rng.random((n, 1)) < knobs.continuum)
        z += way.astype(np.float32) * (self.centre[self.sibling(true, rng) * MODES + mode] - z)
        z += (normal(PROGRAMS, math.sqrt(PROGRAMS)) * self.use[true * MODES + mode]) @ self.programs
        # Student's t with 5 degrees of freedom: a normal over the root of a scaled chi-square
        scale = self.spread[true] / np.sqrt(rng.standard_gamma(2.5, (n, 1), np.float32) / np.float32(2.5))
        z += scale * normal(LATENT, knobs.noise)
        # the second cell of a doublet is any cell of the block, so common types are common partners
        pairs = np.flatnonzero(rng.random(n) < knobs.doublets)
        part = 0.3 + 0.2 * rng.random((len(pairs), 1), np.float32)
        z[pairs] += part * (z[rng.integers(0, n, len(pairs))] - z[pairs])
        z += self.shift[study]

        hidden = np.tanh(np.tanh(z @ self.bend + self.bend_study[study]) @ self.again)
        x = z @ self.flat + hidden @ self.curved + self.offset + scale * normal(DIM, knobs.ambient)
        return x / np.linalg.norm(x, axis=1, keepdims=True)


# One record of an hnswlib index with M = 16. Its links stay empty: who reads vectors by their label needs no
# search graph, and building one for 8 million cells takes hours.
RECORD = np.dtype([("links", "V132"), ("vector", "<f4", DIM), ("label", "<u8")])


def write_release(directory: str | Path, cells: int, seed: int = 0) -> None:
    """Write the three files of a release; all of them appear at the end, and replace those of an older one.

    The same seed gives the same bytes, with any number of threads; another kind of processor may round the vectors'
    last bits in another way.
    """
    atlas, directory = SimulatedAtlas(cells, seed), Path(directory)
    with (
        atomic_write(directory / "label_ints.csv") as types,
        atomic_write(directory / "annotation" / "reference_labels.tsv") as labels,
        atomic_write(directory / "annotation" / "labelled_kNN.bin") as index,
    ):
        with open(types, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("", 0), *enumerate(atlas.types)])
        _write_cells(atlas, labels, index)


def _write_cells(atlas: SimulatedAtlas, labels_path: Path, index_path: Path) -> None:
    offsets = (RECORD.itemsize, DIM * 4 + 132, 132)  # of the record, and in it of the label and of the vector
    header = (0, atlas.cells, atlas.cells, *offsets, 0, 0, 16, 32, 16, 1 / math.log(16), 200)
    with (
        open(labels_path, "w", encoding="utf-8", newline="\n") as lines,
        open(index_path, "wb") as index,
        tqdm(total=atlas.cells, unit="cells", unit_scale=True, desc="simulate") as bar,
    ):
        index.write(np.array(header, HEADER).tobytes())
        for i in range(atlas.blocks):
            vectors, labels, studies, _ = atlas.block(i)
            pairs = zip(labels.tolist(), studies.tolist(), strict=True)
            lines.writelines(f"{atlas.types[label]}\t{atlas.studies[study]}\n" for label, study in pairs)
            # an index that was built with threads does not hold its records in label order
            order = np.random.default_rng([atlas.seed, i, 4]).permutation(len(vectors))
            records = np.zeros(len(vectors), RECORD)
            records["vector"], records["label"] = vectors[order], i * BLOCK + order
            index.write(records.tobytes())
            bar.update(len(vectors))
        for i in range(0, atlas.cells, BLOCK):
            index.write(bytes(4 * min(BLOCK, atlas.cells - i)))  # a u32 per record: no links in upper layers


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cells", type=int, default=60_000, help="cells in the release (default: 60000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another atlas (default: 0)")
    default = Path("data/simulated/model_v1.1")
    parser.add_argument("--output", type=Path, default=default, help=f"folder of the release (default: {default})")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    check_paths({}, {}, folders={"--output": args.output})
    write_release(args.output, args.cells, args.seed)
    print(f"{args.output}: {args.cells:,} simulated cells, seed {args.seed}")


if __name__ == "__main__":
    run(main)
