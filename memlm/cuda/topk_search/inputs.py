"""What a search can be given."""

import torch
from torch import Tensor

from memlm.errors import UserError, nearest

METRICS = ("dot", "cosine", "l2")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Positions = tuple[Tensor, Tensor, Tensor]


def check(
    queries: Tensor,
    keys: Tensor,
    k: int,
    metric: str,
    valid: Tensor | None,
    positions: Positions | None,
    scales: Tensor | None,
) -> None:
    """Raise a UserError where `topk_search` cannot take its arguments."""
    if metric not in METRICS:
        raise UserError(
            f"topk_search: metric {metric!r} is not one of {', '.join(METRICS)}"
            f"{nearest(metric, METRICS)}"
        )
    if k < 1:
        raise UserError(f"topk_search: k = {k} must be at least 1")
    fit = queries.ndim == keys.ndim == 3 and queries.shape[0] == keys.shape[0]
    if not fit or queries.shape[2] != keys.shape[2]:
        raise UserError(
            f"topk_search: queries {list(queries.shape)} and keys {list(keys.shape)} do not fit; "
            "they must be [B, T, D] and [B, M, D]"
        )
    if queries.dtype not in FLOATS:
        raise UserError(f"topk_search: queries are {queries.dtype}; they must be {_names(FLOATS)}")
    if keys.dtype not in (*FLOATS, torch.int8):
        raise UserError(
            f"topk_search: keys are {keys.dtype}; they must be {_names(FLOATS)}, or int8 with "
            "scales"
        )
    if (keys.dtype == torch.int8) != (scales is not None):
        problem = "int8 keys need scales" if scales is None else f"scales with {keys.dtype} keys"
        raise UserError(f"topk_search: {problem}; memlm.cuda.quantize_keys makes both")
    _check_each(queries, keys, valid, positions, scales)


def _check_each(
    queries: Tensor,
    keys: Tensor,
    valid: Tensor | None,
    positions: Positions | None,
    scales: Tensor | None,
) -> None:
    """Shapes, types and places of the tensors with one entry per key or query."""
    per_key, per_query = keys.shape[:2], queries.shape[:2]
    given = [("valid", valid, per_key, torch.bool), ("scales", scales, per_key, torch.float32)]
    if positions is not None:
        names = ("key positions", "first", "last")
        shapes = (per_key, per_query, per_query)
        given += [
            (name, x, shape, torch.int64)
            for name, x, shape in zip(names, positions, shapes, strict=True)
        ]
    for name, x, shape, dtype in given:
        if x is not None and (x.shape != shape or x.dtype != dtype):
            raise UserError(
                f"topk_search: {name} are {x.dtype} {list(x.shape)}; they must be {dtype} "
                f"{list(shape)}"
            )
    for name, x in (("keys", keys), *(entry[:2] for entry in given)):
        if x is not None and x.device != queries.device:
            raise UserError(
                f"topk_search: {name} are on {x.device} and queries on {queries.device}; they "
                "must be on one device"
            )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def result_type(queries: Tensor, keys: Tensor) -> torch.dtype:
    """float64 where either is float64, else float32."""
    return torch.float64 if torch.float64 in (queries.dtype, keys.dtype) else torch.float32
