"""Search among millions of cells: an index in one folder, that `fractal index` makes and `fractal search` opens.

folder.py      what the files are; opened, checked and mapped
source.py      what is indexed or asked for: a file's vectors in the space of an adapter
build.py       a file of vectors -> an index, and more cells into one
search.py      the nearest cells, by the full vector or a prefix, among all or those that a filter leaves
filters.py     the filters: conditions on columns, and terms of the hierarchy
query.py       questions: cells, or the means of their groups
voters.py      labels for new cells by the votes of all cells of an index
enrichment.py  which types, studies, tissues the hits come from more often than the atlas has them
"""

from fractal.search.index import Hits, Index, open_index

__all__ = ["Hits", "Index", "open_index"]
