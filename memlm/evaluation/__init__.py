"""Judging models on recall: with their memories, and without."""

from memlm.evaluation.config import EvaluationConfig
from memlm.evaluation.runner import evaluate, evaluate_subjects

__all__ = ["EvaluationConfig", "evaluate", "evaluate_subjects"]
