"""Data sets: splits of labelled images in memory, in files or in tables."""
