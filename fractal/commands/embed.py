"""Apply an adapter to a whole file: the same cells, each with its fractal vector.

    fractal embed --model-path data/fractal_adapter_4L.pt --input data/stratified.parquet
    fractal embed --model-path data/own.pt --input cells.h5ad --obsm X_pca

Parquet (of ingest.py or stratify.py) keeps all its other columns, and its metadata name the checkpoint, the recipe and
the blocks. An .h5ad is copied, to cells_fractal.h5ad, and gets obsm["X_fractal"] and uns["fractal"] (see
fractal/h5ad.py); a cell whose vector is NaN, inf or zero gets NaN there, but stops Parquet and .npy, which other
scripts read. A .npy file, a float matrix (cells, dim), and a TileDB array's folder are taken as well.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fractal.adapter import Adapter, load, pick_device
from fractal.atlas import fingerprint
from fractal.cli import InputError, needs, positive_int, run
from fractal.files import atomic_write, check_output
from fractal.h5ad import add_obsm, facts, h5ad_copy
from fractal.vectors import CHUNK, Append, Source, open_vectors, usable, writing_vectors

BATCH = 2_048  # cells; 4 MB of hidden units per layer, which stay in the cache


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--model-path",
        type=Path,
        default=Path("data/fractal_adapter_4L.pt"),
        help="checkpoint of train.py (default: %(default)s)",
    )
    files.add_argument(
        "--input",
        type=Path,
        default=Path("data/stratified.parquet"),
        help="Parquet, .npy, .h5ad or a TileDB array's folder (default: %(default)s)",
    )
    files.add_argument("--obsm", default="X_scimilarity", help="of an .h5ad: key of its vectors (default: %(default)s)")
    files.add_argument(
        "--output",
        type=Path,
        help="Parquet, .npy for the vectors alone, or .h5ad for an .h5ad, which may be the input (default: "
        "data/fractal_embeddings.parquet, or beside an .h5ad, its name with _fractal)",
    )
    files.add_argument(
        "--resume",
        action="store_true",
        help="keep the vectors of finished row groups in a folder beside --output, with .resume at its end, until all "
        "are done; a stopped run that had this flag goes on with them (Parquet and .npy)",
    )
    vectors = parser.add_argument_group("vectors of Parquet and .npy; an .h5ad gets the full ones, to be cut later")
    vectors.add_argument(
        "--prefix", type=positive_int, help="keep this many blocks, of length 1 again (default: the full vector)"
    )
    vectors.add_argument(
        "--dtype",
        choices=["float32", "float16"],
        default="float32",
        help="float16 takes half the space; the other scripts read float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "mps", "cpu"],
        default="auto",
        help="auto takes CUDA, else MPS, else the CPU (default: %(default)s)",
    )
    return parser


@torch.inference_mode()
def embedded(adapter: Adapter, vectors: np.ndarray, prefix: int, device: torch.device) -> Iterator[Tensor]:
    """(n, dim) float32 -> per batch the first `prefix` blocks, or the full vectors if these are all blocks; on the CPU.

    The two differ: a published full vector is no longer prefix, but has passed one more norm.
    """
    for start in range(0, len(vectors), BATCH):
        x = torch.tensor(vectors[start : start + BATCH], device=device)  # a copy: the file's pages are read-only
        yield (adapter.encode(x) if prefix == adapter.num_levels else adapter.prefix(x, prefix)).cpu()


def embed_chunks(
    adapter: Adapter, source: Source, prefix: int, device: torch.device, append: Append, finished: Path | None
) -> None:
    """Raises InputError for vectors that are zero or not finite: other scripts read what is written here.

    `finished`: a folder that keeps the vectors of each chunk, and from which they are taken if they are there.
    """
    with tqdm(total=source.num_rows, unit="cells", unit_scale=True, desc="embed") as bar:
        for number, (columns, vectors) in enumerate(source.chunks(strict=True)):
            kept = finished / f"{number}.npy" if finished else None
            found = read_finished(kept, (len(vectors), prefix * adapter.scale_dim)) if kept else None
            if found is not None:
                bar.update(len(vectors))
            else:
                batches = []
                for batch in embedded(adapter, vectors, prefix, device):
                    batches.append(batch)
                    bar.update(len(batch))
                found = torch.cat(batches).numpy()
                if kept:
                    with atomic_write(kept) as part, open(part, "wb") as file:
                        np.save(file, found)
            append(columns, found)


@torch.inference_mode()
def embed_usable(adapter: Adapter, chunks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (full vectors (m, dims), blocks (m, dims)), both float32; NaN in the rows whose vector is not usable."""
    device = next(adapter.parameters()).device
    for chunk in chunks:
        good = usable(chunk)
        blocks = adapter.blocks(torch.from_numpy(chunk[good]).to(device))
        found = np.full((2, len(chunk), adapter.num_levels * adapter.scale_dim), np.nan, np.float32)
        found[0, good], found[1, good] = adapter.full(blocks).cpu(), blocks.flatten(1).cpu()
        yield found[0], found[1]


