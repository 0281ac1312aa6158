"""What watches a run without taking part in it."""

from icl_msr.callbacks.online import OnlineEvaluation
from icl_msr.callbacks.progress import EpochLines, Throughput

__all__ = ["EpochLines", "OnlineEvaluation", "Throughput"]
