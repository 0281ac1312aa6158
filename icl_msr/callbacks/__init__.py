"""What watches a run without taking part in it."""

from icl_msr.callbacks.checkpoints import PREEMPTED, Checkpoints
from icl_msr.callbacks.online import OnlineEvaluation
from icl_msr.callbacks.progress import EpochLines, Throughput

__all__ = ["PREEMPTED", "Checkpoints", "EpochLines", "OnlineEvaluation", "Throughput"]
