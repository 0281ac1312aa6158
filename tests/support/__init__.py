"""Shared helpers of the tests: small runs, toys, processes, ranks, run folders and their readers."""
