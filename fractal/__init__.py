"""Fractal embeddings of single cells: cut the vector and it climbs the cell hierarchy."""
