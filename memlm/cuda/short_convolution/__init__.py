"""Causal depthwise convolution over a few tokens: the prologue of gated delta layers.

Per channel, with ``x_t`` of earlier calls in the tail and zero before the document (as in Gu and
Dao, "Mamba", arXiv 2312.00752, and Yang et al., "Gated Delta Networks", arXiv 2412.06464)::

    y_t = activation(sum_j weight[j] x_{t - W + 1 + j})      # j from 0 to W - 1
    y_t <- y_t rsqrt(sum y_t^2 + 1e-6)                       # over a head, where asked for
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from memlm.cuda.dispatch import choose_name
from memlm.cuda.short_convolution import native, operator
from memlm.cuda.short_convolution.inputs import Inputs, Part
from memlm.cuda.short_convolution.reference import short_convolution_reference

__all__ = ["short_convolution"]

# What the Triton kernels are written for.
MAX_WIDTH, MAX_PARTS, MAX_HEAD_DIM = 8, 3, 1024
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    tail: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
    split: Sequence[tuple[int, int, bool]] | None = None,
) -> tuple[Tensor | tuple[Tensor, ...], Tensor]:
    """Convolve a batch of sequences with the inputs before them.

    Args:
        x: ``[B, T, D]``; a view of a wider projection needs no copy where its last dimension is
            contiguous.
        weight: ``[D, 1, W]``, as of ``nn.Conv1d(D, D, W, groups=D)``.
        tail: ``[N, W - 1, D]``, the last inputs before each sequence; default zeros.
        cu_seqlens: int ``[N + 1]``, boundaries of the sequences packed along T (then ``B == 1``);
            empty sequences are allowed. None: one sequence per row, ``N == B``.
        activation: ``"silu"`` or None.
        split: ``(heads, head_dim, normalize)`` of consecutive channels, D in total. Heads of a
            part that says normalize are divided by their length, ``y rsqrt(sum y^2 + 1e-6)``.

    Returns:
        y ``[B, T, D]`` in x's dtype, or with split a tuple of parts ``[B, T, heads, head_dim]``,
        each contiguous; and the new tail ``[N, W - 1, D]`` in x's dtype: the tail of the sequences
        that continue these. Gradients flow through both to x, weight and tail.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation is {activation!r}: expected 'silu' or None")
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if tail is None:
        tail = x.new_zeros(N, weight.shape[-1] - 1, x.shape[-1])
    parts = ((1, x.shape[-1], False),) if split is None else split
    parts = tuple(Part(*part) for part in parts)
    inputs = Inputs(x, weight, tail.to(x.dtype), cu_seqlens, activation == "silu", parts)
    inputs.check()
    refusals = {
        "reference": None,
        "eager": None,
        "native": native.refusal(inputs),
        "triton": _triton_refusal(inputs),
    }
    name = choose_name("short_convolution", refusals, x.device)
    if name == "reference":
        outputs, new_tail = short_convolution_reference(inputs)
    elif name == "native":
        outputs, new_tail = native.forward(inputs)
    else:
        outputs, new_tail = operator.run(name, inputs)
    return (outputs[0].squeeze(2) if split is None else tuple(outputs)), new_tail


def _triton_refusal(inputs: Inputs) -> str | None:
    if inputs.x.dtype not in TRITON_DTYPES:
        return f"x is {inputs.x.dtype}"
    if inputs.reach >= MAX_WIDTH:
        return f"the convolution is {inputs.reach + 1} wide, the kernels take up to {MAX_WIDTH}"
    if len(inputs.parts) > MAX_PARTS:
        return f"there are {len(inputs.parts)} parts, the kernels write up to {MAX_PARTS}"
    longest = max([0, *[part.head_dim for part in inputs.parts if part.normalize]])
    if longest > MAX_HEAD_DIM:
        return f"a normalized head has {longest} channels, the kernels take up to {MAX_HEAD_DIM}"
    return None
