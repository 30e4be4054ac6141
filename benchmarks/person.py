"""A person's path, timed: the wheel in a fresh environment, two commands, the same in Python, then scanpy.

    uv run python -m benchmarks.person

Two kinds of files, made of the 700 cells in scanpy's package (pbmc68k_reduced), half of them labelled, half new:
`pca` as they are, with the label map of docs/example.md and scanpy's PCA; `cellxgene` with the columns of a file of
CELLxGENE: CL ids, some of them "unknown", donors, Ensembl ids, and 30 numbers in obsm["X_scVI"] (turned principal
components stand for them). Each is fitted and annotated from the shell and from Python, then clustered and drawn on
every prefix. Nothing of the checkout is in reach but this file. The table has the seconds of every step, and in
brackets the seconds of computing, which other programs on the machine change little.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fractal.base.errors import needs, run
from fractal.base.table import table
from fractal.hierarchy.ontology import CL_SLIM, build_hierarchy, load_graph

ROOT = Path(__file__).parent.parent
FLAGS = {
    "pca": ["--labels", "bulk_labels", "--use-rep", "X_pca", "--label-map", "map.tsv"],
    "cellxgene": ["--labels", "cell_type_ontology_term_id", "--use-rep", "X_scVI", "--study", "donor_id"],
}
RESOLUTION = 0.1  # benchmarks/leiden.py


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the environment and the files go (default: a temporary one)")
    parser.add_argument("--inside", choices=["files", *FLAGS], help=argparse.SUPPRESS)  # run by the fresh Python
    return parser


Times = dict[str, str]  # step -> "seconds (of computing)"


@contextmanager
def timed(times: Times, step: str) -> Iterator[None]:
    """Of this process and of those that it has started and seen end."""
    began, before = time.perf_counter(), os.times()
    yield
    computing = sum(os.times()[:4]) - sum(before[:4])
    times[step] = f"{time.perf_counter() - began:.1f} ({computing:.1f})"


def write_files() -> None:
    """The files of both kinds, in the current folder."""
    scanpy = needs("scanpy", "scanpy")
    adata = scanpy.datasets.pbmc68k_reduced()
    adata.obs_names_make_unique()
    names = dict(re.findall(r'^    "(.+?)": "(.+?)"', (ROOT / "docs/example.md").read_text("utf-8"), re.MULTILINE))
    Path("map.tsv").write_text("".join(f"{own}\t{name}\n" for own, name in names.items()), encoding="utf-8")
    rng = np.random.default_rng(0)
    first = rng.permutation(adata.n_obs) < adata.n_obs // 2
    public = adata.copy()
    terms = build_hierarchy(list(names.values()), load_graph(CL_SLIM), "error")
    ids = {row.subtype: row.cl_id for row in terms}
    public.obs = adata.obs[["n_genes"]].copy()
    public.obs["cell_type"] = adata.obs["bulk_labels"].astype(str).map(names)
    public.obs["cell_type_ontology_term_id"] = public.obs["cell_type"].map(ids)
    public.obs.loc[rng.random(adata.n_obs) < 0.05, ["cell_type", "cell_type_ontology_term_id"]] = "unknown"
    public.obs["donor_id"] = rng.choice(["D1", "D2", "D3", "D4"], adata.n_obs)
    public.obs = public.obs.astype({"cell_type": "category", "cell_type_ontology_term_id": "category"})
    public.var = public.var[[]].assign(feature_name=list(public.var_names))
    public.var_names = [f"ENSG{i:011}" for i in range(public.n_vars)]
    turned = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    vectors = (adata.obsm["X_pca"][:, :30] @ turned).astype(np.float32)
    for key in list(public.obsm):
        del public.obsm[key]
    public.obsm["X_scVI"] = vectors
    for kind, cells in {"pca": adata, "cellxgene": public}.items():
        cells[first].write_h5ad(f"{kind}_labelled.h5ad")
        cells[~first].write_h5ad(f"{kind}_new.h5ad")


def python_steps(kind: str) -> Times:
    """The same path in Python, then scanpy's."""
    times: Times = {}
    with timed(times, "import fractal, scanpy"):
        import fractal

        scanpy = needs("scanpy", "scanpy")
        fractal.Reference  # noqa: B018  torch comes with it
    flags = dict(zip(FLAGS[kind][::2], FLAGS[kind][1::2], strict=True))
    labelled, new = (scanpy.read_h5ad(f"{kind}_{part}.h5ad") for part in ("labelled", "new"))
    with timed(times, "fractal.fit"):
        reference = fractal.fit(
            labelled,
            labels=flags["--labels"],
            use_rep=flags["--use-rep"],
            study=flags.get("--study"),
            label_map=flags.get("--label-map"),
        )
    with timed(times, "save and load"):
        reference.save("reference")
        reference = fractal.load("reference")
    with timed(times, "annotate"):
        reference.annotate(new)
    with timed(times, "embed"):
        reference.embed(new)
    for j, level in enumerate(new.uns["fractal"]["levels"], 1):
        new.obsm["X_prefix"] = fractal.truncate(new.obsm["X_fractal"], new.uns["fractal"], j)
        with timed(times, f"neighbours, prefix {j}"):
            scanpy.pp.neighbors(new, use_rep="X_prefix", metric="cosine")
        with timed(times, f"UMAP, prefix {j}"):
            scanpy.tl.umap(new)
        with timed(times, f"Leiden, prefix {j}"):
            scanpy.tl.leiden(new, resolution=RESOLUTION, flavor="igraph", n_iterations=2, directed=False)
        print(f"{kind}: prefix {j} ({level}) has {new.obs['leiden'].nunique()} clusters", file=sys.stderr)
    new.write_h5ad(f"{kind}_python.h5ad")
    return times


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if args.inside == "files":
        write_files()
    elif args.inside:
        print(json.dumps(python_steps(args.inside)))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            print(walk((args.folder or Path(temporary)).absolute()))


