"""Judging a model on recall: with its memory, and without."""

from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.runner import evaluate

__all__ = ["EvaluationConfig", "evaluate"]
