"""Suites: models with different memories, trained for a task, judged, and laid side by side.

python -m memlm.evaluation.suite NAME [--preset small] [--output DIR] [--processes N]
"""
