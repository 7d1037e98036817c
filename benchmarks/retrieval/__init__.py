"""Exact search against faiss' own, and against its approximate indices.

python -m benchmarks.retrieval --device {cpu,cuda}
"""
