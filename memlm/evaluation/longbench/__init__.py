"""LongBench's prompts and scores."""
