"""Prompts and scores of our tasks as task files of lm-evaluation-harness."""
