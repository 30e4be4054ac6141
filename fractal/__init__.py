"""Fractal embeddings of single cells: truncate the vector and it climbs the cell hierarchy.

    ref = fractal.fit(adata, labels="cell_type", use_rep="X_scVI")
    ref.save("blood_reference"); ref = fractal.load("blood_reference")
    ref.annotate(new); ref.embed(new)
    fractal.truncate(new.obsm["X_fractal"], new.uns["fractal"], 2)

Importing this loads next to nothing: torch comes with the first name that needs it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fractal.data.encoder import encode
    from fractal.data.writers import truncate
    from fractal.fitting import fit
    from fractal.reference import Reference, load
    from fractal.search import open_index

__version__ = "0.1.0"
__all__ = ["Reference", "encode", "fit", "load", "open_index", "truncate"]

LAZY = {
    "Reference": "fractal.reference",
    "encode": "fractal.data.encoder",
    "fit": "fractal.fitting",
    "load": "fractal.reference",
    "open_index": "fractal.search",
    "truncate": "fractal.data.writers",
}


def __getattr__(name: str) -> Any:  # PEP 562
    if name not in LAZY:
        raise AttributeError(f"module 'fractal' has no attribute '{name}'")
    return getattr(importlib.import_module(LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
