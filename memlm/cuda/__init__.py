"""Operations: one public function each, several implementations behind `memlm.cuda.dispatch`."""

from memlm.cuda.diagonal_scan import diagonal_scan
from memlm.cuda.large_chunk_memory import LargeChunkMemoryState, large_chunk_memory
from memlm.cuda.linear_cross_entropy import linear_cross_entropy
from memlm.cuda.linear_recurrence import linear_recurrence, linear_recurrence_step
from memlm.cuda.neural_memory import NeuralMemoryState, neural_memory
from memlm.cuda.product_key import product_key_select
from memlm.cuda.short_convolution import short_convolution
from memlm.cuda.topk_search import quantize_keys, topk_search
from memlm.cuda.weighted_bag import (
    LazyAdam,
    PendingReads,
    Reads,
    RowwiseAdagrad,
    gathered_dot,
    row_gradients,
    update_rows,
    weighted_bag,
)

__all__ = [
    "LargeChunkMemoryState",
    "LazyAdam",
    "NeuralMemoryState",
    "PendingReads",
    "Reads",
    "RowwiseAdagrad",
    "diagonal_scan",
    "gathered_dot",
    "large_chunk_memory",
    "linear_cross_entropy",
    "linear_recurrence",
    "linear_recurrence_step",
    "neural_memory",
    "product_key_select",
    "quantize_keys",
    "row_gradients",
    "short_convolution",
    "topk_search",
    "update_rows",
    "weighted_bag",
]
