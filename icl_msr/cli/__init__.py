"""The command line: overrides, error messages, sweeps, processes, and the end of every command."""
