"""Search among millions of cells: exact neighbours, and an index in one folder that `fractal index` makes.

It may import the rooms model, data, hierarchy and base; annotate, score, view, the reference and commands import it.
"""

from fractal.search.index import Hits, Index, open_index

__all__ = ["Hits", "Index", "open_index"]
