"""Votes of neighbours -> calibrated probabilities -> an answer that backs off; novelty; projection; a run over
cells; the card and the folder of a reference.

Imports model and below; view, reference.py and commands may import it.
"""
