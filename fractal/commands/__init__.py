"""The commands of `fractal NAME ...`, one file each, named as the command is."""
