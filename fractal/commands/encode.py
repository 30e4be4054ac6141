"""Counts of genes -> SCimilarity's vectors, by the encoder that its release brings.

    fractal encode new.h5ad --model data/models/scimilarity/model_v1.1 --output new_encoded.h5ad

The output is a copy of the input with obsm["X_scimilarity"] (n, 128); it may be the input itself. Counts are taken from
layers["counts"], X or raw, whichever holds whole numbers, else values that were log-normalised; genes are matched by
their symbols, in var_names or a column of var. A cell without counts gets NaN. Memory does not grow with the file.
"""

from fractal.base.files import locked
from fractal.commands.options import add, check_output, check_suffix, command, one_input


def main(argv: list[str] | None = None) -> None:
    parser = command("encode", __doc__)
    add(parser, "input", help="cells with counts, an .h5ad")
    add(parser, "--model", required=True, help="folder model_v1.1 of SCimilarity's release, with its encoder")
    add(parser, "--output", required=True, help="the .h5ad to write")
    parser.add_argument("--key-added", metavar="KEY", default="X_scimilarity", help="of obsm (default: %(default)s)")
    add(parser, "--force", help="go on with fewer than 5,000 of the model's genes; match genes of mouse by upper case")
    add(parser, "--device")
    args = parser.parse_args(argv)
    args.input = one_input(args, "fractal encode new.h5ad --model FOLDER --output new_encoded.h5ad")
    check_suffix("--output", args.output, (".h5ad",))
    check_output(args, {"--model": args.model})
    from fractal.commands.output import write_output
    from fractal.data.encoder import open_encoded, read_encoder
    from fractal.data.vectors import CHUNK
    from fractal.model.adapter import pick_device

    encoder = read_encoder(args.model, pick_device(args.device))
    with locked(args.output), open_encoded(args.input, encoder, args.force) as (cells, line):  # it may be the input
        print(line)
        read = cells.chunks(CHUNK, progress="encode")
        chunks = ((names, {args.key_added: vectors}) for names, vectors in read)
        write_output(args.output, chunks, cells)
    print(f"{cells.num_rows:,} cells, obsm '{args.key_added}' of {cells.dim} numbers, written to {args.output}")
