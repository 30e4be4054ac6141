"""Votes of neighbours -> calibrated probabilities -> an answer that backs off; novelty; projection; the card.

Imports model and below; view, reference.py and commands may import it.
"""
