"""What all rooms use: errors in one line, files that appear whole or not at all, URIs, progress.

Imports nothing of the other rooms; every room may import it.
"""
