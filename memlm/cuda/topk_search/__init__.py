"""Exact nearest neighbours in one store per row."""

from typing import Literal

from torch import Tensor

from memlm.cuda.dispatch import choose
from memlm.cuda.topk_search import eager, reference
from memlm.errors import UserError, nearest

Metric = Literal["dot", "cosine", "l2"]
METRICS = ("dot", "cosine", "l2")


def topk_search(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: Metric = "dot",
    valid: Tensor | None = None,
    positions: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best visible keys of every query, each row searching its own store.

    Exact, without gradient (recompute the scores of what was retrieved where one is needed).
    Best score first, equal scores by lowest index.

    Args:
        queries: [B, T, D].
        keys: [B, M, D].
        k: results per query, at least 1; may exceed M.
        metric: score of a pair: "dot" = q.k; "cosine" = q.k / (|q| |k|); "l2" = 2 q.k - |k|^2,
            which is -|q - k|^2 up to a constant of the query.
        valid: bool [B, M], keys that may be found.
        positions: (key_positions [B, M], first [B, T], last [B, T]): a query sees only the keys
            with first <= key position < last.

    Returns:
        scores: [B, T, k] float32 (float64 for float64 inputs), -inf where fewer than k keys are
            visible.
        indices: int64 [B, T, k] into the M keys of the row, -1 where fewer than k are visible.

    Raises:
        UserError: unknown metric or k < 1.
    """
    if metric not in METRICS:
        raise UserError(
            f"topk_search: metric {metric!r} is not one of {', '.join(METRICS)}"
            f"{nearest(metric, METRICS)}"
        )
    if k < 1:
        raise UserError(f"topk_search: k = {k} must be at least 1")
    search = choose("topk_search", {"reference": reference.topk_search, "eager": eager.topk_search})
    return search(queries, keys, k, metric, valid, positions)
