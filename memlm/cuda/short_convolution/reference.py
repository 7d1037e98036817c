"""The short convolution token by token, as the formula is written."""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from memlm.cuda.short_convolution.inputs import L2_NORM_EPS, Inputs


def short_convolution_reference(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """The parts [B, T, heads, head_dim] and the new tails; differentiable by autograd."""
    B, T, D = inputs.x.shape
    dtype, reach = inputs.compute_dtype, inputs.reach
    x = inputs.x.to(dtype).flatten(0, 1)
    weight = inputs.weight.to(dtype).squeeze(1)
    bounds = [T * row for row in range(B + 1)]
    if inputs.cu_seqlens is not None:
        bounds = inputs.cu_seqlens.tolist()
    outputs, tails = [x.new_zeros(0, D)], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        seen = torch.cat((inputs.tail[n].to(dtype), x[start:end]))
        for t in range(end - start):
            y = sum(weight[:, j] * seen[t + j] for j in range(reach + 1))
            outputs.append(y[None])
        tails.append(seen[end - start :])
    y = torch.cat(outputs)
    if inputs.silu:
        y = F.silu(y)
    parts = y.split([part.width for part in inputs.parts], 1)
    parts = [part.reshape(shape) for part, shape in zip(parts, inputs.part_shapes(), strict=True)]
    for i, part in enumerate(inputs.parts):
        if part.normalize:
            squares = parts[i].square().sum(-1, keepdim=True)
            parts[i] = parts[i] * torch.rsqrt(squares + L2_NORM_EPS)
    new_tail = torch.stack(tails) if tails else inputs.tail.to(dtype)
    return [part.to(inputs.x.dtype).contiguous() for part in parts], new_tail.to(inputs.x.dtype)
