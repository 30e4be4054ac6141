"""Metrics, and one table of scores for eval.py, the report and the card.

Imports model and below; view, reference.py and commands may import it.
"""
