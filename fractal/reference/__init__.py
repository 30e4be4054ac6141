"""An adapter put to use: labels for new cells, and the folder that holds all it takes."""
