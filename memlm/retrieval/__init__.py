"""Stores of vectors and engines that search them."""

from memlm.retrieval.choice import build_engine, choose_engine, create_engine, load_engine
from memlm.retrieval.engine import RetrievalEngine

__all__ = ["RetrievalEngine", "build_engine", "choose_engine", "create_engine", "load_engine"]
