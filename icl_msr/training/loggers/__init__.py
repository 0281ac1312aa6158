"""Loggers of numbers and pictures: the CSV file that every run writes, and dashboards, one file for each."""

from icl_msr.training.loggers.base import About, Dashboard, Picture, figures
from icl_msr.training.loggers.metrics_file import MetricsFile
from icl_msr.training.loggers.mlflow import MLflow
from icl_msr.training.loggers.tensorboard import TensorBoard
from icl_msr.training.loggers.trackio import Trackio
from icl_msr.training.loggers.wandb import STEP, WeightsAndBiases

__all__ = [
    "STEP",
    "About",
    "Dashboard",
    "MLflow",
    "MetricsFile",
    "Picture",
    "TensorBoard",
    "Trackio",
    "WeightsAndBiases",
    "figures",
]
