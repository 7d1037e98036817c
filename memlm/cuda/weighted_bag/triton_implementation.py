"""Triton kernels: see triton_bag.py and triton_rows.py."""

from memlm.cuda.weighted_bag.triton_bag import bag, dot
from memlm.cuda.weighted_bag.triton_rows import dense_gradient, row_gradients, update_rows

__all__ = ["bag", "dense_gradient", "dot", "row_gradients", "update_rows"]