def embed_h5ad(adapter: Adapter, recipe: str, adapter_sha256: str, source: Path, obsm: str, target: Path) -> int:
    """Copy an .h5ad and add X_fractal and uns["fractal"] -> how many cells were not usable. In bounded memory.

    Raises InputError if the vectors are not as wide as the adapter's input.
    """
    with open_vectors(source, obsm, adapter.dim) as vectors, h5ad_copy(source, target) as file:
        dims = adapter.num_levels * adapter.scale_dim
        outputs = [add_obsm(file, "X_fractal", vectors.num_rows, dims)]
        if recipe == "published":
            outputs.append(add_obsm(file, "X_fractal_blocks", vectors.num_rows, dims))
        needs("anndata", "h5ad").io.write_elem(
            file.require_group("uns"), "fractal", facts(adapter, recipe, adapter_sha256)
        )
        start = invalid = 0
        with tqdm(total=vectors.num_rows, unit="cells", unit_scale=True, desc="embed") as bar:
            for found in embed_usable(adapter.eval(), (chunk for _, chunk in vectors.chunks(CHUNK))):
                stop = start + len(found[0])
                for output, values in zip(outputs, found, strict=False):
                    output[start:stop] = values
                invalid += int(np.isnan(found[0][:, 0]).sum())
                start = stop
                bar.update(len(found[0]))
    return invalid


def read_finished(kept: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The vectors of a chunk; None where they are not there or damaged, so that they are made again."""
    try:
        found = np.load(kept, allow_pickle=False)
    except Exception:  # whatever damage makes numpy raise
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def folder_of_finished(output: Path, *run: str) -> Path:
    """Where a run with --resume keeps what it has done: a folder for each checkpoint, input, obsm and prefix."""
    folder = output.with_name(output.name + ".resume") / "-".join(run)
    if done := len(list(folder.glob("*.npy"))):
        print(f"resuming after {done} row groups")
    return folder


def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = pick_device(args.device)
    adapter, checkpoint = load(args.model_path, device)
    recipe, levels = checkpoint["config"]["recipe"], adapter.num_levels
    from_h5ad = args.input.suffix == ".h5ad"
    beside = args.input.with_name(f"{args.input.stem}_fractal.h5ad")
    output = args.output or (beside if from_h5ad else Path("data/fractal_embeddings.parquet"))
    to_h5ad = output.suffix == ".h5ad"
    prefix = args.prefix or levels
    if prefix > levels:
        raise InputError(f"{args.model_path}: has {levels} blocks, --prefix {prefix} asks for more")
    if to_h5ad and not from_h5ad:
        raise InputError(f"{output}: an .h5ad is only written for an .h5ad --input; name a .parquet or .npy")
    if args.resume and (to_h5ad or args.input.is_dir()):
        raise InputError(f"{output}: --resume goes from a file to a .parquet or .npy; leave it out")
    if to_h5ad and (args.prefix or args.dtype != "float32"):
        raise InputError(
            f"{output}: an .h5ad gets full float32 vectors; cut them with fractal.h5ad.truncate, or name a "
            ".parquet or .npy with --output"
        )
    if not to_h5ad:
        check_output(output, args.input, args.model_path)
    sha256 = fingerprint(args.model_path)
    with open_vectors(args.input, args.obsm, adapter.dim) as source:
        dim, invalid = prefix * adapter.scale_dim, 0
        if to_h5ad:
            invalid = embed_h5ad(adapter, recipe, sha256, args.input, args.obsm, output)
        else:
            metadata = {
                "checkpoint_sha256": sha256,
                "recipe": recipe,
                "num_levels": str(levels),
                "block_widths": json.dumps([adapter.scale_dim] * levels),
                "prefix": str(prefix),
            }
            finished = None
            if args.resume:
                key = hashlib.sha256(args.obsm.encode() if from_h5ad else b"").hexdigest()
                names = sha256[:16], fingerprint(args.input)[:16], key[:16], str(prefix)
                finished = folder_of_finished(output, *names)
            with writing_vectors(output, source, dim, np.dtype(args.dtype), metadata) as append:
                embed_chunks(adapter, source, prefix, device, append, finished)
            if finished:
                shutil.rmtree(finished.parent)
    print(
        f"{source.num_rows:,} cells, {'full vectors' if prefix == levels else f'prefix {prefix}'} of recipe {recipe}, "
        f"{dim} numbers each as {args.dtype}, written to {output}"
        + (f"; NaN for {invalid:,} cells whose vector is zero or not finite" if invalid else "")
    )


if __name__ == "__main__":
    run(main)
