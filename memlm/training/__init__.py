"""Training: one loop from a laptop to many devices."""

from memlm.training.trainer import Trainer, TrainSummary

__all__ = ["TrainSummary", "Trainer"]
