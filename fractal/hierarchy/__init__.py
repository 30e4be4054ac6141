"""Names of cell types -> terms of the Cell Ontology -> levels; level columns of the user; the anchors.

Imports base; every room but base may import it.
"""
