"""Arrays and tables -> pictures: the report, the explorer's page, maps and their colours.

The report: labelled.py and report.py make a `Scored` (scored.py), findings.py its sections, draw.py their panels,
page.py the page. The explorer: shown.py draws cells of a file, explorer.py writes the page, embedding_atlas.py the
hand-over for millions of cells.
"""
