"""PCA beside scVI: the same labelled cells and the same new ones, from counts to labels.

    uv venv scvi-env && uv pip install --python scvi-env/bin/python scvi-tools scanpy
    uv pip install --python scvi-env/bin/python --no-deps came==0.1.13
    uv run python -m benchmarks.vectors --peer scvi-env/bin/python

The counts are real, and the package came carries them: pancreas cells of Baron et al. 2016 (inDrop), 2,142 of four
human donors with 20,125 genes and 1,886 of two mice, whole numbers of UMIs, with names of the Cell Ontology. A donor is
new and the other three are labelled; or the mice are new, by the one-to-one human orthologs of their genes, and all
four donors are labelled. Vectors come from the 2,000 genes that vary most among the labelled cells. scVI maps new cells
into the model of the labelled ones (`load_query_data`); its other row shows what goes wrong: new cells with a model of
their own. scvi-tools runs in an environment of its own, with one thread. Seconds are those of computing, and memory the
peak, of the process that makes the vectors. Labels are compared where the reference has them.
"""

import argparse
import contextlib
import io
import os
import subprocess
import zipfile
from pathlib import Path

import anndata
import pandas as pd

import fractal
from benchmarks.encoder import timed
from fractal.base.errors import InputError, run
from fractal.base.table import table

LABELS, DONOR = "cell_ontology_class", "donor"
QUERIES = ["human1", "human2", "human3", "human4", "mice"]
WHERE = "import importlib.util; print(importlib.util.find_spec('came').submodule_search_locations[0])"
GENES = """
import sys, anndata, scanpy as sc
labelled, new = (anndata.read_h5ad(path) for path in sys.argv[1:3])
def logged(cells):
    cells = cells.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells
labelled_log = logged(labelled)
sc.pp.highly_variable_genes(labelled_log, n_top_genes=2000, batch_key="donor")
"""
PCA = """
sc.pp.pca(labelled_log, n_comps=50)  # the reference keeps these loadings, and projects the new cells
labelled_log.write_h5ad(sys.argv[3])
logged(new).write_h5ad(sys.argv[4])
"""
SCVI = """
import scvi, torch
from scvi.model import SCVI
torch.set_num_threads(1)
scvi.settings.seed = 0
quiet = {"accelerator": "cpu", "enable_progress_bar": False}
genes = labelled_log.var["highly_variable"].to_numpy()
def trained(cells):
    SCVI.setup_anndata(cells, batch_key="donor")
    # As scArches advises, so that new batches fit in; the other numbers are the package's own choice.
    model = SCVI(cells, n_latent=30, use_layer_norm="both", use_batch_norm="none", encode_covariates=True)
    model.train(max_epochs=EPOCHS, **quiet)
    return model
def write(cells, model, path):
    cells.obsm["X_scVI"] = model.get_latent_representation()
    cells.write_h5ad(path)
labelled, new = labelled[:, genes].copy(), new[:, genes].copy()
model = trained(labelled)
write(labelled, model, sys.argv[3])
apart = trained(new.copy())
mapped = SCVI.load_query_data(new, model)
mapped.train(max_epochs=EPOCHS // 2, plan_kwargs={"weight_decay": 0.0}, **quiet)
write(new, mapped, sys.argv[4])
write(new, apart, sys.argv[5])
"""
# Name -> key of obsm, code, and a row for each file of new cells that the code writes
WAYS = {
    "pca": ("X_pca", PCA, ["PCA, new cells projected"]),
    "scvi": ("X_scVI", SCVI, ["scVI, new cells mapped", "scVI, a model of their own"]),
}


def read_counts(archive: Path, folder: Path) -> tuple[anndata.AnnData, anndata.AnnData]:
    """-> human cells, and mouse cells whose genes are renamed to their one-to-one human orthologs."""
    with zipfile.ZipFile(archive) as files:
        files.extractall(folder)
    human, mouse = (anndata.read_h5ad(folder / f"raw-Baron_{name}.h5ad") for name in ("human", "mouse"))
    pairs = pd.read_csv(folder / "gene_matches_1v1_mouse2human.csv", index_col=0).iloc[:, 0]
    pairs = pairs[pairs.isin(human.var_names) & pairs.index.isin(mouse.var_names)]
    mouse = mouse[:, pairs.index].copy()
    mouse.var_names = pairs.to_numpy(str)
    return human, mouse


def compared(labelled: Path, new: list[Path], use_rep: str) -> list[list[float]]:
    """Fit on the labelled cells, annotate the new ones -> shares for each file; none where they are refused."""
    found, output = list[list[float]](), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        reference = fractal.fit(labelled, LABELS, use_rep, DONOR)
        for path in new:
            try:
                reference.annotate(cells := anndata.read_h5ad(path))
            except InputError:
                found.append([])
                continue
            obs = cells.obs[cells.obs[LABELS].isin([path[-1] for path in reference.annotator.tree.paths])]
            right = obs["fractal_subtype"].astype(str) == obs[LABELS].astype(str)
            deep, novel = obs["fractal_level"] == "subtype", obs["fractal_status"] == "novel"
            found.append([share.mean() for share in (right, deep, right[deep], novel)])
    return found


def computed() -> float:
    """Seconds that the processes which this one started, and which have ended, have computed."""
    return sum(os.times()[2:4])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of an environment with scvi-tools, scanpy and came")
    parser.add_argument("--new", nargs="+", choices=QUERIES, default=QUERIES[:1], help="(default: the first donor)")
    parser.add_argument("--epochs", type=int, default=200, help="of scVI, half as many to map (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("data/vectors"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    package = Path(subprocess.run([args.peer, "-c", WHERE], stdout=subprocess.PIPE, text=True, check=True).stdout[:-1])
    human, mouse = read_counts(package / "sample_data.zip", args.folder)
    rows = []
    for query in args.new:
        out = human.obs[DONOR] == query
        pair = (human[:, mouse.var_names], mouse) if query == "mice" else (human[~out], human[out])
        inputs = [args.folder / f"{name}.h5ad" for name in ("labelled", "new")]
        for cells, path in zip(pair, inputs, strict=True):
            cells.copy().write_h5ad(path)
        for way, (use_rep, code, names) in WAYS.items():
            outputs = [args.folder / f"{way}_{i}.h5ad" for i in range(len(names) + 1)]
            code = GENES + code.replace("EPOCHS", str(args.epochs))
            before = computed()
            memory = timed(args.peer, code, [*inputs, *outputs])[1]
            seconds = computed() - before
            for name, found in zip(names, compared(outputs[0], outputs[1:], use_rep), strict=True):
                shares = [f"{share:.3f}" for share in found] or ["refused", "", "", ""]
                rows.append([query, name, *shares, f"{seconds:.0f}", f"{memory:.1f}"])
                print(*rows[-1], flush=True)
    header = ["New cells", "Vectors", "Right, forced", "Answered", "of these right", "Called novel", "Seconds", "GB"]
    print(table(header, rows))


if __name__ == "__main__":
    run(main)
