"""Causal attention over short rows on a CPU, with a backward pass."""

from typing import Any

import torch
from torch import Tensor

SHORTEST, LONGEST = 128, 512  # tokens; longer rows would keep more than all other activations
_BLOCK = 32  # queries that share one product with the keys


def suits(query: Tensor) -> bool:
    """Whether `short_causal_attention` is the quicker way for queries [B, T, H, D].

    Measured against torch's scaled_dot_product_attention on one thread, forward and backward:
    1.5 times as fast for 4 x 4 heads of 256 tokens and 32 channels, 1.7 times for 2 x 6 heads of
    512 tokens and 64 channels. Without a backward pass torch's is as fast.
    """
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and SHORTEST <= query.shape[1] <= LONGEST
        and query.requires_grad
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def short_causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling * query key^T) value, every token seeing itself and those before it.

    Blocks of queries meet only the keys up to their end, and the probabilities are kept for the
    backward pass: T / 2 numbers per head and token.

    Args:
        query: [B, T, H, D].
        key, value: [B, T, Hkv, D]; H is a multiple of Hkv, and neighbours share a key.
        scaling: of the logits.

    Returns:
        [B, T, H, D].
    """
    batch_size, length, heads, channels = query.shape
    key_heads = key.shape[2]
    group = heads // key_heads
    # The queries that share a key are neighbours in one matrix: [B * Hkv, T * group, D].
    query = query.unflatten(2, (key_heads, group)).transpose(1, 2)
    query = query.reshape(batch_size * key_heads, length * group, channels)
    key, value = (x.transpose(1, 2).reshape(-1, length, channels) for x in (key, value))
    output = _Attended.apply(query, key, value, scaling)
    output = output.view(batch_size, key_heads, length, group, channels)
    return output.transpose(1, 2).reshape(batch_size, length, heads, channels)


class _Attended(torch.autograd.Function):
    """Attention of queries [N, T * group, D] over keys and values [N, T, D]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        length = key.shape[1]
        group = query.shape[1] // length
        query = query * scaling
        later = torch.full((_BLOCK, _BLOCK), -torch.inf, dtype=query.dtype).triu_(1)
        later = later.repeat_interleave(group, 0)
        output = torch.empty_like(query)
        kept = []
        for start, end in _blocks(length):
            rows, size = slice(start * group, end * group), end - start
            logits = torch.bmm(query[:, rows], key[:, :end].transpose(1, 2))
            logits[:, :, start:] += later[: size * group, :size]
            kept.append(logits.softmax(-1))
            output[:, rows] = torch.bmm(kept[-1], value[:, :end])
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.scaling = scaling
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, *kept = ctx.saved_tensors
        length = key.shape[1]
        group = query.shape[1] // length
        # What the softmax takes off: the mean of its gradient under its probabilities.
        mean = (gradient * output).sum(-1, keepdim=True)
        to_query, to_key, to_value = map(torch.zeros_like, (query, key, value))
        for (start, end), weights in zip(_blocks(length), kept, strict=True):
            rows = slice(start * group, end * group)
            incoming = gradient[:, rows]
            to_logits = torch.bmm(incoming, value[:, :end].transpose(1, 2))
            to_logits.sub_(mean[:, rows]).mul_(weights)
            to_query[:, rows] = torch.bmm(to_logits, key[:, :end])
            to_key[:, :end].baddbmm_(to_logits.transpose(1, 2), query[:, rows])
            to_value[:, :end].baddbmm_(weights.transpose(1, 2), incoming)
        return to_query.mul_(ctx.scaling), to_key, to_value, None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(length, start + _BLOCK)) for start in range(0, length, _BLOCK)]
