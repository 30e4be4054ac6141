"""Counts of genes -> SCimilarity's vectors, by the encoder that its release brings.

    fractal encode new.h5ad --model data/models/scimilarity/model_v1.1 --output new_encoded.h5ad

The output is a copy of the input with obsm["X_scimilarity"] (n, 128); it may be the input itself. Counts are taken from
layers["counts"], X or raw, whichever holds whole numbers, else values that were log-normalised; genes are matched by
their symbols, in var_names or a column of var. A cell without counts gets NaN. Memory does not grow with the file.
"""

from fractal.base.errors import run
from fractal.base.files import locked
from fractal.base.paths import check_paths
from fractal.commands.options import add, check_suffix, command, one_input

EXAMPLE = "fractal encode new.h5ad --model FOLDER --output new_encoded.h5ad"


def main(argv: list[str] | None = None) -> None:
    parser = command("encode", __doc__)
    add(parser, "input", help="cells with counts: .h5ad or .zarr")
    add(parser, "--model", required=True, help="folder model_v1.1 of SCimilarity's release, with its encoder")
    add(parser, "--output", required=True, help="the .h5ad to write")
    parser.add_argument("--key-added", metavar="KEY", default="X_scimilarity", help="of obsm (default: %(default)s)")
    add(parser, "--force", help="go on with fewer than 5,000 of the model's genes; match genes of mouse by upper case")
    add(parser, "--device")
    args = parser.parse_args(argv)
    args.input = one_input(args, EXAMPLE)
    check_suffix("--output", args.output, (".h5ad",))
    check_paths({"input": args.input, "--model": args.model}, {"--output": args.output}, [("--output", "input")])
    from fractal.data.encoder import encoded_chunks, open_encoded, read_encoder
    from fractal.data.outputs import add_obsm, h5ad_copy
    from fractal.model.adapter import pick_device

    encoder = read_encoder(args.model, pick_device(args.device))
    with locked(args.output), open_encoded(args.input, encoder, args.force) as (cells, line):
        print(line)
        with h5ad_copy(args.input, args.output) as file:
            start, array = 0, add_obsm(file, args.key_added, cells.num_rows, cells.dim)
            for vectors in encoded_chunks(cells):
                array[start : start + len(vectors)] = vectors
                start += len(vectors)
    print(f"{cells.num_rows:,} cells, obsm '{args.key_added}' of {cells.dim} numbers, written to {args.output}")


if __name__ == "__main__":
    run(main)
