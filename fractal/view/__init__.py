"""One page that says how good an adapter is: figures, and what to conclude from each.

scored.py gathers the figures, svg.py draws, findings.py makes panels and sentences of them, page.py writes the page.
"""
