"""Exact nearest neighbours in one store per row."""

import importlib
from typing import Literal

import torch
from torch import Tensor

from memlm.cuda.dispatch import choose_name
from memlm.cuda.topk_search import native
from memlm.cuda.topk_search.inputs import METRICS, Positions, check
from memlm.cuda.topk_search.quantization import quantize_keys
from memlm.cuda.topk_search.triton_limits import triton_refusal

__all__ = ["METRICS", "Metric", "quantize_keys", "topk_search"]

Metric = Literal["dot", "cosine", "l2"]
MODULES = {
    "reference": "memlm.cuda.topk_search.reference",
    "eager": "memlm.cuda.topk_search.eager",
    "native": "memlm.cuda.topk_search.native",
    "triton": "memlm.cuda.topk_search.triton_search",
}


@torch.compiler.disable
@torch.no_grad()
def topk_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: Metric = "dot",
    valid: Tensor | None = None,
    positions: Positions | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best visible keys of every query, each row searching its own store.

    Exact, without gradient (recompute the scores of what was retrieved where one is needed). Scores
    are float32 whatever the precision of the keys. Best score first, equal scores (and so 0 and
    -0) by lowest index. A score that is NaN or -infinity is never found.

    Memory beside the arguments and the results does not grow with the number of keys, except for
    the reference, and for the Triton kernels by one float32 per key for a metric other than "dot".

    Args:
        queries: [B, T, D] float32, float16, bfloat16 or float64.
        keys: [B, M, D] of one of these types, or int8 with `scales`. The last dimension should lie
            side by side; every row of a store may lie anywhere.
        k: results per query, at least 1; may exceed M.
        metric: score of a pair: "dot" = q.k; "cosine" = q.k / (|q| |k|); "l2" = 2 q.k - |k|^2,
            which is -|q - k|^2 up to a constant of the query.
        valid: bool [B, M], keys that may be found.
        positions: (key_positions [B, M], first [B, T], last [B, T]), int64: a query sees only the
            keys with first <= key position < last.
        scales: float32 [B, M]: key m of row b is scales[b, m] * keys[b, m]; see `quantize_keys`.

    Returns:
        scores: [B, T, k] float32 (float64 where queries or keys are float64), -inf where fewer
            than k keys are visible.
        indices: int64 [B, T, k] into the M keys of the row, -1 where fewer than k are visible.

    Raises:
        UserError: unknown metric, k < 1, or shapes, types or devices that do not fit.
    """
    check(queries, keys, k, metric, valid, positions, scales)
    refusals = {
        "reference": None,
        "eager": None,
        "native": native.refusal(queries, keys),
        "triton": triton_refusal(queries, keys, k),
    }
    name = choose_name("topk_search", refusals, queries.device)
    search = importlib.import_module(MODULES[name]).topk_search
    with torch.autocast(queries.device.type, enabled=False):
        return search(queries, keys, k, metric, valid, positions, scales)
