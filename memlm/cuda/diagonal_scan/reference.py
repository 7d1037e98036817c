"""The diagonal scan token by token, as the formula is written."""

import itertools

import torch
from torch import Tensor

from memlm.cuda.diagonal_scan.inputs import Inputs


def diagonal_scan_reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and the final states [N, D]; differentiable by autograd."""
    B, T, D = inputs.b.shape
    a = inputs.a.to(inputs.state_dtype).flatten(0, 1)
    b = inputs.b.to(inputs.state_dtype).flatten(0, 1)
    bounds = [T * row for row in range(B + 1)]
    if inputs.cu_seqlens is not None:
        bounds = inputs.cu_seqlens.tolist()
    outputs, states = [b.new_zeros(0, D)], [b.new_zeros(0, D)]
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        h = inputs.initial_state[n]
        for t in range(start, end):
            h = a[t] * h + b[t]
            outputs.append(h[None])
        states.append(h[None])
    h = torch.cat(outputs).view(B, T, D)
    return h.to(inputs.b.dtype), torch.cat(states)
