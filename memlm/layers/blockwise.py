"""Attention and feed-forward over some tokens of a row at a time.

Liu and Abbeel 2023, "Blockwise Parallel Transformer for Large Context Models", arXiv 2305.19370:
each block of tokens is computed again in the backward pass, so what lies between its input and its
output is there for one block at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_blocks(function: Callable[..., Tensor], size: int | None, *rows: Tensor) -> Tensor:
    """`function` of rows [..., T, D] token by token, in blocks of `size` tokens; None = at once."""
    if size is None or rows[0].shape[-2] <= size:
        return function(*rows)
    blocks = zip(*(tensor.split(size, -2) for tensor in rows), strict=True)
    return torch.cat([again(function, *block) for block in blocks], -2)


def again(function: Callable[..., Tensor], *inputs) -> Tensor:
    """`function` of the inputs, which is all that is kept; it draws no random numbers."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def attend_in_blocks(
    attend: Callable[..., Tensor],
    size: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    documents: Tensor,
    window: int | None,
) -> Tensor:
    """Attention of blocks of `size` queries, each to the keys from the first it sees to its end.

    Args:
        attend: of queries [B, Q, H, D], keys, values, positions and documents of which the last Q
            are those of the queries.
        query: [B, T, H, D].
        keys, values: [B, K, Hkv, D]; the last T are those of the queries.
        positions, documents: int64 [B, K], see `SequenceLayout`.
        window: columns before which no query sees a key, counted with its own; None = no limit.
    """
    length, columns = query.shape[1], keys.shape[1]
    first = _first_columns(documents, window)[:, columns - length :].amin(0)

    def block(query: Tensor, keys: Tensor, values: Tensor, chosen: slice) -> Tensor:
        seen = (keys, values, positions, documents)
        return attend(query, *(tensor[:, chosen] for tensor in seen))

    outputs, end = [], columns - length
    for start, rows in zip(first[::size].tolist(), query.split(size, 1), strict=True):
        end += rows.shape[1]
        outputs.append(again(block, rows, keys, values, slice(start, end)))
    return torch.cat(outputs, 1)


def _first_columns(documents: Tensor, window: int | None) -> Tensor:
    """int64 [B, K], a column before which the token of each column sees nothing; it never falls."""
    columns = torch.arange(documents.shape[1], device=documents.device)
    latest = documents.cummax(1).values
    begins = latest.diff(dim=1, prepend=latest[:, :1]) > 0
    # The carried document, number 0, may lie behind columns that are empty.
    first = torch.where(begins & (latest > 0), columns, 0).cummax(1).values
    return first if window is None else first.maximum(columns - (window - 1))
