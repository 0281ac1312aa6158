"""Evaluation of encoders, independent of training."""
