"""Measurements beside other implementations: ``python -m benchmarks.NAME``."""