def walk(folder: Path) -> str:
    """Make the environment, go both ways with both kinds of files -> a table of seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    python, fractal_command = (folder / "venv" / "bin" / name for name in ("python", "fractal"))

    def call(*command: object) -> str:
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=folder, check=True, stdout=subprocess.PIPE, text=True).stdout

    def inside(name: str) -> str:
        return call(python, "-P", "-W", "ignore", Path(__file__), "--inside", name)

    install: Times = {}
    call("uv", "build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
    with timed(install, "uv venv, and uv pip install of the wheel"):
        call("uv", "venv", "--quiet", "--clear", "--python", sys.executable, folder / "venv")
        call("uv", "pip", "install", "--quiet", "--python", python, next(folder.glob("*.whl")))
    with timed(install, "uv pip install scanpy igraph"):
        call("uv", "pip", "install", "--quiet", "--python", python, "scanpy", "igraph")
    with timed(install, "fractal --help"):
        call(fractal_command, "--help")
    inside("files")
    steps: dict[str, Times] = {}
    for kind, flags in FLAGS.items():
        steps[kind] = {}
        commands = {
            "fractal fit": ["fit", f"{kind}_labelled.h5ad", *flags, "--output", f"{kind}_reference"],
            "fractal annotate": ["annotate", f"{kind}_new.h5ad", "--output", f"{kind}_shell.h5ad"],
            "fractal embed": ["embed", f"{kind}_shell.h5ad", "--output", f"{kind}_shell.h5ad"],
        }
        for name, command in commands.items():
            reference = [] if name == "fractal fit" else ["--reference", f"{kind}_reference"]
            with timed(steps[kind], name):
                call(fractal_command, *command, *reference)
        steps[kind] |= json.loads(inside(kind).splitlines()[-1])
    rows = [[step, *[taken] * len(FLAGS)] for step, taken in install.items()]
    names = dict.fromkeys(name for own in steps.values() for name in own)
    rows += [[name, *(own.get(name, "-") for own in steps.values())] for name in names]
    return table(["Seconds", *FLAGS], rows)


if __name__ == "__main__":
    run(main)
