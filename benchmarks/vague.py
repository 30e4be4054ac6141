"""A label that means less than its rivals: "T cell" in half of the donors of blood and tonsil, CD4 and CD8 in others.

    uv run python -m benchmarks.vague --seeds 3     # real cells: FRACTAL_REAL_DATA

One donor of blood and one of tonsil are annotated with a reference of the other eight, four of which have "T cell" in
place of CD4- and CD8-positive T cells. Rows: `fit` as it is, which leaves the cells of the vaguer label out; with
`--not-vague "T cell"`; and with the labels as they were. Of the new T cells: how many reach a subtype, and how many of
these are right; how many of the answered types are right.
"""

import argparse
from pathlib import Path

import anndata
import numpy as np

import fractal
from benchmarks.quality import add_data, prepare
from fractal.base.errors import run
from fractal.base.table import table
from fractal.commands.options import positive_int
from fractal.data.atlas import Atlas

COARSE = {"CD4-positive, alpha-beta T cell": "T cell", "CD8-positive, alpha-beta T cell": "T cell"}
WAYS = {"as it is": (True, []), "--not-vague": (True, ["T cell"]), "all labels fine": (False, [])}


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data(parser)
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds 0, 1, ... (default: %(default)s)")
    parser.add_argument("--cells", type=positive_int, default=300, help="cells of a donor (default: %(default)s)")
    parser.add_argument("--epochs", type=positive_int, default=8, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("data/vague"), help="(default: %(default)s)")
    return parser


def draw(atlas: Atlas, cells: int, seed: int) -> tuple[anndata.AnnData, list[str], list[str]]:
    """-> so many cells of each donor, the two donors that are held out, and the four whose labels are vague."""
    rng, (codes, donors) = np.random.default_rng(seed), atlas.studies
    blood, tonsil = ([d for d in donors if ("tonsil" in d.lower()) == is_tonsil] for is_tonsil in (False, True))
    blood, tonsil = rng.permutation(blood).tolist(), rng.permutation(tonsil).tolist()
    rows = np.sort(np.concatenate([rng.permutation(np.flatnonzero(codes == d))[:cells] for d in range(len(donors))]))
    part = atlas.read(rows)
    label = np.array(part.classes[-1])[part.labels[:, -1]]
    adata = anndata.AnnData(obsm={"X": part.vectors})
    adata.obs["label"], adata.obs["donor"] = label, np.array(donors)[codes[rows]]
    adata.obs["type"] = np.array(part.classes[-2])[part.labels[:, -2]]
    return adata, [blood[0], tonsil[0]], [*blood[1:3], *tonsil[1:3]]


def row(
    adata: anndata.AnnData, held_out: list[str], coarse: list[str], args: argparse.Namespace, way: str
) -> list[str]:
    relabelled, not_vague = WAYS[way]
    labelled, new = (adata[adata.obs["donor"].isin(held_out) == is_new].copy() for is_new in (False, True))
    if relabelled:
        vague = labelled.obs["donor"].isin(coarse)
        labelled.obs.loc[vague, "label"] = labelled.obs.loc[vague, "label"].replace(COARSE)
    ref = fractal.fit(labelled, "label", "X", "donor", not_vague=not_vague, epochs=args.epochs, device="cpu")
    ref.annotate(new)
    obs = new.obs[new.obs["label"].isin(list(COARSE))].astype(str)
    deep, typed = (obs["fractal_level"].isin(levels) for levels in (["subtype"], ["type", "subtype"]))
    right, type_right = obs["fractal_subtype"] == obs["label"], obs["fractal_type"] == obs["type"]
    figures = [deep.mean(), right[deep].mean(), typed.mean(), type_right[typed].mean()]
    return [way, str(len(obs)), *(f"{figure:.3f}" for figure in figures)]


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    atlas = Atlas.open(prepare("pbmc_tonsil", 0, args.data, args.output))
    rows = []
    for seed in range(args.seeds):
        drawn = draw(atlas, args.cells, seed)
        rows += [[str(seed), *row(*drawn, args, way)] for way in WAYS]
    print("\n" + table(["Draw", "fit", "T cells", "Subtype answered", "right", "Type answered", "right"], rows))


if __name__ == "__main__":
    run(main)
