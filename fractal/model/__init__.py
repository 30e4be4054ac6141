"""The idea (objective.py), the adapter, the published loss, training, and who is held out.

Imports data, hierarchy, base; annotate, search, score and all above may import it.
"""
