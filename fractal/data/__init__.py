"""The Parquet atlas, readers of cells whatever their file, a SCimilarity release, outputs.

Imports hierarchy and base; model and all above may import it.
"""
