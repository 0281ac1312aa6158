"""Features in, metrics out; independent of training."""
