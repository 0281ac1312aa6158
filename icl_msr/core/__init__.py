"""Errors, records, configs, run folders, files, ranks and randomness, used by every room."""
