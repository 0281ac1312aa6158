"""The command line: words, refusals, sweeps, processes, and how every command ends."""
